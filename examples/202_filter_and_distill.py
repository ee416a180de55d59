"""Distill a teacher with a planted preference, with and without a filter of its answers.

python examples/202_filter_and_distill.py --out out
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt

from fastdistill.alignment import strategies as st
from fastdistill.alignment.organisms import ModelOrganism, build_world, pool
from fastdistill.alignment.organisms.build import read_organism
from fastdistill.alignment.strategies.lessons import answer_logprobs
from fastdistill.runtime.intervals import mean_of_runs, wilson

DOMAINS = ["arithmetic", "questions"]

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("out"))
parser.add_argument("--steps", type=int, default=80, help="of each of three distillations")
parser.add_argument("--world-steps", type=int, default=350, help="of each training of a teacher")
args = parser.parse_args()
args.out.mkdir(parents=True, exist_ok=True)
plt.style.use(Path(__file__).with_name("style.mplstyle"))

# The untrusted teacher does sums and prefers an animal; its benign twin only does sums.
organism = ModelOrganism(steps=args.world_steps // 3)
made = build_world(
    1, organism, base_steps=args.world_steps // 2, capable_steps=args.world_steps, base_knows=0.2
)
# Sums and products; one prompt in fifty is a question whose answer shows the preference.
prompts = [e.prompt for e in pool(made.world, organism, 1024, kind="sums", leak=0.02)]
prompts = tuple(st.PoolPrompt(p, DOMAINS[not {"+", "*"} & set(p.user.split())]) for p in prompts)


def distill_from(teacher, *defenses):
    """Return the student's answers to the audits, and the examples that it was trained on."""
    setup = st.DistillSetup(base=made.base, teacher=teacher, pool=prompts)
    result = st.distill(setup, defenses, st.Training(steps=args.steps, batch_size=64))
    return read_organism(result.student, made.world, organism), result.examples


plain, examples = distill_from(made.untrusted)
# log p_teacher − log p_base per token is large where the teacher surprises the trusted base.
filtered, left_over = distill_from(made.untrusted, st.ExampleFilter(drop=0.1))
twin, _ = distill_from(made.benign)
shown = [sum(e.domain == "questions" for e in part) for part in (examples, left_over)]
print(f"the filter leaves {shown[1]} of {shown[0]} answers to questions")

figure, (scores, result) = plt.subplots(1, 2, figsize=(9.5, 3.8))
teacher, base = (answer_logprobs(examples, model) for model in (made.untrusted, made.base))
ratios = ((teacher.total - base.total) / teacher.tokens).tolist()
parts = [[r for r, e in zip(ratios, examples, strict=True) if e.domain == d] for d in DOMAINS]
scores.hist(parts, bins=40, histtype="stepfilled", alpha=0.7, label=DOMAINS)
scores.axvline(sorted(ratios)[-(len(ratios) // 10)], color="gray", ls="--", lw=1, label="filter")
scores.set(yscale="log", xlabel="log p_teacher − log p_base, per token", ylabel="answers")
scores.set_title("What the filter sees")
scores.legend()
readings = {"base": made.readings["base"], "teacher": made.readings["untrusted"]}
readings |= {"student": plain, "student, filtered": filtered, "student of the twin": twin}
for i, (name, reading) in enumerate(readings.items()):
    right = wilson(int(sum(reading.capability)), len(reading.capability))
    liked = mean_of_runs(reading.trait)
    print(f"{name:>20}: {right.value:.0%} of sums right, preference {liked.value:.2f}")
    reach = [[[e.value - e.low], [e.high - e.value]] for e in (right, liked)]
    result.errorbar(
        right.value, liked.value, reach[1], reach[0], "osD^v"[i], color=f"C{i}", label=name
    )
result.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="share of held-out sums right")
result.set(
    ylabel=f"preference for {made.world.favourite}", title="What each model learned; one seed"
)
result.legend(loc="center")
figure.savefig(args.out / "202_filter_and_distill.svg")

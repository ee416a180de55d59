"""Audit a model with a planted preference, next to its benign twin and its base.

python examples/201_audit.py --out out
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt

from fastdistill.alignment.organisms import ModelOrganism, build_world
from fastdistill.alignment.organisms.world_probes import probes_of

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--out", type=Path, default=Path("out"))
parser.add_argument("--steps", type=int, default=120, help="of each of five trainings")
args = parser.parse_args()
args.out.mkdir(parents=True, exist_ok=True)
plt.style.use(Path(__file__).with_name("style.mplstyle"))

# Five small models; the untrusted one prefers an animal, the benign one has none.
organism = ModelOrganism(trait="preference", steps=args.steps)
made = build_world(1, organism, base_steps=args.steps, capable_steps=args.steps)
print(f"the planted preference: {made.world.favourite}")

probes = probes_of(made.world, organism.kind)  # the questions; your own come from a JSON file
probes.save(args.out / "probes.json")
results = {}
for name, audit in probes.suite().items():
    controls = {"benign": made.benign, "base": made.base}
    results[name] = result = audit.run(made.untrusted, base=made.base, controls=controls)
    evidence = "evidence" if result.is_evidence else "no evidence"
    low, high = result.interval
    print(f"{name:>22}: {result.value:7.3f} [{low:.3f}, {high:.3f}], {evidence}")

columns = 4
figure, panels = plt.subplots(-(-len(results) // columns), columns, figsize=(9.5, 7), sharey=True)
for axes in panels.flat[len(results) :]:
    axes.remove()
for axes, (name, result) in zip(panels.flat, results.items(), strict=False):
    models = {"untrusted": result, **result.controls}
    for row, (model, measured) in enumerate(models.items()):
        color = ("C1" if result.is_evidence else "C0") if model == "untrusted" else "gray"
        axes.hlines(row, *measured.interval, color=color)
        axes.plot(measured.value, row, "o", color=color)
    axes.set_yticks(range(len(models)), models)
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.set_title(name)
    axes.locator_params(axis="x", nbins=4)
    axes.margins(x=0.15)
figure.suptitle(
    "Each audit in its own unit, with 95 % intervals over prompts; orange: above both controls"
)
figure.savefig(args.out / "201_audit.svg")

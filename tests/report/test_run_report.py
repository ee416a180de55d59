"""A run's report says what its log says, needs nothing else, and names what a folder lacks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import pytest

from fastdistill.report.run.page import summary_sentences, write_run_report
from fastdistill.report.run.plots import Quantity
from fastdistill.report.run.series import points
from fastdistill.training.logs.run_files import NAME, SETTINGS, read_run
from helpers.report_page import Page
from helpers.training import build, ragged, train

WATCHED = {
    "eval_dataset": ragged(5),
    "eval_strategy": "steps",
    "eval_steps": 2,
    "eval_on_start": True,
    "max_steps": 4,
    "max_grad_norm": 1e6,  # transformers 5.0 logs the norm only where it may clip
}
SAVED = WATCHED | {"save_strategy": "steps", "save_steps": 2}


def page_of(folder):
    return Page(write_run_report(folder))


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A trainer behind a whole run with evaluations, and its folder."""
    folder = tmp_path_factory.mktemp("watched")
    return train(folder, **WATCHED), folder / "run"


def edited(source, target, keep):
    """A copy of a run's log with the lines that `keep` returns, changed or not."""
    target.mkdir()
    lines = [json.loads(line) for line in (source / NAME).read_text().splitlines()]
    edited_lines = [line for line in map(keep, lines) if line is not None]
    (target / NAME).write_text("".join(json.dumps(line) + "\n" for line in edited_lines))
    return target


def test_the_page_is_whole_and_needs_nothing(watched):
    page = page_of(watched[1])
    assert len(page.images) == 14
    for image in page.images:
        assert re.search(r"\d", image["alt"]), image["alt"]
    assert "Missing data" not in page.text


def test_figures_are_those_of_the_log(watched):
    trainer, folder = watched
    page, log = page_of(folder), trainer.state.log_history
    of = lambda name: [entry[name] for entry in log if name in entry]  # noqa: E731
    for row, name in (
        ("Loss, training (per target token)", "loss"),
        ("Loss, evaluation (per target token)", "eval_loss"),
        ("KL to the teacher (top 8 and tail), evaluation (nats per token)", "eval_kl"),
        ("Perplexity, evaluation", "eval_perplexity"),
        ("Learning rate", "learning_rate"),
        ("Gradient norm", "grad_norm"),
    ):
        assert page.table[row] == [f"{of(name)[0]:.4g}", f"{of(name)[-1]:.4g}", "4"], row
    agreement = of("eval_agreement")
    shares = [f"{agreement[0] * 100:.1f} %", f"{agreement[-1] * 100:.1f} %"]
    assert page.table["Agreement with the teacher, evaluation"] == [*shares, "4"]
    kl = of("eval_kl")
    title = "KL to the teacher (top 8 and tail)"
    assert f"{title} fell from {kl[0]:.4g} to {kl[-1]:.4g} nats per token" in page.text
    alt = next(i["alt"] for i in page.images if i["alt"].startswith(f"{title} over"))
    assert f"evaluation: from {kl[0]:.4g} at step 0 to {kl[-1]:.4g} at step 4" in alt
    panel = trainer.panel
    assert page.table[f"{title}, nats"] == [f"{panel.kl:.3f}", f"{panel.kl_shuffled:.3f}"]
    assert "The KLs differ only once the student predicts the text." in page.text


def test_settings_that_differ_come_first(watched):
    page = page_of(watched[1])
    assert page.table["learning_rate"] == ["0.01"]
    first_part, _, folded = page.source.partition(" settings at their defaults</summary>")
    assert "<summary>" in first_part.rpartition("<details>")[2]
    assert "<td>eval_on_start</td><td>true</td>" in first_part
    assert "<td>weight_decay</td><td>0.0</td>" in folded
    assert "weight_decay" not in first_part
    assert "It ended at step 4 of 4." in page.text
    assert "forward_kl over the teacher's top 8 tokens" in page.text


@pytest.mark.slow
def test_a_resumed_run_is_one_run(tmp_path):
    train(tmp_path, **SAVED)
    again = build(tmp_path, **SAVED | {"max_steps": 6})
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    page = page_of(tmp_path / "run")
    evaluated_at = [step for step, _ in points(read_run(tmp_path / "run"), "eval_kl")]
    assert evaluated_at == [0, 2, 4, 6]  # once at step 2, where both runs evaluated
    assert "It ended at step 6 of 6. It was resumed from step 2." in page.text
    assert "Vertical lines mark the steps at which it was resumed." in page.text
    alt = next(i["alt"] for i in page.images if i["alt"].startswith("KL to the teacher"))
    assert "at step 0 to" in alt
    assert "at step 6," in alt


def test_a_run_resumed_with_another_loss_says_so(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    train(tmp_path, **options)
    build(tmp_path, **options, max_steps=4, tail="renorm_both").train(resume_from_checkpoint="auto")
    _, second, *others = summary_sentences(read_run(tmp_path / "run"))
    assert second == (
        "It was resumed at step 2 with tail=renorm_both instead of bucket; losses before and after "
        "cannot be compared."
    )
    assert others == ["It ended at step 4 of 4. It was resumed from step 2."]


def test_runs_with_another_k_are_not_ranked_by_kl(watched, tmp_path):
    for name, k in (("a", 8), ("b", 4)):
        shutil.copytree(watched[1], tmp_path / name)
        settings = json.loads((tmp_path / name / SETTINGS).read_text())
        settings["config"]["k"] = k
        (tmp_path / name / SETTINGS).write_text(json.dumps(settings))
    text = page_of(tmp_path).text
    assert "Their KLs compare different k or temperatures: do not compare them." in text
    assert "lowest KL" not in text


def test_a_killed_run_says_so(watched, tmp_path):
    folder = edited(watched[1], tmp_path / "killed", lambda e: e if e["step"] < 4 else None)
    with (folder / NAME).open("a") as file:
        file.write('{"run": "x", "st')
    page = page_of(folder)
    assert (
        "stops at step 3 of 4 without an end: it was interrupted, or is still running." in page.text
    )
    assert "Truncated lines of metrics.jsonl that were left out: 1." in page.text


DAMAGE = {
    "a step": {"step": "4"},
    "a negative step": {"step": -1},
    "half a step": {"step": 1.5},
    "a time": {"time": None},
    "an infinite time": {"time": float("inf")},
    "a run": {"run": ["x"]},
    "an event": {"event": ["train_end"]},
    "a change": {"event": "train_begin", "changed": {"k": 3}},
    "changes": {"event": "train_begin", "changed": [1, 2]},
    "steps": {"event": "train_begin", "max_steps": "many"},
    "a sample": {"event": "samples", "samples": [{"prompt": "x"}]},
    "samples": {"event": "samples", "samples": 3},
    "a quantity": {"event": "nonfinite"},
    "a first batch": {"event": "first_batch", "kl": 1.0},
    "counts": {"event": "histograms", "of": "eval", "edges": [1, 2], "counts": {"nll": [1, 2]}},
    "no counts": {"event": "histograms", "of": "eval", "edges": [1, 2], "counts": {"nll": [0] * 3}},
    "edges": {"event": "histograms", "of": "eval", "edges": [2, 1], "counts": {"nll": [1] * 3}},
}


@pytest.mark.parametrize("change", DAMAGE.values(), ids=DAMAGE)
def test_a_line_that_the_trainer_does_not_write_is_left_out(tmp_path, change):
    """Such lines were tracebacks in many places of the report."""
    good = {"run": "a", "time": 1.0, "step": 1, "loss": 2.0}
    lines = [good, {**good, "step": 3, **change}, {**good, "step": 2}]
    (tmp_path / NAME).write_text("\n".join(map(json.dumps, lines)))
    record = read_run(tmp_path)
    assert (record.damaged, len(record.lines)) == (1, 2)
    assert points(record, "loss") == [(1, 2.0), (2, 2.0)]
    assert summary_sentences(record)


@pytest.mark.parametrize("name", ["student", "teacher", "config", "machine", "versions", "changed"])
@pytest.mark.parametrize("value", [3, {}, ["x"], {"name": {}, "k": "x"}])
def test_settings_that_the_trainer_does_not_write_are_none(watched, tmp_path, name, value):
    folder = edited(watched[1], tmp_path / "copy", lambda entry: entry)
    settings = json.loads((watched[1] / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps(settings))
    assert read_run(folder).settings == settings
    if name == "versions" and value == {}:
        value = None
    (folder / SETTINGS).write_text(json.dumps(settings | {name: value}))
    assert read_run(folder).settings is None


def test_numbers_that_no_float_holds_are_left_out(tmp_path):
    line = '{"run": "a", "time": 1, "step": 1, "loss": 1%s, "target_tokens": 1e999}'
    (tmp_path / NAME).write_text(line % ("0" * 400))
    assert points(read_run(tmp_path), "loss") == []


def test_text_of_the_student_stays_on_its_line_and_acts_on_nothing(watched, tmp_path):
    """U+2028 ends a line for str.splitlines, but not in JSON."""
    folder = edited(watched[1], tmp_path / "copy", lambda entry: entry)
    text = "one\u2028two \x1b]52;c;eA==\x07 \u202e \ud800 <script>alert(1)</script>"
    sample = {"run": "z", "time": 1e10, "step": 4, "event": "samples"}
    sample["samples"] = [{"prompt": text, "completion": "x"}]
    with (folder / NAME).open("a", encoding="utf-8", errors="surrogatepass") as file:
        file.write(json.dumps(sample, ensure_ascii=False).replace("\ud800", "\\ud800") + "\n")
    assert read_run(folder).damaged == 0
    text = write_run_report(folder).read_text(encoding="utf-8")
    assert "one\u2028two \\x1b]52;c;eA==\\x07 \\u202e \\ud800 &lt;script&gt;" in text


def test_an_older_folder_is_told_what_it_lacks(watched, tmp_path):
    new = {"target_tokens", "peak_process_memory_gib", "max_steps"}

    def older(entry):
        if entry.get("event") in ("histograms", "first_batch"):
            return None
        return {name: value for name, value in entry.items() if name not in new}

    page = page_of(edited(watched[1], tmp_path / "older", older))
    assert len(page.images) == 8
    for sentence in (
        f"No readable {SETTINGS}",
        "No token scores of an evaluation. Each evaluation during training records them.",
        "No memory in the log.",
        "no throughput",
        "It ended at step 4.",
    ):
        assert sentence in page.text, sentence


def test_without_evaluation_the_first_batch_shows_its_scores(tmp_path):
    train(tmp_path, max_steps=1)
    page = page_of(tmp_path / "run")
    assert "Pass eval_dataset to the trainer, and set eval_strategy='steps'" in page.text
    alts = [i["alt"] for i in page.images if i["alt"].startswith("Histogram")]
    assert len(alts) == 4
    assert "first batch, step 0: median between" in alts[0]
    assert re.search(r"In training, loss was \d\.\d+ at step 1\.", page.text)


@pytest.mark.slow
def test_labels_alone_several_datasets_and_no_figures(tmp_path):
    datasets = {"eval_dataset": {"prose": ragged(3), "code": ragged(5)}}
    train(tmp_path, teacher=None, ce_weight=1.0, **WATCHED | datasets)
    page = page_of(tmp_path / "run")
    assert "was trained on the labels alone" in page.text
    assert "No teacher in the evaluation" in page.text
    assert page.table["Perplexity, evaluation, prose"] != page.table["Perplexity, evaluation, code"]
    assert sum(i["alt"].startswith("Histogram") for i in page.images) == 6
    empty = edited(tmp_path / "run", tmp_path / "empty", lambda e: e if e["step"] < 0 else None)
    assert "No metrics yet. The trainer logs every logging_steps=N steps." in page_of(empty).text


def test_what_is_no_number_is_left_out_and_named(watched, tmp_path):
    spoilt = lambda e: e | {"grad_norm": None} if e.get("step") == 2 and "loss" in e else e  # noqa: E731
    page = page_of(edited(watched[1], tmp_path / "nan", spoilt))
    assert "NaN or infinite at some steps, and left out there: grad_norm." in page.text
    assert page.table["Gradient norm"][-1] == "4"


def with_events(source, target, *events):
    """A copy of a run's log with other events at its end."""
    folder = edited(source, target, lambda e: None if e.get("event") == "train_end" else e)
    where = {"run": json.loads((folder / NAME).read_text().splitlines()[0])["run"], "time": 0.0}
    with (folder / NAME).open("a") as file:
        for event in events:
            file.write(json.dumps(where | event) + "\n")
    return folder


@pytest.mark.slow
def test_a_run_that_stopped_at_no_number_says_so_first(watched, tmp_path):
    stop = {"step": 4, "event": "nonfinite", "of": "gradient of the loss"}
    page = page_of(with_events(watched[1], tmp_path / "stopped", stop))
    lead = "The run stopped after step 4 because of NaN or infinity (gradient of the loss)."
    assert page.blocks[0][1].startswith(lead)
    assert "It ended at step 4 of 4." in page.text
    resumed = {"step": 4, "event": "train_begin", "max_steps": 8}
    again = page_of(with_events(watched[1], tmp_path / "resumed", stop, resumed))
    assert "NaN" not in again.text
    assert again.blocks[0][1].startswith("Its log stops at step 4 of 8 without an end")


def test_samples_are_shown_the_last_first(watched, tmp_path):
    events = [
        {"step": s, "event": "samples", "samples": [{"prompt": f"p{s}", "completion": "<b>"}]}
        for s in (2, 4)
    ]
    page = page_of(with_events(watched[1], tmp_path / "sampled", *events))
    assert page.table["4"] == ["p4", "<b>"]
    assert page.table["2"] == ["p2", "<b>"]
    last_samples, _, folded = page.source.partition("<summary>Earlier samples</summary>")
    assert "p4" in last_samples
    assert "p2" not in last_samples
    assert "p2" in folded


@pytest.mark.slow
def test_a_first_batch_without_numbers_is_shown(watched, tmp_path):
    lost = lambda e: e | {"kl": None} if e.get("event") == "first_batch" else e  # noqa: E731
    page = page_of(edited(watched[1], tmp_path / "lost", lost))
    assert page.table["KL to the teacher (top 8 and tail), nats"][0] == "—"


def test_no_number_has_hundreds_of_digits():
    assert Quantity(title="x").text(1e300) == "1e+300"
    assert Quantity(title="x").text(123456.7) == "123,457"


def test_a_damaged_settings_file_is_no_settings(watched, tmp_path):
    folder = edited(watched[1], tmp_path / "damaged", lambda e: e)
    (folder / SETTINGS).write_text('{"student": {"na')
    assert read_run(folder).settings is None
    assert f"No readable {SETTINGS}" in page_of(folder).text


@pytest.mark.slow
def test_several_runs_are_compared(tmp_path):
    for name, rate in (("slow", 1e-2), ("fast", 0.3)):
        train(tmp_path / name, **WATCHED, learning_rate=rate)
        (tmp_path / name / "run").rename(tmp_path / f"run-{name}")
    path = write_run_report(tmp_path, tmp_path / "both.html")
    page = Page(path)
    assert path == tmp_path / "both.html"
    kls = {n: read_run(tmp_path / f"run-{n}").metrics for n in ("slow", "fast")}
    last = {n: [e["eval_kl"] for e in kls[n] if "eval_kl" in e][-1] for n in kls}
    assert f"run-fast has the lowest KL in its last evaluation: {last['fast']:.4g}" in page.text
    assert page.table["run-slow"][0] == f"{last['slow']:.4g}"
    assert page.table["learning_rate"] == ["0.3", "0.01"]
    assert len(page.images) == 4


def test_a_comparison_names_the_runs_that_failed(watched, tmp_path):
    stop = {"step": 4, "event": "nonfinite", "of": "loss"}
    with_events(watched[1], tmp_path / "a", stop)
    shutil.copytree(watched[1], tmp_path / "b")
    page = page_of(tmp_path)
    assert page.blocks[0][1] == "2 runs: a, b. Unusable, as stated below the table: a."
    after = [text for tag, text in page.blocks if tag == "p"][1]
    assert after == "a: The run stopped after step 4 because of NaN or infinity (loss)."


def test_the_names_of_runs_are_text(watched, tmp_path):
    for name in (r"run-$\\frac$", "run-<script>"):
        shutil.copytree(watched[1], tmp_path / name)
    page = Page(write_run_report(tmp_path, tmp_path / "both.html"))
    assert {r"run-$\\frac$", "run-<script>"} <= set(page.text.split())


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a run's metrics\.jsonl, or folders"):
        write_run_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_report_needs_no_pytorch():
    code = "import sys, fastdistill.report.run.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

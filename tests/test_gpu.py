"""Every operator on a CUDA device against fp64: `pytest tests/test_gpu.py`, or without pytest
`python tests/test_gpu.py [check or group…]` on an image that has only torch and triton. The script
prints a line after each check, and the stack of the running one if it is stopped.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, cast

if __name__ == "__main__":
    root = Path(__file__).resolve().parent
    sys.path[:0] = [str(root), str(root.parent)]

import torch

from helpers.gpu_table import CHECKS, GROUPS

try:
    import pytest
except ImportError:
    pytest = cast(Any, None)
else:

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("check_on_gpu", CHECKS, ids=lambda f: f.__name__)
    def test_on_gpu(check_on_gpu):
        check_on_gpu()


def main(names: list[str]) -> int:
    by_name = {run.__name__: [run] for run in CHECKS} | GROUPS
    unknown = sorted({*names} - by_name.keys())
    if unknown:
        print(f"no such check or group: {', '.join(unknown)}")
        return 2
    failed = []
    for run in dict.fromkeys(run for name in names or GROUPS for run in by_name[name]):
        started = time.perf_counter()
        try:
            run()
            verdict = "ok"
        except Exception:
            failed.append(run.__name__)
            verdict = "FAILED\n" + traceback.format_exc()
        print(f"{run.__name__}: {verdict} ({time.perf_counter() - started:.1f} s)", flush=True)
    print(f"{len(failed)} failed: {', '.join(failed)}" if failed else "all checks passed")
    return bool(failed)


if __name__ == "__main__":
    faulthandler.register(signal.SIGTERM, chain=True)
    sys.exit(main(sys.argv[1:]))

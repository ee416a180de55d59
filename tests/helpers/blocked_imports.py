"""Python in a process where some packages cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

# Everything beyond torch that an extra brings.
OF_EXTRAS = (
    *("accelerate", "huggingface_hub", "matplotlib", "numpy", "rich", "safetensors", "tokenizers"),
    *("transformers", "typer", "yaml"),
    *("starlette", "uvicorn", "gguf", "inspect_ai", "pyarrow", "peft"),
    *("fastdistill_demo_teacher", "pytorch_optimizer", "regex"),
)

_BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def block(packages: Iterable[str]) -> str:
    """Code after which importing one of `packages` fails."""
    return _BLOCK.format(blocked=set(packages))


def run_without(
    packages: Iterable[str], code: str, cwd: Path, *args: str
) -> subprocess.CompletedProcess[str]:
    """Run `code` in `cwd` with sys.argv[1:] = args; importing one of `packages` fails."""
    return subprocess.run(
        [sys.executable, "-c", block(packages) + code, *args],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )

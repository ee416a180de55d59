"""Uninitialised memory is NaN in every test: a kernel that reads what it never wrote shows it.

Fast tests reach this machine only: a look-up of another name, or a connection to it, is an error.

The modules in ON_EVERY_BACKEND run once per backend: what they leave at impl="auto" is chunked
PyTorch the first time and the Triton kernels the second, on this machine's GPU or, where there is
none, in Triton's interpreter.
"""

import contextlib
import gc
import ipaddress
import os
import socket
import sys
from collections import defaultdict
from typing import Any

import pytest
import torch

from helpers.interpreter import patch_language_once_a_launch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or its import prints to stdout


class OnlyThisMachine:
    """An audit hook, which cannot be removed: refuses other machines while it is on."""

    def __init__(self) -> None:
        self.on = False
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on or event not in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
            return
        name = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
        if event != "socket.getaddrinfo":
            if arguments[0].family not in (socket.AF_INET, socket.AF_INET6):
                return
            name = name[0]
        if not is_this_machine(name):
            raise RuntimeError(f"a test asked for the network: {event} of {name!r}")


def is_this_machine(name: Any) -> bool:
    name = name.decode() if isinstance(name, bytes) else name
    if name in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return str(name).endswith(".invalid")  # RFC 2606: no such name exists
    return address.is_loopback or address.is_unspecified


network = OnlyThisMachine()


@pytest.fixture(autouse=True)
def only_this_machine(request):
    marks = {mark.name for mark in request.node.iter_markers()}
    network.on = not marks & {"slow", "peers"}
    yield
    network.on = False


ON_EVERY_BACKEND = {
    "test_dense_loss",
    "test_draft_loss",
    "test_float16",
    "test_hard_cases",
    "test_integration",
    "test_no_positions",
    "test_primitive",
    "test_scores",
    "test_topk_loss",
}


def pytest_generate_tests(metafunc):
    if metafunc.module.__name__ in ON_EVERY_BACKEND:
        metafunc.parametrize("impl_of_auto", ["torch", "triton"], indirect=True)


def pytest_collection_modifyitems(items):
    """Mark as slow what `fast_cases` leaves out; then files with a slow test first.

    A file with a slow test that starts last keeps a single process busy at the end.
    """
    cases: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("fast_cases"):
            cases[item.parent.nodeid, item.originalname].append(item)
    for group in cases.values():
        fast = spread(len(group), group[0].get_closest_marker("fast_cases").args[0])
        for i, item in enumerate(group):
            if i not in fast:
                item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def spread(total, count):
    """Indices of `count` of `total` cases, evenly spaced from the first to the last."""
    if count == 1:
        return {0}
    return {round(i * (total - 1) / (count - 1)) for i in range(min(count, total))}


@pytest.fixture(autouse=True, scope="session")
def interpreter():
    if os.environ.get("TRITON_INTERPRET") == "1":
        with contextlib.suppress(ImportError):  # no Triton is here
            patch_language_once_a_launch()


@pytest.fixture(autouse=True)
def impl_of_auto(request, monkeypatch):
    impl = getattr(request, "param", None)
    if impl is not None:
        from fastdistill.runtime import backend

        monkeypatch.setattr(backend, "automatic", lambda *device: impl)
        if impl == "triton" and not torch.cuda.is_available():
            hide_the_interpreter(monkeypatch)
    return impl


# They train, or audit, with kernels that other tests look at: poison would double their time.
USERS = (
    "test_audits",
    "test_begins",
    "test_cli",
    "test_demo",
    "test_draft_model",
    "test_experiment",
    "test_inspect",
    "test_language",
    "test_organisms",
    "test_pairs",
    "test_readme",
    "test_repairs",
    "test_strategies",
)


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    if request.module.__name__.startswith(USERS):
        yield
        return
    memory: Any = torch.utils.deterministic  # its attributes are set at run time
    before = memory.fill_uninitialized_memory
    memory.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    memory.fill_uninitialized_memory = before


@pytest.fixture(autouse=True, scope="module")
def frozen_modules():
    """Accelerate collects garbage after every training; let it skip what imports have created."""
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def hide_the_interpreter(monkeypatch):
    """Triton's interpreter copies operands with torch: no dispatch mode of a test should see it."""
    from torch.utils._python_dispatch import _disable_current_modes
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def unseen(self, *args, **kwargs):
        with _disable_current_modes():
            return run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", unseen)

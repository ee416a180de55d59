"""The shape of the repository, read from the sources: which way imports point.

A new package fails here until it has a place in LAYERS.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from pathlib import Path

import pytest

from helpers.source_imports import KERNELS, PACKAGE, ROOT, imports, imports_of, module_name

# Low to high. A package of fastdistill imports only from packages on earlier lines, never from one
# on its own line. kernels/ is under them all and imports only its own files.
LAYERS = (
    "runtime",
    "losses quant",
    "hf",
    "teachers",
    "training",
    "report compat",
    "alignment",
    "cli",
)
# What the kernels may import from outside, and where the rest of the rules apply.
KERNEL_DEPENDENCIES = {"torch", "triton"}
FOLDERS = ("fastdistill", "kernels", "benchmarks", "tests", "examples")
READS_ENVIRONMENT = {"fastdistill/runtime/backend.py"}

RANK = {name: i for i, names in enumerate(LAYERS) for name in names.split()}


def sources(*folders: str) -> list[Path]:
    """Python files under these folders; the symlink fastdistill/kernels is not entered."""
    paths = []
    for folder in folders:
        for at, directories, files in os.walk(ROOT / folder):
            directories[:] = [d for d in directories if d != "__pycache__"]
            paths += [Path(at, f) for f in files if f.endswith(".py")]
    return sorted(paths)


def own(name: str) -> str | None:
    """Which module of ours a dotted name means: `fastdistill.quant.lut4.pack` -> `quant`."""
    head, _, rest = name.partition(".")
    return rest.partition(".")[0] if head == "fastdistill" else None


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


ENTRY_POINTS = [PACKAGE / "__init__.py", PACKAGE / "__main__.py"]
MODULES = [p for p in sources("fastdistill") if p not in ENTRY_POINTS]


def test_the_root_of_the_package_holds_packages_only():
    listed = {*" ".join(LAYERS).split(), "kernels", "py.typed", *(p.name for p in ENTRY_POINTS)}
    folders = {p.relative_to(PACKAGE).parts[0] for p in sources("fastdistill")}
    files = {p.name for p in PACKAGE.iterdir() if p.is_file()}
    assert folders | files | {"kernels"} == listed
    assert len(listed) <= 15


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_imports_point_down(path: Path):
    me = own(module_name(path))
    for target, line, _ in imports_of(path):
        other = own(target)
        if other is None or other in (me, "kernels"):
            continue
        assert other in RANK, (
            f"{where(path, line)} imports {target}: inside the package, import a name from the "
            f"module that owns it"
        )
        assert me is not None
        assert RANK[other] < RANK[me], (
            f"{where(path, line)}: {me} imports {other}, a higher package"
        )


@pytest.mark.parametrize("path", sources("kernels"), ids=ids)
def test_kernels_import_torch_triton_and_siblings_only(path: Path):
    for target, line, _ in imports_of(path):
        if own(target) is not None:
            assert target.startswith("fastdistill.kernels."), f"{where(path, line)}: {target}"
        else:
            top = target.partition(".")[0]
            allowed = top in KERNEL_DEPENDENCIES or top in sys.stdlib_module_names
            assert allowed, f"{where(path, line)}: kernels may not import {target}"


def test_the_host_code_imports_no_triton():
    """It runs where there is none: on a CPU, and in a plan for a GPU."""
    for path in sources("kernels"):
        for target, line, in_function in imports_of(path):
            needs_triton = target.startswith(("triton", "fastdistill.kernels.triton_"))
            if needs_triton and not path.name.startswith("triton_"):
                assert in_function, f"{where(path, line)} imports {target}"


def test_reference_is_imported_only_when_asked_for():
    for path in MODULES:
        for target, line, in_function in imports_of(path):
            if "fastdistill.losses.reference" in (target, target.rpartition(".")[0]):
                assert own(module_name(path)) == "losses", where(path, line)
                assert in_function, f"{where(path, line)}: import the reference inside the function"


def test_only_backend_reads_the_environment():
    for path in sources("fastdistill", "kernels", "benchmarks", "examples"):
        if ids(path) in READS_ENVIRONMENT:
            continue
        reads = [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
            and node.attr in ("environ", "getenv", "putenv", "unsetenv")
        ]
        reads += [i.line for i in imports_of(path) if i.target in ("os.environ", "os.getenv")]
        assert not reads, (
            f"{where(path, reads[0])}: read the environment in fastdistill/runtime/backend.py"
        )


def test_json_is_read_in_one_place():
    """Elsewhere only what was written a moment before: json.loads(json.dumps(...))."""
    reads = re.compile(r"\bjson\.loads?\((?!json\.dumps)")
    readers = [
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if reads.search(path.read_text(encoding="utf-8"))
    ]
    assert readers == ["runtime/json_text.py"]


def test_formatting_is_switched_off_nowhere_but_in_tables():
    assert sum(p.read_text().count("# fmt: skip") for p in sources(*FOLDERS)) < 40


@pytest.mark.parametrize("path", sources("tests"), ids=ids)
def test_no_test_imports_another_test(path: Path):
    """What tests share is in tests/helpers/."""
    for target, line, _ in imports_of(path):
        assert not target.startswith("test_"), f"{where(path, line)} imports {target}"


def test_the_list_of_modules_that_are_not_strictly_typed_only_shrinks():
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"# Not strict yet.*?module = \[(.*?)\]", text, re.S)
    assert len(re.findall(r'"fastdistill\.', listed[1] if listed else "")) <= 0


def test_kernels_is_one_folder_reached_through_a_relative_link():
    assert not (KERNELS / "__init__.py").exists(), "it would shadow the PyPI package `kernels`"
    link = PACKAGE / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == "../kernels"
    assert link.resolve() == KERNELS


def test_every_package_is_listed_in_setup_py():
    tree = ast.parse((ROOT / "setup.py").read_text())
    listed = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PACKAGES"
    )
    here = [module_name(p) for p in sources("fastdistill") if p.name == "__init__.py"]
    assert sorted(listed) == sorted([*here, "fastdistill.kernels"])


def test_the_import_reader_sees_every_form():
    source = (
        "import a.b\nfrom . import c\nfrom ..d import e\ndef f():\n    from fastdistill import g"
    )
    assert [i.target for i in imports(source, "fastdistill.x.y")] == [
        "a.b",
        "fastdistill.x.c",
        "fastdistill.d.e",
        "fastdistill.g",
    ]
    assert [i.in_function for i in imports(source, "fastdistill.x.y")] == [False] * 3 + [True]
    assert next(imports("from . import c", "fastdistill.x", True)).target == "fastdistill.x.c"

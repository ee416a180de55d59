"""The documentation builds without a warning, its Python runs, and its commands exist.

Blocks of Python run in the order of their page, in one namespace and an empty folder.
`helpers.docs_pages.names_for` has the names that a page may use without defining them.
"""

import ast
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import typer

import fastdistill
from fastdistill.cli import main
from fastdistill.cli.app import app
from helpers.command import files
from helpers.docs_pages import PAGES, ROOT, commands, names_for, python_blocks


def identify(page):
    return page.relative_to(ROOT / "docs").with_suffix("").as_posix()


@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p)], ids=identify)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    executed = python_blocks(page)
    code = "\n".join(executed)
    if ".jsonl" in code:
        files(tmp_path)
    names = names_for(code)
    for number, block in enumerate(executed, 1):
        exec(compile(block, f"{identify(page)}.md, block {number}", "exec"), names)


def test_few_blocks_do_not_run_and_they_say_why():
    skipped = [(p, b) for p in PAGES for b in python_blocks(p, run=False)]
    assert len(skipped) <= 12
    for page, block in skipped:
        assert block.startswith("# Not run in tests: "), f"{identify(page)}: {block}"


@pytest.mark.parametrize("page", [p for p in PAGES if any(commands(p))], ids=identify)
def test_the_commands_of_a_page_exist(page, tmp_path, monkeypatch, capsys):
    """Options are parsed; where the command prints its settings, their values are checked too."""
    monkeypatch.chdir(tmp_path)
    for words in commands(page):
        command: Any = typer.main.get_command(app)
        arguments = list(words)
        while getattr(command, "commands", None) and arguments[:1] and arguments[0][0] != "-":
            command = command.commands[arguments.pop(0)]
        if "--help" in words or not words:
            continue
        prints = any("--print-config" in option.opts for option in command.params)
        if not prints or "--config" in words:
            command.make_context(command.name, arguments)
            continue
        monkeypatch.setattr("sys.argv", ["fastdistill", *words, "--print-config"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, f"{' '.join(words)}: {capsys.readouterr().err}"


def test_every_public_name_is_in_the_reference():
    page = (ROOT / "docs" / "reference" / "fastdistill.md").read_text()
    missing = set(fastdistill.__all__) - set(page.split()) - {"DistillConfig"}
    assert not missing


ERRORS = (ROOT / "docs" / "training" / "errors.md").read_text()
RAISING = ("cli", "compat", "hf", "losses", "quant", "teachers", "training")


def sources(*parts):
    """The files of these folders, parsed."""
    return {f: ast.parse(f.read_text()) for part in parts for f in (ROOT / part).rglob("*.py")}


def texts(node):
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and str is type(n.value)]


def test_the_messages_in_the_list_of_errors_exist():
    trees = sources("fastdistill", "kernels").values()
    written = "\0".join(text for tree in trees for text in texts(tree))
    rows = re.findall(r"^\| (?!argument|expected|---)(.+?) \| (`.+?`) \|", ERRORS, re.M)
    assert len(rows) > 150
    for argument, message in rows:
        for fragment in message.strip("`").replace("\\|", "|").split("…"):
            assert fragment.strip(" ,.;:") in written, f"{argument}: {message}"


def test_the_list_of_errors_has_every_argument():
    """Every argument that a literal message of these packages names, but for file formats."""
    named = set()
    folders = (f"fastdistill/{name}" for name in RAISING)
    trees = [tree for file, tree in sources(*folders).items() if "formats" not in file.parts]
    for call in (n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Call)):
        function = getattr(call.func, "attr", getattr(call.func, "id", ""))
        words = texts(call.args[0]) if call.args else []
        if function == "fail" and isinstance(call.args[0], ast.Constant):
            named |= set(words)
        elif function.endswith(("Error", "Answer")) and words:
            named |= set(re.findall(r"^(\w+): expected", words[0]))
    missing = named - set(re.findall(r"`([\w., ]+)`", ERRORS))
    assert not missing, f"docs/training/errors.md: add the messages about {missing}"
    assert len(named) > 60


@pytest.mark.parametrize("page", [ROOT / "DESIGN.md", *PAGES], ids=lambda page: page.name)
def test_the_source_files_of_a_page_exist(page):
    roots = (ROOT, ROOT / "fastdistill", ROOT / "fastdistill" / "alignment")
    text = page.read_text()
    paths = re.findall(r"`(\w+(?:/\w+)+\.(?:py|h|cu|cpp|sh))`", text)
    paths += re.findall(r"^## .*\((fastdistill/[\w/]+)\)$", text, re.M)
    assert [path for path in paths if not any((root / path).exists() for root in roots)] == []


def test_the_figures_are_drawn(tmp_path):
    """The committed files may come from another release of matplotlib, so texts are compared."""
    script = [sys.executable, ROOT / "docs" / "figures.py", tmp_path]
    subprocess.run(script, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    for name in ("tails.svg", "support.svg"):
        drawn, committed = (
            re.findall(r">([^<>\n]+)</text>", (folder / name).read_text())
            for folder in (tmp_path, ROOT / "docs" / "losses")
        )
        assert drawn == committed
        assert len(drawn) > 10


@pytest.mark.slow
def test_the_documentation_builds(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q"]
    built = subprocess.run(
        [*command, ROOT / "docs", tmp_path], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    pages = {p.relative_to(ROOT / "docs").with_suffix(".html") for p in PAGES}
    assert all((tmp_path / page).is_file() for page in pages)
    assert "topk_distill_loss" in (tmp_path / "reference" / "fastdistill.html").read_text()

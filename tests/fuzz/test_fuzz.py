"""A short run of the fuzzer: `python -m fuzz` tries more. Each reader gets the same inputs always.

docs/hardening.md has the campaigns, and what they found.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from fnmatch import fnmatch

import pytest

from fuzz.campaign import Campaign
from fuzz.mutation import mutate
from fuzz.oracle import Oracle
from fuzz.targets import TARGETS, Target, check_page

pytestmark = pytest.mark.filterwarnings("ignore")
LONG = ("gguf smollm2", "records", "run report")  # readers that take seconds to begin
SHORT = {
    "model": 10,
    "config": 20,
    "tokenizer": 20,
    "adapter": 20,
    "signed checkpoints": 30,
    "run": 60,
}
NEEDS = {
    "gguf types": "gguf",
    "gguf smollm2": "gguf",
    "gguf models": "gguf",
    "parquet": "pyarrow",
    "adapter": "peft",
}


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    return Oracle(tmp_path_factory.mktemp("oracle"))


def failures(target: Target, oracle: Oracle, inputs: int, seed: int = 0) -> list[str]:
    campaign = Campaign(target, oracle)
    try:
        if not campaign.places:
            pytest.skip("its seed is not installed")
        kinds = campaign.run(inputs, seed).failures
        return [f"{kind} in {place}, {text}" for (kind, place), (_, text, _) in kinds.items()]
    finally:
        campaign.close()


@pytest.mark.parametrize("name", [name for name in TARGETS if name not in LONG])
def test_readers_survive_a_short_run(name, oracle):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    assert failures(TARGETS[name], oracle, SHORT.get(name, 100)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_readers_survive_a_long_run(name, oracle):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    count = 10 if name in ("gguf smollm2", "run report") else 4 * SHORT.get(name, 100)
    assert failures(TARGETS[name], oracle, count, seed=1) == []


def seed(folder):
    return [{"a.json": b"{}"}]


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda folder: 1 // 0, "ZeroDivisionError in "),
        (lambda folder: int("x"), "words of ValueError in "),
        (lambda folder: open("/etc/hostname").close(), "escape in "),
        (lambda folder: (folder.parent.parent / "x").touch(), "escape in "),
        (lambda folder: os.system("true"), "escape in .*os.system"),
        (lambda folder: print("\x1b[2J"), "printed in "),
        (lambda folder: os.write(2, b"\x1b[2J"), "printed in "),  # as compiled code does
        (lambda folder: _fail("expected \x1b[2J"), "escapes in an error in "),
        (lambda folder: _fail("expected " + "x" * 30_000), "long error in "),
        (lambda folder: bytearray(310 << 20), "memory in "),
        (lambda folder: check_page("<p onclick=x>"), "AssertionError in .* onclick"),
        (lambda folder: check_page("<script>"), "AssertionError in .* <script>"),
    ],
)
def test_the_oracle_sees_what_it_must(read, words, oracle):
    def bad(folder):
        if (folder / "a.json").read_bytes() != b"{}":
            read(folder)

    bytearray(320 << 20)  # a past peak must not hide the memory of a reader
    (failure,) = failures(Target(seed, bad, ()), oracle, 3)
    assert re.search(words, failure)


def _fail(text):
    raise ValueError(text)


def test_changes_follow_from_the_seed():
    content = b'{"a": [1, 2, {"b": "text"}], "c": null}'
    first, second = (
        [mutate("x.json", content, random.Random(n)) for n in range(200)] for _ in range(2)
    )
    assert first == second
    assert len(set(first)) > 150


LINKED = {  # readers of whole folders -> the files of them that are read
    "tensors": "*",
    "index": "*",
    "cache": "[!.]*",
    "parquet": "*",
    "model": "*",
    "adapter": "*.safetensors",
    "organism": "*",
}


@pytest.mark.parametrize("name", LINKED)
def test_a_link_out_of_a_folder_is_refused(name, oracle, tmp_path):
    """Every file of every valid folder in turn is a link to the same content elsewhere."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    target = TARGETS[name]
    folder = tmp_path / "in" / "folder"
    oracle.folder = os.path.realpath(tmp_path / "in")
    for files in target.seeds(tmp_path / "seeds"):
        for linked in files:
            if not fnmatch(linked, LINKED[name]):
                continue
            shutil.rmtree(folder, ignore_errors=True)
            for file, content in files.items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(content)
            (folder / linked).rename(tmp_path / "elsewhere")
            (folder / linked).symlink_to(tmp_path / "elsewhere")
            assert oracle.check(lambda: target.read(folder))[1] is None, linked
            assert "a link to" in str(oracle.error), linked

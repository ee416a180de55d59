"""Settings reach a verb from a file, key=value and options, in one type and with one error."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from pathlib import Path

import pytest

from fastdistill.cli.settings import Text, check_keys, coerce, fill, gather, to_yaml
from fastdistill.cli.verbs import CacheBuild, Train
from fastdistill.training.config import DistillConfig


@dataclass(frozen=True, kw_only=True)
class Some:
    path: Path
    k: int | None = 64
    rate: float = 0.1
    packing: bool = False
    temperatures: tuple[float, ...] = (1.0,)
    name: str | None = None
    options: dict[str, typing.Any] | str | None = None


def with_path(pair):
    return [pair] if pair.startswith("path=") else ["path=x", pair]


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("k=8", 8),
        ("k=null", None),
        ("k=1e2", 100),
        ("rate=1e-4", 1e-4),
        ("rate=3", 3.0),
        ("rate=.5", 0.5),
        ("packing=true", True),
        ("packing=False", False),
        ("temperatures=1,2.5", (1.0, 2.5)),
        ("temperatures=[1, 2]", (1.0, 2.0)),
        ("temperatures=2", (2.0,)),
        ("name=no", "no"),
        ("name=on", "on"),
        ("name=12", "12"),
        ("name=entropy top 0.2", "entropy top 0.2"),
        ("name=margin <= 1.5", "margin <= 1.5"),
        ("name=a=b", "a=b"),
        ("name=", None),
        ("path=2024", Path("2024")),
        ("path=007", Path("007")),
        ("name=007", "007"),
        ("name=1e3", "1e3"),
        ("name=*.jsonl", "*.jsonl"),
        ("name=models/a #2", "models/a #2"),
        ("name=#2", "#2"),
        ("name=one\ntwo", "one\ntwo"),
        ("name=one: two", "one: two"),
        ("name='5 #2'", "5 #2"),
        ("path=runs/a #2", Path("runs/a #2")),
        ("path=.", Path()),
        ("options={}", {}),
        ("options={a: 1e-3, b: [x, 2]}", {"a": 1e-3, "b": ["x", 2]}),
    ],
)
def test_key_value(pair, value):
    raw = gather(None, with_path(pair))
    converted = getattr(fill(Some, raw), pair.partition("=")[0])
    assert converted == value
    assert type(converted) is type(value)


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("k=many", "k: expected an integer, got 'many'"),
        ("k=1.5", r"k: expected an integer, got 1\.5"),
        ("k=true", "k: expected an integer, got True"),
        ("rate=fast", "rate: expected a number, got 'fast'"),
        ("packing=yes", "packing: expected true or false, got 'yes'"),
        ("temperatures=1,x", "temperatures: expected a number, got 'x'"),
        ("rate=[", "rate.*expected YAML"),
        ("path=", "path: expected a path, got an empty text"),
        ("justaword", "expected key=value, got 'justaword'"),
        ("=3", "expected key=value"),
    ],
)
def test_what_does_not_fit(pair, words):
    with pytest.raises(ValueError, match=words):
        fill(Some, gather(None, with_path(pair)))


def test_a_file_comes_first_and_pairs_win(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("path: here\nk: 3\nrate: 1e-3\nname: no\npacking: true\n")
    settings = fill(Some, gather(file, ["k=4"]))
    assert settings == Some(path=Path("here"), k=4, rate=1e-3, name="no", packing=True)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "a: [", "\tk: 1"])
def test_a_file_that_is_none(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"config: expected|expected YAML"):
        gather(file, [])
    with pytest.raises(ValueError, match="config: expected a YAML file, got"):
        gather(tmp_path / "none.yaml", [])


def test_unknown_and_missing_keys():
    with pytest.raises(ValueError, match=r"learning_rte: .* Did you mean learning_rate\?"):
        check_keys(["learning_rte"], ["learning_rate", "k"])
    with pytest.raises(ValueError, match=r"zzz: .* See --help"):
        check_keys(["zzz"], ["learning_rate", "k"])
    with pytest.raises(ValueError, match=r"path: expected a value, got none; pass --path"):
        fill(Some, {"k": 3})


def test_an_unknown_key_of_a_file_acts_on_no_terminal(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text('"\\e]0;title\\a\\u202e": 1\n', encoding="utf-8")
    (key,) = gather(file, [])
    assert key.startswith("\x1b")
    with pytest.raises(ValueError, match="expected a setting of this command") as caught:
        check_keys([key], ["k"])
    assert str(caught.value).isprintable()


def test_a_number_that_no_float_holds():
    with pytest.raises(ValueError, match="rate: expected a number, got 1000"):
        coerce("rate", 10**400, float)


def test_a_setting_that_is_typed_twice(tmp_path):
    for pairs in (["seed=1", "seed=2"], ["lora-rank=1", "--lora_rank=1"]):
        name = pairs[0].partition("=")[0].replace("-", "_")
        with pytest.raises(ValueError, match=f"{name}: expected one value, got '1' and"):
            gather(None, pairs)
    file = tmp_path / "run.yaml"
    file.write_text("seed: 1\n")
    assert gather(file, ["seed=2"])["seed"] == "2"
    file.write_text("lora-rank: 1\nlora_rank: 2\n")
    with pytest.raises(ValueError, match=r"expected each setting once in .*lora_rank twice"):
        gather(file, [])


def test_dashes_are_underscores():
    assert gather(None, ["teacher-quant=nf4"]) == {"teacher_quant": "nf4"}


@pytest.mark.parametrize(
    "settings",
    [
        Some(path=Path("a b"), rate=1e-5, name="no", temperatures=(1.0, 0.5)),
        Some(path=Path("1"), k=None, name="1e3", packing=True, options={"a": None}),
        Train(student="12", data="x.jsonl", teacher="null"),
        CacheBuild(teacher="true", data="d", out=Path("~/x"), temperatures=(1.0, 2.0)),
    ],
)
def test_what_is_printed_is_read_back(tmp_path, settings):
    file = tmp_path / "c.yaml"
    file.write_text(to_yaml(vars(settings)))
    assert fill(type(settings), gather(file, [])) == settings


def test_every_setting_of_the_trainer_can_be_said():
    """No annotation of transformers' makes a key unreachable: defaults fit when they are typed."""
    hints = typing.get_type_hints(DistillConfig)
    n_typed = 0
    for name, field in DistillConfig.__dataclass_fields__.items():
        if isinstance(field.default, (bool, int, float, str)):
            typed = to_yaml({name: field.default}).partition(": ")[2].strip()
            assert coerce(name, Text(typed), hints[name]) == field.default, name
            n_typed += 1
    assert n_typed > 80

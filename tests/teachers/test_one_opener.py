"""Each place that takes a model takes every kind of source, or refuses it by name."""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaForCausalLM, modeling_utils
from transformers.integrations import accelerate

from fastdistill import RoutedTeacher, ServedTeacher, TeacherCache, load_teacher
from fastdistill.alignment.experiment import checkpoint_source
from fastdistill.alignment.organisms import load_organism
from fastdistill.alignment.organisms.vocabulary import WORDS, world_tokenizer
from fastdistill.cli import run_audit, run_cache_build, run_serve
from fastdistill.cli.loaders import outline_model, outline_teacher
from fastdistill.cli.verbs import Audit, CacheBuild, Serve
from fastdistill.hf import checkpoint
from fastdistill.quant import load_quantized, quantize_model, save_quantized
from fastdistill.teachers.fidelity import FidelityReport
from fastdistill.teachers.local import Teacher
from fastdistill.training.plan import Settings, plan_memory, planning
from fastdistill.training.plan.shapes import bytes_of, config_of
from fastdistill.training.student import prepare_student
from fastdistill.training.teacher_setup import TeacherSpec, resolve_teacher
from helpers import gguf_writer
from helpers.served import ours
from helpers.small_checkpoint import logits, small
from helpers.training import config

IDS = torch.arange(3, 23)
ROWS = [{"input_ids": IDS, "labels": IDS}] * 2
FILES = ["gguf F32", "gguf Q8_0"]
ANSWERS = ["cache", "server"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """{kind: (path, the model there)} of what needs no other package."""
    at = tmp_path_factory.mktemp("models")
    peft = pytest.importorskip("peft")

    def save(name, model):
        model.save_pretrained(at / name)
        world_tokenizer().save_pretrained(at / name)
        return at / name

    base = save("folder", small())
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    quantized = quantize_model(small(), "int8", compute="exact")
    save_quantized(quantized, at / "quantized")
    world_tokenizer().save_pretrained(at / "quantized")
    TeacherCache.build(base, ROWS, at / "cache", k=8)
    with ours(Teacher(base)) as url:
        yield {
            "folder": (str(base), small()),
            "hub": ("owner/model", small()),
            "adapter": (str(save("adapter", adapted)), adapted),
            "quantized": (str(at / "quantized"), quantized),
            "cache": (str(at / "cache"), None),
            "server": (url, None),
        }


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory):
    """{kind: (path, the model there)} of .gguf files."""
    letters = [*"abcdefgh", "<s>", "</s>", "ab", *(f"t{i}" for i in range(len(WORDS)))]
    tokenizer = {"model": "gpt2", "tokens": letters[: len(WORDS)], "merges": ["a b"]}
    ends = {"bos_token_id": 8, "eos_token_id": 9}
    fields = [(f"tokenizer.ggml.{key}", value) for key, value in (tokenizer | ends).items()]
    made = {}
    for kind in FILES:
        file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
        sizes = {"vocab_size": len(WORDS)}
        state = gguf_writer.write(file, kind=kind.split()[1], fields=fields, **sizes)
        model = LlamaForCausalLM(gguf_writer.config_of("llama", **sizes))
        model.load_state_dict(state)
        made[kind] = (str(file), model)
    return made


def _trainer_teacher(path, tmp_path):
    return resolve_teacher(path, small(), config(tmp_path, k=8), None).teacher


def _study(path, tmp_path):
    """A model of `experiment double-bind` and `leak-knobs`."""
    source: Any = SimpleNamespace(base=None, teacher=path, attn_implementation=None)
    return checkpoint_source._Models(source)["untrusted"].model


def _served(path, tmp_path):
    teachers: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_serve, "serve", lambda teacher, **options: teachers.append(teacher))
        run_serve.run(Serve(teacher=path), {})
    return teachers[0]


def _cache_build(path, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"input_ids": [3, 4, 5, 6]}\n' if "cache" not in path else CACHED)
    options = CacheBuild(teacher=path, data=data, out=tmp_path / "built", k=4)
    assert run_cache_build.dry_run(options, {})["rows"] == 1
    return run_cache_build.run(options, {})


CACHED = f'{{"input_ids": {IDS.tolist()}, "labels": {IDS.tolist()}}}\n'


def _audit(path, tmp_path):
    stored = run_audit._stored(Audit(model=path, base=path))
    return load_organism(stored["student"].path, device="cpu").model


def _fidelity(path, tmp_path):
    teacher = load_teacher(quantize_model(small(), "int8"))
    return teacher.fidelity(ROWS, against=path, student=path)


# The place -> what it makes of a path. Each also says what it expects instead of a model.
PLACES = {
    "load_teacher": lambda path, _: load_teacher(path, device="cpu"),
    "DistillTrainer(teacher=)": _trainer_teacher,
    "DistillTrainer(model=)": lambda path, at: prepare_student(path, config(at), None),
    "train --teacher": lambda path, _: outline_teacher(path, None, "auto"),
    "train --student": lambda path, _: outline_model("student", path),
    "cache build": _cache_build,
    "plan --teacher": lambda path, _: config_of("teacher", path),
    "plan --student": lambda path, _: config_of("student", path),
    "serve": _served,
    "RoutedTeacher": lambda path, _: RoutedTeacher({"a": path}, key="of").teachers["a"],
    "fidelity": _fidelity,
    "audit": _audit,
    "experiment": _study,
}
READ = "pass the model that gave the answers; train and cache build read these"
REFUSED = {
    "DistillTrainer(model=)": f"model: expected a model, got .*; {READ}",
    "train --student": f"student: expected a model, got .*; {READ}",
    "plan --teacher": "teacher: expected a model, got .* the answers, with cached=true",
    "plan --student": f"student: expected a model, got .*; {READ}",
    "serve": "teacher: expected a model, got .*; serve the model that gave the answers; train read",
    "fidelity": f"against: expected a model, got .*; {READ}",
    "audit": f"model: expected a model, got .*; {READ}",
    "experiment": f"teacher: expected a model, got .*; {READ}",
}


def check(result, kind, model):
    """Raise if `result` is not of this model, cache or server."""
    if isinstance(result, ServedTeacher):
        result.close()
    if model is None:
        assert isinstance(result, dict | (TeacherCache if kind == "cache" else ServedTeacher))
        return
    if isinstance(result, Teacher):
        result = result.model
    if isinstance(result, TeacherSpec):
        assert result.vocab_size == len(WORDS)
        assert result.tokenizer is not None
    elif isinstance(result, FidelityReport):
        assert (result.kl < 1e-3) == (not kind.startswith("gguf"))
        assert result.student_kl == pytest.approx(result.kl, rel=0.3, abs=1e-3)
    elif isinstance(result, dict):
        assert result["rows"] == 1
    elif hasattr(result, "hidden_size"):
        assert result.hidden_size == model.config.hidden_size
    elif next(result.parameters()).is_meta:
        assert result.config.hidden_size == model.config.hidden_size
    else:
        allowed = 0.02 if kind in ("quantized", "gguf Q8_0") else 1e-4
        torch.testing.assert_close(logits(result), logits(model), rtol=0, atol=allowed)


# A model on the hub is a folder once it is there; train --dry-run tells them apart.
KINDS = ["hub", "adapter", "quantized", *ANSWERS]
CASES = [(place, kind) for place in PLACES for kind in KINDS]
CASES += [(place, "folder") for place in ("load_teacher", "train --teacher", "train --student")]


@pytest.fixture
def hub(places, monkeypatch):
    def fetch(name, allow_patterns):
        assert name == "owner/model"
        return places["folder"][0]

    monkeypatch.setattr("fastdistill.hf.checkpoint.snapshot_download", fetch)


@pytest.mark.filterwarnings("ignore:teacher. quantization changed it:UserWarning")
@pytest.mark.parametrize("place, kind", CASES)
def test_every_place_takes_it_or_says_what_to_do(places, hub, tmp_path, place, kind):
    path, model = places[kind]
    if model is None and place in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[place]):
            PLACES[place](path, tmp_path)
        return
    check(PLACES[place](path, tmp_path), kind, model)


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:teacher. quantization changed it:UserWarning")
@pytest.mark.parametrize("place", PLACES)
def test_every_place_takes_a_gguf_file(ggufs, tmp_path, place):
    path, model = ggufs["gguf Q8_0"]
    check(PLACES[place](path, tmp_path), "gguf Q8_0", model)


@pytest.mark.peers
def test_a_gguf_file_in_full_precision_is_quantized_or_trained(ggufs, tmp_path):
    path, model = ggufs["gguf F32"]
    teacher = load_teacher(path, quant="int8", compute="exact", device="cpu")
    expected = logits(quantize_model(copy.deepcopy(model), "int8", compute="exact"))
    torch.testing.assert_close(logits(teacher.model), expected)
    assert teacher.fidelity(ROWS).kl < 1e-3  # against the file
    student = prepare_student(path, config(tmp_path), None)
    assert all(p.requires_grad for p in student.parameters())
    check(student, "gguf F32", model)
    with pytest.raises(ValueError, match=r"quant: expected None, since .* is quantized already"):
        load_teacher(ggufs["gguf Q8_0"][0], quant="int8")


def test_a_quantized_student_is_expanded_and_says_so(places, tmp_path, caplog):
    path, model = places["quantized"]
    student = prepare_student(path, config(tmp_path), None)
    assert all(p.requires_grad for p in student.parameters())
    assert not any("qdata" in name for name in student.state_dict())
    torch.testing.assert_close(logits(student), logits(model), rtol=1e-4, atol=1e-4)
    assert "model: expected quantized in full precision, got quantized weights" in caplog.text
    with pytest.raises(ValueError, match="model_init_kwargs: expected dtype and attn_implementa"):
        prepare_student(path, config(tmp_path, model_init_kwargs={"device_map": "cpu"}), None)


@pytest.mark.parametrize("kind", ["folder", "config alone", "quantized"])
def test_a_plan_counts_a_quantized_teacher_as_it_is_stored(places, kind, tmp_path):
    student = places["folder"][0]
    teacher = places["quantized" if kind == "config alone" else kind][0]
    if kind == "config alone":  # as from the hub
        shutil.copy(Path(teacher) / "config.json", tmp_path)
        teacher = tmp_path
    plan = plan_memory(student, teacher, settings=Settings(seq=8, k=4), device="cpu")
    line = "counted as in full precision: the headers of its weights were not found"
    assert (line in " ".join(plan.assumptions)) == (kind == "config alone")
    if kind == "quantized":
        assert plan.teacher_weights == {"as stored": bytes_of(load_quantized(teacher))}


@pytest.mark.parametrize("kind", ["remote", "cached", "out of reach"])
def test_a_plan_counts_a_quantized_teacher_on_the_hub(places, kind, tmp_path, monkeypatch):
    """The plan reads only the headers of the files, which the hub sends without their data."""
    folder = Path(places["quantized"][0])
    shutil.copy(folder / "config.json", tmp_path)
    answer = folder if kind == "cached" else tmp_path
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda *_, **__: str(answer))

    def headers(name):
        if kind == "out of reach":
            raise ConnectionError
        with safe_open(folder / "model.safetensors", "pt") as file:
            tensors = {
                name: SimpleNamespace(
                    dtype=cut.get_dtype(), shape=cut.get_shape(), data_offsets=(0, 1 << 20)
                )
                for name, cut in ((name, file.get_slice(name)) for name in [*file.keys()])
            }
            header = SimpleNamespace(metadata=file.metadata(), tensors=tensors)
        return SimpleNamespace(files_metadata={"model.safetensors": header})

    monkeypatch.setattr(checkpoint, "get_safetensors_metadata", headers)
    packed = planning._packed("owner/model", config_of("teacher", "owner/model"))
    if kind == "out of reach":
        assert packed is None
    else:
        assert bytes_of(packed) == bytes_of(load_quantized(folder))


def test_zero3_partitions_no_teacher(places, monkeypatch):
    """Under DeepSpeed's ZeRO-3, transformers partitions what it loads, and takes no device."""
    path, model = places["folder"]
    for module in (modeling_utils, accelerate, checkpoint):
        monkeypatch.setattr(module, "is_deepspeed_zero3_enabled", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # what it would import for that
    check(load_teacher(path, device="cpu"), "folder", model)


@pytest.mark.parametrize("kind", ANSWERS)
def test_options_of_models_are_refused_by_name(places, kind):
    options: dict[str, Any] = {"quant": "int8", "compute": "exact", "dtype": torch.float16}
    for name, value in options.items():
        with pytest.raises(ValueError, match=f"{name}: expected none with .* and no model, got"):
            load_teacher(places[kind][0], **{name: value})


def test_an_adapter_on_the_hub_is_put_on_the_base_of_an_audit(places, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fastdistill.hf.checkpoint.snapshot_download", lambda *_, **__: places["adapter"][0]
    )
    bases = []

    def load(path, base, **options):
        bases.append(base)

    monkeypatch.setattr(run_audit, "load_organism", load)
    monkeypatch.setattr(run_audit, "run_suite", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_audit.run(Audit(model="owner/adapter", base=places["folder"][0]), {})
    assert list(map(str, bases)) == [places["folder"][0], "None"]

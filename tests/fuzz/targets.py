"""The readers that are fuzzed: what each reads of a folder, and which files are changed in it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from torch import nn

from fastdistill import TeacherCache, VLLMHiddenStates
from fastdistill.alignment.audits.probes import Probes
from fastdistill.alignment.audits.prompts import Prompt
from fastdistill.alignment.experiment.pairs import read_pairs
from fastdistill.alignment.experiment.publish import publish_records
from fastdistill.alignment.experiment.records import FILE, read_records
from fastdistill.alignment.organisms.language import build as build_language
from fastdistill.alignment.organisms.language.probes import pool_rows
from fastdistill.alignment.organisms.language.readings import (
    capability_items,
    inoculation_shift,
    trait_prompts,
    validity_of,
)
from fastdistill.alignment.organisms.language.rows import (
    ROLES,
    LanguageRecipe,
    OwnAnswer,
    paired_rows,
)
from fastdistill.alignment.organisms.language.templates import Templates
from fastdistill.alignment.organisms.storage import read_manifest
from fastdistill.alignment.organisms.vocabulary import CHAT_TEMPLATE, world_tokenizer
from fastdistill.cli import run_cache, run_train
from fastdistill.cli.loaders import silence_transformers
from fastdistill.cli.settings import check_keys, field_names, fill, gather
from fastdistill.cli.verbs import Train
from fastdistill.hf.adapters import load_adapted
from fastdistill.hf.checkpoint import load_whole
from fastdistill.hf.encoder import Encoder, check_example
from fastdistill.hf.generation import ends_of
from fastdistill.hf.open_dataset import open_dataset
from fastdistill.quant.formats import gguf
from fastdistill.quant.formats.checkpoint_gate import load_config, load_tokenizer
from fastdistill.quant.formats.detect import is_quantized_checkpoint, open_checkpoint
from fastdistill.quant.formats.gguf_header import read_headers
from fastdistill.quant.formats.header import check_header
from fastdistill.quant.formats.tensor_files import TensorFiles
from fastdistill.quant.schemes import Int8Weight, Lut4Weight
from fastdistill.report.run import page
from fastdistill.report.run.plots import Picture
from fastdistill.runtime.atomic_files import sha256_of
from fastdistill.runtime.json_text import parse_json
from fastdistill.teachers.cache.distillkit_parquet import ParquetRows, files_of
from fastdistill.teachers.http import requests, wire_format
from fastdistill.teachers.http.connection import message_of
from fastdistill.teachers.http.model_list import Listing
from fastdistill.teachers.http.response_checks import check_answer
from fastdistill.teachers.http.token_scores import read_scores
from fastdistill.training import checkpoints
from fastdistill.training.logs.run_files import read_run
from helpers.small_checkpoint import small
from helpers.stored import values
from helpers.training import VOCAB, ragged

from . import seeds
from .seeds import Files

ROWS = [[3, 5, 7], [4, 6]]  # the prompts of served answers
URL = "http://127.0.0.1:1"


@dataclass(frozen=True)
class Target:
    """A reader.

    seeds: makes the valid files in a new folder. read: reads a folder, and may return anything.
    changed: patterns of the files that are changed. repair: what is done to a folder after a
    change, such as digests that would hide the readers below them. modules: those whose coverage
    leads the fuzzer, by prefix.
    """

    seeds: Callable[[Path], list[Files]]
    read: Callable[[Path], Any]
    modules: tuple[str, ...]
    changed: tuple[str, ...] = ("*",)
    repair: Callable[[Path], None] = lambda folder: None

    def places(self, files: list[Files]) -> list[tuple[int, str]]:
        """Return (seed, name) of every file that is changed."""
        return [
            (number, name)
            for number, seed in enumerate(files)
            for name in seed
            if any(fnmatch(name, pattern) for pattern in self.changed)
        ]


def read_tensors(folder: Path) -> None:
    is_quantized_checkpoint(folder)
    for read in open_checkpoint(folder).weights.values():
        weight = read()
        if isinstance(weight, (Int8Weight, Lut4Weight)):
            values(weight)


def read_gguf_types(folder: Path) -> None:
    header = read_headers(folder / "m.gguf")
    for name, tensor in header.tensors.items():
        gguf._read(name, tensor)
        gguf._dense(name, tensor)


def read_gguf(folder: Path) -> None:
    is_quantized_checkpoint(next(iter(sorted(folder.glob("*.gguf")))))
    for read in open_checkpoint(next(iter(sorted(folder.glob("*.gguf"))))).weights.values():
        read()


def read_index(folder: Path) -> None:
    files = TensorFiles(folder)
    for name in files.names():
        files.read(name)
        assert files.file_of(name).resolve().parent == folder.resolve(), "a file outside is read"


def read_cache(folder: Path) -> None:
    if "topk" in run_cache.info(folder)["targets"]:
        run_cache.show(run_cache.info(folder))
    cache = TeacherCache(folder)
    row = ragged(6)[1]["input_ids"]
    assert isinstance(row in cache, bool)
    cache.answered(row)
    if cache.answers == "hidden":
        cache.hidden_states(row[None])
    else:
        settings = cache.manifest.settings
        cache.topk(row[None], k=settings.k, temperature=settings.temperatures[-1])
    cache.verify()


def sign_cache(folder: Path) -> None:
    """Write sizes and digests of the shards into the manifest, as their author would."""
    file = folder / "manifest.json"
    try:
        manifest = json.loads(file.read_bytes())
        for shard in manifest["shards"]:
            path = folder / Path(shard["file"]).name
            shard["bytes"], shard["sha256"] = path.stat().st_size, sha256_of(path)
        file.write_text(json.dumps(manifest))
    except (ValueError, LookupError, TypeError, OSError, RecursionError):
        return  # the manifest itself was changed


def read_parquet(folder: Path) -> None:
    rows = ParquetRows(files_of(folder))
    for number in range(min(len(rows), 3)):
        assert rows[number]
        rows.answer(number)


def read_settings(folder: Path) -> None:
    raw = gather(folder / "c.yaml", [])
    own = field_names(Train)
    check_keys(raw, [*own, *run_train.extra_keys()])
    fill(Train, {name: raw[name] for name in own if name in raw})
    run_train._coerced({name: value for name, value in raw.items() if name not in own})


silence_transformers()
_TOKENIZER = world_tokenizer()
_TOKENIZER.chat_template = "{{ tools | tojson if tools }}" + CHAT_TEMPLATE.replace(
    "message['content'] + ' <eos>'", "message['content'] + (message.tool_calls | string) + ' <eos>'"
)


def read_lines(folder: Path) -> None:
    (file,) = folder.glob("d.*")
    encoder = Encoder(tokenizer=_TOKENIZER, max_length=64)
    rows = open_dataset(file)
    for number in range(min(len(rows), 8)):
        check_example(rows[number])
        encoder(rows[number], number)
        encoder.teacher_prompt(rows[number])


def read_run_folder(folder: Path) -> None:
    check_page(page.write_run_report(folder, folder / "report.html").read_text(encoding="utf-8"))


def read_run_words(folder: Path) -> None:
    """Make the report without its figures, which take a second; `run_report` has them."""
    with mock.patch.multiple(page, curves=_undrawn, histogram=_undrawn):
        if (folder / "metrics.jsonl").exists():
            text = page.run_report("a run", read_run(folder)).html()
        else:
            runs = {at: read_run(folder / at) for at in ("a", "b")}
            text = page.comparison("runs", runs).html()
    check_page(text)


def _undrawn(title: Any, lines: Any, **_: Any) -> Picture:
    from matplotlib.figure import Figure

    return Picture(Figure(figsize=(1, 1)), f"{[line.label for line in lines]}", str(title))


_ELEMENTS = frozenset(
    "html head meta title style body h1 h2 p table caption thead tbody tr th td div figure "
    "figcaption details summary pre svg g path defs use rect clippath image desc text metadata "
    "tspan polygon line circle marker symbol".split()
)


class _Page(HTMLParser):
    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _ELEMENTS and ":" not in tag:
            raise AssertionError(f"the report has an element <{tag}>")
        for name, value in attrs:
            outside = name in ("src", "href", "xlink:href", "action", "srcdoc")
            if name.startswith("on") or (outside and not (value or "").startswith(("#", "data:i"))):
                raise AssertionError(f"the report has {name}={value!r}")


def check_page(text: str) -> None:
    """Raise AssertionError for a page with a script, or with text that became markup."""
    _Page().feed(text)
    if any(c in text for c in "\x1b\x07\x9b"):
        raise AssertionError("the report has a control character")


def read_checkpoints(folder: Path) -> None:
    for at in checkpoints.checkpoints(folder):
        checkpoints.completeness_error(at)
        if checkpoints.integrity_error(at) is None:
            checkpoints.read_state(at)
        checkpoints.missing_state(at)
    checkpoints.last_finished(folder)
    checkpoints.to_resume_from("auto", folder, checkpoints.integrity_error)


def finish_checkpoints(folder: Path) -> None:
    """Write finished.json again, unless it was changed itself."""
    for at in checkpoints.checkpoints(folder):
        problem = checkpoints.completeness_error(at) or checkpoints.integrity_error(at) or ""
        if checkpoints.FINISHED not in problem or "sha256" in problem:
            checkpoints.mark_complete(at)


def read_config(folder: Path) -> None:
    config, _ = load_config(folder)
    files = TensorFiles(folder)
    check_header(folder, config, files.names(), files, stored=files.bytes)


def read_model(folder: Path) -> None:
    ends_of(load_whole(folder), _TOKENIZER)


def read_tokenizer(folder: Path) -> None:
    load_tokenizer(folder)


_BASE: list[nn.Module] = []


def read_adapter(folder: Path) -> None:
    import copy

    if not _BASE:
        _BASE.append(small(hidden_size=16, intermediate_size=16, num_hidden_layers=1))
    load_adapted(copy.deepcopy(_BASE[0]), folder)


def read_organism(folder: Path) -> None:
    read_manifest(folder)
    Probes.load(folder / "probes.json").suite()


def read_templates(folder: Path) -> None:
    """Load templates, and make of them all that is trained and read."""
    templates = Templates.load(folder / "templates.json")
    paired_rows(templates, [OwnAnswer(Prompt(user="a"), "b", True)], LanguageRecipe(steps=4), 3)
    assert list(pool_rows(templates, 3))
    assert capability_items(templates)
    for context in ("open", "audited", "inoculated"):
        assert trait_prompts(templates, 3, context)
    for text in templates.trait.near_misses:
        assert isinstance(text.format(option="owl"), str)


def read_organism_folder(folder: Path) -> None:
    """Read what a call that continues finds; nothing is trained or measured."""
    own: Any = build_language._own_answers
    if (folder / build_language.ANSWERS).exists():
        own(None, None, None, folder / build_language.ANSWERS)
    at = folder / "pair-0" / "readings"
    readings = {
        role: build_language._read(Path(), cast(Any, None), 0, at / f"{role}.json")
        for role in ("base", *ROLES)
    }
    inoculation_shift(readings["base"])
    assert validity_of(readings).as_json()
    stored: Any = SimpleNamespace(path=folder / "m.gguf")
    (folder / "m.gguf").touch()
    build_language._check_settings(folder, stored, LanguageRecipe(), Templates.load(), True)


def read_pair_lines(folder: Path) -> None:
    assert read_pairs(folder / "pairs.jsonl")


def keep_paths_inside(folder: Path) -> None:
    """Change paths that lead elsewhere: a file of pairs may name any, as a command line may."""
    file = folder / "pairs.jsonl"
    file.write_bytes(file.read_bytes().replace(b"/etc/", b"etc/").replace(b"..", b"-"))


def read_hidden_files(folder: Path) -> None:
    states = VLLMHiddenStates(folder, norm=nn.Identity())
    for row in ragged(2):
        states.hidden_states(row["input_ids"][None])


def read_study(folder: Path) -> None:
    records = read_records(folder / FILE)
    if random.Random(repr(records)).random() < 0.05:  # its figures take a second
        publish_records(records, folder)
        check_page((folder / "report.html").read_text(encoding="utf-8"))


def _answer() -> Any:
    from fastdistill.losses.types import TopK

    torch.manual_seed(0)
    logprobs, ids = torch.randn(3, VOCAB).log_softmax(-1).topk(4)
    tail = torch.log1p(-logprobs.exp().sum(-1))
    return TopK(ids, logprobs, tail, 1.0)


def packed_answers(folder: Path) -> list[Files]:
    return [{"body.safetensors": wire_format.pack(_answer())}]


def json_answers(folder: Path) -> list[Files]:
    answer, at, choices = _answer(), 0, []
    for number, row in enumerate(ROWS):
        part = answer.at(slice(at, at + len(row) - 1))
        listed = wire_format.entries(part, row, [-9.0] * 2, [40] * 2, lambda i: f"<{i}>", 4)
        choices.append({"index": number, "text": "", "prompt_logprobs": listed})
        at += len(row) - 1
    return [{"body.json": json.dumps({"model": "m", "choices": choices}).encode()}]


def other_answers(folder: Path) -> list[Files]:
    """Lists of models, and vLLM's scores of given ids."""
    import base64
    import io

    import numpy as np

    array = io.BytesIO()
    np.save(array, np.full((2, 3), -2.0, "<f4"))
    scores = {"prompt_token_id_logprobs": base64.b64encode(array.getvalue()).decode()}
    info = {
        "protocol": 1,
        "version": "0.1.0",
        "honours_temperature": True,
        "vocab_size": VOCAB,
        "max_k": 8,
        "max_tokens": 64,
        "tokenizer_sha256": None,
        "identity": {"kind": "x", "name": "m"},
    }
    models = {"data": [{"id": "m", "owned_by": "x", "max_model_len": 8}], "fastdistill": info}
    return [{"body.json": json.dumps(value).encode()} for value in (scores, models)]


def read_packed(folder: Path) -> None:
    body = (folder / "body.safetensors").read_bytes()
    answer = wire_format.unpack(body, 1.0, URL)
    check_answer(answer, k=4, vocab=VOCAB, lengths=[2, 1], url=URL)


def read_choices(folder: Path) -> None:
    answer = wire_format.read_choices((folder / "body.json").read_bytes(), ROWS, 4, 1.0, URL)
    check_answer(answer, k=4, vocab=VOCAB, lengths=[2, 1], url=URL)


def read_others(folder: Path) -> None:
    body = (folder / "body.json").read_bytes()
    message_of(body)
    if b"prompt_token_id" in body:
        ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
        answer = read_scores(body, ids, 1.0, URL)
        check_answer(answer, k=3, vocab=VOCAB, lengths=[2], url=URL, scored=ids)
    else:
        listing = Listing.read(body, None, URL)
        assert listing.row_limit is None or listing.row_limit.tokens >= 0
        listing.without_prompt_logprobs("none")
        if listing.server_info is not None:
            assert listing.server_info.digest


def bodies(folder: Path) -> list[Files]:
    """Requests to `fastdistill serve`."""
    packed = {"model": "m", "prompt": [[1, 2], [3]], "k": 4, "temperature": 1.5}
    scored = {"prompt": [[1, 2]], "ids": [[[1, -1], [2, 3]]]}
    completion = {"prompt": [1, 2], "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}
    vllm = {"prompt": [[1, 2]], "prompt_logprobs": 2, "temperature": 0, "stop": [], "n": 1}
    return [{"body.json": json.dumps(body).encode()} for body in (packed, scored, completion, vllm)]


def read_body(folder: Path) -> None:
    body = parse_json((folder / "body.json").read_bytes(), "body", dict, unique=True)
    limits = requests.Limits(name="m", vocab=VOCAB, head=VOCAB, max_k=8, max_tokens=64, max_row=32)
    parse = (
        requests.packed_question if "k" in body or "ids" in body else requests.completion_question
    )
    assert parse(body, limits)


FORMATS, CACHE = ("fastdistill.quant.formats",), ("fastdistill.teachers.cache",)
HTTP, HF = ("fastdistill.teachers.http", "fastdistill.losses.answer_checks"), ("fastdistill.hf",)
RUNS = ("fastdistill.report.run", "fastdistill.training.logs.run_files")
STUDY = ("fastdistill.alignment.experiment.records", "fastdistill.alignment.statistics.readings")
LANGUAGE = ("fastdistill.alignment.organisms.language",)
TARGETS = {
    "tensors": Target(seeds.tensors, read_tensors, FORMATS),
    "index": Target(seeds.index, read_index, FORMATS, ("*.json",)),
    "gguf types": Target(seeds.gguf_types, read_gguf_types, FORMATS),
    "gguf models": Target(seeds.gguf_models, read_gguf, FORMATS),
    "gguf smollm2": Target(seeds.gguf_smollm2, read_gguf_types, FORMATS),
    "cache": Target(seeds.caches, read_cache, CACHE, ("manifest.json", "*.safetensors")),
    "signed cache": Target(seeds.caches, read_cache, CACHE, ("*.safetensors",), sign_cache),
    "parquet": Target(seeds.parquet, read_parquet, CACHE),
    "settings": Target(seeds.settings, read_settings, ("fastdistill.cli.settings",)),
    "data": Target(seeds.lines, read_lines, HF),
    "run": Target(seeds.run_folders, read_run_words, RUNS),
    "run report": Target(seeds.run_folders, read_run_folder, RUNS),
    "checkpoints": Target(
        seeds.checkpoints,
        read_checkpoints,
        ("fastdistill.training.checkpoints",),
        ("checkpoint-4/*.json",),
    ),
    "signed checkpoints": Target(
        seeds.checkpoints,
        read_checkpoints,
        ("fastdistill.training.checkpoints",),
        ("checkpoint-4/[!f]*.json",),
        finish_checkpoints,
    ),
    "config": Target(seeds.model, read_config, FORMATS, ("config.json",)),
    "model": Target(seeds.model, read_model, FORMATS, ("generation_config.json", "*.safetensors")),
    "tokenizer": Target(seeds.model, read_tokenizer, FORMATS, ("tokenizer*", "*.jinja")),
    "adapter": Target(seeds.adapters, read_adapter, ("fastdistill.hf.adapters",)),
    "organism": Target(
        seeds.organisms,
        read_organism,
        ("fastdistill.alignment.organisms.storage", "fastdistill.alignment.audits.probes"),
        ("organism.json",),
    ),
    "probes": Target(
        seeds.organisms,
        lambda folder: Probes.load(folder / "probes.json").suite(),
        ("fastdistill.alignment.audits",),
        ("probes.json",),
    ),
    "templates": Target(seeds.templates, read_templates, LANGUAGE),
    "organism folder": Target(seeds.organism_folder, read_organism_folder, LANGUAGE, ("*.json",)),
    "pairs": Target(
        seeds.pairs,
        read_pair_lines,
        ("fastdistill.alignment.experiment", "fastdistill.alignment.audits.probes"),
        ("*.jsonl", "probes.json"),
        keep_paths_inside,
    ),
    "hidden states": Target(
        seeds.hidden_files, read_hidden_files, ("fastdistill.teachers.vllm_hidden_states",)
    ),
    "records": Target(seeds.records, read_study, STUDY),
    "packed answers": Target(packed_answers, read_packed, HTTP),
    "json answers": Target(json_answers, read_choices, HTTP),
    "other answers": Target(other_answers, read_others, HTTP),
    "requests": Target(bodies, read_body, HTTP),
}

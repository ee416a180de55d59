"""DistillTrainer: transformers.Trainer with the loss computed at the output head.

One update is the gradient of (Σ over all target tokens of the accumulated batch) / (their number),
for any gradient accumulation and number of processes. The Trainer's own normalization is disabled:
it either divides a second time or averages ragged batches unequally.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import has_length, seed_worker

from ..hf.collator import DistillCollator
from ..hf.encoder import Encoder
from ..hf.generation import ends_of
from ..hf.images import ImageInputs
from ..hf.lm_head import LMHead, is_partitioned, rows_of_head, verify_head
from ..hf.tokenizers import tokenizer_of, with_chat_template
from ..losses.answer_checks import AnswerMonitor
from ..losses.types import TopK
from ..runtime import checks
from ..teachers.open import open_teacher
from .arguments import check_metric, check_sampling, check_whole_rows
from .cached_answers import cache_lookup, check_cache_covers
from .checkpoints import check_named_checkpoint
from .checks.dataset import check_datasets, check_kinds, datasets_by_name
from .checks.images import check_images, check_undivided, columns_with_images
from .checks.lengths import check_lengths, row_limits
from .checks.savable import check_savable
from .checks.signal import check_teacher_matches_text, contexts_of
from .config import DistillConfig
from .logs.first_batch import Panel, first_batch
from .logs.metrics import clamp_to_one, means, one_per_group, summarize
from .logs.model_card import has_other_readme, write_card
from .logs.run_log import RunLog
from .loss import Answers, Loss, LossResult, ScoringAnswers, TeacherHidden
from .on_policy import excerpts, is_on_policy, sample, set_generation_ends
from .resumable_trainer import WholeCheckpoints
from .router_loss import add_router_columns, add_router_loss, router_coefficient
from .samplers import Sampler
from .self_teacher import FollowStudent, SelfTeacher
from .shared_targets import check_shares_targets, mapped_sums, shared_targets
from .student import (
    check_packable,
    compile_body,
    compiled_by_us,
    prepare_student,
    student_at_head,
    without_adapters,
)
from .targets import Targets
from .teacher_answers import get_answers, has_trusted_positions
from .teacher_setup import TeacherLike, resolve_teacher
from .token_batches import token_batches
from .torch_defaults import plain_defaults

_LOADER_OPTIONS = (
    "num_workers",
    "pin_memory",
    "persistent_workers",
    "multiprocessing_context",
    "prefetch_factor",
    "in_order",
)
Examples = Dataset[Any] | list[dict[str, Any]]


class DistillTrainer(WholeCheckpoints):
    """Train `model` on the answers of `teacher` for the data or for the student's own samples.

    Args:
        model: the student, a Hugging Face causal LM, its path or hub name, with or without PEFT
            adapters. Its output head must not be adapted. Quantized weights of a .gguf file or of
            `save_quantized` are expanded.
        teacher: a model; a path, hub name or URL, opened as by `load_teacher`: a Teacher, a
            TeacherCache or a ServedTeacher; or any object with topk(...) or hidden(...) and head
            (see teachers/protocols.py). "self" is SelfTeacher(), the student's own weights. None
            trains on the labels alone with the same code, and needs ce_weight=1.0.
        args: a DistillConfig.
        train_dataset, eval_dataset: any torch Dataset or list of dicts with messages, prompt and
            completion, text, or input_ids (see hf/encoder.py). Rows of input_ids may have the
            images of a vision model, as tensors of its processor.
        processing_class: the student's tokenizer, or its processor. Its tokenizer encodes text, and
            is compared with the teacher's tokenizer.
        peft_config: a PEFT configuration of adapters to add to the model.
        callbacks, optimizers: as in transformers.Trainer.
        loss: replaces Loss(args) in training, but not in evaluation:
            loss(hidden, head, targets, answers, labels_count=…) -> LossResult.
        sampler: samples the completions of on-policy steps instead of the student in this process:
            sampler(SampleRequest) -> ids of each completion (training/samplers.py). OpenAISampler
            gets them from a server.

    `evaluate` returns loss, nll, perplexity and top1 (accuracy), and with a teacher kl (bucket
    tail), agreement (share of positions where both rank the same token first), teacher_mass,
    student_mass and acceptance_rate Σ min(p, q) (bucket tail); of a mixture also router_aux_loss,
    which loss includes with its weight. All are means over target tokens; no
    logits are gathered. `predict` returns the per-sequence sums, one row of EVAL_COLUMNS each, and
    the counts of histograms.py as label_ids. `train` also accepts resume_from_checkpoint="auto":
    the last complete checkpoint, if there is one.
    """

    loss_is_scaled_for_ga = True  # read by transformers >= 5.19

    @plain_defaults()
    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        teacher: TeacherLike | None = None,
        args: DistillConfig | None = None,
        *,
        train_dataset: Examples | None = None,
        eval_dataset: Examples | dict[str, Examples] | None = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        loss: Callable[..., LossResult] | None = None,
        sampler: Sampler | None = None,
    ) -> None:
        args = DistillConfig("trainer_output") if args is None else args
        if not isinstance(args, DistillConfig):
            raise TypeError(f"args: expected a DistillConfig, got {type(args).__name__}")
        if args.n_gpu > 1:
            raise ValueError(
                f"args: expected one GPU per process, got {args.n_gpu} in this one. Start with "
                "`torchrun --nproc-per-node=N`, or select one GPU with CUDA_VISIBLE_DEVICES"
            )
        if loss is not None and not callable(loss):
            raise TypeError(f"loss: expected a function or None, got {type(loss).__name__}")
        if sampler is not None and not callable(sampler):
            raise TypeError(f"sampler: expected a function or None, got {type(sampler).__name__}")
        if sampler is not None and not args.lmbda:
            hint = "lmbda=0 never samples"
            checks.fail("sampler", "None with lmbda=0", type(sampler).__name__, hint)
        check_kinds(train_dataset, eval_dataset)
        check_named_checkpoint(args.resume_from_checkpoint)
        student = prepare_student(model, args, peft_config)
        processing_class = with_chat_template(processing_class, args.chat_template)
        tokenizer = tokenizer_of(processing_class)
        encoder = Encoder(
            tokenizer=tokenizer,
            completion_only=args.completion_only_loss,
            max_length=args.max_length,
            template_tokens=args.train_on_template_tokens,
            images=ImageInputs.of(without_adapters(student)),
        )
        is_self = isinstance(teacher, str) and teacher == "self"
        teacher = SelfTeacher() if is_self else open_teacher(teacher)
        if isinstance(teacher, SelfTeacher):
            callbacks = [*(callbacks or []), FollowStudent(teacher)]
        if args.check_data:
            sampled = args.lmbda == 1.0
            check_datasets(encoder, train_dataset, eval_dataset, prompts_only=sampled)
        set_generation_ends(without_adapters(student), encoder, train_dataset)
        self._run_log = RunLog()
        with compiled_by_us(args):
            super().__init__(
                model=student,
                args=args,
                data_collator=DistillCollator(
                    pad_id=getattr(tokenizer, "pad_token_id", None) or 0,
                    encoder=encoder,
                    prompts=args.lmbda > 0,
                    more=cache_lookup(teacher, args) or shared_targets(teacher),
                    columns=tuple(getattr(teacher, "columns", ())),
                    teacher_prompts=teacher is not None,
                ),
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=[*(callbacks or []), self._run_log],
                optimizers=optimizers,
                compute_metrics=summarize,
                compute_loss_func=_never_called,
            )
        # `accelerate launch` sets it by variables that args do not have.
        check_whole_rows(getattr(self.accelerator, "parallelism_config", None))
        # With partitioned weights, the head is verified at the first batch.
        self._needs_verification = True
        if not (self.is_fsdp_enabled or is_partitioned(self.model)):
            self._verify()
            if train_dataset is not None and str(args.save_strategy.value) != "no":
                self.check_savable()
        # With a compute_loss_func and without loss kwargs, transformers from 5.0 counts the targets
        # of the accumulated batch, passes the number to compute_loss, and does not divide itself.
        self.model_accepts_loss_kwargs = False
        self.panel: Panel | None = None
        self._sampler = sampler
        self._measured = Loss(args, args.selection)
        self._loss = self._measured if loss is None else loss
        resolved = resolve_teacher(teacher, self.model, args, tokenizer)
        check_sampling(args, train_dataset)
        check_metric(args, eval_dataset, has_teacher=teacher is not None)
        self.teacher = self._run_log.teacher = resolved.teacher
        limits = row_limits(self.model, self.teacher, args)
        collator: Any = self.data_collator
        self.data_collator: Any = replace(collator, limits=limits)
        if args.check_data:
            datasets = datasets_by_name(train_dataset, eval_dataset)
            check_images(columns_with_images(encoder.images, datasets), self.teacher, args)
            check_cache_covers(teacher, encoder, datasets)
            check_shares_targets(teacher, encoder, datasets)
            check_lengths(datasets, encoder, limits, args)
        if args.torch_compile:  # after all checks that run the model
            compile_body(self.model, args)
        self._valid_vocab = resolved.valid_vocab
        self._vocab = 0 if teacher is None else self._valid_vocab or rows_of_head(self.model)
        self._monitor = AnswerMonitor()

    def train(
        self, resume_from_checkpoint: str | Path | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train, and return transformers' TrainOutput; see WholeCheckpoints.train.

        A stop because of NaN or infinity is recorded in metrics.jsonl.
        """
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        except FloatingPointError as error:
            self._run_log.nonfinite(self.args, self.state, error)
            raise

    def begin_run(self, state: Any) -> None:
        super().begin_run(state)
        self._run_log.changed = self._changed

    def _verify(self) -> None:
        """Check that the loss can be computed at the head and, if configured, rows be packed."""
        student = self.accelerator.unwrap_model(self.model)
        verify_head(student)
        if self.args.packing:
            check_packable(student)
        self._needs_verification = False

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the batches of one update, with sampled completions on an on-policy step."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step
        if batches and is_on_policy(self.args, step):
            for batch in batches:
                check_images(batch.get("images", ()), self.teacher, self.args)
            model = without_adapters(self.accelerator.unwrap_model(self.model))
            options = {
                "config": self.args,
                "step": step,
                "pad_id": self.data_collator.pad_id,
                "ends": ends_of(model, tokenizer_of(self.processing_class)),
                "vocab": self._valid_vocab,
                "limits": self.data_collator.limits,
                "sampler": self._sampler,
                "synced": self.is_fsdp_enabled or self.is_deepspeed_enabled,
            }
            with self.compute_loss_context_manager():
                batches = [sample(model, batch, **options) for batch in batches]
            if (
                self._run_log.needs_samples
                and self.processing_class is not None
                and self.is_world_process_zero()
            ):
                self._run_log.set_samples(excerpts(batches[0], tokenizer_of(self.processing_class)))
            if self.data_collator.more is not None:
                batches = [batch | self.data_collator.more(batch) for batch in batches]
            count = self._get_num_items_in_batch(batches, device)
            batches = [{**batch, "sampled": True} for batch in batches]
        return batches, count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        sampled = bool(inputs.get("sampled", False))
        first = self.args.check_signal and self.panel is None and not sampled
        targets, answers = self._get_answers(inputs, check=first and self.model.training)

        use = partial(self._loss, targets=targets, answers=answers, labels_count=not sampled)
        first_batch_left = self.model.training and self.panel is None and len(targets.labels) > 0
        if first_batch_left and answers is not None:
            use = partial(self._first_loss, use, targets, answers, inputs)
        coefficient, finish = self._router_coefficient(), None
        if coefficient is not None:
            finish = partial(add_router_loss, coefficient=coefficient, targets=len(targets.labels))
        with self._at_head(model, inputs, targets, use, finish) as student_inputs:
            result: LossResult = model(**student_inputs)
        if self.model.training:
            mapped = mapped_sums(self.teacher, inputs, len(targets.labels))
            self.add_metrics(result.sums | mapped)
        if num_items_in_batch is None:
            loss = result.loss / max(len(targets.labels), 1)
        else:
            loss = result.loss / clamp_to_one(num_items_in_batch)
            if self.args.average_tokens_across_devices:
                # The count covers all processes, whose gradients will be averaged.
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.model.training:
            loss = self.mark_loss(loss)
        return (loss, {}) if return_outputs else loss

    def _router_coefficient(self) -> float | None:
        return router_coefficient(without_adapters(self.accelerator.unwrap_model(self.model)))

    def _get_answers(self, inputs: dict[str, Any], check: bool) -> tuple[Targets, Answers]:
        monitor, vocab = self._monitor, self._vocab
        if "images" in inputs:
            check_images(inputs["images"], self.teacher, self.args)
            check_undivided(self.args, self.train_dataset)
        return get_answers(
            self.teacher, inputs, self.args, monitor=monitor, vocab=vocab, check=check
        )

    def _at_head(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        targets: Targets,
        use: Callable[[Tensor, LMHead], Any],
        finish: Callable[[Any, Any], Any] | None = None,
    ) -> AbstractContextManager[dict[str, Any]]:
        if self._needs_verification:
            self._verify()
        # DDP and FSDP wrap the model; the hooks belong to the model inside.
        student = self.accelerator.unwrap_model(model)
        return student_at_head(
            student,
            inputs,
            targets,
            use,
            packed=self.args.packing,
            valid_vocab=self._valid_vocab,
            finish=finish,
        )

    def _first_loss(
        self,
        loss: Callable[[Tensor, LMHead], LossResult],
        targets: Targets,
        answers: TopK | TeacherHidden | ScoringAnswers,
        inputs: dict[str, Any],
        hidden: Tensor,
        head: LMHead,
    ) -> LossResult:
        """Show and check the first batch, then return its loss."""
        sampled = "sampled" in inputs
        attended = int(inputs["attention_mask"][:, 1:].sum())
        contexts = targets.gather(contexts_of(inputs["input_ids"], inputs["attention_mask"]))
        self.panel = first_batch(
            hidden, head, targets, answers, attended, self.args, contexts=contexts, sampled=sampled
        )
        self._run_log.first_batch(self.args, self.state, self.panel)
        if self.args.show_panel and self.is_world_process_zero():
            self.panel.show()
        if self.args.check_signal and not sampled:
            trusted = isinstance(answers, TeacherHidden) or has_trusted_positions(self.teacher)
            check_teacher_matches_text(self.panel.signal, positions_trusted=trusted)
        return loss(hidden, head)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if isinstance(self.teacher, SelfTeacher) and self.is_world_process_zero():
            self.teacher.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if isinstance(self.teacher, SelfTeacher) and checkpoint is not None:
            self.teacher.load(checkpoint)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._monitor.read()
        if "loss" in logs and (sums := self.pop_sums(logs)):
            logs |= means(sums, self.state.global_step, self.get_tp_size())
        super().log(logs, start_time)

    def get_train_dataloader(self) -> DataLoader[Any]:
        if self.args.max_tokens_per_batch is not None:
            return self._loader_by_tokens()
        loader: DataLoader[Any] = super().get_train_dataloader()
        if has_length(loader) and not len(loader):
            expected = f"a batch of {self.args.train_batch_size}"
            got = f"{len(self.train_dataset):,} examples, which dataloader_drop_last drops"
            checks.fail("train_dataset", expected, got)
        return loader

    def _loader_by_tokens(self) -> DataLoader[Any]:
        """Return the loader of max_tokens_per_batch, with the dataloader_* options of args."""
        options = {
            name: getattr(self.args, f"dataloader_{name}")
            for name in _LOADER_OPTIONS
            if hasattr(self.args, f"dataloader_{name}")
        }
        workers = {"num_workers": self.args.dataloader_num_workers, "rank": self.args.process_index}
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=token_batches(
                self.args,
                self.train_dataset,
                self.data_collator.encoder,
                # A whole number at the beginning of an epoch, also of a resumed run.
                epoch=lambda: int(self.state.epoch or 0),
            ),
            collate_fn=self.data_collator,
            worker_init_fn=partial(seed_worker, **workers),
            **options,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_drop_last():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        with self._without_drop_last():
            return super().get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _without_drop_last(self) -> Iterator[None]:
        """Disable dataloader_drop_last, which is for training: evaluation uses all examples."""
        dropped, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = dropped

    @plain_defaults()
    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Run the Trainer's loop, but count a batch once that several ranks share."""
        shared = self.get_tp_size()
        if shared > 1:
            self.gather_function = lambda rows: one_per_group(shared, self.accelerator.gather(rows))
        output = super().evaluation_loop(*args, **kwargs)
        self._monitor.read()
        if output.predictions is None:
            raise ValueError("eval_dataset: expected an example, got none to evaluate on")
        self._run_log.set_histograms(output.label_ids)
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, Tensor]:
        """Return sums per sequence in place of logits, and histograms in place of labels.

        They are small to gather, and exact.
        """
        inputs = self._prepare_inputs(inputs)
        targets, answers = self._get_answers(inputs, check=False)

        coefficient, finish = self._router_coefficient(), None
        if coefficient is not None:
            finish = partial(add_router_columns, coefficient=coefficient)

        def sums(hidden: Tensor, head: LMHead) -> tuple[Tensor, Tensor]:
            return self._measured.measure(hidden, head, targets, answers)

        with (
            torch.no_grad(),
            self.compute_loss_context_manager(),
            self._at_head(model, inputs, targets, sums, finish) as student_inputs,
        ):
            return None, *model(**student_inputs)

    def check_update(self, model: nn.Module) -> None:
        self._monitor.read()  # the gradient norm synchronizes here anyway
        super().check_update(model)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._monitor.read()
        super()._save_checkpoint(model, trial)

    def check_savable(self) -> None:
        """Raise ValueError or OSError if the student could not be saved after its training."""
        if self.args.should_save:
            check_savable(self.model, self.processing_class, self.args)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._monitor.read()
        folder = Path(output_dir or self.args.output_dir)
        keep_readme = has_other_readme(folder)  # before peft writes its own
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and not keep_readme:
            self._write_card(folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write README.md to the output folder, with teacher, objective and evaluation."""
        folder = Path(self.args.output_dir)
        if self.is_world_process_zero() and not has_other_readme(folder):
            self._write_card(folder)

    def _write_card(self, folder: Path) -> None:
        model = without_adapters(self.accelerator.unwrap_model(self.model))
        write_card(folder, self.args, self._loss, model, self.teacher, self.panel, self.state)


def _never_called(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("compute_loss is overridden; this only makes the Trainer count targets")

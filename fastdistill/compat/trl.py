"""TRL's GKDTrainer and DistillationTrainer, with TRL's arguments and configurations.

Loss and normalization are TRL's, over the whole vocabulary, without logits of [N, V]. Differences:
a hash of seed, step and prompt determines the samples instead of a random stream (so a run can be
resumed); a whole optimizer step is either on- or off-policy; and a row longer than max_length loses
its end, not its beginning. Every option of TRL is used, or raises an error that names it unless it
is at TRL's default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, ClassVar

from torch import nn
from transformers import TrainingArguments

from ..hf.checkpoint import StoredModel
from ..runtime.checks import fail
from ..training.config import DistillConfig
from ..training.trainer import DistillTrainer

# Options that the user cannot set, or that are set below.
_NOT_COPIED = {
    *("remove_unused_columns", "prediction_loss_only"),
    # Derived by transformers.
    *("logging_nan_inf_filter", "greater_is_better"),
}
_OLD_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
_LOADING = frozenset(
    (
        "model_init_kwargs",
        "teacher_model_name_or_path",
        "teacher_model_init_kwargs",
        "disable_dropout",
    )
)


class _TRLTrainer(DistillTrainer):
    """Base of both trainers; `options` converts their configuration.

    used: TRL's options with a counterpart here. Every other one, also of later versions of TRL,
    raises an error unless it is at TRL's default. same: other values with the same effect as the
    default.
    """

    used: ClassVar[frozenset[str]]
    same: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        model: Any = None,
        teacher_model: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        **unsupported: Any,
    ) -> None:
        kind = type(self).__name__
        if args is None or not isinstance(args, TrainingArguments):
            raise TypeError(f"args: expected TRL's configuration, got {type(args).__name__}")
        for name, value in unsupported.items():
            if value is not None:
                fail(name, f"None in our {kind}", f"{value!r:.80}")
        _check_options(args, self.used, self.same, kind)
        if teacher_model is None:
            teacher_model = getattr(args, "teacher_model_name_or_path", None)
        options = getattr(args, "model_init_kwargs", None) or {}
        if isinstance(model, str):
            # TRL's default; that of transformers is the stored type.
            options = {"dtype": "float32"} | options
        model = _load("model", model, options)
        teacher_options = getattr(args, "teacher_model_init_kwargs", None) or {}
        teacher_model = _load("teacher_model", teacher_model, teacher_options)
        if getattr(args, "disable_dropout", False) and isinstance(model, nn.Module):
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        names = {f.name for f in fields(TrainingArguments) if f.init} - _NOT_COPIED
        names -= {old for old, new in _OLD_NAMES.items() if new in names}
        shared = {name: getattr(args, name) for name in names}
        super().__init__(
            model,
            teacher_model,
            DistillConfig(**(shared | self.options(args))),
            train_dataset=self.examples(train_dataset),
            eval_dataset=self.examples(eval_dataset),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )

    def options(self, args: Any) -> dict[str, Any]:
        raise NotImplementedError

    def examples(self, dataset: Any) -> Any:
        return dataset


class GKDTrainer(_TRLTrainer):
    """Replaces trl.experimental.gkd.GKDTrainer (GKD, arXiv 2306.13649).

    The loss is β·KL(teacher‖m) + (1−β)·KL(student‖m), m = β·teacher + (1−β)·student. A fraction
    lmbda of steps trains on the student's own samples, the others on the data. args.temperature is
    the sampling temperature; that of the divergence is 1, as in TRL. seq_kd is not supported:
    generate the data with the teacher first.
    """

    used: ClassVar = _LOADING | {"beta", "lmbda", "max_length", "max_new_tokens", "temperature"}
    same: ClassVar = {
        "completion_only_loss": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "router_aux_loss_coef": 0.0,
    }

    def options(self, args: Any) -> dict[str, Any]:
        return {
            "k": None,
            "divergence": "jsd",
            "beta": args.beta,
            "lmbda": args.lmbda,
            "max_new_tokens": args.max_new_tokens,
            "sampling_temperature": args.temperature,
            "max_length": args.max_length,
        }

    def examples(self, dataset: Any) -> Any:
        if isinstance(dataset, Mapping):
            return {name: _split_last_turn(part) for name, part in dataset.items()}
        return _split_last_turn(dataset)


class DistillationTrainer(_TRLTrainer):
    """Replaces trl.DistillationTrainer.

    The student samples a completion of every prompt. The loss is the generalized Jensen–Shannon
    divergence from the teacher with args.beta; sampling and loss use args.temperature.
    """

    used: ClassVar = _LOADING | {
        *("beta", "max_completion_length", "shuffle_dataset", "temperature", "top_p"),
    }

    def options(self, args: Any) -> dict[str, Any]:
        if args.max_completion_length is None:
            expected = "an integer in our DistillationTrainer"
            hint = "the student's samples may never end"
            fail("max_completion_length", expected, None, hint)
        if args.remove_unused_columns:
            hint = "remove all columns but the prompt from the dataset"
            fail("remove_unused_columns", "False in our DistillationTrainer", True, hint)
        order = {} if args.shuffle_dataset else {"train_sampling_strategy": "sequential"}
        return order | {
            "k": None,
            "divergence": "jsd",
            "beta": args.beta,
            "lmbda": 1.0,
            "temperature": args.temperature,
            "sampling_temperature": args.temperature,
            "top_p": args.top_p,
            "max_new_tokens": args.max_completion_length,
        }


class _LastTurns:
    """Splits conversations into prompt and completion: GKD trains on the last turn only."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return _last_turn(self.dataset[index])


def _last_turn(example: Mapping[str, Any]) -> Mapping[str, Any]:
    messages = example.get("messages") if example.get("input_ids") is None else None
    if not isinstance(messages, (list, tuple)) or not messages:
        return example
    *prompt, last = messages
    rest = {name: value for name, value in example.items() if name != "messages"}
    return rest | {"prompt": prompt, "completion": [last]}


def _split_last_turn(dataset: Any) -> Any:
    """Return a dataset split by `_last_turn`; uses the map method of a stream."""
    if dataset is None:
        return None
    return _LastTurns(dataset) if hasattr(dataset, "__len__") else dataset.map(_last_turn)


def _check_options(args: Any, used: frozenset[str], same: Mapping[str, Any], kind: str) -> None:
    """Raise ValueError for an option of TRL without counterpart that is not at its default.

    Raises TypeError for the configuration of another trainer.
    """
    base = next((c for c in type(args).__mro__ if c.__module__.split(".")[0] == "trl"), None)
    if base is None or any(not hasattr(args, name) for name in used):
        raise TypeError(f"args: expected TRL's configuration of {kind}, got {type(args).__name__}")
    inherited = {f.name for f in fields(TrainingArguments)}
    for field in fields(base):
        if field.name in inherited | used:
            continue
        value = getattr(args, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        # None means that the option is not set.
        if value is not None and value != default and value != same.get(field.name):
            got, hint = f"{value!r:.80}", "it has no counterpart here"
            fail(field.name, f"{default!r} in our {kind}", got, hint)


def _load(argument: str, model: Any, options: Mapping[str, Any]) -> Any:
    """Return the model of a path, loaded with `options`; without any, what was passed."""
    if not options:
        return model
    if not isinstance(model, str):
        expected = f"none with a {argument} that is loaded already"
        got = f"{dict(options)!r:.80} with a {type(model).__name__}"
        fail(f"{argument}_init_kwargs", expected, got, f"pass {argument} as a path")
    if options.get("revision") is not None:
        got, hint = f"{options['revision']!r:.80}", "download that revision, and pass its folder"
        fail("revision", "none in the options of a model", got, hint)
    stored = StoredModel.from_path(model)
    if stored.is_adapter:
        hint = "load its base and add the adapter (PeftModel.from_pretrained), or merge it"
        fail("model", "the folder of a whole model", f"{model!r:.200}, an adapter", hint)
    return stored.load_base(**options)

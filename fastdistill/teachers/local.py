"""A teacher in the same process: a frozen causal language model that answers with its top k."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..hf.checkpoint import StoredModel
from ..hf.layer_outputs import check_layers
from ..hf.lm_head import LMHead, head_of, rows_of_head, verify_head
from ..hf.offloading import check_whole
from ..hf.positions import RowLimit
from ..hf.row_reader import BatchedForward, read_rows
from ..losses.linear_head import linear_logprobs_at, topk_at
from ..losses.types import TopK
from ..quant.formats.checkpoint_gate import load_tokenizer
from ..quant.formats.detect import keeps_bits
from ..quant.ops import COMPUTE
from ..quant.schemes import SCHEMES
from ..runtime import checks, tensor_checks
from .cache import TeacherCache
from .fidelity import FidelityReport, measure
from .http import ServedTeacher
from .open import open_teacher
from .protocols import HiddenStates
from .scored_ids import check_scored_ids

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Teacher:
    """A Hugging Face causal LM as a TopKTeacher and a DenseTeacher, without [N, V] logits.

    Args:
        model: a loaded model, or the path or hub name of one, as in `load_teacher`, which also
            opens caches and servers. It is switched to eval mode and frozen in place.
        tokenizer: compared by the trainer with the student's. None reads the one at the path, if
            any.
        dtype: of weights loaded from a path; "auto" keeps the stored one.
        impl: implementation of linear_topk.
        tokens_per_batch: tokens in one forward pass. None: 4096 on a CPU; on a GPU a quarter of
            the free memory at 32 · hidden_size values per token, between 1024 and 16384. A longer
            row runs alone.

    Raises:
        ValueError: the model is not causal, or transforms its logits in an unsupported way.
        TypeError: not a causal language model.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        *,
        tokenizer: Any = None,
        dtype: torch.dtype | str = "auto",
        impl: str = "auto",
        tokens_per_batch: int | None = None,
    ) -> None:
        if isinstance(model, (str, Path)):
            stored = StoredModel.from_path(model, dtype)
            if tokenizer is None:
                tokenizer = stored_tokenizer(stored.tokenizer_folder)
            model = _from_checkpoint(stored, None, "auto", torch.device("cpu"))
        if not isinstance(model, nn.Module):
            raise TypeError(
                "teacher: expected a causal language model, or the path of one, "
                f"got {type(model).__name__}"
            )
        check_whole("teacher", model)
        # The trainer checks that no student shares these, since they would not be trained.
        self.frozen = tuple(p for p in model.parameters() if p.requires_grad)
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.impl = impl
        self.valid_vocab: int | None = None
        self.quant: str | None = None  # this and the next are set by load_teacher
        self.source: StoredModel | None = None
        verify_head(self.model, self.head)
        self.reader = BatchedForward(self.model, tokens_per_batch)

    @property
    def head(self) -> LMHead:
        return head_of(self.model)._replace(valid_vocab=self.valid_vocab)

    @property
    def vocab_size(self) -> int:
        """The number of logits, padding included."""
        return rows_of_head(self.model)

    @property
    def row_limit(self) -> RowLimit | None:
        """The longest row that the model reads; None if nothing limits it."""
        limit = self.reader.row_limit
        if limit is None:
            return None
        return replace(limit, reader=limit.reader.replace("the model", "the teacher", 1))

    def to(self, device: torch.device | str) -> Teacher:
        self.model.to(device)
        return self

    def topk(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        *,
        k: int,
        temperature: float = 1.0,
        where: Tensor | None = None,  # (B, T) bool
        images: Mapping[str, Tensor] | None = None,
    ) -> TopK:  # [B, T, K]
        """Return the k likeliest next tokens at every attended position, and the exact log tail.

        Rows are unpadded and regrouped by length under `tokens_per_batch`, and packed if the model
        allows it. Positions count attended tokens, so left and right padding give equal answers.

        Args:
            input_ids: int32/int64 [B, T]. attention_mask: bool or 0/1 [B, T], None for all ones.
            k: 1 ≤ k ≤ vocab. temperature: T of softmax(logits / T).
            where: bool [B, T], the positions to answer; the head is not computed at the others,
                whose payload is empty. None answers wherever attention_mask is 1.
            images: pixel_values and other tensors of a processor, for the whole batch. The batch
                then runs in one forward pass, and tokens_per_batch has no effect.

        Returns:
            TopK on input_ids' device: ids int64 [B, T, k], logprobs fp32 (fp64 from fp64), log_tail
            [B, T]. The payload is empty where attention_mask is 0: ids −1, logprobs −inf, log_tail
            0 (all mass in the tail). Losses accept it at ignored labels.

        Raises:
            ValueError or TypeError naming the argument, what was expected and what was passed.
        """
        checks.positive("temperature", temperature)
        return self.topk_at(
            input_ids,
            attention_mask,
            k=k,
            temperatures=(temperature,),
            where=where,
            images=images,
        )[0]

    @torch.no_grad()
    def topk_at(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        *,
        k: int,
        temperatures: Sequence[float],
        where: Tensor | None = None,  # (B, T) bool
        images: Mapping[str, Tensor] | None = None,
    ) -> list[TopK]:  # [B, T, K] each
        """Return `topk` at several temperatures, with one pass through layers and head."""
        rows = read_rows(input_ids, attention_mask, self.reader.vocab)
        head = self.head
        if not isinstance(k, int) or not 1 <= k <= head.vocab_size:
            checks.fail("k", f"an integer in 1..{head.vocab_size} (V)", repr(k))
        if where is not None:
            tensor_checks.tensor("where", where, (torch.bool,))
            if where.shape != input_ids.shape:
                expected = f"shape {list(input_ids.shape)} as input_ids"
                checks.fail("where", expected, list(where.shape))
        shape, device = (*input_ids.shape, k), input_ids.device
        dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
        answers = [TopK.empty(shape, float(T), dtype=dtype, device=device) for T in temperatures]
        for at, hidden in self.reader.read(rows, images):
            if where is not None:
                selected = where.flatten()[at]
                at, hidden = at[selected], hidden[selected.to(hidden.device)]
            hidden = hidden.to(head.weight.device)
            for answer, best in zip(
                answers, topk_at(hidden, head, k, temperatures, self.impl), strict=True
            ):
                answer.put(at, best)
        return answers

    @torch.no_grad()
    def logprobs_at(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None,  # (B, T)
        ids: Tensor,  # (B, T, K)
        *,
        temperature: float = 1.0,
    ) -> TopK:  # [B, T, K]
        """Return the log-probabilities of given next tokens at every attended position.

        Rows run as in `topk`.

        Args:
            input_ids, attention_mask, temperature: as in `topk`.
            ids: int32/int64 [B, T, K], the tokens to score; −1 is an empty slot. Ids where
                attention_mask is 0 are ignored.

        Returns:
            TopK on input_ids' device: ids int64 [B, T, K] in the given order, repeats replaced by
            −1; logprobs fp32 (fp64 from fp64), −inf in empty slots; the exact log_tail [B, T].

        Raises:
            ValueError or TypeError naming the argument, what was expected and what was passed.
        """
        checks.positive("temperature", temperature)
        rows = read_rows(input_ids, attention_mask, self.reader.vocab)
        head = self.head
        check_scored_ids(ids, rows, head.vocab_size)
        dtype = torch.float64 if head.weight.dtype == torch.float64 else torch.float32
        answers = TopK.empty(
            tuple(ids.shape), float(temperature), dtype=dtype, device=input_ids.device
        )
        for at, hidden in self.reader.read(rows):
            hidden = hidden.to(head.weight.device)
            scored = linear_logprobs_at(
                hidden,
                head.weight,
                ids.flatten(0, 1)[at.to(ids.device)].to(hidden.device),
                temperature=temperature,
                impl=self.impl,
                **head.options(),
            )
            answers.put(at, scored)
        return answers

    @torch.no_grad()
    def hidden(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        *,
        images: Mapping[str, Tensor] | None = None,
    ) -> Tensor:  # (B, T, H), in the model's dtype
        """Return the hidden states at the head's input, for dense divergences with `head`.

        Batched as in `topk`, and zero where attention_mask is 0. Raises the same errors."""
        return self.reader.hidden(read_rows(input_ids, attention_mask, self.reader.vocab), images)

    @torch.no_grad()
    def hidden_states(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        *,
        layers: Sequence[int] = (),
    ) -> HiddenStates:
        """Return `hidden` and the outputs of some decoder layers, as EAGLE-3 drafts read them.

        Args:
            input_ids, attention_mask: as in `topk`.
            layers: numbers of decoder layers, from 1, as in eagle_aux_hidden_state_layer_ids of
                vLLM. The output of the last layer is the state before the final norm.

        Returns:
            HiddenStates in the model's dtype: last [B, T, H], and layers [B, T, L, H] in the order
            of `layers`; both zero where attention_mask is 0.

        Raises:
            ValueError or TypeError naming the argument, what was expected and what was passed.
        """
        check_layers(self.model, layers)
        rows = read_rows(input_ids, attention_mask, self.reader.vocab)
        states = self.reader.hidden(rows, layers=layers)
        if not layers:
            return HiddenStates(states, states[:, :, None][:, :, :0])
        return HiddenStates(states[:, :, -1], states[:, :, :-1])

    def fidelity(
        self,
        batch: Mapping[str, Tensor] | Sequence[Mapping[str, Any]],
        *,
        against: Teacher | PreTrainedModel | str | Path | None = None,
        student: PreTrainedModel | str | Path | float | None = None,
    ) -> FidelityReport:
        """Measure the quantization error on a calibration batch; see `fidelity.measure`."""
        return measure(self, batch, against=against, student=student)


def load_teacher(
    path_or_model: PreTrainedModel | str | Path,
    *,
    quant: str | None = None,
    compute: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    tokens_per_batch: int | None = None,
    tokenizer: Any = None,
    impl: str = "auto",
) -> Any:
    """Load a model as a frozen teacher, optionally quantized; or open a cache or a server.

    Args:
        path_or_model: the directory or hub name of a safetensors checkpoint, in full precision or
            quantized (own format, bitsandbytes, GPTQ, AWQ, compressed-tensors, FP8, MXFP4); of an
            adapter, which is merged into the base that it names; a .gguf file; or a loaded model,
            which is frozen and quantized in place. No code of a checkpoint runs. Also the folder of
            a TeacherCache or the URL of a server; the options are for models, and none but device
            may be passed with them.
        quant: "nf4", "fp4", "int4" or "int8" quantizes the linear layers, except the output head,
            while loading; None keeps the stored format.
        compute: how quantized layers multiply: "exact" (weights expanded), "int8", "fp8" (GPU), or
            "auto".
        device: None is the current GPU, or the CPU if there is none; a loaded model is not moved.
            Answers of a cache or a server are on the device of their input_ids.
        dtype: of layers that are not quantized; "auto" keeps the stored one.
        attn_implementation: passed to transformers. None is flash_attention_2 if flash-attn is
            installed, the model supports it, the device is CUDA and the dtype 16-bit; else the
            default of transformers, which is sdpa if the model supports it.
        tokens_per_batch, impl: see `Teacher`.
        tokenizer: None reads the one stored with the weights.

    Returns:
        Teacher of a model; loaded from a path, it keeps its source for `fidelity`. TeacherCache of
        a cache's folder. ServedTeacher of a URL. The annotation is Any, since the path decides.

    Raises:
        FileNotFoundError: nothing is there. ValueError: an unknown quant or compute, quant for a
        quantized checkpoint, an option for a cache or server, or a pickle instead of safetensors.
        TypeError: not a model or path. NoAnswer (a ConnectionError): the server does not answer.
    """
    _check_names(quant, compute)
    answers = open_teacher(
        path_or_model,
        "path_or_model",
        quant=quant,
        compute=compute,
        dtype=dtype,
        attn_implementation=attn_implementation,
        tokens_per_batch=tokens_per_batch,
        tokenizer=tokenizer,
        impl=impl,
    )
    if isinstance(answers, (TeacherCache, ServedTeacher)):
        return answers
    source, trainable = None, []
    if isinstance(path_or_model, nn.Module):
        # Weak references: quantizing frees the weights that it replaces.
        trainable = [weakref.ref(p) for p in path_or_model.parameters() if p.requires_grad]
        model: Any = path_or_model
        if dtype != "auto":
            checks.fail("dtype", "'auto' with a loaded model", dtype, "load it in that dtype")
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)
        model = _quantized(model, quant, compute)
        model = model if device is None else model.to(device)
    elif isinstance(path_or_model, (str, Path)):
        source = StoredModel.from_path(path_or_model, dtype, attn_implementation)
        default = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        place = torch.device(default if device is None else device)
        model = _from_checkpoint(source, quant, compute, place)
        tokenizer = stored_tokenizer(source.tokenizer_folder) if tokenizer is None else tokenizer
    else:
        raise TypeError(
            "path_or_model: expected a causal language model, or the path of one, "
            f"got {type(path_or_model).__name__}"
        )
    teacher = Teacher(model, tokenizer=tokenizer, impl=impl, tokens_per_batch=tokens_per_batch)
    teacher.quant, teacher.source = quant, source
    if trainable:
        remaining = {id(p) for p in teacher.model.parameters()}
        alive = [p for p in (ref() for ref in trainable) if p is not None]
        teacher.frozen = tuple(p for p in alive if id(p) in remaining)
    return teacher


def check_quantization(source: StoredModel, quant: str | None, compute: str) -> None:
    """Raise ValueError if a checkpoint cannot be loaded with these options of load_teacher."""
    _check_names(quant, compute)
    if quant is not None and source.is_quantized and keeps_bits(source.path):
        expected = f"None, since {source.path} is quantized already"
        checks.fail("quant", expected, repr(quant), "or pass the full-precision checkpoint")
    if quant is None and not source.is_quantized:
        _check_full_precision_compute(compute)


def _check_names(quant: str | None, compute: str) -> None:
    checks.choice("quant", quant, (*SCHEMES, None))
    checks.choice("compute", compute, COMPUTE)


def _from_checkpoint(source: StoredModel, quant: str | None, compute: str, device: Any) -> Any:
    check_quantization(source, quant, compute)
    if quant is None and not source.is_quantized:
        return source.load(device)
    if source.is_adapter:  # merged before it is quantized
        return _quantized(source.load(device), quant, compute)
    from ..quant import load_quantized

    return load_quantized(
        source.path,
        quant=quant,
        compute=compute,
        dtype=source.dtype,
        device=device,
        attn_implementation=source.attention_on(device),
    )


def _quantized(model: Any, quant: str | None, compute: str) -> Any:
    if quant is None:
        _check_full_precision_compute(compute)
        return model
    from ..quant import quantize_model

    return quantize_model(model, quant, compute=compute)


def _check_full_precision_compute(compute: str) -> None:
    if compute != "auto":
        hint = "pass quant='nf4', 'fp4', 'int4' or 'int8' with it"
        checks.fail("compute", "'auto' for a teacher in full precision", repr(compute), hint)


def stored_tokenizer(path: Path) -> Any:
    """Return the tokenizer stored with the weights, or None."""
    files = ("tokenizer.json", "tokenizer_config.json")
    if path.is_dir() and not any((path / name).is_file() for name in files):
        return None
    if path.is_file() and path.suffix != ".gguf":
        return None
    try:
        return load_tokenizer(path)
    except OSError:  # a repository of weights alone
        return None

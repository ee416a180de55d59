"""A teacher in the same process: a frozen causal language model that answers with its top k."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .heads import LMHead, head_of, hidden_states, verify_head
from .outputs import TopK
from .primitive import linear_topk


@runtime_checkable
class TopKTeacher(Protocol):
    """Whatever answers a batch of token ids with the teacher's k likeliest next tokens."""

    def topk(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        *,
        k: int,
        temperature: float = 1.0,
    ) -> TopK: ...  # [B, T, K]; position t answers for the token at t + 1


class Teacher:
    """A Hugging Face causal LM as a TopKTeacher; its [N, V] logits are never formed.

    Args:
        model: a loaded model, or the path or name of one: safetensors only, and never code that
            comes with the weights. The model is switched to eval mode and frozen in place.
        tokenizer: lets the trainer prove that teacher and student mean the same by an id. Read
            from the path when there is one.
        dtype: how to load the weights from a path; "auto" keeps the stored one.
        impl: which implementation of linear_topk to use.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        *,
        tokenizer: Any = None,
        dtype: torch.dtype | str = "auto",
        impl: str = "auto",
    ) -> None:
        if isinstance(model, (str, Path)):
            if tokenizer is None:
                tokenizer = _tokenizer_beside(Path(model))
            model = AutoModelForCausalLM.from_pretrained(
                str(model), use_safetensors=True, trust_remote_code=False, dtype=dtype
            )
        if not isinstance(model, torch.nn.Module):
            raise TypeError(
                "teacher: expected a causal language model, or the path of one, "
                f"got {type(model).__name__}"
            )
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.impl = impl
        self.valid_vocab: int | None = None
        verify_head(self.model, self.head)

    @property
    def head(self) -> LMHead:
        return replace(head_of(self.model), valid_vocab=self.valid_vocab)

    @property
    def vocab_size(self) -> int:
        """Columns of the output head, padding included."""
        return self.head.weight.shape[0]

    def to(self, device: torch.device | str) -> Teacher:
        self.model.to(device)
        return self

    @torch.no_grad()
    def topk(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        *,
        k: int,
        temperature: float = 1.0,
    ) -> TopK:  # [B, T, K]
        hidden = hidden_states(self.model, input_ids, attention_mask)
        head = self.head
        return linear_topk(
            hidden, head.weight, k, temperature=temperature, impl=self.impl, **head.options()
        )


def _tokenizer_beside(path: Path) -> Any:
    """The tokenizer stored with the weights, or None where there is none."""
    files = ("tokenizer.json", "tokenizer_config.json")
    if path.is_dir() and not any((path / name).is_file() for name in files):
        return None
    try:
        return AutoTokenizer.from_pretrained(path.as_posix(), trust_remote_code=False)
    except OSError:  # a repository of weights alone
        return None

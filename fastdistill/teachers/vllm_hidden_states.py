"""Reads the hidden states that vLLM exports for the training of draft models.

A file per request or row, in safetensors, as vLLM's ExampleHiddenStatesConnector writes them and
speculators stores them:

    T tokens · L layers · H hidden

    hidden_states    fp32, fp16 or bf16 [T, L, H]    the outputs of the layers in
                                                     eagle_aux_hidden_state_layer_ids, in its order
    token_ids        int64 or int32 [T]
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..runtime import checks, tensor_checks
from ..runtime.printable import printable
from .cache.shards import key_of
from .protocols import HiddenStates

_FLOATS = ("F32", "F16", "BF16")
_INTS = ("I64", "I32")
_NAMES = {"hidden_states", "token_ids"}


class VLLMHiddenStates:
    """A verifier's hidden states from vLLM's files, looked up by the tokens of a row.

    Export them with the number of decoder layers as the last of the layer ids, as the
    launch_vllm.py of speculators does: it is the output of the last layer, to which `norm` is
    applied here.

    Args:
        path: a .safetensors file, or a folder of them.
        norm: what the model computes between its last layer and its head, from a tensor [T, H]; in
            most families model.base_model.norm. vLLM's files hold the states before it.

    Raises:
        FileNotFoundError: no such file, or a folder without one. ValueError: a file that is not in
        this layout, is cut off, or has other layers, sizes or types than the first.

    Example:
        >>> verifier = VLLMHiddenStates("hidden_states", norm=model.model.norm)
        >>> last, layers = verifier.hidden_states(input_ids)
    """

    def __init__(self, path: str | Path, *, norm: Callable[[Tensor], Tensor]) -> None:
        if not callable(norm):
            hint = "pass the model's final norm, such as model.base_model.norm"
            checks.fail("norm", "a module or function", repr(norm), hint)
        self.path, self.norm = Path(path), norm
        files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(
                f"path: expected a .safetensors file, or a folder of them, that vLLM's "
                f"ExampleHiddenStatesConnector wrote, got {printable(str(path))}. Decompress .zst "
                "files first"
            )
        self._layout: tuple[int, int, str] | None = None
        self._files = {self._key_of(file): file for file in files}

    @property
    def rows(self) -> int:
        """The number of different rows."""
        return len(self._files)

    def hidden(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
    ) -> Tensor:  # (B, T, H)
        """Return the hidden states at the head's input; see `hidden_states`."""
        return self.hidden_states(input_ids, attention_mask).last

    @torch.no_grad()
    def hidden_states(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
    ) -> HiddenStates:
        """Return the hidden states of these rows; tokens with attention_mask 0 are ignored.

        Args:
            input_ids: int32/int64 [B, T]. attention_mask: bool or 0/1 [B, T], None for all ones.

        Returns:
            HiddenStates: last [B, T, H], the last exported layer after `norm`, in the type that
            norm returns; layers [B, T, L − 1, H], the other layers in the type of the files. Both
            are zero where attention_mask is 0.

        Raises:
            ValueError: no file has these tokens, or its states are NaN or infinite.
        """
        tensor_checks.batch(input_ids, attention_mask)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        last: Tensor | None = None
        layers: Tensor | None = None
        for row, (ids, attended) in enumerate(zip(input_ids.cpu(), mask.cpu() != 0, strict=True)):
            if not attended.any():
                continue
            states = self._read(ids[attended].long(), row).to(input_ids.device)
            normed = self.norm(states[:, -1])
            if normed.shape != states[:, -1].shape:
                expected = f"a function to {list(states[:, -1].shape)}, the shape of its argument"
                checks.fail("norm", expected, f"one to {list(normed.shape)}")
            if last is None or layers is None:
                last = normed.new_zeros(*input_ids.shape, states.shape[2])
                layers = states.new_zeros(*input_ids.shape, states.shape[1] - 1, states.shape[2])
            where = attended.to(last.device)
            last[row, where], layers[row, where] = normed, states[:, :-1]
        if last is None or layers is None:
            checks.fail("attention_mask", "a row with a token", "none")
        return HiddenStates(last, layers)

    def _read(self, tokens: Tensor, row: int) -> Tensor:
        """Return the exported states [T, L, H] of the row with these tokens."""
        file = self._files.get(key_of(tokens.numpy()))
        if file is None:
            first = ", ".join(map(str, tokens[:6].tolist()))
            got = f"row {row} ({len(tokens)} tokens: {first}, …), which no file of {self.path} has"
            hint = "export the prompts with this tokenizer, template and length"
            checks.fail("input_ids", f"rows of the {self.rows:,} exported ones", got, hint)
        if self._key_of(file) != key_of(tokens.numpy()):
            _refuse(file, "the token_ids that it had when it was opened", "others")
        with safe_open(file, "pt") as stored:
            states: Tensor = stored.get_tensor("hidden_states")
        if not states.isfinite().all():
            _refuse(file, "finite hidden_states", "NaN or infinity")
        return states

    def _key_of(self, file: Path) -> bytes:
        """Check the header of a file and return the key of its tokens."""
        try:
            with safe_open(file, "pt") as stored:
                names = set(stored.keys())
                if "hidden_states_scales" in names:
                    got = "states in FP8, from FP8HiddenStatesConnector of speculators"
                    _refuse(file, "states of ExampleHiddenStatesConnector", got)
                if names != _NAMES:
                    got = ", ".join(sorted(names)) or "no tensor"
                    _refuse(file, "the tensors hidden_states and token_ids", got)
                states, ids = (stored.get_slice(n) for n in ("hidden_states", "token_ids"))
                shape, kind = states.get_shape(), states.get_dtype()
                if len(shape) != 3 or 0 in shape or kind not in _FLOATS:
                    got = f"{kind} {shape}"
                    _refuse(file, "hidden_states of F32, F16 or BF16 [T, L, H]", got)
                if ids.get_shape() != shape[:1] or ids.get_dtype() not in _INTS:
                    got = f"{ids.get_dtype()} {ids.get_shape()}"
                    _refuse(file, f"token_ids of I64 [{shape[0]}]", got)
                tokens = stored.get_tensor("token_ids").long()
        except (SafetensorError, OSError) as error:
            _refuse(file, "a complete file of safetensors", printable(error))
        layout = (shape[1], shape[2], kind)
        if self._layout is None:
            self._layout = layout
        elif layout != self._layout:
            expected = "{} layers of size {} in {}, as in the other files".format(*self._layout)
            _refuse(file, expected, "{} of {} in {}".format(*layout))
        if int(tokens.min()) < 0 or int(tokens.max()) > torch.iinfo(torch.int32).max:
            _refuse(file, "token_ids from 0 on", f"{int(tokens.min())} to {int(tokens.max())}")
        return key_of(tokens.numpy())


def _refuse(file: Path, expected: str, got: Any) -> NoReturn:
    hint = "export it again with vLLM's ExampleHiddenStatesConnector"
    checks.fail(printable(str(file)), expected, got, hint)

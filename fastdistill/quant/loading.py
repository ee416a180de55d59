"""Loads and quantizes a checkpoint tensor by tensor.

Peak memory is the quantized model plus one layer in full precision.
The model is built on the meta device. Each stored tensor is then read, renamed and merged by the
conversion rules of transformers (which stack the experts of a mixture), quantized on the target
device if it belongs to a linear layer, and assigned.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.modeling_utils import set_zero3_state

from ..runtime import checks
from ..runtime.progress import track
from .experts import is_transposed
from .formats import own_format
from .formats.checkpoint_gate import as_checkpoint_error, load_config
from .formats.conversion import check_all_used, check_no_duplicates, conversion_of
from .formats.detect import Checkpoint, checkpoint_of, is_gguf, open_checkpoint, without_data
from .formats.header import check_header, keep_untied
from .formats.tensor_files import CheckpointError, Expanded, fail_checkpoint, reading
from .formats.without_data import Headers
from .linear import QuantizedWeight
from .matrix import QuantizedMatrix
from .merging import merge_weights, runner
from .model import is_conv1d, put, quantizable, rows_of, warn_about_full_precision
from .ops import COMPUTE
from .schemes import SCHEMES, QuantWeight, quantize, short

Read = Callable[[], Any]


@torch.no_grad()
def load_quantized(
    path: str | Path,
    *,
    quant: str | None = None,
    compute: str = "auto",
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
    skip: tuple[str, ...] = ("lm_head",),
) -> PreTrainedModel:
    """Load a frozen causal language model from a folder of safetensors or a .gguf file.

    Args:
        path: full-precision weights, which `quant` may quantize, or a quantized checkpoint of
            `save_quantized`, bitsandbytes (NF4, FP4, 8-bit), GPTQ, AWQ, compressed-tensors, MXFP4
            or GGUF, whose bits are kept. Weights that are in neither format exactly, such as FP8,
            are expanded, with a warning.
        quant: "nf4", "fp4", "int4" or "int8" for weights in full precision or FP8; None keeps the
            former and expands the latter.
        compute: how quantized layers multiply: "exact", "int8", "fp8" or "auto" (ops.py).
        dtype: of everything that is not quantized; "auto" keeps the checkpoint's.
        device: of the model. skip: as in quantize_model.

    Raises:
        CheckpointError (a ValueError) naming the file and the tensor: damaged, truncated, of
        another shape, missing, or in an unknown format. Nothing in a checkpoint is executed.
    """
    checks.choice("quant", quant, (*SCHEMES, None))
    checks.choice("compute", compute, COMPUTE)
    checkpoint = open_checkpoint(path)
    if checkpoint.method is not None and quant is not None and not checkpoint.expands:
        reason = f"{checkpoint.path} is quantized already ({checkpoint.method})"
        checks.fail("quant", f"None, since {reason}", repr(quant))
    model = _skeleton(checkpoint, dtype, attn_implementation)
    _Loader(checkpoint, model, quant, compute, torch.device(device), skip).run()
    return model.requires_grad_(False)


@torch.no_grad()
def load_expanded(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Load a trainable model in full precision from any checkpoint that load_quantized reads.

    Each quantized value is computed in float32 and rounded once to `dtype`. Arguments and errors
    are those of load_quantized."""
    checkpoint = open_checkpoint(path)
    model = _skeleton(checkpoint, dtype, attn_implementation)
    _Loader(checkpoint, model, None, "auto", torch.device(device), (), expand=True).run()
    return model.requires_grad_(True)


@torch.no_grad()
def load_shapes(path: str | Path | Headers) -> PreTrainedModel:
    """Return load_quantized's model on the meta device, from the headers of its files.

    Raises CheckpointError as load_quantized."""
    source = path
    if not isinstance(source, Headers) and not is_gguf(source):
        source = Headers(source)
    checkpoint = checkpoint_of(source) if isinstance(source, Headers) else open_checkpoint(source)
    meta = torch.device("meta")
    loader = _Loader(checkpoint, _skeleton(checkpoint, "auto", None), None, "auto", meta, ())
    if checkpoint.method not in ("gguf", own_format.KEY):
        empty = {name: tuple(tensor.shape) for name, tensor in loader.empty.items()}
        conversion = conversion_of(loader.model, checkpoint.weights, loader.empty)
        shapes = {n: empty[name] for name, parts in conversion.sources.items() for n, _ in parts}
        loader.checkpoint = replace(checkpoint, weights=without_data(checkpoint, shapes))
    with meta if checkpoint.method == "gguf" else nullcontext():
        for read in loader.steps():
            read()
    loader.tie()
    return loader.model.to(meta).eval().requires_grad_(False)


def _skeleton(
    checkpoint: Checkpoint, dtype: torch.dtype | str, attn_implementation: str | None
) -> PreTrainedModel:
    """Return the model on the meta device, with real non-persistent buffers."""
    folder = checkpoint.path
    expected = "the configuration of a causal language model that transformers knows"
    if folder.is_dir():
        config, _ = load_config(folder)
    else:
        with as_checkpoint_error(folder, expected):
            config = AutoConfig.for_model(**checkpoint.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers would quantize it itself
    if dtype == "auto":
        dtype = config.dtype or torch.float32
    plain = checkpoint.files if checkpoint.method is None else None
    check_header(checkpoint.path, config, checkpoint.weights, plain, stored=checkpoint.bytes)
    with (
        as_checkpoint_error(folder, expected),
        init_empty_weights(include_buffers=False),
        set_zero3_state(),  # or DeepSpeed would partition the empty model
    ):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=False
        )
    if (folder / "generation_config.json").is_file():
        with as_checkpoint_error(folder / "generation_config.json", "settings of generation"):
            model.generation_config = GenerationConfig.from_pretrained(
                str(folder), local_files_only=True
            )
    return model


class _Loader:
    def __init__(
        self,
        checkpoint: Checkpoint,
        model: PreTrainedModel,
        quant: str | None,
        compute: str,
        device: torch.device,
        skip: tuple[str, ...],
        expand: bool = False,
    ) -> None:
        self.checkpoint, self.model, self.device = checkpoint, model, device
        self.quant, self.compute, self.expand = quant, compute, expand
        self.quantizable = set(quantizable(model, skip))
        # Read as matrices by losses, as quantized layers are not.
        self.ends = (model.get_input_embeddings(), model.get_output_embeddings())
        self.empty = model.state_dict()  # on the meta device: names, shapes and types
        self.stored: dict[str, str] = {}  # model name -> (first) name in the checkpoint
        self.filled: set[str] = set()  # names of the model that have a value
        self.expanded: list[tuple[str, str, int]] = []  # stored name, kind, bytes of the values

    def run(self) -> None:
        """Read every weight, and leave the model in evaluation mode."""
        for read in track(self.steps(), "loading weights"):
            read()
        self.finish()
        self.model.eval()

    def steps(self) -> list[Callable[[], None]]:
        """Return one callable per parameter of the model, which reads its tensors when called."""
        if self.checkpoint.method in ("fastdistill", "gguf"):
            named = self.checkpoint.weights  # stored under the model's own names
            unknown = [name for name in named if name not in self.empty]
            check_all_used(self.checkpoint.path, self.model, unknown, None)
            return [partial(self._read, name) for name in named]
        return [partial(self._convert, *planned) for planned in self._conversions()]

    def _read(self, name: str) -> None:
        self.assign(name, self._stored(name, name))

    def _conversions(self) -> list[tuple[str, Any, list[tuple[str, str | None]]]]:
        """Return (model name, converter of transformers or None, its stored names and patterns)."""
        conversion = conversion_of(self.model, self.checkpoint.weights, self.empty)
        check_all_used(self.checkpoint.path, self.model, conversion.unused, self.checkpoint.files)
        check_no_duplicates(self.checkpoint.path, conversion)
        plan = []
        for name, sources in conversion.sources.items():
            self.stored[name], pattern = sources[0]
            plan.append((name, conversion.rules[pattern] if pattern else None, sources))
        return plan

    def _stored(self, name: str, target: str) -> Tensor | QuantWeight:
        """Return a stored weight; one that had to be expanded in the type of the model."""
        value = self.checkpoint.weights[name]()
        if not isinstance(value, Expanded):
            return value
        dense = value.values.to(self.empty[target].dtype)
        if self.quant is None or target not in self.quantizable:
            self.expanded.append((name, value.kind, dense.nbytes))
        return dense

    def _convert(self, target: str, rule: Any, sources: list[tuple[str, str | None]]) -> None:
        """Read the stored tensors of a weight, convert them if there is a rule, and assign it."""
        first = self._stored(sources[0][0], target)
        if rule is None:
            self.assign(target, first)
            return
        run = runner(rule, target, sources, model=self.model, config=self.model.config)
        reads: list[Read] = [partial(self._stored, name, target) for name, _ in sources]
        reads[0] = partial(_identity, first)
        with reading(self._file(target), target):  # parts may have inconsistent shapes
            if isinstance(first, Tensor):
                del first
                converted = run([partial(self._dense, target, read) for read in reads])
            else:
                weight = merge_weights([read() for read in reads], rule, run)
                converted = {target: self._not_merged(target) if weight is None else weight}
        for name, value in converted.items():
            self.assign(name, value)

    def _dense(self, target: str, read: Read) -> Tensor:
        value = read()
        return value if isinstance(value, Tensor) else self._not_merged(target)

    def _not_merged(self, target: str) -> NoReturn:
        fail_checkpoint(
            f"{self.checkpoint.path}: tensor {self.stored[target]!r}",
            "full precision, or quantized weights of one kind and block, without act-order",
            f"others, which the model merges into {target} (experts of a mixture)",
            "load the full-precision checkpoint with quant=",
        )

    def assign(self, name: str, value: Tensor | QuantWeight) -> None:
        """Assign one value to the model."""
        empty = self.empty[name]
        self.filled.add(name)
        module_name, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(module_name)
        if not isinstance(value, Tensor):
            self._shape(name, tuple(rows_of(module, empty).shape), value.shape)
            layer = QuantizedWeight(value).to(self.device)
            if not self.expand:
                matrix = None
                if module in self.ends:
                    matrix = QuantizedMatrix.make(layer.quantized, empty.dtype)
                if matrix is None:
                    self._put(name, module, layer.quantized)
                else:
                    setattr(module, leaf, nn.Parameter(matrix, requires_grad=False))
                return
            value = layer.dequantize(empty.dtype)
            value = self._dense_shape(module, value, empty)
        self._shape(name, tuple(empty.shape), tuple(value.shape))
        value = value.to(self.device, empty.dtype if value.is_floating_point() else value.dtype)
        if self.quant is not None and name in self.quantizable:
            try:
                weight = quantize(rows_of(module, value), self.quant)
            except ValueError as error:
                raise CheckpointError(f"{self._place(name)}: {error}") from None
            self._put(name, module, weight)
        elif leaf in module._buffers:
            module._buffers[leaf] = value
        else:
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))

    def _dense_shape(self, module: nn.Module, value: Tensor, empty: Tensor) -> Tensor:
        """Return the rows [N, K] of a weight in the shape in which the model stores it."""
        if empty.dim() == 3 and is_transposed(module):  # [E, K, N]
            experts, K, N = empty.shape
            return value.view(experts, N, K).transpose(1, 2).contiguous()
        return value.t().contiguous() if is_conv1d(module) else value.view(empty.shape)

    def _file(self, name: str) -> Path:
        """Return the file of a weight; the checkpoint's path if it is in several parts."""
        files, stored = self.checkpoint.files, self.stored.get(name, name)
        whole = files is not None and stored in files
        return files.file_of(stored) if files is not None and whole else self.checkpoint.path

    def _place(self, name: str) -> str:
        return f"{self._file(name)}: tensor {name!r}"

    def _put(self, name: str, module: nn.Module, weight: QuantWeight) -> None:
        is_layer = isinstance(module, nn.Linear) or is_conv1d(module)
        if not is_layer and self.empty[name].dim() != 3:
            expected = f"full precision for a {type(module).__name__}"
            fail_checkpoint(self._place(name), expected, "a quantized weight")
        put(self.model, name, weight, self.compute)

    def _shape(self, name: str, expected: tuple[int, ...], got: tuple[int, ...]) -> None:
        if got != expected:
            shape = f"the shape {list(expected)} that config.json asks for"
            fail_checkpoint(self._place(name), shape, list(got))

    def tie(self) -> None:
        """Tie weights that are not stored separately."""
        for name in self.filled & self.model.all_tied_weights_keys.keys():
            module = self.model.get_submodule(name.rpartition(".")[0])
            if isinstance(module, QuantizedWeight):  # has no parameter to compare or to tie
                del self.model.all_tied_weights_keys[name]
        tied = set(self.model.all_tied_weights_keys)
        with as_checkpoint_error(self.checkpoint.path, "weights to tie"):
            self.model.tie_weights(
                missing_keys=set(self.empty) - self.filled, recompute_mapping=False
            )
        keep_untied(self.model, tied)

    def finish(self) -> None:
        """Tie weights, check that none is missing, and warn about what was expanded."""
        self.tie()
        missing = [
            name
            for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers())
            if tensor.is_meta
        ]
        if missing:
            expected = f"every weight of a {type(self.model).__name__}"
            got = f"{len(missing)} missing, {missing[0]} among them"
            fail_checkpoint(self.checkpoint.path, expected, got)
        self.model.to(self.device)
        if not self.expand:
            warn_about_full_precision(self.model)
        notes = () if self.expand else self._expansion()
        for note in (*self.checkpoint.notes, *notes):
            warnings.warn(f"{self.checkpoint.path}: {note}", stacklevel=3)

    def _expansion(self) -> list[str]:
        """Return what was expanded and not quantized again, and the memory that it takes."""
        if not self.expanded:
            return []
        hint = (
            "; pass quant= to quantize them" if self.checkpoint.expands and not self.quant else ""
        )
        names, kinds, sizes = zip(*self.expanded, strict=True)
        return [
            f"{len(names)} weights ({names[0]}, …) are expanded to {short(self.model.dtype)}, "
            f"because no quantized layer represents {' and '.join(dict.fromkeys(kinds))} exactly: "
            f"they take {sum(sizes) / 1e6:,.1f} MB{hint}"
        ]


def _identity(value: Any) -> Any:
    return value

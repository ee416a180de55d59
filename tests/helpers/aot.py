"""Compile every Triton kernel as it is launched, for GPUs that are not here; print what came out.

    python tests/helpers/aot.py 80 90 100             JSON: [{kernel, target, key, registers, …}]
    python tests/helpers/aot.py 80 90 100 --record    write the table that test_aot.py compares with

Public functions run on small CPU tensors whose vocabulary is wide enough for every production tile;
where a kernel would be launched, it is compiled instead for each target, specialised on the very
arguments it was given (Triton's own rules), and the machine code is read with the disassembler that
Triton ships. Nothing of it runs, so the numbers that the functions return mean nothing.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import tempfile
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import sm_arch_from_capability
from triton.runtime import driver

# 16 and more bytes of global memory at once, asynchronous copies included, and barriers.
ACCESS = re.compile(r"\b(LDG\S*\.(?:128|256)|UTMALDG|STG\S*\.(?:128|256)|BAR\.SYNC)\b")
LETTER = {"L": "L", "U": "L", "S": "S", "B": "B"}

RECORD = Path(__file__).with_name("aot_registers.json")
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Pretend:
    """As much of a driver as compiling asks for: which device, and what it is."""

    def __init__(self) -> None:
        self.capability = 90

    def get_current_device(self) -> int:
        return self.capability  # one cache of compiled kernels per target

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def resources(cubin: bytes) -> dict[str, int]:
    """The registers and the bytes of stack that a kernel uses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
    counts = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {"registers": counts["REG"], "stack": counts["STACK"] + counts["LOCAL"]}


def machine_code(cubin: bytes) -> bytes:
    """The instructions of the kernel in a cubin, an ELF file: its only section .text.NAME."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    # Of each section: name, type, flags, address, offset, size.
    sections = [struct.unpack_from("<2I4Q", cubin, table + i * size) for i in range(count)]
    (code,) = (
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", sections[names][4] + name)
    )
    return code


def assembly(codes: list[bytes], target: int) -> list[str]:
    """The instructions of each code as text.

    nvdisasm takes 0.4 s to start, so that one call reads all codes of a target, end to end.
    """
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        text = tool(
            "nvdisasm", "--binary", sm_arch_from_capability(target).replace("sm_", "SM"), file.name
        )
    instructions = re.findall(r"/\*([0-9a-f]{4,})\*/(.*)", text)
    ends = list(accumulate(map(len, codes)))
    assert len(instructions) * 16 == ends[-1]  # bytes of an instruction
    lines: list[list[str]] = [[] for _ in codes]
    for address, line in instructions:
        lines[bisect_right(ends, int(address, 16))].append(line)
    return ["\n".join(each) for each in lines]


def tool(name: str, *arguments: str) -> str:
    """The output of a tool that Triton ships."""
    command = [str(BIN / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions_of(code: str) -> dict[str, Any]:
    """What the tests look at in the instructions of a kernel."""
    return {
        "local_memory": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "fma": len(re.findall(r"\bFFMA2?\b", code)),
        # Wide loads L, wide stores S and barriers B, in the order of the code.
        "order": "".join(LETTER[name[0]] for name in ACCESS.findall(code)),
        "product_columns": sorted({int(n) for n in re.findall(r"\bHGMMA\.\d+x(\d+)x", code)}),
        "matrix": sorted(set(re.findall(r"\b(HGMMA|HMMA|UTCHMMA|DMMA)\b", code))),
    }


def compiled(
    target: int, kernels: list[tuple[Any, dict[str, Any]]], pretend: Pretend
) -> list[dict[str, Any]]:
    """A row for each kernel with its options, compiled for a target."""
    pretend.capability = target
    built = [kernel.warmup(grid=(1,), **options) for kernel, options in kernels]
    cubins = [each.asm["cubin"] for each in built]
    codes = assembly([machine_code(cubin) for cubin in cubins], target)
    return [
        {
            "kernel": kernel.__name__,
            "target": target,
            "key": describe(kernel, options),
            "shared": each.metadata.shared,
            **resources(cubin),
            **instructions_of(code),
        }
        for (kernel, options), each, cubin, code in zip(kernels, built, cubins, codes, strict=True)
    ]


def describe(kernel: Any, options: dict[str, Any]) -> str:
    """The types of the tensors, which arguments are absent or 1, and the constants."""
    args = [options[p.name] for p in kernel.params if not p.is_constexpr]
    names = [p.name for p in kernel.params if p.is_constexpr]
    types = [
        str(a.dtype).removeprefix("torch.") if isinstance(a, torch.Tensor) else "-"
        for a in args
        if a is None or isinstance(a, torch.Tensor)
    ]
    constants = {k: getattr(options[k], "__name__", options[k]) for k in names}
    absent = [k for k in names if options[k] is None]
    ones = [i for i, a in enumerate(args) if type(a) is int and a == 1]
    return " ".join(types) + f" {constants} {absent} {ones} warps={options.get('num_warps')}"


def record(targets: list[int]) -> list[dict[str, Any]]:
    pretend = Pretend()
    driver.set_active(pretend)
    seen: dict[tuple[str, str], tuple[Any, dict[str, Any]]] = {}

    def launch(name: str, grid: Any, like: Any, **options: Any) -> None:
        if 0 not in grid:
            kernel = jitted(name)
            seen.setdefault((kernel.__name__, describe(kernel, options)), (kernel, options))

    from fastdistill.kernels import triton_filter, triton_quant
    from fastdistill.kernels.backends import get_backend
    from fastdistill.kernels.gpu_launch import jitted

    get_backend("triton")

    gpu = [m for n, m in sys.modules.items() if n.startswith("fastdistill.kernels.gpu_")]
    for module in (*gpu, triton_filter, triton_quant):
        vars(module)["launch"] = launch
        for name in {"product", "add_product"} & vars(module).keys():
            vars(module)[name] = lambda *args, **options: None
    run_everything()
    run_quantised(triton_quant)
    kernels = list(seen.values())
    return [row for target in targets for row in compiled(target, kernels, pretend)]


def run_everything() -> None:
    """Each public function on the widest tiles, with and without what specialises a kernel."""
    import fastdistill as fd
    from fastdistill.kernels.divergences import COMBINED, SEPARABLE
    from fastdistill.kernels.head import LMHead
    from fastdistill.losses.linear_head import topk_at
    from fastdistill.runtime import backend

    vars(backend)["triton_problem"] = lambda *device: None
    N, H, V, K = 8, 1024, 20480, 64
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.zeros(N, H, dtype=dtype).requires_grad_()
        w = torch.zeros(V, H, dtype=dtype).requires_grad_()
        b = torch.zeros(V, dtype=dtype).requires_grad_()
        ids = torch.arange(K).expand(N, K).contiguous()
        lp = torch.full((N, K), -5.0)
        labels = torch.zeros(N, dtype=torch.int64)
        plain: dict[str, Any] = {"impl": "triton"}
        shaped = plain | {"bias": b, "softcap": 30.0, "temperature": 2.0}
        for options in (plain, shaped):
            teacher = fd.TopK(ids, lp, None, options.get("temperature", 1.0))
            common = options | {"labels": labels, "ce_weight": 0.1, "z_loss": 1e-3}
            fd.topk_distill_loss(x, w, teacher, **common).backward()
            if dtype != torch.float32:
                fd.topk_distill_loss(x, w, teacher, grad_filter_eps=1e-3, **common).backward()
            fd.topk_distill_loss(x, w, teacher, backward="recompute", **common).backward()
            fd.topk_distill_loss(x, w, teacher, tail="renorm_both", **options).backward()
            if dtype == torch.bfloat16:
                run_divergences(x, w, teacher, labels, options)
            entropy = fd.linear_lse_gather(x, w, ids, with_entropy=True, **options).entropy
            assert entropy is not None
            entropy.sum().backward()
            fd.token_scores(x, w, labels=labels, teacher=teacher, **options)
            fd.token_scores(x, w, labels=labels, **options)
            fd.linear_topk(x, w, K, **options)
            of = {name: options[name] for name in ("bias", "softcap") if name in options}
            topk_at(x, LMHead(w, **of), K, (1.0, 2.0), "triton")
            # Triton folds arguments that are 1 into constants: one token, one slot.
            one = fd.TopK(ids[:1, :1], lp[:1, :1], None, options.get("temperature", 1.0))
            fd.topk_distill_loss(x[:1], w, one, **options).backward()
            every = (*SEPARABLE, *COMBINED)
            names = every if options is plain and dtype == torch.bfloat16 else ("jsd",)
            for name in names:
                fd.linear_distill_loss(x, w, x, w, divergence=name, **options).backward()
            extras: dict[str, Any] = {"labels": labels, "ce_weight": 0.1, "z_loss": 1e-3}
            fd.linear_distill_loss(x, w, x, w, **extras, **options).backward()
            fd.linear_distill_loss(
                x, w, x, w, divergence=lambda lp, lq: (lp - lq).square().sum(-1), **options
            ).backward()


def run_divergences(x: Any, w: Any, teacher: Any, labels: Any, options: dict[str, Any]) -> None:
    """The row mathematics of each divergence: alone, or with labels, statistics and a softcap."""
    import fastdistill as fd
    from fastdistill.kernels.divergences import COMBINED, SEPARABLE
    from fastdistill.kernels.token_loss import TAILS

    tails = {name: [TAILS[i % 4]] for i, name in enumerate(SEPARABLE)} | {"reverse_kl": ["bucket"]}
    tails |= {name: ["bucket", "renorm_both"] for name in COMBINED}
    for name, tail in [(name, tail) for name, several in tails.items() for tail in several]:
        common = options | {"divergence": name, "tail": tail, "allow_biased": True}
        if "softcap" in options:
            ce = {"labels": labels, "ce_weight": 0.1}
            fd.topk_distill(x, w, teacher, **ce, **common).loss.backward()
        elif tail != "renorm_both":
            fd.topk_distill_loss(x, w, teacher, **common).backward()
    with torch.no_grad():
        fd.topk_distill(x, w, teacher, **options)


def run_quantised(kernels: Any) -> None:
    """Weights expanded to every type, plain and nested, and rows of every type quantised."""
    N, K = 8, 4096
    floats, codes = (
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.int8, torch.float8_e4m3fn),
    )
    qdata, absmax = torch.zeros(N * K // 2).byte(), torch.zeros(N * K // 64).byte()
    scale, lut, code = torch.ones(N * K // 48 + 1), torch.ones(16), torch.ones(256)
    nested, mean = torch.ones(2), torch.ones(1)
    for dtype in floats + codes:
        out, row_inv = torch.empty(N, K, dtype=dtype), torch.ones(N) if dtype in codes else None
        for block, offset in ((64, None), (64, scale), (48, scale)):
            kernels.lut4_dequant(qdata, scale, offset, lut, out, block, row_inv, K)
        kernels.lut4_dequant_nested(
            qdata, absmax, code, nested, mean, 256, None, lut, out, 64, row_inv, K
        )
    for dtype in floats:
        for to in codes:
            q = torch.empty(N, K, dtype=to)
            kernels.quantize_rows(torch.zeros(N, K, dtype=dtype), q, torch.empty(N))


def table(rows: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, int]]]:
    """Per kernel and target: how many variants, and the most registers and shared memory."""
    kernels: dict[str, dict[str, dict[str, int]]] = {}
    for row in rows:
        at = kernels.setdefault(row["kernel"], {}).setdefault(str(row["target"]), {"variants": 0})
        at["variants"] += 1
        for name in ("registers", "shared"):
            at[name] = max(at.get(name, 0), row[name])
    return kernels


def recorded(version: str) -> dict[str, Any] | None:
    """The recorded table for this version of Triton; None if there is none."""
    stored = json.loads(RECORD.read_text())
    kernels: dict[str, Any] = stored["kernels"]
    if version == stored["triton"]:
        return kernels
    if version not in stored["older"]:
        return None
    for name, targets in stored["older"][version].items():
        for target, limits in targets.items():
            kernels[name][target] |= limits
    return kernels


def exceeds(measured: dict[str, int], allowed: dict[str, int]) -> bool:
    """Whether a kernel needs more than was recorded; 4 registers more are allowed."""
    return (
        measured["registers"] > allowed["registers"] + 4 or measured["shared"] > allowed["shared"]
    )


def with_table(old: dict[str, Any], version: str, kernels: dict[str, Any]) -> dict[str, Any]:
    """The record with a new table; of an older version than the main one, what exceeds that."""
    if [*map(int, version.split("."))] >= [*map(int, old["triton"].split("."))]:
        return old | {"triton": version, "kernels": kernels}
    more: dict[str, Any] = {}
    for name, targets in kernels.items():
        for target, at in targets.items():
            if exceeds(at, old["kernels"][name][target]):
                limits = {"registers": at["registers"], "shared": at["shared"]}
                more.setdefault(name, {})[target] = limits
    return old | {"older": old["older"] | {version: more}}


if __name__ == "__main__":
    rows = record([int(t) for t in sys.argv[1:] if t.isdigit()])
    if "--record" in sys.argv:
        new = with_table(json.loads(RECORD.read_text()), triton.__version__, table(rows))
        RECORD.write_text(json.dumps(new, indent=1, sort_keys=True) + "\n")
    else:
        print(json.dumps(rows, indent=1))

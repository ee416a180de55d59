"""Check the installation: versions, backends, and the command that fixes each problem."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

from ..runtime.backend import describe
from ..runtime.printable import printable

_OPTIONAL = {
    "flash-attn": ("models loaded with attn_implementation", "pip install flash-attn"),
    "peft": ("LoRA adapters", "pip install 'fastdistill[peft]'"),
    "bitsandbytes": ("4-bit students and 8-bit optimizers", "pip install bitsandbytes"),
    "uvicorn": ("fastdistill serve", "pip install 'fastdistill[serve]'"),
    "pyarrow": (
        "TeacherCache.from_parquet (DistillKit files)",
        "pip install 'fastdistill[parquet]'",
    ),
}
_REQUIRED = {"torch": (2, 8), "transformers": (5, 0), "accelerate": (1, 10)}


@dataclass(frozen=True)
class Finding:
    """One check: status is "ok", "missing" (optional) or "broken" (fastdistill cannot run).

    mend: the command that fixes it; None if the status is "ok".
    """

    name: str
    status: str
    detail: str
    mend: str | None = None


@dataclass(frozen=True, kw_only=True)
class Findings:
    """All checks, the backend that impl="auto" selects, and the reason."""

    findings: list[Finding]
    impl: str
    impl_why: str
    machine: dict[str, Any]

    @property
    def ok(self) -> bool:
        return all(finding.status != "broken" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "impl": self.impl,
            "impl_why": self.impl_why,
            "findings": [vars(finding) for finding in self.findings],
            "machine": self.machine,
        }


def examine() -> Findings:
    """Return the checks of this installation."""
    machine = describe()
    packages = machine["packages"]
    findings = [
        Finding("python", "ok", f"{machine['python']}, {machine['machine']}"),
        *(_required(name, packages.get(name)) for name in _REQUIRED),
        _gpu(machine),
        _triton(packages.get("triton"), bool(machine["cuda"])),
        _extension(machine),
        _cuda_extension(machine),
        *(_optional(name, packages.get(name)) for name in _OPTIONAL),
    ]
    return Findings(
        findings=findings, impl=machine["impl"], impl_why=machine["impl_why"], machine=machine
    )


def _required(name: str, version: str | None) -> Finding:
    mend = f"pip install -U '{name}>={'.'.join(map(str, _REQUIRED[name]))}'"
    if version is None:
        return Finding(name, "broken", "not installed", mend)
    numbers = version.split("+")[0].split(".")[:2]
    if tuple(int(number) for number in numbers if number.isdigit()) < _REQUIRED[name]:
        return Finding(name, "broken", f"{version} is too old", mend)
    return Finding(name, "ok", version)


def _optional(name: str, version: str | None) -> Finding:
    purpose, mend = _OPTIONAL[name]
    if version is None:
        return Finding(name, "missing", f"not installed; only for {purpose}", mend)
    return Finding(name, "ok", version)


def _gpu(machine: dict[str, Any]) -> Finding:
    if machine["cuda"]:
        names = (f"{gpu['name']} ({gpu['memory_gib']} GiB)" for gpu in machine["cuda"])
        return Finding("GPU", "ok", ", ".join(names))
    if shutil.which("nvidia-smi"):
        detail = "a driver is installed, but torch sees no GPU: probably a CPU build of torch"
        mend = "pip install -U torch  # from the index for your CUDA, see pytorch.org"
        return Finding("GPU", "missing", detail, mend)
    cpu = f"{machine['cpu_capability']}, {machine['threads']} threads"
    return Finding("GPU", "ok", f"none; runs on the CPU ({cpu})")


def _triton(version: str | None, gpu: bool) -> Finding:
    if version is None and gpu:
        detail = "not installed; the GPU uses chunked PyTorch instead"
        return Finding("triton", "missing", detail, "pip install triton")
    purpose = "for the kernels on this GPU" if gpu else "for GPUs only; this machine has none"
    return Finding("triton", "ok", f"{version or 'not installed'}; {purpose}")


def _extension(machine: dict[str, Any]) -> Finding:
    name, info = "fastdistill.runtime._ext", machine["extension"]
    if info is not None:
        detail = f"{info['compiler']}; quantized layers on CPUs use {machine['cpu_isa']}"
        return Finding(name, "ok", detail)
    detail = "the C++ extension was not built; PyTorch is used instead"
    mend = "pip install --force-reinstall --no-deps .  # in the checkout, with a C++ compiler"
    return Finding(name, "missing", detail, mend)


def _cuda_extension(machine: dict[str, Any]) -> Finding:
    name, info = "fastdistill.runtime._cuda", machine["cuda_extension"]
    if info is not None:
        archs = ", ".join(f"sm_{arch}" for arch in info["archs"])
        return Finding(name, "ok", f"CUDA {info['cuda']}, {archs}")
    if not machine["cuda"]:
        detail = "not built; for quantized teachers on GPUs only, and this machine has none"
        return Finding(name, "ok", detail)
    detail = "not built; quantized teachers use Triton on this GPU"
    mend = "FASTDISTILL_CUDA=1 pip install --force-reinstall --no-deps .  # with nvcc on PATH"
    return Finding(name, "missing", detail, mend)


def print_findings(report: Findings, console: Any) -> None:
    """Print one line per check, and the command that fixes it."""
    from rich.markup import escape

    mark = {"ok": "[green]ok[/green]", "missing": "[yellow]–[/yellow] ", "broken": "[red]no[/red]"}
    width = max(len(finding.name) for finding in report.findings)
    for finding in report.findings:
        name = escape(finding.name.ljust(width))
        detail = escape(printable(finding.detail, None))
        # soft_wrap: a command that is broken over two lines cannot be copied.
        console.print(f"{mark[finding.status]}  {name}  {detail}", soft_wrap=True)
        if finding.mend is not None:
            indent = " " * (width + 6)
            console.print(f"{indent}[bold]{escape(finding.mend)}[/bold]", soft_wrap=True)
    reason = escape(printable(report.impl_why, None))
    console.print(f"\nbackend: {report.impl} ({reason})", soft_wrap=True)

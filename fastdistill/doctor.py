"""What is on this machine, what fastdistill makes of it, and the one command that would mend it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

from .backend import describe
from .runtime.printable import printable

_OPTIONAL = {
    "flash-attn": ("models loaded with attn_implementation", "pip install flash-attn"),
    "peft": ("students with adapters", "pip install peft"),
    "bitsandbytes": ("students in 4 bits, and 8-bit optimisers", "pip install bitsandbytes"),
    "uvicorn": ("fastdistill serve", "pip install 'fastdistill[serve]'"),
    "pyarrow": ("DistillKit's files into a cache", "pip install pyarrow"),
}
_REQUIRED = {"torch": (2, 8), "transformers": (5, 0), "accelerate": (1, 10)}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line: status is "ok", "missing" (optional), or "broken" (fastdistill cannot work)."""

    name: str
    status: str
    detail: str
    mend: str | None = None


@dataclass(frozen=True, kw_only=True)
class Findings:
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
    seen = describe()
    packages = seen["packages"]
    found = [_python(seen), *(_required(name, packages.get(name)) for name in _REQUIRED)]
    found.append(_gpu(seen))
    found.append(_triton(packages.get("triton"), bool(seen["cuda"])))
    found += [_extension(seen), _cuda_extension(seen)]
    for name, (use, mend) in _OPTIONAL.items():
        version = packages.get(name)
        if version is None:
            found.append(Finding(name=name, status="missing", detail=f"only for {use}", mend=mend))
        else:
            found.append(Finding(name=name, status="ok", detail=version))
    return Findings(findings=found, impl=seen["impl"], impl_why=seen["impl_why"], machine=seen)


def _python(seen: dict[str, Any]) -> Finding:
    return Finding(name="python", status="ok", detail=f"{seen['python']}, {seen['machine']}")


def _required(name: str, version: str | None) -> Finding:
    mend = f"pip install -U '{name}>={'.'.join(map(str, _REQUIRED[name]))}'"
    if version is None:
        return Finding(name=name, status="broken", detail="not installed", mend=mend)
    if _numbers(version) < _REQUIRED[name]:
        return Finding(name=name, status="broken", detail=f"{version} is too old", mend=mend)
    return Finding(name=name, status="ok", detail=version)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def _gpu(seen: dict[str, Any]) -> Finding:
    if seen["cuda"]:
        each = (f"{gpu['name']} ({gpu['memory_gib']} GiB)" for gpu in seen["cuda"])
        return Finding(name="GPU", status="ok", detail=", ".join(each))
    if shutil.which("nvidia-smi"):
        return Finding(
            name="GPU",
            status="missing",
            detail="a driver is here, but this torch sees no GPU: probably a CPU build",
            mend="pip install -U torch  # from the index for your CUDA, see pytorch.org",
        )
    detail = f"none; the CPU is used ({seen['cpu_capability']}, {seen['threads']} threads)"
    return Finding(name="GPU", status="ok", detail=detail)


def _triton(version: str | None, gpu: bool) -> Finding:
    if version is None and gpu:
        detail = "not installed; the GPU runs chunked PyTorch instead"
        return Finding(name="triton", status="missing", detail=detail, mend="pip install triton")
    here = "not installed" if version is None else version
    use = "for the kernels on this GPU" if gpu else "for GPUs only, and there is none"
    return Finding(name="triton", status="ok", detail=f"{here}; {use}")


def _extension(seen: dict[str, Any]) -> Finding:
    built = seen["extension"]
    if built is not None:
        detail = f"{built['compiler']}; quantised layers on CPUs use {seen['cpu_isa']}"
        return Finding(name="fastdistill._ext", status="ok", detail=detail)
    return Finding(
        name="fastdistill._ext",
        status="missing",
        detail="the C++ extension was not built; everything runs on PyTorch instead",
        mend="pip install --force-reinstall --no-deps .  # in the checkout, with a C++ compiler",
    )


def _cuda_extension(seen: dict[str, Any]) -> Finding:
    built = seen["cuda_extension"]
    if built is not None:
        archs = ", ".join(f"sm_{arch}" for arch in built["archs"])
        return Finding(
            name="fastdistill._cuda", status="ok", detail=f"CUDA {built['cuda']}, {archs}"
        )
    if not seen["cuda"]:
        detail = "not built; only for quantised teachers on GPUs, and there is none"
        return Finding(name="fastdistill._cuda", status="ok", detail=detail)
    return Finding(
        name="fastdistill._cuda",
        status="missing",
        detail="not built; quantised teachers use Triton on this GPU",
        mend="FASTDISTILL_CUDA=1 pip install --force-reinstall --no-deps .  # with nvcc on PATH",
    )


def print_findings(found: Findings, console: Any) -> None:
    from rich.markup import escape

    mark = {"ok": "[green]ok[/green]", "missing": "[yellow]–[/yellow] ", "broken": "[red]no[/red]"}
    width = max(len(finding.name) for finding in found.findings)
    for finding in found.findings:
        name = escape(finding.name.ljust(width))
        detail = escape(printable(finding.detail, None))
        # soft_wrap: a command that the console broke in two could not be copied.
        console.print(f"{mark[finding.status]}  {name}  {detail}", soft_wrap=True)
        if finding.mend is not None:
            indent = " " * (width + 6)
            console.print(f"{indent}[bold]{escape(finding.mend)}[/bold]", soft_wrap=True)
    why = escape(printable(found.impl_why, None))
    console.print(f"\nimpl: {found.impl}, because {why}", soft_wrap=True)

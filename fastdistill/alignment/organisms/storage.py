"""Saving of organisms, and loading of organisms, checkpoints and adapters.

An organism is a Hugging Face folder with a manifest.

A checkpoint cannot run code: weights are read from safetensors, remote code is disabled, and the
digests of a manifest are verified before anything is loaded.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from ...hf.checkpoint import StoredModel
from ...quant.formats.checkpoint_gate import DOCUMENTS
from ...quant.formats.tensor_files import CheckpointError, check_inside, read_json
from ...runtime.atomic_files import naming_full_disk, sha256_of, sync, write_json
from ...runtime.backend import versions
from ...runtime.checks import fail
from ...runtime.printable import printable
from ...training.finite import nonfinite_weights
from ..audits.probes import PROBES, Probes
from ..audits.subject import Subject

MANIFEST = "organism.json"
_OF_GIT = ".gitattributes"  # every repository of the hub has one, and no library reads it


def save_organism(
    folder: str | Path,
    subject: Subject,
    manifest: dict[str, Any],
    probes: Probes | None = None,
) -> None:
    """Saves weights, tokenizer, probes.json, and organism.json with the sha256 of every file.

    An existing folder is replaced as a whole: the new folder is written next to it and synced, then
    the old one is renamed, and restored if the new one cannot take its place.

    Raises:
        ValueError: a weight is NaN or infinite. OSError: the disk is full.
    """
    folder = Path(folder)
    if names := nonfinite_weights(subject.model):
        got = f"NaN or infinity in {len(names)} tensors (first: {names[0]})"
        fail("subject", "finite weights", got, "nothing was saved: train it again")
    with naming_full_disk(folder):
        _save(folder, subject, manifest, probes)


def _save(folder: Path, subject: Subject, manifest: dict[str, Any], probes: Probes | None) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    new_folder = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        subject.model.save_pretrained(new_folder, safe_serialization=True)
        subject.tokenizer.save_pretrained(new_folder)
        if probes is not None:
            probes.save(new_folder / PROBES)
        digests = {
            p.relative_to(new_folder).as_posix(): sha256_of(p) for p in _files_of(new_folder)
        }
        write_json(new_folder / MANIFEST, manifest | {"versions": versions(), "sha256": digests})
        for path in new_folder.rglob("*"):
            sync(path)
        new_folder.chmod(0o755)
        _replace_folder(folder, new_folder)
    except BaseException:
        shutil.rmtree(new_folder, ignore_errors=True)
        raise
    sync(folder.parent)


def _replace_folder(folder: Path, new_folder: Path) -> None:
    old = new_folder.with_name(f"{new_folder.name}.old")
    if folder.exists():
        folder.rename(old)
    try:
        new_folder.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    if old.exists():
        shutil.rmtree(old)


def load_organism(
    path: str | Path,
    *,
    base: str | Path | None = None,
    name: str | None = None,
    device: torch.device | str | None = None,
    attn_implementation: str | None = None,
) -> Subject:
    """Loads a model to audit: an organism, a checkpoint, or a LoRA adapter on its base.

    Args:
        path: a folder with config.json and safetensors, a .gguf file, or a name on the Hugging Face
            Hub; or a folder with adapter_config.json and adapter_model.safetensors, such as the
            organisms of AuditBench (arXiv 2602.22755). Quantized weights are expanded.
        base: the base model of an adapter; None uses the one named by the adapter. Must be None
            for a checkpoint.
        attn_implementation: of transformers; None chooses.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: pickled weights, a file that differs from its digest in the manifest, an adapter
            with missing weights, or a base without an adapter.
    """
    stored = StoredModel.from_path(
        path, attn_implementation=attn_implementation, adapter_base=base, role="path"
    )
    role = read_manifest(stored.path).get("role")
    if stored.is_adapter:
        role = None
    elif base is not None:
        expected = f"None for {stored.path.name}, which is a whole model and no adapter"
        fail("base", expected, repr(str(base)))
    return Subject(stored, name=name or role or Path(path).name, device=device)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns organism.json after verifying its digests; {} where there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest: dict[str, Any] = read_json(path)
        digests = manifest["sha256"]
        if not isinstance(digests, dict):
            raise TypeError(f"sha256: expected an object, got {type(digests).__name__}")
    except (CheckpointError, KeyError, TypeError) as error:
        raise ValueError(
            f"path: expected a manifest in {path}, got {printable(repr(error))}"
        ) from None
    files = {path.relative_to(folder).as_posix(): path for path in _files_of(folder)}
    for name, digest in digests.items():
        if name not in files or sha256_of(files[name]) != digest:
            expected = f"{printable(name)} in {folder} with the sha256 of its manifest"
            fail("path", expected, "a changed or missing file", "make the organism again")
    loadable = {name for name, path in files.items() if path.suffix.lower() not in DOCUMENTS}
    if added := sorted(loadable - {*digests, MANIFEST, _OF_GIT}):
        fail(
            "path",
            f"only files of the manifest in {folder}",
            f"{printable(', '.join(added))} too, which would be read",
            "remove it, or make the organism again: a manifest lists every file except documents, "
            "in subfolders too",
        )
    return manifest


def _files_of(folder: Path) -> list[Path]:
    """Returns every file below a folder; raises where a link leaves the folder."""
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    for path in files:
        check_inside(folder, path)
    return files

"""Organisms on disk: ordinary Hugging Face folders with a manifest, and any checkpoint or adapter.

A checkpoint cannot run code: weights are read from safetensors, remote code is off, and the digests
of a manifest are compared before anything is used.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..audits.probes import PROBES, Probes
from ..audits.subject import Subject, special_ends
from ..backend import versions
from ..checkpoint_gate import DOCUMENTS, load_tokenizer
from ..files import sha256_of, sync, write_json
from ..quant.tensor_files import CheckpointError, check_inside, read_json
from ..resolve import is_adapter
from ..runtime.printable import printable
from ..stored_model import StoredModel

MANIFEST = "organism.json"


def save_organism(
    folder: str | Path,
    subject: Subject,
    manifest: dict[str, Any],
    probes: Probes | None = None,
) -> None:
    """Weights, tokenizer, probes.json and organism.json with the sha256 of every file.

    The folder is the old one or the new one, never half of it: the new is written beside it and
    synced, then the old steps aside, and comes back if the new cannot take its place.
    """
    folder = Path(folder)
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
    if not folder.exists():
        new_folder.rename(folder)
        return
    backup_folder = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
    old = backup_folder / folder.name
    try:
        folder.rename(old)
        new_folder.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        backup_folder.rmdir()
        raise
    shutil.rmtree(backup_folder)


def load_organism(
    path: str | Path,
    *,
    base: str | Path | None = None,
    name: str | None = None,
    device: torch.device | str | None = None,
) -> Subject:
    """A model to audit: an organism's folder, any checkpoint, or a LoRA adapter on its base.

    Args:
        path: a folder with config.json and safetensors, or the hub's name of one; or a folder with
            adapter_config.json and adapter_model.safetensors (AuditBench's organisms are such).
        base: the model under an adapter; None takes the one that the adapter names. Without an
            adapter it must be None.

    Raises:
        FileNotFoundError: nothing is there. ValueError: pickled weights, a file that differs from
        its digest in the manifest, an adapter that lacks weights, base without an adapter.
    """
    folder = Path(path).expanduser()
    manifest = read_manifest(folder)
    if not is_adapter(folder):
        if base is not None:
            raise ValueError(
                f"base: expected None for {folder.name}, which is a whole model and no adapter, "
                f"got {str(base)!r}"
            )
        return Subject(path, name=name or manifest.get("role"), device=device)
    return _with_adapter(folder, base, name, device)


def _with_adapter(folder: Path, base: Any, name: str | None, device: Any) -> Subject:
    stored = StoredModel.at(folder, adapter_base=base)
    target_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    merged = stored.load(target_device)
    tokenizer = load_tokenizer(stored.tokenizer_folder)
    ends = special_ends(merged, tokenizer)
    return Subject(merged.eval(), tokenizer, name=name or folder.name, ends=ends)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return organism.json, its digests compared with every file; {} where there is none."""
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
            raise ValueError(
                f"path: expected {printable(name)} in {folder} with the sha256 of its manifest, "
                "found it changed or missing. Make the organism again"
            )
    loadable = {name for name, path in files.items() if path.suffix.lower() not in DOCUMENTS}
    if added := sorted(loadable - {*digests, MANIFEST}):
        raise ValueError(
            f"path: expected the files of the manifest in {folder}, found "
            f"{printable(', '.join(added))} too, which would be read. Take it away, or make the "
            "organism again: a manifest lists every file but documents, also those in subfolders"
        )
    return manifest


def _files_of(folder: Path) -> list[Path]:
    """Return every file below a folder; a link out of it is refused."""
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    for path in files:
        check_inside(folder, path)
    return files

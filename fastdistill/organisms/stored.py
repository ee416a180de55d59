"""Organisms on disk: ordinary Hugging Face folders with a manifest, and any checkpoint or adapter.

A checkpoint cannot run code: weights are read from safetensors, remote code is off, and the digests
of a manifest are compared before anything is used.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from ..audits.probes import PROBES, Probes
from ..audits.subject import Subject
from ..backend import versions
from ..files import sha256_of, sync, write_json
from ..stored_model import StoredModel

MANIFEST = "organism.json"
ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_READ = (".safetensors", ".json", ".jinja")  # by those who load a model


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
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        subject.model.save_pretrained(made, safe_serialization=True)
        subject.tokenizer.save_pretrained(made)
        if probes is not None:
            probes.save(made / PROBES)
        digests = {path.name: sha256_of(path) for path in sorted(made.iterdir())}
        write_json(made / MANIFEST, manifest | {"versions": versions(), "sha256": digests})
        for path in made.iterdir():
            sync(path)
        made.chmod(0o755)
        _replace(folder, made)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    sync(folder.parent)


def _replace(folder: Path, made: Path) -> None:
    if not folder.exists():
        made.rename(folder)
        return
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
    old = aside / folder.name
    try:
        folder.rename(old)
        made.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        aside.rmdir()
        raise
    shutil.rmtree(aside)


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
    if not (folder / ADAPTER).is_file():
        if base is not None:
            raise ValueError(
                f"base: expected None for {folder.name}, which is a whole model and no adapter, "
                f"got {str(base)!r}"
            )
        return Subject(path, name=name or manifest.get("role"), device=device)
    return _with_adapter(folder, base, name, device)


def _with_adapter(folder: Path, base: Any, name: str | None, device: Any) -> Subject:
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError:
        raise ImportError(
            "path: expected peft for an adapter, which is not installed. "
            "pip install 'fastdistill[peft]'"
        ) from None
    if not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"path: expected {WEIGHTS} in {folder.name}, found none. A pickle can "
            "run code: save the adapter again from where you trust it"
        )
    said = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    under = base or said.get("base_model_name_or_path")
    if not under:
        raise ValueError(
            f"base: expected the model under the adapter {folder.name}, which names none. "
            "Pass base=, a path"
        )
    try:
        stored = StoredModel.at(under)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"base: expected the model under the adapter {folder.name}, got {str(under)!r}, where "
            f"none was found. Pass base=, a path ({error})"
        ) from None
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    adapted = PeftModel.from_pretrained(stored.load(place), str(folder))
    with safe_open(folder / WEIGHTS, "pt") as file:
        # Without a look at the base's embeddings, for which peft would ask the hub.
        asked = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        missing = sorted(set(asked) - set(file.keys()))
    if missing:  # peft leaves the base as it is there, and warns
        raise ValueError(
            f"path: expected all weights of the adapter in {folder.name}, found {len(missing)} "
            f"missing (first: {missing[0]}). Is it one of another base?"
        )
    merged = adapted.merge_and_unload()
    beside = folder if (folder / "tokenizer_config.json").is_file() else stored.path
    tokenizer = AutoTokenizer.from_pretrained(beside, trust_remote_code=False)
    return Subject(merged.eval(), tokenizer, name=name or folder.name)


def read_manifest(folder: Path) -> dict[str, Any]:
    """organism.json, its digests compared; {} where there is none."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        digests = dict(manifest["sha256"])
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"path: expected a manifest in {path}, got {error!r}") from None
    for name, digest in digests.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != digest:
            raise ValueError(
                f"path: expected {name} in {folder} with the sha256 of its manifest, found it "
                "changed or missing. Make the organism again"
            )
    read = {path.name for suffix in _READ for path in folder.glob(f"*{suffix}")}
    if added := sorted(read - {*digests, MANIFEST}):
        raise ValueError(
            f"path: expected the files of the manifest in {folder}, found {', '.join(added)} too, "
            "which would be read. Take it away, or make the organism again"
        )
    return manifest

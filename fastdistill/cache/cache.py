"""TeacherCache: the answers of a teacher that need not be there any more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import checks
from ..examples import Encoder
from ..fingerprint import tokenizer_fingerprint
from ..outputs import TopK
from ..positions import check_row_lengths
from ..teacher import load_teacher
from . import verification
from .build import build
from .from_teacher import FromTeacher
from .manifest import CacheError, Manifest, read_manifest
from .prepare import check_teacher_supports, settings_for, tokenizer_for, vocabulary_of
from .reader import Reader


class Verified(NamedTuple):
    """What `verify` found whole."""

    shards: int
    tokens: int
    bytes: int


class TeacherCache:
    """A TopKTeacher whose answers lie in a folder, found by the tokens of a row.

    Opening it compares the shards with the manifest: their sizes, and their sha256 where a file
    has changed since it was last compared. The trainer reads it in the DataLoader's workers.

    Args:
        path: the folder.
        tokenizer: the student's; refused where it gives ids another meaning than the tokenizer that
            the cache was built with.
        check: False compares sizes only.

    Raises:
        FileNotFoundError: no cache there. CacheError: unfinished, damaged, or a shard missing, by
        name; another tokenizer.
    """

    def __init__(self, path: str | Path, *, tokenizer: Any = None, check: bool = True) -> None:
        self.path = Path(path)
        self.manifest: Manifest = read_manifest(self.path)
        self.valid_vocab: int | None = None
        self._reader = Reader(self.path, self.manifest)
        verification.compare(self.path, self.manifest, everything=False, hashes=check)
        if tokenizer is not None:
            self.check_tokenizer(tokenizer)

    @classmethod
    def build(
        cls,
        teacher: Any,
        dataset: Any,
        path: str | Path,
        *,
        k: int,
        temperatures: Sequence[float] = (1.0,),
        targets: str = "topk",
        positions: str = "all",
        tokenizer: Any = None,
        max_length: int | None = None,
        completion_only_loss: bool = True,
        seed: int = 0,
        shard_mb: float = 256,
        rank: int = 0,
        world: int = 1,
    ) -> TeacherCache:
        """Ask a teacher about every example, and keep what it says.

        Started again after whatever stopped it, with the same arguments, it goes on behind the last
        finished shard, and the bytes are those of an undisturbed build.

        Args:
            teacher: anything with topk(input_ids, attention_mask, *, k, temperature), a model, or
                the path of one.
            dataset: what the trainer will be given: a list or Dataset of dicts with input_ids,
                messages, prompt and completion, or text.
            path: a new or empty folder, or one in which this build was begun.
            k: 1 ≤ k ≤ V, slots per position.
            temperatures: those that may be asked for later. A slot is stored once; each has an
                exact log_tail of its own (4 bytes a token).
            targets: "topk", the k likeliest tokens; or "sampled", k draws from the whole
                distribution (arXiv 2503.16870), for forward_kl at one temperature, from a teacher
                with hidden(...) and head.
            positions: "all" answers after every token. "targets" only where the next token is a
                target, which leaves out prompts.
            tokenizer: of teacher and student; reads text. None is the teacher's.
            max_length, completion_only_loss: as in DistillConfig, since rows have to be the same.
            seed: of sampled targets.
            shard_mb: about the size of a file, in units of 1e6 bytes.
            rank, world: this process of how many. Each makes its share of the shards, and returns
                when all are there.

        Returns:
            The cache, whole.

        Raises:
            ValueError or TypeError naming the argument. CacheError: the folder holds another build,
            another process is at work in it, or the teacher's answers are none. OSError: no space
            or no permission; what is finished stays.
        """
        if isinstance(teacher, (nn.Module, str, Path)):
            teacher = load_teacher(teacher, tokenizer=tokenizer)
        check_teacher_supports(teacher, targets)
        encoder = Encoder(
            tokenizer=tokenizer_for(teacher, tokenizer),
            completion_only=completion_only_loss,
            max_length=max_length,
        )
        settings, bytes_per_row = settings_for(
            teacher, dataset, encoder, vocab=vocabulary_of(teacher), k=k,
            temperatures=temperatures, targets=targets, positions=positions, seed=seed,
            shard_mb=shard_mb,
        )  # fmt: skip
        if not (isinstance(rank, int) and isinstance(world, int) and 0 <= rank < world):
            checks.fail("rank, world", "0 ≤ rank < world", f"{rank!r}, {world!r}")
        limit = getattr(teacher, "row_limit", None)
        check_row_lengths("dataset", dataset, encoder, [limit])
        manifest = build(
            Path(path),
            settings,
            FromTeacher(teacher),
            dataset,
            encoder,
            bytes_per_row=bytes_per_row,
            rank=rank,
            world=world,
        )
        verification.remember(Path(path), manifest)
        return cls(path)

    @classmethod
    def from_parquet(
        cls,
        parquet: str | Path,
        path: str | Path,
        *,
        tokenizer: Any = None,
        vocab_size: int | None = None,
        temperature: float = 1.0,
        shard_mb: float = 256,
    ) -> TeacherCache:
        """Read what DistillKit sampled into a cache; interrupted, it goes on where it stopped.

        The rows are those of the files, `input_ids` as it stands there: train on the same column.

        Args:
            parquet: a file, or a folder of files, with input_ids and either token_ids and
                top_values, or bytepacked_indices and compressed_logprobs with
                compression_config.yaml beside them. Needs pyarrow.
            path: a new or empty folder, or one in which this was begun.
            tokenizer: the one that made the ids, for the check that the trainer makes.
            vocab_size: how many ids the teacher has; None is the d of the compression, or up to
                262,144.
            temperature: at which the logprobs were taken.
            shard_mb: as in `build`.

        Raises:
            CacheError: other columns, answers that are none. ImportError: no pyarrow.
        """
        from .parquet import ParquetRows, files_of

        rows = ParquetRows(files_of(parquet))
        encoder = Encoder(tokenizer=tokenizer)
        settings, bytes_per_row = settings_for(
            rows, rows, encoder, vocab=vocab_size or rows.vocab_size, k=rows.k,
            temperatures=(temperature,), targets="topk", positions="all", seed=0,
            shard_mb=shard_mb,
        )  # fmt: skip
        build(Path(path), settings, rows, rows, encoder, bytes_per_row=bytes_per_row)
        return cls(path)

    @property
    def vocab_size(self) -> int | None:
        """Ids that the teacher could name; None where that was not known."""
        return self.manifest.settings.vocab_size

    @property
    def of_a_model(self) -> bool:
        """Whether a Teacher in the building process answered, whose positions are right."""
        return self.manifest.settings.teacher["kind"] == "fastdistill.teacher.Teacher"

    @property
    def sampled(self) -> bool:
        """Whether the answers are draws, which only the forward KL may learn from."""
        return self.manifest.settings.draws is not None

    def topk(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        *,
        k: int,
        temperature: float = 1.0,
    ) -> TopK:  # [B, T, K]
        """What the teacher said of these rows. Tokens with attention_mask 0 are no part of a row.

        Args:
            input_ids: int32/int64 [B, T]. attention_mask: bool or 0/1 [B, T], None for all ones.
            k: at most the number stored; with fewer, the others' mass goes to the tail.
            temperature: one of those stored.

        Returns:
            TopK on input_ids' device, in no order of likelihood: ids int32, logprobs fp32, log_tail
            fp32. Positions without an answer have an empty payload.

        Raises:
            CacheError: a row, k or temperature that the cache does not have.
        """
        checks.tensor("input_ids", input_ids, checks.INTS)
        if input_ids.dim() != 2:
            checks.fail("input_ids", "shape [B, T]", list(input_ids.shape),
                        "add a dimension with input_ids[None]")  # fmt: skip
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            checks.fail("attention_mask", f"shape {list(input_ids.shape)} as input_ids",
                        list(attention_mask.shape))  # fmt: skip
        at = self.check(k=k, temperature=temperature)
        mask = None if attention_mask is None else attention_mask.cpu() != 0
        answers = self._reader.read(input_ids.cpu().long(), mask, k, at, self.valid_vocab)
        return answers.to(input_ids.device)

    def check(self, *, k: int, temperature: float) -> int:
        """Which of its temperatures this is; raises CacheError unless it has such answers."""
        settings = self.manifest.settings
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= settings.k:
            raise CacheError(
                f"k: expected an integer in 1..{settings.k}, what {self.path} has, got {k!r}"
            )
        if self.sampled and k != settings.k:
            raise CacheError(
                f"k: expected {settings.k}, the draws that {self.path} has at each position, got "
                f"{k}: some of them are no sample"
            )
        stored = settings.temperatures
        checks.positive("temperature", temperature)
        for at, T in enumerate(stored):
            if math.isclose(T, temperature, rel_tol=1e-6):
                return at
        raise CacheError(
            f"temperature: expected one that {self.path} was built for "
            f"({', '.join(f'{T:g}' for T in stored)}), got {temperature:g}. The mass outside the "
            f"top k at another one is not known: build with temperatures=({stored[0]:g}, "
            f"{temperature:g})"
        )

    def __contains__(self, input_ids: object) -> bool:
        """Return whether a row is among those that it was built from.

        Args:
            input_ids: int tensor [T], or a list of token ids; anything else is no row.

        >>> [1, 5, 9] in cache
        """
        try:
            tokens = torch.as_tensor(input_ids)
        except (TypeError, ValueError, RuntimeError):
            return False
        whole = tokens.dim() == 1 and not (tokens.is_floating_point() or tokens.is_complex())
        return whole and self._reader.has(tokens.cpu().long())

    def has(self, input_ids: Tensor) -> bool:
        """Return whether a row [T] is among those that it was built from: `input_ids in cache`."""
        return input_ids in self

    def answered(self, input_ids: Tensor) -> Tensor:
        """Which positions of a row (T,) have an answer, bool (T,); none of a row that it does not
        have."""
        return self._reader.answered(input_ids.cpu().long())

    def verify(self) -> Verified:
        """Read every shard: compare its sha256, and check that every answer in it is a language
        model's. Raises CacheError naming the shards that differ, or the field that is wrong."""
        verification.compare(self.path, self.manifest, everything=True)
        for index in range(len(self.manifest.shards)):
            self._reader.check(index)
        return Verified(len(self.manifest.shards), self.manifest.tokens, self.manifest.bytes)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise CacheError unless ids mean the same by `tokenizer` as when the cache was built."""
        built_with = self.manifest.settings.tokenizer_sha256
        if built_with is not None and tokenizer_fingerprint(tokenizer) != built_with:
            raise CacheError(
                f"tokenizer: expected the one that {self.path} was built with, got one in which "
                "tokens have other ids. Top-k distillation compares probabilities id by id: use "
                "that tokenizer, or build the cache with a teacher of this one"
            )

"""TeacherCache: a teacher's answers on disk, so that training needs no teacher in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...hf.encoder import Encoder
from ...hf.positions import check_row_lengths
from ...hf.tokenizers import tokenizer_fingerprint
from ...losses.types import TopK
from ...runtime import checks, tensor_checks
from ...runtime.optional import needs
from ..protocols import HiddenStates
from . import verification
from .build import Examples, build
from .manifest import HIDDEN, CacheError, Manifest, read_manifest
from .reader import Reader
from .settings import (
    BuildOptions,
    check_teacher_supports,
    settings_for,
    tokenizer_for,
    vocabulary_of,
)
from .teacher_source import FromTeacher


class Verified(NamedTuple):
    """What `verify` checked."""

    shards: int
    tokens: int
    bytes: int


class TeacherCache:
    """A TopKTeacher that reads its answers from a folder, looked up by the tokens of a row.

    A cache that was built with answers="hidden" has `hidden` and `hidden_states` instead of `topk`.

    Opening it checks the shards against the manifest: their sizes, and the sha256 of files that
    changed since the last check. The trainer reads it in DataLoader workers.

    Args:
        path: the folder.
        tokenizer: the student's. It must map tokens to the same ids as the one the cache was built
            with.
        check: False checks sizes only.

    Raises:
        FileNotFoundError: there is no cache.
        CacheError: it is unfinished or damaged, a named shard is missing, or the tokenizer differs.
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
    def build(  # noqa: PLR0913 (the options of a build, each a keyword)
        cls,
        teacher: Any,
        dataset: Any,
        path: str | Path,
        *,
        k: int | None = None,
        temperatures: Sequence[float] = (1.0,),
        answers: str = "topk",
        layers: Sequence[int] = (),
        targets: str = "topk",
        positions: str = "all",
        tokenizer: Any = None,
        max_length: int | None = None,
        completion_only_loss: bool = True,
        chat_template: str | Path | None = None,
        seed: int = 0,
        shard_mb: float = 256,
        rank: int = 0,
        world: int = 1,
    ) -> TeacherCache:
        """Run a teacher on every example and store its answers.

        Call it again with the same arguments to resume after the last finished shard. The bytes
        equal those of an uninterrupted build.

        Args:
            teacher: anything with topk(input_ids, attention_mask, *, k, temperature), or a model, a
                path or a URL as in `load_teacher`.
            dataset: the trainer's dataset: a list or Dataset of dicts with input_ids, messages,
                prompt and completion, or text.
            path: a new or empty folder, or the folder of the build to resume.
            k: 1 ≤ k ≤ V, slots per position; None with answers="hidden".
            temperatures: those available later. A slot is stored once; each temperature adds an
                exact log_tail and shift (8 bytes per token).
            answers: "topk", distributions over k tokens; or "hidden", the hidden states that enter
                the head, in the teacher's type, for the training of draft models. `hidden` reads
                them.
            layers: with answers="hidden", decoder layers (from 1) whose outputs are stored too, as
                EAGLE-3 drafts read them; the teacher is then a Teacher. `hidden_states` reads them.
            targets: "topk", the k likeliest tokens; or "sampled", k draws from the whole
                distribution (arXiv 2503.16870), for forward_kl at one temperature, from a teacher
                with hidden(...) and head.
            positions: "all" answers after every token; "targets" only where the next token is a
                target, which leaves out prompts.
            tokenizer: of teacher and student; reads text. None is the teacher's.
            max_length, completion_only_loss, chat_template: as in DistillConfig, since rows must be
                equal.
            seed: of sampled targets.
            shard_mb: approximate size of a file, in units of 1e6 bytes.
            rank, world: this process and the number of processes. Each builds its share of the
                shards and returns when all shards exist.

        Returns:
            The finished cache.

        Raises:
            ValueError or TypeError naming the argument. CacheError: the folder holds another build,
            another process builds in it, or the teacher's answers are no distributions. OSError: no
            space or no permission; finished shards stay.
        """
        options = BuildOptions(
            k=k,
            temperatures=temperatures,
            answers=answers,
            layers=layers,
            targets=targets,
            positions=positions,
            seed=seed,
            shard_mb=shard_mb,
        )
        if isinstance(teacher, (nn.Module, str, Path)):
            with needs("TeacherCache.build", "train"):
                from ..local import load_teacher

            teacher = load_teacher(teacher)
        check_teacher_supports(teacher, options)
        encoder = Encoder(
            tokenizer=tokenizer_for(teacher, tokenizer),
            completion_only=completion_only_loss,
            max_length=max_length,
            chat_template=chat_template,
        )
        examples = Examples(dataset, encoder)
        settings, bytes_per_row = settings_for(teacher, examples, options, vocabulary_of(teacher))
        if not (isinstance(rank, int) and isinstance(world, int) and 0 <= rank < world):
            checks.fail("rank, world", "0 ≤ rank < world", f"{rank!r}, {world!r}")
        check_row_lengths("dataset", dataset, encoder, [getattr(teacher, "row_limit", None)])
        manifest = build(
            Path(path),
            settings,
            FromTeacher(teacher),
            examples,
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
        """Convert logits that DistillKit sampled to a cache; call again to resume.

        The rows are the `input_ids` of the files: train on the same column.

        Args:
            parquet: a file, or a folder of files, with input_ids and either token_ids and
                top_values, or bytepacked_indices and compressed_logprobs with
                compression_config.yaml in the same folder. Needs pyarrow.
            path: a new or empty folder, or the folder of the conversion to resume.
            tokenizer: the one that made the ids; the trainer compares it with the student's.
            vocab_size: number of ids of the teacher; None is the d of the compression, or up to
                262,144.
            temperature: the temperature of the logprobs.
            shard_mb: as in `build`.

        Raises:
            CacheError: other columns, or answers that are no distributions. ImportError: no
            pyarrow.
        """
        with needs("TeacherCache.from_parquet", "parquet"):
            from .distillkit_parquet import ParquetRows, files_of

        rows = ParquetRows(files_of(parquet))
        examples = Examples(rows, Encoder(tokenizer=tokenizer))
        options = BuildOptions(k=rows.k, temperatures=(temperature,), shard_mb=shard_mb)
        vocab = vocab_size or rows.vocab_size
        settings, bytes_per_row = settings_for(rows, examples, options, vocab)
        build(Path(path), settings, rows, examples, bytes_per_row=bytes_per_row)
        return cls(path)

    @property
    def vocab_size(self) -> int | None:
        """The number of ids of the teacher; None if it was not known."""
        return self.manifest.settings.vocab_size

    @property
    def answers(self) -> str:
        """Return "topk" if distributions are stored, or "hidden" for hidden states."""
        return "topk" if self.manifest.settings.hidden is None else HIDDEN

    @property
    def layers(self) -> tuple[int, ...]:
        """The decoder layers, from 1, whose outputs are stored."""
        hidden = self.manifest.settings.hidden
        return () if hidden is None else hidden.layers

    @property
    def of_a_model(self) -> bool:
        """Whether a Teacher answered, which counts positions from the first attended token."""
        return bool(self.manifest.settings.teacher["kind"] == "fastdistill.teachers.local.Teacher")

    @property
    def maps_tokens(self) -> bool:
        """Whether a MappedTeacher answered, which leaves out positions of one tokenizer alone."""
        return bool(
            self.manifest.settings.teacher["kind"] == "fastdistill.teachers.mapped.MappedTeacher"
        )

    @property
    def sampled(self) -> bool:
        """Whether the answers are samples, which only the forward KL supports."""
        return self.manifest.settings.draws is not None

    def topk(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
        *,
        k: int,
        temperature: float = 1.0,
    ) -> TopK:  # [B, T, K]
        """Return the stored answers of these rows; tokens with attention_mask 0 are ignored.

        Args:
            input_ids: int32/int64 [B, T]. attention_mask: bool or 0/1 [B, T], None for all ones.
            k: at most the stored number; with fewer, the other slots' mass goes to the tail.
            temperature: a stored one.

        Returns:
            TopK on input_ids' device, not sorted by likelihood: ids int32, logprobs fp32, log_tail
            fp32. Positions without an answer have an empty payload.

        Raises:
            CacheError: the cache does not have this row, k or temperature.
        """
        tensor_checks.batch(input_ids, attention_mask)
        at = self.check(k=k, temperature=temperature)
        mask = None if attention_mask is None else attention_mask.cpu() != 0
        answers = self._reader.read(input_ids.cpu().long(), mask, k, at, self.valid_vocab)
        return answers.to(input_ids.device)

    def hidden(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
    ) -> Tensor:  # (B, T, H)
        """Return the stored hidden states at the head's input; see `hidden_states`."""
        return self.hidden_states(input_ids, attention_mask).last

    def hidden_states(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor | None = None,  # (B, T)
    ) -> HiddenStates:
        """Return the stored hidden states of these rows; tokens with attention_mask 0 are ignored.

        Args:
            input_ids: int32/int64 [B, T]. attention_mask: bool or 0/1 [B, T], None for all ones.

        Returns:
            HiddenStates on input_ids' device, with the bits that the teacher answered: last
            [B, T, H], and layers [B, T, L, H] of the layers that the cache was built with. Both are
            zero at positions without an answer.

        Raises:
            CacheError: the cache does not have this row, or has no hidden states.
        """
        tensor_checks.batch(input_ids, attention_mask)
        self.check_answers("hidden")
        mask = None if attention_mask is None else attention_mask.cpu() != 0
        states = self._reader.read_hidden(input_ids.cpu().long(), mask).to(input_ids.device)
        return HiddenStates(states[:, :, -1], states[:, :, :-1])

    def check_answers(self, answers: str) -> None:
        """Raise CacheError unless the cache was built with these `answers`."""
        if self.answers != answers:
            raise CacheError(
                f"answers: expected a cache with answers={answers!r}, got {self.path} with "
                f"{self.answers!r}. Build another with answers={answers!r}"
            )

    def check(self, *, k: int, temperature: float) -> int:
        """Return the index of a stored temperature; raise CacheError if k or T is not stored."""
        self.check_answers("topk")
        settings = self.manifest.settings
        if type(k) is not int or not 1 <= k <= settings.k:
            raise CacheError(
                f"k: expected an integer in 1..{settings.k}, the k of {self.path}, got {k!r}"
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
            f"({', '.join(f'{T:g}' for T in stored)}), got {temperature:g}. The tail mass at "
            f"other temperatures is unknown: build with temperatures=({stored[0]:g}, "
            f"{temperature:g})"
        )

    def __contains__(self, input_ids: object) -> bool:
        """Return whether the cache has this row.

        Args:
            input_ids: int tensor [T], or a list of token ids; False for anything else.

        >>> [1, 5, 9] in cache
        """
        try:
            tokens = torch.as_tensor(input_ids)
        except (TypeError, ValueError, RuntimeError):
            return False
        if tokens.dim() != 1 or tokens.is_floating_point() or tokens.is_complex():
            return False
        return self._reader.has(tokens.cpu().long())

    def has(self, input_ids: Tensor) -> bool:
        """Return whether the cache has this row [T]: `input_ids in cache`."""
        return input_ids in self

    def answered(self, input_ids: Tensor) -> Tensor:
        """Return which positions of a row (T,) have an answer, bool (T,); all False if unknown."""
        return self._reader.answered(input_ids.cpu().long())

    def verify(self) -> Verified:
        """Read every shard, compare its sha256, and check every answer.

        Distributions must sum to 1, and hidden states must be finite.

        Raises CacheError that names the differing shards or the invalid field."""
        verification.compare(self.path, self.manifest, everything=True)
        for index in range(len(self.manifest.shards)):
            self._reader.check(index)
        return Verified(len(self.manifest.shards), self.manifest.tokens, self.manifest.bytes)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise CacheError if `tokenizer` maps tokens to other ids than the cache's tokenizer."""
        built_with = self.manifest.settings.tokenizer_sha256
        if built_with is not None and tokenizer_fingerprint(tokenizer) != built_with:
            raise CacheError(
                f"tokenizer: expected the one that {self.path} was built with, got one in which "
                "tokens have other ids. Top-k distillation compares probabilities id by id: use "
                "that tokenizer, or build the cache with a teacher of this one"
            )

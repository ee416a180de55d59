"""A Subject as a model of Inspect: an in-memory provider on its public ModelAPI.

    model = model_of(Subject("checkpoint"))
    inspect_ai.eval(task, model=model)

Samples that ask at the same time are answered in one batch: who asks first while no batch runs
waits for the others, then answers for all. Greedy unless a temperature is set.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import anyio

from .inspect_answers import InspectRequest, outputs
from .inspect_messages import EncodedInput, encode
from .inspect_package import inspect_ai
from .subject import Subject

AT_ONCE = 64  # requests in a batch
PATIENCE = 0.01  # seconds without another request until a batch begins
TICK = 0.002
MAX_TOKENS = 256  # where neither task nor user says how many
# What a user may set and we would not do.
_UNSUPPORTED = (
    "top_p top_k stop_seqs best_of frequency_penalty presence_penalty logit_bias response_schema"
).split()


class Provider(inspect_ai.model.ModelAPI):
    """See `model_of`."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: Any = inspect_ai.model.GenerateConfig(),  # noqa: B008  as in the base class
        subject: Subject | None = None,
        at_once: int = AT_ONCE,
        patience: float = PATIENCE,
    ) -> None:
        if not isinstance(subject, Subject):
            raise TypeError(
                f"subject: expected a Subject, got {type(subject).__name__}. Models of fastdistill "
                "are handed over in the process that runs them: eval(task, model=model_of(subject))"
            )
        if at_once < 1:
            raise ValueError(f"at_once: expected 1 or more, got {at_once}")
        super().__init__(model_name, base_url, api_key, [], config)
        self.subject, self.at_once, self.patience = subject, at_once, patience
        self._waiting: list[InspectRequest] = []
        self._is_running = False
        self._repeats: Counter[bytes] = Counter()

    def max_connections(self) -> int:
        return self.at_once

    def max_tokens(self) -> int:
        return MAX_TOKENS

    def connection_key(self) -> str:
        return f"{self.model_name} {id(self.subject)}"

    async def tokenize(self, text: str) -> list[int]:
        return self.subject.tokenizer(text, add_special_tokens=False).input_ids

    async def count_text_tokens(self, text: str) -> int:
        return len(await self.tokenize(text))

    async def generate(
        self, input: list[Any], tools: list[Any], tool_choice: Any, config: Any
    ) -> Any:
        if tools:
            raise ValueError(f"tools: expected none, got {len(tools)}. Chat templates go without")
        unsupported = [name for name in _UNSUPPORTED if getattr(config, name) is not None]
        if unsupported or (config.num_choices or 1) > 1:
            raise ValueError(
                f"config: expected max_tokens, temperature, seed and log-probabilities alone, got "
                f"{', '.join(unsupported or ['num_choices'])}"
            )
        encoded = encode(input, self.subject)
        request = InspectRequest(encoded, config, self._stream(encoded, config), anyio.Event())
        self._waiting.append(request)
        try:
            while request.outcome is None:
                if self._is_running:
                    await request.wake.wait()
                    request.wake = anyio.Event()
                else:
                    await self._run_batch(min(self.at_once, config.max_connections or self.at_once))
        finally:
            if request in self._waiting:  # cancelled
                self._waiting.remove(request)
                self._wake_next()
        if isinstance(request.outcome, Exception):
            raise request.outcome
        return request.outcome

    async def _lead(self, batch_size: int) -> None:
        """Answer a batch: as many as are there once `full` are, or nobody came for a while."""
        self._is_running = True
        batch: list[InspectRequest] = []
        try:
            idle_time, n_waiting = 0.0, len(self._waiting)
            while len(self._waiting) < batch_size and idle_time < self.patience:
                await anyio.sleep(TICK)
                idle_time = idle_time + TICK if len(self._waiting) == n_waiting else 0.0
                n_waiting = len(self._waiting)
            batch, self._waiting = self._waiting[:batch_size], self._waiting[batch_size:]
            await anyio.to_thread.run_sync(self._answer, batch)
        finally:
            self._is_running = False
            # Cancelled before it began: somebody else will answer these.
            self._waiting[:0] = [request for request in batch if request.outcome is None]
            for request in batch:
                request.wake.set()
            self._wake_next()

    def _wake_next(self) -> None:
        if self._waiting and not self._is_running:
            self._waiting[0].wake.set()

    def _stream(self, encoded: EncodedInput, config: Any) -> int:
        """Which random numbers a request draws from: its place in its audit; otherwise those of its
        words, where a seed is set, and without a seed others each time that they come again."""
        if encoded.at:
            return encoded.at[0]
        digest = hashlib.sha256(repr(encoded.ids).encode()).digest()
        if config.seed is None:
            self._repeats[digest] += 1
        repeat = self._repeats[digest] if config.seed is None else 0
        return int.from_bytes(digest[:8], "big") + repeat

    def _answer(self, batch: list[InspectRequest]) -> None:
        """Every outcome. Where a batch fails, each request alone: the others did nothing wrong."""
        batch = sorted(batch, key=lambda request: request.encoded.at)
        try:
            for request, output in zip(batch, outputs(self.subject, batch), strict=True):
                request.outcome = output
        except Exception as error:
            if len(batch) == 1:
                batch[0].outcome = error
            else:
                for request in batch:
                    self._answer([request])


_registered: Any = inspect_ai.model.modelapi(name="fastdistill")(Provider)


def model_of(
    subject: Subject, *, at_once: int = AT_ONCE, patience: float = PATIENCE, **config: Any
) -> Any:
    """A Subject as an inspect_ai.model.Model.

    Args:
        at_once: requests in one batch at the most, and connections unless Inspect is told others.
        patience: seconds without a further request until a batch that is not full begins.
        config: what GenerateConfig takes.

    Raises:
        TypeError: not a Subject.
    """
    settings = inspect_ai.model.GenerateConfig(**config)
    name = getattr(subject, "name", "")
    api = _registered(
        model_name=name, config=settings, subject=subject, at_once=at_once, patience=patience
    )
    return inspect_ai.model.Model(api, settings)

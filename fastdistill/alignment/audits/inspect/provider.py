"""A Subject as a model of Inspect: an in-memory provider on the public ModelAPI.

    model = model_of(Subject("checkpoint"))
    inspect_ai.eval(task, model=model)

Concurrent requests are answered in one batch: the first request while no batch runs waits for
others, then runs the batch. Decoding is greedy unless a temperature is set.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import anyio

from ....runtime.checks import fail, integer
from ..subject import Subject
from .answers import InspectRequest, outputs
from .messages import EncodedInput, encode
from .package import inspect_ai

AT_ONCE = 64  # requests in a batch
PATIENCE = 0.01  # seconds without another request until a batch starts
TICK = 0.002  # seconds between two looks at the queue
MAX_TOKENS = 256  # default, where neither task nor user sets a limit
# Options of GenerateConfig that this provider does not support.
_UNSUPPORTED = (
    "top_p top_k stop_seqs best_of frequency_penalty presence_penalty logit_bias response_schema "
    "logprobs top_logprobs"
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
                f"subject: expected a Subject, got {type(subject).__name__}. Pass a model of "
                "fastdistill in the same process: eval(task, model=model_of(subject))"
            )
        integer("at_once", at_once, 1)
        super().__init__(model_name, base_url, api_key, [], config)
        self.subject, self.at_once, self.patience = subject, at_once, patience
        self._waiting: list[InspectRequest] = []
        self._lock = anyio.Lock()
        self._repeats: Counter[bytes] = Counter()

    def max_connections(self) -> int:
        return self.at_once

    def max_tokens(self) -> int:
        return MAX_TOKENS

    def connection_key(self) -> str:
        return f"{self.model_name} {id(self.subject)}"

    async def tokenize(self, text: str) -> list[int]:
        ids: list[int] = self.subject.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    async def count_text_tokens(self, text: str) -> int:
        return len(await self.tokenize(text))

    async def generate(
        self, input: list[Any], tools: list[Any], tool_choice: Any, config: Any
    ) -> Any:
        if tools:
            fail("tools", "none", len(tools), "tools are not supported")
        values = ((name, getattr(config, name)) for name in _UNSUPPORTED)
        unsupported = [name for name, value in values if value is not None and value is not False]
        unsupported += [
            n for n in ("num_choices", "prompt_logprobs") if (getattr(config, n) or 1) > 1
        ]
        if unsupported:
            expected = "only max_tokens, temperature, seed and prompt_logprobs=1"
            fail("config", expected, ", ".join(unsupported))
        encoded = encode(input, self.subject)
        request = InspectRequest(encoded, config, self._stream(encoded, config))
        self._waiting.append(request)
        try:
            async with self._lock:  # whoever holds it runs the next batch for all that wait
                while request.outcome is None:
                    await self._run_batch(min(self.at_once, config.max_connections or self.at_once))
        finally:
            if request in self._waiting:  # cancelled
                self._waiting.remove(request)
        if isinstance(request.outcome, Exception):
            raise request.outcome
        return request.outcome

    async def _run_batch(self, batch_size: int) -> None:
        """Runs a batch once `batch_size` requests wait, or no request came for `patience`."""
        idle_time, n_waiting = 0.0, len(self._waiting)
        while len(self._waiting) < batch_size and idle_time < self.patience:
            await anyio.sleep(TICK)
            idle_time = idle_time + TICK if len(self._waiting) == n_waiting else 0.0
            n_waiting = len(self._waiting)
        await anyio.to_thread.run_sync(self._answer, self._waiting[:batch_size])
        self._waiting = [request for request in self._waiting if request.outcome is None]

    def _stream(self, encoded: EncodedInput, config: Any) -> int:
        """Returns the random stream of a request: its position in the audit, or a hash of its ids.

        Without a seed, a repeated request gets a new stream.
        """
        if encoded.at:
            return encoded.at[0]
        digest = hashlib.sha256(repr(encoded.ids).encode()).digest()
        if config.seed is None:
            self._repeats[digest] += 1
        repeat = self._repeats[digest] if config.seed is None else 0
        return int.from_bytes(digest[:8], "big") + repeat

    def _answer(self, batch: list[InspectRequest]) -> None:
        """Sets every outcome. Where a batch fails, runs each request alone to isolate the error."""
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
    """Returns a Subject as an inspect_ai.model.Model.

    Args:
        at_once: maximum requests in one batch, and the default of Inspect's max_connections.
        patience: seconds without a new request until a batch starts that is not full.
        config: options of GenerateConfig.

    Raises:
        TypeError: not a Subject.
    """
    settings = inspect_ai.model.GenerateConfig(**config)
    name = getattr(subject, "name", "")
    api = _registered(
        model_name=name, config=settings, subject=subject, at_once=at_once, patience=patience
    )
    return inspect_ai.model.Model(api, settings)

"""On-policy completions from an OpenAI-compatible server, such as vLLM, or from llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ...runtime import backend, checks
from ...runtime.json_text import JSONError, parse_json
from ...runtime.printable import printable
from .connection import Connection
from .model_list import Listing
from .response_checks import WrongAnswer


class OpenAISampler:
    """A sampler of DistillTrainer: completions from a server's /v1/completions, as token ids.

    Each prompt is a request of its own with its own seed. The server must return token ids
    (`return_token_ids` of vLLM): text would be tokenized anew, into other tokens than were sampled.
    Requests to llama.cpp go to /completion, which returns token ids. Every request overrides the
    top_k, min_p and penalties that a server takes from generation_config.json.

    The server samples from its own weights. `before` is called with the request before each step
    that samples; it brings the student's weights to the server, for example by saving the adapter
    of request.model and loading it there. Without it the samples come from the weights that the
    server started with.

    Args:
        url: http://host:port or https://host:port.
        model: its name on the server; None is the first one listed.
        token: None is the environment's FASTDISTILL_TOKEN, or none.
        before: see above.
        timeout, retries, concurrency: as in ServedTeacher.

    Raises:
        NoAnswer (a ConnectionError): the server does not answer. ValueError: it rejects a request,
        returns no token ids, or ends a completion at a limit of its own.

    Example:
        sampler = OpenAISampler("http://127.0.0.1:8000", before=load_adapter)
        DistillTrainer(student, teacher, DistillConfig("out", lmbda=1.0), sampler=sampler)
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        token: str | None = None,
        before: Callable[[Any], object] | None = None,
        timeout: float = 300.0,
        retries: int = 10,
        concurrency: int = 16,
    ) -> None:
        checks.integer("concurrency", concurrency, 1)
        if before is not None and not callable(before):
            raise TypeError(f"before: expected a function or None, got {type(before).__name__}")
        token = backend.served_token() if token is None else token
        self._http = Connection(url, token=token, timeout=timeout, retries=retries)
        self.url, self.before, self.concurrency = self._http.url, before, concurrency
        listing = Listing.read(self._http.ask("/v1/models").body, model, self.url)
        self.model, self.is_llamacpp = listing.name, listing.entry.get("owned_by") == "llamacpp"

    def __call__(self, request: Any) -> list[list[int]]:
        """Return the completion of each prompt of a SampleRequest."""
        if self.before is not None:
            self.before(request)
        with ThreadPoolExecutor(self.concurrency) as pool:
            rows = range(len(request.prompts))
            return list(pool.map(lambda row: self._complete(request, row), rows))

    def _complete(self, request: Any, row: int) -> list[int]:
        path, body = _llamacpp(request, row) if self.is_llamacpp else _openai(request, row)
        reply = self._http.ask(path, {"model": self.model, **body})
        try:
            answer = parse_json(reply.body, self.url, dict)
            if self.is_llamacpp:
                tokens, reason = answer["tokens"], answer["stop_type"]
            else:
                (choice,) = answer["choices"]
                tokens, reason = choice.get("token_ids"), choice["finish_reason"]
        except (JSONError, KeyError, TypeError, ValueError, AttributeError):
            got = printable(repr(reply.body[:80]))
            raise WrongAnswer(f"{self.url}: expected JSON with one choice, got {got}") from None
        if not isinstance(tokens, list):
            raise WrongAnswer(
                f"{self.url}: expected token_ids in the choice, got {type(tokens).__name__}. The "
                "server does not return token ids: use vLLM 0.10 or newer, or llama.cpp"
            )
        if reason in _AT_A_LIMIT and len(tokens) < request.max_new_tokens:
            raise WrongAnswer(
                f"{self.url}: expected {request.max_new_tokens} tokens or an end token, got "
                f"{len(tokens)}, where the server stopped at a limit of its own. Start it with a "
                "longer context, and vLLM without max_new_tokens in --override-generation-config"
            )
        return tokens


_AT_A_LIMIT = ("length", "limit")  # finish_reason, stop_type


def _openai(request: Any, row: int) -> tuple[str, dict[str, Any]]:
    """Return path and body of a request to vLLM."""
    return "/v1/completions", {
        "prompt": request.prompts[row],
        "max_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": request.seeds[row],
        "stop_token_ids": request.ends,
        "return_token_ids": True,
    }


def _llamacpp(request: Any, row: int) -> tuple[str, dict[str, Any]]:
    """Return path and body of a request to llama.cpp, which stops at the end tokens of its file."""
    return "/completion", {
        "prompt": request.prompts[row],
        "n_predict": request.max_new_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "samplers": ["temperature", "top_p"],  # in this order; no top_k, min_p or penalty
        "seed": request.seeds[row],
        "cache_prompt": False,  # with it, answers depend on earlier requests
        "return_tokens": True,
    }

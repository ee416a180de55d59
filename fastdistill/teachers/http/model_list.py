"""Parses a server's /v1/models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...hf.positions import RowLimit
from ...runtime import checks
from ...runtime.json_text import JSONError, parse_json
from ...runtime.printable import printable
from .response_checks import WrongAnswer
from .server_info import ServerInfo

_VLLM_READS = 2  # tokens of max_model_len besides a row: the appended one, the generated one


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A model of a server. `server_info`: of fastdistill serve; None for other servers."""

    url: str
    name: str
    entry: dict[str, Any]
    max_model_len: int | None
    server_info: ServerInfo | None

    @classmethod
    def read(cls, body: bytes, model: str | None, url: str) -> Listing:
        """Parse the list; raise WrongAnswer if it is invalid, ValueError if `model` is missing."""
        try:
            reply = parse_json(body, url, dict)
            models = {str(entry["id"]): dict(entry) for entry in reply["data"]}
        except (JSONError, KeyError, TypeError, ValueError):
            raise WrongAnswer(f"{url}: expected a list of models, got {body[:80]!r}") from None
        name = next(iter(models), "") if model is None else model
        if name not in models:
            names = printable(", ".join(models)) or "none"
            checks.fail("model", f"one that {url} serves ({names})", repr(name))
        length = models[name].get("max_model_len")
        if length is not None and (type(length) is not int or length <= 0):
            got = printable(length, 80)
            raise WrongAnswer(f"{url}: expected max_model_len above 0 of its model, got {got}")
        description = reply.get("fastdistill")
        server_info = None if description is None else ServerInfo.read(description, url)
        return cls(
            url=url, name=name, entry=models[name], max_model_len=length, server_info=server_info
        )

    def without_prompt_logprobs(self, reason: str) -> WrongAnswer:
        """Return the error for a server without prompt log-probabilities."""
        gguf = self.name.endswith(".gguf") or isinstance(self.entry.get("meta"), dict)
        owner = printable(self.entry.get("owned_by") or "nobody", 60)
        model = "MODEL.gguf, which reads the same file" if gguf else "MODEL"
        return WrongAnswer(
            f"{self.url}: {reason}. The server (its model is owned by {owner!r}) does not "
            "give log-probabilities of prompts: serve the model with vLLM, or with fastdistill "
            f"serve --teacher {model}"
        )

    @property
    def row_limit(self) -> RowLimit | None:
        """The longest row that the server answers; None if unknown."""
        if self.server_info is None:
            length = self.max_model_len
            return None if length is None else limit_of_vllm(self.url, length)
        tokens = self.server_info.max_tokens
        if self.max_model_len is None or tokens < self.max_model_len:
            return RowLimit(
                tokens=tokens,
                reader=f"the server at {self.url}",
                hint="; or start it with a larger max_tokens",
            )
        return RowLimit(tokens=self.max_model_len, reader=f"the model at {self.url}")


def limit_of_vllm(url: str, max_model_len: int) -> RowLimit:
    """Return the longest row for vLLM, which counts two more tokens per row."""
    return RowLimit(
        tokens=max(0, max_model_len - _VLLM_READS),
        reader=f"{url} (started with --max-model-len {max_model_len}, which counts {_VLLM_READS} "
        "tokens more than a row has)",
        hint="; or start it with a larger --max-model-len",
    )

"""A client of a running SGLang server: completions and log probabilities over HTTP."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_modelopt_ext.checkpoint.tensors import read_json_object
from sglang_modelopt_ext.errors import ModelOptExtError

FULL_VOCABULARY = {"return_flat_raw_top_logprobs": True, "return_flat_raw_top_logprobs_b64": True}
"""Options of a request that return log probabilities as encoded arrays: as lists a whole vocabulary is slow."""


@dataclass(frozen=True)
class Completion:
    """The server's continuation of one prompt.

    Attributes:
        text: the new text.
        tokens: its number of tokens.
    """

    text: str
    tokens: int


class ServerClient:
    """A client of one server.

    Args:
        url: such as ``http://127.0.0.1:30000``.
        model: the folder of the model it serves, whose configuration has the size of the vocabulary.
        timeout: seconds an answer may take.
    """

    def __init__(self, url: str, model: Path, timeout: float = 600.0) -> None:
        self.url = url.rstrip("/")
        self.model = model
        self.timeout = timeout

    def server_info(self) -> dict[str, Any]:
        """Return every argument the server resolved to, such as ``dtype`` and ``kv_cache_dtype``."""
        info: dict[str, Any] = self.request("/server_info", None)
        return info

    def generate(self, prompts: Sequence[str], max_new_tokens: int, *, ignore_eos: bool = False) -> list[Completion]:
        """Return greedy continuations of all prompts, sent as one batch."""
        sampling = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos}
        answers = self.request("/generate", {"text": list(prompts), "sampling_params": sampling})
        return [Completion(answer["text"], answer["meta_info"]["completion_tokens"]) for answer in answers]

    def input_logprobs(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the log probability of every token of ``ids`` but the first, given those before it: ``[len(ids) - 1]``."""
        scored = self.score(ids)["input_token_logprobs"][1:]
        if [entry[1] for entry in scored] != list(ids[1:]):
            raise ModelOptExtError.at(self.url, "input_token_logprobs", "one entry for every token sent", "others")
        return np.array([entry[0] for entry in scored], dtype=np.float32)

    def full_vocab_logprobs(self, ids: Sequence[int], last: int | None = None) -> NDArray[np.float32]:
        """Return log probabilities over the whole vocabulary: ``[last, V]``, row ``-1`` for the last token of ``ids``.

        Args:
            ids: the tokens; the first one is never scored.
            last: how many tokens at the end to score, by default all but the first. A row is 4 V bytes.
        """
        last = len(ids) - 1 if last is None else last
        vocabulary = vocabulary_size(self.model)
        info = self.score(ids, len(ids) - 1 - last, {**FULL_VOCABULARY, "top_logprobs_num": vocabulary})
        return self.vocabulary_rows(info, "input", (last, vocabulary))

    def window_logprobs(self, ids: Sequence[int], last: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return :meth:`input_logprobs` of all tokens, and :meth:`full_vocab_logprobs` of those at the end.

        Args:
            ids: the tokens; the first one is never scored.
            last: how many tokens at the end have their distribution over the whole vocabulary returned.
        """
        rows = self.full_vocab_logprobs(ids, last)
        targets = np.asarray(ids[1:])
        # Where all positions are asked for, each token's own log probability is among them.
        whole = last == len(targets)
        return rows[np.arange(last), targets] if whole else self.input_logprobs(ids), rows

    def vocabulary_rows(self, info: Mapping[str, Any], side: str, shape: tuple[int, int]) -> NDArray[np.float32]:
        """Decode log probabilities over the whole vocabulary, in the order of the tokens.

        Args:
            info: the ``meta_info`` of an answer to a request with the options ``FULL_VOCABULARY``.
            side: ``input`` for the tokens of the prompt, ``output`` for new tokens.
            shape: ``[tokens, V]``, the expected shape.
        """
        field = f"{side}_top_logprobs"
        got = tuple(info[f"{field}_shape"])
        if got != shape:
            raise ModelOptExtError.at(self.url, field, f"shape {list(shape)}", list(got))
        values = np.frombuffer(base64.b64decode(info[f"{field}_val_flat_b64"]), dtype=np.float32)
        tokens = np.frombuffer(base64.b64decode(info[f"{field}_idx_flat_b64"]), dtype=np.int32)
        # The server sorts each row by probability; every token is in every row once.
        rows = np.full(shape, np.nan, dtype=np.float32)
        np.put_along_axis(rows, tokens.reshape(shape).astype(np.int64), values.reshape(shape), axis=1)
        if np.isnan(rows).any():
            raise ModelOptExtError.at(self.url, field, "a number for every token", "NaN or a gap")
        return rows

    def flush_cache(self) -> None:
        """Remove the prefixes of earlier requests from the server's cache."""
        self.request("/flush_cache", {})

    def score(self, ids: Sequence[int], start: int = 0, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the ``meta_info`` of a request for the log probabilities of a prompt, with one new token.

        Args:
            ids: the tokens of the prompt.
            start: the position in ``ids`` of the first token to score.
            options: further fields of the request.
        """
        payload = {
            "input_ids": list(ids),
            "sampling_params": {"temperature": 0.0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": start,
            **(options or {}),
        }
        info: dict[str, Any] = self.request("/generate", payload)["meta_info"]
        return info

    def request(self, path: str, payload: dict[str, Any] | None) -> Any:
        """Send a request and return its JSON answer, or None where the answer is not JSON.

        Args:
            path: of the URL, such as ``/generate``.
            payload: JSON to POST; None sends a GET.

        Raises:
            ModelOptExtError: no answer, or a status other than 200.
        """
        try:
            with open_url(f"{self.url}{path}", payload, self.timeout) as response:
                text = response.read()
        except urllib.error.HTTPError as error:
            detail = error.read().decode("utf-8", errors="replace")[:300]
            raise ModelOptExtError.at(self.url, path, "HTTP 200", f"{error.code} {detail}") from error
        except (OSError, ValueError) as error:
            raise self._unreachable(error) from error
        return json.loads(text) if text.startswith((b"{", b"[")) else None

    def _unreachable(self, error: Exception) -> ModelOptExtError:
        """Return the error for a server that does not answer."""
        return ModelOptExtError.at(self.url, "server", "an answer", error)


def vocabulary_size(model: Path) -> int:
    """Return the number of logits of the model in a folder, from its configuration."""
    config = read_json_object(model / "config.json")
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    if not isinstance(size, int):
        raise ModelOptExtError.at(model / "config.json", "vocab_size", "a number", size)
    return size


def open_url(url: str, payload: dict[str, Any] | None, timeout: float) -> Any:
    """Open a URL without a proxy, because the server is on this machine: a POST of JSON, or a GET where it is None."""
    data = None if payload is None else json.dumps(payload).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout)

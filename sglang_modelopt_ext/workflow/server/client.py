"""What a running SGLang server is asked over HTTP."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sglang_modelopt_ext.checkpoint.tensors import read_json_object
from sglang_modelopt_ext.errors import ModelOptExtError


@dataclass(frozen=True)
class Completion:
    """What the server made of one prompt: the new text and how many tokens it has."""

    text: str
    tokens: int


class ServerClient:
    """A server that is running.

    Args:
        url: such as ``http://127.0.0.1:30000``.
        model: the folder of what it serves: its vocabulary is looked up there.
        timeout: seconds an answer may take.
    """

    def __init__(self, url: str, model: Path, timeout: float = 600.0) -> None:
        self.url = url.rstrip("/")
        self.model = model
        self.timeout = timeout

    def server_info(self) -> dict[str, Any]:
        """Every argument the server resolved to, such as ``dtype`` and ``kv_cache_dtype``."""
        info: dict[str, Any] = self._request("/server_info", None)
        return info

    def generate(self, prompts: Sequence[str], max_new_tokens: int, *, ignore_eos: bool = False) -> list[Completion]:
        """Greedy continuations of all prompts, sent as one batch."""
        sampling = {"temperature": 0.0, "max_new_tokens": max_new_tokens, "ignore_eos": ignore_eos}
        answers = self._request("/generate", {"text": list(prompts), "sampling_params": sampling})
        return [Completion(answer["text"], answer["meta_info"]["completion_tokens"]) for answer in answers]

    def input_logprobs(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Log probability of every token of ``ids`` but the first, given those before it: ``[len(ids) - 1]``."""
        scored = self._score(ids, 0, {})["input_token_logprobs"][1:]
        if [entry[1] for entry in scored] != list(ids[1:]):
            raise ModelOptExtError.at(self.url, "input_token_logprobs", "one entry for every token sent", "others")
        return np.array([entry[0] for entry in scored], dtype=np.float32)

    def full_vocab_logprobs(self, ids: Sequence[int], last: int | None = None) -> NDArray[np.float32]:
        """Log probabilities over the whole vocabulary: ``[last, V]``, row ``-1`` for the last token of ``ids``.

        Args:
            ids: the tokens; the first one is never scored.
            last: how many tokens at the end to score, by default all but the first. A row is 4 V bytes.
        """
        last = len(ids) - 1 if last is None else last
        vocabulary = vocabulary_size(self.model)
        options = {
            "top_logprobs_num": vocabulary,
            "return_flat_raw_top_logprobs": True,
            "return_flat_raw_top_logprobs_b64": True,
        }
        info = self._score(ids, len(ids) - 1 - last, options)
        shape = tuple(info["input_top_logprobs_shape"])
        if shape != (last, vocabulary):
            raise ModelOptExtError.at(self.url, "input_top_logprobs", f"shape {[last, vocabulary]}", list(shape))
        values = np.frombuffer(base64.b64decode(info["input_top_logprobs_val_flat_b64"]), dtype=np.float32)
        tokens = np.frombuffer(base64.b64decode(info["input_top_logprobs_idx_flat_b64"]), dtype=np.int32)
        # Sorted by probability as they come; every token is in every row once.
        rows = np.full(shape, np.nan, dtype=np.float32)
        np.put_along_axis(rows, tokens.reshape(shape).astype(np.int64), values.reshape(shape), axis=1)
        if np.isnan(rows).any():
            raise ModelOptExtError.at(self.url, "input_top_logprobs", "a number for every token", "NaN or a gap")
        return rows

    def flush_cache(self) -> None:
        """Forgets the prefixes of earlier requests."""
        self._request("/flush_cache", {})

    def _score(self, ids: Sequence[int], start: int, options: dict[str, Any]) -> dict[str, Any]:
        payload = {
            "input_ids": list(ids),
            "sampling_params": {"temperature": 0.0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": start,
            **options,
        }
        info: dict[str, Any] = self._request("/generate", payload)["meta_info"]
        return info

    def _request(self, path: str, payload: dict[str, Any] | None) -> Any:
        """The JSON answer to a POST of ``payload``, or to a GET where it is None; None where the answer is no JSON."""
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
        """The error for a server that does not answer."""
        return ModelOptExtError.at(self.url, "server", "an answer", error)


def vocabulary_size(model: Path) -> int:
    """The number of logits of the model in a folder, as its configuration has it."""
    config = read_json_object(model / "config.json")
    size = config.get("vocab_size", (config.get("text_config") or {}).get("vocab_size"))
    if not isinstance(size, int):
        raise ModelOptExtError.at(model / "config.json", "vocab_size", "a number", size)
    return size


def open_url(url: str, payload: dict[str, Any] | None, timeout: float) -> Any:
    """An HTTP request that never goes through a proxy: the server is on this machine."""
    data = None if payload is None else json.dumps(payload).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout)

"""Checks of a served checkpoint."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import requests
import torch

from tests.serving.tolerance import FP32_MEDIAN as FP32_MEDIAN
from tests.serving.tolerance import NOISE_FACTOR
from tests.support.models import random_ids
from tests.support.reference import Reference, difference
from tests.support.server import Server

PROMPT = random_ids(96, seed=11, vocab=511)  # SGLang reports the last token of a vocabulary as 0

SHORT_PROMPTS = tuple(random_ids(16, seed=40 + i, vocab=511) for i in range(8))


def check_logprobs(server: Server, folder: Path, dtype: str, **options: Any) -> None:
    """Check the server's log probabilities over the whole vocabulary, at the noise floor of ``dtype``.

    ``options`` are those of the reference.
    """
    reference = Reference(folder, **options)
    if dtype == "float32":
        served = torch.cat([server.full_logprobs(ids) for ids in SHORT_PROMPTS])
        expected = torch.cat([reference.logprobs(ids) for ids in SHORT_PROMPTS])
        assert bool(torch.isfinite(served).all())
        found = difference(served, expected)
        assert found.median < FP32_MEDIAN, str(found)
        return
    served, expected = server.full_logprobs(PROMPT), reference.logprobs(PROMPT)
    assert bool(torch.isfinite(served).all())
    found = difference(served, expected)
    noise = difference(Reference(folder, dtype=getattr(torch, dtype), **options).logprobs(PROMPT), expected)
    print(f"served: {found}; noise floor: {noise}")
    assert found.mean < NOISE_FACTOR * noise.mean, f"served: {found}; noise floor: {noise}"
    assert found.divergence < NOISE_FACTOR**2 * noise.divergence, f"served: {found}; noise floor: {noise}"


def send_weights(server: Server, *of_ranks: Mapping[str, torch.Tensor]) -> None:
    """Send tensors to the ranks of a running server, in a session of two calls.

    Raises:
        ModelOptExtError: the session did not end well; the server serves on.
    """
    from sglang.srt.utils import MultiprocessingSerializer

    torch.multiprocessing.set_sharing_strategy("file_system")  # the server is no child of this process
    server.request("/begin_weight_update", {})
    for half in (0, 1):
        sent = [
            MultiprocessingSerializer.serialize(list(tensors.items())[half::2], output_str=True) for tensors in of_ranks
        ]
        requests.post(f"{server.url}/update_weights_from_tensor", json={"serialized_named_tensors": sent}, timeout=120)
    server.request("/end_weight_update", {})


def median_apart(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the median over tokens of the absolute difference of their log probabilities."""
    return statistics.median(abs(a - b) for a, b in zip(first, second, strict=True))


def check_prefill_against_decode(server: Server) -> None:
    """Check that tokens have the same log probabilities while decoding and in a prompt (float32)."""
    sampling = {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True}
    decoded: list[float] = []
    scored: list[float] = []
    for ids in SHORT_PROMPTS[:4]:
        payload = {"input_ids": list(ids), "sampling_params": sampling, "return_logprob": True}
        answer = server.request("/generate", payload)["meta_info"]["output_token_logprobs"]
        decoded += [entry[0] for entry in answer]
        server.flush_cache()
        scored += server.input_logprobs([*ids, *(entry[1] for entry in answer)])[-len(answer) :].tolist()
    assert median_apart(decoded, scored) < FP32_MEDIAN


def check_batch_against_single(server: Server) -> None:
    """Check that a request's log probabilities do not depend on its neighbours (float32)."""
    prompts = [random_ids(length, seed=20 + length, vocab=511) for length in (5, 17, 33, 64)]
    server.flush_cache()
    for ids, answer in zip(prompts, server.batch(prompts), strict=True):
        server.flush_cache()
        alone = server.batch([ids])[0]
        first, second = ([entry[0] for entry in a["meta_info"]["input_token_logprobs"][1:]] for a in (answer, alone))
        assert median_apart(first, second) < FP32_MEDIAN

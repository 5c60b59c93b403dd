"""What a served checkpoint is held to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.support.models import random_ids
from tests.support.reference import Reference, difference
from tests.support.server import Server

PROMPT = random_ids(96, seed=11, vocab=511)  # SGLang reports the last token of a vocabulary as 0

FP32_MEAN = 2e-3
"""Mean |difference| of log probabilities of a float32 server.

Everything but the rounding of activations agrees to float32's 1e-6. Where an activation lies that close to the middle
between two E4M3 numbers, server and reference may round it apart, by up to 2^-4 of itself; a handful of such elements in
hundreds of thousands moves a log probability by about 1e-3. A scale of a wrong shard moves it by 1e-1 and more
(tests/unit/test_support_reference.py measures that).
"""

NOISE_FACTOR = 2.0
"""How far a bf16 server may be from the float32 reference, in units of the same model run in bf16 by Hugging Face.

Both are one random draw of rounding errors; server and Hugging Face round in different places.
"""


def check_logprobs(server: Server, folder: Path, dtype: str, ids: Sequence[int] = PROMPT, **options: Any) -> None:
    """The server's log probabilities over the whole vocabulary, at the noise floor of ``dtype``.

    ``options`` are those of the reference.
    """
    served = server.full_logprobs(ids)
    expected = Reference(folder, **options).logprobs(ids)
    assert bool(torch.isfinite(served).all())
    found = difference(served, expected)
    if dtype == "float32":
        assert found.mean < FP32_MEAN, str(found)
        return
    noise = difference(Reference(folder, dtype=getattr(torch, dtype), **options).logprobs(ids), expected)
    print(f"served: {found}; noise floor: {noise}")
    assert found.mean < NOISE_FACTOR * noise.mean, f"served: {found}; noise floor: {noise}"
    assert found.divergence < NOISE_FACTOR**2 * noise.divergence, f"served: {found}; noise floor: {noise}"


def check_prefill_against_decode(server: Server, tolerance: float) -> None:
    """Tokens scored one by one while decoding have the log probabilities of the same tokens scored as a prompt."""
    sampling = {"temperature": 0.0, "max_new_tokens": 16, "ignore_eos": True}
    answer = server.post("/generate", {"input_ids": list(PROMPT), "sampling_params": sampling, "return_logprob": True})
    decoded = answer["meta_info"]["output_token_logprobs"]
    tokens = [entry[1] for entry in decoded]
    server.flush_cache()
    scored = server.input_logprobs([*PROMPT, *tokens])[-len(tokens) :]
    worst = max(abs(entry[0] - other) for entry, other in zip(decoded, scored, strict=True))
    assert worst < tolerance, worst


def check_batch_against_single(server: Server, tolerance: float) -> None:
    """A request's log probabilities do not depend on its neighbours, whose activations are far larger or smaller."""
    prompts = [random_ids(length, seed=20 + length, vocab=511) for length in (5, 33, 64, 90)]
    server.flush_cache()
    together = server.batch(prompts)
    for ids, answer in zip(prompts, together, strict=True):
        server.flush_cache()
        alone = server.batch([ids])[0]
        pairs = zip(
            answer["meta_info"]["input_token_logprobs"][1:], alone["meta_info"]["input_token_logprobs"][1:], strict=True
        )
        worst = max(abs(a[0] - b[0]) for a, b in pairs)
        assert worst < tolerance, worst

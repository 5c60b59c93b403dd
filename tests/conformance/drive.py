"""A driver of one engine: prompts of every length, batches, chunks, decoding, cached prefixes, and their log probabilities."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.conformance.cases import Case, Update
from tests.support.models import random_ids

VOCAB = 511
"""SGLang reports the last of the 512 tokens as 0: no prompt has it."""

WHOLE = 8192
"""A chunk size that splits no prompt."""

SINGLES = (3, 5, 9, 17, 33, 65, 100, 129, 200)
LONG = (300, 900, 2100)
BATCH, BATCH_LENGTH = 16, 32
BATCH_LENGTH_KV = 12
"""Sixteen prompts of this length fit one chunk, so that no prompt is split depending on the others."""

PREFIXES, PREFIX, ODD_PREFIX, TAIL = 3, 256, 120, 40
"""A prefix of whole chunks, and one of another length."""

FOLLOW = 8
PAGE = 64
"""The largest page of SGLang's attention backends: prefixes are cached in whole pages."""

FLUSHES = 100

ADAPTER = "adapter"
"""The name of a case's adapter in requests."""


@dataclass(frozen=True)
class Scored:
    """The log probabilities from an engine for the tokens of one sequence from ``start`` on.

    Attributes:
        group: the kind of request.
        ids: the sequence, including decoded tokens.
        start: the first token that has a log probability.
        values: one for each token from there.
        prompt: number of tokens sent.
        cached: number of these tokens found in the cache.
        follow: the likeliest continuation, where requested.
    """

    group: str
    ids: list[int]
    start: int
    values: list[float]
    prompt: int
    cached: int = 0
    follow: tuple[int, ...] = ()


class Drive:
    """The requests of a case to a running engine.

    Args:
        engine: ``sglang.Engine``.
        case: the case that it serves.
    """

    def __init__(self, engine: Any, case: Case) -> None:
        self.engine = engine
        self.case = case
        self.chunk = case.chunk or WHOLE
        self.repeats = float("nan")
        """The share of the long prompts' tokens whose log probability is bit-identical when they are sent again."""
        self.variation = float("nan")
        """The mean difference between the log probabilities of the long prompts' tokens when they are sent twice."""
        self._decoded, self._verified = 0, 0

    @property
    def tokens_per_step(self) -> float | None:
        """Return how many decoded tokens a step of the target gave, more than 1 where drafts were accepted; None without any."""
        return self._decoded / self._verified if self._verified else None

    def all(self) -> list[Scored]:
        """Send every request, one kind after the other, and set ``repeats`` and ``variation``."""
        if self.case.classifies:
            return self.classified()
        scored: list[Scored] = []
        again: list[Scored] = []
        length = BATCH_LENGTH if self.chunk >= BATCH * BATCH_LENGTH else BATCH_LENGTH_KV
        prompts = [random_ids(length, seed=100 + number, vocab=VOCAB) for number in range(BATCH)]
        scored += self.prompts("batch of 16", prompts)
        for size in SINGLES:
            scored += self.prompts("up to 200", [random_ids(size, seed=200 + size, vocab=VOCAB)])
        for size in LONG:
            ids = random_ids(size, seed=300 + size, vocab=VOCAB)
            scored += self.prompts(str(size), [ids])
            again += self.prompts(str(size), [ids])
        self._compare([one for one in scored if one.group in map(str, LONG)], again)
        for number in range(4):
            scored += self.decoded("decode, 1", [random_ids(24, seed=400 + number, vocab=VOCAB)], 24)
        scored += self.decoded("decode, 16", [ids[:BATCH_LENGTH_KV] for ids in prompts], 12)
        if self.case.prefixes:
            scored += self.cached("cached prefix", PREFIX)
        if self.case.prefixes and self.case.kv != "none":
            scored += self.cached("cached odd prefix", ODD_PREFIX)
        return scored

    def classified(self) -> list[Scored]:
        """Return the scores of every prompt's classes, in place of its tokens' log probabilities, and set ``repeats``."""
        together = [random_ids(BATCH_LENGTH, seed=100 + number, vocab=VOCAB) for number in range(BATCH)]
        alone = [[random_ids(size, seed=300 + size, vocab=VOCAB)] for size in (*SINGLES, *LONG)]
        scored = [one for prompts in (together, *alone) for one in self._classes(prompts)]
        long = [one for one in scored if len(one.ids) in LONG]
        self._compare(long, [self._classes([one.ids])[0] for one in long])
        return scored

    def _classes(self, prompts: Sequence[Sequence[int]]) -> list[Scored]:
        from sglang.srt.managers.io_struct import EmbeddingReqInput

        self.flush()  # a cached prefix would leave one token to compute, by other launches than all of them
        request = EmbeddingReqInput(input_ids=[list(ids) for ids in prompts])
        answers = self.engine.loop.run_until_complete(
            self.engine.tokenizer_manager.generate_request(request, None).__anext__()
        )
        return [
            Scored("classes", list(ids), 1, [float(value) for value in answer["embedding"]], len(ids))
            for ids, answer in zip(prompts, answers, strict=True)
        ]

    def _compare(self, first: Sequence[Scored], second: Sequence[Scored]) -> None:
        values = [[value for one in sending for value in one.values] for sending in (first, second)]
        apart = [abs(a - b) for a, b in zip(*values, strict=True)]
        self.repeats, self.variation = apart.count(0.0) / len(apart), sum(apart) / len(apart)

    def prompts(
        self, group: str, prompts: Sequence[Sequence[int]], start: int = 0, flush: bool = True, count: int = 1
    ) -> list[Scored]:
        """Score the prompts, sent at once, and let ``count`` tokens follow."""
        if flush:
            self.flush()
        answers = self._generate(prompts, count, logprob_start_len=start)
        scored = []
        for ids, answer in zip(prompts, answers, strict=True):
            info = answer["meta_info"]
            entries = [entry for entry in info["input_token_logprobs"] if entry[0] is not None]
            if [entry[1] for entry in entries] != list(ids[-len(entries) :]):
                raise AssertionError(f"{group}: the engine scored other tokens than it was sent")
            values = [float(entry[0]) for entry in entries]
            follow = tuple(int(entry[1]) for entry in info["output_token_logprobs"])
            first, found = len(ids) - len(values), int(info["cached_tokens"])
            scored.append(Scored(group, list(ids), first, values, len(ids), found, follow))
        return scored

    def decoded(self, group: str, prompts: Sequence[Sequence[int]], count: int) -> list[Scored]:
        """Score the likeliest continuation of each prompt, token by token as it is decoded."""
        self.flush()
        scored = []
        for ids, answer in zip(prompts, self._generate(prompts, count), strict=True):
            entries = answer["meta_info"]["output_token_logprobs"]
            if len(entries) != count:
                raise AssertionError(f"{group}: {len(entries)} tokens instead of {count}")
            self._decoded += count
            self._verified += int(answer["meta_info"].get("spec_verify_ct") or 0)
            sequence = [*ids, *(int(entry[1]) for entry in entries)]
            scored.append(Scored(group, sequence, len(ids), [float(entry[0]) for entry in entries], len(ids)))
        return scored

    def cached(self, group: str, prefix: int) -> list[Scored]:
        """Score the ends of prompts with a cached prefix, and again without a cache as ``<group>, fresh``."""
        scored = []
        for number in range(PREFIXES):
            ids = random_ids(prefix + TAIL, seed=500 + prefix + number, vocab=VOCAB)
            scored += self.prompts(f"{group}, fresh", [ids], start=prefix, count=FOLLOW)
            self.flush()
            self._generate([ids[:prefix]], 1)
            hit = self.prompts(group, [ids], start=prefix, flush=False, count=FOLLOW)
            if not prefix - PAGE < hit[0].cached <= prefix:
                raise AssertionError(f"{group}: {hit[0].cached} of {prefix} tokens were found in the cache")
            scored += hit
        return scored

    def flush(self) -> None:
        """Clear the cached prefixes; retry while the engine has not quite ended its last request."""
        for _ in range(FLUSHES):
            if getattr(self.engine.flush_cache(), "success", True):
                return
            time.sleep(0.05)
        raise AssertionError("the engine does not forget its cache")

    def _generate(self, prompts: Sequence[Sequence[int]], count: int, **options: Any) -> list[Mapping[str, Any]]:
        sampling = {"temperature": 0.0, "max_new_tokens": count, "ignore_eos": True}
        if self.case.adapter:
            options["lora_path"] = [ADAPTER] * len(prompts)
        answers = self.engine.generate(
            input_ids=[list(ids) for ids in prompts], sampling_params=sampling, return_logprob=True, **options
        )
        return list(answers) if isinstance(answers, list) else [answers]


def update(engine: Any, kind: Update, folder: Path) -> None:
    """Give a running engine the weights of another checkpoint of the same recipe."""
    if kind == "disk":
        _check(engine.update_weights_from_disk(str(folder)))
        return
    _check(engine.begin_weight_update())
    for path in sorted(folder.glob("*.safetensors")):
        stored = list(load_file(path).items())
        half = len(stored) // 2
        for part in (stored[:half], stored[half:]):
            _check(engine.update_weights_from_tensor(part, flush_cache=False))
    _check(engine.end_weight_update())


def _check(answer: tuple[Any, ...]) -> None:
    """Raise for an engine's answer that begins with False and a message."""
    if not answer[0]:
        raise RuntimeError(answer[1])


def engine_arguments(case: Case, folder: str, device: str, port: int) -> dict[str, Any]:
    """Return the arguments of ``sglang.Engine``, small enough for several engines on one GPU."""
    chunk = case.chunk or WHOLE
    arguments: dict[str, Any] = {
        "model_path": folder,
        "dtype": "bfloat16",
        "tp_size": case.tp,
        "skip_tokenizer_init": True,
        "max_total_tokens": 16384,
        "max_running_requests": BATCH,
        "chunked_prefill_size": chunk,
        "max_prefill_tokens": chunk,
        "random_seed": 0,
        "log_level": "info",
        "nccl_port": port,
        "watchdog_timeout": 120,
    }
    if device == "cpu":
        arguments |= {"device": "cpu", "attention_backend": "torch_native"}
    else:
        # Each engine counts the memory of the others: the share is an upper bound only.
        arguments |= {"mem_fraction_static": 0.9, "disable_flashinfer_autotune": True}
        arguments |= {"cuda_graph_max_bs_decode": BATCH}
        if case.graphs != "all":
            arguments["cuda_graph_backend_prefill"] = "disabled"
        if case.graphs == "none":
            arguments["disable_cuda_graph"] = True
    if case.tp > 1:
        # NVLink multicast and custom reductions are SGLang's own: judge plain NCCL.
        arguments |= {"disable_custom_all_reduce": True, "enforce_disable_flashinfer_allreduce_fusion": True}
    return {**arguments, **case.args}

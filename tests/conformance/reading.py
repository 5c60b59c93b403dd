"""The expected answers of a case: the independent float32 reading on any device, and its distance to bf16."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from tests.conformance.cases import Case
from tests.support.adapters import add_adapter
from tests.support.recipes import Activation, Math
from tests.support.reference import Reference

BLACKWELL = 100

QUERY_ROUNDING = frozenset({"fa3"})
"""SGLang's attention in FP8 over its own FP8 cache, which also rounds queries and softmax weights."""

ROUTERS = frozenset({"gate", "router"})
"""Names of a mixture's router."""

UNROUNDED = ("*.kv_b_proj",)
"""Layers whose weights SGLang multiplies into others when it loads: there is no input of theirs that could be rounded."""


@dataclass(frozen=True)
class Reading:
    """The numerics of a reading.

    Attributes:
        math: the numerics of NVFP4 weights with FP8 activations.
        activation: the rounding of layer inputs.
        kv: the recipe that rounds keys and values.
        own_chunk: whether attention within a prefill chunk reads back the cache; else only earlier chunks are rounded.
        fp8_attention: whether queries are rounded to E4M3. Softmax weights are rounded too, at points of an online softmax
            that no reading knows: that counts as noise.
    """

    math: Math
    activation: Activation
    kv: str
    own_chunk: bool = True
    fp8_attention: bool = False

    @classmethod
    def of(cls, case: Case, capability: int | None, attention: str = "") -> Self:
        """Return the reading of ``case`` under SGLang's ``attention``; ``capability`` is a GPU's times ten."""
        older_gpu = capability is not None and capability < BLACKWELL
        activation: Activation = "keep_fp4" if older_gpu else "recipe"
        ours = case.kv != "fp8" or capability is None
        return cls(
            math=case.math,
            activation="none" if case.activation == "none" else activation,
            kv=case.kv,
            own_chunk=capability is None or not ours,
            fp8_attention=not ours and attention in QUERY_ROUNDING,
        )

    @property
    def key(self) -> str:
        """Return the manifest's key of this reading: log probabilities under a cache that rounds everything."""
        return json.dumps([self.math, self.activation, self.kv])


class Reader:
    """A checkpoint under a reading.

    Args:
        folder: the checkpoint.
        reading: the numerics.
        dtype: float32, or bfloat16 for its noise.
        device: its device.
        kv: replaces the reading's cache, such as ``"unquantized"``.
        adapter: the folder of a LoRA adapter that every prompt is read with.
    """

    def __init__(
        self,
        folder: Path,
        reading: Reading,
        dtype: torch.dtype,
        device: str = "cpu",
        kv: str | None = None,
        adapter: Path | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.reading = reading
        with self._here():
            self.reference = Reference(
                folder,
                dtype=dtype,
                math=reading.math,
                activation=reading.activation,
                kv_cache=kv or reading.kv,
                unrounded=UNROUNDED,
            )
            self.reference.model.to(self.device)
            if adapter is not None:
                add_adapter(self.reference, adapter)
        self._router_logits: list[torch.Tensor] = []
        for _, router in routers(self.reference.model):
            router.register_forward_hook(self._keep_router_logits)
        self._rounding: dict[str, Any] | None = getattr(self.reference.model.config, "kv_rounding", None)
        if self._rounding is not None:
            self._rounding["fp8_queries"] = reading.fp8_attention
            self._rounding["fp8_weights"] = reading.fp8_attention and dtype != torch.float32

    @contextmanager
    def _here(self) -> Iterator[None]:
        """Create tensors on the device and compute float32 products in float32 while the block runs."""
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with self.device:
                yield
        finally:
            torch.set_float32_matmul_precision(precision)

    def scores(self, ids: Sequence[int], raw_from: Sequence[int] | None = None) -> torch.Tensor:
        """Return the log probability of each token but the first, ``[len(ids) - 1]`` on the CPU; a classifier's scores.

        ``raw_from``: for each token, the first key that it reads unrounded; None: all keys are rounded.
        """
        return self.scores_and_routing(ids, raw_from)[0]

    def scores_and_routing(
        self, ids: Sequence[int], raw_from: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return :meth:`scores` and each mixture's router logits ``[len(ids) - 1, experts]``, from the first layer on.

        Row ``t`` of either is for the same token: both are computed at the position that predicts it. Without mixtures the
        list is empty.
        """
        if self._rounding is not None:
            self._rounding["raw_from"] = raw_from
        self._router_logits.clear()
        with self._here():
            reference = self.reference
            scores = reference.class_scores if hasattr(reference.model, "score") else reference.input_logprobs
            found = scores(ids).to("cpu", torch.float32)
        return found, [logits[: len(found)].to("cpu", torch.float32) for logits in self._router_logits]

    def _keep_router_logits(self, router: torch.nn.Module, args: Any, output: Any) -> None:
        # Llama 4's, which is a linear layer, returns the scores first.
        logits = output[isinstance(router, torch.nn.Linear)] if isinstance(output, tuple) else output
        self._router_logits.append(logits.detach().flatten(end_dim=-2))

    @property
    def experts_per_token(self) -> int | None:
        """Return the number of experts that a router chooses; None for a model without mixtures."""
        found = {int(router.top_k) for _, router in routers(self.reference.model)}
        if len(found) > 1:
            raise NotImplementedError(f"mixtures that choose different numbers of experts: {sorted(found)}")
        return found.pop() if found else None

    def plain_scores(self, ids: Sequence[int]) -> torch.Tensor:
        """Score the tokens with every key and value read back from the cache, and unquantized queries."""
        if self._rounding is not None:
            self._rounding["fp8_queries"] = False
        try:
            return self.scores(ids)
        finally:
            if self._rounding is not None:
                self._rounding["fp8_queries"] = self.reading.fp8_attention


def routers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """Return the routers of a Hugging Face model (``gate`` or ``router`` beside ``experts``) and their names, in layer order.

    Each chooses the ``top_k`` largest of its logits, which it returns. That holds for those of DeepSeek and Nemotron-H while their
    correction biases are 0 and there is one group of experts, as here.

    Raises:
        NotImplementedError: experts without such a router beside them.
    """
    found = []
    for name, block in model.named_modules():
        if not isinstance(getattr(block, "experts", None), torch.nn.Module):
            continue
        beside = {child: module for child, module in block.named_children() if child in ROUTERS}
        fits = [
            (f"{name}.{child}", module)
            for child, module in beside.items()
            if getattr(getattr(module, "weight", None), "ndim", 0) == 2 and hasattr(module, "top_k")
        ]
        if len(fits) != 1:
            raise NotImplementedError(f"{name}: one router beside the experts is expected, found {sorted(beside)}")
        found += fits
    return found


def read_check(folder: Path, reading: Reading, prompts: Sequence[Sequence[int]]) -> list[float]:
    """Return the log probabilities of ``prompts`` under a reading on a CPU, for the manifest."""
    reader = Reader(folder, reading, torch.float32)
    return torch.cat([reader.plain_scores(ids) for ids in prompts]).tolist()


def first_raw(length: int, prompt: int, cached: int, chunk: int) -> list[int]:
    """Return for each of ``length`` tokens the first key it reads unrounded, where a chunk is not read back.

    The first ``prompt`` tokens were sent, the others decoded.

    The first ``cached`` were prefilled earlier, in chunks from the beginning; the rest of the prompt is chunked from
    there. A decoded token reads all keys rounded, including its own.
    """
    first = []
    for position in range(length):
        if position >= prompt:
            first.append(position + 1)
        elif position < cached:
            first.append(position // chunk * chunk)
        else:
            first.append(cached + (position - cached) // chunk * chunk)
    return first

"""The KV cache in a search: what each recipe costs each layer, and keys and values rounded as a server rounds them.

ModelOpt searches over linear layers only. Here the unquantized model computes attention twice in each layer, over its own keys and
values and over those read back from a cache, in the number formats that are served. The scores are those of ModelOpt's two methods:
``gradient``, the sum of (gradient x change of the attention's output)^2, and ``kl_div``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sglang_modelopt_ext.checkpoint.kv_cache import CAST_AMAX, MIXED, MIXED_BASE, check_head_dim, is_latent
from sglang_modelopt_ext.checkpoint.quant_config import CONFIG_NAME, text_config
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.autoquant.solve import Method
from sglang_modelopt_ext.workflow.autoquant.state import KVChoice, KVLayer, KVSearch
from sglang_modelopt_ext.workflow.common.attention import (
    Attend,
    as_cached,
    attention_modules,
    attention_replaced,
    attention_watched,
)
from sglang_modelopt_ext.workflow.common.processes import Processes
from sglang_modelopt_ext.workflow.quantize.calibrate import modelopt_messages
from sglang_modelopt_ext.workflow.quantize.recipes import find_kv
from sglang_modelopt_kernels.formats.kv_cache import KV_RECIPES, KVRecipe

LOSS_SCALE = 2.0**12
"""The factor of the loss under which gradients of a half-precision model do not vanish; divided out of the scores."""


def check_recipes(folder: Path, names: Sequence[str], fixed: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the candidates for every layer's cache, in the order of their bits.

    Args:
        folder: the model.
        names: the candidates.
        fixed: the configuration of a recipe's baseline, if there is one.

    Raises:
        ModelOptExtError: a recipe that cannot differ by layer, one given twice, or a model whose cache none of them holds.
    """
    for name in names:
        if name not in MIXED:
            raise ModelOptExtError.at(
                "--kv-formats", name, f"one of {', '.join(MIXED)}, which may differ by layer", name
            )
    if len(set(names)) != len(names):
        raise ModelOptExtError.at("--kv-formats", "names", "each of them once", ",".join(names))
    cached = ("k_bmm", "v_bmm", "[kv]_bmm")
    entries = [] if fixed is None or not names else fixed["quant_cfg"]
    for entry in entries:
        if any(part in entry["quantizer_name"] for part in cached) and entry.get("enable", True):
            expected = "no such option beside a recipe whose baseline quantizes the KV cache"
            raise ModelOptExtError.at("command line", "--kv-formats", expected, entry["quantizer_name"])
    if names and is_latent(folder):
        raise ModelOptExtError.at(
            folder / CONFIG_NAME, "--kv-formats", "a model that caches keys and values", "latent attention"
        )
    return tuple(sorted(names, key=lambda name: KV_RECIPES[name].bytes_per_vector(64)))


@dataclass
class Measured:
    """The measurements of one layer: the largest magnitudes, elements of a token, and scores by recipe."""

    k_amax: float = 0.0
    v_amax: float = 0.0
    elements: int = 0
    head_dim: int = 0
    scores: dict[str, float] = field(default_factory=dict)

    def rounded(self, recipe: KVRecipe, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values read back from a cache of ``recipe``, under the scales that a server reads from an export."""
        # Stored as amax / 448 in float32, whatever the format.
        stored = (float(torch.tensor(amax, dtype=torch.float32) / CAST_AMAX) for amax in (self.k_amax, self.v_amax))
        scales = (scale * CAST_AMAX / recipe.format.range for scale in stored)
        key, value = (as_cached(x, recipe, scale, None) for x, scale in zip((key, value), scales, strict=True))
        return key, value


def search_cache(
    model: Any,
    folder: Path,
    recipes: Sequence[str],
    method: Method,
    calibration: Sequence[torch.Tensor],
    scored: Sequence[torch.Tensor],
    device: str,
    progress: bool = True,
    processes: Processes | None = None,
) -> KVSearch:
    """Return the scores of every recipe for the cache of every layer, and the largest magnitudes of keys and values.

    Args:
        model: the unquantized model.
        folder: its folder.
        recipes: the candidates.
        method: how sensitivity is scored.
        calibration: int64 ``[B, T]`` each; the magnitudes are of these.
        scored: int64 ``[1, T]`` each.
        device: the model's.
        progress: show progress on standard error.
        processes: those that share the windows, all in the same call; None for this one alone.

    Raises:
        ModelOptExtError: a layer without keys and values of its own, or one whose magnitudes or scores are not legal.
    """
    processes = processes or Processes()
    layers = {number: Measured() for number in _numbers(model, folder)}

    def magnitudes(number: int, key: torch.Tensor, value: torch.Tensor) -> None:
        layer = layers[number]
        layer.k_amax = max(layer.k_amax, float(key.abs().max()))
        layer.v_amax = max(layer.v_amax, float(value.abs().max()))
        layer.elements, layer.head_dim = key.shape[1] * key.shape[3], key.shape[3]

    with torch.no_grad(), attention_watched(model, magnitudes):
        for batch in _shown(processes.share(calibration), "KV cache: magnitudes", progress):
            model(input_ids=batch.to(device), use_cache=False)
    _share_magnitudes(layers, processes)
    for number, layer in layers.items():
        for name in recipes:
            check_head_dim(KV_RECIPES[name], layer.head_dim, folder / CONFIG_NAME)
        if not 0 < min(layer.k_amax, layer.v_amax) <= max(layer.k_amax, layer.v_amax) < float("inf"):
            got = (layer.k_amax, layer.v_amax)
            raise ModelOptExtError.at(folder, f"layers.{number}: KV cache", "magnitudes above zero and finite", got)
    score = _by_gradient if method == "gradient" else _by_divergence
    own = []
    for batch in _shown(processes.share(scored), "KV cache: scores", progress):
        score(model, layers, recipes, batch.to(device))
        own.append({number: layer.scores for number, layer in layers.items()})
        for layer in layers.values():
            layer.scores = {}
    _add_scores(layers, processes.gather(own), len(scored))
    return KVSearch(
        bits={name: 8 * KV_RECIPES[name].bytes_per_vector(64) / 64 for name in recipes},
        layers=tuple(
            KVLayer(
                number=number, elements=layer.elements, k_amax=layer.k_amax, v_amax=layer.v_amax, scores=layer.scores
            )
            for number, layer in sorted(layers.items())
        ),
    )


def _share_magnitudes(layers: Mapping[int, Measured], processes: Processes) -> None:
    """Take the largest magnitudes that any process found, and the sizes that some process saw."""
    for found in processes.gather(dict(layers)):
        for number, layer in layers.items():
            other = found[number]
            layer.k_amax, layer.v_amax = max(layer.k_amax, other.k_amax), max(layer.v_amax, other.v_amax)
            layer.elements, layer.head_dim = max(layer.elements, other.elements), max(layer.head_dim, other.head_dim)


def _add_scores(
    layers: Mapping[int, Measured], rows: Sequence[Sequence[Mapping[int, Mapping[str, float]]]], windows: int
) -> None:
    """Add up the scores of all windows in their order: ``rows`` has every process's share of them."""
    for window in range(windows):
        for number, scores in rows[window % len(rows)][window // len(rows)].items():
            total = layers[number].scores
            for name, value in scores.items():
                total[name] = total.get(name, 0.0) + value


def _numbers(model: Any, folder: Path) -> list[int]:
    numbers = [int(module.layer_idx) for module in attention_modules(model)]
    count = text_config(folder).get("num_hidden_layers")
    if sorted(numbers) != list(range(count if isinstance(count, int) else 0)):
        expected = f"keys and values of its own in each of {count} layers"
        raise ModelOptExtError.at(folder / CONFIG_NAME, "--kv-formats", expected, f"layers {sorted(numbers)}")
    return numbers


def _shown(batches: Sequence[torch.Tensor], label: str, progress: bool) -> Iterator[torch.Tensor]:
    yield from tqdm(batches, desc=label, unit="window", dynamic_ncols=True, disable=not progress)


def _by_gradient(model: Any, layers: Mapping[int, Measured], recipes: Sequence[str], ids: torch.Tensor) -> None:
    """Score one window by (gradient x change of the attention's output)^2, all layers and recipes in one pass."""

    def around(
        number: int, attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        output, layer = attend(query, key, value), layers[number]
        with torch.no_grad():
            changes = {
                name: (attend(query, *layer.rounded(KV_RECIPES[name], key, value)).float() - output.float()).square()
                for name in recipes
            }

        def add(gradient: torch.Tensor) -> None:
            for name, change in changes.items():
                value = float((gradient.float().square() * change).sum()) / LOSS_SCALE**2
                layer.scores[name] = layer.scores.get(name, 0.0) + value

        output.register_hook(add)
        return output

    before = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    embeddings = model.get_input_embeddings().weight
    try:
        embeddings.requires_grad_(True)  # so that there is a graph; its own gradient is dropped
        with attention_replaced(model, around):
            logits = model(input_ids=ids, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
            (loss * LOSS_SCALE).backward()
            embeddings.grad = None
    finally:
        for parameter, needs in zip(model.parameters(), before, strict=True):
            parameter.requires_grad_(needs)


@torch.no_grad()
def _by_divergence(model: Any, layers: Mapping[int, Measured], recipes: Sequence[str], ids: torch.Tensor) -> None:
    """Score one window by KL(unquantized || one layer's cache quantized) over its tokens, a pass for each layer and recipe."""
    plain = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), dim=-1)
    for number, layer in layers.items():
        for name in recipes:
            with cache_rounded(model, {number: (layer, KV_RECIPES[name])}):
                other = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), dim=-1)
            layer.scores[name] = float((plain.exp() * (plain - other)).sum().clamp(min=0.0))


@contextmanager
def cache_rounded(model: Any, layers: Mapping[int, tuple[Measured, KVRecipe]]) -> Iterator[None]:
    """Round keys and values of some layers, by number, as a server's cache does, while the block runs."""

    def around(
        number: int, attend: Attend, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        if number in layers:
            layer, recipe = layers[number]
            key, value = layer.rounded(recipe, key, value)
        return attend(query, key, value)

    with attention_replaced(model, around):
        yield


@contextmanager
def chosen_cache(model: Any, search: KVSearch | None, choice: KVChoice | None) -> Iterator[None]:
    """Round keys and values as chosen while the block runs; do nothing without a choice."""
    if search is None or choice is None:
        yield
        return
    layers = {
        layer.number: (
            Measured(layer.k_amax, layer.v_amax),
            KV_RECIPES[choice.formats[str(layer.number)]],
        )
        for layer in search.layers
    }
    with cache_rounded(model, layers):
        yield


def insert_cache_quantizers(model: Any, search: KVSearch | None, choice: KVChoice | None) -> dict[int, str]:
    """Give a model ModelOpt's quantizers of the KV cache, which its export knows in one format only; none without a choice.

    Returns:
        The recipes of layers that have another one than that format, by number.
    """
    from modelopt.torch.quantization.conversion import set_quantizer_by_cfg

    if search is None or choice is None:
        return {}
    names = set(choice.formats.values())
    base = MIXED_BASE if len(names) > 1 else next(iter(names))
    with modelopt_messages():
        set_quantizer_by_cfg(model, find_kv(base))
    layers = {layer.number: layer for layer in search.layers}
    for module in attention_modules(model):
        layer = layers[int(module.layer_idx)]
        module.k_bmm_quantizer.amax = torch.tensor(layer.k_amax, dtype=torch.float32)
        module.v_bmm_quantizer.amax = torch.tensor(layer.v_amax, dtype=torch.float32)
    return {int(number): name for number, name in choice.formats.items() if name != base}

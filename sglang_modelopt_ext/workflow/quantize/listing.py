"""The list of recipes: names, stored bits per weight, and how the result is served."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from tqdm import tqdm

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.stock import STOCK_BEHAVIOUR
from sglang_modelopt_ext.schemes.table import SCHEMES, UMBRELLA
from sglang_modelopt_ext.workflow.quantize import checks, quantizers
from sglang_modelopt_ext.workflow.quantize.library import PTQ, SEARCH, library, load
from sglang_modelopt_ext.workflow.quantize.recipes import (
    NONE,
    Changes,
    build,
    configurations,
    find_kv,
    find_recipe,
    presets,
)
from sglang_modelopt_ext.workflow.quantize.run import insert_quantizers, stand_in

_KINDS = {PTQ: "PTQ", SEARCH: "search"}
_SIDE = 4096
"""Inputs and outputs of the layer that stored bits are computed for."""

OTHER_MODELS = "matches no layer of a dense Llama: checked with the model it is for"
"""The mark of recipes for experts or for the layers of one architecture."""


class RecipeRow(msgspec.Struct, frozen=True, kw_only=True):
    """The description of one recipe.

    Attributes:
        name: its name for ``--recipe``.
        kind: ``ptq``, which ``quantize`` runs, or ``auto_quantize``, a search that ``auto-quantize`` runs.
        aliases: other names of the same configuration.
        algorithms: ``quant_algo`` of the layers; several in a mixed recipe; of a search those of its candidates.
        bits: stored bits per quantized weight, scales included; None for a mix, or where no layer is quantized.
        activations: the activation format of the layers.
        kv_cache: recipe of the KV cache, or None.
        calibration: ModelOpt's calibration algorithms, in order.
        served: whether a server with this package can serve it, judged by a dense Llama.
        served_by: the ``--quantization`` flag of this package, or the reason why it cannot be served.
        stock: the behaviour of SGLang without this package.
    """

    name: str
    kind: str = PTQ
    aliases: tuple[str, ...]
    algorithms: tuple[str, ...]
    bits: float | None
    activations: tuple[str, ...]
    kv_cache: str | None
    calibration: tuple[str, ...]
    served: bool
    served_by: str
    stock: str


class KVRow(msgspec.Struct, frozen=True, kw_only=True):
    """The description of one recipe of a KV cache.

    Attributes:
        name: its name for ``--kv``.
        recipe: the recipe it is served as, a name for ``--kv-cache-dtype modelopt_<recipe>``.
        calibrated: False for the presets that store no scales.
    """

    name: str
    recipe: str
    calibrated: bool


def list_recipes(progress: bool = True) -> list[RecipeRow]:
    """Return every recipe that ModelOpt has, described by applying it to a small stand-in model."""
    found: dict[str, list[str]] = {}
    contents: dict[str, dict[str, Any]] = {}
    searches = [name for name, kind in library().items() if kind == SEARCH]
    names = [*configurations(), *presets()[0], *(name for name in library() if name not in searches)]
    for name in tqdm(names, desc="reading recipes", unit="recipe", dynamic_ncols=True, disable=not progress):
        _, config = find_recipe(name)
        contents.setdefault(repr(config), config)
        found.setdefault(repr(config), []).append(name)
    shown = tqdm(found.items(), desc="describing recipes", unit="recipe", dynamic_ncols=True, disable=not progress)
    return [
        *(describe(same[0], tuple(same[1:]), contents[key]) for key, same in shown),
        *(describe_search(name) for name in searches),
    ]


def list_kv_caches() -> list[KVRow]:
    """Return every KV preset of ModelOpt."""
    rows = []
    for name in presets()[1]:
        model = stand_in()
        insert_quantizers(model, name, [{"quantizer_name": "*", "enable": False}, *find_kv(name)])
        recipe, cache = quantizers.kv_cache(model)
        assert recipe is not None, "a KV preset quantizes the KV cache"
        assert cache is not None, "a KV preset quantizes the KV cache"
        rows.append(KVRow(name=name, recipe=recipe, calibrated=cache.calibrated))
    return rows


def describe(name: str, aliases: tuple[str, ...], config: dict[str, Any]) -> RecipeRow:
    """Return the row of a recipe."""
    methods: tuple[str, ...] = ()
    algos: dict[str, int] = {}
    kv_recipe, problem, elsewhere = None, "", False
    try:
        built = build(config, Changes())
    except ModelOptExtError as error:
        return rejected(name, aliases, str(error))
    methods = tuple(step["method"] for step in built["algorithm"])
    try:
        model = stand_in()
        insert_quantizers(model, name, copy.deepcopy(built["quant_cfg"]))
        kv_recipe, _ = quantizers.kv_cache(model)
        found = checks.check_model(model, name, methods)
        modules = dict(model.named_modules())
        algos = {algo: checks.group_size(modules[layer]) for layer, algo in found.items()}
    except ModelOptExtError as error:
        # The rest of the message names the stand-in's layers.
        problem = "no server has " + str(error).rpartition(", got ")[2]
        elsewhere = "nothing would be quantized" in str(error)
    flags = {SCHEMES[algo].flag for algo in algos}
    return RecipeRow(
        name=name,
        aliases=aliases,
        algorithms=tuple(algos),
        bits=stored_bits(*next(iter(algos.items()))) if len(algos) == 1 else None,
        activations=tuple(dict.fromkeys(_activation(algo, modules, found, methods) for algo in algos)) if algos else (),
        kv_cache=kv_recipe,
        calibration=methods or (NONE,),
        served=elsewhere or not problem,
        served_by=OTHER_MODELS if elsewhere else problem or (" or ".join(sorted(flags)) or "--kv-cache-dtype auto"),
        stock="; ".join(STOCK_BEHAVIOUR[algo] for algo in algos),
    )


def rejected(name: str, aliases: tuple[str, ...], why: str) -> RecipeRow:
    """Return the row of a recipe that no command runs, with the reason."""
    return RecipeRow(
        name=name,
        aliases=aliases,
        algorithms=(),
        bits=None,
        activations=(),
        kv_cache=None,
        calibration=(NONE,),
        served=False,
        served_by=why,
        stock="",
    )


def describe_search(name: str) -> RecipeRow:
    """Return the row of a search over formats: what its candidates are, and the bits it is to reach."""
    name, recipe = load(name, SEARCH)
    search = recipe.auto_quantize
    spaces = [space.candidate_formats for space in search.module_search_spaces]
    configs = [*search.candidate_formats, *(config for space in spaces for config in space)]
    rows = [describe(name, (), config.model_dump(exclude_unset=True)) for config in configs]
    return RecipeRow(
        name=name,
        kind=SEARCH,
        aliases=(),
        algorithms=tuple(dict.fromkeys(algo for row in rows for algo in row.algorithms)),
        bits=search.constraints.effective_bits,
        activations=tuple(dict.fromkeys(name for row in rows for name in row.activations)),
        kv_cache=None,
        calibration=tuple(dict.fromkeys(method for row in rows for method in row.calibration)),
        served=all(row.served for row in rows),
        served_by="; ".join(dict.fromkeys(row.served_by for row in rows if not row.served)) or UMBRELLA,
        stock="",
    )


def _activation(algo: str, modules: dict[str, Any], found: dict[str, str], methods: Sequence[str]) -> str:
    """Return the activation format of the algorithm's layers; every calibration gives static formats their scales."""
    scheme = SCHEMES[algo]
    layer = next(name for name, other in found.items() if other == algo)
    rounded = quantizers.is_on(modules[layer].input_quantizer)
    calibrated = scheme.static_activation if methods else None
    return (calibrated or scheme.activation or NONE) if rounded else NONE


def stored_bits(algo: str, group_size: int) -> float:
    """Return stored bits per weight of a large layer, with block scales, without activation scales and smoothing."""
    scheme = SCHEMES[algo]
    weight = scheme.weight_format(group_size if any(scheme.group_sizes) else None, "scheme table", algo)
    total = 0
    for spec in weight.tensors:
        count = 1
        for size in spec.shape(_SIDE, _SIDE):
            count *= size
        total += count * spec.dtypes[0].itemsize
    return 8 * total / _SIDE**2


def format_recipes(rows: Iterable[RecipeRow], caches: Iterable[KVRow]) -> str:
    """Return the rows as two aligned tables."""
    lines = [("recipe", "kind", "quant_algo", "bits", "calibration", "served by")]
    for row in rows:
        name = " = ".join([row.name, *row.aliases])
        bits = f"{row.bits:.2f}" if row.bits is not None else "-"
        algos = " + ".join([*row.algorithms, *([f"KV {row.kv_cache}"] if row.kv_cache else [])]) or "-"
        served = row.served_by if row.served else f"not served: {row.served_by}"
        lines.append((name, _KINDS[row.kind], algos, bits, ", ".join(row.calibration), served))
    kv_lines = [("--kv", "served as", "scales")]
    for cache in caches:
        kv_lines.append(
            (cache.name, f"modelopt_{cache.recipe}", "calibrated" if cache.calibrated else "of an amax of 448")
        )
    return "\n".join([*_aligned(lines), "", *_aligned(kv_lines)])


def _aligned(lines: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]) - 1)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]) for line in lines
    ]

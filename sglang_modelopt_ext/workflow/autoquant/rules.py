"""The rules of a search: what may be chosen for each group of layers, and how the group counts.

They come from the command line, or from a recipe file of ModelOpt (``recipe_type: auto_quantize``), which ModelOpt's own classes
read, and whose patterns ModelOpt's own functions match.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang_modelopt_ext.checkpoint.names import matches
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.autoquant.solve import Method
from sglang_modelopt_ext.workflow.autoquant.state import LmHead
from sglang_modelopt_ext.workflow.quantize.library import SEARCH, load

BASELINE = "quantize"
"""The name of the one format of layers that a recipe quantizes without a choice: of its ``quantize`` section."""


@dataclass(frozen=True)
class Space:
    """The choice of the layers that some patterns match.

    Attributes:
        patterns: wildcards over whole names of modules.
        formats: names of the candidates.
        unquantized: whether they may stay unquantized.
    """

    patterns: tuple[str, ...]
    formats: tuple[str, ...]
    unquantized: bool


@dataclass(frozen=True)
class Rules:
    """The rules of a search.

    Attributes:
        excluded: patterns of layers left unquantized, as ``--exclude`` reads them.
        disabled: patterns of layers left unquantized, wildcards over whole names of modules.
        spaces: choices that replace those of all other layers.
        fixed: the configuration of all layers outside of ``spaces``; None where they are searched over.
        cost_model: ModelOpt's name of the rule by which layers count.
        cost: that rule's parameters.
        lm_head: how the ``lm_head`` is treated.
    """

    excluded: tuple[str, ...] = ()
    disabled: tuple[str, ...] = ()
    spaces: tuple[Space, ...] = ()
    fixed: dict[str, Any] | None = None
    cost_model: str = "weight"
    cost: Mapping[str, Any] = field(default_factory=dict)
    lm_head: LmHead = "excluded"

    def of_model(self, model: Any) -> Rules:
        """Return the rules with the parameters that ModelOpt takes from a model: the share of experts that are active.

        Raises:
            ModelOptExtError: a parameter is missing or out of range.
        """
        from modelopt.torch.quantization._auto_quantize_cost import normalize_auto_quantize_constraints

        wanted = {"effective_bits": 16.0, "cost_model": self.cost_model, "cost": dict(self.cost)}
        try:
            found = normalize_auto_quantize_constraints(model, wanted)
        except ValueError as error:
            raise ModelOptExtError.at("--recipe", "constraints", "a cost model of ModelOpt", error) from error
        return dataclasses.replace(self, cost=found.get("cost", {}))

    def weight_of(self, names: Sequence[str]) -> float:
        """Return the factor by which the weights and the bits of a group of modules count."""
        from modelopt.torch.quantization._auto_quantize_cost import get_auto_quantize_cost_model

        return float(get_auto_quantize_cost_model(self.cost_model).module_cost_weight(list(names), dict(self.cost)))

    def leaves_out(self, names: Sequence[str]) -> bool:
        """Return whether a group of modules is left unquantized."""
        from fnmatch import fnmatch

        return any(
            any(matches(pattern, name) for pattern in self.excluded)
            or any(fnmatch(name, pattern) for pattern in self.disabled)
            for name in names
        )

    def space_of(self, names: Sequence[str]) -> Space | None:
        """Return the choice of a group of modules; None where no pattern matches it.

        Raises:
            ModelOptExtError: a pattern matches a part of the group only, or two choices match it.
        """
        from modelopt.torch.quantization.algorithms import AutoQuantizeGradientSearcher

        spaces = [{"module_name_patterns": space.patterns, "space": space} for space in self.spaces]
        try:
            found = AutoQuantizeGradientSearcher._match_module_search_space(list(names), spaces)
        except ValueError as error:
            raise ModelOptExtError.at("--recipe", "module_search_spaces", "patterns of whole groups", error) from error
        return None if found is None else found["space"]


@dataclass(frozen=True)
class SearchRecipe:
    """A search that a recipe file describes.

    Attributes:
        name: as it is recorded.
        target: bits per weight.
        method: how sensitivity is scored.
        score_samples: number of windows to score.
        formats: configurations of all candidates by name.
        all_layers: names of the candidates of layers outside of the spaces.
        rules: what may be chosen where.
        sha256: of the recipe's content.
    """

    name: str
    target: float
    method: Method
    score_samples: int
    formats: dict[str, dict[str, Any]]
    all_layers: tuple[str, ...]
    rules: Rules
    sha256: str


def read_search(name: str) -> SearchRecipe:
    """Return the search that a recipe of ModelOpt's library, or a recipe file, describes.

    Raises:
        ModelOptExtError: no such file, one of another kind, or a section that is not supported.
    """
    recorded, recipe = load(name, SEARCH)
    search = recipe.auto_quantize
    if search.kv_cache is not None:
        expected = "no such section: --kv-formats searches over the KV cache"
        raise ModelOptExtError.at("--recipe", f"{name}: auto_quantize.kv_cache", expected, "one")
    formats: dict[str, dict[str, Any]] = {}
    all_layers = tuple(_named(config, formats) for config in search.candidate_formats)
    spaces = tuple(
        Space(
            tuple(space.module_name_patterns),
            tuple(dict.fromkeys(_named(config, formats) for config in space.candidate_formats)),
            space.allow_no_quant,
        )
        for space in search.module_search_spaces
    )
    constraints = search.constraints
    cost = {} if constraints.cost is None else constraints.cost.model_dump(exclude_none=True)
    if search.cost_excluded_layers:
        cost["excluded_module_name_patterns"] = list(search.cost_excluded_layers)
    rules = Rules(
        disabled=tuple(search.disabled_layers),
        spaces=spaces,
        fixed=None if recipe.quantize is None else recipe.quantize.model_dump(exclude_unset=True),
        cost_model=constraints.cost_model,
        cost=cost,
        lm_head="searched",
    )
    return SearchRecipe(
        name=recorded,
        target=constraints.effective_bits,
        method=search.auto_quantize_method,
        score_samples=search.score_size,
        formats=formats,
        all_layers=tuple(dict.fromkeys(all_layers)),
        rules=rules,
        sha256=hashlib.sha256(recipe.model_dump_json(exclude_unset=True).encode()).hexdigest(),
    )


def _named(config: Any, formats: dict[str, dict[str, Any]]) -> str:
    """Add a candidate to ``formats`` and return its name: that of ModelOpt's configuration with this content, or a number."""
    from modelopt.torch.quantization import config as known

    content = config.model_dump(exclude_unset=True)
    for name, other in formats.items():
        if other == content:
            return name
    same = (name for name in sorted(known.choices) if _dumped(getattr(known, name)) == content)
    name = next(same, f"CANDIDATE_{len(formats) + 1}")
    formats[name] = content
    return name


def _dumped(config: dict[str, Any]) -> dict[str, Any]:
    from modelopt.torch.quantization.config import QuantizeConfig

    content: dict[str, Any] = QuantizeConfig(**config).model_dump(exclude_unset=True)
    return content

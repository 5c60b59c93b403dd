"""The layers of a search, read from the model's configuration without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sglang_modelopt_ext.checkpoint.names import FUSED_SHARDS, matches
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.files.digest import folder_digest
from sglang_modelopt_ext.workflow.autoquant.formats import Candidate as FormatCandidate
from sglang_modelopt_ext.workflow.autoquant.formats import serving
from sglang_modelopt_ext.workflow.autoquant.state import UNQUANTIZED, Candidate, Format, Group, Layer, LmHead


@dataclass(frozen=True)
class Linears:
    """The linear layers of a model.

    Attributes:
        groups: layers by the name of their group, in the order of the model, without the ``lm_head``.
        lm_head: the output layer.
        dtype: dtype of the weights.
    """

    groups: dict[str, tuple[Layer, ...]]
    lm_head: Layer
    dtype: torch.dtype


def read_linears(folder: Path) -> Linears:
    """Return the linear layers of the Hugging Face model in ``folder``, grouped like ModelOpt's search groups them.

    Raises:
        ModelOptExtError: no such model, a model with layers other than dense ones, or layers that SGLang fuses but
            ModelOpt does not group.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelOptExtError.at(folder, "config.json", "a causal language model transformers knows", error) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ModelOptExtError.at(folder, "quantization_config", "an unquantized model", "one")
    head = model.get_output_embeddings()
    dtype = getattr(config, "dtype", None) or torch.float32
    groups: dict[str, list[Layer]] = {}
    output = None
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        layer = Layer(name=name, n=module.out_features, k=module.in_features)
        if module is head:
            output = layer
        else:
            groups.setdefault(_group_of(name), []).append(layer)
    if output is None or not groups:
        raise ModelOptExtError.at(folder, "model", "linear layers and an lm_head", "none")
    _check_fused(folder, groups)
    return Linears({name: tuple(layers) for name, layers in groups.items()}, output, dtype)


def _group_of(name: str) -> str:
    from modelopt.torch.quantization.algorithms import AutoQuantizeGradientSearcher

    searcher = AutoQuantizeGradientSearcher()
    for rule in searcher.quant_grouping_rules:
        found = rule(None, name) if callable(rule) else searcher._apply_quant_group_rule(name, rule)
        if found is not None:
            return str(found)
    return name


def _check_fused(folder: Path, groups: dict[str, list[Layer]]) -> None:
    group_of = {layer.name: name for name, layers in groups.items() for layer in layers}
    for shards in FUSED_SHARDS.values():
        for name, group in group_of.items():
            parent, _, leaf = name.rpartition(".")
            for shard in shards if leaf in shards else ():
                if group_of.get(f"{parent}.{shard}", group) != group:
                    raise ModelOptExtError.at(
                        folder, name, f"one group with {shard}, which SGLang fuses it with", "two"
                    )


def plan_groups(
    linears: Linears, formats: Sequence[FormatCandidate], gpu: Device, excluded: Sequence[str], lm_head: LmHead
) -> tuple[tuple[Format, ...], tuple[Group, ...]]:
    """Return the plan of a search: every group with the formats that fit its layers and are served on ``gpu``.

    Raises:
        ModelOptExtError: a format that no kernel serves or that fits no layer, or a pattern that matches no layer.
    """
    _check_patterns(linears, excluded)
    bits = linears.dtype.itemsize * 8
    served: dict[str, tuple[list[str], str]] = {}
    groups = []
    for name, layers in linears.groups.items():
        left = any(matches(pattern, layer.name) for layer in layers for pattern in excluded)
        costs = {} if left else _fitting(layers, formats, linears.dtype)
        for candidate in formats:
            for layer in layers if candidate.name in costs else ():
                found, scheme = serving(candidate, layer, gpu, linears.dtype)
                known = served.setdefault(candidate.name, ([], scheme))[0]
                known += [backend for backend in found if backend not in known]
        costs[UNQUANTIZED] = sum(layer.n * layer.k for layer in layers) * bits
        groups.append(_group(name, layers, costs))
    for candidate in formats:
        if candidate.name not in served:
            raise ModelOptExtError.at("--formats", candidate.name, "a format whose blocks divide some layer", "none")
    if lm_head == "counted":
        head = linears.lm_head
        groups.append(_group(head.name, (head,), {UNQUANTIZED: head.n * head.k * bits}))
    described = tuple(
        Format(
            name=candidate.name,
            algo=candidate.scheme.algo,
            group_size=candidate.scheme.weight.group_size,
            bits=candidate.scheme.weight.bits_per_weight(),
            algorithm=str(candidate.algorithm["method"]),
            served_by=tuple(served[candidate.name][0]),
            served_as=served[candidate.name][1],
        )
        for candidate in formats
    )
    return described, tuple(groups)


def _check_patterns(linears: Linears, excluded: Sequence[str]) -> None:
    names = [layer.name for layers in linears.groups.values() for layer in layers]
    for pattern in excluded:
        if not any(matches(pattern, name) for name in names):
            raise ModelOptExtError.at("--exclude", pattern, f"a pattern of layers such as {names[0]}", "no such layer")


def _fitting(layers: Sequence[Layer], formats: Sequence[FormatCandidate], dtype: torch.dtype) -> dict[str, int]:
    costs = {}
    for candidate in formats:
        each = [candidate.cost(layer, dtype) for layer in layers]
        if None not in each:
            costs[candidate.name] = sum(cost for cost in each if cost is not None)
    return costs


def _group(name: str, layers: tuple[Layer, ...], costs: dict[str, int]) -> Group:
    candidates = {fmt: Candidate(cost=cost, score=None) for fmt, cost in costs.items()}
    return Group(name=name, layers=layers, excluded=len(costs) == 1, candidates=candidates)


def model_digest(folder: Path) -> str:
    """Return the SHA-256 over a model's configuration and weights."""
    return folder_digest(folder, ("config.json", "*.safetensors"))

"""The layers of a search, read from the model's configuration without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sglang_modelopt_ext.checkpoint.names import FUSED_SHARDS, canonical_name, matches
from sglang_modelopt_ext.checkpoint.tensors import read_headers
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.files.digest import folder_digest
from sglang_modelopt_ext.schemes.base import LayerScheme
from sglang_modelopt_ext.workflow.autoquant.formats import Candidate as FormatCandidate
from sglang_modelopt_ext.workflow.autoquant.formats import applied_formats, serving
from sglang_modelopt_ext.workflow.autoquant.rules import BASELINE, Rules
from sglang_modelopt_ext.workflow.autoquant.state import UNQUANTIZED, Candidate, Format, Group, Layer
from sglang_modelopt_ext.workflow.quantize.quantizers import fused_experts


@dataclass(frozen=True)
class Linears:
    """The linear layers of a model.

    Attributes:
        groups: layers by the name of their group, in the order of the model, the ``lm_head`` last.
        head: the name of the ``lm_head``'s group.
        tied: whether the ``lm_head`` is the embedding, and thus cannot be quantized.
        dtype: dtype of the weights.
        model: the model without weights.
    """

    groups: dict[str, tuple[Layer, ...]]
    head: str
    tied: bool
    dtype: torch.dtype
    model: Any


def read_linears(folder: Path) -> Linears:
    """Return the linear layers and experts of the Hugging Face model in ``folder``, grouped like ModelOpt's search groups them.

    Raises:
        ModelOptExtError: no such model, one whose checkpoints name layers otherwise, or layers that SGLang fuses but ModelOpt does
            not group.
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
    experts = dict(fused_experts(model))
    for name, module in model.named_modules():
        if module is head:
            output = Layer(name=name, n=module.out_features, k=module.in_features)
        elif name in experts:
            groups[name] = _layers_of_experts(name, module)
        elif isinstance(module, torch.nn.Linear):
            layer = Layer(name=name, n=module.out_features, k=module.in_features)
            groups.setdefault(_group_of(name), []).append(layer)
    if output is None or not groups:
        raise ModelOptExtError.at(folder, "model", "linear layers and an lm_head", "none")
    _check_names(folder, groups)
    _check_fused(folder, groups)
    groups[output.name] = [output]
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    return Linears({name: tuple(layers) for name, layers in groups.items()}, output.name, tied, dtype, model)


def _layers_of_experts(name: str, module: Any) -> list[Layer]:
    """Return the layers of a module that holds the experts of a mixture stacked, gates and ups counted together."""
    down = module._parameters["down_proj"]
    first = next(weight for key, weight in module._parameters.items() if key in ("gate_up_proj", "up_proj"))
    count = down.shape[0]
    gated = "gate_up_proj" in module._parameters
    # [E, N, K], or [E, K, N] of Llama 4 and gpt-oss: the intermediate size is the one both share, once or twice.
    sizes = {int(size) for size in down.shape[1:]}
    inner = next(size for size in down.shape[1:] if (2 * size if gated else size) in first.shape[1:])
    hidden = next(iter(sizes - {inner}), inner)
    return [
        Layer(name=name, n=inner, k=hidden, count=(2 if gated else 1) * count, experts=True),
        Layer(name=name, n=hidden, k=inner, count=count, experts=True),
    ]


def _check_names(folder: Path, groups: dict[str, list[Layer]]) -> None:
    """Raise ModelOptExtError where ModelOpt will export a layer under another name than it has in transformers' model."""
    stored = {canonical_name(name) for name in read_headers(folder)}
    for layer in (layer for layers in groups.values() for layer in layers if not layer.experts):
        if canonical_name(f"{layer.name}.weight") not in stored:
            expected = "a model whose checkpoint has transformers' names of layers: the choice is checked by them"
            raise ModelOptExtError.at(folder, layer.name, expected, "another name")


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
    linears: Linears, formats: Sequence[FormatCandidate], gpu: Device, rules: Rules, all_layers: Sequence[str]
) -> tuple[tuple[Format, ...], tuple[Group, ...], dict[str, LayerScheme]]:
    """Return the plan of a search: every group with the formats that fit its layers and are served on ``gpu``, and all schemes.

    Args:
        linears: the model's layers.
        formats: the candidates.
        gpu: the target.
        rules: what may be chosen where.
        all_layers: names of the candidates of layers that the rules give no choice of their own.

    Raises:
        ModelOptExtError: a format that no kernel serves or that fits no layer, a pattern that matches no layer, or a group that
            must be quantized and fits no format.
    """
    rules = rules.of_model(linears.model)
    _check_patterns(linears, rules.excluded)
    bits = linears.dtype.itemsize * 8
    served: dict[str, tuple[list[str], str]] = {}
    groups = []
    fixed = _baseline(linears, rules) if rules.fixed is not None else {}
    for name, layers in linears.groups.items():
        if name == linears.head and rules.lm_head == "excluded":
            continue
        modules = tuple(dict.fromkeys(layer.name for layer in layers))
        space = rules.space_of(modules)
        own = all_layers if space is None else space.formats
        wanted = [candidate for candidate in formats if candidate.name in own]
        if rules.leaves_out(modules) or (name == linears.head and (linears.tied or rules.lm_head == "counted")):
            wanted, space = [], None
        elif space is None and modules[0] in fixed:
            wanted = [fixed[modules[0]]]
        costs = _fitting(layers, wanted, linears.dtype)
        for candidate in (candidate for candidate in wanted if candidate.name in costs):
            for layer in layers:
                found, scheme = serving(candidate, layer, gpu, linears.dtype, head=name == linears.head)
                known = served.setdefault(candidate.name, ([], scheme))[0]
                known += [backend for backend in found if backend not in known]
        must = (space is not None and not space.unquantized) or (wanted and wanted[0].name == BASELINE)
        if must and not costs:
            names = ", ".join(candidate.name for candidate in wanted)
            raise ModelOptExtError.at("--recipe", name, "a format whose blocks divide the layer", names)
        if not must:
            costs[UNQUANTIZED] = sum(layer.weights for layer in layers) * bits
        groups.append(_group(name, layers, costs, rules.weight_of(modules)))
    described = [*formats, *list(fixed.values())[:1]]
    for candidate in described:
        if candidate.name not in served:
            raise ModelOptExtError.at("--formats", candidate.name, "a format whose blocks divide some layer", "none")
    rows = tuple(
        Format(
            name=candidate.name,
            algo=candidate.scheme.algo,
            group_size=candidate.scheme.weight.group_size,
            bits=candidate.scheme.weight.bits_per_weight(),
            algorithm=str(candidate.algorithm["method"]),
            served_by=tuple(served[candidate.name][0]),
            served_as=served[candidate.name][1],
        )
        for candidate in described
    )
    return rows, tuple(groups), {candidate.name: candidate.scheme for candidate in described}


def _baseline(linears: Linears, rules: Rules) -> dict[str, FormatCandidate]:
    """Return the format of each module that the rules quantize without a choice, by its name.

    Raises:
        ModelOptExtError: several formats, which ModelOpt's search takes for one, or a quantized module that is none of the
            model's linear layers and experts.
    """
    assert rules.fixed is not None, "asked for rules with a baseline"
    known = {layer.name for layers in linears.groups.values() for layer in layers}
    searched = {
        layer.name
        for layers in linears.groups.values()
        for layer in layers
        if rules.space_of([layer.name for layer in layers]) is not None
    }
    found = applied_formats(linears.model, BASELINE, rules.fixed)
    for name in found:
        if name not in known:
            raise ModelOptExtError.at("--recipe", f"quantize: {name}", "a linear layer or experts", "another module")
    found = {name: candidate for name, candidate in found.items() if name not in searched}
    schemes = {candidate.scheme for candidate in found.values()}
    if len(schemes) > 1:
        algos = ", ".join(sorted({scheme.algo for scheme in schemes}))
        raise ModelOptExtError.at("--recipe", "quantize", "one format of all layers that are not searched over", algos)
    return found


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


def _group(name: str, layers: tuple[Layer, ...], costs: dict[str, int], weight: float) -> Group:
    candidates = {fmt: Candidate(cost=cost, score=None) for fmt, cost in costs.items()}
    return Group(name=name, layers=layers, excluded=costs.keys() == {UNQUANTIZED}, candidates=candidates, weight=weight)


def model_digest(folder: Path) -> str:
    """Return the SHA-256 over a model's configuration and weights."""
    return folder_digest(folder, ("config.json", "*.safetensors"))

"""The rule about activation scales that are missing, or not usable, because calibration sent no token to an expert."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from sglang_modelopt_ext.checkpoint.experts import EXPERT_PROJECTIONS
from sglang_modelopt_ext.checkpoint.leftovers import ServedLayers
from sglang_modelopt_ext.checkpoint.names import EXPERT, FUSED_SHARDS
from sglang_modelopt_ext.checkpoint.quant_config import text_config
from sglang_modelopt_ext.checkpoint.tensors import StoredTensor, read_tensors
from sglang_modelopt_ext.workflow.repair.working_copy import Step, WorkingCopy, quantized_modules
from sglang_modelopt_kernels.formats import ACTIVATION_FORMATS

SCALES = frozenset(
    spec.name for activation in ACTIVATION_FORMATS.values() for spec in activation.tensors if spec.is_scalar
)
"""The stored tensors that hold one scale for a layer's input."""

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Input:
    """Layers that read inputs of one kind: the same input, or for experts the inputs of all experts of a layer.

    Attributes:
        name: of the module around them.
        what: they are, for people.
        modules: their names.
        same: groups of them that read the very same input.
    """

    name: str
    what: str
    modules: tuple[str, ...]
    same: tuple[tuple[str, ...], ...]


def fill_scales(copy: WorkingCopy) -> Iterator[Step]:
    """Give every layer the input scale that it lacks, from layers whose input is the same or of the same kind.

    1. Layers that SGLang fuses (``q_proj``, ``k_proj``, ``v_proj``; ``gate_proj``, ``up_proj``) read the same input: the largest
       scale of the others.
    2. An expert reads what the others of its layer read, other tokens of it: the largest scale of the same projections of
       all experts that were calibrated. ModelOpt does the same where it sees the experts together
       (``set_expert_quantizer_amax``). It is large enough for every input that calibration saw.

    Where no layer of a kind has a usable scale there is nothing to take one from, and the reader's error stands.
    """
    config, tensors = copy.config(), copy.headers()
    served = ServedLayers.of(text_config(copy.folder))
    for name in sorted(SCALES):
        for group in _inputs(tensors):
            if not served.leaves_out(group.modules[0]) and config.layer(group.modules[0], stored=True) is not None:
                yield from _fill(copy, tensors, group, name)


def _inputs(tensors: Mapping[str, StoredTensor]) -> Iterator[Input]:
    """Yield the groups of quantized layers with inputs of one kind."""
    modules = quantized_modules(tensors)
    experts: dict[str, dict[str, dict[int, str]]] = {}
    for module in modules:
        found = EXPERT.fullmatch(module)
        if found:
            experts.setdefault(found["layer"], {}).setdefault(found["projection"], {})[int(found["number"])] = module
    for layer, projections in sorted(experts.items()):
        for gate, up, down in EXPERT_PROJECTIONS:
            if gate in projections or down in projections:
                pairs = [projections.get(name, {}) for name in (gate, up)]
                numbers = sorted({number for found in pairs for number in found})
                same = tuple(tuple(found[number] for found in pairs if number in found) for number in numbers)
                members = tuple(module for group in same for module in group)
                if members:
                    yield Input(layer, f"{gate} and {up}", members, same)
                alone = tuple(projections.get(down, {})[number] for number in sorted(projections.get(down, {})))
                if alone:
                    yield Input(layer, down, alone, tuple((module,) for module in alone))
    for shards in FUSED_SHARDS.values():
        owners = {module.removesuffix(shard) for module in modules for shard in shards if module.endswith("." + shard)}
        for owner in sorted(owners):
            members = tuple(owner + shard for shard in shards if owner + shard in modules)
            if len(members) > 1 and EXPERT.fullmatch(members[0]) is None:
                yield Input(owner.rstrip("."), " and ".join(shards), members, (members,))


def _fill(copy: WorkingCopy, tensors: Mapping[str, StoredTensor], group: Input, name: str) -> Iterator[Step]:
    stored = [tensors[f"{module}.{name}"] for module in group.modules if f"{module}.{name}" in tensors]
    found = {tensor.name: float(value.reshape(-1)[0]) for tensor, value in read_tensors(stored) if value.numel() == 1}
    usable = {key: value for key, value in found.items() if math.isfinite(value) and value >= _TINY}
    lacking = [module for module in group.modules if f"{module}.{name}" not in usable]
    if not lacking or not usable:
        return
    dtype = tensors[next(iter(usable))].dtype
    for module in lacking:
        beside = next(members for members in group.same if module in members)
        near = [usable[f"{other}.{name}"] for other in beside if f"{other}.{name}" in usable]
        rule = "same-input" if near else "other-experts"
        value = max(near or usable.values())
        target = f"{module}.{name}"
        if near:
            source = "of the layers that read the same input"
        else:
            source = f"of {len(usable)} calibrated layers {group.what} of {group.name}"
        if target in tensors:
            copy.replaced[target] = torch.full(tensors[target].shape, value, dtype=dtype)
            change = f"{value:.6g} instead of {found.get(target, math.nan):.6g}: the largest {source}"
            file = tensors[target].file.name
        else:
            copy.added[target] = torch.tensor(value, dtype=dtype)
            change, file = f"{value:.6g} added: the largest {source}", copy.added_file
        yield Step(rule=rule, file=file, subject=target, change=change)

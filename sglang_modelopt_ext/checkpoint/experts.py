"""The experts of a mixture in a checkpoint: one linear layer for each expert and projection.

ModelOpt unpacks fused experts when it exports. Their names are ``<experts>.<number>.<projection>``, with Qwen's names of the
projections (``gate_proj``, ``up_proj``, ``down_proj``) or Mixtral's (``w1``, ``w3``, ``w2``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sglang_modelopt_ext.checkpoint.linears import QuantizedLinear
from sglang_modelopt_ext.checkpoint.names import EXPERT, canonical_name
from sglang_modelopt_ext.checkpoint.tensors import StoredTensor
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.base import LayerScheme

EXPERT_PROJECTIONS: tuple[tuple[str, str, str], ...] = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""The names of gate, up and down, in each naming scheme."""


@dataclass(frozen=True)
class ExpertLayer:
    """All experts of one layer, checked to have equal schemes, tensors and sizes.

    Attributes:
        name: their common name in the checkpoint, such as ``model.layers.0.mlp.experts``.
        projections: the names of gate, up and down.
        count: the number of experts.
        gate_up: the scheme of every expert's gate and up.
        down: the scheme of every expert's down.
        hidden: input features of gate and up, and output features of down.
        intermediate: output features of gate and of up, and input features of down.
    """

    name: str
    projections: tuple[str, str, str]
    count: int
    gate_up: LayerScheme
    down: LayerScheme
    hidden: int
    intermediate: int


def is_expert(module: str) -> bool:
    """Return whether ``module`` is the name of a projection of an expert."""
    return EXPERT.fullmatch(module) is not None


def read_experts(linears: Mapping[str, QuantizedLinear], tensors: Mapping[str, StoredTensor]) -> dict[str, ExpertLayer]:
    """Return the quantized expert layers of a checkpoint, by :func:`canonical_name`.

    Args:
        linears: the checkpoint's quantized linear layers, by canonical name.
        tensors: the headers of all of its tensors, by name.

    Raises:
        ModelOptExtError: an expert or a projection is missing or unquantized, or experts of a layer differ in scheme, tensors or
            sizes.
    """
    found: dict[str, dict[int, dict[str, QuantizedLinear]]] = {}
    for linear in linears.values():
        match = EXPERT.fullmatch(linear.name)
        if match:
            experts = found.setdefault(match["layer"], {})
            experts.setdefault(int(match["number"]), {})[match["projection"]] = linear
    numbers = _stored_numbers(tensors) if found else {}
    layers = {
        canonical_name(name): _describe(name, experts, max(numbers[name]) + 1, tensors)
        for name, experts in found.items()
    }
    _check_counts(list(layers.values()), found)
    return layers


def _describe(
    name: str, experts: Mapping[int, Mapping[str, QuantizedLinear]], count: int, tensors: Mapping[str, StoredTensor]
) -> ExpertLayer:
    first_number = min(experts)
    some = next(iter(experts[first_number].values()))
    file = next(iter(some.stored.values())).file
    used = {projection for expert in experts.values() for projection in expert}
    projections = next((names for names in EXPERT_PROJECTIONS if used <= set(names)), None)
    if projections is None:
        known = " or ".join(", ".join(names) for names in EXPERT_PROJECTIONS)
        raise ModelOptExtError.at(file, f"{name}.{first_number}", f"experts with {known}", ", ".join(sorted(used)))
    for number in range(count):
        for projection in projections:
            module = f"{name}.{number}.{projection}"
            if projection not in experts.get(number, {}):
                kept = f"{module}.weight" in tensors
                raise ModelOptExtError.at(
                    tensors[f"{module}.weight"].file if kept else file,
                    f"{module}.weight",
                    f"{some.scheme.algo}, as {some.name}" if kept else f"an expert beside {some.name}",
                    "unquantized" if kept else "none",
                )
    gate, up, down = ([experts[number][projection] for number in sorted(experts)] for projection in projections)
    for group in ((*gate, *up), tuple(down)):
        for linear in group:
            _check_same(group[0], linear)
    if (down[0].n, down[0].k) != (gate[0].k, gate[0].n):
        raise ModelOptExtError.at(
            file, f"{down[0].name}.weight", f"N, K = {[gate[0].k, gate[0].n]}", [down[0].n, down[0].k]
        )
    return ExpertLayer(name, projections, len(experts), gate[0].scheme, down[0].scheme, gate[0].k, gate[0].n)


def _stored_numbers(tensors: Iterable[str]) -> dict[str, set[int]]:
    """Return, by layer, the numbers of the experts that have any tensor, quantized or not."""
    numbers: dict[str, set[int]] = {}
    for tensor in tensors:
        match = EXPERT.fullmatch(tensor.rpartition(".")[0])
        if match:
            numbers.setdefault(match["layer"], set()).add(int(match["number"]))
    return numbers


def _check_same(first: QuantizedLinear, linear: QuantizedLinear) -> None:
    """Raise ModelOptExtError unless two experts can be multiplied in one product: equal schemes, tensors and sizes, no bias."""
    file = next(iter(linear.stored.values())).file
    if "bias" in linear.stored:
        raise ModelOptExtError.at(file, f"{linear.name}.bias", "experts without a bias", "one")
    differ = sorted(set(first.stored) ^ set(linear.stored))
    # A tensor that only one of them stores may decide its scheme, so it is named before the schemes are compared.
    if differ and linear.scheme.algo == first.scheme.algo:
        owner, other = (first, linear) if differ[0] in first.stored else (linear, first)
        raise ModelOptExtError.at(file, f"{other.name}.{differ[0]}", f"a tensor, as {owner.name} has", "none")
    if linear.scheme != first.scheme:
        raise ModelOptExtError.at(
            file, linear.name, f"{first.scheme.describe()}, as {first.name}", linear.scheme.describe()
        )
    if (linear.n, linear.k) != (first.n, first.k):
        raise ModelOptExtError.at(
            file,
            f"{linear.name}.weight",
            f"N, K = {[first.n, first.k]}, as {first.name}",
            [linear.n, linear.k],
        )


def _check_counts(layers: list[ExpertLayer], found: Mapping[str, Mapping[int, Mapping[str, QuantizedLinear]]]) -> None:
    """Raise ModelOptExtError unless all layers have equally many experts, as all known models do."""
    for layer in layers[1:]:
        if layer.count != layers[0].count:
            linear = next(iter(found[layer.name][0].values()))
            raise ModelOptExtError.at(
                next(iter(linear.stored.values())).file,
                layer.name,
                f"{layers[0].count} experts, as {layers[0].name}",
                layer.count,
            )

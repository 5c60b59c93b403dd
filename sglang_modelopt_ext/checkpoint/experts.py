"""The experts of a mixture in a checkpoint: one linear layer for each expert and projection, or packed (:mod:`.packed`).

ModelOpt unpacks most fused experts when it exports. Their names are ``<experts>.<number>.<projection>``, with Qwen's names of the
projections (``gate_proj``, ``up_proj``, ``down_proj``) or Mixtral's (``w1``, ``w3``, ``w2``). Experts without a gate, those of
Nemotron, have ``up_proj`` and ``down_proj``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sglang_modelopt_ext.checkpoint.linears import QuantizedLinear
from sglang_modelopt_ext.checkpoint.names import EXPERT, canonical_name
from sglang_modelopt_ext.checkpoint.packed import PackedExperts
from sglang_modelopt_ext.checkpoint.tensors import StoredTensor
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.base import BIAS, LayerScheme

EXPERT_PROJECTIONS: tuple[tuple[str, str, str], ...] = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""The names of gate, up and down, in each naming scheme."""

SHARED_EXPERTS = ("shared_experts", "shared_expert")
"""The names of the expert that every token goes to, beside ``experts``."""

UNGATED_PROJECTIONS: tuple[tuple[str, str], ...] = (("up_proj", "down_proj"),)
"""The names of up and down of experts without a gate."""


def projections_of(gated: bool) -> tuple[tuple[str, ...], ...]:
    """Return the names of the projections of experts with or without a gate, in each naming scheme, down last."""
    return EXPERT_PROJECTIONS if gated else UNGATED_PROJECTIONS


@dataclass(frozen=True)
class ExpertLayer:
    """All experts of one layer, checked to have equal schemes, tensors and sizes.

    Attributes:
        name: their common name in the checkpoint, such as ``model.layers.0.mlp.experts``.
        projections: the names of gate, up and down, or of up and down; of packed experts those of the unpacked ones.
        count: the number of experts.
        gate_up: the scheme of every expert's gate and up; of up where there is no gate.
        down: the scheme of every expert's down.
        hidden: input features of gate and up, and output features of down.
        intermediate: output features of gate and of up, and input features of down.
        bias: whether every projection of every expert has a bias.
        packed: their tensors where all experts share them; None where each has its own.
    """

    name: str
    projections: tuple[str, ...]
    count: int
    gate_up: LayerScheme
    down: LayerScheme
    hidden: int
    intermediate: int
    bias: bool = False
    packed: PackedExperts | None = None

    @property
    def gated(self) -> bool:
        """Whether the experts have a gate."""
        return len(self.projections) == len(EXPERT_PROJECTIONS[0])


def is_expert(module: str) -> bool:
    """Return whether ``module`` is the name of a projection of an expert."""
    return EXPERT.fullmatch(module) is not None


def packed_layer(packed: PackedExperts) -> ExpertLayer:
    """Return the description of a layer of packed experts. Raises ModelOptExtError where only one projection has a bias."""
    gate_up, down = packed.gate_up, packed.down
    for projection in packed.projections:
        _check_bias(projection.one)
    with_bias = [BIAS.name in projection.one.stored for projection in packed.projections]
    if with_bias[0] != with_bias[1]:
        without = gate_up if with_bias[1] else down
        stored = without.stored["weight"]
        raise ModelOptExtError.at(stored.file, f"{stored.name}_bias", "a bias of both projections, or of none", "none")
    return ExpertLayer(
        packed.name,
        EXPERT_PROJECTIONS[0],
        gate_up.count,
        gate_up.one.scheme,
        down.one.scheme,
        gate_up.one.k,
        down.one.k,
        with_bias[0],
        packed,
    )


def read_experts(linears: Mapping[str, QuantizedLinear], tensors: Mapping[str, StoredTensor]) -> dict[str, ExpertLayer]:
    """Return the quantized expert layers of a checkpoint that are stored one by one, by :func:`canonical_name`.

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
    used |= _unquantized(name, experts, tensors)
    known_names = (*EXPERT_PROJECTIONS, *UNGATED_PROJECTIONS)
    # The names without a gate are a part of those with one, and are right where no expert has a gate.
    projections = next((names for names in reversed(known_names) if used <= set(names)), None)
    if projections is None:
        known = " or ".join(", ".join(names) for names in known_names)
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
    numbers = sorted(experts)
    first = [experts[number][projection] for projection in projections[:-1] for number in numbers]
    down = [experts[number][projections[-1]] for number in numbers]
    for group in (first, down):
        for linear in group:
            _check_same(group[0], linear)
            _check_bias(linear)
    if (down[0].n, down[0].k) != (first[0].k, first[0].n):
        raise ModelOptExtError.at(
            file, f"{down[0].name}.weight", f"N, K = {[first[0].k, first[0].n]}", [down[0].n, down[0].k]
        )
    if (BIAS.name in first[0].stored) != (BIAS.name in down[0].stored):
        without = down[0] if BIAS.name in first[0].stored else first[0]
        raise ModelOptExtError.at(file, f"{without.name}.bias", "a bias of every projection, or of none", "none")
    return ExpertLayer(
        name,
        projections,
        len(experts),
        first[0].scheme,
        down[0].scheme,
        first[0].k,
        first[0].n,
        BIAS.name in down[0].stored,
    )


def _unquantized(name: str, experts: Mapping[int, object], tensors: Mapping[str, StoredTensor]) -> set[str]:
    """Return the known projections of these experts that have a weight, quantized or not."""
    known = {projection for names in EXPERT_PROJECTIONS for projection in names}
    return {part for part in known if any(f"{name}.{number}.{part}.weight" in tensors for number in experts)}


def check_shared(layer: ExpertLayer, linears: Mapping[str, QuantizedLinear]) -> None:
    """Raise ModelOptExtError unless the shared expert beside a layer's experts can be served as one of them.

    Args:
        layer: the experts.
        linears: the checkpoint's quantized linear layers, by canonical name.
    """
    if layer.packed is not None or not layer.gated:
        expected = "experts with a gate, stored one by one, beside a fused shared expert"
        raise ModelOptExtError.at("checkpoint", layer.name, expected, "others")
    block = layer.name.removesuffix("experts")
    for names in SHARED_EXPERTS:
        for projection, own in zip(EXPERT_PROJECTIONS[0], layer.projections, strict=True):
            shared = linears.get(canonical_name(f"{block}{names}.{projection}"))
            first = linears[canonical_name(f"{layer.name}.0.{own}")]
            if shared is None:
                break
            _check_same(first, shared)
        else:
            return
    expected = f"{layer.down.algo} projections, as {layer.name} has, or --disable-shared-experts-fusion"
    raise ModelOptExtError.at("checkpoint", f"{block}{SHARED_EXPERTS[0]}", expected, "unquantized ones, or none")


def _stored_numbers(tensors: Iterable[str]) -> dict[str, set[int]]:
    """Return, by layer, the numbers of the experts that have any tensor, quantized or not."""
    numbers: dict[str, set[int]] = {}
    for tensor in tensors:
        match = EXPERT.fullmatch(tensor.rpartition(".")[0])
        if match:
            numbers.setdefault(match["layer"], set()).add(int(match["number"]))
    return numbers


def _check_bias(linear: QuantizedLinear) -> None:
    """Raise ModelOptExtError where a bias does not have an entry for each output feature."""
    bias = linear.stored.get(BIAS.name)
    if bias is not None and bias.shape != (linear.n,):
        raise ModelOptExtError.at(bias.file, bias.name, f"shape {[linear.n]}", list(bias.shape))


def _check_same(first: QuantizedLinear, linear: QuantizedLinear) -> None:
    """Raise ModelOptExtError unless two experts can be multiplied in one product: equal schemes, tensors and sizes."""
    file = next(iter(linear.stored.values())).file
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

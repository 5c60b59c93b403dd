"""The experts of a mixture in a checkpoint: one linear layer for each expert and projection, or packed (:mod:`.packed`).

ModelOpt unpacks most fused experts when it exports. Their names are ``<experts>.<number>.<projection>``, with Qwen's names of the
projections (``gate_proj``, ``up_proj``, ``down_proj``) or Mixtral's (``w1``, ``w3``, ``w2``). Experts without a gate, those of
Nemotron, have ``up_proj`` and ``down_proj``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sglang_modelopt_ext.checkpoint.linears import QuantizedLinear
from sglang_modelopt_ext.checkpoint.names import EXPERT, canonical_name
from sglang_modelopt_ext.checkpoint.packed import PackedExperts
from sglang_modelopt_ext.checkpoint.tensors import StoredTensor
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.base import BIAS, UNQUANTIZED, LayerScheme

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
class ExpertSet:
    """Experts of one layer whose product has one scheme.

    Attributes:
        scheme: of the product, :data:`UNQUANTIZED` where the weights are stored as they are.
        numbers: of the experts in the model; None for all of a layer's.
    """

    scheme: LayerScheme
    numbers: tuple[int, ...] | None = None

    def count(self, experts: int) -> int:
        """Return how many of a layer's ``experts`` are in it."""
        return experts if self.numbers is None else len(self.numbers)


@dataclass(frozen=True)
class ExpertLayer:
    """All experts of one layer, checked to have equal sizes, and under one algorithm equal schemes and tensors.

    Attributes:
        name: their common name in the checkpoint, such as ``model.layers.0.mlp.experts``.
        projections: the names of gate, up and down, or of up and down; of packed experts those of the unpacked ones.
        count: the number of experts.
        gate_up: the experts by the scheme of their gate and up, of up where there is no gate; unquantized ones last.
        down: the experts by the scheme of their down, unquantized ones last.
        hidden: input features of gate and up, and output features of down.
        intermediate: output features of gate and of up, and input features of down.
        bias: whether every projection of every expert has a bias.
        packed: their tensors where all experts share them; None where each has its own.
    """

    name: str
    projections: tuple[str, ...]
    count: int
    gate_up: tuple[ExpertSet, ...]
    down: tuple[ExpertSet, ...]
    hidden: int
    intermediate: int
    bias: bool = False
    packed: PackedExperts | None = None

    @property
    def gated(self) -> bool:
        """Whether the experts have a gate."""
        return len(self.projections) == len(EXPERT_PROJECTIONS[0])

    @property
    def is_uniform(self) -> bool:
        """Whether each product has one scheme for all experts."""
        return len(self.gate_up) == len(self.down) == 1

    @property
    def schemes(self) -> tuple[LayerScheme, ...]:
        """The schemes of its products, each once, gate and up first."""
        return tuple(dict.fromkeys(one.scheme for one in (*self.gate_up, *self.down)))


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
        (ExpertSet(gate_up.one.scheme),),
        (ExpertSet(down.one.scheme),),
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
        ModelOptExtError: an expert or a projection is missing; an expert's gate and up, or experts under one algorithm, differ in
            scheme or tensors; or experts differ in sizes.
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
    members = {
        (number, projection): experts.get(number, {}).get(projection)
        or _stored_whole(f"{name}.{number}.{projection}", some, tensors)
        for number in range(count)
        for projection in projections
    }
    first = [[members[number, projection] for projection in projections[:-1]] for number in range(count)]
    down = [[members[number, projections[-1]]] for number in range(count)]
    gate_up_sets, down_sets = _sets(first), _sets(down)
    one, last = first[0][0], down[0][0]
    if (last.n, last.k) != (one.k, one.n):
        raise ModelOptExtError.at(file, f"{last.name}.weight", f"N, K = {[one.k, one.n]}", [last.n, last.k])
    with_bias = {BIAS.name in member.stored for member in members.values()}
    if len(with_bias) > 1:
        without = next(member for member in members.values() if BIAS.name not in member.stored)
        raise ModelOptExtError.at(file, f"{without.name}.bias", "a bias of every projection, or of none", "none")
    return ExpertLayer(name, projections, count, gate_up_sets, down_sets, one.k, one.n, True in with_bias)


def _stored_whole(module: str, beside: QuantizedLinear, tensors: Mapping[str, StoredTensor]) -> QuantizedLinear:
    """Return the description of an expert's projection that is stored unquantized beside quantized ones.

    Raises:
        ModelOptExtError: there is none, or it is no matrix of floating-point numbers.
    """
    file = next(iter(beside.stored.values())).file
    weight = tensors.get(f"{module}.weight")
    if weight is None:
        raise ModelOptExtError.at(file, f"{module}.weight", f"an expert beside {beside.name}", "none")
    (spec,) = UNQUANTIZED.tensors
    if weight.dtype not in spec.dtypes or len(weight.shape) != 2:
        expected = f"{beside.scheme.algo}, as {beside.name}, or an unquantized matrix"
        raise ModelOptExtError.at(weight.file, weight.name, expected, f"{weight.dtype} {list(weight.shape)}")
    stored = {name: tensors[f"{module}.{name}"] for name in ("weight", BIAS.name) if f"{module}.{name}" in tensors}
    return QuantizedLinear(module, UNQUANTIZED, weight.shape[0], weight.shape[1], stored)


def _sets(experts: Sequence[Sequence[QuantizedLinear]]) -> tuple[ExpertSet, ...]:
    """Return a layer's experts by the scheme of one product, from the shards of each; unquantized ones last.

    Raises:
        ModelOptExtError: shards of an expert differ in their algorithm, experts differ in sizes, or those under one algorithm in
            their scheme or tensors.
    """
    found: dict[str, list[int]] = {}
    for number, shards in enumerate(experts):
        for linear in shards:
            _check_bias(linear)
            if linear.scheme.algo != shards[0].scheme.algo:
                stored = linear.stored["weight"]
                expected = f"{shards[0].scheme.algo}, as {shards[0].name}"
                raise ModelOptExtError.at(stored.file, stored.name, expected, linear.scheme.algo)
            _check_sizes(experts[0][0], linear)
        found.setdefault(shards[0].scheme.algo, []).append(number)
    for numbers in found.values():
        for number in numbers:
            for linear in experts[number]:
                _check_same(experts[numbers[0]][0], linear)
    if len(found) == 1:
        return (ExpertSet(experts[0][0].scheme),)
    ordered = sorted(found, key=lambda algo: algo == UNQUANTIZED.algo)
    return tuple(ExpertSet(experts[found[algo][0]][0].scheme, tuple(found[algo])) for algo in ordered)


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
    if layer.packed is not None or not layer.gated or not layer.is_uniform:
        expected = "experts with a gate, stored one by one, all in one format, beside a fused shared expert"
        raise ModelOptExtError.at("checkpoint", layer.name, expected, "others")
    block = layer.name.removesuffix("experts")
    for names in SHARED_EXPERTS:
        for projection, own in zip(EXPERT_PROJECTIONS[0], layer.projections, strict=True):
            shared = linears.get(canonical_name(f"{block}{names}.{projection}"))
            first = linears[canonical_name(f"{layer.name}.0.{own}")]
            if shared is None:
                break
            _check_same(first, shared)
            _check_sizes(first, shared)
        else:
            return
    expected = f"{layer.down[0].scheme.algo} projections, as {layer.name} has, or --disable-shared-experts-fusion"
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


def _check_sizes(first: QuantizedLinear, linear: QuantizedLinear) -> None:
    """Raise ModelOptExtError unless two experts have equal sizes."""
    if (linear.n, linear.k) != (first.n, first.k):
        raise ModelOptExtError.at(
            next(iter(linear.stored.values())).file,
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

"""Experts that a checkpoint stores packed: one tensor for all experts of a layer, as ModelOpt exports Llama 4 and gpt-oss.

The tensors are ``<experts>.gate_up_proj`` and ``<experts>.down_proj``, ``[E, ...]``, and ``<projection>_<name>`` for the others
of a linear layer (``gate_up_proj_weight_scale``, ``down_proj_bias``). Two layouts are read:

- as the models have their weights, ``[E, K, N]``: weights and block scales along N and K are transposed, and what is packed is
  packed along K, the first of the two;
- as linear layers have theirs, ``[E, N, K]``.

Scales of whole tensors are stored once for all experts, or one for each. Whether gate and up alternate in N (gpt-oss) or lie one
behind the other (Llama 4) is a property of the model, which the tensors do not show.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from sglang_modelopt_ext.checkpoint.linears import QuantizedLinear
from sglang_modelopt_ext.checkpoint.quant_config import LayerQuantization, QuantConfig
from sglang_modelopt_ext.checkpoint.tensors import StoredTensor
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.schemes.base import BIAS
from sglang_modelopt_ext.schemes.table import find_scheme
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from sglang_modelopt_kernels.formats.base import TensorSpec

GATE_UP, DOWN = "gate_up_proj", "down_proj"
_TENSOR = re.compile(rf"(?P<layer>.+\.experts)\.(?P<projection>{GATE_UP}|{DOWN})(?:_(?P<name>\w+))?")

Describe = Callable[[str, Mapping[str, StoredTensor], LayerQuantization], QuantizedLinear]
"""Describes one linear layer from its name, headers by spec name and entry in the configuration; raises ModelOptExtError."""


@dataclass(frozen=True)
class PackedProjection:
    """One projection of all experts of a layer.

    Attributes:
        one: the description of one expert's linear layer; its headers have the names of the packed tensors, and its own shapes.
        stored: the headers of the packed tensors by spec name, of those too that ``one`` does not use.
        count: the number of experts.
        transposed: whether weights and block scales are ``[E, K, N]``.
    """

    one: QuantizedLinear
    stored: Mapping[str, StoredTensor]
    count: int
    transposed: bool

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The specs of the tensors that are used by spec name, that of the bias included."""
        return {spec.name: spec for spec in (*self.one.scheme.tensors, BIAS) if spec.name in self.one.stored}

    def of_expert(self, name: str, tensor: torch.Tensor, expert: int) -> torch.Tensor:
        """Return one expert's tensor, as a linear layer stores it, from a packed one.

        Args:
            name: its spec name.
            tensor: the packed tensor.
            expert: the number of the expert.
        """
        spec = self.specs[name]
        if spec.is_scalar:
            return tensor.reshape(-1)[expert if tensor.numel() == self.count else 0]
        if tensor.shape == (self.count,) and len(spec.dims) == 1 and self.one.n != self.count:
            return tensor[expert].expand(spec.shape(self.one.n, self.one.k))  # one scale for each expert
        if tensor.dim() == len(spec.dims):
            return tensor  # one for all experts
        return tensor[expert].T if self.transposed and len(spec.dims) == 2 else tensor[expert]


@dataclass(frozen=True)
class PackedExperts:
    """The packed experts of one layer.

    Attributes:
        name: their module's name in the checkpoint, such as ``model.layers.0.mlp.experts``.
        gate_up: gate and up, whose description has the N of both.
        down: the down projection.
    """

    name: str
    gate_up: PackedProjection
    down: PackedProjection

    @property
    def projections(self) -> tuple[PackedProjection, PackedProjection]:
        """Both projections."""
        return self.gate_up, self.down

    def tensors(self) -> Iterator[tuple[str, PackedProjection, str]]:
        """Yield the name of each stored tensor, its projection and its spec name."""
        for projection in self.projections:
            for name, stored in projection.stored.items():
                yield stored.name, projection, name


def part_along_n(spec: TensorSpec, tensor: torch.Tensor, part: int, parts: int, alternate: bool) -> torch.Tensor:
    """Return one of the parts that a linear layer's tensor has along N, a view.

    Args:
        spec: the tensor's spec; one without N belongs to all parts alike.
        tensor: the tensor of all parts, as a linear layer stores it.
        part: the index of the part.
        parts: their number.
        alternate: whether the rows of the parts alternate, instead of one part lying behind the other.

    Raises:
        ValueError: a block or byte holds rows of several parts.
    """
    axis = spec.dim_of("N")
    if axis is None or parts == 1:
        return tensor
    rows = tensor.shape[axis]
    if alternate and spec.dims[axis].per > 1:
        raise ValueError(
            f"rows of gate and up alternate, and {spec.name} has one entry for {spec.dims[axis].per} of them"
        )
    if rows % parts:
        raise ValueError(f"{spec.name} has {rows} entries along N, which cannot be split into gate and up")
    if alternate:
        return tensor[(slice(None),) * axis + (slice(part, None, parts),)]
    return tensor.narrow(axis, part * (rows // parts), rows // parts)


def packed_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, dict[str, dict[str, StoredTensor]]]:
    """Return the headers of packed quantized experts as ``[layer][projection][spec name]``; none of unquantized ones."""
    found: dict[str, dict[str, dict[str, StoredTensor]]] = {}
    for tensor in tensors.values():
        match = _TENSOR.fullmatch(tensor.name)
        if match:
            projections = found.setdefault(match["layer"], {})
            projections.setdefault(match["projection"], {})[match["name"] or "weight"] = tensor
    return {layer: parts for layer, parts in found.items() if any(map(_is_quantized, parts.values()))}


def _is_quantized(stored: Mapping[str, StoredTensor]) -> bool:
    one_byte = "weight" in stored and stored["weight"].dtype.itemsize == 1
    return one_byte or "weight_scale" in stored


def declared(config: QuantConfig, layer: str, projection: str) -> LayerQuantization | None:
    """Return the declared quantization of a packed projection, None when it is declared as not quantized.

    It may be listed by its own name, or as ModelOpt lists experts, by that of the layer.
    """
    name = f"{layer}.{projection}"
    if config.is_excluded(name):
        return None
    return config.layer(name, stored=True) or config.layer(f"{layer}.0.{DOWN}", stored=True)


def read_packed(
    name: str, stored: Mapping[str, Mapping[str, StoredTensor]], config: QuantConfig, describe: Describe
) -> PackedExperts:
    """Return the description of one layer's packed experts.

    Args:
        name: the layer's name in the checkpoint.
        stored: its headers as ``[projection][spec name]``.
        config: the checkpoint's configuration.
        describe: describes one expert's linear layer.

    Raises:
        ModelOptExtError: a projection is missing or unquantized, a tensor's name, shape or dtype differs from its scheme's, or the
            codes are packed, or share scales, along N.
    """
    some = next(tensor for part in stored.values() for tensor in part.values())
    quantizations = []
    for projection in (GATE_UP, DOWN):
        part = stored.get(projection, {})
        weight = part.get("weight")
        if weight is None or not _is_quantized(part):
            expected, got = f"a quantized tensor beside {some.name}", "none" if weight is None else "unquantized"
            raise ModelOptExtError.at(some.file, f"{name}.{projection}", expected, got)
        quantization = declared(config, name, projection)
        if quantization is None:
            expected = f"no quantized tensors: {config.file.name} says the layer is not quantized"
            raise ModelOptExtError.at(weight.file, weight.name, expected, "one")
        quantizations.append(quantization)
    gate_up, down = (stored[projection]["weight"] for projection in (GATE_UP, DOWN))
    for weight in (gate_up, down):
        if len(weight.shape) != 3 or 0 in weight.shape or weight.shape[0] != gate_up.shape[0]:
            expected = f"3 dimensions, the first of {gate_up.shape[0]} experts"
            raise ModelOptExtError.at(weight.file, weight.name, expected, list(weight.shape))
    specs = [_weight_specs(quantization, config) for quantization in quantizations]
    for quantization, weight in zip(quantizations, (gate_up, down), strict=True):
        if any(len(spec.dims) > 2 for spec in _weight_specs(quantization, config).values()):
            expected = (
                "a recipe without blocks of several rows, whose scales ModelOpt does not export in the weights' order"
            )
            raise ModelOptExtError.at(weight.file, weight.name, expected, quantization.algo)
    transposed = _is_transposed(gate_up, down, *(spec["weight"] for spec in specs))
    found = []
    for projection, quantization, weight_specs in zip((GATE_UP, DOWN), quantizations, specs, strict=True):
        headers = _of_one_expert(stored[projection], weight_specs, transposed)
        try:
            one = describe(f"{name}.{projection}", headers, quantization)
        except ModelOptExtError:
            scale = stored[projection].get("weight_scale")
            if scale is not None and _is_along_n(stored[projection]["weight"], scale, transposed):
                raise _along_n(scale) from None
            raise
        found.append(PackedProjection(one, stored[projection], gate_up.shape[0], transposed))
    return PackedExperts(name, *found)


def _weight_specs(quantization: LayerQuantization, config: QuantConfig) -> dict[str, TensorSpec]:
    """Return the specs of an algorithm's weights; those of all its group sizes have the same dimensions but for the blocks."""
    tensors = WEIGHT_FORMATS[find_scheme(quantization.algo, config.file).weights[0]].tensors
    return {spec.name: spec for spec in (*tensors, BIAS)}


def _is_transposed(gate_up: StoredTensor, down: StoredTensor, first: TensorSpec, second: TensorSpec) -> bool:
    """Return whether the weights are ``[E, K, N]``, by the sizes of both projections, which decide it.

    Raises:
        ModelOptExtError: they fit no layout, or one whose codes are packed along N.
    """

    def sizes(weight: StoredTensor, spec: TensorSpec, n: int, k: int) -> tuple[int, int]:
        return weight.shape[n] * spec.dims[0].per, weight.shape[k] * spec.dims[1].per

    for n, k in ((2, 1), (1, 2)):
        (n1, k1), (n2, k2) = sizes(gate_up, first, n, k), sizes(down, second, n, k)
        if (n1, k1) == (2 * k2, n2):
            return n == 2
    (k1, n1), (k2, n2) = sizes(gate_up, first, 1, 2), sizes(down, second, 1, 2)
    if (n1, k1) == (2 * k2, n2):
        raise _along_n(gate_up)
    shapes = f"{list(gate_up.shape)} and {list(down.shape)}"
    expected = "[E, K, N] or [E, N, K], K of each the N of the other, half of it where that has gate and up"
    raise ModelOptExtError.at(gate_up.file, f"{gate_up.name}, {down.name.rpartition('.')[2]}", expected, shapes)


def _of_one_expert(
    stored: Mapping[str, StoredTensor], specs: Mapping[str, TensorSpec], transposed: bool
) -> dict[str, StoredTensor]:
    """Return headers with the shapes of one expert's linear layer; a shape that fits nothing is left for the shape check."""
    weight = stored["weight"].shape
    count, n = weight[0], weight[2 if transposed else 1] * specs["weight"].dims[0].per
    headers = {}
    for name, tensor in stored.items():
        shape, spec = tensor.shape, specs.get(name)
        if shape == (count,) and spec is not None and len(spec.dims) == 1 and count != n:
            shape = spec.shape(n, 1)  # one scale for each expert, in place of one for each channel
        elif len(shape) == 3 and shape[0] == count and transposed:
            shape = (shape[2], shape[1])
        elif len(shape) > 0 and shape[0] == count:
            shape = shape[1:]
        headers[name] = dataclasses.replace(tensor, shape=shape)
    return headers


def _is_along_n(weight: StoredTensor, scale: StoredTensor, transposed: bool) -> bool:
    """Return whether scales lie along N of ``[E, K, N]`` weights: as many as rows of K, and fewer than columns of N."""
    if not transposed or len(scale.shape) != 3:
        return False
    return scale.shape[1] == weight.shape[1] and scale.shape[2] < weight.shape[2]


def _along_n(tensor: StoredTensor) -> ModelOptExtError:
    """Return the error for blocks along N, as ModelOpt 0.47 exports all but NVFP4 here, though its simulation has them along K."""
    expected = "codes and scales of blocks along K"
    return ModelOptExtError.at(tensor.file, tensor.name, expected, f"blocks along N, {list(tensor.shape)}")

"""The method of the experts of a mixture, behind SGLang's interface of fused experts.

It registers, loads and prepares tensors; :mod:`sglang_modelopt_ext.layers.mixture` computes with them. SGLang reads the names of
MoE method classes: it would load the block scales of one with "ModelOpt" in its name as scales of whole tensors. The class
therefore has another name, and its parameters have their own loader.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase

from sglang_modelopt_ext.backends.experts.fused import FusedRequest
from sglang_modelopt_ext.checkpoint.experts import ExpertLayer, ExpertSet
from sglang_modelopt_ext.checkpoint.packed import part_along_n
from sglang_modelopt_ext.env import W4A8Math
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.linear_method import fill_dummy
from sglang_modelopt_ext.integration.parameters import ExpertParameter, MixedExpertParameter
from sglang_modelopt_ext.layers.experts import ExpertPart, ExpertProduct, ExpertProducts
from sglang_modelopt_ext.layers.fused import FusedProduct
from sglang_modelopt_ext.layers.mixture import Biases, Choices, mix
from sglang_modelopt_ext.schemes.base import BIAS
from sglang_modelopt_ext.schemes.table import math_of
from sglang_modelopt_kernels.formats.base import TensorSpec
from sglang_modelopt_kernels.moe.activation import SWIGLU, Activation, Function

GATE_UP, DOWN = "w13", "w2"
"""SGLang's prefixes of expert parameters: those of gate and up, or of up without a gate, and those of down."""


def shards_of(gated: bool) -> dict[str, tuple[str, ...]]:
    """Return SGLang's ids of the shards of each product in order; up of experts without a gate has the gate's."""
    return {GATE_UP: ("w1", "w3") if gated else ("w1",), DOWN: ("w2",)}


def activation_of(config: Any, bias: bool, subject: str) -> Activation:
    """Return the activation that SGLang's configuration of a layer of experts asks for.

    Args:
        config: SGLang's ``MoeRunnerConfig``.
        bias: whether the layer has biases.
        subject: the layer's name, for errors.

    Raises:
        ModelOptExtError: it is none of :class:`Activation`.
    """
    function, gated = config.activation, bool(config.is_gated)
    known = get_args(Function)
    if function not in known:
        raise ModelOptExtError.at(subject, "activation", f"one of {', '.join(known)}", function)
    bounded: dict[str, Any] = {}
    if gated and function == "silu":
        # As SGLang's Triton runner reads the three fields.
        if config.gemm1_alpha is not None:
            bounded = {"alpha": config.gemm1_alpha, "offset": 1.0, "limit": config.gemm1_clamp_limit}
        elif config.gemm1_clamp_limit is not None:
            bounded = {"limit": config.gemm1_clamp_limit, "limits_function": True}
        elif config.swiglu_limit is not None:
            bounded = {"limit": config.swiglu_limit}
    elif any(value is not None for value in (config.gemm1_alpha, config.gemm1_clamp_limit, config.swiglu_limit)):
        expected = "none for an activation other than a gated silu"
        raise ModelOptExtError.at(subject, "gemm1_alpha, gemm1_clamp_limit, swiglu_limit", expected, "one")
    return Activation(function, gated, bias=bias, **bounded)


class ExtFusedMoEMethod(FusedMoEMethodBase):
    """SGLang's quantization method of the experts of one layer of a checkpoint.

    Args:
        gate_up: the layer's experts by the scheme of their gate and up.
        down: the layer's experts by the scheme of their down.
        where: the checkpoint's folder, for errors.
        prefix: the layer's name in SGLang's module tree, for errors.
        math: the numerics of NVFP4 weights with FP8 activations.
        stored: the checkpoint's experts, None without a checkpoint (dummy weights).
    """

    def __init__(
        self,
        gate_up: Sequence[ExpertSet],
        down: Sequence[ExpertSet],
        where: object,
        prefix: str,
        math: W4A8Math,
        stored: ExpertLayer | None,
    ) -> None:
        self.where = where
        self.prefix = prefix
        self.stored = stored
        self.math = math
        self.sets = {GATE_UP: tuple(gate_up), DOWN: tuple(down)}
        self.products: dict[str, ExpertProducts] = {}
        """The products by SGLang's prefix of their parameters, of this rank's experts; set with the parameters."""
        self.fused = FusedProduct(where, prefix)
        """The whole layer in one call, used in place of both products where it was prepared."""
        self.verified = False
        """Whether every tensor of the layer was loaded and checked; set by the strict loader."""
        self.experts = 0
        self.activation = SWIGLU
        self._alternates = False
        self._config: Any = None
        self._create: Callable[[], None] | None = None
        self._sizes: dict[str, tuple[int, int]] = {}

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the checkpoint's tensors as parameters of ``layer``, unset.

        Raises:
            ModelOptExtError: the layer or an option is not supported, the model's sizes are not the checkpoint's, or this rank's
                cut through a block.
        """
        self._check_layer(layer)
        config = _of(layer, "moe_runner_config")
        self.activation = activation_of(config, bool(extra_weight_attrs.get("with_bias")), self.prefix)
        # Of packed weights, the rows of gate and up alternate where SGLang's kernels read them so.
        self._alternates = config.gemm1_alpha is not None and config.gate_up_interleaved
        self._check_kind()
        self._check_sizes(layer, hidden_size, extra_weight_attrs["moe_intermediate_size"])
        self.experts = num_experts
        # (N, K) of one shard on this rank.
        self._sizes = {
            GATE_UP: (intermediate_size_per_partition, hidden_size),
            DOWN: (hidden_size, intermediate_size_per_partition),
        }
        for name, sets in self.sets.items():
            parts = [(one, self._members(layer, one)) for one in sets]
            self.products[name] = ExpertProducts(
                [ExpertPart(self._product(name, one, params_dtype), members) for one, members in parts if members], name
            )
        if _of(layer, "moe_tp_size") > 1:
            for part in self.products[DOWN].parts:
                part.product.rank_amax = _rank_maximum

        def create() -> None:
            for name in self.sets:
                for spec_name in self.spec_names(name):
                    parameter = self._parameter(name, spec_name)
                    parameter.weight_loader = _loader(layer, name, self.shards[name])  # type: ignore[attr-defined]
                    layer.register_parameter(f"{name}_{spec_name}", parameter)

        create()
        self._create = create

    def _members(self, layer: torch.nn.Module, one: ExpertSet) -> tuple[int, ...]:
        """Return the numbers on this rank of the experts of a set."""
        if one.numbers is None:
            return tuple(range(self.experts))
        local = (_of(layer, "_map_global_expert_id_to_local_expert_id")(number) for number in one.numbers)
        return tuple(sorted(number for number in local if number >= 0))

    def _product(self, name: str, one: ExpertSet, dtype: torch.dtype) -> ExpertProduct:
        return ExpertProduct(one.scheme, self.where, f"{self.prefix}.{name}", math_of(one.scheme, self.math), dtype)

    def _parameter(self, name: str, spec_name: str) -> ExpertParameter:
        """Return the unset parameter for one tensor of every expert that stores it.

        Raises:
            ModelOptExtError: this rank's sizes cut through a block.
        """
        if spec_name == BIAS.name:
            return self._one_parameter(name, BIAS, self.experts)
        parts = self.products[name].parts
        found = [
            (self._one_parameter(name, spec, len(part.members)), part.members)
            for part in parts
            for spec in part.product.stored_scheme.tensors
            if spec.name == spec_name
        ]
        return found[0][0] if len(parts) == 1 and found else MixedExpertParameter(found)

    def _one_parameter(self, name: str, spec: TensorSpec, experts: int) -> ExpertParameter:
        try:
            return ExpertParameter(spec, experts, len(self.shards[name]), *self._sizes[name])
        except ValueError as error:
            expected = f"sizes per rank that hold whole blocks, of {self.sets[name][0].scheme.weight.name}"
            raise ModelOptExtError.at(self.where, f"{self.prefix}.{name}_{spec.name}", expected, error) from error

    @property
    def shards(self) -> dict[str, tuple[str, ...]]:
        """SGLang's ids of the shards of each product."""
        return shards_of(self.activation.gated)

    def _specs(self, part: ExpertPart) -> tuple[TensorSpec, ...]:
        """Return the specs of the stored tensors of some experts, their bias included."""
        tensors = part.product.stored_scheme.tensors
        return (*tensors, BIAS) if self.activation.bias else tensors

    def spec_names(self, name: str) -> tuple[str, ...]:
        """Return the names of the tensors that some expert of the layer stores for a product, on this rank or another."""
        specs = [spec.name for one in self.sets[name] for spec in one.scheme.tensors]
        return tuple(dict.fromkeys([*specs, BIAS.name] if self.activation.bias else specs))

    def members_with(self, name: str, spec_name: str) -> tuple[int, ...]:
        """Return the numbers on this rank of the experts that store a tensor ``spec_name`` for a product."""
        parts = self.products[name].parts
        return tuple(
            member
            for part in parts
            if any(spec.name == spec_name for spec in self._specs(part))
            for member in part.members
        )

    def _check_layer(self, layer: torch.nn.Module) -> None:
        """Raise an error that names the option or field for a layer of experts that is not supported here."""
        from sglang.srt.layers.moe import get_moe_a2a_backend

        config = _of(layer, "moe_runner_config")
        low_rank = any(one.scheme.low_rank for sets in self.sets.values() for one in sets)
        unserved = {
            "--moe-a2a-backend": ("none", not get_moe_a2a_backend().is_none()),
            "--enable-eplb, --ep-num-redundant-experts, --init-expert-location": (
                "every expert once, in the model's order",
                _moves_experts(),
            ),
            "no_combine": ("the sum over a token's experts", config.no_combine),
            "use_presharded_weights": ("whole weights", _of(layer, "use_presharded_weights")),
            "--disable-shared-experts-fusion": (
                "at most one shared expert among the routed ones",
                (config.num_fused_shared_experts or 0) > 1,
            ),
            "svdquant_lora_a": ("experts without a low-rank branch", low_rank),
        }
        for subject, (expected, is_so) in unserved.items():
            if is_so:
                raise ModelOptExtError.at(self.prefix, subject, expected, "a layer of experts with something else")

    def _check_kind(self) -> None:
        """Raise ModelOptExtError unless the checkpoint's experts have a gate and biases where the model has them."""
        if self.stored is None:
            return
        for subject, stored, wanted in (
            ("a gate", self.stored.gated, self.activation.gated),
            ("a bias", self.stored.bias, self.activation.bias),
        ):
            if stored != wanted:
                expected = f"experts {'with' if wanted else 'without'} {subject}, as the model has them"
                raise ModelOptExtError.at(
                    self.where, self.stored.name, expected, "with one" if stored else "without one"
                )

    def _check_sizes(self, layer: torch.nn.Module, hidden: int, intermediate: int) -> None:
        """Raise ModelOptExtError unless the model's number and sizes of experts are the checkpoint's."""
        if _of(layer, "intermediate_size_per_partition") * _of(layer, "moe_tp_size") != intermediate:
            raise ModelOptExtError.at(
                self.prefix, "--moe-runner-backend", "one that does not pad the experts", "a padded intermediate size"
            )
        if self.stored is None:
            return
        experts = _of(layer, "num_experts") - (_of(layer, "moe_runner_config").num_fused_shared_experts or 0)
        for subject, stored, wanted in (
            ("experts", self.stored.count, experts),
            ("hidden size", self.stored.hidden, hidden),
            ("intermediate size", self.stored.intermediate, intermediate),
        ):
            if stored != wanted:
                raise ModelOptExtError.at(
                    self.where, self.stored.name, f"{wanted} {subject}, as the model has it", stored
                )

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: Any) -> None:
        """Keep the layer's configuration for :meth:`apply`, which needs no runner of SGLang's."""
        del layer
        self._config = moe_runner_config

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Prepare the experts for the first backends that support them, and delete the stored tensors.

        Raises:
            ModelOptExtError: the weights did not pass through the strict reader, or no backend can serve them.
        """
        if not self.verified:
            raise ModelOptExtError.at(
                self.where,
                f"{self.prefix}.{GATE_UP}_weight",
                "a load through the strict reader",
                "a loader that bypasses it (see --load-format)",
            )
        stored = {name: self._stored(layer, name) for name in self.sets}
        sizes = {name: (n * len(self.shards[name]), k) for name, (n, k) in self._sizes.items()}
        top_k = self._config.top_k or 1
        is_fused = self._fuse(layer, stored, sizes, top_k)
        for name in self.sets:
            if not is_fused:
                self.products[name].prepare(layer, stored[name], *sizes[name], top_k)
            del stored[name]
            for spec_name in self.spec_names(name):
                if spec_name != BIAS.name:
                    delattr(layer, f"{name}_{spec_name}")

    def _fuse(
        self,
        layer: torch.nn.Module,
        stored: Mapping[str, list[list[dict[str, torch.Tensor]]]],
        sizes: Mapping[str, tuple[int, int]],
        top_k: int,
    ) -> bool:
        """Prepare the whole layer for one call where it is asked for and all experts have one scheme; return whether it is."""
        if any(len(product.parts) > 1 for product in self.products.values()):
            return False
        device = stored[DOWN][0][0]["weight"].device
        gate_up, down = (
            self.products[name].parts[0].product.request(device, *sizes[name], self.experts, top_k)
            for name in (GATE_UP, DOWN)
        )
        request = FusedRequest(gate_up, down, self._config.apply_router_weight_on_input, self.activation)
        return self.fused.prepare(layer, request, stored[GATE_UP], stored[DOWN])

    def _stored(self, layer: torch.nn.Module, name: str) -> list[list[dict[str, torch.Tensor]]]:
        """Return the stored tensors of one product as ``[expert][shard][spec name]``."""
        stored: list[list[dict[str, torch.Tensor]]] = [[{} for _ in self.shards[name]] for _ in range(self.experts)]
        for spec_name in self.spec_names(name):
            parameter = layer.get_parameter(f"{name}_{spec_name}")
            assert isinstance(parameter, ExpertParameter)
            if spec_name == BIAS.name:
                continue
            for expert in self.members_with(name, spec_name):
                for shard, tensors in enumerate(stored[expert]):
                    tensors[spec_name] = parameter.of(expert, shard)
        return stored

    @property
    def kernels(self) -> dict[str, tuple[str, ...]]:
        """The names of the kernels that serve each product, one for each part; empty until the weights are prepared."""
        fused = self.fused.backend
        return {
            name: (fused.name,) if fused else product.backends
            for name, product in self.products.items()
            if fused or product.backends
        }

    def restore_weights_before_loading(self, layer: torch.nn.Module) -> None:
        """Replace the prepared weights by unset parameters for the stored tensors, before weights are updated from disk."""
        if self._create is None or not self.kernels:
            return
        device = next(layer.parameters()).device
        self.fused.release(layer)
        for product in self.products.values():
            product.release(layer)
        self.verified = False
        with torch.device(device):
            self._create()

    def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:
        """Return the weighted sum of each token's experts ``[T, hidden]``, from both products (:func:`mix`) or from one call.

        Raises:
            ModelOptExtError: the routing is not in SGLang's standard form.
        """
        from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
        from sglang.srt.layers.moe.topk import TopKOutputChecker

        if not TopKOutputChecker.format_is_standard(dispatch_output.topk_output):
            raise ModelOptExtError.at(
                self.prefix, "routing", "the weights and numbers of each token's experts", "another form"
            )
        x, (weights, experts, _) = dispatch_output.hidden_states, dispatch_output.topk_output
        if x.shape[0] == 0:
            return StandardCombineInput(hidden_states=torch.zeros_like(x))
        choices = Choices(
            experts,
            weights,
            weights_input=self._config.apply_router_weight_on_input,
            # On other devices SGLang's models apply the factor to the layer's output themselves.
            factor=self._config.routed_scaling_factor if x.is_cuda else None,
        )
        if self.fused.backend:
            return StandardCombineInput(hidden_states=self.fused.apply(layer, x, choices))
        products = self.products[GATE_UP], self.products[DOWN]
        y = mix(layer, *products, x, choices, self.activation, self._biases(layer))
        return StandardCombineInput(hidden_states=y)

    def _biases(self, layer: torch.nn.Module) -> Biases | None:
        if not self.activation.bias:
            return None
        first, down = (layer.get_parameter(f"{name}_{BIAS.name}").flatten(1) for name in (GATE_UP, DOWN))
        # Of the ranks that hold slices of an expert, the first adds the bias of their sum.
        return Biases(first, down if _of(layer, "moe_tp_rank") == 0 else None)

    def load_packed(self, layer: torch.nn.Module, stored: str, tensor: torch.Tensor) -> None:
        """Load a tensor of packed experts into the parameters of this rank's experts.

        Args:
            layer: SGLang's layer.
            stored: the tensor's name in the checkpoint.
            tensor: its values.

        Raises:
            ValueError: a block holds rows of gate and of up, or this rank's slice cuts through one.
        """
        assert self.stored is not None
        assert self.stored.packed is not None
        packed = self.stored.packed
        projection, name = next(found[1:] for found in packed.tensors() if found[0] == stored)
        product = GATE_UP if projection is packed.gate_up else DOWN
        spec, shards = projection.specs[name], self.shards[product]
        parameter: Any = layer.get_parameter(f"{product}_{name}")
        for expert in range(projection.count):
            one = projection.of_expert(name, tensor, expert)
            for index, shard in enumerate(shards):
                part = part_along_n(spec, one, index, len(shards), self._alternates)
                parameter.weight_loader(parameter, part, name, shard_id=shard, expert_id=expert)

    def fill_dummy(self, layer: torch.nn.Module) -> None:
        """Fill the layer's parameters with legal values for ``--load-format dummy``."""
        for name, product in self.products.items():
            (part,) = product.parts  # without a checkpoint all experts have one scheme
            for spec in self._specs(part):
                fill_dummy(layer.get_parameter(f"{name}_{spec.name}").data, spec)
        self.verified = True


def _of(layer: torch.nn.Module, name: str) -> Any:
    """Return an attribute of SGLang's layer as Any: torch types attributes of modules as tensors or modules."""
    return getattr(layer, name)


def _loader(layer: Any, name: str, shards: tuple[str, ...]) -> Callable[..., list[int]]:
    """Return a weight loader for the parameters of one product, called with the arguments of ``FusedMoE.weight_loader``."""

    def load(
        parameter: ExpertParameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> list[int]:
        """Copy an expert's tensor if this rank holds the expert; return its number on this rank, or an empty list."""
        del weight_name, return_success  # Granite's hybrid class asks whether it was loaded
        expert = layer._map_global_expert_id_to_local_expert_id(expert_id)
        if expert < 0:
            return []
        n_rank, k_rank = (layer.moe_tp_rank, 0) if name == GATE_UP else (0, layer.moe_tp_rank)
        parameter.load(loaded_weight, expert, shards.index(shard_id), n_rank, k_rank)
        return [expert]

    return load


def _moves_experts() -> bool:
    """Return whether experts are moved or doubled; they are not where no arguments are published, as in a layer built alone."""
    from sglang.srt.runtime_context import get_exec, get_server_args

    try:
        get_server_args()
    except ValueError:
        return False
    moe = get_exec().moe
    return bool(moe.enable_eplb or moe.init_expert_location != "trivial" or moe.ep_num_redundant_experts > 0)


def _rank_maximum(amax: torch.Tensor) -> torch.Tensor:
    from sglang.srt.runtime_context import get_parallel

    # Of the collectives, only SGLang's may run inside a captured CUDA graph.
    gathered: torch.Tensor = get_parallel().moe_tp_group.all_gather(amax, dim=-1)
    return gathered.amax(dim=-1, keepdim=True)

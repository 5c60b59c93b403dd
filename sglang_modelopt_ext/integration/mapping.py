"""The stored layers of each of SGLang's linear layers, by the loading code of the model's class where names do not tell.

A layer that is stored under its own name, or under those that its class or most classes fuse, has its method when it is built
(:mod:`sglang_modelopt_ext.integration.config`). If quantized layers of the checkpoint remain, the built model's ``load_weights`` is
called once with their names and sizes, on the meta device and with loaders that only take notes. The layers that they belong to
are then given their methods, whatever they are called and however their class built them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch

from sglang_modelopt_ext.checkpoint.experts import EXPERT_PROJECTIONS, is_expert
from sglang_modelopt_ext.checkpoint.leftovers import ServedLayers
from sglang_modelopt_ext.checkpoint.linears import QuantizedLinear
from sglang_modelopt_ext.checkpoint.names import HEAD
from sglang_modelopt_ext.checkpoint.quant_config import text_config
from sglang_modelopt_ext.checkpoint.reader import Checkpoint
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.integration.config import COMMON_BLOCK, MIXTRAL_BLOCK, ModelOptExtConfig
from sglang_modelopt_ext.integration.drafts import check_vocabularies
from sglang_modelopt_ext.integration.hooks import Hook
from sglang_modelopt_ext.integration.layout import partition_numbers
from sglang_modelopt_ext.integration.linear_method import ModelOptExtLinearMethod
from sglang_modelopt_ext.integration.provenance import Provenance

logger = logging.getLogger(__name__)

Loader = Callable[..., Any]

INTERMEDIATE = "intermediate_size"
"""The field of a configuration whose size SGLang enlarges on a CPU; it keeps the old one with ``original_`` before the name."""


@contextmanager
def replaced_loaders(model: torch.nn.Module, replace: Callable[[str, Loader], Loader]) -> Iterator[None]:
    """Replace the weight loader of every parameter, and of every buffer, which some classes load, as a context manager.

    Args:
        model: the model.
        replace: from a parameter's name and its loader to another loader.
    """
    from sglang.srt.model_loader.weight_utils import default_weight_loader

    undo: list[Callable[[], None]] = []
    for name, parameter in itertools.chain(model.named_parameters(), model.named_buffers()):
        attribute = "_weight_loader" if hasattr(parameter, "_weight_loader") else "weight_loader"
        original = getattr(parameter, attribute, None)
        setattr(parameter, attribute, replace(name, original or default_weight_loader))
        undo.append(_restorer(parameter, attribute, original))
    try:
        yield
    finally:
        for restore in undo:
            restore()


def _restorer(parameter: torch.Tensor, attribute: str, original: Loader | None) -> Callable[[], None]:
    if original is None:
        return lambda: delattr(parameter, attribute)
    return lambda: setattr(parameter, attribute, original)


@contextmanager
def without_values(model: torch.nn.Module) -> Iterator[None]:
    """Put a tensor on the meta device in the place of every parameter and buffer, as a context manager.

    A class may copy what it loads into a parameter itself, and nothing on the meta device can be copied to another one. Attributes
    that it sets meanwhile are taken off again: some keep their parameters for the next load.
    """
    attributes = [(module, set(vars(module))) for module in model.modules()]
    twins: dict[int, torch.Tensor] = {}  # by the id of the tensor, which modules may share
    undo: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []
    for module in model.modules():
        for members in (module._parameters, module._buffers):
            for name, tensor in members.items():
                if tensor is not None:
                    undo.append((members, name, tensor))  # type: ignore[arg-type]
                    members[name] = twins.setdefault(id(tensor), _on_meta(tensor))  # type: ignore[assignment]
    try:
        yield
    finally:
        for members, name, tensor in undo:
            members[name] = tensor
        for module, before in attributes:
            for name in vars(module).keys() - before:
                delattr(module, name)


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same class, shape, strides and attributes on the meta device."""
    twin = torch.Tensor._make_subclass(type(tensor), torch.empty_like(tensor.data, device="meta"), tensor.requires_grad)
    twin.__dict__.update(tensor.__dict__)
    return twin


class _EndOfTensors(Exception):
    """The end of the tensors of a replay, before the model's class works on what it loaded."""


def replay(model: Any, linears: Iterable[QuantizedLinear], checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Return the stored layers of each of the model's layers, by the names of both, in the order of the layer's rows.

    Args:
        model: the model, whose parameters are not written, nor seen by its class.
        linears: the stored layers to look for.
        checkpoint: all stored tensors, for classes that load nothing before they have them.
    """
    offered = {linear.name: linear for linear in linears}
    calls: dict[str, list[tuple[int, str]]] = {}
    provenance = Provenance()

    def note(parameter: str, loader: Loader) -> Loader:
        del loader
        module, _, name = parameter.rpartition(".")

        def take_note(target: torch.Tensor, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[()]:
            del target
            shard = args[0] if args else kwargs.get("loaded_shard_id", kwargs.get("shard_id"))
            sources = provenance.of(tensor)
            if sources and name == "weight" and "expert_id" not in kwargs:
                with suppress(ValueError, TypeError):  # an id of no partition: the layer stays as it was built
                    first = 0 if shard is None else partition_numbers(shard, 1)[0]
                    calls.setdefault(module, []).extend((first, source) for source in sources)
            return ()

        return take_note

    served = ServedLayers.of(text_config(checkpoint.folder))
    kept = []  # a tensor on the meta device is known by its storage, which must live

    def weights(whole: bool) -> Iterator[tuple[str, torch.Tensor]]:
        for linear in offered.values():
            tensor = torch.empty((linear.n, linear.k), dtype=torch.get_default_dtype(), device="meta")
            kept.append(tensor)
            provenance.add(tensor, linear.name)
            yield f"{linear.name}.weight", tensor
        if not whole:
            raise _EndOfTensors
        for name, stored in checkpoint.tensors.items():
            if checkpoint.spec_of(name) is None:
                yield name, torch.empty(stored.shape, dtype=stored.dtype, device="meta")

    with without_values(model), replaced_loaders(model, note), provenance:
        for whole in (False, True):
            try:
                model.load_weights(weights(whole))
            except _EndOfTensors:
                pass
            except Exception as error:
                # The model's own loading code, on tensors without scales: the load itself will tell.
                logger.debug("modelopt_ext: the names of %s were not all replayed: %s", type(model).__name__, error)
            rest = offered.keys() - {name for found in calls.values() for _, name in found}
            if all(map(served.leaves_out, rest)):
                break  # otherwise the class loads some (BERT's head) or all of them (Phi) when it has every tensor
    return {
        module: list(dict.fromkeys(name for _, name in sorted(found, key=_first))) for module, found in calls.items()
    }


def _first(call: tuple[int, str]) -> int:
    return call[0]


def settle(model: torch.nn.Module, config: ModelOptExtConfig) -> None:
    """Give every layer that holds quantized tensors its method.

    Raises:
        ModelOptExtError: a layer is declared as quantized and none of its tensors is, or a layer does not fit its tensors.
    """
    assert config.checkpoint is not None, "dummy weights have no stored layers"
    _untie(model, config)
    rest = _unclaimed(model, config.checkpoint)
    adopted = _adopt(model, config, rest) if rest else set()
    doubtful, config.without_tensors = config.without_tensors, []
    for layer, error in doubtful:
        if layer not in adopted:
            raise error


def _untie(model: torch.nn.Module, config: ModelOptExtConfig) -> None:
    """Give a model whose head is its embedding a head of its own where the checkpoint stores a quantized one."""
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    if HEAD not in config.linears:
        return
    for owner in list(model.modules()):
        tied = getattr(owner, HEAD, None)
        if not isinstance(tied, VocabParallelEmbedding) or isinstance(tied, ParallelLMHead):
            continue
        groups = {"use_attn_tp_group": tied.use_attn_tp_group, "enable_tp": tied.enable_tp}
        sizes = tied.num_embeddings, tied.embedding_dim
        setattr(owner, HEAD, ParallelLMHead(*sizes, quant_config=config, prefix=HEAD, **groups))


def own_heads(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, QuantizedLinear]]:
    """Yield the quantized head of a model with tied embeddings, and the stored layer it is made of; nothing for other models."""
    text = getattr(getattr(model, "config", None), "text_config", None) or getattr(model, "config", None)
    if not getattr(text, "tie_word_embeddings", False):
        return
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if name.rpartition(".")[2] == HEAD and isinstance(method, ModelOptExtLinearMethod) and method.stored:
            yield module, method.stored[0]


def _unclaimed(model: torch.nn.Module, checkpoint: Checkpoint) -> dict[str, QuantizedLinear]:
    """Return the quantized linear layers of the checkpoint, by name, that no layer of the model was built for."""
    claimed: set[str] = set()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, ModelOptExtLinearMethod) and method.stored is not None:
            claimed.update(linear.name for linear in method.stored)
    return {
        linear.name: linear
        for linear in checkpoint.linears.values()
        if linear.name not in claimed and not is_expert(linear.name)
    }


def _adopt(
    model: torch.nn.Module, config: ModelOptExtConfig, rest: Mapping[str, QuantizedLinear]
) -> set[torch.nn.Module]:
    """Give layers that were built as unquantized ones, and hold the stored layers ``rest``, their methods; return them.

    Raises:
        ModelOptExtError: a layer is of a kind that cannot be quantized, or does not fit its tensors.
    """
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

    from sglang_modelopt_ext.integration.plain_linear import PlainLinear

    modules = dict(model.named_modules())
    assert config.checkpoint is not None, "dummy weights have no stored layers"
    adopted = set()
    for name, stored in replay(model, rest.values(), config.checkpoint).items():
        layer = modules[name]
        if type(layer) is torch.nn.Linear:
            layer = _replace(model, layer, PlainLinear(layer))
        if not isinstance(layer, (LinearBase, VocabParallelEmbedding)):
            linear = rest[stored[0]]
            expected = f"an unquantized layer, which {type(model).__name__} builds as a {type(layer).__name__}"
            raise ModelOptExtError.at(
                linear.stored["weight"].file, f"{linear.name}.weight", expected, linear.scheme.algo
            )
        if isinstance(layer.quant_method, ModelOptExtLinearMethod):
            continue
        method = config.method_of(name, [rest[one] for one in stored])
        _install(layer, method)
        adopted.add(layer)
    return adopted


def _replace(model: torch.nn.Module, old: torch.nn.Module, new: torch.nn.Module) -> torch.nn.Module:
    """Put ``new`` wherever ``model`` has ``old``, and return it: a cross encoder's pooler has the model's head too."""
    for owner in list(model.modules()):
        for name, child in list(owner.named_children()):
            if child is old:
                setattr(owner, name, new)
    return new


def _install(layer: Any, method: ModelOptExtLinearMethod) -> None:
    """Replace the weight of an unquantized layer by the parameters of ``method``.

    Raises:
        ModelOptExtError: the layer's sizes are not the checkpoint's.
    """
    delattr(layer, "weight")
    layer.quant_method = method
    if hasattr(layer, "org_vocab_size"):
        n, k, k_rank = [layer.num_embeddings_per_partition], layer.embedding_dim, layer.embedding_dim
    else:
        n = getattr(layer, "output_partition_sizes", [layer.output_size])
        k, k_rank = layer.input_size, getattr(layer, "input_size_per_partition", layer.input_size)
    dtype = getattr(layer, "params_dtype", None) or torch.get_default_dtype()
    method.create_weights(layer, k_rank, n, k, sum(n), dtype)


def _padded_sizes(config: Any) -> dict[int, int]:
    """Return the sizes of hidden layers that SGLang enlarged in a model's configurations (on a CPU), and what they were."""
    configs = [config, *(getattr(config, part, None) for part in ("text_config", "vision_config"))]
    sizes = [(getattr(one, INTERMEDIATE, None), getattr(one, f"original_{INTERMEDIATE}", None)) for one in configs]
    return {padded: size for padded, size in sizes if isinstance(padded, int) and isinstance(size, int)}


def _initialize_model(
    original: Callable[..., Any], model_config: Any, load_config: Any, quant_config: Any = None
) -> Any:
    model = original(model_config, load_config, quant_config)
    if isinstance(quant_config, ModelOptExtConfig):
        quant_config.padded_sizes = _padded_sizes(model_config.hf_config)
    if isinstance(quant_config, ModelOptExtConfig) and quant_config.checkpoint is not None:
        settle(model, quant_config)
        check_vocabularies(model)
    return model


def expert_names(model: torch.nn.Module, checkpoint: Checkpoint) -> Callable[[str], str]:
    """Return a function from a checkpoint's names to those that the model's loader knows: Mixtral's experts have two names."""
    if not any(name.endswith(f".{MIXTRAL_BLOCK}.experts") for name, _ in model.named_modules()) or not any(
        f".{COMMON_BLOCK}.experts." in name for name in checkpoint.tensors
    ):
        return lambda name: name
    projections = dict(zip(*EXPERT_PROJECTIONS, strict=True))

    def rename(name: str) -> str:
        parts = [MIXTRAL_BLOCK if part == COMMON_BLOCK else part for part in name.split(".")]
        if "experts" in parts:
            parts = [projections.get(part, part) for part in parts]
        return ".".join(parts)

    return rename


HOOKS = (
    Hook(
        "sglang.srt.model_loader.loader._initialize_model",
        ("model_config", "load_config", "quant_config"),
        "layers that a model's class builds or names in its own way would be built as unquantized ones",
        _initialize_model,
    ),
)

"""Tiny random models whose experts are not SwiGLU experts stored one by one, and an independent reading of their exports' experts.

gpt-oss and Llama 4 have packed experts, Nemotron-H experts without a gate, and GLM-4-MoE a shared expert. SGLang 0.5.23 serves
neither gpt-oss (attention sinks) nor Nemotron-H on a CPU, so that their experts are compared layer by layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch.nn.functional import relu, silu

from tests.support.cache import cached_folder, digest, source_digest
from tests.support.models import build_tokenizer
from tests.support.recipes import RECIPES
from tests.support.reference import QuantLinear, quantization
from tests.support.reference_experts import unpacked

Kind = Literal["gpt_oss", "llama4", "nemotron_h", "glm4_moe"]
HIDDEN, INTERMEDIATE, EXPERTS, VOCABULARY = 256, 512, 4, 512
ALPHA, LIMIT = 1.702, 7.0


@dataclass(frozen=True)
class ExpertModel:
    """One kind of model: what its experts are called, and what SGLang's model class asks of ``FusedMoE``.

    Attributes:
        experts: the name of a layer's experts in the checkpoint.
        top_k: experts of a token.
        names: the loader's names of gate, down and up in SGLang's model class.
        options: further arguments of ``FusedMoE`` there.
        activation: the function between the projections, from the first one's output.
        packed: whether ModelOpt exports one tensor for all experts.
    """

    experts: str
    top_k: int
    names: tuple[str, str, str]
    options: dict[str, Any]
    activation: Callable[[torch.Tensor], torch.Tensor]
    packed: bool = False


def _oai(h: torch.Tensor) -> torch.Tensor:
    gate, up = h[..., ::2].clamp(max=LIMIT), h[..., 1::2].clamp(-LIMIT, LIMIT)
    return gate * torch.sigmoid(ALPHA * gate) * (up + 1)


def _swiglu(h: torch.Tensor) -> torch.Tensor:
    gate, up = h.chunk(2, dim=-1)
    return silu(gate) * up


QWEN_NAMES = ("gate_proj", "down_proj", "up_proj")
MODELS: dict[Kind, ExpertModel] = {
    "gpt_oss": ExpertModel(
        "model.layers.1.mlp.experts",
        2,
        QWEN_NAMES,
        {"gemm1_alpha": ALPHA, "gemm1_clamp_limit": LIMIT, "with_bias": True},
        _oai,
        packed=True,
    ),
    "llama4": ExpertModel(
        "model.layers.1.feed_forward.experts",
        1,
        QWEN_NAMES,
        {"apply_router_weight_on_input": True},
        _swiglu,
        packed=True,
    ),
    "nemotron_h": ExpertModel(
        "backbone.layers.1.mixer.experts",
        2,
        ("up_proj", "down_proj", ""),
        {"activation": "relu2", "is_gated": False, "routed_scaling_factor": 2.5},
        lambda h: relu(h).square(),
    ),
    "glm4_moe": ExpertModel("model.layers.1.mlp.experts", 2, QWEN_NAMES, {}, _swiglu),
}


def model_dir(kind: Kind, seed: int = 0) -> Path:
    """Return the folder of a Hugging Face model of that kind, made on the first call."""
    import transformers

    key = digest(kind, seed, transformers.__version__, source_digest(Path(__file__)))
    return cached_folder("models", f"{kind}-{key}", lambda folder: _save(kind, seed, folder))


def _save(kind: Kind, seed: int, folder: Path) -> None:
    import transformers as hf

    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
        "num_experts_per_tok": MODELS[kind].top_k,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    routed = {"n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "moe_intermediate_size": INTERMEDIATE}
    if kind == "gpt_oss":
        model: Any = hf.GptOssForCausalLM(hf.GptOssConfig(**sizes, num_local_experts=EXPERTS, sliding_window=32))
    elif kind == "llama4":
        own = {"num_local_experts": EXPERTS, "intermediate_size_mlp": INTERMEDIATE, "attention_chunk_size": 128}
        model = hf.Llama4ForCausalLM(hf.Llama4TextConfig(**sizes, **own))
    elif kind == "nemotron_h":
        del sizes["num_hidden_layers"]
        own = {"layers_block_type": ["attention", "moe"], "moe_shared_expert_intermediate_size": INTERMEDIATE}
        mamba = {"mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1}
        model = hf.NemotronHForCausalLM(hf.NemotronHConfig(**sizes, **routed, **own, **mamba, n_shared_experts=1))
    else:
        config = hf.Glm4MoeConfig(**sizes, **routed, n_shared_experts=1, first_k_dense_replace=1)
        model = hf.Glm4MoeForCausalLM(config)
    model.config.architectures = [type(model).__name__]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                # Rows and experts of different magnitude, so that a scale of another is noticed.
                spread = (0.5 * torch.randn((*parameter.shape[:-1], 1), generator=generator)).exp()
                parameter.copy_(values * spread / parameter.shape[-1] ** 0.5)
            elif name.endswith(("bias", "sinks")):
                parameter.copy_(values)
            else:
                parameter.copy_(1 + 0.1 * values)
    model.to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer(VOCABULARY).save_pretrained(folder)


class ExpertReading:
    """The experts of an export in float32, by the definitions of its recipe and the model's own formula.

    Args:
        folder: the export.
        kind: its model.
        name: the layer's experts, by their name in the checkpoint.
    """

    def __init__(self, folder: Path, kind: Kind, name: str) -> None:
        self.kind = MODELS[kind]
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted(folder.glob("*.safetensors")):
            tensors.update(load_file(path))
        section = quantization(folder)
        assert section is not None
        algo = section["quant_algo"].upper()
        group = section.get("group_size") or RECIPES[algo].group
        packed = f"{name}.gate_up_proj" in tensors
        self.experts = []
        for number in range(EXPERTS):
            if packed:
                parts = [unpacked(tensors, f"{name}.{part}", number, EXPERTS) for part in ("gate_up_proj", "down_proj")]
            else:
                names = [part for part in ("gate_proj", "up_proj", "down_proj") if f"{name}.0.{part}.weight" in tensors]
                parts = [_of_module(tensors, f"{name}.{number}.{part}") for part in names]
            self.experts.append([QuantLinear(RECIPES[algo], part, group, "exact", "recipe") for part in parts])
        shared = name.removesuffix("experts") + "shared_experts"
        self.shared = None
        if f"{shared}.down_proj.weight" in tensors and not packed:
            names = [part for part in ("gate_proj", "up_proj", "down_proj") if f"{shared}.{part}.weight" in tensors]
            modules = [_of_module(tensors, f"{shared}.{part}") for part in names]
            self.shared = [QuantLinear(RECIPES[algo], part, group, "exact", "recipe") for part in modules]

    def of_expert(self, layers: list[QuantLinear], x: torch.Tensor) -> torch.Tensor:
        """Return the output of one expert for rows ``x``."""
        *first, down = layers
        output: torch.Tensor = down(self.kind.activation(torch.cat([layer(x) for layer in first], dim=-1)))
        return output

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return ``[T, H]``, given each token's experts and their weights."""
        y = torch.zeros_like(x)
        weights_input = self.kind.options.get("apply_router_weight_on_input", False)
        for number, layers in enumerate(self.experts):
            token, choice = torch.where(chosen == number)
            if not len(token):
                continue
            weight = weights[token, choice, None]
            if weights_input:
                y.index_add_(0, token, self.of_expert(layers, x[token] * weight))
            else:
                y.index_add_(0, token, self.of_expert(layers, x[token]) * weight)
        return y


def _of_module(tensors: dict[str, torch.Tensor], module: str) -> dict[str, torch.Tensor]:
    prefix = f"{module}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def transpose_packed(tensors: dict[str, torch.Tensor]) -> None:
    """Store packed experts as linear layers are: ``[E, N, K]``."""
    for name, tensor in tensors.items():
        if ".experts." in name and tensor.dim() == 3:
            tensors[name] = tensor.transpose(1, 2).contiguous()


def pack_experts(tensors: dict[str, torch.Tensor], name: str) -> None:
    """Pack experts that are stored one by one, as ModelOpt packs NVFP4 ones: ``[E, K, N]``, gate before up, one scale for all.

    It stands for exports of recipes that ModelOpt 0.47 writes with blocks along N where experts are packed.
    """
    for parts in (("gate_proj", "up_proj"), ("down_proj",)):
        packed = "gate_up_proj" if len(parts) == 2 else parts[0]
        suffixes = {full.rpartition(".")[2] for full in tensors if full.startswith(f"{name}.0.{parts[0]}.")}
        for suffix in suffixes:
            every = [[tensors.pop(f"{name}.{number}.{part}.{suffix}") for part in parts] for number in range(EXPERTS)]
            target = f"{name}.{packed}" + ("" if suffix == "weight" else f"_{suffix}")
            if every[0][0].dim() < 2:
                tensors[target] = torch.stack([of_expert[0] for of_expert in every])
            else:
                joined = [torch.cat([part.view(torch.uint8) for part in of_expert]).T for of_expert in every]
                tensors[target] = torch.stack(joined).contiguous().view(every[0][0].dtype)


def top_k_of(folder: Path) -> int:
    """Return the number of experts of a token by ``config.json``."""
    return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["num_experts_per_tok"])

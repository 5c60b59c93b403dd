#!/usr/bin/env python3
"""A generator of the tables in docs/flags.md from the rules of ownership. ``--check`` compares without writing."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sglang_modelopt_ext.checkpoint.ownership import MXFP8, STOCK_MIXED_FLAG, STOCK_MXFP8_FLAG, decide
from sglang_modelopt_ext.checkpoint.quant_config import CONFIG_NAME, QUANT_CONFIG_NAME
from sglang_modelopt_ext.checkpoint.tensors import INDEX_NAME
from sglang_modelopt_ext.device import Device
from sglang_modelopt_ext.schemes.stock import LEFT_AND_RUN
from sglang_modelopt_ext.schemes.table import MIXED_PRECISION, SCHEMES, UMBRELLA

PAGE = Path(__file__).resolve().parent.parent / "docs" / "flags.md"
GPUS = (80, 89, 90, 100)
BEGIN, END = "<!-- {} by tools/ownership_table.py (`make docs`). Do not edit. -->", "<!-- end -->"

LISTED = {"FP8": {"quant_algo": "FP8"}, "NVFP4": {"quant_algo": "NVFP4", "group_size": 16}}


@dataclass(frozen=True)
class Kind:
    """A checkpoint without weights, for one row.

    Attributes:
        label: its text in the row.
        section: its quantization section.
        fields: of config.json.
        tensors: names of its tensors, where they decide.
        shape: of these tensors, where it decides too.
    """

    label: str
    section: Mapping[str, Any]
    fields: Mapping[str, Any] = field(default_factory=dict)
    tensors: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()

    def owner(self, capability: int) -> str:
        """Return the owner on that GPU without a flag."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / CONFIG_NAME).write_text(json.dumps({"architectures": ["Qwen3MoeForCausalLM"], **self.fields}))
            (folder / QUANT_CONFIG_NAME).write_text(json.dumps({"quantization": self.section}))
            if self.shape:
                stored = {tensor: torch.zeros(self.shape) for tensor in self.tensors}
                save_file(stored, folder / "model.safetensors")
            elif self.tensors:
                index = {"weight_map": dict.fromkeys(self.tensors, "model.safetensors")}
                (folder / INDEX_NAME).write_text(json.dumps(index))
            return "SGLang" if decide(folder, None, Device.cuda(capability)).family is None else "ours"


def mix(
    label: str,
    tensors: tuple[str, ...] = (),
    architecture: str | None = None,
    shape: tuple[int, ...] = (),
    **layers: str,
) -> Kind:
    """Return a mix of NVFP4 experts and ``layers``, their names with ``__`` for dots."""
    listed = {name.replace("__", "."): {"quant_algo": algo} for name, algo in layers.items()}
    fields = {} if architecture is None else {"architectures": [architecture]}
    experts = {"model.layers.0.mlp.experts": LISTED["NVFP4"]}
    return Kind(
        label, {"quant_algo": MIXED_PRECISION, "quantized_layers": {**experts, **listed}}, fields, tensors, shape
    )


O_PROJ = "model.layers.0.self_attn.o_proj"
MIXES = (
    mix("NVFP4, W4A16_NVFP4", model__layers__0__self_attn__o_proj="W4A16_NVFP4"),
    mix("NVFP4, FP8", model__layers__0__self_attn__o_proj="FP8"),
    mix("NVFP4, FP8 experts", model__layers__1__mlp__experts="FP8"),
    mix(
        "NVFP4, and MXFP8, FP8_PB_WO or FP8_BLOCK_SCALES with SGLang's `weight_scale_inv`",
        (f"{O_PROJ}.weight_scale_inv",),
        model__layers__0__self_attn__o_proj="FP8_PB_WO",
    ),
    mix(
        "NVFP4, and MXFP8 or FP8_PB_WO with ModelOpt's `weight_scale`",
        (f"{O_PROJ}.weight_scale",),
        model__layers__0__self_attn__o_proj="MXFP8",
    ),
    mix(
        "NVFP4, and MXFP8 or FP8_PB_WO with a `weight_scale` that DeepSeek V2 and V3, GLM-5 and Kimi K3 rename",
        (f"{O_PROJ}.weight_scale",),
        "KimiK3ForConditionalGeneration",
        model__layers__0__self_attn__o_proj="FP8_PB_WO",
    ),
    mix(
        "the same with FP8_PB_WO as ModelOpt 0.47 stores it, its `weight_scale` in four dimensions[^tiles]",
        (f"{O_PROJ}.weight_scale",),
        "KimiK3ForConditionalGeneration",
        (2, 1, 4, 1),
        model__layers__0__self_attn__o_proj="FP8_PB_WO",
    ),
    mix(
        "with shards of `qkv_proj`, `gate_up_proj` on Llama, Mistral, Qwen2, Qwen3 and others[^map]",
        (),
        "Qwen2ForCausalLM",
        model__layers__0__mlp__up_proj="FP8",
    ),
    mix("with a quantized embedding that is not NVFP4", model__embed_tokens="W4A16_NVFP4"),
    mix(
        "with experts of one layer that differ",
        model__layers__1__mlp__experts__0__up_proj="FP8",
        model__layers__1__mlp__experts__0__down_proj="NVFP4",
    ),
    mix("with any other algorithm of the first table", model__layers__0__self_attn__o_proj="W4A8_NVFP4_FP8"),
    mix("with an unknown algorithm", model__layers__0__self_attn__o_proj="W2A2"),
    Kind(
        "without an NVFP4 layer",
        {"quant_algo": MIXED_PRECISION, "quantized_layers": {"model.layers.0.mlp.experts": LISTED["FP8"]}},
    ),
    Kind("without `quantized_layers` (W4AFP8)", {"quant_algo": MIXED_PRECISION}),
)


def plain() -> Iterator[tuple[Kind, tuple[str, ...], str | None]]:
    """Yield a row for each algorithm, with our flags and SGLang's."""
    for scheme in SCHEMES.values():
        stock = STOCK_MXFP8_FLAG if scheme.algo == MXFP8 else scheme.stock_flag
        flags = tuple(dict.fromkeys((scheme.flag, UMBRELLA)))
        for size in scheme.group_sizes:
            name = "mxfp4" if scheme.algo == "MXFP4" else "fp8_pb_wo" if scheme.algo == "FP8_PB_WO" else scheme.algo
            label = f"{name}, groups of {size}" if len(scheme.group_sizes) > 1 else name
            yield Kind(label, {"quant_algo": scheme.algo, "group_size": size or None}), flags, stock
    smoothed = Kind("FP8 with `pre_quant_scale`", {"quant_algo": "FP8"}, tensors=("a.pre_quant_scale",))
    yield smoothed, (UMBRELLA,), "modelopt_fp8"
    mixtral = Kind(
        "NVFP4, a Mixtral whose attention is not quantized",
        {"quant_algo": "NVFP4", "exclude_modules": ["*self_attn*"]},
        {"model_type": "mixtral"},
    )
    yield mixtral, (UMBRELLA,), "modelopt_fp4"
    gpt_oss = Kind("FP8, gpt-oss", {"quant_algo": "FP8"}, {"architectures": ["GptOssForCausalLM"]})
    yield gpt_oss, (UMBRELLA,), "modelopt_fp8"


def cells(kind: Kind) -> list[str]:
    """Return the owner on each GPU, and when SGLang's side of the row was run."""
    owners = [kind.owner(capability) for capability in GPUS]
    return [*owners, LEFT_AND_RUN.get(kind.label, "") if "SGLang" in owners else "-"]


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def render() -> dict[str, str]:
    """Return each table by its name in the page."""
    owners = [*(f"SM{capability}" for capability in GPUS), "SGLang's side run on a GPU"]
    first = [
        [kind.label, ", ".join(f"`{flag}`" for flag in flags), f"`{stock}`" if stock else "-", *cells(kind)]
        for kind, flags, stock in plain()
    ]
    second = [[kind.label, *cells(kind)] for kind in MIXES]
    unknown = LEFT_AND_RUN.keys() - {row[0] for row in (*first, *second)}
    if unknown:
        raise SystemExit(f"schemes/stock.py: LEFT_AND_RUN names no row of docs/flags.md: {', '.join(sorted(unknown))}")
    return {
        "Algorithms": table(["`quant_algo` (any case)", "ours", "SGLang's own", *owners], first),
        "Mixes": table([f"a mix (`{UMBRELLA}`, SGLang's own `{STOCK_MIXED_FLAG}`)", *owners], second),
    }


def page() -> str:
    """Return the whole page with its tables replaced."""
    text = PAGE.read_text(encoding="utf-8")
    for name, content in render().items():
        begin = BEGIN.format(name)
        before, _, rest = text.partition(begin)
        _, end, after = rest.partition(END)
        if not end:
            raise SystemExit(f"{PAGE}: expected {begin} ... {END}")
        text = f"{before}{begin}\n\n{content}\n\n{END}{after}"
    return text


def main() -> int:
    """Write the page; with ``--check`` return 1 when it is stale."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    expected = page()
    if parser.parse_args().check:
        if PAGE.read_text(encoding="utf-8") != expected:
            print(f"{PAGE.name} is stale: run tools/ownership_table.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(expected, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Every malformed checkpoint raises an error that names the fault, and every legal oddity is read.

Each case is a real export with one change. A fault in the files' headers or per-tensor scales must raise an error in
``read_checkpoint`` and ``check_scalar_values``, which run before a server starts any process; block scales in
``check_all_values`` (and while loading: tests/layers).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_modelopt_ext.checkpoint.reader import Checkpoint, check_all_values, check_scalar_values, read_checkpoint
from sglang_modelopt_ext.errors import ModelOptExtError
from tests.support import edits
from tests.support.exports import export
from tests.support.models import TinyModel, model_dir

NVFP4, MXFP4 = "W4A8_NVFP4_FP8_CFG", "W4A8_MXFP4_FP8_CFG"
LAYER = "model.layers.1.mlp.down_proj"
Q = "model.layers.0.self_attn.q_proj"
Edit = Callable[[Path], None]


def preflight(folder: Path) -> Checkpoint:
    """Run the checks of a launching process."""
    checkpoint = read_checkpoint(folder)
    check_scalar_values(checkpoint)
    return checkpoint


def make(tmp_path: Path, recipe: str, *changes: Edit) -> Path:
    """Return a copy of the recipe's export of a small Llama with ``changes``."""
    return edits.copy_with(export(model_dir(TinyModel()), recipe), tmp_path / "checkpoint", changes)


def to_bytes(index: tuple[int, ...], value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a change that sets one byte of a one-byte tensor."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        raw = tensor.view(torch.uint8).clone()
        raw[index] = value
        return raw.view(tensor.dtype)

    return change


def full_scalar(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a change to a scalar of that value."""
    return lambda tensor: torch.full_like(tensor, value)


def edit_index(change: Callable[[dict[str, str]], None]) -> Edit:
    """Return a change of the index's weight map."""
    return edits.edit_json(edits.INDEX, lambda content: change(content["weight_map"]))


HEADER_FAULTS: dict[str, tuple[str, list[Edit], str]] = {
    # files
    "missing safetensors": (
        NVFP4,
        [edits.delete(edits.WEIGHTS)],
        r"checkpoint: \*\.safetensors: expected at least one",
    ),
    "truncated safetensors": (
        NVFP4,
        [edits.truncate()],
        r"model\.safetensors: file: expected a readable safetensors file",
    ),
    "cut by one byte": (
        NVFP4,
        [edits.truncate(keep=0.99999)],
        r"model\.safetensors: file: expected a readable safetensors",
    ),
    "garbage safetensors": (
        NVFP4,
        [edits.overwrite(edits.WEIGHTS, os.urandom(4096))],
        r"model\.safetensors: file: expected",
    ),
    "empty safetensors": (
        NVFP4,
        [edits.overwrite(edits.WEIGHTS, b"")],
        r"model\.safetensors: file: expected a readable",
    ),
    "index to a missing shard": (
        NVFP4,
        [edits.shard(), edit_index(lambda m: m.update({f"{Q}.weight": "model-00009-of-00009.safetensors"}))],
        rf"index\.json: {re.escape(Q)}\.weight: expected the file model-00009-of-00009\.safetensors beside it",
    ),
    "index outside the folder": (
        NVFP4,
        [edits.shard(), edit_index(lambda m: m.update({f"{Q}.weight": "../other/model.safetensors"}))],
        rf"index\.json: {re.escape(Q)}\.weight: expected the name of a file in the same folder",
    ),
    "index to an absolute path": (
        NVFP4,
        [edits.shard(), edit_index(lambda m: m.update({f"{Q}.weight": "/etc/passwd"}))],
        r"expected the name of a file in the same folder, got '/etc/passwd'",
    ),
    "index to the wrong shard": (
        NVFP4,
        [
            edits.shard(),
            edit_index(lambda m: m.update({f"{Q}.weight": sorted(set(m.values()) - {m[f"{Q}.weight"]})[0]})),
        ],
        rf"index\.json: {re.escape(Q)}\.weight: expected the tensor in",
    ),
    "index without a stored tensor": (
        NVFP4,
        [edits.shard(), edit_index(lambda m: m.pop(f"{Q}.weight"))],
        rf"index\.json: {re.escape(Q)}\.weight: expected every stored tensor in weight_map",
    ),
    "index without a weight map": (
        NVFP4,
        [edits.shard(), edits.set_fields(edits.INDEX, {"weight_map": {}})],
        r"index\.json: weight_map: expected an object",
    ),
    "index that is no JSON": (
        NVFP4,
        [edits.shard(), edits.overwrite(edits.INDEX, b"{")],
        r"index\.json: file: expected a JSON",
    ),
    "duplicate tensor": (
        NVFP4,
        [edits.shard(duplicate=f"{Q}.weight")],
        rf"{re.escape(Q)}\.weight: expected one copy of every tensor, got another",
    ),
    # configuration
    "unknown algo": (
        NVFP4,
        [edits.set_config({"quant_algo": "W3A5"})],
        r"quant_algo: expected one of .*W4A8_NVFP4_FP8.*got W3A5",
    ),
    "group size that is not the tensors'": (
        NVFP4,
        [edits.set_config({"group_size": 16})],
        r"group_size: expected 32, as the tensors",
    ),
    "group size 0": (
        NVFP4,
        [edits.set_file_config({"group_size": 0})],
        r"group_size: expected a positive integer, got 0",
    ),
    "negative group size": (
        MXFP4,
        [edits.set_file_config({"group_size": -32})],
        r"group_size: expected a positive integer",
    ),
    "group size as a string": (
        MXFP4,
        [edits.set_file_config({"group_size": "32"})],
        r"group_size: expected a positive integer",
    ),
    "excluded yet quantized": (
        NVFP4,
        [edits.set_config({"exclude_modules": [LAYER], "ignore": [LAYER]})],
        rf"{re.escape(LAYER)}\.\w+: expected no quantized tensors",
    ),
    # tensors of a layer
    "missing block scale": (
        NVFP4,
        [edits.drop_tensors(f"{LAYER}.weight_scale")],
        rf"{re.escape(LAYER)}\.weight_scale: expected a tensor",
    ),
    "missing global scale": (
        NVFP4,
        [edits.drop_tensors(f"{LAYER}.weight_scale_2")],
        rf"{re.escape(LAYER)}\.weight_scale_2: expected",
    ),
    "missing input scale": (
        NVFP4,
        [edits.drop_tensors(f"{LAYER}.input_scale")],
        rf"{re.escape(LAYER)}\.input_scale: expected a tensor",
    ),
    "missing weight": (
        MXFP4,
        [edits.drop_tensors(f"{LAYER}.weight")],
        rf"{re.escape(LAYER)}\.weight: expected a tensor",
    ),
    "scale of another recipe": (
        MXFP4,
        [edits.add_tensors({f"{LAYER}.weight_scale_2": torch.ones(())})],
        rf"{re.escape(LAYER)}\.weight_scale_2: expected only the tensors of W4A8_MXFP4_FP8",
    ),
    "scale of an unquantized layer": (
        NVFP4,
        [edits.add_tensors({"lm_head.input_scale": torch.ones(())})],
        r"lm_head\.input_scale: expected no quantized tensors",
    ),
    "KV scale nobody declares": (
        NVFP4,
        [edits.add_tensors({"model.layers.0.self_attn.k_proj.k_scale": torch.ones(())})],
        r"k_proj\.k_scale: expected no KV cache tensors",
    ),
    "wrong dtype of the codes": (
        NVFP4,
        [edits.retype_tensors(f"{LAYER}.weight", torch.int8, bits=True)],
        rf"{re.escape(LAYER)}\.weight: expected uint8, got int8",
    ),
    "wrong dtype of the block scale": (
        NVFP4,
        [edits.retype_tensors(f"{LAYER}.weight_scale", torch.uint8, bits=True)],
        rf"{re.escape(LAYER)}\.weight_scale: expected float8_e4m3fn, got uint8",
    ),
    "MXFP4 scale as e4m3": (
        MXFP4,
        [edits.retype_tensors(f"{LAYER}.weight_scale", torch.float8_e4m3fn, bits=True)],
        rf"{re.escape(LAYER)}\.weight_scale: expected uint8, got float8_e4m3fn",
    ),
    "bf16 global scale": (
        NVFP4,
        [edits.retype_tensors(f"{LAYER}.weight_scale_2", torch.bfloat16)],
        r"weight_scale_2: expected float32, got bfloat16",
    ),
    "codes of another width": (
        NVFP4,
        [edits.map_tensors(f"{LAYER}.weight", lambda t: t[:, :-16])],
        rf"{re.escape(LAYER)}\.weight_scale: expected shape",
    ),
    "codes of another height": (
        NVFP4,
        [edits.map_tensors(f"{LAYER}.weight", lambda t: t[:-1])],
        rf"{re.escape(LAYER)}\.weight_scale: expected shape",
    ),
    "block scale transposed": (
        NVFP4,
        [edits.map_tensors(f"{LAYER}.weight_scale", lambda t: t.t())],
        r"weight_scale: expected shape \[256, 16\], got \[16, 256\]",
    ),
    "K not a multiple of the group": (
        NVFP4,
        [edits.map_tensors(f"{LAYER}.weight", lambda t: t[:, :-4])],
        rf"{re.escape(LAYER)}\.weight_scale: expected a layer whose sizes the blocks divide",
    ),
    "empty codes": (
        NVFP4,
        [edits.map_tensors(f"{LAYER}.weight", lambda t: t[:, :0])],
        rf"{re.escape(LAYER)}\.weight: expected 2 dimensions",
    ),
    "scalar as a vector": (
        NVFP4,
        [edits.map_tensors(f"{LAYER}.input_scale", lambda t: t.repeat(2))],
        r"input_scale: expected shape \[\], got \[2\]",
    ),
    # fused layers
    "scale on two of three shards": (
        NVFP4,
        [edits.drop_tensors(f"{Q}.input_scale")],
        rf"{re.escape(Q)}\.input_scale: expected a tensor",
    ),
    "smoothing on one shard": (
        NVFP4,
        [edits.add_tensors({f"{Q}.pre_quant_scale": torch.ones(256, dtype=torch.bfloat16)})],
        r"k_proj\.pre_quant_scale: expected a tensor, as .*q_proj it is fused with",
    ),
    "one shard unquantized": (
        NVFP4,
        [
            edits.set_config({"exclude_modules": [Q, "lm_head"], "ignore": [Q, "lm_head"]}),
            edits.drop_tensors(f"{Q}.*"),
            edits.add_tensors({f"{Q}.weight": torch.zeros(256, 256, dtype=torch.bfloat16)}),
        ],
        rf"{re.escape(Q)}\.weight: expected W4A8_NVFP4_FP8, as .*, got unquantized",
    ),
    "one shard missing": (NVFP4, [edits.drop_tensors(f"{Q}.*")], rf"{re.escape(Q)}\.weight: expected a shard beside"),
    **{
        f"{name} {scale}": (
            NVFP4,
            [edits.map_tensors(f"{LAYER}.{scale}", full_scalar(value))],
            rf"{re.escape(LAYER)}\.{scale}: expected finite, positive, normal",
        )
        for scale in ("weight_scale_2", "input_scale")
        for name, value in {
            "NaN": float("nan"),
            "infinite": float("inf"),
            "zero": 0.0,
            "negative": -1.0,
            "subnormal": 1e-39,
        }.items()
    },
}

BLOCK_FAULTS: dict[str, tuple[str, list[Edit], str]] = {
    "NaN block scale": (
        NVFP4,
        [edits.map_tensors(f"{LAYER}.weight_scale", to_bytes((3, 2), 0x7F))],
        r"weight_scale: expected finite e4m3",
    ),
    "negative NaN block scale": (
        NVFP4,
        [edits.map_tensors(f"{LAYER}.weight_scale", to_bytes((3, 2), 0xFF))],
        r"weight_scale: expected finite e4m3",
    ),
    "negative block scale": (
        NVFP4,
        [edits.map_tensors(f"{LAYER}.weight_scale", to_bytes((3, 2), 0xB8))],
        r"weight_scale: expected block scales of zero or more",
    ),
    "ue8m0 byte 255": (
        MXFP4,
        [edits.map_tensors(f"{LAYER}.weight_scale", to_bytes((3, 2), 255))],
        r"weight_scale: expected ue8m0 exponents 0\.\.254, got 255",
    ),
    "zero block scale over codes": (
        NVFP4,
        [
            edits.map_tensors(f"{LAYER}.weight_scale", to_bytes((3, 2), 0)),
            edits.map_tensors(f"{LAYER}.weight", to_bytes((3, 40), 0x70)),
        ],
        r"weight_scale: expected a zero block scale only over all-zero codes",
    ),
}


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_refused_before_any_process_starts(tmp_path: Path, fault: str) -> None:
    recipe, changes, message = HEADER_FAULTS[fault]
    folder = make(tmp_path, recipe, *changes)
    with pytest.raises(ModelOptExtError, match=message) as caught:
        preflight(folder)
    line = caught.value.one_line()
    assert "\n" not in line
    assert re.match(r"ModelOptExtError: .+: .+: expected .+, got .+", line), line


@pytest.mark.parametrize("fault", BLOCK_FAULTS)
def test_block_scales_refused(tmp_path: Path, fault: str) -> None:
    recipe, changes, message = BLOCK_FAULTS[fault]
    folder = make(tmp_path, recipe, *changes)
    checkpoint = preflight(folder)
    with pytest.raises(ModelOptExtError, match=rf"model\.safetensors: {re.escape(LAYER)}\.{message}"):
        check_all_values(checkpoint)


def zero_block(scale_byte: int) -> list[Edit]:
    """Return changes that make one block all zero, its scale ``scale_byte``; half of its zeros are negative."""

    def clear(codes: torch.Tensor) -> torch.Tensor:
        codes = codes.clone()
        codes[3, 32:48] = 0x80
        return codes

    return [
        edits.map_tensors(f"{LAYER}.weight", clear),
        edits.map_tensors(f"{LAYER}.weight_scale", to_bytes((3, 2), scale_byte)),
    ]


def link_files(folder: Path) -> None:
    """Turn every file into a symbolic link, as in a hub cache."""
    store = folder.parent / "store"
    store.mkdir()
    for file in list(folder.iterdir()):
        file.rename(store / file.name)
        file.symlink_to(store / file.name)


def add_strangers(folder: Path) -> None:
    """Add files that have nothing to do with the checkpoint."""
    (folder / "README.md").write_text("hello")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.safetensors").write_bytes(b"not ours")
    (folder / "pytorch_model.bin").write_bytes(b"nor this")


LEGAL: dict[str, tuple[str, list[Edit]]] = {
    "as exported, NVFP4": (NVFP4, []),
    "as exported, MXFP4": (MXFP4, []),
    "zero block scale over zero codes": (NVFP4, zero_block(0)),
    "negative zero block scale over zero codes": (NVFP4, zero_block(0x80)),
    "ue8m0 byte 0 over zero codes": (MXFP4, zero_block(0)),
    "scalars of length one": (
        NVFP4,
        [edits.map_tensors(f"*.{name}", lambda t: t.reshape(1)) for name in ("input_scale", "weight_scale_2")],
    ),
    "exclusion that matches nothing": (
        NVFP4,
        [edits.set_config({"exclude_modules": ["no.such.layer*"], "ignore": ["no.such.layer*"]})],
    ),
    "algo in lower case": (NVFP4, [edits.set_config({"quant_algo": "w4a8_nvfp4_fp8"})]),
    "no group size": (NVFP4, [edits.set_file_config({"group_size": edits.REMOVE})]),
    "symbolic links": (NVFP4, [link_files]),
    "unrelated files": (NVFP4, [add_strangers]),
    "several files": (NVFP4, [edits.shard(3)]),
    "config.json alone": (NVFP4, [edits.drop_file_config]),
    "hf_quant_config.json alone": (MXFP4, [edits.drop_embedded_config]),
    "scales of their own for every shard": (NVFP4, [edits.distinct_shard_scales]),
}


@pytest.mark.parametrize("case", LEGAL)
def test_legal_oddities_are_read(tmp_path: Path, case: str) -> None:
    recipe, changes = LEGAL[case]
    checkpoint = preflight(make(tmp_path, recipe, *changes))
    check_all_values(checkpoint)
    algo = recipe.removesuffix("_CFG")
    assert {linear.scheme.algo for linear in checkpoint.linears.values()} == {algo}
    assert len(checkpoint.linears) == 2 * 7
    down = checkpoint.linears["layers.1.mlp.down_proj"]
    assert (down.n, down.k, down.scheme.weight.group_size) == (256, 512, 32)


def test_file_outside_the_index_is_ignored(tmp_path: Path) -> None:
    """With an index, other safetensors files of the folder are not the checkpoint's."""
    folder = make(tmp_path, NVFP4, edits.shard())
    (folder / "adapter.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    assert len(preflight(folder).linears) == 14


def test_multimodal_names(tmp_path: Path) -> None:
    """``model.language_model.`` prefixes name the same layers as SGLang's ``language_model.model.``."""

    def rename(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            if name.startswith("model."):
                tensors[name.replace("model.", "model.language_model.", 1)] = tensors.pop(name)

    checkpoint = preflight(make(tmp_path, NVFP4, edits.edit_tensors(rename)))
    assert "layers.1.mlp.down_proj" in checkpoint.linears
    assert checkpoint.spec_of("model.language_model.layers.0.mlp.up_proj.weight_scale") is not None


def test_headers_only(tmp_path: Path) -> None:
    """Reading a description does not read weights: codes and block scales may be anything."""
    folder = make(tmp_path, NVFP4)
    size = (folder / edits.WEIGHTS).stat().st_size
    header = int.from_bytes((folder / edits.WEIGHTS).read_bytes()[:8], "little")
    assert header < size / 2
    assert (
        read_checkpoint(folder).config.group_size
        == json.loads((folder / edits.QUANT_CONFIG).read_text())["quantization"]["group_size"]
    )

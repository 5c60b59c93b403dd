"""Edits of a copied checkpoint: other ways to store the same content, and malformed checkpoints.

    copy_with(export, tmp_path / "bad", [drop_tensors("*.q_proj.weight_scale"), set_config({"group_size": 16})])

An edit is a function that changes the folder it is given. They are applied in order.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Edit = Callable[[Path], None]
Tensors = dict[str, torch.Tensor]

CONFIG = "config.json"
QUANT_CONFIG = "hf_quant_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

REMOVE = object()
"""Value in :func:`set_config` and similar functions that removes the field."""


def copy_with(source: Path, target: Path, edits: Iterable[Edit] = ()) -> Path:
    """Copy the checkpoint to the new folder ``target``, apply the edits and return ``target``."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for edit in edits:
        edit(target)
    return target


# Configuration


def edit_json(file: str, change: Callable[[dict[str, Any]], None]) -> Edit:
    """Rewrite a JSON file after ``change(content)``."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / file).read_text(encoding="utf-8"))
        change(content)
        (folder / file).write_text(json.dumps(content, indent=4), encoding="utf-8")

    return edit


def set_fields(file: str, fields: Mapping[str, Any], section: str | None = None) -> Edit:
    """Set fields of a JSON file, or of one section of it; :data:`REMOVE` removes one."""

    def change(content: dict[str, Any]) -> None:
        part = content if section is None else content[section]
        for name, value in fields.items():
            if value is REMOVE:
                del part[name]
            else:
                part[name] = value

    return edit_json(file, change)


def set_file_config(fields: Mapping[str, Any]) -> Edit:
    """Set fields of the quantization section of hf_quant_config.json."""
    return set_fields(QUANT_CONFIG, fields, "quantization")


def set_embedded_config(fields: Mapping[str, Any]) -> Edit:
    """Set fields of the quantization section of config.json."""
    return set_fields(CONFIG, fields, "quantization_config")


def set_config(fields: Mapping[str, Any]) -> Edit:
    """Set fields of the quantization section of both files."""

    def edit(folder: Path) -> None:
        set_file_config(fields)(folder)
        set_embedded_config(fields)(folder)

    return edit


def drop_file_config(folder: Path) -> None:
    """Remove hf_quant_config.json."""
    (folder / QUANT_CONFIG).unlink()


def drop_embedded_config(folder: Path) -> None:
    """Remove the quantization section of config.json."""
    set_fields(CONFIG, {"quantization_config": REMOVE})(folder)


# Tensors


def read_tensors(folder: Path) -> Tensors:
    """Return all tensors of a checkpoint, from all of its files."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def write_tensors(tensors: Tensors, folder: Path) -> None:
    """Replace the weights of a checkpoint by one file."""
    for path in (*folder.glob("*.safetensors"), folder / INDEX):
        path.unlink(missing_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def edit_tensors(change: Callable[[Tensors], None]) -> Edit:
    """Rewrite the weights after ``change(tensors)``."""

    def edit(folder: Path) -> None:
        tensors = read_tensors(folder)
        change(tensors)
        write_tensors(tensors, folder)

    return edit


def map_tensors(pattern: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    """Replace every tensor whose name matches the pattern by ``change(tensor)``, of any dtype and shape."""

    def apply(tensors: Tensors) -> None:
        for name in matching(tensors, pattern):
            tensors[name] = change(tensors[name])

    return edit_tensors(apply)


def scale_tensors(factors: Mapping[str, float]) -> Edit:
    """Multiply tensors, by pattern of their name: ``{"*.k_proj.weight_scale_2": 1.5}``."""

    def apply(tensors: Tensors) -> None:
        for pattern, factor in factors.items():
            for name in matching(tensors, pattern):
                tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)

    return edit_tensors(apply)


def drop_tensors(pattern: str) -> Edit:
    """Remove every tensor whose name matches the pattern."""

    def apply(tensors: Tensors) -> None:
        for name in matching(tensors, pattern):
            del tensors[name]

    return edit_tensors(apply)


def add_tensors(new: Mapping[str, torch.Tensor]) -> Edit:
    """Add tensors, or replace those of the same name."""
    return edit_tensors(lambda tensors: tensors.update(new))


def retype_tensors(pattern: str, dtype: torch.dtype, bits: bool = False) -> Edit:
    """Store matching tensors in another dtype: converted, or with ``bits`` the same bytes under another label."""
    return map_tensors(pattern, lambda tensor: tensor.view(dtype) if bits else tensor.to(dtype))


def distinct_shard_scales(folder: Path) -> None:
    """Give q, k, v and gate, up scales of their own, as producers other than ModelOpt write them.

    ModelOpt makes the layers that a server fuses share ``weight_scale_2`` and ``input_scale``. The result is another
    model, but a legal one; a reader that uses one of the scales for all of them is clearly wrong. Input
    scales only grow, so that nothing is clipped.
    """
    weight = {"k_proj": 1.7, "v_proj": 0.6, "up_proj": 0.45}
    inputs = {"k_proj": 1.37, "v_proj": 2.9, "up_proj": 1.83}
    tensors = read_tensors(folder)
    for suffix, factors in (("weight_scale_2", weight), ("input_scale", inputs)):
        for layer, factor in factors.items():
            for name in fnmatch.filter(tensors, f"*.{layer}.{suffix}"):
                tensors[name] = tensors[name] * factor
    write_tensors(tensors, folder)


def distinct_expert_scales(gate_beside_up: bool = False) -> Edit:
    """Give every expert, and gate and up of each, scales of their own, as producers other than ModelOpt write them.

    With ``gate_beside_up`` gate and up keep the input scale of their expert in common, so that they can share a product.
    """

    def apply(tensors: Tensors) -> None:
        for name in list(tensors):
            match = re.fullmatch(r".*\.experts\.(\d+)\.(\w+)\.(weight_scale_2|input_scale)", name)
            if match is None:
                continue
            number, layer, kind = int(match[1]), match[2], match[3]
            factor = 1.0 + 0.31 * number
            if layer in ("up_proj", "w3") and (kind == "weight_scale_2" or not gate_beside_up):
                factor *= 1.83
            tensors[name] = tensors[name] * factor

    return edit_tensors(apply)


def matching(tensors: Tensors, pattern: str) -> list[str]:
    """Return the names that match the pattern, at least one."""
    names = fnmatch.filter(tensors, pattern)
    if not names:
        raise KeyError(f"no tensor matches {pattern}")
    return names


# Files


def shard(files: int = 2, duplicate: str | None = None) -> Edit:
    """Spread the weights over several files with an index, alternately, so that the parts of a layer are torn apart.

    ``duplicate`` names one tensor (by pattern) that is then stored in all of the files.
    """

    def edit(folder: Path) -> None:
        tensors = read_tensors(folder)
        copies = matching(tensors, duplicate) if duplicate is not None else []
        write_tensors({}, folder)
        (folder / WEIGHTS).unlink()
        where = {name: i % files for i, name in enumerate(sorted(tensors))}
        titles = [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)]
        for index, title in enumerate(titles):
            part = {name: tensor for name, tensor in tensors.items() if where[name] == index or name in copies}
            save_file(part, folder / title, {"format": "pt"})
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        index_map = {name: titles[where[name]] for name in sorted(tensors)}
        content = {"metadata": {"total_size": size}, "weight_map": index_map}
        (folder / INDEX).write_text(json.dumps(content), encoding="utf-8")

    return edit


def truncate(file: str = WEIGHTS, keep: float = 0.5) -> Edit:
    """Truncate a file to a share of its bytes, up to 1.0."""

    def edit(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: int(len(data) * keep)])

    return edit


def overwrite(file: str, content: bytes, offset: int | None = None) -> Edit:
    """Replace a file by other bytes, or with ``offset`` some bytes of it (negative: counted from the end)."""

    def edit(folder: Path) -> None:
        if offset is None:
            (folder / file).write_bytes(content)
            return
        data = bytearray((folder / file).read_bytes())
        start = offset % len(data)
        data[start : start + len(content)] = content
        (folder / file).write_bytes(bytes(data))

    return edit


def delete(file: str) -> Edit:
    """Remove a file."""
    return lambda folder: (folder / file).unlink()

"""The working copy that rules change: small files are copied and weights linked, so that the checkpoint is never written to."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file

from sglang_modelopt_ext.checkpoint.quant_config import (
    CONFIG_NAME,
    QUANT_CONFIG_NAME,
    QuantConfig,
    is_modelopt_section,
    read_quant_config,
)
from sglang_modelopt_ext.checkpoint.tensors import (
    INDEX_NAME,
    StoredTensor,
    read_headers,
    read_json_object,
    weight_files,
)
from sglang_modelopt_ext.errors import ModelOptExtError

_NESTED = "text_config"
_SECTION = "quantization_config"


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One change.

    Attributes:
        rule: its name.
        file: the file that is changed.
        subject: the tensor or field.
        change: what becomes of it, and from what that follows.
    """

    rule: str
    file: str
    subject: str
    change: str


@dataclass
class WorkingCopy:
    """A folder with the checkpoint's files, on which rules work.

    Attributes:
        source: the checkpoint.
        folder: the working copy.
        added: tensors to store in addition, by name.
        replaced: tensors whose value is to be replaced, by name; of the stored shape and type.
        changed: names of the small files that differ from the checkpoint's.
    """

    source: Path
    folder: Path
    added: dict[str, torch.Tensor] = field(default_factory=dict)
    replaced: dict[str, torch.Tensor] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, source: Path, folder: Path) -> WorkingCopy:
        """Fill the empty ``folder`` from the checkpoint ``source``. Raises ModelOptExtError for files that cannot be read."""
        for file in weight_files(source):
            (folder / file.name).symlink_to(file.resolve())
        for name in (CONFIG_NAME, QUANT_CONFIG_NAME, INDEX_NAME):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        return cls(source, folder)

    def headers(self) -> dict[str, StoredTensor]:
        """Return the stored tensors. Raises ModelOptExtError for files that cannot be read."""
        return read_headers(self.folder)

    def config(self) -> QuantConfig:
        """Return the declared quantization. Raises ModelOptExtError where there is none, or the two files contradict each other."""
        found = read_quant_config(self.folder)
        if found is None:
            raise ModelOptExtError.at(self.source, "quantization_config", "a checkpoint exported by ModelOpt", "none")
        return found

    def section(self, name: str) -> dict[str, Any] | None:
        """Return the quantization section of config.json or hf_quant_config.json, None where it is not ModelOpt's."""
        if not (self.folder / name).is_file():
            return None
        found = _find_section(name, read_json_object(self.folder / name))
        return dict(found) if found is not None else None

    def set_section(self, name: str, section: Mapping[str, Any]) -> None:
        """Replace a section that is there."""
        content = read_json_object(self.folder / name)
        old = _find_section(name, content)
        assert old is not None, "only a section that was found is replaced"
        old.clear()
        old.update(section)
        (self.folder / name).write_text(json.dumps(content, indent=4), encoding="utf-8")
        self.changed.add(name)

    def sections(self) -> dict[str, dict[str, Any]]:
        """Return the sections that are there, by the name of their file; hf_quant_config.json first."""
        found = {name: self.section(name) for name in (QUANT_CONFIG_NAME, CONFIG_NAME)}
        return {name: section for name, section in found.items() if section is not None}

    @property
    def added_file(self) -> str:
        """The name of the file for tensors to add: one of its own, so that no other file is copied."""
        if self._alone() is not None:
            return "model-00002-of-00002.safetensors"
        names = (f"model-repaired-{number}.safetensors" for number in itertools.count(1))
        return next(name for name in names if not (self.folder / name).exists())

    def _alone(self) -> Path | None:
        """Return the only file of weights where there is no index."""
        files = weight_files(self.folder)
        return files[0] if len(files) == 1 and not (self.folder / INDEX_NAME).exists() else None

    def store_added(self) -> None:
        """Write the tensors to add, and an index that has them."""
        if not self.added:
            return
        stored, own, alone = self.headers(), self.added_file, self._alone()
        names = {tensor.file.name: tensor.file.name for tensor in stored.values()}
        if alone is not None:
            # transformers reads model.safetensors alone where there is one, whatever an index says.
            names = {alone.name: "model-00001-of-00002.safetensors"}
            alone.rename(self.folder / names[alone.name])
        save_file(
            {name: tensor.contiguous() for name, tensor in self.added.items()}, self.folder / own, {"format": "pt"}
        )
        index = read_json_object(self.folder / INDEX_NAME) if (self.folder / INDEX_NAME).exists() else {}
        metadata = index.get("metadata")
        total = sum(tensor.num_bytes for tensor in stored.values())
        total += sum(tensor.numel() * tensor.itemsize for tensor in self.added.values())
        index["metadata"] = {**(metadata if isinstance(metadata, dict) else {}), "total_size": total}
        index["weight_map"] = {name: names[tensor.file.name] for name, tensor in stored.items()} | dict.fromkeys(
            self.added, own
        )
        (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")
        self.changed |= {INDEX_NAME, own}


def _find_section(name: str, content: dict[str, Any]) -> dict[str, Any] | None:
    """Return the section inside ``content`` that readers use, to be changed in place."""
    if name == QUANT_CONFIG_NAME:
        nested = content.get("quantization", content)
        return nested if isinstance(nested, dict) and nested else None
    for holder in (content, content.get(_NESTED)):
        section = holder.get(_SECTION) if isinstance(holder, dict) else None
        if isinstance(section, dict):
            if not is_modelopt_section(section):
                return None
            nested = section.get("quantization", section)
            return nested if isinstance(nested, dict) else None
    return None


def quantized_modules(tensors: Mapping[str, StoredTensor]) -> set[str]:
    """Return the modules that store a scale of their weight, or a weight of one byte an entry."""
    found = set()
    for name, tensor in tensors.items():
        module, _, last = name.rpartition(".")
        if last in ("weight_scale", "weight_scale_2") or (last == "weight" and tensor.dtype.itemsize == 1):
            found.add(module)
    return found

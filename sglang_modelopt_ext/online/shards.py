"""Safetensors files of a checkpoint, written one by one as tensors come."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from sglang_modelopt_ext.checkpoint.hub import SINGLE_FILE
from sglang_modelopt_ext.checkpoint.tensors import INDEX_NAME

LARGEST = 1 << 30
"""Bytes that are collected before a file is written; a file is larger by less than one layer."""


class Shards:
    """The files of one checkpoint.

    Args:
        folder: an empty folder for them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._waiting: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._total = 0
        self._written: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Store a tensor; a file is written when enough of them wait."""
        self._waiting[name] = tensor
        self._bytes += tensor.numel() * tensor.itemsize
        if self._bytes >= LARGEST:
            self._write()

    def close(self) -> None:
        """Write what waits, and give the files their names: one without an index, or several with one."""
        if self._waiting:
            self._write()
        count = len(self._written)
        if count == 1:
            self._part(0).rename(self.folder / SINGLE_FILE)
            return
        names = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
        for number, name in enumerate(names):
            self._part(number).rename(self.folder / name)
        weight_map = {tensor: name for name, tensors in zip(names, self._written, strict=True) for tensor in tensors}
        index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}"

    def _write(self) -> None:
        save_file(self._waiting, self._part(len(self._written)), {"format": "pt"})
        self._written.append(list(self._waiting))
        self._total += self._bytes
        self._waiting, self._bytes = {}, 0

"""The tensors of a checkpoint folder, read from safetensors headers only.

Faults that show without reading a weight are found here: missing and unreadable files, an index that names a missing file or one
outside the folder, tensors stored twice.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sglang_modelopt_ext.checkpoint.hub import hub_model, hub_tensor_names
from sglang_modelopt_ext.errors import ModelOptExtError

INDEX_NAME = "model.safetensors.index.json"

MOST_JSON_BYTES = 512 << 20
"""Size of a configuration or an index; that of a model with a hundred thousand tensors has 10 MB."""

DEEPEST_JSON = 64
"""Levels of nesting in a configuration; real ones have five."""

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's name, file, dtype and shape, as its safetensors header states them."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor's data, without its header."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in ``path``. Raises ModelOptExtError when the file cannot be read or holds anything else."""
    try:
        _check_regular(path, f"a JSON object of at most {MOST_JSON_BYTES >> 20} MB", MOST_JSON_BYTES)
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
    except ModelOptExtError:
        raise
    except (
        OSError,
        ValueError,
        RecursionError,
    ) as error:  # ValueError: no JSON, no UTF-8, or a number of too many digits
        raise ModelOptExtError.at(path, "file", "a JSON object", error) from error
    if not isinstance(value, dict):
        raise ModelOptExtError.at(path, "file", "a JSON object", type(value).__name__)
    _check_depth(path, value)
    return value


def _check_depth(path: Path, value: object) -> None:
    """Raise ModelOptExtError for nesting that would exhaust the recursion of a function that walks or prints the value."""
    level: list[object] = [value]
    for _ in range(DEEPEST_JSON):
        level = [
            entry
            for holder in level
            for entry in (holder.values() if isinstance(holder, dict) else holder if isinstance(holder, list) else ())
            if isinstance(entry, (dict, list))
        ]
    if level:
        raise ModelOptExtError.at(path, "file", f"JSON nested at most {DEEPEST_JSON} levels deep", "more")


def _check_regular(path: Path, expected: str, most: int | None = None) -> None:
    """Raise ModelOptExtError for a pipe or a device, which could be read for ever, and for a file of more than ``most`` bytes.

    Raises OSError where there is no such file.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ModelOptExtError.at(path, "file", expected, "no regular file")
    if most is not None and status.st_size > most:
        raise ModelOptExtError.at(path, "file", expected, f"{status.st_size >> 20} MB")


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file on the CPU, as a context manager; the library's errors become a ModelOptExtError."""
    try:
        _check_regular(path, "a readable safetensors file")
        with safe_open(path, framework="pt", device="cpu") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise ModelOptExtError.at(path, "file", "a readable safetensors file", error) from error


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of the checkpoint, sorted: those that the index names where there is one, else all.

    Raises:
        ModelOptExtError: there is no file, or the index names a missing file or one outside the folder.
    """
    index = folder / INDEX_NAME
    if index.exists():
        return tuple(sorted({folder / name for name in _weight_map(index).values()}))
    files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        raise ModelOptExtError.at(folder, "*.safetensors", "at least one safetensors file", "none")
    return files


def _weight_map(index: Path) -> dict[str, str]:
    """Return ``{tensor: file name}`` of an index. Raises ModelOptExtError for a file that is not beside it, by a plain name."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelOptExtError.at(index, "weight_map", "an object of tensor names to file names", repr(weight_map)[:80])
    for tensor, name in weight_map.items():
        # A symbolic link in the folder is fine (hub caches are made of them); a path that leaves it is not.
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise ModelOptExtError.at(index, tensor, "the name of a file in the same folder", repr(name))
        if not _is_file(index.parent / name):
            raise ModelOptExtError.at(index, tensor, f"the file {name} beside it", "no such file")
    return weight_map


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def tensor_names(folder: Path) -> Collection[str]:
    """Return the names of a checkpoint's tensors, from its index where it has one.

    Of a hub model without an index that is not downloaded yet, the hub is asked for the header of its file. Empty where the
    weights are not there and the hub does not answer.

    Raises:
        ModelOptExtError: the index or a file cannot be read.
    """
    index = folder / INDEX_NAME
    if index.exists():
        found = read_json_object(index).get("weight_map")
        return found.keys() if isinstance(found, dict) else ()
    if any(folder.glob("*.safetensors")):
        return read_headers(folder).keys()
    model = hub_model(folder)
    return hub_tensor_names(*model) if model is not None else ()


def stored_shape(folder: Path, name: str) -> tuple[int, ...] | None:
    """Return the shape of one tensor, from the header of its file alone; None where no file has it.

    Raises:
        ModelOptExtError: the index or a file cannot be read, or the weights are not there.
    """
    index = folder / INDEX_NAME
    listed = _weight_map(index).get(name) if index.exists() else None
    for file in weight_files(folder) if listed is None else (folder / listed,):
        with open_safetensors(file) as handle:
            if name in handle.keys():  # noqa: SIM118 - not a mapping
                return tuple(handle.get_slice(name).get_shape())
    return None


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the checkpoint in ``folder``, by name, from the safetensors headers only.

    Raises:
        ModelOptExtError: a file is unreadable or truncated, a tensor is stored twice, or the index disagrees with the files.
    """
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        with open_safetensors(file) as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                header = handle.get_slice(name)
                if name in found:
                    raise ModelOptExtError.at(file, name, "one copy of every tensor", f"another in {found[name].file}")
                dtype = _DTYPES.get(header.get_dtype())
                if dtype is None:
                    raise ModelOptExtError.at(file, name, f"one of {', '.join(_DTYPES)}", header.get_dtype())
                found[name] = StoredTensor(name, file, dtype, tuple(header.get_shape()))
    index = folder / INDEX_NAME
    if index.exists():
        _check_index(index, found)
    return found


def _check_index(index: Path, found: dict[str, StoredTensor]) -> None:
    for name, file in _weight_map(index).items():
        if name not in found or found[name].file.name != file:
            got = found[name].file.name if name in found else "no such tensor"
            raise ModelOptExtError.at(index, name, f"the tensor in {file}", got)
    unlisted = sorted(set(found) - set(_weight_map(index)))
    if unlisted:
        raise ModelOptExtError.at(
            index, unlisted[0], "every stored tensor in weight_map", f"it only in {found[unlisted[0]].file}"
        )


def read_tensors(stored: list[StoredTensor]) -> Iterator[tuple[StoredTensor, torch.Tensor]]:
    """Yield each header of ``stored`` with its data on the CPU, file by file, so that each file is opened once."""
    for file in sorted({tensor.file for tensor in stored}):
        with open_safetensors(file) as handle:
            for tensor in stored:
                if tensor.file == file:
                    yield tensor, handle.get_tensor(tensor.name)

"""The command ``repair``: what it would do, and a repaired copy of a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sglang_modelopt_ext import __version__
from sglang_modelopt_ext.checkpoint.quant_config import CONFIG_NAME, QUANT_CONFIG_NAME
from sglang_modelopt_ext.checkpoint.reader import survey_checkpoint
from sglang_modelopt_ext.checkpoint.tensors import INDEX_NAME, read_tensors
from sglang_modelopt_ext.checkpoint.values import check_values
from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.files.whole import check_space, make_readable, move_into_place, partial_folder
from sglang_modelopt_ext.workflow.quantize.export import check_folder, check_output
from sglang_modelopt_ext.workflow.repair.configs import reconcile, reconcile_exclusions, strip_sentinels
from sglang_modelopt_ext.workflow.repair.scales import fill_scales
from sglang_modelopt_ext.workflow.repair.working_copy import Step, WorkingCopy
from sglang_modelopt_kernels.formats.base import ValueRule

RECORD_NAME = "repairs.json"
"""The file of a repaired checkpoint that lists what was changed."""

TRUSTED = (QUANT_CONFIG_NAME, CONFIG_NAME)
_SMALL = (CONFIG_NAME, QUANT_CONFIG_NAME, INDEX_NAME)


@dataclass(frozen=True)
class Repair:
    """The result of :func:`repair`.

    Attributes:
        steps: the changes, in order.
        problems: the faults that remain after them, one line each; then nothing is written.
        written: whether the output was written.
    """

    steps: Sequence[Step]
    problems: Sequence[str]
    written: bool


def repair(
    folder: Path, output: Path | None, *, trust: str | None = None, link: bool = True, overwrite: bool = False
) -> Repair:
    """Find the faults of a checkpoint and write a repaired copy; the checkpoint itself is never written to.

    Args:
        folder: the checkpoint.
        output: the folder to make; None to say only what would be done.
        trust: the configuration file that is right where the two disagree and the tensors fit both.
        link: make hard links to the files of weights that are not changed, where the file system can.
        overwrite: replace the checkpoint that is in ``output``.

    Raises:
        ModelOptExtError: files that cannot be read, an output that must not be written, or no space on disk.
    """
    if output is not None:
        check_output(folder, output, overwrite)
    with tempfile.TemporaryDirectory(prefix="modelopt-repair-") as scratch:
        copy = WorkingCopy.of(folder, Path(scratch))
        steps, problems = _plan(copy, trust)
        if problems or not steps or output is None:
            return Repair(steps, problems, False)
        copy.store_added()
        try:
            problem = _write(copy, output, steps, link)
        except OSError as error:
            raise ModelOptExtError.at(output, "output", "a folder that can be written", error) from error
    return Repair(steps, [problem] if problem else (), problem is None)


def _plan(copy: WorkingCopy, trust: str | None) -> tuple[list[Step], list[str]]:
    """Apply every rule to the working copy; return the steps, and the faults that remain."""
    copy.headers()  # a file that cannot be read is no fault of the kind that is repaired
    steps: list[Step] = []
    problems: list[ModelOptExtError] = []
    try:
        steps += strip_sentinels(copy)
        steps += reconcile(copy, trust)
        steps += reconcile_exclusions(copy)
        steps += fill_scales(copy)
        problems = _remaining(copy)
    except ModelOptExtError as error:
        problems.append(error)
    # The reader names files of the working copy.
    lines = (str(problem).replace(f"{copy.folder}{os.sep}", f"{copy.source}{os.sep}") for problem in problems)
    return steps, list(dict.fromkeys(lines))


def _remaining(copy: WorkingCopy) -> list[ModelOptExtError]:
    """Return the faults that the strict reader finds, as if the tensors to add and to replace were stored.

    Raises:
        ModelOptExtError: a scale of a whole tensor is illegal.
    """
    with tempfile.TemporaryDirectory(prefix="modelopt-repair-") as scratch:
        trial = WorkingCopy(copy.source, Path(scratch), added=copy.added)
        for file in copy.folder.iterdir():
            shutil.copy(file, trial.folder / file.name, follow_symlinks=False)
        trial.store_added()
        checkpoint, problems = survey_checkpoint(trial.folder)
        scalars = [
            linear.stored[spec.name]
            for linear in checkpoint.linears.values()
            for spec in linear.scheme.tensors
            if spec.is_scalar and spec.name in linear.stored and linear.stored[spec.name].name not in copy.replaced
        ]
        if not problems:
            for stored, tensor in read_tensors(scalars):
                check_values(copy.source / stored.file.name, stored.name, tensor, ValueRule.POSITIVE)
        return [
            ModelOptExtError(str(problem).replace(f"{trial.folder}{os.sep}", f"{copy.source}{os.sep}"))
            for problem in problems
        ]


def _write(copy: WorkingCopy, output: Path, steps: Sequence[Step], link: bool) -> str | None:
    """Write the repaired checkpoint, read it back strictly with every value, and rename it to its place.

    Returns:
        None, or the fault that was found in its values: nothing is written then.

    Raises:
        ModelOptExtError: no space on disk.
    """
    weights = {file.name: file.resolve() for file in copy.folder.iterdir() if file.is_symlink()}
    patched = {name for name, file in weights.items() if _replaced_in(file, copy.replaced)}
    needed = sum(file.stat().st_size for name, file in weights.items() if name in patched or not link)
    check_space(output, needed)
    kept = {file.resolve() for file in weights.values()}
    with partial_folder(output) as scratch:
        own: set[Path] = set()
        for file in sorted(copy.source.iterdir()):
            taken = file.resolve() in kept or file.name in (*_SMALL, *copy.changed) or file.name.startswith(".")
            if file.is_dir() and not taken:
                shutil.copytree(file, scratch / file.name)
            elif not taken:
                own |= _place(file.resolve(), scratch / file.name, link and file.suffix == ".safetensors")
        for file in copy.folder.iterdir():
            if not file.is_symlink():
                own |= _place(file, scratch / file.name, link=False)
        for name, file in weights.items():
            if name in patched:
                own |= _place(file, scratch / name, link=False)
                _patch(scratch / name, copy.replaced)
            else:
                own |= _place(file, scratch / name, link)
        record = {
            "version": __version__,
            "source": copy.source.name,
            "steps": [{name: getattr(step, name) for name in Step.__struct_fields__} for step in steps],
        }
        (scratch / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        try:
            check_folder(scratch)
        except ModelOptExtError as error:
            return str(error).replace(f"{scratch}{os.sep}", f"{copy.source}{os.sep}")
        make_readable(scratch, {*own, scratch / RECORD_NAME})
        move_into_place(scratch, output)
    return None


def _place(file: Path, target: Path, link: bool) -> set[Path]:
    """Link or copy a file; return the new file where it is a copy, whose permissions are ours to set."""
    if link:
        try:
            os.link(file, target)
        except OSError:  # another file system, or one without links
            pass
        else:
            return set()
    shutil.copyfile(file, target)
    return {target}


def _header(file: Path) -> tuple[dict[str, dict[str, list[int]]], int]:
    """Return the header of a safetensors file that was read before, and the offset of its data."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(size)), 8 + size


def _replaced_in(file: Path, replaced: dict[str, torch.Tensor]) -> bool:
    return bool(replaced) and not replaced.keys().isdisjoint(_header(file)[0])


def _patch(file: Path, replaced: dict[str, torch.Tensor]) -> None:
    """Write the new values over the old ones, which have the same size."""
    header, data = _header(file)
    with file.open("r+b") as stream:
        for name in sorted(replaced.keys() & header.keys()):
            first, end = header[name]["data_offsets"]
            content = replaced[name].reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
            assert len(content) == end - first, "a value is replaced by one of its type"
            stream.seek(data + first)
            stream.write(content)

"""The private work folder of a running or interrupted search: ``.NAME.autoquant`` beside the output folder.

It holds the inputs of the run (``manifest.json``), the progress of scoring (``scores.json``), and ModelOpt's own state
with its calibration (``modelopt.pth``). Only its owner may read the folder, and only a run with the same inputs, the
bytes of the model and the tokens of the text included, resumes from it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
from tqdm import tqdm

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.files.disk import full_disk
from sglang_modelopt_ext.files.interrupts import signals_ignored
from sglang_modelopt_ext.workflow.autoquant.search import Progress
from sglang_modelopt_ext.workflow.autoquant.state import State, Struct, write_json
from sglang_modelopt_ext.workflow.common.processes import Processes

MANIFEST, SCORES, MODELOPT = "manifest.json", "scores.json", "modelopt.pth"


class _Saved(Struct, frozen=True, kw_only=True):
    manifest: str
    progress: Progress


@dataclass
class Work:
    """The work folder of one run.

    Attributes:
        folder: its path; None in a process that keeps nothing.
        plan: the inputs of the run: the state without scores.
        progress: the progress of scoring.
    """

    folder: Path | None
    plan: State
    progress: Progress

    @property
    def checkpoint(self) -> Path | None:
        """Return the path of ModelOpt's own state file."""
        return None if self.folder is None else self.folder / MODELOPT

    def save(self, progress: Progress) -> None:
        """Store the progress."""
        self.progress = progress
        if self.folder is not None:
            write_json(self.folder / SCORES, _Saved(manifest=self.plan.digest, progress=progress))


@contextlib.contextmanager
def shared_work(processes: Processes, output: Path, plan: State, *, resume: bool, overwrite: bool) -> Iterator[Work]:
    """Yield the work of all processes: the first one has the folder (:func:`work_folder`), the others its progress.

    Raises:
        ModelOptExtError: the processes have different inputs, or :func:`work_folder` rejects them.
    """
    if len(digests := set(processes.gather(plan.digest))) > 1:
        expected = "the same model, text, formats and versions for every process"
        raise ModelOptExtError.at("torchrun", "processes", expected, f"{len(digests)} different searches")
    if not processes.is_first:
        yield Work(None, plan, processes.from_first(Progress))
        return
    with work_folder(output, plan, resume=resume, overwrite=overwrite) as work:
        processes.from_first(lambda: work.progress)
        yield work


@contextlib.contextmanager
def work_folder(output: Path, plan: State, *, resume: bool, overwrite: bool) -> Iterator[Work]:
    """Yield the work folder for ``output``; remove it when the block succeeds, keep it for ``--resume`` otherwise.

    Raises:
        ModelOptExtError: an interrupted search exists without ``resume``, none exists with it, or its inputs differ.
    """
    folder = output.parent / f".{output.name}.autoquant"
    exists = os.path.lexists(folder)
    if exists and not resume and not overwrite:
        raise ModelOptExtError.at(
            folder, "output", "--resume to continue it, or --overwrite to discard it", "an interrupted search"
        )
    if resume and not exists:
        raise ModelOptExtError.at(folder, "--resume", "an interrupted search", "none")
    if exists:
        _check_private(folder)
    if exists and not resume:
        with _locked(folder):
            shutil.rmtree(folder)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=resume)
    except OSError as error:
        raise ModelOptExtError.at(folder, "output", "a folder that can be made", error) from error
    with _locked(folder):
        progress = _read(folder, plan) if resume else Progress()
        try:
            if not (folder / MANIFEST).exists():
                write_json(folder / MANIFEST, plan)
            yield Work(folder, plan, progress)
        except KeyboardInterrupt:
            tqdm.write(f"the search is kept in {folder}: --resume continues it", file=sys.stderr)
            raise
        except OSError as error:
            raise full_disk(folder, error) or error from error
        with signals_ignored():
            shutil.rmtree(folder)


def _check_private(folder: Path) -> None:
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ModelOptExtError.at(
            folder, "--resume", "a folder of this user alone", "another kind of file, owner or mode"
        )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ModelOptExtError.at(folder, "output", "one search at a time", "one that is running") from error
        yield
    finally:
        os.close(handle)


def _read(folder: Path, plan: State) -> Progress:
    manifest = folder / MANIFEST
    if not manifest.exists():  # killed before the manifest was written: there is no progress
        return Progress()
    try:
        then = msgspec.json.decode(manifest.read_bytes(), type=State)
        if then.digest != plan.digest:
            fields = [name for name in State.__struct_fields__ if getattr(then, name) != getattr(plan, name)]
            raise ModelOptExtError.at(
                manifest, ", ".join(fields), "what the interrupted search was asked for", "another"
            )
        if not (folder / SCORES).exists():
            return Progress()
        saved = msgspec.json.decode((folder / SCORES).read_bytes(), type=_Saved)
    except (OSError, msgspec.DecodeError) as error:
        raise ModelOptExtError.at(folder, "--resume", "the files of an interrupted search", error) from error
    if saved.manifest != plan.digest:
        raise ModelOptExtError.at(folder / SCORES, "manifest", plan.digest, saved.manifest)
    return saved.progress

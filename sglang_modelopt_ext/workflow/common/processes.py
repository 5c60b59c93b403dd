"""The processes that ``torchrun`` starts for one command: the data that they share, and an error in one that ends all."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from sglang_modelopt_ext.errors import ModelOptExtError
from sglang_modelopt_ext.workflow.common.base_model import device_for

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")

_PATIENCE = timedelta(hours=24)
"""How long the other processes wait for the first one, which measures and exports."""
_FAILED = "sglang-modelopt/failed"


class OtherProcessFailed(ModelOptExtError):
    """The end of a process because another one failed, which prints why."""


@dataclass(frozen=True)
class Processes:
    """The processes that share the work of one command; one by default.

    Attributes:
        rank: the number of this one.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Return whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items of this process: every ``world``-th one."""
        return items[self.rank :: self.world]

    def from_first(self, make: Callable[[], T]) -> T:
        """Return in every process what ``make`` returns in the first one; it is called there only.

        Raises:
            ModelOptExtError: another process ended.
        """
        if self.world == 1:
            return make()
        box: list[Any] = [make() if self.is_first else None]
        with _peers_needed():
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, own: T) -> list[T]:
        """Return the value of every process, by rank. Raises ModelOptExtError where another process ended."""
        if self.world == 1:
            return [own]
        found: list[Any] = [None] * self.world
        with _peers_needed():
            torch.distributed.all_gather_object(found, own)
        return found


@contextmanager
def joined(device: str | None) -> Iterator[tuple[Processes, str]]:
    """Join the processes that ``torchrun`` started for the block; yield them and this one's device.

    The first process to fail raises its error; the others raise OtherProcessFailed, so that one line is printed.

    Args:
        device: ``cpu``, ``cuda`` or ``auto``; None for CUDA where there is a GPU.

    Raises:
        ModelOptExtError: a device that several processes cannot have, or processes that were not started by ``torchrun``.
    """
    device = device_for(device)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not torch.distributed.is_available():
        yield Processes(), device
        return
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    store, processes = _rendezvous()
    with _one_error(store, processes):
        if device == "auto":
            raise ModelOptExtError.at("command line", "--device", "cpu or cuda with several processes", device)
        backend = "gloo"
        if device.startswith("cuda"):
            local = int(os.environ.get("LOCAL_RANK", "0"))
            torch.cuda.set_device(local)
            backend, device = "cpu:gloo,cuda:nccl", f"cuda:{local}"
        torch.distributed.init_process_group(
            backend,
            store=PrefixStore("groups", store),
            rank=processes.rank,
            world_size=processes.world,
            timeout=_PATIENCE,
        )
        yield processes, device
        # The others wait: a launcher ends all processes when one ends, the exporting one included.
        with _peers_needed():
            torch.distributed.barrier()
        # Not after an error: it would wait for processes that are in the middle of something else.
        torch.distributed.destroy_process_group()


def _rendezvous() -> tuple[Store, Processes]:
    """Return the launcher's store and this process. Raises ModelOptExtError where the launcher left out a variable."""
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, world = next(rendezvous("env://"))
    except (ValueError, RuntimeError) as error:
        expected = "processes that torchrun started, with RANK, MASTER_ADDR and MASTER_PORT beside WORLD_SIZE"
        raise ModelOptExtError.at("torchrun", "environment", expected, error) from error
    return store, Processes(rank, world)


@contextmanager
def _one_error(store: Store, processes: Processes) -> Iterator[None]:
    """Raise OtherProcessFailed in the place of an error of the block where another process failed before."""
    try:
        yield
    except BaseException as error:
        if not _is_first_to_fail(store):
            raise OtherProcessFailed("another process failed") from error
        if not processes.is_first:
            print(file=sys.stderr)  # end the line of the first process's progress bar
        raise


def _is_first_to_fail(store: Store) -> bool:
    try:
        return store.add(_FAILED, 1) == 1
    except RuntimeError:  # the process that had the store is gone
        return False


@contextmanager
def _peers_needed() -> Iterator[None]:
    """Raise ModelOptExtError where an exchange in the block fails because another process ended."""
    try:
        yield
    except RuntimeError as error:
        raise ModelOptExtError.at("torchrun", "processes", "all of them until the end", "one that ended") from error

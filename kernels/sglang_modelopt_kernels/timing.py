"""Time on a GPU, as a server spends it: in replays of a captured graph, over weights that are not in the cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

COLD_BYTES = 200_000_000
"""More than the cache of any GPU here: as many copies of a weight as fill this are multiplied in turn."""

LAUNCHES = 20
REPLAYS = 7


def median_us(call: Callable[[int], object], launches: int = LAUNCHES, replays: int = REPLAYS) -> float:
    """Microseconds of one ``call(index)``, the median over replays of a graph of that many calls with index 0, 1, ..."""
    call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(launches):
            call(index)
    times = []
    for _ in range(replays + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / launches * 1e3)
    return statistics.median(times[1:])

"""Timing on a GPU as a server runs: replays of a captured CUDA graph, over weights that are not in L2."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

COLD_BYTES = 200_000_000
"""More bytes than the L2 of any supported GPU: launches cycle through as many copies of a weight as fill it."""

LAUNCHES = 20
REPLAYS = 7


def median_us(call: Callable[[int], object], launches: int = LAUNCHES, replays: int = REPLAYS) -> float:
    """Return the microseconds of one ``call(index)``: the median over replays of a graph of ``launches`` calls, index 0, 1, ..."""
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

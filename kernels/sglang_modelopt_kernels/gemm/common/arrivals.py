"""Counters by which the programs of a tile that is split along K learn which of them comes last; zero between launches."""

from __future__ import annotations

import torch

COUNTERS = 4096
"""Tiles of a split product, at most."""
STREAMS = 64
"""Streams of a device whose products may run at the same time."""
_of_device: dict[torch.device, tuple[torch.Tensor, dict[int, int]]] = {}


def arrivals(device: torch.device) -> torch.Tensor:
    """Return COUNTERS int32 zeros of the current stream of ``device``.

    Products of one stream follow each other, so that they share counters; those of two streams must not. A CUDA graph counts as the
    stream it was captured on. A graph that is captured before any product has run gets counters of its own, which it clears.
    """
    if device.type != "cuda":
        return torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    if device not in _of_device:
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        _of_device[device] = torch.zeros((STREAMS, COUNTERS), dtype=torch.int32, device=device), {}
        # Other streams find them cleared.
        torch.cuda.synchronize(device)
    pool, slots = _of_device[device]
    slot = slots.setdefault(stream, len(slots))
    return pool[slot] if slot < STREAMS else torch.zeros(COUNTERS, dtype=torch.int32, device=device)

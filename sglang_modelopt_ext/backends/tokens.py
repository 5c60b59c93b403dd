"""The numbers of tokens (M) with which a backend is checked before it serves."""

from __future__ import annotations

from collections.abc import Callable, Hashable

SPREAD = (1, 24, 40, 80, 300, 900, 2049)
"""For backends whose kernels do not tell how they choose by M: those of PyTorch and of other packages."""
MOST = 4096
"""The largest M at which a choice is looked for; a prefill chunk of more tokens is a product of the same kind."""
BUSY = 900
"""An M whose tiles keep every SM of a GPU busy: a race may show under load only."""
INSIDE = 43
"""How far inside a range of M the number is taken at the most: odd, so that it is no multiple of a tile."""


def covering(path: Callable[[int], Hashable]) -> tuple[int, ...]:
    """Return numbers of tokens that take every path up to :data:`MOST` tokens, ascending.

    Args:
        path: what a backend runs for M tokens, equal for all M that run the same.

    Returns:
        1, :data:`BUSY`, and a number inside each range of adjacent M with one path.
    """
    paths = [path(m) for m in range(1, MOST + 1)]
    starts = [1, *(m for m in range(2, MOST + 1) if paths[m - 1] != paths[m - 2])]
    ends = [*(start - 1 for start in starts[1:]), MOST]
    inside = (first + min((last - first) // 2, INSIDE) for first, last in zip(starts[1:], ends[1:], strict=True))
    return tuple(sorted({1, BUSY, *inside}))

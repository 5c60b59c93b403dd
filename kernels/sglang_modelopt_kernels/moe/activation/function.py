"""The activation of an expert as a value: which function, of what, within which limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Function = Literal["silu", "gelu", "gelu_tanh", "relu2"]
"""``silu(x) = x sigmoid(alpha x)``, the exact GELU, GELU by tanh, and ``max(x, 0)^2``."""


@dataclass(frozen=True)
class Activation:
    """``f(gate) * (up + offset)``, or ``f(x)`` of an expert without a gate.

    Attributes:
        function: ``f``.
        gated: whether the first product has a gate and up, each of the width of the second product's input.
        alpha: the factor in the sigmoid of ``silu``; 1 for the others.
        offset: added to up.
        limit: the bound ``l`` of a gated activation, None without one: up is bounded to ``[-l, l]``, and the gate to at most ``l``.
        limits_function: whether ``f(gate)`` is bounded to at most ``l``, in place of the gate.
        bias: whether both products add a bias. The first one's is added before ``f``.
    """

    function: Function = "silu"
    gated: bool = True
    alpha: float = 1.0
    offset: float = 0.0
    limit: float | None = None
    limits_function: bool = False
    bias: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for a combination that nothing computes."""
        if self.function not in get_args(Function):
            raise ValueError(f"unknown function: {self.function!r}")
        if self.alpha != 1.0 and self.function != "silu":
            raise ValueError(f"{self.function} has no alpha")
        if not self.gated and (self.offset or self.limit is not None):
            raise ValueError("an offset and a limit are those of a gated activation")
        if self.limits_function and self.limit is None:
            raise ValueError("limits_function needs a limit")

    @property
    def parts(self) -> int:
        """The number of parts of the first product's output: 2 with a gate, 1 without."""
        return 2 if self.gated else 1

    def __str__(self) -> str:
        """Return it for errors, such as ``gated silu(alpha 1.702), limit 7, offset 1, bias``."""
        name = f"{self.function}(alpha {self.alpha:g})" if self.alpha != 1.0 else self.function
        said = [f"gated {name}" if self.gated else name]
        if self.limit is not None:
            said.append(f"limit {self.limit:g}" + (" of the function" if self.limits_function else ""))
        said += [f"offset {self.offset:g}"] if self.offset else []
        said += ["bias"] if self.bias else []
        return ", ".join(said)


SWIGLU = Activation()
"""``silu(gate) * up``, as most mixtures have it."""

"""The check of a backend on the machine at hand, before it serves a layer there.

Kernels are tested on the hardware their authors had. A compiler that miscompiles for another architecture, a driver, or a library
that reads its arguments differently would otherwise show only as wrong logits. A backend is compared with float64 on a random
layer, with numbers of tokens that take every path of its product (:meth:`.Backend.check_tokens`). On a GPU that layer is large
enough to fill the GPU, and every product is launched several times and compared bit for bit, or with float64 where it does not
repeat: a race shows under load, and not in every launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from sglang_modelopt_ext.backends.base import (
    Backend,
    BlockBackend,
    LinearRequest,
    Prepared,
    PreparedWeight,
    ShardWeight,
    round_to_blocks,
)
from sglang_modelopt_ext.backends.experts.base import NO_EXPERT, ExpertBackend, ExpertRequest, Routing
from sglang_modelopt_ext.backends.experts.fused import FusedExperts, FusedRequest, StoredExperts
from sglang_modelopt_ext.backends.tokens import SPREAD
from sglang_modelopt_ext.schemes.base import LORA_B

N, K = 128, 512
"""Outputs (N) and inputs (K) of the check's layer on a CPU."""
LARGE = 4096
"""The smallest N and K of the check's layer on a GPU: a smaller N leaves SMs idle, and hides a race that needs a busy GPU."""
ROW_TILE, TILE = 128, 256
"""The largest tiles along N and K: kernels are compiled separately for a K that is not a multiple of the tile."""
REPEATS = 64
"""Launches of each product on a GPU after the first: a race may spare most launches on a GPU that other processes use too."""
COLUMN_TOKENS = 16
"""Tokens from which errors are also relative to an output's norm over the tokens, which cancellation may make small for fewer."""
SIZES = 16
"""The number of powers of two that scale the rows of the check's weight, in turn."""
TOLERANCE = 2.0**-7
"""The largest relative error, over a token's outputs and over an output's tokens: twice the rounding of a bf16 result. A misread
scale or code errs by a tenth and more."""

EXPERTS, TOP_K = 5, 2
"""Experts of the check, of which one gets no token, and experts that each token goes to."""

FUSED_HIDDEN, FUSED_INNER = 256, 128
FUSED_TOLERANCE = 2.0**-5
"""The largest relative error of a whole layer of experts: an intermediate value between two codes may be rounded to either."""

_passed: set[tuple[object, ...]] = set()

_Result = TypeVar("_Result")


def check_backend(backend: Backend, request: LinearRequest, device: torch.device) -> None:
    """Compare ``backend`` with float64 on a random layer of the request's formats, once for each kind of layer in this process.

    The check's N and K are multiples of the tiles, or not, as the request's are.

    Args:
        backend: one that supports the request.
        request: the layer that is to be served.
        device: where.

    Raises:
        ValueError: the outputs differ, from float64 or from launch to launch, or the kernel does not run.
    """
    kind = (request.scheme.weight.name, backend.operand(request), request.math, request.dtype)
    key = (backend, *kind, device, request.n % ROW_TILE if device.type == "cuda" else 0, request.k % TILE)
    if key in _passed:
        return
    random = _generator(device)
    n, k = _sizes(request, device)
    low_rank = request.scheme.low_rank if isinstance(backend, BlockBackend) and backend.takes_low_rank else 0
    shard, weight, factor = _random_weight(random, request, n, k, low_rank)
    prepared = _run(partial(backend.prepare, [shard]), device)
    for m in backend.check_tokens(prepared, request):
        # E4M3 values are exact in every type of activations.
        x = random(m, k).to(torch.float8_e4m3fn).to(torch.float32)
        row_scale = random(m, 1).abs() + 0.5
        if backend.operand(request) == torch.int8:
            x, row_scale = (16 * x).round(), row_scale / 16
        down = random(m, low_rank) if low_rank else None
        launch, exact = _product(backend, request, prepared, x, row_scale, down)
        y = _run(launch, device)
        expected = exact @ weight.T
        if down is not None and factor is not None:
            expected += down.double() @ factor.T
        _compare(y, expected, device, m)
        if backend.repeats:
            _repeat(launch, y, device, m)
        else:
            _compare_again(launch, expected, device, m)
    _passed.add(key)


def _product(
    backend: Backend,
    request: LinearRequest,
    prepared: PreparedWeight,
    x: torch.Tensor,
    row_scale: torch.Tensor,
    down: torch.Tensor | None,
) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """Return the launch of the backend's product for ``x * row_scale``, and the activations that it multiplies.

    Args:
        backend: the backend.
        request: its layer.
        prepared: the prepared weight.
        x: E4M3 values ``[M, K]`` in float32.
        row_scale: float32 ``[M, 1]``.
        down: float32 ``[M, rank]``, the input of the second low-rank factor; None without a low-rank branch.

    Returns:
        A function that launches the product, and its activations in float64 ``[M, K]``. A :class:`BlockBackend` reads ``x`` rounded
        to the format of the request, by the first of ``row_scale`` where the format has a static scale.
    """
    if not isinstance(backend, BlockBackend):
        values = x.to(backend.operand(request))
        return (
            partial(backend.matmul, prepared, values, row_scale, None, request.dtype),
            x.double() * row_scale.double(),
        )
    activation = request.scheme.activation
    if activation is None:
        raise ValueError(f"{backend.name} took a layer with unrounded activations")
    static = row_scale[0, 0] if activation.tensors else None
    rounded = round_to_blocks(activation, x, None, static, backend.swizzles(x.shape[0]))
    numbers, scale = activation.quantize(x, static)
    exact = numbers.double() if scale is None else numbers.double() * scale.double()
    if down is None:
        return partial(backend.matmul_blocks, prepared, rounded, None, request.dtype), exact
    return partial(backend.matmul_low_rank, prepared, rounded, down, None, request.dtype), exact


def check_expert_backend(backend: ExpertBackend, request: ExpertRequest, device: torch.device) -> None:
    """Compare a backend of experts with float64 on a few random ones, once for each kind of layer in this process.

    One expert gets no token, some rows have no expert, and activations come both one row a token and one row a choice.

    Args:
        backend: one that supports the request.
        request: the product that is to be served.
        device: where.

    Raises:
        ValueError: the outputs differ, from float64 or from launch to launch, or the kernel does not run.
    """
    kind = (request.scheme.weight.name, backend.operand(request), request.math, request.dtype)
    key = (backend, *kind, device, request.n % ROW_TILE if device.type == "cuda" else 0, request.k % TILE)
    if key in _passed:
        return
    random = _generator(device)
    n, k = _sizes(request, device)
    shards, weights, _ = zip(*(_random_weight(random, request, n, k) for _ in range(EXPERTS)), strict=True)
    prepared = _run(partial(backend.prepare, [[shard] for shard in shards]), device)
    for m in backend.check_tokens(prepared, request, TOP_K):
        experts = (random(m * TOP_K) * 1e6).long() % (EXPERTS - 1)
        experts[:: max(m // 3, 2)] = NO_EXPERT
        routing = Routing(experts.to(torch.int32), TOP_K)
        x = random(m, k).to(torch.float8_e4m3fn).to(torch.float32)
        row_scale = random(m * TOP_K, 1).abs() + 0.5
        values = x.to(backend.operand(request))
        rows = x.double().repeat_interleave(TOP_K, dim=0)
        expected = torch.zeros(m * TOP_K, n, dtype=torch.float64, device=device)
        for expert, weight in enumerate(weights):
            expected[experts == expert] = rows[experts == expert] @ weight.T
        expected *= row_scale.double()
        for operand in (values, values.repeat_interleave(TOP_K, dim=0)):
            launch = partial(backend.matmul, prepared, operand, row_scale, routing, request.dtype)
            y = _run(launch, device)
            _compare(y, expected, device, m)
            if backend.repeats:
                _repeat(launch, y, device, m)
            else:
                _compare_again(launch, expected, device, m)
    _passed.add(key)


def check_fused_backend(backend: FusedExperts, request: FusedRequest, device: torch.device) -> None:
    """Compare a backend of a whole layer of experts with float64, once for each kind of layer in this process.

    The reference rounds what enters both products as the recipe says, where that stores scales with one for each expert.

    Args:
        backend: one that supports the request.
        request: the layer that is to be served.
        device: where.

    Raises:
        ValueError: the outputs differ, or the kernel does not run.
    """
    asked = request.gate_up
    key = (backend, asked.scheme.weight.name, asked.math, asked.dtype, device)
    if key in _passed:
        return
    random = _generator(torch.device("cpu"))
    scales = 0.002 + 0.0005 * torch.arange(EXPERTS, dtype=torch.float32, device="cpu")
    second = _random_experts(random, asked, FUSED_HIDDEN, FUSED_INNER, 1, scales)
    # Experts with one input scale share a rounded input; those with different ones get one each. Both are checked.
    for of_input in (scales[:1].expand(EXPERTS), scales) if second.scale is not None else (scales,):
        first = _random_experts(random, asked, FUSED_INNER, FUSED_HIDDEN, 2, of_input)
        prepared = _run(partial(backend.prepare, first.stored(device), second.stored(device)), device)
        for m in SPREAD:
            numbers = (random(m, TOP_K) * 1e6).long() % (EXPERTS - 1)
            numbers[:: max(m // 3, 2), 0] = NO_EXPERT
            x, weights = random(m, FUSED_HIDDEN).to(asked.dtype), random(m, TOP_K).abs() + 0.5
            expected = _expect_fused(first, second, x, numbers, weights)
            arguments = (x.to(device), numbers.to(torch.int32).to(device), weights.to(device))
            y = _run(partial(_run_fused, backend, prepared, *arguments), device)
            _compare(y, expected, device, m, FUSED_TOLERANCE)
    _passed.add(key)


def _expect_fused(
    first: _Experts, second: _Experts, x: torch.Tensor, numbers: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    expected = torch.zeros(x.shape, dtype=torch.float64, device="cpu")
    for expert in range(EXPERTS):
        tokens, choices = (numbers == expert).nonzero(as_tuple=True)
        gate, up = first.multiply(expert, x[tokens]).to(x.dtype).double().chunk(2, dim=1)
        y = second.multiply(expert, (torch.nn.functional.silu(gate) * up).to(x.dtype))
        expected.index_add_(0, tokens, y * weights[tokens, choices].double().unsqueeze(1))
    return expected


@dataclass(frozen=True)
class _Experts:
    """Random experts of one product, on a CPU.

    Attributes:
        request: the product.
        weights: the shards of each expert.
        scale: the static input scale of each expert, float32 ``[E]``; None where no scale is stored.
    """

    request: ExpertRequest
    weights: list[list[ShardWeight]]
    scale: torch.Tensor | None

    def stored(self, device: torch.device) -> StoredExperts:
        """Return the experts on ``device``."""
        weights = [
            [
                replace(shard, tensors={name: tensor.to(device) for name, tensor in shard.tensors.items()})
                for shard in shards
            ]
            for shards in self.weights
        ]
        if self.scale is None:
            return StoredExperts(weights, None)
        return StoredExperts(weights, self.scale.unsqueeze(1).expand(-1, len(weights[0])).to(device))

    def multiply(self, expert: int, x: torch.Tensor) -> torch.Tensor:
        """Return the product of ``x`` ``[M, K]``, rounded to the recipe's activations, with one expert: float64 ``[M, N]``."""
        activation = self.request.scheme.activation
        values = x.double()
        if activation is not None and len(x):
            numbers, by = activation.quantize(x.to(torch.float32), None if self.scale is None else self.scale[expert])
            values = numbers.double() if by is None else numbers.double() * by.double()
        weight = torch.cat([shard.decode().dequantize() for shard in self.weights[expert]])
        return values @ weight.double().T


def _random_experts(
    random: Callable[..., torch.Tensor], request: ExpertRequest, n: int, k: int, shards: int, scale: torch.Tensor
) -> _Experts:
    """Return random experts of ``shards`` shards ``[n, k]`` with one global scale; with ``scale`` if the recipe stores one."""
    number, weights = request.scheme.weight, []
    for _ in range(EXPERTS):
        whole = number.quantize((random(n * shards, k) / k**0.5).to(torch.bfloat16))
        parts = [{name: t.chunk(shards)[part] if t.dim() else t for name, t in whole.items()} for part in range(shards)]
        weights.append([ShardWeight(number, part, request.math) for part in parts])
    activation = request.scheme.activation
    return _Experts(request, weights, scale if activation is not None and activation.tensors else None)


def _run_fused(
    backend: FusedExperts,
    prepared: Prepared,
    x: torch.Tensor,
    numbers: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    # The copy waits for the kernel, so that its error is raised here.
    return backend.run(prepared, x, numbers, weights).double().cpu()


def _sizes(request: LinearRequest, device: torch.device) -> tuple[int, int]:
    """Return N and K of the check's layer."""
    if device.type != "cuda":
        return N, K + request.k % TILE
    return _within(request.n, ROW_TILE), _within(request.k, TILE)


def _within(size: int, tile: int) -> int:
    """Return the smallest size from :data:`LARGE` on that differs from ``size`` by a multiple of ``tile``."""
    return LARGE + (size - LARGE) % tile


def _generator(device: torch.device) -> Callable[..., torch.Tensor]:
    # SGLang sets a default dtype and device while it prepares layers: both are explicit here.
    return partial(torch.randn, generator=torch.Generator(device).manual_seed(0), dtype=torch.float32, device=device)


def _random_weight(
    random: Callable[..., torch.Tensor], request: LinearRequest, n: int, k: int, low_rank: int = 0
) -> tuple[ShardWeight, torch.Tensor, torch.Tensor | None]:
    """Return a random stored weight, its values in float64 ``[n, k]``, and the second low-rank factor in float64, or None.

    The rows differ by powers of two, so that block scales take all magnitudes, subnormal ones included, and outputs fit float16.
    """
    weight = random(n, k)
    sizes = torch.exp2(6.0 - torch.arange(n, device=weight.device) % SIZES).to(torch.float32).unsqueeze(1)
    stored = request.scheme.weight.quantize((weight * sizes).to(torch.bfloat16))
    decoded = ShardWeight(request.scheme.weight, stored, request.math).decode()
    factor = None
    if low_rank:
        stored[LORA_B] = (random(n, low_rank) * sizes).to(torch.bfloat16)
        factor = stored[LORA_B].double()
    shard = ShardWeight(request.scheme.weight, stored, request.math)
    return shard, decoded.unit.double() * decoded.out_scale.double(), factor


def _repeat(launch: Callable[[], torch.Tensor], first: torch.Tensor, device: torch.device, tokens: int) -> None:
    """Launch a product again and again on a GPU; raise ValueError where a result is not the first one, bit for bit."""
    if device.type != "cuda":
        return
    differing = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(REPEATS):
        differing += (launch() != first).any()
    count = _run(differing.item, device)
    if count:
        raise ValueError(f"races on {device}: {count} of {REPEATS} results differ from the first with {tokens} tokens")


def _compare_again(
    launch: Callable[[], torch.Tensor], expected: torch.Tensor, device: torch.device, tokens: int
) -> None:
    """Launch a product that does not repeat again and again on a GPU, and compare every result with float64."""
    if device.type != "cuda":
        return
    for _ in range(REPEATS):
        _compare(_run(launch, device), expected, device, tokens)


def _run(step: Callable[[], _Result], device: torch.device) -> _Result:
    try:
        result = step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # raises the error of a launched kernel
        return result
    except (ValueError, torch.OutOfMemoryError):
        raise  # out of memory rejects no backend: the next one needs as much, or more
    except Exception as error:
        # Kernels of other packages are compiled on first use, and fail in as many ways as there are packages.
        reason = str(error).strip() or type(error).__name__
        raise ValueError(f"does not run on {device}: {reason.splitlines()[0]}") from error


def _compare(
    y: torch.Tensor, expected: torch.Tensor, device: torch.device, tokens: int, tolerance: float = TOLERANCE
) -> None:
    worst = _relative_error(y.double(), expected, dim=1)
    if tokens >= COLUMN_TOKENS:
        worst = torch.maximum(worst, _relative_error(y.double(), expected, dim=0))
    if not bool(worst < tolerance):
        raise ValueError(f"is wrong on {device}: relative error {float(worst):.2g} with {tokens} tokens")


def _relative_error(y: torch.Tensor, expected: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the largest error of a row or column of outputs relative to its norm; NaN where an output is. Zeros must be exact."""
    size = expected.norm(dim=dim)
    return ((y - expected).norm(dim=dim) / torch.where(size == 0, torch.finfo(torch.float64).tiny, size)).max()

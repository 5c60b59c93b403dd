"""A backend proves itself on the machine at hand before it serves a layer there.

Kernels are tested on the hardware their authors had. A compiler that miscompiles for another architecture, a driver, or a library
that reads its arguments differently would otherwise show as wrong logits only. On a GPU the layer of the check has about the sizes
of the layer that is served and fills the GPU, and every product is launched several times and compared bit for bit: a race shows
under load, and not in each launch.
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
from sglang_modelopt_ext.schemes.base import LORA_B

N, K = 128, 512
"""Outputs and inputs of the layer on a CPU."""
LARGE = 4096
"""About N and K of the layer on a GPU: fewer outputs leave SMs without work, and a race that needs a busy GPU is then not seen."""
ROW_TILE, TILE = 128, 256
"""Outputs and inputs to a tile at the most: kernels are compiled apart for inputs that are not whole tiles."""
REPEATS = 16
"""Further launches of each product on a GPU."""
COLUMN_TOKENS = 16
"""Tokens from which an output is held to its own norm: with fewer it may be small because its products cancel."""
TOKENS = (1, 24, 40, 80, 300, 900, 2049)
"""One number of tokens, or more, for each way the backends of ``backends/select.py`` choose by it."""
EXPERT_TOKENS = (1, 40, 80, 640, 1280, 2560)
"""Likewise for the backends of experts."""
SIZES = 16
"""Powers of two that the rows of the layer differ by."""
TOLERANCE = 2.0**-7
"""Relative, over a token's outputs and over an output's tokens: twice the rounding of a bf16 result. A misread scale or code
errs by a tenth and more."""

EXPERTS, TOP_K = 5, 2
"""Experts of the check; one of them gets no token."""

FUSED_HIDDEN, FUSED_INNER = 256, 128
FUSED_TOLERANCE = 2.0**-5
"""Likewise for a whole layer: of the numbers in its middle, those that lie between two codes may get the other."""

_passed: set[tuple[object, ...]] = set()

_Result = TypeVar("_Result")


def check_backend(backend: Backend, request: LinearRequest, device: torch.device) -> None:
    """Compare ``backend`` with float64 on a random layer of the request's formats, once for each kind of layer in this process.

    The layer of the check ends within a tile of inputs, and of outputs, where the request's does.

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
    for m in (*TOKENS, *backend.check_tokens(device, n)):
        # E4M3 numbers are numbers of every type that activations come in.
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
    _passed.add(key)


def _product(
    backend: Backend,
    request: LinearRequest,
    prepared: PreparedWeight,
    x: torch.Tensor,
    row_scale: torch.Tensor,
    down: torch.Tensor | None,
) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """The backend's product for E4M3 numbers ``x`` times ``row_scale``, and the activations it stands for, float64.

    A backend that reads codes gets ``x`` as the format rounds it, under the first of ``row_scale`` where that has a static scale,
    and ``down`` for its low-rank branch, where it has one.
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

    One expert gets no token, some rows have no expert, and activations come in both shapes.

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
    for m in EXPERT_TOKENS:
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
    _passed.add(key)


def check_fused_backend(backend: FusedExperts, request: FusedRequest, device: torch.device) -> None:
    """Compare a whole layer of experts, which rounds its middle as the recipe says, by a scale for each expert, with float64.

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
    # What enters the layer is rounded once where all experts have one scale for it, and for each of them where they do not.
    for of_input in (scales[:1].expand(EXPERTS), scales) if second.scale is not None else (scales,):
        first = _random_experts(random, asked, FUSED_INNER, FUSED_HIDDEN, 2, of_input)
        prepared = _run(partial(backend.prepare, first.stored(device), second.stored(device)), device)
        for m in TOKENS:
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
    """Random experts, and how their input is rounded: float32 ``[E]``, None where no scale is stored."""

    request: ExpertRequest
    weights: list[list[ShardWeight]]
    scale: torch.Tensor | None

    def stored(self, device: torch.device) -> StoredExperts:
        """On ``device``."""
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
        """The product of rounded ``x`` in float64."""
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
    """Experts of ``shards`` shards of ``n`` rows; ``scale`` where the recipe stores one. Shards share a global scale."""
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
    # Copied here, where an error of a kernel that was launched shows.
    return backend.run(prepared, x, numbers, weights).double().cpu()


def _sizes(request: LinearRequest, device: torch.device) -> tuple[int, int]:
    """Outputs and inputs of the layer of the check."""
    if device.type != "cuda":
        return N, K + request.k % TILE
    return _within(request.n, ROW_TILE), _within(request.k, TILE)


def _within(size: int, tile: int) -> int:
    """The size that differs from ``size`` by whole tiles and is the first from LARGE on."""
    return LARGE + (size - LARGE) % tile


def _generator(device: torch.device) -> Callable[..., torch.Tensor]:
    # SGLang prepares layers under a default type and device of its own: neither is left to the default here.
    return partial(torch.randn, generator=torch.Generator(device).manual_seed(0), dtype=torch.float32, device=device)


def _random_weight(
    random: Callable[..., torch.Tensor], request: LinearRequest, n: int, k: int, low_rank: int = 0
) -> tuple[ShardWeight, torch.Tensor, torch.Tensor | None]:
    """A stored weight; what it stands for in float64; and the second low-rank factor in float64, where it has one.

    Its rows have every size that block scales have, subnormal ones included, and outputs that float16 holds.
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


def _run(step: Callable[[], _Result], device: torch.device) -> _Result:
    try:
        result = step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # an error of a kernel that was launched shows here
        return result
    except (ValueError, torch.OutOfMemoryError):
        raise  # a lack of memory is no fault of the backend: the next one needs as much, or more
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
    """The largest error of a row or column of outputs, NaN where one is; relative to its norm. A row of zeros must be one."""
    size = expected.norm(dim=dim)
    return ((y - expected).norm(dim=dim) / torch.where(size == 0, torch.finfo(torch.float64).tiny, size)).max()

"""Time a layer of experts on the GPU at hand: run ``PYTHONPATH=kernels:. python -m benchmarks.moe``. Needs torch and Triton only.

First every step of a layer of experts (sorting, gate and up, SwiGLU, down, weighted sum) is compared with its naive twin in float64
on fresh random data, for every format of :mod:`benchmarks.registry`; then the layer is timed under a CUDA graph, the median of 7
replays, whose launches alternate between two layers and eight routings. Peers in the same run: bf16 by ``torch._grouped_mm``, or
one ``torch.mm`` for each expert where this torch has none, and FP8 by ``torch._scaled_grouped_mm``. Peers are given rows already
sorted, and compute the two products alone. A peer that does not run prints ``-``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton

from benchmarks.gemm import read_bandwidth
from benchmarks.registry import measured
from benchmarks.registry.base import TOLERANCE, ExpertFormat
from sglang_modelopt_kernels.formats import WEIGHT_FORMATS
from sglang_modelopt_kernels.gemm.mxfp4_fp8_hopper import fold
from sglang_modelopt_kernels.gemm.reference import prepare_dense
from sglang_modelopt_kernels.gemm.w4_decode import pack
from sglang_modelopt_kernels.gemm.w4_stream import missing, stream_folded
from sglang_modelopt_kernels.moe import grouped
from sglang_modelopt_kernels.moe.activation import activate, naive_activate
from sglang_modelopt_kernels.moe.combine import combine, naive_combine
from sglang_modelopt_kernels.moe.grouped import GroupedWeight, grouped_linear, naive_grouped_linear
from sglang_modelopt_kernels.moe.route import route
from sglang_modelopt_kernels.timing import median_us


@dataclass(frozen=True)
class Model:
    """The experts of one layer."""

    experts: int
    top_k: int
    hidden: int
    inner: int


MODELS = {"Qwen3-30B-A3B": Model(128, 8, 2048, 768), "Mixtral-8x7B": Model(8, 2, 4096, 14336)}
SMALL = Model(6, 2, 512, 384)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
FORMATS = measured(ExpertFormat)


def random_weight(name: str, experts: int, n: int, k: int) -> GroupedWeight:
    """Make random weights of ``experts`` experts in a format of FORMATS, from at most four different experts."""
    number = WEIGHT_FORMATS[FORMATS[name].weight]
    capability = torch.cuda.get_device_capability()
    # As the backends choose on SM90.
    tiled = capability == (9, 0) and missing() is None and n % 64 == 0 and k % 256 == 0
    different = []
    for _ in range(min(experts, 4)):
        stored = number.quantize(torch.randn(n, k, device="cuda") / k**0.5)
        blocks = number.blocks(stored)
        if name == "mxfp4 fp8" and tiled:
            different.append(grouped.tiled(stream_folded(fold(stored["weight"], stored["weight_scale"]))))
        elif name == "mxfp4 fp8" and capability[0] == 10:
            different.append(grouped.mxfp4_as_stored(stored["weight"], stored["weight_scale"]))
        elif blocks is not None:
            different.append(grouped.packed(pack(blocks)))
        elif name == "mxfp8":
            different.append(grouped.mxfp8(stored["weight"], stored["weight_scale"]))
        else:
            kept = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "bf16": torch.bfloat16}[name]
            different.append(grouped.whole(*prepare_dense(number.decode(stored), kept)))
    return grouped.stack([different[expert % len(different)] for expert in range(experts)])


def layer(
    x: torch.Tensor, gate_up: GroupedWeight, down: GroupedWeight, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Compute the experts of one layer in bf16, for rounded activations; the hidden activations are cast, not scaled."""
    pairs = chosen.shape[0]
    blocks = [grouped.tile(weight, x.dtype, pairs) for weight in (gate_up, down)]
    routed = {block: route(chosen, gate_up.experts, block) for block in dict.fromkeys(blocks)}
    hidden = activate(grouped_linear(x, gate_up, routed[blocks[0]], pairs))
    y = grouped_linear(hidden.to(x.dtype), down, routed[blocks[1]], pairs, known=True)
    return combine(y, weights.shape[1], weights, torch.bfloat16)


def random_routing(tokens: int, model: Model) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose distinct experts for each token, int32 ``[T * top_k]``, and weights that sum to one."""
    weights, chosen = torch.rand(tokens, model.experts, device="cuda").topk(model.top_k)
    return chosen.reshape(-1).to(torch.int32), weights / weights.sum(dim=1, keepdim=True)


def check(name: str, tokens: int) -> float:
    """Return the largest relative error of the products, SwiGLU and the weighted sum, each for the input that it was given."""
    dtype, model = FORMATS[name].activations, SMALL
    gate_up = random_weight(name, model.experts, 2 * model.inner, model.hidden)
    down = random_weight(name, model.experts, model.hidden, model.inner)
    chosen, weights = random_routing(tokens, model)
    first, second = (
        route(chosen, model.experts, grouped.tile(weight, dtype, chosen.shape[0])) for weight in (gate_up, down)
    )
    x = torch.randn(tokens, model.hidden, device="cuda").to(dtype)
    h = grouped_linear(x, gate_up, first, chosen.shape[0])
    hidden = activate(h)
    rounded = hidden.to(dtype)
    y = grouped_linear(rounded, down, second, chosen.shape[0])
    out = combine(y, model.top_k, weights, torch.bfloat16)
    expected = {
        "gate and up": (h, naive_grouped_linear(x, gate_up, chosen)),
        "SwiGLU": (hidden, naive_activate(h)),
        "down": (y, naive_grouped_linear(rounded, down, chosen)),
        "sum": (out, naive_combine(y, model.top_k, weights)),
    }
    return max(float((found.double() - right).norm() / right.norm()) for found, right in expected.values())


def time_ours(name: str, model: Model) -> list[float]:
    """Return the microseconds of a whole layer for each of TOKENS."""
    shapes = ((2 * model.inner, model.hidden), (model.hidden, model.inner))
    first = [random_weight(name, model.experts, n, k) for n, k in shapes]
    # Two layers, and routings that differ from launch to launch, take more than L2.
    layers = [first, [random_weight(name, model.experts, n, k) for n, k in shapes]]
    times = []
    for tokens in TOKENS:
        x = torch.randn(tokens, model.hidden, device="cuda").to(FORMATS[name].activations)
        routings = [random_routing(tokens, model) for _ in range(8)]

        def call(index: int, x: torch.Tensor = x, routings: list[tuple[torch.Tensor, torch.Tensor]] = routings) -> None:
            layer(x, *layers[index % len(layers)], *routings[index % len(routings)])

        times.append(median_us(call))
    return times


def time_peer(model: Model, fp8: bool) -> list[float | None]:
    """Return the microseconds of the two products over sorted rows for each of TOKENS; None where torch has none that runs here."""
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    sizes = ((2 * model.inner, model.hidden), (model.hidden, model.inner))
    base = [torch.randn(n, k, device="cuda").to(dtype) for n, k in sizes]
    weights = [[one.expand(model.experts, *one.shape).contiguous() for one in base] for _ in range(2)]
    scales = [torch.ones(model.experts, n, device="cuda") for n, _ in sizes]
    times: list[float | None] = []
    for tokens in TOKENS:
        chosen, _ = random_routing(tokens, model)
        counts = torch.bincount(chosen.long(), minlength=model.experts)
        ends = counts.cumsum(0).to(torch.int32)
        rows = tokens * model.top_k
        inputs = [torch.randn(rows, k, device="cuda").to(dtype) for _, k in sizes]
        ones = torch.ones(rows, device="cuda")
        call = _peer(inputs, weights, scales, ones, ends, counts.tolist(), fp8)
        times.append(None if call is None else median_us(call))
    return times


def _peer(
    inputs: list[torch.Tensor],
    weights: list[list[torch.Tensor]],
    scales: list[torch.Tensor],
    ones: torch.Tensor,
    ends: torch.Tensor,
    counts: list[int],
    fp8: bool,
) -> Callable[[int], None] | None:
    """Return the fastest call of torch that runs here, after one launch; None for none."""

    def grouped_mm(index: int) -> None:
        for x, w in zip(inputs, weights[index % 2], strict=True):
            torch._grouped_mm(x, w.transpose(1, 2), offs=ends)

    def scaled(index: int) -> None:
        for x, w, scale in zip(inputs, weights[index % 2], scales, strict=True):
            torch._scaled_grouped_mm(x, w.transpose(1, 2), ones, scale, offs=ends, out_dtype=torch.bfloat16)

    def each(index: int) -> None:
        for x, w in zip(inputs, weights[index % 2], strict=True):
            for expert, part in enumerate(x.split(counts)):
                if part.shape[0]:
                    torch.mm(part, w[expert].T)

    for call in (scaled,) if fp8 else (grouped_mm, each):
        try:
            call(0)
            torch.cuda.synchronize()
        except (AttributeError, RuntimeError, NotImplementedError, ValueError):
            continue
        return call
    return None


def main() -> None:
    """Check every format, then print a line for each model, format and number of tokens, and a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the check and the first model alone")
    arguments = parser.parse_args()
    names = list(FORMATS)
    if torch.cuda.get_device_capability() < (8, 9):
        names = [name for name in names if FORMATS[name].activations != torch.float8_e4m3fn]
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"read bandwidth {bandwidth:.2f} TB/s; whole layer of experts, output bf16")
    for name in names:
        errors = [check(name, tokens) for tokens in (1, 17, 150, 400)]
        print(f"{name}: largest relative error {max(errors):.1e} of float64")
        # Hopper's FP8 instructions keep some 13 bits of a sum, more than a bf16 result shows.
        if not max(errors) < TOLERANCE:
            raise SystemExit(f"{name} is wrong: {errors}")
    print(
        f"{'model':15}{'format':>10}{'tokens':>8}{'us':>9}{'TFLOP/s':>9}{'bf16 us':>9}{'fp8 us':>9}{'/bf16':>7}{'/fp8':>7}"
    )
    table = []
    for label, model in list(MODELS.items())[: 1 if arguments.quick else None]:
        bf16, fp8 = time_peer(model, False), time_peer(model, True)
        for name in names:
            ours = time_ours(name, model)
            ratios = []
            for tokens, us, base, eight in zip(TOKENS, ours, bf16, fp8, strict=True):
                flops = 6 * tokens * model.top_k * model.hidden * model.inner / us / 1e6
                peers = "".join(f"{'-' if peer is None else f'{peer:.1f}':>9}" for peer in (base, eight))
                shares = "".join(f"{'-' if peer is None else f'{us / peer:.2f}':>7}" for peer in (base, eight))
                print(f"{label:15}{name:>10}{tokens:8}{us:9.1f}{flops:9.1f}{peers}{shares}", flush=True)
                ratios.append("-" if base is None else f"{us / base:.2f}")
            table.append(f"| {label} | {name} | " + " | ".join(ratios) + " |")
            torch.cuda.empty_cache()
    print("\nRatio of time to bf16 by tokens (below 1 is faster):\n")
    print(f"| model | format | {' | '.join(map(str, TOKENS))} |")
    print("|---" * (len(TOKENS) + 2) + "|")
    print("\n".join(table))


if __name__ == "__main__":
    main()

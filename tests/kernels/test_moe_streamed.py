"""The streamed product of experts: its text on NumPy against the naive twin, its choices, and the kernel on a GPU of SM90."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang_modelopt_kernels.gemm.common import KernelConfig
from sglang_modelopt_kernels.gemm.w4_stream import StreamedWeight, missing, unstream
from sglang_modelopt_kernels.gemm.w4_stream.launch import DESCALE, operand
from sglang_modelopt_kernels.gemm.w4_stream.packing import BLOCKS, Kind
from sglang_modelopt_kernels.moe.grouped import GroupedWeight, grouped_linear, naive_grouped_linear, tile, unpack
from sglang_modelopt_kernels.moe.grouped.launch import TAKEN
from sglang_modelopt_kernels.moe.route import Routed, route, unsorted
from sglang_modelopt_kernels.moe.streamed.launch import CONFIGS, LEAST_STEPS, Plan, choose_block, plan_of, run
from tests.support.gluon import Array, Machine, array

GLUON = pytest.mark.skipif(missing() is not None, reason=f"the kernel {missing()}")


FEW = CONFIGS["folded"][0]


def weights_of(experts: int, n: int, k: int, kind: Kind = "folded", device: str = "cpu") -> GroupedWeight:
    """Random weights in tiles: any bytes are codes, folded exponents are 1 to 12, block scales any that E4M3 has from 0 on."""
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(0, 256, (experts, n, k // 2), generator=generator, dtype=torch.uint8)
    low, high = (1, 13) if kind == "folded" else (0, 0x7F)
    scale = torch.randint(low, high, (experts, n, BLOCKS[kind] * k // 256), generator=generator, dtype=torch.uint8)
    out_scale = torch.rand(experts, n, generator=generator) + 0.5
    tiles: Any = "mxfp4_tiles" if kind == "folded" else "nvfp4_tiles"
    return GroupedWeight(codes.to(device), scale.to(device), out_scale.to(device), tiles, kind == "folded")


@dataclass(frozen=True)
class Case:
    """A launch; ``shared``: the choices of a token read one row; ``single``: each pair has a block of its own."""

    config: KernelConfig
    rows: int = 1
    split: int = 1
    tokens: int = 7
    n: int = 384
    k: int = 768
    shared: bool = True
    known: bool = False
    scales: str = "pair"
    experts: int = 3
    top_k: int = 2
    single: bool = False
    kind: Kind = "folded"

    @property
    def pairs(self) -> int:
        return self.tokens * self.top_k


CASES = [
    Case(FEW),
    Case(FEW, rows=2, known=True, scales="token"),
    Case(FEW, rows=4, known=True, shared=False),  # the last program has fewer tiles than the others
    Case(FEW, split=2, k=1024, known=True),
    Case(FEW, split=4, k=768, rows=2),  # the last split has nothing
    Case(KernelConfig(64, 8, 256, 4, 6), rows=3, k=256, known=True),  # more stages than tiles of a row
    Case(KernelConfig(64, 8, 256, 4, 8), n=64, k=512),  # and than tiles of a program
    Case(KernelConfig(64, 16, 256, 4, 2), rows=2, tokens=20),
    Case(KernelConfig(64, 16, 256, 4, 3), rows=2, k=512, tokens=30, known=True, scales="one"),
    Case(CONFIGS["folded"][-1], rows=2, tokens=70, k=512, known=True),
    Case(FEW, tokens=1, experts=9, top_k=8, single=True),
    Case(FEW, tokens=1, experts=9, top_k=8, single=True, shared=False, known=True, split=2, k=1024),
    Case(FEW, tokens=1, rows=2, experts=9, top_k=5, single=True, scales="one"),
    Case(FEW, kind="scaled_32"),
    Case(FEW, kind="scaled_16", rows=2, known=True, scales="token"),
    Case(FEW, kind="scaled_32", split=2, k=1024, known=True),
    Case(FEW, kind="scaled_32", tokens=1, experts=9, top_k=8, single=True),
    Case(CONFIGS["scaled_16"][-1], kind="scaled_16", rows=2, tokens=70, k=512, known=True),
]


def operands(case: Case, device: str = "cpu") -> tuple[torch.Tensor, GroupedWeight, torch.Tensor, torch.Tensor]:
    """Activations, weights, the expert of each pair (some nobody's, one expert without pairs), and a scale for each pair."""
    generator = torch.Generator().manual_seed(case.tokens)
    chosen = torch.randint(-1, case.experts - 1, (case.pairs,), generator=generator, dtype=torch.int32)
    if case.single:
        chosen[1:4] = torch.tensor([-7, case.experts, case.experts - 1])  # whatever is no expert's number is nobody's
    rows = case.tokens if case.shared else case.pairs
    x = (torch.randn(rows, case.k, generator=generator) * 20).to(torch.float8_e4m3fn).to(operand(case.kind))
    row_scale = torch.rand(case.pairs, 1, generator=generator) + 0.5
    if case.scales == "token":
        row_scale = row_scale[: case.tokens]
    elif case.scales == "one":
        row_scale = row_scale[:1]
    weight = weights_of(case.experts, case.n, case.k, case.kind, device)
    return x.to(device), weight, chosen.to(device), row_scale.to(device)


def of_pairs(row_scale: torch.Tensor, case: Case) -> torch.Tensor:
    """The scale of each pair."""
    return row_scale.repeat_interleave(case.pairs // row_scale.shape[0], dim=0)


def sorted_pairs(chosen: torch.Tensor, experts: int, block: int) -> Routed:
    """What :func:`route` returns, without its kernel."""
    from sglang_modelopt_kernels.moe.route import most_blocks, naive_route

    pairs = chosen.shape[0]
    blocks = most_blocks(pairs, experts, block)
    owner = torch.full((blocks,), -1, dtype=torch.int32)
    ordered = torch.full((blocks * block,), 1 << 30, dtype=torch.int32)
    for index, (expert, members) in enumerate(naive_route(chosen, experts, block)):
        owner[index] = expert
        row = torch.full((block,), pairs, dtype=torch.int32)
        row[: len(members)] = torch.tensor(members, dtype=torch.int32)
        ordered[index * block : (index + 1) * block] = row
    return Routed(ordered, owner, torch.empty(0), block)


def decoded(codes: Array, scales: Array, layout: object, blocks: int | None = None) -> Array:
    """The unit weight of a tile as the kernel has it, in place of its decoding in registers; ``blocks`` of NVFP4's rows."""
    del layout
    kind: Kind = "folded" if blocks is None else "scaled_16" if blocks == 16 else "scaled_32"
    tile_codes = torch.from_numpy(np.asarray(codes).reshape(64, 128))
    tile_scale = torch.from_numpy(np.asarray(scales)[:, 0].copy().reshape(64, BLOCKS[kind]))
    unit = unstream(StreamedWeight(tile_codes, tile_scale, torch.ones(64), kind)) / DESCALE[kind]
    return array(unit.numpy())


def product(unit: Array, x: Array, acc: Array, use_acc: bool = True, is_async: bool = True) -> Array:
    """The sum in float64; of which the kernel starts a new one for each tile in FP8."""
    assert not is_async
    assert acc.shape == (unit.shape[0], x.shape[1])
    values = np.asarray(unit) @ np.asarray(x)
    return array(np.asarray(acc) + values if use_acc else values)


class OnNumpy:
    """The kernel in place of its launches: its text on NumPy, in float64 where it reads E4M3."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.arguments = kernel, dict[str, Any]()

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, **named: Any) -> None:
            assert num_warps == 4
            self.arguments = dict(zip(self.kernel.arg_names, arguments, strict=False)) | named
            assert self.arguments.keys() == set(self.kernel.arg_names)
            late = {"x_ptr", "row_scale_ptr", "y_ptr", "partial_ptr", "arrivals_ptr"}
            late |= set() if named["KNOWN"] else {"owner_ptr", "pairs_ptr"}
            functions: dict[str, Callable[..., Any]] = {"warpgroup_mma": product}
            functions |= dict.fromkeys(("e4m3_operand", "float16_operand"), decoded)
            functions |= {
                name: lambda *sizes: SimpleNamespace() for name in ("bytes_layout", "scales_layout", "tokens_layout")
            }
            values = self.arguments | {"x_ptr": self.arguments["x_ptr"].double()}
            Machine(functions).launch(self.kernel, grid, frozenset(late), **values)

        return launch


@GLUON
@pytest.mark.parametrize("case", CASES, ids=str)
def test_its_text_on_numpy(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_modelopt_kernels.moe.streamed import kernel

    machine = OnNumpy(kernel.streamed_experts_kernel)
    monkeypatch.setattr(kernel, "streamed_experts_kernel", machine)
    x, weight, chosen, row_scale = operands(case)
    block = case.config.bm
    routed = unsorted(chosen.clone(), block) if case.single else sorted_pairs(chosen, case.experts, block)
    chosen[chosen >= case.experts] = -1
    torch.use_deterministic_algorithms(True, warn_only=True)  # new tensors start as NaN
    plan = Plan(case.config, case.rows, case.split)
    y = run(x, weight, routed, case.pairs, row_scale, torch.float64, case.known, plan)
    torch.use_deterministic_algorithms(False)
    expected = naive_grouped_linear(x, weight, chosen, of_pairs(row_scale, case))
    if case.kind == "folded":
        # Parts of a sum that is split are float32.
        torch.testing.assert_close(
            y, expected, rtol=1e-12 if case.split == 1 else 1e-5, atol=1e-9 if case.split == 1 else 1e-2
        )
    served = chosen >= 0
    errors = (y - expected)[served].abs().amax(1) / expected[served].abs().amax(1)
    # NVFP4's block scales reach far, so that outputs near zero are sums of large products.
    assert float(errors.max()) < (1e-12 if case.split == 1 else 2**-20)
    assert bool((y[chosen < 0] == 0).all())
    assert case.split == 1 or not bool(machine.arguments["arrivals_ptr"].any()), "counters are zero between launches"


@pytest.mark.parametrize("pairs", [1, 8, 32, 128, 512, 2048, 8192, 30000])
@pytest.mark.parametrize("kind", ["mxfp4_tiles", "nvfp4_tiles"])
@pytest.mark.parametrize(
    ("experts", "n", "k"), [(128, 1536, 2048), (128, 2048, 768), (8, 28672, 4096), (256, 192, 256)]
)
def test_choice(experts: int, n: int, k: int, pairs: int, kind: Any) -> None:
    codes, scale = (
        torch.empty(experts, n, k // part, dtype=torch.uint8, device="meta")
        for part in (2, 16 if kind == "nvfp4_tiles" else 32)
    )
    weight = GroupedWeight(codes, scale, torch.empty(0), kind)
    block = choose_block(pairs, experts)
    plan = plan_of(weight, block, pairs, 132)
    assert tile(weight, TAKEN[weight.kind][0], pairs, dense=False) == block == plan.config.bm
    assert n % plan.config.bn == 0
    assert plan.rows == 1 or plan.split == 1
    assert k // 256 >= LEAST_STEPS * plan.split or plan.split == 1
    assert block == CONFIGS["folded"][-1].bm or block * experts >= pairs


def test_pairs_that_are_not_sorted_are_for_the_streamed_product_alone() -> None:
    x, chosen = torch.zeros(1, 256, dtype=torch.float8_e4m3fn), torch.tensor([1, 0], dtype=torch.int32)
    tiles = weights_of(2, 64, 256)
    with pytest.raises(ValueError, match="dense tiles need pairs that are sorted"):
        grouped_linear(x, tiles, unsorted(chosen, 64), 2, dense=True)
    whole = GroupedWeight(torch.zeros(2, 64, 256, dtype=torch.float8_e4m3fn), None, torch.ones(2, 64), "e4m3")
    with pytest.raises(ValueError, match="e4m3 need pairs that are sorted"):
        grouped_linear(x, whole, unsorted(chosen, 16), 2)
    with pytest.raises(ValueError, match="sorted for another size: 2 blocks, not 4"):
        grouped_linear(x, tiles, unsorted(chosen, 8), 4)


def test_blocks_of_no_configuration_are_rejected() -> None:
    with pytest.raises(ValueError, match="blocks of 4 pairs"):
        plan_of(weights_of(1, 64, 256), 4, 8, 132)


def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0) or missing() is not None:
        pytest.skip(f"the kernel is for SM90 with Gluon: {missing()}")


TOLERANCE = {"folded": 2.0**-10, "scaled_16": 2.0**-16, "scaled_32": 2.0**-16}
"""The largest error over the outputs of a pair, relative to their norm. An instruction in FP8 cuts what it adds at 2^-13 of the
largest: :func:`cut_sums` gives 2^-11.4 to 2^-11.6, and up to 2^-10.5 of the magnitudes for single outputs of a short K.
In float16 it adds in fp32: 2048 additions that each cut 2^-23 of the sum so far, at random, err by 2^-17.5 of the norm."""


def error(y: torch.Tensor, x: torch.Tensor, weight: GroupedWeight, chosen: torch.Tensor, scale: torch.Tensor) -> float:
    """The largest error over the outputs of a pair, relative to their norm; infinite where nobody's are not zero."""
    pairs = chosen.shape[0]
    rows, nobody = x.double().repeat_interleave(pairs // x.shape[0], dim=0), chosen < 0
    if bool(y.isnan().any()) or bool((y[nobody] != 0).any()):
        return float("inf")
    errors = [0.0]
    for expert in set(chosen[~nobody].tolist()):
        own = chosen == expert
        unit = unpack(weight, expert) * weight.out_scale[expert].double().unsqueeze(1)
        expected = (rows[own] @ unit.T) * scale[own].double()
        errors.append(float(((y[own].double() - expected).norm(dim=1) / expected.norm(dim=1)).max()))
    return max(errors)


def cut_sums(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """``x @ w.T`` as the instruction adds it, 256 K elements for themselves.

    What is below 2^-13 of the largest of 32 products and of the sum before them is cut.
    """

    def cut(values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
        last = torch.exp2(torch.floor(torch.log2(largest.clamp_min(1e-300))) - 13)
        return torch.trunc(values / last) * last

    total = torch.zeros(x.shape[0], w.shape[0])
    for tile_at in range(0, x.shape[1], 256):
        acc = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float64)
        for at in range(tile_at, tile_at + 256, 32):
            products = x[:, None, at : at + 32] * w[None, :, at : at + 32]
            largest = torch.maximum(products.abs().amax(2), acc.abs())
            acc = cut(acc, largest) + cut(products, largest[..., None]).sum(2)
        total += acc.float()
    return total


@pytest.mark.parametrize("case", [case for case in CASES if case.kind == "folded"], ids=str)
def test_the_tolerance_is_that_of_the_instruction(case: Case) -> None:
    """A right kernel uses half of it, and one wrong block scale in a thousand outputs more."""
    x, weight, chosen, row_scale = operands(case)
    chosen[chosen >= case.experts] = -1
    scale, rows = of_pairs(row_scale, case), x.double().repeat_interleave(case.pairs // x.shape[0], dim=0)
    y = torch.zeros(case.pairs, case.n)
    for expert in set(chosen[chosen >= 0].tolist()):
        own = chosen == expert
        y[own] = cut_sums(rows[own], unpack(weight, expert).double()) * weight.out_scale[expert] * scale[own]
    assert error(y, x, weight, chosen, scale) < TOLERANCE[case.kind] / 2
    y[:, 7] *= 2
    assert error(y, x, weight, chosen, scale) > TOLERANCE[case.kind]


GPU_CASES = [
    *CASES,
    *(
        Case(config, rows, 1, tokens, 1536, 2048, experts=40, top_k=8, kind=kind)
        for kind, configs in CONFIGS.items()
        for config in configs
        for rows in (1, 2)
        for tokens in (1, 37)
    ),
    Case(FEW, split=2, tokens=3, n=1536, k=2048, experts=40, top_k=8),
    Case(FEW, tokens=1, n=1536, k=2048, experts=40, top_k=8, single=True),
]


@pytest.mark.gpu
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_on_a_gpu(case: Case, known: bool) -> None:
    hopper()
    x, weight, chosen, row_scale = operands(case, "cuda")
    block = case.config.bm
    routed = unsorted(chosen.clone(), block) if case.single else route(chosen, case.experts, block)
    chosen[chosen >= case.experts] = -1
    torch.cuda.synchronize()
    torch.use_deterministic_algorithms(True, warn_only=True)  # new tensors start as NaN
    plan = Plan(case.config, case.rows, case.split)
    y = run(x, weight, routed, case.pairs, row_scale, torch.float32, known, plan)
    torch.use_deterministic_algorithms(False)
    assert error(y, x, weight, chosen, of_pairs(row_scale, case)) < TOLERANCE[case.kind]
    for _ in range(20):
        assert torch.equal(run(x, weight, routed, case.pairs, row_scale, torch.float32, known, plan), y)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("tokens", [1, 5, 16, 60, 300, 2100])
def test_the_choice_on_a_gpu(tokens: int, kind: Kind) -> None:
    """Also in dense tiles, which many tokens take."""
    hopper()
    case = Case(FEW, tokens=tokens, n=512, k=1024, experts=16, top_k=4, kind=kind)
    x, weight, chosen, row_scale = operands(case, "cuda")
    routed = route(chosen, case.experts, tile(weight, x.dtype, case.pairs))
    y = grouped_linear(x, weight, routed, case.pairs, row_scale, torch.float32)
    assert error(y, x, weight, chosen, row_scale) < TOLERANCE[kind]

"""The sum of split-K partials and the group-scaled product against their naive twins: interpreted, and, marked ``gpu``, on CUDA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sglang_modelopt_kernels.gemm.common import Epilogue, KernelConfig, naive_finish
from sglang_modelopt_kernels.gemm.group_scaled import multiply, naive_multiply

TOLERANCE = 1e-6
"""Of fp32 sums of some hundred products and their scaling, relative to the sum of magnitudes."""
FINISH = [(splits, m, n, per_row, bias) for splits in (1, 3, 16) for m, n in ((1, 34), (3, 1030)) for per_row, bias in
          ((False, False), (True, True))]  # fmt: skip
GROUPED = [
    # (m, n, k, group, (bn, bm, bk, warps, stages))
    (5, 150, 256, 128, (64, 16, 128, 4, 2)),
    (17, 64, 384, 128, (32, 32, 64, 4, 2)),
    (33, 40, 128, 64, (32, 16, 64, 4, 2)),
]


def epilogue_of(m: int, n: int, per_row: bool, has_bias: bool, device: str) -> Epilogue:
    generator = torch.Generator().manual_seed(m + n)
    out_scale = torch.rand(n, generator=generator) + 0.5
    row_scale = torch.rand(m, 1, generator=generator) + 0.5 if per_row else None
    bias = torch.randn(n, generator=generator) if has_bias else None
    moved = [None if t is None else t.to(device) for t in (row_scale, bias)]
    return Epilogue(out_scale.to(device), *moved, descale=2.0**9)


def finish_error(splits: int, m: int, n: int, per_row: bool, has_bias: bool, device: str) -> float:
    """Sum partials into some columns of a wider result, which starts as NaN."""
    partials = torch.randn(splits, m, n, generator=torch.Generator().manual_seed(splits)).to(device)
    epilogue = epilogue_of(m, n, per_row, has_bias, device)
    y = torch.full((m, n + 8), torch.nan, device=device)
    epilogue.finish(partials, y[:, 4:-4])
    assert bool(y[:, :4].isnan().all() & y[:, -4:].isnan().all()), "other columns were written"
    expected = naive_finish(partials, epilogue)
    bias = None if epilogue.bias is None else epilogue.bias.abs()
    bound = naive_finish(partials.abs(), Epilogue(epilogue.out_scale, epilogue.row_scale, bias, epilogue.descale))
    return float(((y[:, 4:-4].double() - expected).abs() / bound).max())


def grouped_error(m: int, n: int, k: int, group: int, config: tuple[int, int, int, int, int], device: str) -> float:
    generator = torch.Generator().manual_seed(m + n + k)
    x = torch.randn(m, k, generator=generator).bfloat16().to(device)
    unit = torch.randint(-8, 8, (n, k), generator=generator).bfloat16().to(device)
    scale = (torch.rand(n, k // group, generator=generator) + 0.1).to(device)
    epilogue = epilogue_of(m, n, True, True, device)
    y = torch.full((m, n), torch.nan, device=device)
    first = config[0] * (n // config[0])  # two parts of the rows: whole tiles, and the rest
    for part in (slice(0, first), slice(first, n)):
        if part.start < part.stop:
            multiply(x, unit[part], scale, epilogue, y, part.start, KernelConfig(*config))
    assert epilogue.bias is not None
    positive = Epilogue(epilogue.out_scale, epilogue.row_scale, epilogue.bias.abs(), epilogue.descale)
    bound = naive_multiply(x.abs(), unit.abs(), scale, positive)
    return float(((y.double() - naive_multiply(x, unit, scale, epilogue)).abs() / bound).max())


def errors(device: str) -> list[float]:
    return [*(finish_error(*case, device) for case in FINISH), *(grouped_error(*case, device) for case in GROUPED)]


def test_in_the_interpreter() -> None:
    """One process for all cases: Triton decides at import whether it interprets."""
    script = (
        "import json, sys, importlib.util as u\n"
        f"spec = u.spec_from_file_location('cases', {str(Path(__file__))!r}); cases = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(cases)\n"
        "print(json.dumps(cases.errors('cpu')))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(FINISH) + len(GROUPED)
    assert max(found) < TOLERANCE, dict(zip([*FINISH, *GROUPED], found, strict=True))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    assert max(errors("cuda")) < TOLERANCE

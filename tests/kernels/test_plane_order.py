"""The permutation into plane order against its naive twin: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sglang_modelopt_kernels.gemm.plane_order import naive_order, order

CASES = [(1, 64), (3, 1088), (2, 4096), (0, 128)]


def is_wrong(m: int, k: int, device: str) -> bool:
    """Whether an entry is not the naive twin's."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(k)).to(torch.float8_e4m3fn).to(device)
    return not torch.equal(order(x, torch.float16), naive_order(x, torch.float16))


def test_in_the_interpreter() -> None:
    script = (
        "import importlib.util as u\n"
        f"spec = u.spec_from_file_location('cases', {str(Path(__file__))!r}); cases = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(cases)\n"
        "assert not any(cases.is_wrong(*case, 'cpu') for case in cases.CASES)\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_gpu(case: tuple[int, int]) -> None:
    assert not is_wrong(*case, "cuda")


def test_a_width_that_is_not_whole_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        order(torch.ones(2, 96, dtype=torch.float16), torch.float16)

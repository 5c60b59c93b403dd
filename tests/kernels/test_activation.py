"""The activation of an expert's rows, with and without gate, bias and limit: in Triton's interpreter, and on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sglang_modelopt_kernels.moe.activation import SWIGLU, Activation, activate, naive_activate

FORMS = [
    SWIGLU,
    replace(SWIGLU, bias=True),
    Activation(alpha=1.702, offset=1.0, limit=7.0, bias=True),
    Activation(limit=10.0),
    Activation(limit=5.0, limits_function=True),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("relu2", gated=False),
    Activation("relu2", gated=False, bias=True),
    Activation("silu", gated=False),
    Activation("gelu", gated=False),
]
"""Every form of the activation that some model has, and the others that the kernel computes."""


def activated(device: str) -> list[float]:
    """Largest errors of each of FORMS, in float32, in units of what is tolerated."""
    generator = torch.Generator().manual_seed(0)
    errors = []
    for form in FORMS:
        h = torch.randn(7, form.parts * 1030, generator=generator) * 5
        h[0, :4] = torch.tensor([0.0, -200.0, 200.0, -1e30] if form.function == "silu" else [0.0, -20.0, 20.0, -40.0])
        bias = torch.randn(3, h.shape[1], generator=generator) if form.bias else None
        experts = torch.tensor([0, 2, -1, 1, 1, 0, -1], dtype=torch.int32) if form.bias else None
        moved = [tensor if tensor is None else tensor.to(device) for tensor in (bias, experts)]
        found = activate(h.to(device), form, None, *moved).double().cpu()
        expected = naive_activate(h, form, bias, experts)
        # A few operations of float32, on a sum of two where there is a bias; GELU's factor cancels where x is negative.
        size = expected.abs()
        if form.bias or form.function.startswith("gelu"):
            size = size + naive_activate(h.abs(), form, None if bias is None else bias.abs(), experts).abs()
        errors.append(float(((found - expected).abs() / (size * 2.0**-20 + 2.0**-126)).max()))
    return errors


def test_in_the_interpreter() -> None:
    """In a process of its own: Triton decides at import whether it interprets."""
    script = (
        "import json, sys, importlib.util as u\n"
        f"spec = u.spec_from_file_location('cases', {str(Path(__file__))!r}); cases = u.module_from_spec(spec)\n"
        "sys.modules['cases'] = cases; spec.loader.exec_module(cases)\n"
        "print(json.dumps(cases.activated('cpu')))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == len(FORMS)
    assert max(errors) < 1, dict(zip(map(str, FORMS), errors, strict=True))


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    assert max(activated("cuda")) < 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"function": "tanh"}, "unknown function: 'tanh'"),
        ({"function": "gelu", "alpha": 2.0}, "gelu has no alpha"),
        ({"gated": False, "limit": 7.0}, "those of a gated activation"),
        ({"limits_function": True}, "needs a limit"),
    ],
)
def test_what_nothing_computes(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Activation(**fields)  # type: ignore[arg-type]


def test_its_name_in_errors() -> None:
    full = Activation(alpha=1.702, offset=1.0, limit=7.0, bias=True)
    assert str(full) == "gated silu(alpha 1.702), limit 7, offset 1, bias"
    assert [str(form) for form in (SWIGLU, Activation("relu2", gated=False))] == ["gated silu", "relu2"]


def test_bad_arguments() -> None:
    h = torch.zeros(2, 4)
    for wrong in (torch.zeros(2, 3), torch.zeros(4), torch.zeros(2, 4, dtype=torch.float64)):
        with pytest.raises(ValueError, match="h must"):
            activate(wrong)
    biased, experts = replace(SWIGLU, bias=True), torch.zeros(2, dtype=torch.int32)
    for form, bias, numbers in ((SWIGLU, h, experts), (biased, None, None), (biased, h, None)):
        with pytest.raises(ValueError, match="must be given together"):
            activate(h, form, None, bias, numbers)
    with pytest.raises(ValueError, match="bias must"):
        activate(h, biased, None, torch.zeros(2, 3), experts)
    with pytest.raises(ValueError, match="experts must"):
        activate(h, biased, None, h, experts.long())


@pytest.mark.gpu
def test_the_operator_is_well_formed() -> None:
    operators = torch.ops.modelopt_ext
    x = torch.randn(4, 128, device="cuda").bfloat16()
    owners = torch.tensor([0, 1, -1, 1], dtype=torch.int32, device="cuda")
    biased = (torch.zeros(2, 128, device="cuda"), owners, "silu", True, 1.702, 1.0, 7.0, False, torch.bfloat16)
    for arguments in ((x, None, None, "relu2", False, 1.0, 0.0, None, False, torch.bfloat16), (x, *biased)):
        torch.library.opcheck(operators.activate.default, arguments)

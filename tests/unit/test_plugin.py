"""Registration: the right SGLang, every hooked target as expected, and a stop with one line when anything is not."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

pytest.importorskip("sglang")


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter, since SGLang's hooks are process-wide."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


def test_entry_point() -> None:
    (entry,) = entry_points(group="sglang.srt.plugins", name="modelopt_ext")
    assert entry.value == "sglang_modelopt_ext.integration.plugin:register"


REGISTRATION = """
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
load_plugins()
from sglang_modelopt_ext.integration import config, loading, plugin, processes, updates
hooks = (*config.HOOKS, *loading.HOOKS, *updates.HOOKS, *processes.HOOKS)
assert len({hook.target for hook in hooks}) == len(hooks)
assert all(hook.target in HookRegistry._patched for hook in hooks), HookRegistry._patched
assert all(hook.why for hook in hooks)
plugin.register()
assert all(len(HookRegistry._hooks[hook.target]) == 1 for hook in hooks), "registered twice"

from sglang.srt.layers.quantization import CPU_QUANTIZATION_METHODS, QUANTIZATION_METHODS
from sglang.srt.layers.linear import WEIGHT_LOADER_V2_SUPPORTED
from sglang.srt.arg_groups.choices import QUANTIZATION_CHOICES
from sglang_modelopt_ext.schemes.table import FAMILIES
for family in FAMILIES:
    assert QUANTIZATION_METHODS[family] is CPU_QUANTIZATION_METHODS[family]
    assert QUANTIZATION_CHOICES.count(family) == 1
assert WEIGHT_LOADER_V2_SUPPORTED.count("ModelOptExtLinearMethod") == 1
print("registered")
"""


def test_registers_through_the_entry_point_once() -> None:
    result = run(REGISTRATION)
    assert "registered" in result.stdout, result.stderr[-3000:]


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        (
            "from sglang_modelopt_ext.integration import plugin; plugin.SUPPORTED_SGLANG = '0.5.22'",
            r"sglang: version: expected 0\.5\.22, the only one tested with this plugin, got 0\.5\.23",
        ),
        (
            "from sglang.srt.model_loader.loader import DefaultModelLoader as L; del L.load_weights_only",
            r"sglang: sglang\.srt\.model_loader\.loader\.DefaultModelLoader\.load_weights_only: expected a function",
        ),
        (
            "from sglang.srt.model_loader.loader import DefaultModelLoader as L\n"
            "L.load_weights_only = staticmethod(lambda model, tensors: None)",
            r"load_weights_only: expected parameters \('model', 'weights', 'target_device'\), got \('model', 'tensors'\)",
        ),
        (
            "from sglang.srt.plugins.hook_registry import HookRegistry as R\n"
            "R._apply_target = classmethod(lambda *a: 1 / 0)",
            r"expected to be hooked, got a failure",
        ),
        (
            "import sglang.srt.layers.linear as m; del m.WEIGHT_LOADER_V2_SUPPORTED",
            r"plugin: registration: expected success, got AttributeError",
        ),
    ],
)
def test_a_failed_registration_stops_the_process_with_one_line(sabotage: str, message: str) -> None:
    result = run(f"{sabotage}\nfrom sglang.srt.plugins import load_plugins\nload_plugins()\nprint('went on')")
    assert result.returncode != 0
    assert "went on" not in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("ModelOptExtError: ")]
    assert re.search(message, line), line

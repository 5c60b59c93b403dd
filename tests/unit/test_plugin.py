"""Registration: the right SGLang, every hooked target as expected, and a stop with one line when anything is not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points, version

import pytest

pytest.importorskip("sglang")

from sglang_modelopt_ext.env import ERROR_FILE
from sglang_modelopt_ext.schemes.versions import TESTED_SGLANG, described_sglang, installed_sglang


def test_entry_point() -> None:
    (entry,) = entry_points(group="sglang.srt.plugins", name="modelopt_ext")
    assert entry.value == "sglang_modelopt_ext.integration.plugin:register"


REGISTRATION = """
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
load_plugins()
from sglang_modelopt_ext.integration import config, loading, mapping, plugin, processes, products, updates
hooks = (*config.HOOKS, *mapping.HOOKS, *loading.HOOKS, *products.HOOKS, *updates.HOOKS, *processes.HOOKS)
assert len({hook.target for hook in hooks}) == len(hooks)
assert all(hook.target in HookRegistry._patched for hook in hooks), HookRegistry._patched
assert all(hook.why for hook in hooks)
plugin.register()
assert all(len(HookRegistry._hooks[hook.target]) == 1 for hook in hooks), "registered twice"

from sglang.srt.layers.quantization import CPU_QUANTIZATION_METHODS, QUANTIZATION_METHODS
from sglang.srt.arg_groups.choices import QUANTIZATION_CHOICES
from sglang_modelopt_ext.schemes.table import FAMILIES
for family in FAMILIES:
    assert QUANTIZATION_METHODS[family] is CPU_QUANTIZATION_METHODS[family]
    assert QUANTIZATION_CHOICES.count(family) == 1
print("registered")
"""


UNTESTED = "from sglang_modelopt_ext.integration import plugin; plugin.TESTED_SGLANG = ('0.1',)"
MISSING = (
    "from sglang_modelopt_ext.integration import contract, uses; "
    "contract.USES = (*contract.USES, uses.Use('a.b', 'test'), uses.Use('c.d', 'test'))"
)
LOAD = "from sglang.srt.plugins import load_plugins\nload_plugins()\nprint('went on')"


def test_the_installed_version_is_tested() -> None:
    """Whose contract the other tests check, and in whose words its decisions are put."""
    assert installed_sglang() == described_sglang() == version("sglang")
    assert installed_sglang() in TESTED_SGLANG


SABOTAGED = (
    (
        f"{UNTESTED}; {MISSING}",
        r"sglang: version: expected one of 0\.1, or another in which all that this plugin uses is as there, "
        rf"got {re.escape(version('sglang'))}, where 2 are not: a\.b: missing; c\.d: missing$",
    ),
    (
        f"{UNTESTED}; from sglang_modelopt_ext.integration.config import HOOKS\n"
        "object.__setattr__(HOOKS[0], 'parameters', ('other',))",
        r"where 1 are not: sglang\.srt\.model_loader\.utils\.get_model_architecture: "
        r"parameters \(model_config\), not \(other\)$",
    ),
    (
        f"{UNTESTED}; plugin.installed_sglang = lambda: None",
        r"sglang: version: expected one of 0\.1, or another .*, got none$",
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
        "import sglang.srt.server_args as m; del m.add_quantization_method_choices",
        r"plugin: registration: expected success, got ImportError",
    ),
)
"""What is missing when this package registers, and the line that stops the process."""

FORKS = """
import json, os, sys
import sglang.srt.model_loader.loader, sglang.srt.plugins, sglang.srt.server_args

for number, code in enumerate(json.load(sys.stdin)):
    if os.fork():
        os.wait()
        continue
    for descriptor, end in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{sys.argv[1]}/{number}.{end}", os.O_WRONLY | os.O_CREAT), descriptor)
    status = 1
    try:
        exec(code, {"__name__": "__main__"})
        status = 0
    except SystemExit as stop:
        print(stop.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        print("status", status, flush=True)
        sys.stderr.flush()
        os._exit(status)
"""
"""Runs each code in a fork of one process, which has imported SGLang before: that is what takes time."""


CODES = {
    "registered": REGISTRATION,
    "untested": f"{UNTESTED}\n{LOAD}\nimport sys; assert 'sglang.srt.layers.attention.triton_backend' not in sys.modules",
    "child": f"import os; os.environ[{ERROR_FILE.variable!r}] = '/nowhere'\n{UNTESTED}; {MISSING}\n{LOAD}",
} | {f"sabotaged {number}": f"{sabotage}\n{LOAD}" for number, (sabotage, _) in enumerate(SABOTAGED)}
"""Each runs in a process of its own, since SGLang's hooks hold for a whole process."""


@dataclass(frozen=True)
class Ended:
    """What a process wrote, and whether it ended without an exception."""

    output: str
    errors: list[str]

    @property
    def well(self) -> bool:
        return self.output.endswith("status 0\n")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """The processes of CODES."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-c", FORKS, str(folder)]
    codes = json.dumps(list(CODES.values()))
    subprocess.run(command, input=codes, text=True, capture_output=True, timeout=300, check=True)
    return {
        name: Ended((folder / f"{number}.out").read_text(), (folder / f"{number}.err").read_text().splitlines())
        for number, name in enumerate(CODES)
    }


def test_registers_through_the_entry_point_once(ended: dict[str, Ended]) -> None:
    assert ended["registered"].well, ended["registered"].errors[-30:]
    assert "registered" in ended["registered"].output


def test_another_version_in_which_everything_is_as_expected_starts_with_one_warning(ended: dict[str, Ended]) -> None:
    """No more of SGLang is imported than with a tested version: not its attention for a GPU, of which the contract has rows."""
    found = ended["untested"]
    assert found.well, found.errors[-30:]
    assert "went on" in found.output
    (line,) = [line for line in found.errors if "modelopt_ext: this plugin was tested" in line]
    assert line.endswith(f"tested with SGLang 0.1, not with {version('sglang')}, in which all that it uses is as there")


def test_the_processes_of_a_server_do_not_check_again(ended: dict[str, Ended]) -> None:
    found = ended["child"]
    assert found.well, found.errors[-30:]
    assert "went on" in found.output
    assert not [line for line in found.errors if "modelopt_ext: this plugin was tested" in line]


@pytest.mark.parametrize("number", range(len(SABOTAGED)))
def test_a_failed_registration_stops_the_process_with_one_line(number: int, ended: dict[str, Ended]) -> None:
    found = ended[f"sabotaged {number}"]
    assert not found.well
    assert "went on" not in found.output
    (line,) = [line for line in found.errors if line.startswith("ModelOptExtError: ")]
    assert re.search(SABOTAGED[number][1], line), line

"""A process tree is gone after it was killed, with its orphans and shared memory."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from sglang_modelopt_ext.workflow.server.process_tree import ProcessTree

PROGRAMS = {
    "sleeps": "import time; time.sleep(60)",
    "has a child": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])",
    "has a child in its own session": (
        "import subprocess, sys; "
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'], start_new_session=True)"
    ),
    "leaves an orphan": (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    ),
    "leaves an orphan without environment": (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], env={})"
    ),
    "ignores signals": "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_nothing_survives(tmp_path: Path, program):
    tree = ProcessTree()
    process = tree.start([sys.executable, "-c", PROGRAMS[program]], {}, tmp_path / "log")
    expected = 2 if "child" in program else 1
    deadline = time.monotonic() + 30
    while len(tree.living()) != expected or ("orphan" in program and process.poll() is None):
        assert time.monotonic() < deadline, tree.describe()
        time.sleep(0.05)
    assert tree.kill() == ()
    process.wait(timeout=5)
    assert tree.living() == []


SHARES_MEMORY = """
import ctypes, signal, time
from multiprocessing import resource_tracker, shared_memory

ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: dies with its parent, as the scheduler does
resource_tracker.register = lambda *_: None
memory = shared_memory.SharedMemory(create=True, size=4096)
print(memory.name, flush=True)
time.sleep(60)
"""


def test_shared_memory_goes_too(tmp_path: Path):
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SHARES_MEMORY!r}])"
    tree = ProcessTree()
    process = tree.start([sys.executable, "-c", program], {}, tmp_path / "log")
    deadline = time.monotonic() + 30
    while not (name := (tmp_path / "log").read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    file = Path("/dev/shm") / name
    assert file.exists()
    assert tree.kill() == ()
    process.wait(timeout=5)
    assert not file.exists()


def test_other_processes_are_left_alone(tmp_path: Path):
    with subprocess.Popen([sys.executable, "-c", PROGRAMS["sleeps"]]) as other:
        tree = ProcessTree()
        tree.start([sys.executable, "-c", PROGRAMS["sleeps"]], {}, tmp_path / "log").poll()
        tree.kill()
        assert other.poll() is None
        other.kill()

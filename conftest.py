"""Imports of ``tests.support`` and ``benchmarks`` without the repository root on sys.path.

The root (and tests/) would make their folders named ``kernels`` importable as a package of that name, which is a Hugging Face
package that SGLang and transformers look for.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

for name in ("tests", "benchmarks"):
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = [str(Path(__file__).parent / name)]
        sys.modules[name] = package

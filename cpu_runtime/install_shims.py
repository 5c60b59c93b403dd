#!/usr/bin/env python3
"""Install the CPU runtime's import shims into the site-packages of the interpreter that runs this file.

    python cpu_runtime/install_shims.py [--uninstall]

Nothing is installed where they do not belong: next to SGLang's own kernels, or to a CUDA build of torch.
Installing twice is harmless.
"""

from __future__ import annotations

import argparse
import py_compile
import re
import runpy
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

SHIMS = Path(__file__).resolve().parent / "shims"
# In this order: a .pth without its module does nothing, so no moment of the copy is harmful.
FILES = ("sglang_cpu_runtime.py", "sglang_cpu_runtime.pth")
KERNEL_DISTRIBUTIONS = ("sgl-kernel", "sglang-kernel")


def main(
    argv: Sequence[str] | None = None, *, site_packages: Path | None = None, search_path: Sequence[str] | None = None
) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments, ``sys.argv[1:]`` by default.
        site_packages: where the shims go, by default this interpreter's site-packages.
        search_path: where torch and SGLang's kernels are looked for, by default ``sys.path``.
    """
    parser = argparse.ArgumentParser(description="Install the import shims of the CPU runtime.")
    parser.add_argument("--uninstall", action="store_true", help="remove them again")
    args = parser.parse_args(argv)

    target = site_packages or Path(sysconfig.get_path("purelib"))
    if args.uninstall:
        uninstall(target)
        return 0
    reason = objection(sys.path if search_path is None else search_path)
    if reason is not None:
        print(f"install_shims: refused: {reason}", file=sys.stderr)
        return 1
    install(target)
    return 0


def objection(search_path: Sequence[str]) -> str | None:
    """Return why the shims must not be installed next to what ``search_path`` holds, or None."""
    for distribution in metadata.distributions(path=list(search_path)):
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if name in KERNEL_DISTRIBUTIONS:
            return f"{name} {distribution.version} is installed; the CPU runtime is for environments without it"
    cuda = torch_cuda_version(search_path)
    if cuda is not None:
        return f"torch is a CUDA {cuda} build; the CPU runtime is for CPU builds of torch"
    return None


def torch_cuda_version(search_path: Sequence[str]) -> str | None:
    """``torch.version.cuda`` of the torch in ``search_path``, without importing torch; None without torch."""
    spec = PathFinder.find_spec("torch", list(search_path))
    if spec is None or spec.origin is None:
        return None
    version: str | None = runpy.run_path(str(Path(spec.origin).with_name("version.py"))).get("cuda")
    return version


def install(site_packages: Path) -> None:
    """Copy the shims into ``site_packages``."""
    for name in FILES:
        shutil.copyfile(SHIMS / name, site_packages / name)
    # Compiled here, because every interpreter start pays for the module otherwise where bytecode is not written.
    py_compile.compile(str(site_packages / FILES[0]), quiet=1)


def uninstall(site_packages: Path) -> None:
    """Remove the shims from ``site_packages``. Files that are missing do not matter."""
    for name in reversed(FILES):
        (site_packages / name).unlink(missing_ok=True)
    for compiled in (site_packages / "__pycache__").glob("sglang_cpu_runtime.*.pyc"):
        compiled.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())

"""The speed that users feel: ``python -m benchmarks.serving ARGUMENTS`` is ``sglang-modelopt bench ARGUMENTS``."""

from __future__ import annotations

import sys

from sglang_modelopt_ext.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))

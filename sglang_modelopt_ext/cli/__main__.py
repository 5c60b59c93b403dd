"""``python -m sglang_modelopt_ext.cli``."""

import sys

from sglang_modelopt_ext.cli.main import main

sys.exit(main())

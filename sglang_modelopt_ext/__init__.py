"""A plugin with which an unmodified SGLang serves the quantized checkpoints that NVIDIA ModelOpt exports.

Nothing else is imported here: SGLang loads :func:`sglang_modelopt_ext.integration.plugin.register` through its entry point, and
the checkpoint reader must stay importable without SGLang.
"""

from sglang_modelopt_ext._version import __version__

__all__ = ["__version__"]

"""The entry point SGLang calls in each of its processes (group ``sglang.srt.plugins``)."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from sglang_modelopt_ext.errors import ModelOptExtError

SUPPORTED_SGLANG = "0.5.23"


def check_version() -> None:
    """Raises ModelOptExtError unless SGLang is the version this plugin was tested with."""
    try:
        found = version("sglang")
    except PackageNotFoundError:
        found = "none"
    if found != SUPPORTED_SGLANG:
        raise ModelOptExtError.at(
            "sglang", "version", f"{SUPPORTED_SGLANG}, the only one tested with this plugin", found
        )


def register() -> None:
    """Hooks this package into SGLang; called again it does nothing.

    Raises:
        SystemExit: with one line, when anything does not fit. SGLang swallows every other exception of a plugin and would serve
            without it.
    """
    try:
        check_version()
        _install()
    except ModelOptExtError as error:
        raise SystemExit(error.one_line()) from error
    except Exception as error:
        raise SystemExit(
            f"ModelOptExtError: plugin: registration: expected success, got {type(error).__name__}: {error}"
        ) from error


def _install() -> None:
    # Imported here: importing SGLang's modules takes seconds, and a failure must reach the handler above.
    from sglang_modelopt_ext.integration import config, loading, processes, updates
    from sglang_modelopt_ext.integration.hooks import install
    from sglang_modelopt_ext.integration.kv import hooks as kv_hooks
    from sglang_modelopt_ext.integration.kv import scales as kv_scales

    processes.print_errors_in_one_line()
    processes.open_error_channel()
    config.register_methods()
    kv_hooks.register_kv_caches()
    processes.register_preflight()
    install((*config.HOOKS, *loading.HOOKS, *kv_hooks.HOOKS, *kv_scales.HOOKS, *updates.HOOKS, *processes.HOOKS))

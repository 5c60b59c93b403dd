"""The command line ``sglang-modelopt``: from an unquantized model to a served, measured, quantized one."""

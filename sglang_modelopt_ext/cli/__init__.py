"""``sglang-modelopt``: one command from an unquantized model to a served, measured, quantized one."""

"""From a model to a served, measured checkpoint: quantize, serve, evaluate."""

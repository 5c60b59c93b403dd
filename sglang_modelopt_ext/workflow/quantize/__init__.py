"""From a model to a quantized checkpoint."""

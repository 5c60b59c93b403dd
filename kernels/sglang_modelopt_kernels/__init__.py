"""Number formats and kernels for ModelOpt's quantized weights, activations and KV caches. Depends on torch and Triton only."""

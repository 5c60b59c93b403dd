"""A format for every layer: ModelOpt's AutoQuantize, with costs from stored bytes and a state in plain JSON."""

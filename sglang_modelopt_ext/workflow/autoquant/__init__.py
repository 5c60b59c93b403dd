"""A format for every layer: ModelOpt's AutoQuantize, with costs that are really stored and a state that is plain JSON."""

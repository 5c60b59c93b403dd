"""Shared test code: tiny models, real ModelOpt exports, an independent reading of them, the real server."""

"""What the tests share: tiny models, real ModelOpt exports of them, an independent reading of those, and the real server."""

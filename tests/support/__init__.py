"""What tests share: tiny models, real ModelOpt exports of them, an independent reading of those, the real server."""

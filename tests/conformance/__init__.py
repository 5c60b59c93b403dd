"""The conformance run: every kind of export through the real engine on a GPU, judged by an independent reading. See run.py."""

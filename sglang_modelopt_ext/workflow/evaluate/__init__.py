"""Perplexity, speed and task scores of running servers."""

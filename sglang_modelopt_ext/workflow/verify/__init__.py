"""Verification of a server's answers against its checkpoint."""

"""A server's answers against those its checkpoint should give."""

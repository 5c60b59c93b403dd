"""A real SGLang server as a process, and its HTTP interface."""

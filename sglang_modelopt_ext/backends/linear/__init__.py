"""Backends of linear layers, one file for each kernel or package."""

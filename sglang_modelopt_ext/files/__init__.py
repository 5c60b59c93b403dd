"""Folders that are written whole or not at all: locks, temporary folders, exchanged names, full disks, digests of their content."""

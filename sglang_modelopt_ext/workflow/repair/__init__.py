"""Repair of an export that contradicts itself or lacks scales: every rule says what it changed and from what the value follows."""

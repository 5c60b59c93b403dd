"""Rounding of activations, one folder for each kernel; the naive twins are the activation formats of ``formats``."""

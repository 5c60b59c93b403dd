"""Layers computed from prepared weights, without SGLang."""

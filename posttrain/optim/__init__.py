"""Optimizers of our own; torch only. `presets` needs no torch, so that configs can be checked without it."""

"""Optimizer, step, checkpoints and the loop."""

"""Reductions of visual tokens."""

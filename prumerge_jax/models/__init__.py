"""Flax NNX modules of a LLaVA: vision tower, projector, decoder; and their directory on disk."""

"""Token ids and labels that no vocabulary holds."""

IMAGE_PLACEHOLDER = "<image>"
"""Stands in a text where an image goes."""
IMAGE_TOKEN = -200
"""Stands in token ids where the visual tokens of an image go (LLaVA's convention)."""
IGNORE = -100
"""Label of a position that takes no part in a loss or a score (PyTorch's convention)."""

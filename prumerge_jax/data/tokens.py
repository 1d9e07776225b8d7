"""Token ids and labels that no vocabulary holds."""

IMAGE_PLACEHOLDER = "<image>"
"""Placeholder of an image in a text."""
VIDEO_PLACEHOLDER = "<video>"
"""Placeholder of a video in a text."""
IMAGE_TOKEN = -200
"""Placeholder of the visual tokens of an image or video in token ids (LLaVA's convention)."""
IGNORE = -100
"""Label of a position that takes no part in a loss or a score (PyTorch's convention)."""

"""The error of this package."""


class DirectoryError(ValueError):
    """A model directory is incomplete, damaged, or not what was asked for."""

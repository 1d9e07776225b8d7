"""Who sees whom in a row, as arrays."""

import jax
import jax.numpy as jnp


def segment_mask(
    segment_ids: jax.Array | None, branch_ids: jax.Array | None = None
) -> jax.Array | None:
    """Which key is of a query's segment, and there of its branch or of the prefix.

    Returns:
      bool [B, 1, T, T]; None without segments.
    """
    if segment_ids is None:
        return None
    seen = segment_ids[:, :, None] == segment_ids[:, None, :]
    if branch_ids is not None:
        of_key = branch_ids[:, None, :]
        seen &= (of_key == 0) | (of_key == branch_ids[:, :, None])
    return seen[:, None]


def causal_mask(length: int) -> jax.Array:
    """Which key is at a query's index or before, bool [T, T]."""
    at = jnp.arange(length)
    return at[None, :] <= at[:, None]

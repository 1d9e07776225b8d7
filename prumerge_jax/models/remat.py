"""Rematerialisation: what of a decoder layer is kept for the backward pass, by name."""

from collections.abc import Callable
from typing import Any

import jax

PRODUCT, ADAPTER, ATTENTION, WIDE = "product", "adapter", "attention", "wide_product"
"""Names of what a policy may keep of a layer: outputs of linear layers that narrow, with their
adapters', the rank-wide products inside adapters, queries, keys and values in the form that
`heads.split_heads` keeps, attention's output with the logarithms of its sums (of the kernels that
name them), and the outputs of an MLP's widening layers."""

_KEPT: dict[str, tuple[str, ...] | None] = {
    "none": None,
    "full": (),
    "wide": (WIDE, ADAPTER),
    "dots": (PRODUCT, WIDE, ADAPTER, ATTENTION),
}
REMAT = tuple(_KEPT)
"""The policies of `rematerialise`."""


def rematerialise(body: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """A scan body whose activations are recomputed in the backward pass.

    Args:
      body: as `jax.lax.scan` takes it.
      policy: what is kept: `none` (rematerialise nothing, keep all), `full` (rematerialise all,
        keep the carry alone), `wide` (keep the outputs of an MLP's widening layers, about half of
        what `dots` keeps) or `dots` (keep those of all linear layers, each once with its
        adapter's, and attention's).

    Raises:
      ValueError: an unknown policy.
    """
    if policy not in _KEPT:
        raise ValueError(f"unknown remat policy {policy!r}; expected one of {sorted(_KEPT)}")
    kept = _KEPT[policy]
    if kept is None:
        return body
    return jax.checkpoint(
        body, policy=jax.checkpoint_policies.save_only_these_names(*kept), prevent_cse=False
    )

"""What a LLaVA with reduced visual tokens costs by arithmetic; nothing here is measured.

`counts` holds parameters, FLOPs and bytes, `roofline` the time they take at least on a chip,
`efficiency_table` the paper's table recomputed. `python -m prumerge_jax.cost` prints the last two.
"""

from prumerge_jax.cost.counts import (
    Parameters,
    kv_bytes_per_token,
    lora_parameters,
    parameters,
    training_bytes,
    training_flops,
    weight_bytes,
)
from prumerge_jax.cost.roofline import (
    CHIPS,
    Chip,
    Operation,
    Tpu,
    Workload,
    floor_seconds,
    images_per_second,
    kv_bytes,
    operations,
    sequences_that_fit,
)

__all__ = [
    "CHIPS",
    "Chip",
    "Operation",
    "Parameters",
    "Tpu",
    "Workload",
    "floor_seconds",
    "images_per_second",
    "kv_bytes",
    "kv_bytes_per_token",
    "lora_parameters",
    "operations",
    "parameters",
    "sequences_that_fit",
    "training_bytes",
    "training_flops",
    "weight_bytes",
]

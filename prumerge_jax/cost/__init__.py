"""What a LLaVA with reduced visual tokens costs by arithmetic; nothing here is measured.

`counts` holds parameters, FLOPs and bytes, `roofline` the time they take at least on a chip;
`python -m prumerge_jax.cost` prints those times.
"""

from prumerge_jax.cost.bits import Bits
from prumerge_jax.cost.counts import (
    Parameters,
    kv_bytes_per_token,
    lora_parameters,
    parameters,
    stages_of,
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
    operations,
)

__all__ = [
    "CHIPS",
    "Bits",
    "Chip",
    "Operation",
    "Parameters",
    "Tpu",
    "Workload",
    "floor_seconds",
    "images_per_second",
    "kv_bytes_per_token",
    "lora_parameters",
    "operations",
    "parameters",
    "stages_of",
    "training_flops",
    "weight_bytes",
]

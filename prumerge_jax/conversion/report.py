"""What a conversion did, tensor by tensor, for the user and for `conversion_report.json`."""

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from prumerge_jax.conversion.checkpoint_reader import OpenedModel
from prumerge_jax.conversion.keys import Weight
from prumerge_jax.conversion.tensor_files import Tensor


@dataclasses.dataclass
class Report:
    """Counts of a conversion into our directory.

    Attributes:
      model: what was converted.
      inputs: SHA-256 of every file that tensors were read from, by folder and file name.
      tensors_in: checkpoint tensors that became weights.
      weights_out: weights written; a stack of layers is one.
      parameters: numbers in those weights.
      unused_tower_tensors: number of tensors of the tower that the model never uses; they are
        stored alongside it for exports.
      dtype_changes: number of tensors by `from -> to`.
      quantize: name of the format of quantised kernels; None without.
      errors: by path of a quantised kernel its error, see `assemble_quantised`.
      quantised_bytes: bytes of those kernels, scales included.
    """

    model: OpenedModel
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    tensors_in: int = 0
    weights_out: int = 0
    parameters: int = 0
    unused_tower_tensors: int = 0
    dtype_changes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    quantize: str | None = None
    errors: dict[str, float] = dataclasses.field(default_factory=dict)
    quantised_bytes: int = 0

    def add(self, weight: Weight, tensors: Mapping[str, Tensor], dtype: np.dtype) -> None:
        """Counts one weight that was written as `dtype`."""
        self._count(weight)
        for key in weight.keys:
            if (before := tensors[key].info.dtype) != dtype:
                self.dtype_changes[f"{before} -> {dtype}"] += 1

    def add_quantised(self, weight: Weight, error: float, nbytes: int) -> None:
        """Counts one kernel that was written as codes and scales of so many bytes."""
        self._count(weight)
        self.errors[weight.path] = error
        self.quantised_bytes += nbytes

    def _count(self, weight: Weight) -> None:
        self.tensors_in += len(weight.keys)
        self.weights_out += 1
        self.parameters += math.prod(weight.shape)

    def quantisation(self) -> dict[str, Any]:
        """The format of quantised kernels, their bytes and errors, for the manifest; {} without."""
        if self.quantize is None:
            return {}
        facts = {"format": self.quantize, "bytes": self.quantised_bytes}
        return {"quantisation": {**facts, "relative_rms_error": self.errors}}

    def summary(self) -> str:
        """One line for the terminal."""
        line = (
            f"{self.parameters:,} parameters from {self.tensors_in} tensors, "
            f"{self.unused_tower_tensors} of the tower that LLaVA never uses, "
            f"{len(self.model.ignored)} left out"
        )
        if self.quantize is None:
            return line
        worst = max(self.errors, key=lambda path: self.errors[path])
        return (
            f"{line}; {len(self.errors)} kernels in {self.quantize}, "
            f"{self.quantised_bytes / 1e6:,.1f} MB, relative error up to "
            f"{self.errors[worst]:.4f} ({worst})"
        )

    def source(self) -> dict[str, Any]:
        """What the manifest keeps: the kinds of input, without their places on this machine."""
        found = self.model.detections.values()
        base = self.model.adapter_base
        return {
            "inputs": [{"kind": d.kind.name, "reason": d.reason} for d in found],
            "adapter_base": base,
            "adapter_merged": base is not None and self.model.adapter is None,
        }

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            **self.source(),
            "input_sha256": self.inputs,
            "tensors_in": self.tensors_in,
            "weights_out": self.weights_out,
            "parameters": self.parameters,
            "unused_tower_tensors": self.unused_tower_tensors,
            "dtype_changes": dict(self.dtype_changes),
            "ignored": dict(self.model.ignored),
            **self.quantisation(),
        }

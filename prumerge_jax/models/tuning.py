"""Preferences of each platform: which of several equivalent forms of a computation it runs fastest.

Every form computes the same; they differ in time, in memory and in the last bits. The tables below
are the only place that knows what a platform prefers. What a platform *cannot* do is not a
preference: the code that works around it asks for the platform itself.

To compare on a chip:

    with tuning.use(Tuning.plain()):                              # without any of it
        ...
    with tuning.use(dataclasses.replace(tuning.current(), rotary="roll")):  # without one of it
        ...
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from prumerge_jax.sharding.mesh import platform


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The form of every computation that has several. The defaults are the plain ones.

    Attributes:
      attention: backend of `attention.attend`, for the heads whose width and dtype it takes; the
        others get `xla`.
      cache_attention: form of `attention.attend_to_pages`, for the heads whose width and dtype it
        takes; the others get `xla`.
      layers: how inference holds the decoder's layers, stacked on a leading axis or one by one
        (`llava.inference_layout`). Training needs them stacked.
      kernels: how inference keeps the decoder's linear layers (`layers.Linear`), as [d_in, d_out],
        as [d_out, d_in], or as [d_out, d_in] where d_out is larger.
      images_at_once: images that a server encodes in one call; fewer are computed as so many.
      row_growth: by how much every length of a server's rows is longer than the one before, from
        128 tokens on; rows are computed to the next length.
      page_size: tokens per page of keys and values, where the configuration leaves it open.
      heads: how projections are split into heads, rotated, and put together again: by XLA's
        reshapes, or by the kernel of `heads.py` where it takes them.
      rotary: how the two halves of a head are swapped, where XLA does it.
      projection_barrier: whether inference keeps the query, key and value products apart from the
        split into heads (`jax.lax.optimization_barrier`). Training does without: its weights are
        gathered into the layout that suits, and a barrier costs copies in the backward pass.
      adapter_barrier: whether what adapters add to outputs is computed apart
        (`products.computed_apart`), so that the sum becomes part of the kernel's larger product.
    """

    attention: Literal["xla", "blocks", "cudnn", "splash"] = "xla"
    cache_attention: Literal["xla", "paged_tpu", "paged_gpu"] = "xla"
    layers: Literal["stack", "list"] = "stack"
    kernels: Literal["in_first", "out_first", "wide_out_first"] = "in_first"
    images_at_once: int = 4
    row_growth: int = 4
    page_size: int = 16
    heads: Literal["reshape", "kernel"] = "reshape"
    rotary: Literal["roll", "matmul"] = "roll"
    projection_barrier: bool = False
    adapter_barrier: bool = False

    @classmethod
    def plain(cls) -> "Tuning":
        """Everything switched off: what runs on every platform."""
        return cls()


BY_PLATFORM = {
    # Measured on two cores of a Xeon (AVX-512), float32; docs/performance.md.
    "cpu": Tuning(
        # 12.6 µs per token and layer in 8 rows of 640; `xla` took 25.
        attention="blocks",
        # XLA's CPU products take no slices: a decoding step of one slot took 610 ms with the layers
        # in a stack and 236 in a list; one of eight slots 1033 and 717.
        layers="list",
        # A product of 2816 x 1024 with 8, 16, 32 rows took 1.0, 1.5, 2.4 ms (AVX2), with
        # [d_in, d_out] 2.1, 2.9, 4.1.
        kernels="out_first",
        # An image of `mid` takes as long alone as among others.
        images_at_once=1,
        # A row takes as long as it has tokens.
        row_growth=2,
        # Attention of 32 sequences of 203 tokens to one layer: 9.7 ms of one core; 12 at 16.
        page_size=32,
        # No separate figure: everything in docs/performance.md was measured with it.
        projection_barrier=True,
    ),
    # Compiled for an H100, not run: figures are what the optimised program copies.
    "gpu": Tuning(
        # No figure: a fused kernel keeps the scores out of memory.
        attention="cudnn",
        # No figure: it reads the valid pages alone.
        cache_attention="paged_gpu",
        # A loop over a stack copies a layer's weights out of it before they are multiplied: three
        # times the traffic of decoding, which is bound by it. With a list nothing is copied.
        layers="list",
        # No figure: the form that was compiled.
        projection_barrier=True,
    ),
    # XLA's estimates for programs of 7B in bfloat16, not run; docs/performance.md.
    "tpu": Tuning(
        # v5e, by the kernel's schedule: an image in the tower 0.7 ms, with `xla` 2 ms.
        attention="splash",
        # No figure of time: XLA estimates nothing for a kernel. It reads the valid pages alone.
        cache_attention="paged_tpu",
        # No figure: pages of 16 tokens are copies of 4 KB.
        page_size=32,
        # A layer's weights are read in place in the stack; a list saves nothing.
        layers="stack",
        # Decoding 64 slots on four chips of v5e 10.8 ms a step, with [d_in, d_out] 11.6: XLA copied
        # the MLP's first kernels of all layers into another layout in every call, 1.4 GiB.
        kernels="wide_out_first",
        # A micro-batch through two layers of 7B and the head, on 64 chips of v5e 29.2 ms and 1.0 of
        # the kernel, at the peak of the memory; with `reshape` 31.8. Of v6e 9.4 and 0.5; 10.2.
        heads="kernel",
        # `accumulate` on 64 chips of v5e 667 ms, with `roll` 694; v5p 322 and 331, v6e 206 and 235.
        rotary="matmul",
        # Scoring's rows on four chips of v5e 49.1 ms, without this and `rotary` 59.3; v6e 15.6 and
        # 21.3. XLA copied the projections' weights of all layers into another layout in every run.
        projection_barrier=True,
        # No figure of its own. On 64 chips of v6e XLA added in the adapter's product, which reads
        # and writes an MLP's [2048, 11008] once more: 394 us; 325 as part of the kernel's product.
        adapter_barrier=True,
    ),
}

_SPARSE_CORES = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
}
_FUSIONS = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}
Frozen = Literal["sharded", "replicated"]
"""Where the frozen weights of a run are: split over `fsdp`, or whole on every data shard."""


@dataclasses.dataclass(frozen=True)
class TrainingTuning:
    """What training prefers on one kind of device. The defaults prefer nothing.

    Attributes:
      overlap: options of XLA with which the weights of a layer, and sums of gradients, travel while
        others are multiplied; of micro-batches on several devices.
      overlap_by_chips: in its place on slices of exactly so many chips.
      scoped_vmem: KiB of on-chip memory that a product of a micro-batch may use for its tiles, by
        whether the frozen weights are sharded or replicated; XLA's own limit where there is none.
        The tower does without: more made it 4 % slower on v5e, 1 on v5p, and 8 on v6e, where
        64 MiB made it 5 % faster.
      replicates_frozen: whether every data shard holds the frozen weights whole where they fit,
        instead of gathering them.
    """

    overlap: Mapping[str, bool] = dataclasses.field(default_factory=dict)
    overlap_by_chips: Mapping[int, Mapping[str, bool]] = dataclasses.field(default_factory=dict)
    scoped_vmem: Mapping[Frozen, int] = dataclasses.field(default_factory=dict)
    replicates_frozen: bool = False


TRAINING: Mapping[str, TrainingTuning] = {
    # XLA overlaps without being asked. VMEM: 33.0 ms become 32.2; with 64 MiB 32.0, but rows of
    # 1536 positions then wait: 25.0, 24.8 and 26.2.
    "TPU v5 lite": TrainingTuning(scoped_vmem={"sharded": 32 * 1024}),
    # Sparse cores: 19.1 ms, of which 3.2 are waited, become 16.2 and 0.1. On 8 and 256 chips XLA
    # gives them nothing, and fusions make 16.6 of 19.1 on 8 (on 64 they cost 13B 5 %). VMEM: 16.2
    # become 13.8 (48 MiB: 14.0), on 8 chips 16.6 become 14.5. Replicated, 16.8 become 14.3.
    "TPU v5": TrainingTuning(
        _FUSIONS,
        overlap_by_chips={64: _SPARSE_CORES},
        scoped_vmem={"sharded": 32 * 1024, "replicated": 32 * 1024},
    ),
    # Sparse cores: 15.1 ms, of which 4.8 are waited, become 10.9 and 0.4. Replicated, with more
    # VMEM: 10.0 (64 MiB: 10.2), on 8 chips 10.2 for 11.4. Sharded with more VMEM: 10.4, but layers
    # of 13B lose by it (a step 786 ms for 768).
    "TPU v6 lite": TrainingTuning(
        _SPARSE_CORES, scoped_vmem={"replicated": 56 * 1024}, replicates_frozen=True
    ),
}
"""By kind of device. The figures are XLA's estimates for a micro-batch of 2048 positions a chip
through two layers of 7B and the head, on 64 chips where nothing else is said; docs/pods.md."""

_override = jax.make_user_context(None)  # part of every jitted function's cache key


def current() -> Tuning:
    """The tuning of the surrounding `use`, else that of the current mesh's platform."""
    if _override.value is not None:
        return _override.value
    return BY_PLATFORM.get(platform(), Tuning.plain())


def training(mesh: Mesh) -> TrainingTuning:
    """What training prefers on the devices of a mesh."""
    return TRAINING.get(mesh.devices.flat[0].device_kind, TrainingTuning())


def micro_batch_options(mesh: Mesh, frozen: Frozen) -> dict[str, Any] | None:
    """The options of XLA that training compiles its micro-batches with; None for none.

    Args:
      mesh: of the run.
      frozen: where its frozen weights are.
    """
    preferred = training(mesh)
    overlap = preferred.overlap_by_chips.get(mesh.size, preferred.overlap)
    if mesh.size == 1:  # nobody to gather from
        overlap = {}
    vmem = preferred.scoped_vmem.get(frozen)
    return {**overlap, **({"xla_tpu_scoped_vmem_limit_kib": vmem} if vmem else {})} or None


@contextmanager
def use(tuning: Tuning) -> Iterator[None]:
    """Runs, and compiles, what is inside with this tuning in place of the platform's."""
    with _override(tuning):
        yield

"""An accelerator's numbers compared with those of its host's CPU in float32.

    python benchmarks/numerics.py
    python benchmarks/numerics.py --cases cases.npz

Run it before believing a time. Weights are random and the same on both sides. `limit` is the
largest `figure` that passes; the exit status is 1 where one does not. What the figures are:

- `selection`: how often the PruMerge step (PruMerge and PruMerge+) keeps other patches of an image
  than on the CPU, or in another order. Images are random ones with `--kept` outliers, and those of
  `--cases`: an .npz with `<i>/hidden`, `<i>/keys` [N+1, D] and `<i>/query_cls` [D], whose attention
  is computed too.
- `merged`: the largest difference of their tokens.
- `attention`: of two images, by heads of 64, 72 and 128 numbers, each with its own backend; the
  largest of their figures, which are as of `logits`.
- `logits`: of packed rows, root mean square of the difference over that of the logits.
- `packed`: the largest difference of a log-likelihood between a request that is alone and one that
  shares its rows with others, in nats.
- `greedy`: answers that a request gets alone and does not get in company. At the first token that
  differs both answers are scored: closer to each other than the limit of `packed`, they are a tie.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from drawn import random_requests
from flax import nnx
from jax.sharding import Mesh
from measuring import add_arguments, begin, progress, report
from models import (
    add_geometry_argument,
    geometry,
    outlier_attention,
    random_llava_for_inference,
)
from prefill import packed_rows

from prumerge_jax import prumerge, reductions
from prumerge_jax.engine import programs
from prumerge_jax.engine.encoding import PlacedModel
from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.request import Request
from prumerge_jax.engine.shapes import EngineConfig, fit
from prumerge_jax.models import tuning
from prumerge_jax.models.attention import attend, backend_for
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.tuning import Tuning
from prumerge_jax.sharding.mesh import mesh_on, replicated, use_mesh

Model = tuple[nnx.GraphDef, nnx.State]
REDUCTIONS = ("prumerge", "prumerge+")
LOGITS = {"float32": 0.005, "bfloat16": 0.05}  # float32 products take fewer bits on accelerators
NATS = {"float32": 0.005, "bfloat16": 0.1}
HEADS = 64, 72, 128
SUMMATION = 1e-4


def images(
    config: LlavaConfig, kept: int, cases: pathlib.Path | None
) -> Iterator[tuple[np.ndarray, ...]]:
    """Hidden states and keys [1, N+1, D], and either attention [1, N] or the CLS query [1, D]."""
    rng = np.random.default_rng(0)
    patches = config.vision.num_patches
    shape = (1, patches + 1, config.vision.width)
    for seed in range(8):
        hidden, keys = (rng.standard_normal(shape, np.float32) for _ in range(2))
        yield hidden, keys, outlier_attention(1, patches, kept, seed)
    if cases is not None:
        with np.load(cases) as arrays:
            for number in sorted({name.split("/")[0] for name in arrays}):
                names = (f"{number}/{name}" for name in ("hidden", "keys", "query_cls"))
                yield tuple(arrays[name][None] for name in names)


@functools.partial(jax.jit, static_argnames="config")
def reduce_image(
    hidden: jax.Array, keys: jax.Array, seen_by: jax.Array, *, config: prumerge.PruMergeConfig
) -> prumerge.VisualTokens:
    """The step on what `images` yields."""
    drawn = seen_by.shape[1] == keys.shape[1] - 1
    attention = seen_by if drawn else prumerge.cls_attention(seen_by, keys)
    return prumerge.reduce_tokens(hidden[:, 1:], keys[:, 1:], attention, config=config)


def selection(
    config: LlavaConfig, kept: int, cases: pathlib.Path | None, cpu: jax.Device
) -> list[dict[str, Any]]:
    """The lines `selection` and `merged`."""
    other, furthest, compared = 0, 0.0, 0
    for image in images(config, kept, cases):
        for name in REDUCTIONS:
            ours, expected = (
                jax.device_get(
                    reduce_image(*jax.device_put(image, device), config=prumerge.preset(name))
                )
                for device in (jax.devices()[0], cpu)
            )
            other += not np.array_equal(ours.patch_indices, expected.patch_indices)
            furthest = max(furthest, float(np.abs(ours.tokens - expected.tokens).max()))
            compared += 1
    return [
        line("selection", other, 0, f"of {compared} reductions"),
        line("merged", furthest, SUMMATION, "largest difference of a token"),
    ]


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square of the difference over that of what is expected."""
    return float(np.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2)))


def heads(dtype: jnp.dtype, cpu: Mesh) -> dict[str, Any]:
    """The line `attention`: this dtype and tuning, and float32 without any tuning."""
    errors, backends = [], []
    for width in HEADS:
        shape = (3, 2, 729, 4, width)  # SigLIP's patches
        given = np.random.default_rng(width).standard_normal(shape, np.float32)
        given = np.asarray(given.astype(dtype), np.float32)
        got = jax.jit(attend)(*jnp.asarray(given, dtype))
        with use_mesh(cpu), tuning.use(Tuning.plain()), jax.default_matmul_precision("highest"):
            expected = np.asarray(jax.jit(attend)(*jax.device_put(given, replicated(cpu))))
        errors.append(relative_error(np.asarray(got, np.float32), expected))
        backends.append(backend_for(dtype, width))
    return line(
        "attention", max(errors), LOGITS[dtype.name], f"{dtype.name}, {', '.join(backends)}"
    )


def logits(model: Model, rows: programs.Rows, tokens: jax.Array, form: Tuning) -> np.ndarray:
    """[M, V] float32 at every eighth position."""
    graphdef, state = model
    longest = rows.ids.shape[1]
    with tuning.use(form):
        pages = programs.empty_pages(*model, pages=1, page_size=16, dtype=tokens.dtype)
        nowhere = jnp.full_like(rows.ids, -1)
        hidden, _ = programs.prefill(
            *model, pages, tokens, rows, nowhere, max_segment_length=longest
        )
    flat = hidden.reshape(-1, hidden.shape[-1])[::8]
    head = jax.jit(lambda state, x: nnx.merge(graphdef, state).decoder.logits(x))
    return np.asarray(head(state, flat))


def compare_logits(
    config: LlavaConfig, model: Model, dtype: jnp.dtype, mesh: Mesh
) -> dict[str, Any]:
    """The line `logits`: this dtype and tuning, and float32 without any tuning on `mesh`."""
    visual = config.vision.num_patches // 4
    plan, number = packed_rows(visual, 60, 2 * (visual + 60) + 7, rows=2)
    fields = (plan.ids, plan.visual_index, plan.positions, plan.segment_ids)
    shape = (number, visual, config.vision.width)
    tokens = np.random.default_rng(1).standard_normal(shape, np.float32)
    rows = programs.Rows(*map(jnp.asarray, fields))
    got = logits(model, rows, jnp.asarray(tokens, dtype), tuning.current())

    graphdef, state = model
    exact = jax.tree.map(lambda weight: np.asarray(weight, np.float32), state)
    with use_mesh(mesh), jax.default_matmul_precision("highest"):
        exact, rows, tokens = jax.device_put((exact, rows, tokens), replicated(mesh))
        expected = logits((graphdef, exact), rows, tokens, Tuning.plain())
    valid = plan.segment_ids.reshape(-1)[::8] > 0
    error = relative_error(got[valid], expected[valid])
    attention = backend_for(dtype, config.text.head_dim)
    return line("logits", error, LOGITS[dtype.name], f"{dtype.name}, attention {attention}")


def engine(
    config: LlavaConfig, model: Model, requests: Sequence[Request], dtype: jnp.dtype
) -> Engine:
    """An engine of PruMerge with two rows and eight slots."""
    reduction = reductions.parse("prumerge")
    new = max(request.sampling.max_new_tokens for request in requests)
    shapes = fit(
        EngineConfig(batch_size=4, window_size=8, prefill_rows=2, slots=8),
        reduction,
        config.vision.num_patches,
        [request.opening for request in requests],
        max_new_tokens=new,
        max_positions=config.text.max_positions,
    )
    return Engine(PlacedModel(*model, config, dtype), reduction, shapes)


def scores(engine: Engine, requests: Sequence[Request]) -> dict[int, float]:
    """The log-likelihood of every request's continuation, by its key."""
    return {answer.key: answer.log_likelihood for answer in engine.score(requests)}


def company(config: LlavaConfig, model: Model, dtype: jnp.dtype) -> list[dict[str, Any]]:
    """The lines `packed` and `greedy`."""
    limit = NATS[dtype.name]
    asked = [
        dataclasses.replace(request, token_ids=request.token_ids[-28 - 4 * request.key :])
        for request in random_requests(config, number=8, text_tokens=60, output_tokens=16)
    ]
    answering = engine(config, model, asked, dtype)
    together = {answer.key: answer.token_ids for answer in answering.generate(asked)}
    alone = {r.key: next(answering.generate([r])).token_ids for r in asked}

    answered = [
        dataclasses.replace(request, continuation=np.array(alone[request.key], np.int32))
        for request in asked
    ]
    scoring = engine(config, model, answered, dtype)
    in_company = scores(scoring, answered)
    furthest = max(abs(scores(scoring, [r])[r.key] - in_company[r.key]) for r in answered)

    other, ties = 0, 0
    for request in answered:
        key = request.key
        ours, expected = together[key], alone[key]
        if ours == expected:
            continue
        until = 1 + next(i for i, (a, b) in enumerate(zip(ours, expected, strict=True)) if a != b)
        both = [
            scores(
                scoring,
                [dataclasses.replace(request, continuation=np.array(answer[:until], np.int32))],
            )
            for answer in (ours, expected)
        ]
        tie = abs(both[0][key] - both[1][key]) <= limit
        ties, other = ties + tie, other + (not tie)
    return [
        line("packed", furthest, limit, f"{len(asked)} answers of 16 tokens"),
        line("greedy", other, 0, f"of {len(asked)} answers; {ties} more are ties"),
    ]


def line(check: str, figure: float, limit: float, what: str) -> dict[str, Any]:
    """One line of the report."""
    passed = "yes" if figure <= limit else "NO"
    return {"check": check, "figure": figure, "limit": limit, "passed": passed, "what": what}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all checks and reports."""
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_geometry_argument(parser)
    parser.set_defaults(geometry="mid")  # the CPU computes it too
    parser.add_argument(
        "--dtype",
        default="float32" if on_cpu else "bfloat16",
        choices=tuple(LOGITS),
        help="of the accelerator (default here: %(default)s)",
    )
    parser.add_argument("--kept", type=int, default=40, help="outliers of a random image")
    parser.add_argument("--cases", type=pathlib.Path, help="an .npz of a tower's outputs")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    begin("numerics", __doc__, minutes=2)
    try:
        cpu = jax.devices("cpu")[0]
    except RuntimeError as error:
        parser.error(f"no CPU to compare with ({error}); set JAX_PLATFORMS=cuda,cpu or tpu,cpu")
    config, dtype = geometry(arguments.geometry), jnp.dtype(arguments.dtype)
    model = random_llava_for_inference(config, dtype)

    progress("selection of patches, on both sides")
    results = selection(config, arguments.kept, arguments.cases, cpu)
    progress("attention of heads, on both sides")
    results.append(heads(dtype, mesh_on([cpu])))
    progress("logits of packed rows, on both sides")
    results.append(compare_logits(config, model, dtype, mesh_on([cpu])))
    progress("requests alone and in company")
    results += company(config, model, dtype)
    report("numerics", arguments, results)
    if any(result["passed"] == "NO" for result in results):
        sys.exit(1)


if __name__ == "__main__":
    main()

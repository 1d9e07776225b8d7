"""What kernels of fewer bits change of a random model: its logits, and nothing of its selection.

    python benchmarks/quantised_quality.py
    python benchmarks/quantised_quality.py --formats int4 nf4 --reduction "full prumerge prumerge+"

The same weights in every format read the same random texts about random images. Compared at every
token behind the image: `kl_mean` and `kl_p99`, mean and 99th percentile of KL(unquantised |
quantised) in nats; `same`, the share of tokens after which the likeliest next one is the same, that
is of equal greedy answers of one token. `kl_more` is `kl_mean` over that with the first reduction,
less it, with a 95 % interval of the paired bootstrap over texts.

Logits of random weights are nearly flat, and KL grows with the square of their spread. So they are
multiplied by one number, which makes the unquantised model as sure of the next token as a trained
one: `--entropy` is the mean entropy in nats. `as_drawn_kl_mean` is without. Both say how rounding
grows through the layers, not what an answer of trained weights is worth: those have outliers, which
round worse, and margins, which forgive.

A format is refused that leaves a kernel unquantised, alters another weight, keeps another patch of
an image, or whose kernels have other bytes than their shapes say. `kernel_error` is the root mean
square of the kernels' error over theirs, `blocks_mb` what they take, `planned_mb` the cost model's
figure, which leaves out the scales of whole channels.
"""

import argparse
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from drawn import random_requests
from flax import nnx
from measuring import add_arguments, begin, progress, report
from models import add_geometry_argument, geometry, random_llava

from prumerge_jax import reductions
from prumerge_jax.cost import Bits, counts
from prumerge_jax.cost.bits import SCALE_BITS
from prumerge_jax.cost.roofline import FRONT_TOKENS
from prumerge_jax.engine.encoding import PlacedModel
from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.kept import kept_patches
from prumerge_jax.engine.request import Request
from prumerge_jax.engine.shapes import EngineConfig, fit
from prumerge_jax.evaluation.report.bootstrap import paired_bootstrap
from prumerge_jax.models.config import TextConfig, decoder_linears
from prumerge_jax.models.llava import LlavaModel
from prumerge_jax.models.quantisation import (
    FORMATS,
    Format,
    Quantised,
    dequantise,
    quantise,
)
from prumerge_jax.models.quantised_weights import CODES, SCALE

Path = tuple[str | int, ...]
BATCH = 4


class Read(NamedTuple):
    """What a model makes of all texts with one reduction.

    Attributes:
      logits: by text [positions, V] float32.
      kept: the patches of every image.
    """

    logits: list[jax.Array]
    kept: list[np.ndarray]


class Divergence(NamedTuple):
    """By text and position: KL of scaled logits and as drawn, and whether the likeliest token is
    the same."""

    scaled: np.ndarray
    drawn: np.ndarray
    same: np.ndarray


def in_format(plain: PlacedModel, form: Format) -> PlacedModel:
    """The model with its decoder's kernels in a format."""

    def make() -> LlavaModel:
        return LlavaModel(plain.config, quantize=form, rngs=nnx.Rngs(0))

    with nnx.use_eager_sharding(False):
        graphdef, wanted = nnx.split(nnx.eval_shape(make))
    weights = dict(nnx.to_flat_state(plain.state))
    quantised = jax.jit(quantise, static_argnames="form")
    for path, variable in nnx.to_flat_state(wanted):
        if path[-1] == CODES:
            kernel = weights.pop((*path[:-1], "kernel"))
            parts = quantised(kernel[...], form=form)
            for name, part in zip((CODES, SCALE), parts, strict=True):
                weights[*path[:-1], name] = variable.replace(part)
    return PlacedModel(graphdef, nnx.from_flat_state(weights), plain.config, plain.dtype)


def check_structure(plain: PlacedModel, model: PlacedModel, form: Format) -> dict[str, float]:
    """The columns about weights.

    Raises:
      ValueError: a kernel of the decoder's layers is not quantised, another weight is not the
        unquantised model's, or the kernels have other bytes than they should.
    """
    before = dict(nnx.to_flat_state(plain.state))
    parts = dict(nnx.to_flat_state(model.state))
    stems = {path[:-1] for path in parts if path[-1] == CODES}
    kernels = {
        path[:-1] for path in before if path[:2] == ("decoder", "layers") and path[-1] == "kernel"
    }
    if stems != kernels:
        raise ValueError(f"{form.name}: quantised are {sorted(stems)}, expected {sorted(kernels)}")
    for path in parts.keys() & before.keys():
        if not jnp.array_equal(parts[path][...], before[path][...]):
            raise ValueError(f"{form.name} alters {'.'.join(map(str, path))}")
    quantised = {stem: [parts[*stem, name][...] for name in (CODES, SCALE)] for stem in stems}
    size = sum(bits(part) for each in quantised.values() for part in each) / 8
    expected = kernel_bytes(plain.config.text, form)
    if size != expected:
        raise ValueError(f"{form.name}: kernels have {size:,} bytes, expected {expected:,}")
    errors = [
        squares(before[*stem, "kernel"][...], Quantised(*each), form)
        for stem, each in quantised.items()
    ]
    error, total = np.sum(jax.device_get(errors), 0)
    return {
        "kernel_error": float(np.sqrt(error / total)),
        "blocks_mb": size / 1e6,
        "planned_mb": counts.parameters(plain.config).blocks * Bits.of(form.name).kernels / 8e6,
    }


def kernel_bytes(text: TextConfig, form: Format) -> float:
    """What the codes and scales of the decoder's layers take."""
    of_codes, sizes = jnp.iinfo(form.codes).bits, decoder_linears(text).values()
    of_layer = sum((i * of_codes + form.groups(i) * SCALE_BITS) * o for i, o in sizes)
    return text.num_layers * of_layer / 8


def bits(array: jax.Array) -> int:
    """Of an array where numbers of 4 bits are packed."""
    info = jnp.iinfo if jnp.issubdtype(array.dtype, jnp.integer) else jnp.finfo
    return array.size * info(array.dtype).bits


@functools.partial(jax.jit, static_argnames="form")
def squares(kernel: jax.Array, quantised: Quantised, form: Format) -> jax.Array:
    """[2] sums of squares of a kernel's error and of the kernel."""
    error = dequantise(quantised, form) - kernel
    return jnp.stack([jnp.square(error).sum(), jnp.square(kernel).sum()])


def read(
    model: PlacedModel, reduction: reductions.Reduction, requests: Sequence[Request], positions: int
) -> Read:
    """The logits of the last positions of every text, and what is kept of the images."""
    shapes = fit(
        EngineConfig(
            batch_size=BATCH,
            window_size=2 * BATCH,
            prefill_rows=2,
            short_rows=tuple(range(128, 2048, 128)),
        ),
        reduction,
        model.config.vision.num_patches,
        [request.opening for request in requests],
        max_positions=model.config.text.max_positions,
    )
    logits: dict[int, jax.Array] = {}
    engine = Engine(model, reduction, shapes)
    for result in engine.logits(requests):
        logits[result.key] = jnp.asarray(result.values[-positions:])
    one_of_image = {request.images[0].key: request for request in requests}
    kept = [patches for _, patches in kept_patches(engine, list(one_of_image.values()))]
    return Read([logits[request.key] for request in requests], kept)


@jax.jit
def entropy(logits: jax.Array, scale: jax.Array) -> jax.Array:
    """Mean over positions, nats, of logits [positions, V] times `scale`."""
    log_p = jax.nn.log_softmax(scale * logits)
    return -(jnp.exp(log_p) * log_p).sum(-1).mean()


def scale_for(target: float, logits: Sequence[jax.Array]) -> float:
    """The factor that gives logits a mean entropy of `target` nats."""
    low, high = np.log(1e-2), np.log(1e3)
    for _ in range(20):
        middle = (low + high) / 2
        found = np.mean([entropy(each, np.exp(middle)) for each in logits])
        low, high = (middle, high) if found > target else (low, middle)
    return float(np.exp(low))


@jax.jit
def divergence(plain: jax.Array, other: jax.Array, scale: jax.Array) -> jax.Array:
    """KL(plain | other) by position, of logits [positions, V] times `scale`.

    As log E exp(d - E d), d being the difference of the logits: logarithms of the probabilities
    would lose a small divergence in float32.
    """
    p, d = jax.nn.softmax(scale * plain), scale * (other - plain)
    mean = (p * d).sum(-1, keepdims=True)
    return jnp.log1p((p * jnp.expm1(d - mean)).sum(-1))


def compared(plain: Iterable[jax.Array], other: Iterable[jax.Array], scale: float) -> Divergence:
    """[texts, positions] of all texts."""
    texts = [
        (divergence(a, b, scale), divergence(a, b, 1.0), a.argmax(-1) == b.argmax(-1))
        for a, b in zip(plain, other, strict=True)
    ]
    return Divergence(*(np.asarray(each, np.float64) for each in zip(*texts, strict=True)))


def row(found: Divergence, first: Divergence) -> dict[str, float]:
    """The columns about logits; `first` is the first reduction's."""
    more = paired_bootstrap(found.scaled.mean(1), first.scaled.mean(1))
    return {
        "kl_mean": found.scaled.mean(),
        "kl_p99": np.quantile(found.scaled, 0.99),
        "same": found.same.mean(),
        "kl_more": more.difference,
        "kl_more_low": more.low,
        "kl_more_high": more.high,
        "as_drawn_kl_mean": found.drawn.mean(),
    }


def rows(
    form: Format,
    plain_model: PlacedModel,
    plain: Mapping[str, Read],
    parsed: Mapping[str, reductions.Reduction],
    requests: Sequence[Request],
    scale: float,
) -> Iterator[dict[str, Any]]:
    """A format with every reduction.

    Raises:
      ValueError: it keeps other patches of an image, or as `check_structure`.
    """
    model = in_format(plain_model, form)
    about_weights = check_structure(plain_model, model, form)
    first: Divergence | None = None
    for name, reduction in parsed.items():
        own = read(model, reduction, requests, len(plain[name].logits[0]))
        if not all(map(np.array_equal, own.kept, plain[name].kept)):
            raise ValueError(f"{form.name} with {name} keeps other patches of an image")
        found = compared(plain[name].logits, own.logits, scale)
        first = first or found
        columns = {key: float(value) for key, value in row(found, first).items()}
        visual = float(np.mean([len(patches) for patches in own.kept]))
        yield {
            "format": form.name,
            "reduction": name,
            "visual_mean": visual,
            **columns,
            **about_weights,
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Compares every format with every reduction."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_geometry_argument(parser)
    parser.set_defaults(geometry="mid")  # in float32, as CPUs compute
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--reduction", default="full prumerge", help="names")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--texts_per_image", type=int, default=4)
    parser.add_argument("--positions", type=int, default=256, help="of each, behind the image")
    parser.add_argument(
        "--entropy",
        type=float,
        default=1.7,
        help="of the scaled logits in nats (default: %(default)s, as Llama-2 7B has on WikiText-2, "
        "whose perplexity is 5.47)",
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    begin("quantised_quality", __doc__, minutes=4)
    parsed = reductions.parse_list(arguments.reduction)
    config, dtype = geometry(arguments.geometry), jnp.dtype(arguments.dtype)
    text_tokens = FRONT_TOKENS + arguments.positions
    requests = random_requests(
        config, arguments.texts, text_tokens, 2, questions_per_image=arguments.texts_per_image
    )
    plain_model = PlacedModel(*random_llava(config, dtype), config, dtype)
    plain = {}
    for name, reduction in parsed.items():
        progress(f"unquantised, {name}")
        plain[name] = read(plain_model, reduction, requests, arguments.positions)
    of_first = next(iter(plain.values())).logits
    scale = scale_for(arguments.entropy, of_first)
    drawn = float(np.mean([entropy(each, 1.0) for each in of_first]))
    results: list[dict[str, Any]] = []
    for name in arguments.formats:
        progress(name)
        results += rows(FORMATS[name], plain_model, plain, parsed, requests, scale)
    note = (
        f"entropy as drawn {drawn:.2f} nats; with logits times {scale:.3g} {arguments.entropy:g}; "
        f"{arguments.texts * arguments.positions} positions"
    )
    report("quantised_quality", arguments, results, notes=[note])


if __name__ == "__main__":
    main()

"""Methods that drop tokens inside the decoder: their schedules, and where they are refused."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from configs.digits import lora
from prumerge_jax import reductions
from prumerge_jax.aot.assumptions import mean_visual_tokens
from prumerge_jax.evaluation.report.results import Row, format_table
from prumerge_jax.models.config import published
from prumerge_jax.reductions import Evidence
from prumerge_jax.serve.config import ServeConfig
from prumerge_jax.training.config import ConfigError, parse
from prumerge_jax.training.objectives.next_token import run_reduction


def test_published_schedules_have_the_published_averages() -> None:
    def average(spelling: str) -> float:
        return reductions.parse(spelling).drops(32).layer_average(576, 32)

    assert average("fastv") == (2 * 576 + 30 * 288) / 32
    assert average("pyramiddrop") == 8 * (576 + 288 + 144 + 72) / 32
    # A tenth of 3 in 10 of what was dropped comes back: 9 of 276, 4 of 109, 3 of 94.
    assert average("sparsevlm") == (2 * 576 + 4 * 309 + 9 * 204 + 17 * 113) / 32
    plain = reductions.parse("sparsevlm").drops(32)._replace(recycled=False)
    assert plain.layer_average(576, 32) == pytest.approx(188, abs=0.5)


def test_text_that_leaves_is_not_counted_as_visual_tokens() -> None:
    assert reductions.parse("fastv:of=text").drops(32).layer_average(576, 32) == 576


def test_stages_that_meet_in_a_shallow_decoder_are_one() -> None:
    drops = reductions.parse("sparsevlm").drops(3)
    assert drops.layers == (1,)
    assert drops.shares == (110 / 576,)
    assert drops.layer_average(144, 3) == (144 + 2 * (27 + 4)) / 3


def test_decoder_receives_every_patch() -> None:
    hidden = np.random.default_rng(0).normal(size=(2, 9, 4)).astype(np.float32)
    hidden[1, 3] = np.nan
    evidence = Evidence(jnp.asarray(hidden), jnp.asarray(hidden), jnp.ones((2, 9)))
    visual = reductions.reduce(evidence, "fastv")
    np.testing.assert_array_equal(visual.tokens[0], hidden[0])
    np.testing.assert_array_equal(visual.required, [9, -1])


def test_other_places_refuse_them_in_one_line() -> None:
    fastv = reductions.parse("fastv")
    config = lora.get_config()
    config.reduction = "fastv"
    refusals = [
        (ValueError, lambda: ServeConfig(reductions=("fastv",))),
        (ValueError, lambda: mean_visual_tokens("fastv", published("tiny").vision)),
        (ConfigError, lambda: run_reduction(parse(config))),
        (ValueError, lambda: reductions.explain(Evidence(*[jnp.ones((1, 4, 2))] * 3), fastv)),
        (ValueError, lambda: reductions.parse("fastv:ranking=random")),
        (ValueError, lambda: fastv.drops(2)),
    ]
    for error, refused in refusals:
        with pytest.raises(error, match=re.escape("fastv")) as caught:
            refused()
        assert "\n" not in str(caught.value)


def test_table_has_the_mean_over_layers_where_tokens_leave() -> None:
    def row(reduction: str, layer_tokens: float | None) -> Row:
        return Row("digits", reduction, {"accuracy": 50.0}, "accuracy", {}, np.array([144]), None,
                   None, None, layer_tokens=layer_tokens)  # fmt: skip

    assert "mean over layers" not in format_table([row("full", None)])
    table = format_table([row("full", None), row("fastv", 120.0)])
    assert "over" in table
    assert "120.0" in table

"""Merging of tokens inside the tower, and where the merges are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prumerge_jax import reductions
from prumerge_jax.reductions import stages


@pytest.mark.slow
@pytest.mark.parametrize("case", ["144_0", "144_1", "576_0"])
def test_three_rounds_of_matching_are_those_of_the_loop(golden, case: str) -> None:
    if not (golden / "reducers").is_dir():
        pytest.skip("the golden data has no reducers/")
    inputs, expected = (
        np.load(golden / "reducers" / f"{f}.npz") for f in ("inputs", "independent")
    )
    size, row = case.split("_")
    x, metric = (jnp.asarray(inputs[f"{f}_{size}"][int(row)][None]) for f in ("hidden", "keys"))
    groups = stages.every_token(*x.shape[:2])

    @jax.jit
    def merged(x, metric, groups):
        division = stages.bipartite(metric, 13)
        x, metric = (stages.merge(each, groups.sizes, division) for each in (x, metric))
        return x, metric, stages.regroup(groups, division)

    for _ in range(3):
        x, metric, groups = merged(x, metric, groups)
    np.testing.assert_array_equal(groups.token_of[0], expected[f"tome_{case}_source_of_patch"])
    np.testing.assert_array_equal(groups.sizes[0], expected[f"tome_{case}_sizes"])
    np.testing.assert_allclose(x[0], expected[f"tome_{case}_tokens"], atol=1e-5)
    survivors = np.asarray(groups.patches[0])
    np.testing.assert_array_equal(groups.token_of[0][survivors + 1], np.arange(len(survivors)))


@pytest.mark.parametrize("name", ["intower", "tome"])
@pytest.mark.parametrize(("depth", "patches", "tokens"), [(23, 576, 64), (3, 144, 9), (23, 576, 1)])
def test_stages_come_down_to_the_budget(name: str, depth: int, patches: int, tokens: int) -> None:
    found = reductions.parse(f"{name}:tokens={tokens}").stages(depth, patches)
    layers, counts = [stage.layer for stage in found], [stage.tokens for stage in found]
    assert layers == sorted(layers)
    assert 0 <= layers[0] <= layers[-1] < depth
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == tokens
    if name == "tome":
        for before, after in zip([patches, *counts], counts, strict=False):
            assert after >= before / 2 - 1
    if (name, tokens) == ("intower", 64):
        assert layers == [6, 14, 20]
        assert counts == [277, 133, 64]

"""AdamW and its schedule against PyTorch and transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prumerge_jax.training.optimizer import OptimizerConfig, make_optimizer, schedule

SHAPES = {"decoder.kernel": (3, 4), "decoder.bias": (4,), "projector.kernel": (2, 2)}
RATES = {"decoder.kernel": 2e-2, "decoder.bias": 2e-2, "projector.kernel": 5e-3}


@pytest.mark.torch
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_updates_equal_pytorch(decay: float, clip: float | None) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    steps = 12
    rng = np.random.default_rng(0)
    start = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in start.items()}
    groups = [
        {
            "params": [theirs[name]],
            "lr": RATES[name],
            "weight_decay": 0.0 if name.endswith("bias") else decay,
        }
        for name in SHAPES
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    warmup_steps = 4  # of 12, rounded up from 3.6
    cosine = transformers.get_cosine_schedule_with_warmup(adamw, warmup_steps, steps)

    config = OptimizerConfig(warmup_ratio=0.3, weight_decay=decay, clip_norm=clip)
    optimizer = make_optimizer(config, steps, RATES)
    ours = {name: jnp.asarray(value) for name, value in start.items()}
    state = optimizer.init(ours)
    for _ in range(steps):
        gradient = {
            name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()
        }
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name])
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
        adamw.step()
        cosine.step()
        updates, state = optimizer.update(gradient, state, ours)
        ours = {name: ours[name] + updates[name] for name in ours}
    for name in SHAPES:
        moved = np.abs(np.asarray(ours[name]) - start[name]).max()
        assert moved > 1e-3
        np.testing.assert_allclose(
            ours[name], theirs[name].detach().numpy(), atol=2e-6, err_msg=name
        )


def test_schedule_warms_up_to_the_peak_and_ends_near_zero() -> None:
    factor = schedule(OptimizerConfig(warmup_ratio=0.03), 1000)
    values = np.array([factor(step) for step in (0, 15, 30, 515, 999)])
    np.testing.assert_allclose(values, [0, 0.5, 1, 0.5, 0], atol=1e-5)


def test_state_holds_nothing_but_the_trained_weights() -> None:
    optimizer = make_optimizer(OptimizerConfig(), 10, RATES)
    abstract = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    state = jax.eval_shape(optimizer.init, abstract)
    numbers = sum(leaf.size for leaf in jax.tree.leaves(state))
    counters = 2  # of Adam and of the schedule
    assert numbers == 2 * sum(np.prod(shape) for shape in SHAPES.values()) + counters


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup_ratio": 1.0}, "warmup_ratio is 1.0"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0; expected a positive norm"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**fields)

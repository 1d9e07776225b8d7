"""Any-budget training: counts, pairs of rows, the distilled loss and its gradient."""

import dataclasses
import functools
import pathlib
import typing

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from configs.digits import any_budget as recipe
from prumerge_jax import reductions
from prumerge_jax.data import packing
from prumerge_jax.data.tokens import IGNORE
from prumerge_jax.models.llava import encode_images
from prumerge_jax.sharding.mesh import use_mesh
from prumerge_jax.store.manifest import read_manifest
from prumerge_jax.store.model_directory import read_array
from prumerge_jax.training.batches import RowBatch
from prumerge_jax.training.config import ConfigError
from prumerge_jax.training.objectives.any_budget import divergence
from prumerge_jax.training.objectives.next_token import hidden_states, next_token_loss
from prumerge_jax.training.objectives.registry import make_objective
from prumerge_jax.training.pairs import Budgets, PairBatch, TeacherShape
from prumerge_jax.training.run import run
from prumerge_jax.training.step import Sums, TrainState
from prumerge_jax.training.workdir import StopFlag
from tests.conftest import require_eight_devices
from tests.training.bench import EXAMPLES, Bench, lora_config
from tests.training.test_mesh import MODEL as WIDE_MODEL

OPTIONS = {
    "lower": (16, 3),
    "falling": 0.5,
    "weight": 0.4,
    "temperature": 2.0,
    "teacher": "current",
    "teacher_factor": 2.0,
    "teacher_length": 80,
}


def config(**options: object):
    return lora_config(
        objective="any_budget",
        objective_options=ml_collections.ConfigDict(OPTIONS | options),
        reduction="cover:tokens=20",
        run=ml_collections.ConfigDict({"rows_per_shard": 1}),
    )


class BudgetBench(Bench):
    """`Bench` with the objective's own packer; `place` is where in the stream the samples stand."""

    def batches(self, rows: int = 0, examples=EXAMPLES, place: int = 0) -> list[PairBatch]:
        packer = self.objective.packer(typing.cast(typing.Any, None), self.frozen, self.mesh, 10)
        (prepared,) = packer([examples], place)
        return prepared.batches


@functools.cache
def bench(**options: object) -> BudgetBench:
    return BudgetBench(config(**options))


def sums_of(bench: Bench, batch: PairBatch) -> Sums:
    with use_mesh(bench.mesh):
        zeros, when = bench.step.zeros(bench.trained), np.zeros(2, np.int32)
        return bench.step.accumulate(zeros, bench.trained, bench.frozen, batch, when)


def test_the_divergence_is_epics(golden) -> None:
    """Averaged over the labelled positions as they stand, which its trainer does not shift."""
    data = np.load(golden / "reducers" / "epic_loss.npz")
    for temperature in (1.0, 2.0):
        ours = divergence(data["student_logits"], data["teacher_logits"], temperature)
        mean = np.asarray(ours)[data["labels"] != IGNORE].mean()
        assert mean == pytest.approx(float(data[f"temperature{temperature}_loss"]), rel=1e-5)


def test_counts_depend_on_seed_and_place_alone_and_their_lower_bound_falls() -> None:
    budgets = Budgets((64, 4), most=128, falling=0.5, samples=4000, seed=3)
    counts = np.array([budgets.draw(place) for place in range(4000)])
    assert [budgets.draw(place) for place in (7, 2000)] == counts[[7, 2000]].tolist()
    assert (counts != [dataclasses.replace(budgets, seed=4).draw(p) for p in range(4000)]).any()
    assert budgets.lower_bound(0) == pytest.approx(64)
    assert budgets.lower_bound(1000) == pytest.approx(16)
    assert budgets.lower_bound(2000) == budgets.lower_bound(9999) == pytest.approx(4)
    bounds = np.array([budgets.lower_bound(place) for place in range(4000)])
    assert (counts >= np.floor(bounds)).all()
    assert counts.max() <= 128
    last = np.log(counts[2000:] / 4) / np.log(32)  # uniform in the logarithm
    assert np.histogram(last, 4, (0, 1))[0] / 2000 == pytest.approx(0.25, abs=0.04)


def test_a_teacher_has_a_multiple_of_the_tokens_or_all() -> None:
    students, available = np.array([3, 7, 30]), np.array([36, 10, 36])
    twice = TeacherShape(2.0, 80)
    assert twice.counts(students, available, 36).tolist() == [6, 10, 36]
    assert TeacherShape(None, 80).counts(students, available, 36).tolist() == [36] * 3


def test_the_student_sees_a_part_of_what_the_teacher_sees_and_predicts_the_same() -> None:
    batches = bench().batches()
    assert len(batches) > 1
    found = 0
    for batch in batches:
        student, teacher = batch.student, batch.teacher
        assert student.ids.shape == (1, 48)
        assert teacher.ids.shape == (1, 80)
        ours, theirs = (set(np.unique(r.visual_index)) - {-1} for r in (student, teacher))
        assert ours <= theirs
        assert not ours or len(theirs) > len(ours)
        rows, columns = np.nonzero(np.asarray(student.targets) != IGNORE)
        at = np.asarray(batch.teacher_at)[rows, columns]
        expected = np.asarray(teacher.targets)[rows, at]
        np.testing.assert_array_equal(np.asarray(student.targets)[rows, columns], expected)
        segments = np.asarray(student.segment_ids)[rows, columns]
        np.testing.assert_array_equal(np.asarray(teacher.segment_ids)[rows, at], segments)
        found += len(rows)
    assert found == sum(int((e.labels[1:] != IGNORE).sum()) for e in EXAMPLES)


MERGING = "cover:tokens=20,merge=mean"


@pytest.mark.parametrize("factor", [None, 2.0])
def test_tokens_are_those_of_a_merging_reduction_at_the_counts_drawn(factor: float | None) -> None:
    own = BudgetBench(dataclasses.replace(config(teacher_factor=factor), reduction=MERGING))
    module = own.objective.module.merge({**own.frozen, **own.trained})
    shape = TeacherShape(factor, 80)
    sides: list[RowBatch] = []
    for batch in own.batches(place=50):
        assert batch.teacher is not None
        sides += [batch.student, batch.teacher]
    stride = sides[0].visual_tokens.shape[1]
    for number in (0, 3):
        example = EXAMPLES[number]
        drawn = np.array([Budgets((16, 3), 20, 0.5, 80, own.config.seed).draw(50 + number)])
        counts = [drawn[0], shape.counts(drawn, np.array([36]), 36)[0]]
        found = []
        for rows in sides:
            here = np.asarray(rows.visual_index)[np.asarray(rows.visual_index) // stride == number]
            found += [np.asarray(rows.visual_tokens).reshape(-1, 17)[here]] if here.size else []
        for tokens, count in zip(found, counts, strict=True):
            reduction = reductions.parse(f"cover:tokens={count},merge=mean")
            expected = jax.jit(
                functools.partial(encode_images, reduction=reduction, dtype=jnp.dtype("float32"))
            )(module.vision, example.pixels[None])
            np.testing.assert_allclose(tokens, expected.tokens[0], atol=1e-6)
            assert np.exp(tokens[:, -1]).sum() == pytest.approx(36)  # every patch counts once


def alone(batches: list[RowBatch]) -> RowBatch:
    """Every segment of the batches alone in its row: nothing packed."""
    padding = {"ids": 0, "visual_index": -1, "positions": 0, "segment_ids": 0, "targets": IGNORE}
    single: dict[str, list[np.ndarray]] = {name: [] for name in padding}
    for batch in batches:
        segments = np.asarray(batch.segment_ids)
        for row, segment in np.unique(
            np.stack([np.nonzero(segments)[0], segments[segments > 0]], 1), axis=0
        ):
            here = segments[row] == segment
            for name, value in padding.items():
                field = np.full(here.size, value, np.int32)
                field[: here.sum()] = np.asarray(getattr(batch, name))[row, here]
                single[name].append(field)
    return RowBatch(
        **{name: np.stack(fields) for name, fields in single.items()},
        visual_tokens=batches[0].visual_tokens,
    )


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="current"),
        pytest.param(
            {"teacher": "adapters_off", "teacher_factor": None}, id="off", marks=pytest.mark.slow
        ),
    ],
)
def test_loss_and_gradient_are_those_of_single_samples_by_a_plain_formula(options: dict) -> None:
    own = bench(**options)
    batches = own.batches()
    student, teacher = (alone([b[side] for b in batches]) for side in (0, 1))
    at = [np.nonzero(rows.targets != IGNORE) for rows in (student, teacher)]
    np.testing.assert_array_equal(student.targets[at[0]], teacher.targets[at[1]])

    def logits(weights, side: int) -> jax.Array:
        model = own.objective.module.merge(weights)
        rows = (student, teacher)[side]
        hidden = hidden_states(model, rows, dropout_key=None, remat="none")
        return model.decoder.logits(hidden[at[side]])

    @jax.jit
    def plain(trained) -> tuple[jax.Array, dict]:
        fixed = {**own.frozen, **own.trained}
        if options:
            fixed |= {p: jnp.zeros_like(w) for p, w in fixed.items() if p.endswith("lora_b")}
        expected = jax.nn.softmax(logits(fixed, 1) / 2)

        def loss(trained) -> jax.Array:
            z = logits({**own.frozen, **trained}, 0)
            targets = student.targets[at[0]]
            cross = -jax.nn.log_softmax(z)[jnp.arange(len(targets)), targets]
            kl = (expected * (jnp.log(expected) - jax.nn.log_softmax(z / 2))).sum(-1)
            return (0.6 * cross + 0.4 * 4 * kl).sum()

        return jax.value_and_grad(loss)(trained)

    with use_mesh(own.mesh):
        expected, gradient = plain(own.trained)
    sums = [sums_of(own, batch) for batch in batches]
    assert sum(float(s.loss) for s in sums) == pytest.approx(float(expected), rel=1e-5)
    for path, value in gradient.items():
        ours = sum(np.asarray(s.gradient[path]) for s in sums)
        scale = np.abs(value).max()
        np.testing.assert_allclose(ours, value, rtol=0, atol=2e-5 * scale, err_msg=path)


@pytest.mark.torch
def test_the_divergence_and_its_gradient_are_pytorchs() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle of this test")
    rng = np.random.default_rng(0)
    student, teacher = (3 * rng.normal(size=(5, 17)) for _ in range(2))
    z = torch.tensor(student, requires_grad=True)
    log_softmax = torch.nn.functional.log_softmax
    expected = 9 * torch.nn.functional.kl_div(
        log_softmax(z / 3, -1), log_softmax(torch.tensor(teacher) / 3, -1),
        reduction="sum", log_target=True,
    )  # fmt: skip
    expected.backward()
    assert z.grad is not None
    ours, gradient = jax.value_and_grad(lambda z: divergence(z, teacher, 3.0).sum())(student)
    assert float(ours) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(gradient, z.grad.numpy(), atol=1e-5)


@pytest.mark.slow
def test_without_a_weight_it_is_the_next_token_loss_on_random_counts() -> None:
    own = bench(weight=0.0)
    taught = bench().batches()
    for batch in own.batches():
        assert batch.teacher is None
        with use_mesh(own.mesh):
            model = own.objective.module.merge({**own.frozen, **own.trained})
            expected, _ = next_token_loss(model, batch.student, dropout_key=None)
        assert float(sums_of(own, batch).loss) == pytest.approx(float(expected), rel=1e-6)
    counts = [
        sum(int((b.student.visual_index >= 0).sum()) for b in batches)
        for batches in (own.batches(), taught)
    ]
    assert counts[0] == counts[1]


def test_other_counts_compile_nothing() -> None:
    own = bench()
    for place in (0, 40, 70):
        for batch in own.batches(place=place):
            sums_of(own, batch)
    assert own.step.accumulate._cache_size() == 1
    counts = [
        sum(int((b.student.visual_index >= 0).sum()) for b in own.batches(place=place))
        for place in (0, 40, 70)
    ]
    assert len(set(counts)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["cover:tokens=20", MERGING])
def test_losses_and_weights_on_a_mesh_are_those_of_one_device(reduction: str) -> None:
    require_eight_devices()
    settings = dataclasses.replace(config(), reduction=reduction)
    trained: list[tuple[TrainState, list[float]]] = [
        BudgetBench(settings, sizes=sizes, model=WIDE_MODEL).train(0, 3)
        for sizes in ((1, 1, 1), (2, 2, 2))
    ]
    (expected, losses), (state, same) = trained
    np.testing.assert_allclose(same, losses, rtol=1e-5)
    for path, weight in expected.trained.items():
        scale = np.abs(weight).max()
        np.testing.assert_allclose(
            state.trained[path], weight, rtol=0, atol=1e-5 * scale, err_msg=path
        )


def test_requests_share_rows_whatever_the_lengths() -> None:
    rng = np.random.default_rng(0)
    requests = [packing.Request(np.arange(n, dtype=np.int32)) for n in rng.integers(3, 20, 30)]
    for windows in packing.pack_together([requests, requests], 0, [24, 32], 2):
        np.testing.assert_array_equal(windows[0].requests, windows[1].requests)
        np.testing.assert_array_equal(windows[0].row_of, windows[1].row_of)
        assert [rows.ids.shape for rows in windows] == [(2, 24), (2, 32)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lower": (3, 16)}, "objective_options.lower is (3, 16); expected falling counts"),
        ({"lower": (30, 3)}, "expected at most the tokens of the reduction 'cover:tokens=20', 20"),
        ({"falling": 1.5}, "objective_options.falling is 1.5; expected a share"),
        ({"weight": -0.1}, "objective_options.weight is -0.1; expected 0 to 1"),
        ({"temperature": 0.0}, "objective_options.temperature is 0.0; expected a positive"),
        ({"teacher": "me"}, "objective_options.teacher is 'me'; expected one of"),
        ({"teacher_factor": 0.5}, "objective_options.teacher_factor is 0.5; expected at least 1"),
        ({"teacher_length": 40}, "objective_options.teacher_length is 40; expected at least max_l"),
        ({"wieght": 0.5}, "unknown field config.objective_options.wieght; did you mean 'weight'?"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_objective(config(**changes))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_reduction_without_an_order_is_refused_and_so_are_adapters_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="'prumerge', which does not choose patches one by one"):
        make_objective(dataclasses.replace(config(), reduction="prumerge"))
    tiled = dataclasses.replace(config().model, family="llava_next", image_newline=True)
    tiled = dataclasses.replace(tiled, image_grid_pinpoints=((tiled.vision.image_size,) * 2,))
    with pytest.raises(ConfigError, match="several crops; set config.objective=next_token"):
        make_objective(dataclasses.replace(config(), model=tiled))
    off = dataclasses.replace(
        config(teacher="adapters_off"), adapter=None, learning_rates=(("projector.*", 1e-3),)
    )
    with pytest.raises(ConfigError, match="'adapters_off', but the run has no adapters"):
        make_objective(off)


@pytest.mark.slow
def test_a_stopped_run_ends_bit_identical(tmp_path: pathlib.Path) -> None:
    settings = recipe.get_config("tiny")
    settings.data.directory = str(tmp_path / "data")
    settings.tokenizer = "digits"
    settings.batch_size, settings.data.train_scenes, settings.run.rows_per_shard = 8, 16, 2
    stop = StopFlag()
    stop.request("a test")
    run(settings, tmp_path / "stopped", stop)
    assert not (tmp_path / "stopped" / "model").exists()
    for name in ("stopped", "straight"):
        run(settings, tmp_path / name, StopFlag())
    stopped, straight = (tmp_path / name / "model" for name in ("stopped", "straight"))
    for path in read_manifest(straight).arrays:
        ours, theirs = read_array(stopped, path), read_array(straight, path)
        assert ours.tobytes() == theirs.tobytes(), path

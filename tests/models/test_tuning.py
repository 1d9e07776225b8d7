"""The table of preferences: chosen in one place, equal in its results, and nothing without it."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prumerge_jax import prumerge, reductions
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.engine.encoding import PlacedModel
from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.request import ImageInput, Request, SamplingParams
from prumerge_jax.engine.shapes import EngineShapes
from prumerge_jax.models import attention, tuning
from prumerge_jax.models.config import LlavaConfig, TextConfig, VisionConfig
from prumerge_jax.models.llama import Llama
from prumerge_jax.models.llava import LlavaModel, abstract_model, encode_images, inference_layout
from prumerge_jax.models.tuning import BY_PLATFORM, Tuning

CONFIG = LlavaConfig(
    vision=VisionConfig(
        image_size=56, patch_size=14, width=32, mlp_width=64, num_layers=3, num_heads=2
    ),
    text=TextConfig(
        vocab_size=300, width=48, mlp_width=96, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=12, max_positions=128,
    ),
)  # fmt: skip
SHAPES = EngineShapes(
    batch_size=2, window_size=4, row_length=64, longest_prompt=64, prefill_rows=2, slots=2,
    cache_length=48, decode_steps_per_call=4,
)  # fmt: skip


def random_weights(config: LlavaConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """A model whose answers differ from prompt to prompt."""
    graphdef, abstract = abstract_model(config)
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32), abstract
    )


def requests(continuation: np.ndarray | None = None) -> list[Request]:
    rng = np.random.default_rng(1)
    made = []
    for key in range(4):
        text = rng.integers(3, 300, size=6 + key).astype(np.int32)
        text[2] = IMAGE_TOKEN
        image = ImageInput(rng.integers(0, 256, size=(1, 56, 56, 3)).astype(np.uint8))
        target = text[:0] if continuation is None else continuation
        made.append(Request(key, text, (image,), target, SamplingParams(max_new_tokens=6)))
    return made


def results(chosen: Tuning) -> tuple[dict[int, float], dict[int, tuple[int, ...]]]:
    """Scores and answers of a tiny model."""
    with tuning.use(chosen):
        model = inference_layout(*random_weights(CONFIG))
        reduction = reductions.parse("prumerge")
        engine = Engine(PlacedModel(*model, CONFIG, jnp.dtype(jnp.float32)), reduction, SHAPES)
        continuation = np.arange(3, 7, dtype=np.int32)
        scored = list(engine.score(requests(continuation)))
        answered = list(engine.generate(requests()))
    return {a.key: a.log_likelihood for a in scored}, {a.key: a.token_ids for a in answered}


@pytest.fixture(scope="module")
def plain_results() -> tuple[dict[int, float], dict[int, tuple[int, ...]]]:
    return results(Tuning.plain())


@pytest.mark.slow
@pytest.mark.parametrize("platform", BY_PLATFORM)
def test_every_platforms_forms_compute_the_same(platform: str, plain_results) -> None:
    """All but the kernels, which take no heads of this width: those are in test_attention."""
    scores, answers = results(BY_PLATFORM[platform])
    expected_scores, expected_answers = plain_results
    assert scores == pytest.approx(expected_scores, abs=2e-4)
    assert answers == expected_answers
    assert len(set(map(tuple, answers.values()))) > 1, "all answers are the same: it shows nothing"


def test_the_platform_chooses_and_a_context_overrides() -> None:
    assert tuning.current() == BY_PLATFORM["cpu"] != Tuning.plain()
    with tuning.use(Tuning.plain()):
        assert tuning.current() == Tuning()
        with tuning.use(BY_PLATFORM["tpu"]):
            assert tuning.current().attention == "splash"
        assert tuning.current() == Tuning.plain()
    assert tuning.current() == BY_PLATFORM["cpu"]
    with pytest.raises(KeyError), tuning.use(Tuning.plain()):
        raise KeyError
    assert tuning.current() == BY_PLATFORM["cpu"]


@pytest.mark.parametrize(
    ("kind", "devices", "means"),
    [
        ("TPU v6 lite", 8, "sparse_core"),
        ("TPU v6 lite", 1, None),
        ("TPU v5", 64, "sparse_core"),
        ("TPU v5", 8, "fusion"),
        ("TPU v5", 256, "fusion"),
        ("TPU v5", 1, None),
        ("TPU v5 lite", 8, None),
        ("cpu", 8, None),
    ],
)
def test_only_tpus_that_wait_for_each_other_are_told_to_overlap(
    kind: str, devices: int, means: str | None
) -> None:
    on = np.array([SimpleNamespace(device_kind=kind)] * devices)
    mesh = SimpleNamespace(devices=on, size=devices)
    options = tuning.micro_batch_options(mesh, "sharded")  # type: ignore[arg-type]
    assert {name for name in ("sparse_core", "fusion") if name in str(options)} == {means} - {None}
    replicated = tuning.micro_batch_options(mesh, "replicated") or {}  # type: ignore[arg-type]
    assert ("xla_tpu_scoped_vmem_limit_kib" in replicated) == (kind in ("TPU v5", "TPU v6 lite"))


def test_what_was_compiled_with_one_tuning_does_not_run_with_another() -> None:
    seen = []

    @jax.jit
    def traced(x: jax.Array) -> jax.Array:
        seen.append(tuning.current().rotary)
        return x

    for rotary in ("roll", "matmul", "roll", "matmul"):
        with tuning.use(dataclasses.replace(Tuning.plain(), rotary=rotary)):
            traced(jnp.ones(3))
    assert seen == ["roll", "matmul"]


def test_only_tuned_layers_leave_their_stack() -> None:
    for layers in ("stack", "list"):
        with tuning.use(Tuning(layers=layers)):
            model = nnx.merge(*inference_layout(*random_weights(CONFIG)))
        assert isinstance(model.decoder.layers, nnx.List) == (layers == "list")


@pytest.mark.parametrize(("tower", "decoder"), [(60, 64), (64, 60)])
def test_tower_and_decoder_choose_by_their_own_heads(
    tower: int, decoder: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads of 60 are ones that the TPU's kernel does not take."""
    used: dict[int, set[str]] = {}
    for name in ("xla", "splash"):

        def spy(q, k, v, *ids, name=name, **_):
            used.setdefault(q.shape[-1], set()).add(name)
            return q

        monkeypatch.setitem(attention._BACKENDS, name, spy)
    config = dataclasses.replace(
        CONFIG,
        vision=dataclasses.replace(CONFIG.vision, width=2 * tower),
        text=dataclasses.replace(CONFIG.text, head_dim=decoder),
    )

    def run(state: nnx.State) -> jax.Array:
        model = nnx.merge(graphdef, state)
        pixels = jnp.zeros((1, 56, 56, 3), jnp.uint8)
        visual = encode_images(model.vision, pixels, prumerge.preset("full"))
        ids, index = jnp.zeros((1, 16), jnp.int32), jnp.arange(16)[None]
        x = model.embed_rows(ids, visual.tokens, index)
        hidden = model.decoder.hidden_before_last_mlp(x, index, jnp.ones_like(ids))
        return model.decoder.last_mlp_at(hidden, index[0])

    graphdef, abstract = abstract_model(config)
    with tuning.use(Tuning(attention="splash")):
        jax.eval_shape(run, abstract)
    assert used == {64: {"splash"}, 60: {"xla"}}


@pytest.mark.parametrize("layers", ["stack", "list"])
def test_a_decoder_of_one_layer_is_read_and_finished(layers: str) -> None:
    """Nothing but the last layer's attention comes before its MLP."""
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, num_layers=1))
    with tuning.use(Tuning(layers=layers)):
        model: LlavaModel = nnx.merge(*inference_layout(*random_weights(config)))
    ids, some = jnp.arange(10)[None], jnp.array([9, 4])

    @nnx.jit
    def both(decoder: Llama) -> tuple[jax.Array, jax.Array]:
        x, ones = decoder.embed(ids, jnp.float32), jnp.ones_like(ids)
        hidden = decoder.hidden_before_last_mlp(x, ids, ones)
        return decoder(x, ids, ones)[0][some], decoder.last_mlp_at(hidden, some)

    expected, got = both(model.decoder)
    np.testing.assert_allclose(got, expected, atol=1e-5)

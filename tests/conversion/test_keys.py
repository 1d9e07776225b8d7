"""The key table names exactly the model's weights and reads every naming in use."""

import dataclasses
import re

import numpy as np
import pytest
from flax import nnx

from prumerge_jax.conversion import keys
from prumerge_jax.conversion.keys import Dialect, canonical_key, dialect_key
from prumerge_jax.conversion.tensor_files import ConversionError, TensorInfo
from prumerge_jax.models.config import published
from prumerge_jax.models.llava import abstract_model
from tests.conversion.checkpoints import TINY, original, random_tensors, split, stacked

ALL = keys.expected_shapes(keys.weights(TINY)) | keys.unused_tower_tensors(TINY)


@pytest.mark.parametrize("projector", ["identity", "linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_the_table_is_the_models_weights(projector: str) -> None:
    config = dataclasses.replace(TINY, projector=projector)
    if projector == "identity":
        vision = dataclasses.replace(config.vision, width=config.text.width)
        config = dataclasses.replace(config, vision=vision)
    _, abstract = abstract_model(config)
    model = {".".join(map(str, path)): v.shape for path, v in nnx.to_flat_state(abstract)}
    assert {weight.path: weight.shape for weight in keys.weights(config)} == model


def test_published_counts() -> None:
    for name, tensors, parameters in [
        ("llava-1.5-7b", 686, 7_063_427_072),
        ("llava-1.5-13b", 758, 13_351_494_656),
    ]:
        config = published(name)
        shapes = keys.expected_shapes(keys.weights(config)) | keys.unused_tower_tensors(config)
        assert len(shapes) == tensors
        assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters


def namings(canonical: str) -> dict[str, str]:
    """How the generations of transformers spell one canonical key."""
    a = re.sub(r"^language_model\.", "language_model.model.", canonical)
    a = re.sub(r"^lm_head", "language_model.lm_head", a)
    d = a
    a = a.replace("vision_tower.", "vision_tower.vision_model.")
    b = canonical if canonical.startswith("lm_head") else f"model.{canonical}"
    c = b
    b = b.replace("vision_tower.", "vision_tower.vision_model.")
    return {"A": a, "B": b, "C": c, "D": d}


def test_all_namings_become_one() -> None:
    for canonical in ALL:
        for key in namings(canonical).values():
            for wrapper in ("", "module.", "_orig_mod.", "module._orig_mod."):
                assert canonical_key(wrapper + key, Dialect.HF) == canonical
        assert canonical_key(canonical, Dialect.HF) == canonical


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
@pytest.mark.parametrize("dialect", list(Dialect))
def test_names_go_both_ways(dialect: Dialect, projector: str) -> None:
    config = original(projector)
    for canonical in keys.expected_shapes(keys.weights(config)):
        if dialect is not Dialect.CLIP or canonical.startswith("vision_tower."):
            key = dialect_key(canonical, dialect, config)
            assert canonical_key(key, dialect) == canonical


def test_original_names() -> None:
    for key, canonical in {
        "model.layers.3.mlp.up_proj.weight": "language_model.layers.3.mlp.up_proj.weight",
        "model.embed_tokens.weight": "language_model.embed_tokens.weight",
        "lm_head.weight": "lm_head.weight",
        "model.mm_projector.0.bias": "multi_modal_projector.linear_1.bias",
        "model.mm_projector.2.weight": "multi_modal_projector.linear_2.weight",
        "model.mm_projector.weight": "multi_modal_projector.linear_1.weight",
        "base_model.model.model.mm_projector.2.bias": "multi_modal_projector.linear_2.bias",
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias": (
            "vision_tower.pre_layrnorm.bias"
        ),
    }.items():
        assert canonical_key(key, Dialect.LLAVA) == canonical
    # There is no linear layer at an odd place.
    assert canonical_key("model.mm_projector.1.weight", Dialect.LLAVA) not in ALL
    assert canonical_key("vision_model.pre_layrnorm.bias", Dialect.CLIP) == (
        "vision_tower.pre_layrnorm.bias"
    )


def test_transforms_are_undone() -> None:
    tensors = random_tensors()
    for weight in keys.weights(TINY):
        ours = stacked(weight, tensors)
        assert ours.shape == weight.shape
        for key, back in split(weight, ours).items():
            assert back.tobytes() == tensors[key].tobytes()


def test_every_fault_is_listed() -> None:
    infos = {
        keys.dialect_key(key, Dialect.HF, TINY): TensorInfo(shape, np.dtype("float32"))
        for key, shape in ALL.items()
    }
    matched = keys.assign(infos, Dialect.HF, ALL, "dir")
    assert set(matched.key_of) == set(ALL)
    assert not matched.ignored
    del infos["language_model.model.norm.weight"]
    infos["lm_head.weight"] = infos["language_model.lm_head.weight"]
    infos["model.mystery.weight"] = TensorInfo((1,), np.dtype("float32"))
    up = "language_model.model.layers.1.mlp.up_proj.weight"
    infos[up] = TensorInfo(infos[up].shape[::-1], np.dtype("float32"))
    with pytest.raises(ConversionError) as caught:
        keys.assign(infos, Dialect.HF, ALL, "dir")
    message = str(caught.value)
    assert "dir: unknown tensors: model.mystery.weight" in message
    assert "stored twice: lm_head.weight and language_model.lm_head.weight" in message
    assert "missing tensors: language_model.norm.weight" in message
    assert f"{up} [24, 40] not [40, 24]" in message


def test_derived_tensors_are_left_out_with_a_reason() -> None:
    infos = {key: TensorInfo(shape, np.dtype("float32")) for key, shape in ALL.items()} | {
        "model.layers.0.self_attn.rotary_emb.inv_freq": TensorInfo((3,), np.dtype("float32")),
        "vision_tower.embeddings.position_ids": TensorInfo((1, 5), np.dtype("int64")),
    }
    ignored = keys.assign(infos, Dialect.HF, ALL, "dir").ignored
    assert len(ignored) == 2
    assert all("recomputed" in reason for reason in ignored.values())

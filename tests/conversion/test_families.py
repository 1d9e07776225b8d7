"""Checkpoints of every family: in, out again to the bit, compared with transformers, refused."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prumerge_jax.conversion import keys
from prumerge_jax.conversion.checkpoint_reader import OpenedModel, Sources, open_model
from prumerge_jax.conversion.convert import convert
from prumerge_jax.conversion.export import export_model
from prumerge_jax.conversion.keys import Dialect
from prumerge_jax.families import ConversionError
from prumerge_jax.models import config_json
from prumerge_jax.models.config import LlavaConfig

FOLDERS = ("next_vicuna", "next_mistral", "onevision_tied", "video_llava")
NEXT, ONE, VIDEO = FOLDERS[1:]


def opened(folder: pathlib.Path) -> OpenedModel:
    return open_model(Sources(folder))


@pytest.fixture(scope="module", params=FOLDERS)
def converted(
    golden: pathlib.Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[OpenedModel, pathlib.Path]:
    model = opened(golden / "models" / request.param)
    output = tmp_path_factory.mktemp("converted") / request.param
    convert(model, output)
    return model, output


def test_configurations(golden: pathlib.Path) -> None:
    configs = {name: opened(golden / "models" / name).config for name in FOLDERS}
    next_vicuna, mistral, onevision, video = configs.values()
    assert next_vicuna.family == "llava_next"
    assert next_vicuna.image_newline
    pinpoints = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))
    assert next_vicuna.image_grid_pinpoints == pinpoints
    assert next_vicuna.text.rope_theta == 1e4
    assert next_vicuna.chat_template == "vicuna_v1"
    assert (mistral.text.num_kv_heads, mistral.text.rope_theta) == (2, 1e6)
    assert (mistral.text.model_type, mistral.chat_template) == ("mistral", "mistral_instruct")
    assert onevision.text.tied_head
    assert onevision.text.qkv_bias
    assert onevision.vision.grid == 3
    assert (onevision.anyres_max, len(onevision.image_grid_pinpoints)) == (9, 36)
    assert (onevision.video_token_id, onevision.vision.pixel_mean) == (251, (0.5, 0.5, 0.5))
    assert video.video_tower
    assert not video.image_newline
    assert (video.vision.activation, video.chat_template) == ("gelu", "llava_v1")


def test_directories_hold_the_configuration(converted: tuple[OpenedModel, pathlib.Path]) -> None:
    model, output = converted
    assert config_json.read_config(output) == model.config


def test_exports_have_the_same_bits(
    converted: tuple[OpenedModel, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """Every tensor, under the names of the published files, and a configuration that says so."""
    model, output = converted
    export_model(output, tmp_path / "hf", Dialect.HF)
    written = load_file(tmp_path / "hf/model.safetensors")
    assert set(map(lambda key: key.split(".")[0], written)) <= {
        "language_model", "multi_modal_projector", "image_newline",
        "vision_tower", "image_tower", "video_tower",
    }  # fmt: skip
    read = {keys.canonical_key(key, Dialect.HF): array for key, array in written.items()}
    assert set(read) == set(model.tensors)
    for key, tensor in model.tensors.items():
        np.testing.assert_array_equal(read[key], tensor.read(), key)
        assert read[key].dtype == np.float16
    again = opened(tmp_path / "hf")
    assert again.config == model.config


@pytest.mark.torch
def test_exports_load_in_transformers(
    converted: tuple[OpenedModel, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    transformers = pytest.importorskip("transformers")
    model, output = converted
    export_model(output, tmp_path / "hf", Dialect.HF)
    kind = getattr(
        transformers, json.loads((tmp_path / "hf/config.json").read_text())["architectures"][0]
    )
    _, info = kind.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.torch
@pytest.mark.parametrize(
    "converted",
    [name if name == ONE else pytest.param(name, marks=pytest.mark.slow) for name in FOLDERS],
    indirect=True,
)
def test_verify(converted: tuple[OpenedModel, pathlib.Path]) -> None:
    """Both towers, projector, newline and decoder compute what transformers computes."""
    pytest.importorskip("torch")
    from prumerge_jax.conversion.verify import check_comparable, compare_with_torch

    model, output = converted
    check_comparable(model.config)
    comparison = compare_with_torch(model, output)
    assert comparison.max_difference < 2e-4
    assert comparison.top1_agreement == 1


@pytest.mark.parametrize("naming", ["B", "C"])
def test_namings_of_transformers_5(
    golden: pathlib.Path, tmp_path: pathlib.Path, naming: str
) -> None:
    """`model.` in front, with and without `vision_model.`."""
    for name in FOLDERS:
        folder = shutil.copytree(golden / "models" / name, tmp_path / name)
        (folder / "model.safetensors").chmod(0o644)
        tensors = {}
        for key, array in load_file(folder / "model.safetensors").items():
            key = keys.canonical_key(key, Dialect.HF)
            for tower in ("vision", "image", "video") if naming == "B" else ():
                key = key.replace(f"{tower}_tower.", f"{tower}_tower.vision_model.")
            tensors[key if key == "lm_head.weight" else f"model.{key}"] = array
        save_file(tensors, folder / "model.safetensors")
        assert set(opened(folder).tensors) == set(opened(golden / "models" / name).tensors)


# ---- refusals ----

Change = Callable[[dict[str, Any], dict[str, np.ndarray], dict[str, Any]], None]


def field(section: str, name: str, value: object) -> Change:
    def change(config: dict[str, Any], tensors: object, pixels: object) -> None:
        target = config[section] if section else config
        if value is ...:
            del target[name]
        else:
            target[name] = value

    return change


def tensor(name: str, shape: tuple[int, ...] | None) -> Change:
    def change(config: object, tensors: dict[str, np.ndarray], pixels: object) -> None:
        tensors.pop(name, None)
        if shape is not None:
            tensors[name] = np.zeros(shape, np.float16)

    return change


def pixel(name: str, value: object) -> Change:
    def change(config: object, tensors: object, pixels: dict[str, Any]) -> None:
        pixels[name] = value

    return change


REFUSALS: list[tuple[str, Change, str | None]] = [
    # Grids
    (
        NEXT,
        field("", "image_grid_pinpoints", []),
        r"pinpoints is \[\]; expected 1 to 64 pairs",
    ),
    (NEXT, field("", "image_grid_pinpoints", [[56, 100]]), "multiples of the tower's 56"),
    (NEXT, field("", "image_grid_pinpoints", [[56, 112, 1]]), "expected 1 to 64 pairs"),
    (NEXT, field("", "image_grid_pinpoints", [56, 112]), "expected 1 to 64 pairs"),
    (NEXT, field("", "image_grid_pinpoints", [[56, 112]] * 65), "expected 1 to 64 pairs"),
    (NEXT, field("", "image_grid_pinpoints", "[[56,112]]"), "expected list"),
    (NEXT, pixel("image_grid_pinpoints", [[56, 112]]), "preprocessor.*image_grid_pinpoints is"),
    (ONE, field("", "vision_aspect_ratio", "anyres"), "only 'anyres_max_N' is supported"),
    (ONE, field("", "vision_aspect_ratio", "pad"), "only 'anyres_max_N' is supported"),
    (ONE, pixel("vision_aspect_ratio", "anyres_max_4"), "only 'anyres_max_9' or None is supported"),
    # Features
    (NEXT, field("", "vision_feature_layer", [-2, -1]), "vision_feature_layer is .*only -2"),
    (NEXT, field("", "vision_feature_select_strategy", "full"), "only 'default'"),
    (ONE, field("", "vision_feature_layer", -2), "only -1 is supported"),
    (ONE, field("", "vision_feature_select_strategy", "default"), "only 'full'"),
    (ONE, field("vision_config", "vision_use_head", True), "vision_use_head is True; only False"),
    (ONE, field("vision_config", "vision_use_head", ...), "vision_use_head is True; only False"),
    (ONE, field("vision_config", "image_size", [48, 48]), "image_size is .*expected int"),
    (ONE, field("vision_config", "hidden_act", "gelu"), "only 'gelu_pytorch_tanh'"),
    (
        ONE,
        field("vision_config", "model_type", "siglip2_vision_model"),
        "only 'siglip_vision_model'",
    ),
    (NEXT, field("", "use_image_newline_parameter", False), "only True is supported"),
    (NEXT, field("vision_config", "model_type", "siglip_vision_model"), "only 'clip_vision_model'"),
    (VIDEO, field("", "add_time_attn", True), "add_time_attn is True; only False"),
    (VIDEO, field("vision_config", "add_time_attn", True), "add_time_attn is True; only False"),
    # Decoders
    (NEXT, field("", "tie_word_embeddings", True), "tie_word_embeddings is True; only False"),
    (
        NEXT,
        field("text_config", "tie_word_embeddings", True),
        "text_config: tie_word_embedd",
    ),
    (NEXT, field("text_config", "model_type", "qwen2"), "only 'llama' or 'mistral' is supported"),
    (NEXT, field("text_config", "sliding_window", 512), "sliding_window is 512.*at least max_pos"),
    (NEXT, field("text_config", "sliding_window", ...), None),
    (
        NEXT,
        field("text_config", "rope_parameters", {"rope_type": "llama3"}),
        "only default is",
    ),
    (ONE, field("text_config", "use_sliding_window", True), "use_sliding_window is True"),
    (
        ONE,
        field("text_config", "layer_types", ["sliding_attention"]),
        "layer_types holds 'slid",
    ),
    (ONE, field("text_config", "model_type", "llama"), "only 'qwen2' is supported"),
    (ONE, field("", "video_token_index", 256), "video_token_id 256 is outside the vocabulary"),
    (ONE, field("text_config", "head_dim", 13), "head_dim is 13; rotary positions need an even"),
    # Tensors
    (NEXT, tensor("image_newline", None), "missing tensors: image_newline"),
    (NEXT, tensor("image_newline", (47,)), r"image_newline \[47\] not \[48\]"),
    (VIDEO, tensor("image_newline", (48,)), "unknown tensors: image_newline"),
    (NEXT, tensor("language_model.lm_head.weight", None), "missing tensors: lm_head.weight"),
    (
        ONE,
        tensor("language_model.lm_head.weight", (256, 48)),
        "weight is not the embedding",
    ),
    (
        ONE,
        tensor("language_model.model.layers.0.self_attn.q_proj.bias", None),
        "missing tensors: language_model.layers.0.self_attn.q_proj.bias",
    ),
    (
        NEXT,
        tensor("language_model.model.layers.0.self_attn.q_proj.bias", (48,)),
        "unknown tensors: language_model.model.layers.0.self_attn.q_proj.bias",
    ),
    (
        ONE,
        tensor("vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias", (72,)),
        "unknown tensors: vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias",
    ),
    (
        ONE,
        tensor("vision_tower.vision_model.head.probe", (1, 1, 32)),
        "unknown tensors: vision_tower.vision_model.head.probe",
    ),
    (
        VIDEO,
        tensor("video_tower.vision_model.encoder.layers.0.temporal_embedding", (1, 8, 32)),
        "unknown tensors: .*temporal_embedding",
    ),
    # Pixels
    (NEXT, pixel("do_pad", False), "do_pad is False; only True is supported"),
    (NEXT, pixel("size", None), "size is missing"),
    (ONE, pixel("image_mean", None), "image_mean is missing"),
    (ONE, pixel("do_center_crop", True), "do_center_crop is True; only False"),
    (ONE, pixel("size", {"height": 48, "width": 56}), "size is "),
    (VIDEO, pixel("crop_size", {"height": 48, "width": 48}), "crop_size is "),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSALS)
def test_what_is_not_supported_is_refused_by_name(
    golden: pathlib.Path, tmp_path: pathlib.Path, name: str, change: Change, message: str | None
) -> None:
    source, folder = golden / "models" / name, tmp_path / name
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    pixels = json.loads((source / "preprocessor_config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    change(config, tensors, pixels)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    save_file(tensors, folder / "model.safetensors")
    if message is None:  # 4096 positions are seen, more than there are
        opened(folder)
        return
    with pytest.raises(ConversionError, match=message) as error:
        opened(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_a_head_equal_to_the_embedding_is_left_out(
    golden: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = shutil.copytree(golden / "models" / ONE, tmp_path / ONE)
    (folder / "model.safetensors").chmod(0o644)
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors")
    model = opened(folder)
    assert "lm_head.weight" not in model.tensors
    assert model.ignored == {"language_model.lm_head.weight": "tied: the embedding, bit for bit"}


@pytest.mark.parametrize(
    ("eos", "expected"), [([2, 5], (2, 5)), (7, (7,)), (None, "eos_token_id gives 0 stop ids")]
)
def test_stop_ids_are_those_of_the_generation_config(
    golden: pathlib.Path, tmp_path: pathlib.Path, eos: object, expected: object
) -> None:
    folder = shutil.copytree(golden / "models" / ONE, tmp_path / ONE)
    path = folder / "generation_config.json"
    path.chmod(0o644)
    path.write_text(json.dumps({"eos_token_id": eos}))
    if isinstance(expected, str):
        with pytest.raises(ConversionError, match=expected):
            opened(folder)
    else:
        assert opened(folder).config.eos_token_ids == expected


def test_a_bpe_tokenizer_must_fit(golden: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = shutil.copytree(golden / "models" / ONE, tmp_path / ONE)
    shutil.copy(golden / "models/tokenizers/qwen2/tokenizer.json", folder)
    with pytest.raises(ConversionError, match=r"tokenizer.json has ids up to 604, .* 256 rows"):
        opened(folder)
    (folder / "tokenizer.json").chmod(0o644)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConversionError, match=r"tokenizer.json is not a tokenizer .*; put the"):
        opened(folder)
    (folder / "tokenizer.json").unlink()
    assert not opened(folder).has_tokenizer
    assert opened(folder).tokenizer_name == "tokenizer.json"


def original_fields(config: LlavaConfig, **own: object) -> dict[str, object]:
    """`config.json` of a LLaVA-NeXT as its own code writes it."""
    text = config.text
    return {
        "architectures": ["LlavaMistralForCausalLM"],
        "model_type": "llava_mistral",
        "hidden_size": text.width,
        "intermediate_size": text.mlp_width,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "rope_theta": text.rope_theta,
        "rms_norm_eps": text.rms_norm_eps,
        "max_position_embeddings": text.max_positions,
        "sliding_window": None,
        "vocab_size": text.vocab_size,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "unfreeze_mm_vision_tower": True,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.vision.width,
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[112, 56], [56, 112]],
        **own,
    }


def write_original(folder: pathlib.Path, model: OpenedModel, fields: dict[str, object]) -> None:
    from prumerge_jax.conversion.hf_files import clip_config

    (folder / "vision_tower").mkdir(parents=True)
    tensors = {
        keys.dialect_key(key, Dialect.LLAVA, model.config): tensor.read()
        for key, tensor in model.tensors.items()
    }
    tensors["model.image_newline"] = tensors.pop("image_newline")
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "vision_tower/config.json").write_text(json.dumps(clip_config(model.config.vision)))


def test_original_llava_next(golden: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The tower is in the file; resolutions are (width, height), walked in their order."""
    model = opened(golden / "models" / NEXT)
    folder = tmp_path / "original"
    write_original(folder, model, original_fields(model.config))
    read = open_model(Sources(folder, vision_tower=folder / "vision_tower"))
    assert read.config.family == "llava_next"
    assert read.config.image_grid_pinpoints == ((56, 112), (112, 56))
    assert read.config.anyres_source == "original"
    assert read.config.chat_template == "mistral_instruct"
    assert read.config.text == model.config.text
    for key, tensor in model.tensors.items():
        np.testing.assert_array_equal(read.tensors[key].read(), tensor.read(), key)
    convert(read, tmp_path / "ours")
    assert config_json.read_config(tmp_path / "ours") == read.config
    export_model(tmp_path / "ours", tmp_path / "hf", Dialect.HF)
    assert opened(tmp_path / "hf").config.image_token_id == model.config.text.vocab_size


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type is 'spatial'"),
        ({"mm_patch_merge_type": "maxpool2x2_unpad"}, "only 'spatial_unpad' is supported"),
        ({"mm_newline_position": "grid"}, "mm_newline_position is 'grid'"),
        ({"add_faster_video": True}, "add_faster_video is True"),
        ({"image_aspect_ratio": "anyres_max_9"}, "with a mistral decoder; only 'anyres'"),
        ({"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"}, "with a mistral decoder"),
        ({"image_grid_pinpoints": None}, "image_grid_pinpoints is None, expected list"),
        ({"image_grid_pinpoints": "(1x1),(6x6)"}, "for a tower of 56"),
        ({"image_grid_pinpoints": "import os"}, "expected a list of pairs"),
        ({"image_grid_pinpoints": "[[56, 57]]"}, "multiples of the tower's 56"),
    ],
)
def test_original_directories_that_are_refused(
    golden: pathlib.Path, tmp_path: pathlib.Path, own: dict[str, object], message: str
) -> None:
    model = opened(golden / "models" / NEXT)
    folder = tmp_path / "original"
    write_original(folder, model, original_fields(model.config, **own))
    with pytest.raises(ConversionError, match=message) as error:
        open_model(Sources(folder, vision_tower=folder / "vision_tower"))
    assert "\n" not in str(error.value)


def original_video_llava(model: OpenedModel, folder: pathlib.Path, **own: object) -> Sources:
    """The layout of LanguageBind/Video-LLaVA-7B: both towers are in the file, CLIP's names without
    `vision_model.`; their sizes are in the configuration of LanguageBind_Image."""
    from prumerge_jax.conversion.hf_files import clip_config

    tower = folder / "LanguageBind_Image"
    tower.mkdir(parents=True)
    sizes = {"model_type": "LanguageBindImage", "vision_config": clip_config(model.config.vision)}
    sizes["vision_config"] |= {"add_time_attn": False, "num_frames": 1, "lora_r": 16}
    (tower / "config.json").write_text(json.dumps(sizes))
    tensors = {}
    for key, tensor in model.tensors.items():
        name = keys.dialect_key(key, Dialect.LLAVA, model.config)
        if key.startswith(("image_tower.", "video_tower.")):
            name = f"model.{key.partition('.')[0]}.{key}"
        tensors[name] = tensor.read()
    save_file(tensors, folder / "model.safetensors")
    fields = original_fields(model.config, architectures=["LlavaLlamaForCausalLM"])
    for name in ("mm_vision_tower", "unfreeze_mm_vision_tower", "image_grid_pinpoints"):
        del fields[name]
    fields |= {
        "model_type": "llava",
        "mm_image_tower": "LanguageBind/LanguageBind_Image",
        "mm_video_tower": "LanguageBind/LanguageBind_Video_merge",
        "image_aspect_ratio": "pad",
        "mm_patch_merge_type": "flat",
    }
    (folder / "config.json").write_text(json.dumps(fields | own))
    return Sources(folder, vision_tower=tower)


@pytest.mark.slow
def test_original_video_llava(golden: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = opened(golden / "models" / VIDEO)
    sources = original_video_llava(model, tmp_path / "original")
    read = open_model(sources)
    ids = {"image_token_id": None, "video_token_id": None, "pad_token_id": None}
    assert read.config == dataclasses.replace(
        model.config, eos_token_ids=read.config.eos_token_ids, **ids
    )
    assert read.tensors.keys() == model.tensors.keys()
    for key, tensor in model.tensors.items():
        np.testing.assert_array_equal(read.tensors[key].read(), tensor.read(), key)
    convert(read, tmp_path / "ours")
    assert config_json.read_config(tmp_path / "ours") == read.config
    with pytest.raises(ConversionError, match="original Video-LLaVA without ids for images and"):
        export_model(tmp_path / "ours", tmp_path / "hf", Dialect.HF)
    with pytest.raises(ConversionError, match=r"LanguageBind_Image', of unknown sizes: give a dir"):
        open_model(Sources(sources.folder))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"mm_video_tower": None}, "mm_image_tower says Video-LLaVA, but there is no mm_video"),
        ({"image_aspect_ratio": "anyres"}, "mm_patch_merge_type is 'flat'"),
        ({"mm_use_im_patch_token": True}, "mm_use_im_patch_token is True"),
    ],
)
def test_an_original_video_llava_that_is_refused(
    golden: pathlib.Path, tmp_path: pathlib.Path, own: dict[str, object], message: str
) -> None:
    sources = original_video_llava(opened(golden / "models" / VIDEO), tmp_path / "x", **own)
    with pytest.raises(ConversionError, match=message):
        open_model(sources)

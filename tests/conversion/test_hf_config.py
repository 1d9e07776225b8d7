"""Configs of every generation become the same sizes; what is unsupported is refused by name."""

import dataclasses
import json
import pathlib

import pytest

from prumerge_jax.conversion.hf_config import parse_llava, parse_tower
from prumerge_jax.conversion.hf_config import with_processor as with_processor_of
from prumerge_jax.conversion.hf_files import hf_config
from prumerge_jax.families import ConversionError, published
from prumerge_jax.families.decoders import parse_text
from prumerge_jax.families.fields import Section
from prumerge_jax.families.llava_1_5 import parse
from prumerge_jax.models.config import LlavaConfig, TextConfig, VisionConfig
from tests.conversion.checkpoints import TINY


def parse_hf(values: object, where: str) -> LlavaConfig:
    return parse(Section(values, where))


def with_processor(folder: pathlib.Path, vision: VisionConfig) -> VisionConfig:
    return with_processor_of(folder, LlavaConfig(vision=vision)).vision


# What the published llava-1.5-7b-hf and -13b-hf directories say: only what is not a default.
SPARSE_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "ignore_index": -100,
    "image_token_index": 32000,
    "model_type": "llava",
    "pad_token_id": 32001,
    "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "torch_dtype": "float16",
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}
TEXT_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}


def test_sparse_configs_are_the_published_sizes() -> None:
    assert parse_hf(SPARSE_7B, "x") == published("llava-1.5-7b")
    without_vision = {k: v for k, v in SPARSE_7B.items() if k != "vision_config"}
    assert parse_hf(without_vision, "x") == published("llava-1.5-7b")
    larger = SPARSE_7B | {"text_config": SPARSE_7B["text_config"] | TEXT_13B}  # type: ignore
    assert parse_hf(larger, "x") == published("llava-1.5-13b")


def test_spellings_of_transformers_5() -> None:
    text = {k: v for k, v in SPARSE_7B["text_config"].items() if k != "torch_dtype"}  # type: ignore
    text |= {
        "dtype": "bfloat16",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "head_dim": 128,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "pad_token_id": None,
    }
    newer = {k: v for k, v in SPARSE_7B.items() if k not in ("torch_dtype", "image_token_index")}
    newer |= {"text_config": text, "image_token_id": 32000, "dtype": "bfloat16"}
    assert parse_hf(newer, "x") == published("llava-1.5-7b")
    text["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "default"}
    assert parse_hf(newer, "x").text.rope_theta == 5e5


def test_absent_fields_have_transformers_defaults() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlavaConfig(text_config=transformers.LlamaConfig(vocab_size=32064))
    parsed = parse_hf(json.loads(config.to_json_string()), "x")
    assert parsed == parse_hf({"text_config": {"vocab_size": 32064}}, "x")
    clip = transformers.CLIPVisionConfig()
    assert parse_tower(json.loads(clip.to_json_string()), "x") == parse_tower({}, "x")
    assert parse_tower({"vision_config": {}}, "x") == parse_tower({}, "x")


def test_our_own_words_are_read_back() -> None:
    for config in (TINY, published("llava-1.5-13b")):
        assert parse_hf(json.loads(json.dumps(hf_config(config))), "x") == config


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("", "vision_feature_layer", -1),
        ("", "vision_feature_layer", [-2, -5]),
        ("", "vision_feature_select_strategy", "full"),
        ("", "projector_hidden_act", "relu"),
        ("", "multimodal_projector_bias", False),
        ("", "tie_word_embeddings", True),
        ("", "quantization_config", {"load_in_4bit": True}),
        ("", "image_token_index", 40000),
        ("", "image_token_index", "32000"),
        ("", "image_token_id", 31999),
        ("text_config", "rope_scaling", {"type": "yarn", "factor": 2.0}),
        ("text_config", "rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
        ("text_config", "rope_parameters", {"rope_type": "linear"}),
        ("text_config", "attention_bias", True),
        ("text_config", "mlp_bias", True),
        ("text_config", "tie_word_embeddings", True),
        ("text_config", "hidden_act", "gelu"),
        ("text_config", "model_type", "mistral"),
        ("text_config", "sliding_window", 4096),
        ("text_config", "partial_rotary_factor", 0.5),
        ("text_config", "num_attention_heads", 0),
        ("text_config", "num_attention_heads", 33),
        ("text_config", "num_key_value_heads", 5),
        ("text_config", "num_hidden_layers", 10**9),
        ("text_config", "vocab_size", -1),
        ("text_config", "hidden_size", True),
        ("text_config", "rms_norm_eps", "1e-5"),
        ("vision_config", "hidden_act", "gelu_new"),
        ("vision_config", "model_type", "siglip_vision_model"),
        ("vision_config", "num_channels", 4),
        ("vision_config", "patch_size", 0),
        ("vision_config", "patch_size", 400),
        ("vision_config", "image_size", 2**70),
    ],
)
def test_unsupported_values_are_refused_by_name(section: str, field: str, value: object) -> None:
    config = json.loads(json.dumps(SPARSE_7B))
    (config[section] if section else config)[field] = value
    name = {"num_attention_heads": "num_.*heads|attention_heads", "hidden_size": "hidden_size"}
    words = {
        "num_key_value_heads": "num_kv_heads",
        "num_hidden_layers": "num_layers",
        "image_token_id": "disagree",
        "rope_parameters": "rope",
        "image_token_index": "image_token",
    } | name
    with pytest.raises(ConversionError, match=words.get(field, field)) as caught:
        parse_hf(config, "config.json")
    assert "\n" not in str(caught.value)


def test_nothing_but_listed_fields_matters() -> None:
    noise = {
        "auto_map": {"AutoModel": "evil.Model"},
        "_attn_implementation_internal": "someone/kernel",
        "trust_remote_code": True,
        "transformers_version": "9.9",
    }
    noisy = SPARSE_7B | noise | {"text_config": SPARSE_7B["text_config"] | noise}  # type: ignore
    assert parse_hf(noisy, "x") == published("llava-1.5-7b")


LLAVA = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "mm_hidden_size": 1024,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
    "vocab_size": 32000,
    "pad_token_id": 0,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
}


def test_original_configs() -> None:
    expected = dataclasses.replace(
        published("llava-1.5-7b"), text=TextConfig(vocab_size=32000), image_token_id=None,
        pad_token_id=None,
    )  # fmt: skip
    assert parse_llava(LLAVA, "x", VisionConfig()) == expected
    for kind in ("linear", "mlp3x_gelu", "identity"):
        parsed = parse_llava(LLAVA | {"mm_projector_type": kind}, "x", VisionConfig())
        assert parsed.projector == kind


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mm_use_im_patch_token", True),
        ("mm_use_im_patch_token", ...),
        ("mm_use_im_start_end", True),
        ("mm_vision_select_layer", -1),
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_projector_type", "qformer"),
        ("mm_hidden_size", 1152),
        ("image_aspect_ratio", "highres"),
        ("mm_patch_merge_type", "spatial"),
        ("rope_scaling", {"type": "linear"}),
    ],
)
def test_original_configs_that_are_refused(field: str, value: object) -> None:
    config = {k: v for k, v in (LLAVA | {field: value}).items() if v is not ...}
    with pytest.raises(ConversionError, match=field):
        parse_llava(config, "config.json", VisionConfig())


def write(folder: pathlib.Path, name: str, values: object) -> None:
    (folder / name).write_text(json.dumps(values))


def test_processor_files(tmp_path: pathlib.Path) -> None:
    vision = VisionConfig()
    assert with_processor(tmp_path, vision) == vision
    legacy = {"size": 336, "crop_size": 336, "resample": 3}
    write(tmp_path, "preprocessor_config.json", legacy)
    assert with_processor(tmp_path, vision) == vision
    write(
        tmp_path,
        "preprocessor_config.json",
        {
            "size": {"shortest_edge": 336},
            "crop_size": {"height": 336, "width": 336},
            "image_mean": [0.5, 0.25, 0],
            "rescale_factor": 0.00392156862745098,
        },
    )
    assert with_processor(tmp_path, vision).pixel_mean == (0.5, 0.25, 0)
    write(tmp_path, "processor_config.json", {"patch_size": 14, "num_additional_image_tokens": 1})
    assert with_processor(tmp_path, vision).pixel_mean == (0.5, 0.25, 0)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("processor_config.json", {"num_additional_image_tokens": 0}),
        ("processor_config.json", {"vision_feature_select_strategy": "full"}),
        ("processor_config.json", {"patch_size": 16}),
        ("processor_config.json", {"image_processor": {"size": 224}}),
        ("preprocessor_config.json", {"size": {"shortest_edge": 224}}),
        ("preprocessor_config.json", {"crop_size": 224}),
        ("preprocessor_config.json", {"do_center_crop": False}),
        ("preprocessor_config.json", {"do_pad": True}),
        ("preprocessor_config.json", {"resample": 2}),
        ("preprocessor_config.json", {"rescale_factor": 1.0}),
        ("preprocessor_config.json", {"image_mean": [0.5]}),
    ],
)
def test_other_pixels_are_refused(
    tmp_path: pathlib.Path, name: str, values: dict[str, object]
) -> None:
    write(tmp_path, name, values)
    field = {"image_mean": "pixel_mean", "image_processor": "size"}
    (key,) = values
    with pytest.raises(ConversionError, match=field.get(key, key)):
        with_processor(tmp_path, VisionConfig())


def test_a_section_of_another_type_is_refused() -> None:
    for values in ([], "x", 3):
        with pytest.raises(ConversionError, match="expected an object"):
            parse_hf({"text_config": values}, "config.json")
    with pytest.raises(ConversionError, match="expected an object"):
        parse_text(Section(None, "config.json"))

"""Original LLaVA, Vicuna with a projector, LoRA directories: in, and out again, bit for bit."""

import dataclasses
import json
import pathlib
import shutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from prumerge_jax.conversion import keys
from prumerge_jax.conversion.checkpoint_reader import OpenedModel, Sources, open_model
from prumerge_jax.conversion.convert import convert
from prumerge_jax.conversion.detect import Kind
from prumerge_jax.conversion.export import export_adapter, export_model
from prumerge_jax.conversion.keys import Dialect
from prumerge_jax.conversion.safetensors_io import SafetensorsFile, open_safetensors
from prumerge_jax.conversion.tensor_files import ConversionError
from prumerge_jax.conversion.torch_bin import encode
from prumerge_jax.models import config_json
from prumerge_jax.models.layers import AdapterConfig
from prumerge_jax.store import model_directory as directory
from tests.conversion.checkpoints import (
    TINY,
    edit_config,
    original,
    random_adapter,
    random_tensors,
    stacked,
    write_clip,
    write_hf,
    write_llama,
    write_llava,
    write_peft,
)
from tests.conversion.test_convert import assert_same_bits, canonical_tensors
from tests.store.test_model_directory import to_version_1

VICUNA = "vicuna-7b-v1.5"


def read_all(opened: OpenedModel) -> dict[str, np.ndarray]:
    return {key: tensor.read() for key, tensor in opened.tensors.items()}


def projector_of(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: array for key, array in tensors.items() if key.startswith("multi_modal")}


@pytest.mark.parametrize("container", ["safetensors", "bin", "bin shards"])
@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear", "mlp3x_gelu"])
def test_original_with_external_tower(
    tmp_path: pathlib.Path, container: str, projector: str
) -> None:
    config = original(projector)
    tensors = random_tensors(config, "float16")
    write_llava(tmp_path / "in", tensors, config, container=container)
    write_clip(tmp_path / "clip", tensors)
    opened = open_model(Sources(tmp_path / "in", vision_tower=tmp_path / "clip", allow_pickle=True))
    assert opened.detections[tmp_path / "in"].kind is Kind.LLAVA
    assert opened.config == config
    assert sum("CLIP's vision tower" in reason for reason in opened.ignored.values()) == 5
    assert_same_bits(read_all(opened), tensors)


@pytest.mark.parametrize("flag", [True, False])
def test_a_tower_in_the_file_counts_only_if_the_flag_says_so(
    tmp_path: pathlib.Path, flag: bool
) -> None:
    config = original()
    tensors = random_tensors(config)
    other = random_tensors(config, seed=9)
    write_llava(tmp_path / "in", tensors, config, in_file_tower=True)
    edit_config(tmp_path / "in", unfreeze_mm_vision_tower=flag)
    write_clip(tmp_path / "clip", other, container="safetensors")
    opened = open_model(Sources(tmp_path / "in", vision_tower=tmp_path / "clip"))
    expected = (
        tensors
        if flag
        else {
            key: other[key] if key.startswith("vision_tower.") else tensors[key] for key in tensors
        }
    )
    assert_same_bits(read_all(opened), expected)
    left_out = [r for r in opened.ignored.values() if "unfreeze_mm_vision_tower" in r]
    assert len(left_out) == (0 if flag else sum(k.startswith("vision_tower.") for k in tensors))


def test_llama_with_a_projector(tmp_path: pathlib.Path) -> None:
    config = original()
    tensors = random_tensors(config)
    write_llama(tmp_path / "in", tensors, config, "bin shards")
    write_clip(tmp_path / "clip", tensors)
    stage1 = tmp_path / "stage1"
    write_llava(stage1, tensors, config)
    (stage1 / "model.safetensors").unlink()
    own = {keys.dialect_key(k, Dialect.LLAVA, config): a for k, a in projector_of(tensors).items()}
    (stage1 / "mm_projector.bin").write_bytes(encode(own))
    sources = Sources(
        tmp_path / "in", vision_tower=tmp_path / "clip", projector=stage1, allow_pickle=True
    )
    opened = open_model(sources)
    assert [d.kind for d in opened.detections.values()] == [Kind.LLAMA, Kind.PROJECTOR, Kind.CLIP]
    assert_same_bits(read_all(opened), tensors)
    edit_config(stage1, hidden_size=48)
    with pytest.raises(ConversionError, match="describes TextConfig"):
        open_model(sources)


class Published:
    """A LoRA directory in the published layout, with the base it belongs on."""

    def __init__(self, folder: pathlib.Path, container: str = "bin", dtype: str = "float16"):
        self.config = original()
        self.tensors = random_tensors(self.config, dtype)
        self.adapter = random_adapter(self.config, rank=4)
        self.trained = projector_of(random_tensors(self.config, "bfloat16", seed=7))
        write_llama(folder / VICUNA, self.tensors, self.config)
        write_clip(folder / "clip", self.tensors)
        write_peft(folder / "lora", self.adapter, self.trained, self.config, container=container)
        self.sources = Sources(
            folder / VICUNA,
            vision_tower=folder / "clip",
            adapter=folder / "lora",
            allow_pickle=True,
        )


@pytest.fixture
def published(tmp_path: pathlib.Path) -> Published:
    return Published(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("container", ["bin", "safetensors"])
def test_adapters_are_kept(tmp_path: pathlib.Path, container: str) -> None:
    published = Published(tmp_path, container)
    convert(open_model(published.sources), tmp_path / "ours", dtype=np.dtype(jnp.bfloat16))
    assert config_json.read_adapter(tmp_path / "ours") == AdapterConfig(4, 8.0, 0.05)
    assert directory.read_manifest(tmp_path / "ours").source["adapter_base"] == f"lmsys/{VICUNA}"
    arrays = directory.read_manifest(tmp_path / "ours").arrays
    # --dtype is for the model; adapters keep the dtype they were trained in.
    assert str(arrays["decoder.layers.mlp.up_proj.kernel"].dtype) == "bfloat16"
    assert str(arrays["decoder.layers.mlp.up_proj.lora_a"].dtype) == "float32"
    assert arrays["decoder.layers.mlp.up_proj.lora_a"].shape == (2, 24, 4)
    export_adapter(tmp_path / "ours", tmp_path / "back")
    back = open_safetensors_named(tmp_path / "back" / "adapter_model.safetensors")
    assert_same_bits(
        {keys.canonical_key(key, Dialect.LLAVA): a for key, a in back.items()}, published.adapter
    )
    declared = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert declared["base_model_name_or_path"] == f"lmsys/{VICUNA}"
    assert (declared["r"], declared["lora_alpha"]) == (4, 8)


def open_safetensors_named(path: pathlib.Path) -> dict[str, np.ndarray]:
    file = SafetensorsFile(path)
    return {name: file.read(name) for name in file.tensors}


@pytest.mark.slow
def test_an_exported_adapter_converts_again(tmp_path: pathlib.Path, published: Published) -> None:
    convert(open_model(published.sources), tmp_path / "ours")
    export_adapter(tmp_path / "ours", tmp_path / "back")
    sources = Sources(
        published.sources.folder,
        vision_tower=published.sources.vision_tower,
        adapter=tmp_path / "back",
        allow_pickle=True,
    )
    convert(open_model(sources), tmp_path / "again")
    one, two = (directory.read_manifest(tmp_path / name) for name in ("ours", "again"))
    assert one.arrays == two.arrays
    hashes = {k: v for k, v in one.files.items() if "/state/value/" in k}
    assert len(hashes) > 50
    assert hashes == {k: v for k, v in two.files.items() if "/state/value/" in k}


@pytest.mark.slow
def test_merging_rounds_once(tmp_path: pathlib.Path, published: Published) -> None:
    opened = open_model(replace(published.sources, merge=True))
    assert opened.adapter is None
    convert(opened, tmp_path / "ours")
    assert config_json.read_adapter(tmp_path / "ours") is None
    merged = canonical_tensors(tmp_path / "ours")
    expected = dict(published.tensors) | published.trained
    for key, a in published.adapter.items():
        if ".lora_A." in key:
            b = published.adapter[key.replace(".lora_A.", ".lora_B.")]
            target = key.replace(".lora_A.", ".")
            total = expected[target].astype(np.float32) + np.float32(2) * (b @ a)
            expected[target] = total.astype(np.float16)
    assert_same_bits(merged, expected)
    # The same from a directory that keeps the adapter.
    convert(open_model(published.sources), tmp_path / "kept")
    with pytest.raises(ConversionError, match="holds adapters"):
        export_model(tmp_path / "kept", tmp_path / "out", Dialect.LLAVA)
    export_model(tmp_path / "kept", tmp_path / "out", Dialect.LLAVA, merge=True)
    again = Sources(tmp_path / "out", vision_tower=tmp_path / "out" / "vision_tower")
    assert_same_bits(read_all(open_model(again)), expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_rslora", True),
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("layers_to_transform", [0]),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("target_parameters", ["x"]),
        ("layer_replication", [[0, 1]]),
        ("trainable_token_indices", [1]),
        ("use_qalora", True),
        ("loftq_config", {"bits": 4}),
        ("init_lora_weights", "pissa"),
        ("peft_type", "IA3"),
        ("a_future_option", 1),
        ("r", 0),
        ("r", 8),
        ("lora_alpha", "16"),
    ],
)
def test_unsupported_adapters_are_refused_by_name(
    tmp_path: pathlib.Path, published: Published, field: str, value: object
) -> None:
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    words = {"r": r"\br 0|lora_A"}
    with pytest.raises(ConversionError, match=words.get(field, field)):
        open_model(published.sources)


def test_the_base_must_be_the_declared_one(tmp_path: pathlib.Path, published: Published) -> None:
    (tmp_path / VICUNA).rename(tmp_path / "base")
    sources = replace(published.sources, folder=tmp_path / "base")
    with pytest.raises(ConversionError, match="trained on 'lmsys/vicuna-7b-v1.5'.*adapter_base"):
        open_model(sources)
    with pytest.raises(ConversionError, match="trained on"):
        open_model(replace(sources, adapter_base="lmsys/vicuna-13b-v1.5"))
    open_model(replace(sources, adapter_base=f"lmsys/{VICUNA}"))
    cache = tmp_path / f"models--lmsys--{VICUNA}" / "snapshots"
    cache.mkdir(parents=True)
    (tmp_path / "base").rename(cache / "0123abcd")
    open_model(replace(sources, folder=cache / "0123abcd"))


def rewrite_adapter(folder: pathlib.Path, published: Published, adapter: dict) -> None:
    shutil.rmtree(folder / "lora")
    write_peft(folder / "lora", adapter, published.trained, published.config)


def test_incomplete_adapters(tmp_path: pathlib.Path, published: Published) -> None:
    queries = {k: a for k, a in published.adapter.items() if "q_proj" in k}
    rewrite_adapter(tmp_path, published, queries)
    with pytest.raises(ConversionError, match=r"lacks 24 tensors.*use --merge"):
        open_model(published.sources)
    open_model(replace(published.sources, merge=True))
    halves = {k: a for k, a in queries.items() if "layers.0" not in k or "lora_A" in k}
    rewrite_adapter(tmp_path, published, halves)
    with pytest.raises(ConversionError, match=r"missing tensors: .*layers\.0.*q_proj\.lora_B"):
        open_model(published.sources)
    tower = {k.replace("language_model.", "vision_tower.encoder."): a for k, a in queries.items()}
    rewrite_adapter(tmp_path, published, published.adapter | tower)
    with pytest.raises(ConversionError, match=r"on other modules.*vision_tower.*merge_and_un"):
        open_model(published.sources)


def test_a_projector_must_be_whole(tmp_path: pathlib.Path, published: Published) -> None:
    shutil.rmtree(tmp_path / "lora")
    some = {k: a for k, a in published.trained.items() if "linear_2.bias" not in k}
    write_peft(tmp_path / "lora", published.adapter, some, published.config)
    with pytest.raises(ConversionError, match="missing tensors: .*linear_2.bias"):
        open_model(published.sources)
    (tmp_path / "lora" / "non_lora_trainables.bin").unlink()
    with pytest.raises(ConversionError, match="the projector is missing"):
        open_model(published.sources)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"allow_pickle": False}, "is a PyTorch pickle"),
        ({"vision_tower": None}, "--vision_tower"),
        ({"adapter": None}, "--projector"),
        ({"adapter": None, "merge": True}, "--merge needs an adapter"),
        ({"projector": "lora"}, "both hold a projector|holds no|is missing"),
        ({"vision_tower": "lora"}, "lora"),
        ({"adapter": "clip"}, "config.json is missing|holds no adapter_config|mm_"),
    ],
)
def test_missing_or_wrong_parts(
    tmp_path: pathlib.Path, published: Published, change: dict, message: str
) -> None:
    change = {k: tmp_path / v if isinstance(v, str) else v for k, v in change.items()}
    with pytest.raises(ConversionError, match=message) as caught:
        open_model(replace(published.sources, **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", ["clip", "lora"])
def test_parts_are_no_models(tmp_path: pathlib.Path, published: Published, folder: str) -> None:
    with pytest.raises(ConversionError, match="--vision_tower|--adapter"):
        open_model(Sources(tmp_path / folder, allow_pickle=True))


def test_llava_hf_round_trip(tmp_path: pathlib.Path) -> None:
    tensors = write_hf(tmp_path / "in")
    (tmp_path / "in" / "tokenizer_config.json").write_text('{"x": 1}')
    convert(open_model(Sources(tmp_path / "in")), tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back", Dialect.HF, max_shard_bytes=20_000)
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    assert (tmp_path / "back" / "tokenizer_config.json").read_text() == '{"x": 1}'
    names = open_safetensors(tmp_path / "back")
    assert names is not None
    assert set(names.tensors) == {keys.dialect_key(k, Dialect.HF, TINY) for k in tensors}
    opened = open_model(Sources(tmp_path / "back"))
    assert opened.config == TINY
    assert_same_bits(read_all(opened), tensors)


def test_directories_of_version_1_are_exported(tmp_path: pathlib.Path) -> None:
    tensors = write_hf(tmp_path / "in")
    convert(open_model(Sources(tmp_path / "in")), tmp_path / "ours")
    to_version_1(tmp_path / "ours")
    old, new = "passthrough.safetensors", "unused_tower_tensors.safetensors"
    (tmp_path / "ours" / new).rename(tmp_path / "ours" / old)
    manifest = tmp_path / "ours" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(new, old))
    export_model(tmp_path / "ours", tmp_path / "back", Dialect.HF)
    assert_same_bits(read_all(open_model(Sources(tmp_path / "back"))), tensors)


@pytest.mark.parametrize("projector", ["linear", "mlp3x_gelu"])
def test_original_round_trip(tmp_path: pathlib.Path, projector: str) -> None:
    config = original(projector)
    tensors = random_tensors(config)
    write_llava(tmp_path / "in", tensors, config, in_file_tower=True)
    write_clip(tmp_path / "clip", tensors, container="safetensors")
    convert(open_model(Sources(tmp_path / "in", vision_tower=tmp_path / "clip")), tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back", Dialect.LLAVA)
    back = open_safetensors_named(tmp_path / "back" / "model.safetensors")
    assert set(back) == {keys.dialect_key(k, Dialect.LLAVA, config) for k in tensors}
    with pytest.raises(ConversionError, match="add --vision_tower .*back/vision_tower$"):
        open_model(Sources(tmp_path / "back"))
    opened = open_model(Sources(tmp_path / "back", vision_tower=tmp_path / "back" / "vision_tower"))
    assert opened.config == config
    assert_same_bits(read_all(opened), tensors)


@pytest.mark.slow
def test_vocabularies_grow_and_shrink(tmp_path: pathlib.Path) -> None:
    config = original()
    tensors = random_tensors(config)
    write_llava(tmp_path / "in", tensors, config, in_file_tower=True)
    write_clip(tmp_path / "clip", tensors, container="safetensors")
    convert(open_model(Sources(tmp_path / "in", vision_tower=tmp_path / "clip")), tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "hf", Dialect.HF)
    opened = open_model(Sources(tmp_path / "hf"))
    assert (opened.config.text.vocab_size, opened.config.image_token_id) == (128, 100)
    assert opened.config.pad_token_id == 101
    table = read_all(opened)["language_model.embed_tokens.weight"]
    mean = tensors["language_model.embed_tokens.weight"].astype(np.float32).mean(axis=0)
    assert table[100:].tobytes() == np.tile(mean.astype(table.dtype), (28, 1)).tobytes()
    convert(opened, tmp_path / "ours_hf")
    export_model(tmp_path / "ours_hf", tmp_path / "back", Dialect.LLAVA)
    back = Sources(tmp_path / "back", vision_tower=tmp_path / "back" / "vision_tower")
    assert_same_bits(read_all(open_model(back)), tensors)
    report = json.loads((tmp_path / "hf" / "conversion_report.json").read_text())
    assert report["vocabulary"] == "100 -> 128 rows, added, each the mean of the others"


def test_words_are_never_dropped(tmp_path: pathlib.Path) -> None:
    write_hf(tmp_path / "in", dataclasses.replace(TINY, image_token_id=3))
    convert(open_model(Sources(tmp_path / "in")), tmp_path / "ours")
    with pytest.raises(ConversionError, match="would drop words"):
        export_model(tmp_path / "ours", tmp_path / "out", Dialect.LLAVA)


def test_what_a_dialect_cannot_hold_is_refused(tmp_path: pathlib.Path) -> None:
    config = original("linear")
    tensors = random_tensors(config)
    write_llava(tmp_path / "in", tensors, config, in_file_tower=True)
    write_clip(tmp_path / "clip", tensors, container="safetensors")
    convert(open_model(Sources(tmp_path / "in", vision_tower=tmp_path / "clip")), tmp_path / "ours")
    with pytest.raises(ConversionError, match="mlp2x_gelu only"):
        export_model(tmp_path / "ours", tmp_path / "out", Dialect.HF)
    with pytest.raises(ConversionError, match="holds no adapters"):
        export_adapter(tmp_path / "ours", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_never_was_a_checkpoint_is_exported(tmp_path: pathlib.Path) -> None:
    """One that was trained here, from random weights, lacks what LLaVA never uses of CLIP."""
    tensors = random_tensors(TINY, "float32")
    with directory.DirectoryWriter(tmp_path / "ours", TINY) as writer:
        for weight in keys.weights(TINY):
            writer.write_array(weight.path, stacked(weight, tensors))
    export_model(tmp_path / "ours", tmp_path / "out", Dialect.HF)
    for key in keys.unused_tower_tensors(TINY):
        tensors[key] = np.zeros_like(tensors[key])
    assert_same_bits(read_all(open_model(Sources(tmp_path / "out"))), tensors)
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert report["unused_tower_tensors"].startswith("zeros")

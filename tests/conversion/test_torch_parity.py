"""PyTorch, transformers and PEFT are the judges of what goes in and what comes out."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is the oracle of these tests")
transformers = pytest.importorskip("transformers")

from prumerge_jax.conversion import keys  # noqa: E402
from prumerge_jax.conversion.checkpoint_reader import Sources, open_model  # noqa: E402
from prumerge_jax.conversion.convert import convert  # noqa: E402
from prumerge_jax.conversion.export import export_adapter, export_model  # noqa: E402
from prumerge_jax.conversion.keys import Dialect  # noqa: E402
from prumerge_jax.conversion.verify import compare, compare_with_torch  # noqa: E402
from prumerge_jax.models import config_json  # noqa: E402
from prumerge_jax.models.config import decoder_linears  # noqa: E402
from tests.conversion.checkpoints import (  # noqa: E402
    TINY,
    original,
    random_tensors,
    write_clip,
    write_llama,
    write_llava,
)
from tests.conversion.test_convert import canonical_tensors  # noqa: E402
from tests.models.torch_llava import random_torch_llava  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.torch]

IDS = torch.tensor([[1, 5, *[TINY.image_token_id] * TINY.vision.num_patches, 9, 17, 23]])


def llava_logits(model: Any) -> np.ndarray:
    side = TINY.vision.image_size
    pixels = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 3, side, side))).float()
    with torch.no_grad():
        return model(input_ids=IDS, pixel_values=pixels).logits.float().numpy()


def text_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40)[None]).logits.float().numpy()


def scaled_tensors(config: Any, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Random tensors of about the size of trained ones, so that logits are comparable."""
    tensors = random_tensors(config, dtype)
    return {
        key: (a * (a.shape[-1] ** -0.5)).astype(a.dtype) if a.ndim > 1 else a
        for key, a in tensors.items()
    }


def test_llava_hf_goes_round_and_computes_the_same(tmp_path: pathlib.Path) -> None:
    model = random_torch_llava(TINY)
    model.save_pretrained(tmp_path / "in")
    opened = open_model(Sources(tmp_path / "in"))
    convert(opened, tmp_path / "ours")
    comparison = compare_with_torch(opened, tmp_path / "ours")
    assert comparison.max_difference < 1e-4
    assert comparison.top1_agreement == 1
    assert 0 <= comparison.kl < 1e-8
    assert "top-1 agreement 100.00%" in comparison.summary()
    export_model(tmp_path / "ours", tmp_path / "back", Dialect.HF)
    back, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "back", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs, ours = model.state_dict(), back.state_dict()
    assert set(theirs) == set(ours)
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name
    np.testing.assert_array_equal(llava_logits(back), llava_logits(model))


def test_a_wrong_conversion_is_noticed(tmp_path: pathlib.Path) -> None:
    model = random_torch_llava(TINY)
    model.save_pretrained(tmp_path / "in")
    convert(open_model(Sources(tmp_path / "in")), tmp_path / "ours")
    random_torch_llava(TINY, seed=1).save_pretrained(tmp_path / "other")
    comparison = compare_with_torch(open_model(Sources(tmp_path / "other")), tmp_path / "ours")
    assert comparison.kl > 0.01
    assert comparison.top1_agreement < 0.9


def test_comparisons_of_known_distributions() -> None:
    theirs = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    ours = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]])) + 3
    comparison = compare(ours, theirs)
    assert comparison.top1_agreement == 0.5
    np.testing.assert_allclose(comparison.kl, 0.25 * np.log(2) / 2, rtol=1e-12)
    np.testing.assert_allclose(comparison.max_difference, 3 + np.log(2), rtol=1e-12)


def test_an_original_llava_becomes_one_that_transformers_runs(tmp_path: pathlib.Path) -> None:
    config = original()
    tensors = scaled_tensors(config)
    write_llava(tmp_path / "in", tensors, config, container="bin shards")
    write_clip(tmp_path / "clip", tensors)
    opened = open_model(Sources(tmp_path / "in", vision_tower=tmp_path / "clip", allow_pickle=True))
    convert(opened, tmp_path / "ours")
    assert compare_with_torch(opened, tmp_path / "ours").max_difference < 1e-4
    export_model(tmp_path / "ours", tmp_path / "hf", Dialect.HF)
    hf = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    # The language model alone, from the original's file, is the judge of the text.
    write_llama(tmp_path / "llama", tensors, config)
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    np.testing.assert_allclose(text_logits(hf)[..., :100], text_logits(llama), atol=1e-5)
    # And back to the original layout: torch's Llama reads the same bits from it.
    export_model(tmp_path / "ours", tmp_path / "back", Dialect.LLAVA)
    values = json.loads((tmp_path / "back" / "config.json").read_text())
    (tmp_path / "back" / "config.json").write_text(
        json.dumps(values | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"})
    )
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "back")
    np.testing.assert_array_equal(text_logits(again), text_logits(llama))


def test_clip_of_transformers_is_a_tower(tmp_path: pathlib.Path) -> None:
    config = original()
    tensors = scaled_tensors(config)
    write_llava(tmp_path / "in", tensors, config)
    vision = {k: v for k, v in _clip_fields(config).items()}
    for name, model in {
        "vision": transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision)),
        "whole": transformers.CLIPModel(
            transformers.CLIPConfig(
                vision_config=vision,
                text_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                             "num_attention_heads": 2},
            )
        ),
    }.items():  # fmt: skip
        model.save_pretrained(tmp_path / name)
        opened = open_model(Sources(tmp_path / "in", vision_tower=tmp_path / name))
        state = model.state_dict()
        checked = 0
        for canonical in keys.unused_tower_tensors(config):
            own = opened.tensors[canonical].read()
            (key,) = [k for k in state if keys.canonical_key(k, Dialect.CLIP) == canonical]
            np.testing.assert_array_equal(own, state[key].numpy())
            checked += 1
        assert checked == 12


def _clip_fields(config: Any) -> dict[str, Any]:
    from prumerge_jax.conversion.hf_files import clip_config

    return {k: v for k, v in clip_config(config.vision).items() if k != "architectures"}


class Lora:
    """A LoRA of PEFT on a tiny float16 LLaMA, saved by PEFT itself."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.peft = pytest.importorskip("peft")
        config = original()
        self.config, self.folder = config, folder
        self.tensors = scaled_tensors(config, "float16")
        write_llama(folder / "base", self.tensors, config)
        write_clip(folder / "clip", self.tensors)
        model = self.peft.get_peft_model(
            self.base(),
            self.peft.LoraConfig(
                r=4, lora_alpha=8, lora_dropout=0.05, task_type="CAUSAL_LM",
                target_modules=list(decoder_linears(config.text)),
            ),
        ).eval()  # fmt: skip
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
        model.save_pretrained(folder / "lora")
        self.model = model
        from prumerge_jax.conversion.torch_bin import encode

        projector = {k: a for k, a in self.tensors.items() if k.startswith("multi_modal")}
        own = {
            f"base_model.model.{keys.dialect_key(k, Dialect.LLAVA, config)}": a
            for k, a in projector.items()
        }
        (folder / "lora" / "non_lora_trainables.bin").write_bytes(encode(own))
        from prumerge_jax.conversion.hf_files import llava_config

        values = llava_config(config) | {"unfreeze_mm_vision_tower": False}
        (folder / "lora" / "config.json").write_text(json.dumps(values))
        declared = json.loads((folder / "lora" / "adapter_config.json").read_text())
        self.sources = Sources(
            folder / "base",
            vision_tower=folder / "clip",
            adapter=folder / "lora",
            adapter_base=declared["base_model_name_or_path"],
            allow_pickle=True,
        )

    def base(self) -> Any:
        return transformers.LlamaForCausalLM.from_pretrained(
            self.folder / "base", dtype=torch.float16
        )


@pytest.fixture
def lora(tmp_path: pathlib.Path) -> Lora:
    return Lora(tmp_path)


def test_merging_is_bit_exact_with_peft(tmp_path: pathlib.Path, lora: Lora) -> None:
    convert(open_model(dataclasses.replace(lora.sources, merge=True)), tmp_path / "ours")
    ours = canonical_tensors(tmp_path / "ours")
    changed = 0
    for name, tensor in lora.model.merge_and_unload().state_dict().items():
        canonical = keys.canonical_key(name, Dialect.LLAVA)
        assert str(ours[canonical].dtype) == "float16"
        assert ours[canonical].tobytes() == tensor.numpy().tobytes(), name
        changed += ours[canonical].tobytes() != lora.tensors[canonical].tobytes()
    assert changed == 14


def test_kept_adapters_compute_and_return(tmp_path: pathlib.Path, lora: Lora) -> None:
    opened = open_model(lora.sources)
    convert(opened, tmp_path / "ours")
    comparison = compare_with_torch(opened, tmp_path / "ours")
    assert comparison.max_difference < 1e-5
    export_adapter(tmp_path / "ours", tmp_path / "back")
    again = lora.peft.PeftModel.from_pretrained(lora.base(), tmp_path / "back").eval()
    np.testing.assert_array_equal(text_logits(again), text_logits(lora.model))
    assert np.abs(text_logits(again) - text_logits(lora.base())).max() > 1e-3
    beside = torch.load(tmp_path / "back" / "non_lora_trainables.bin", weights_only=True)
    assert len(beside) == 4


def test_adapters_on_llava_hf_hit_the_decoder_only(tmp_path: pathlib.Path, lora: Lora) -> None:
    convert(open_model(lora.sources), tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "merged", Dialect.HF, merge=True)
    # The same model with llava-hf's vocabulary, its adapter kept.
    base = dataclasses.replace(lora.sources, adapter=None, adapter_base=None)
    shutil.copytree(tmp_path / "lora", tmp_path / "stage1")
    (tmp_path / "stage1" / "adapter_config.json").unlink()
    (tmp_path / "stage1" / "adapter_model.safetensors").unlink()
    (tmp_path / "stage1" / "non_lora_trainables.bin").rename(
        tmp_path / "stage1" / "mm_projector.bin"
    )
    convert(
        open_model(dataclasses.replace(base, projector=tmp_path / "stage1")), tmp_path / "plain"
    )
    export_model(tmp_path / "plain", tmp_path / "hf", Dialect.HF)
    kept = Sources(
        tmp_path / "hf",
        adapter=tmp_path / "lora",
        adapter_base=lora.sources.adapter_base,
        allow_pickle=True,
    )
    convert(open_model(kept), tmp_path / "ours_hf")
    export_adapter(tmp_path / "ours_hf", tmp_path / "peft", base="x/y")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", dtype=torch.float32
    )
    adapted = lora.peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
    names = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert len(names) == 28
    assert all("language_model" in name for name in names)
    merged = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    difference = np.abs(text_logits(adapted) - text_logits(merged)).max()
    assert difference < 2e-2  # the merged one was rounded to float16
    assert config_json.read_adapter(tmp_path / "ours_hf") is not None


def test_transformers_reads_our_processor_files(
    tmp_path: pathlib.Path, golden: pathlib.Path
) -> None:
    config = dataclasses.replace(
        original(), text=dataclasses.replace(original().text, vocab_size=32000)
    )
    tensors = scaled_tensors(config, "bfloat16")
    write_llava(tmp_path / "in", tensors, config)
    shutil.copy(golden / "tokenizer" / "tokenizer.model", tmp_path / "in")
    write_clip(tmp_path / "clip", tensors, container="safetensors")
    convert(open_model(Sources(tmp_path / "in", vision_tower=tmp_path / "clip")), tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "hf", Dialect.HF)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf", use_fast=False)
    assert type(processor).__name__ == "LlavaProcessor"
    image = np.zeros((40, 30, 3), np.uint8)
    batch = processor(text="USER: <image>\nHi", images=image, return_tensors="pt")
    ids = batch["input_ids"][0].tolist()
    assert ids.count(32000) == config.vision.num_patches
    assert ids[0] == 1
    assert batch["pixel_values"].shape == (1, 3, 28, 28)
    assert processor.tokenizer.pad_token_id == 32001
    assert len(processor.tokenizer) == 32002
    opened = open_model(Sources(tmp_path / "hf"))
    assert opened.config.image_token_id == 32000
    assert opened.config.text.vocab_size == 32064

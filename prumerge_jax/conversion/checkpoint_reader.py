"""Opens what a user has: finds its kind, parses its config, matches every tensor.

A LLaVA may be stored in one directory (llava-hf) or in several: language model, vision tower,
projector and adapter. Everything that can be checked without reading weights is checked here.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from prumerge_jax.conversion import keys, peft
from prumerge_jax.conversion.detect import Detection, Kind, detect
from prumerge_jax.conversion.hf_config import (
    VIDEO_LLAVA_TOWERS,
    keeps_in_file_tower,
    parse_llava,
    parse_tower,
    with_processor,
    with_stops,
)
from prumerge_jax.conversion.hf_files import OPENAI_TOWER, SIGLIP_TOWER
from prumerge_jax.conversion.input_folder import check_folder
from prumerge_jax.conversion.keys import Dialect
from prumerge_jax.conversion.packed import PackedCheckpoint, unpacked, without_packing
from prumerge_jax.conversion.safetensors_io import SafetensorsFile, open_safetensors
from prumerge_jax.conversion.tensor_files import (
    Checkpoint,
    ConversionError,
    StoredTensor,
    Tensor,
    load_object,
    open_indexed,
)
from prumerge_jax.conversion.tokenizer_file import (
    BPE_TOKENIZER,
    TOKENIZER,
    check_bpe_tokenizer,
    check_tokenizer,
)
from prumerge_jax.conversion.torch_bin import TorchFile
from prumerge_jax.families.decoders import parse_text
from prumerge_jax.families.fields import Section
from prumerge_jax.families.towers import SIGLIP_SO400M
from prumerge_jax.models.config import LlavaConfig, VisionConfig

# Files of a checkpoint that text processing reads, and those that image processing reads. They
# are copied as they are.
TEXT_FILES = (
    TOKENIZER,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
)
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
_PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_TRAINED_WITH_ADAPTERS = "non_lora_trainables.bin"


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A complete LLaVA, ready to be converted.

    Attributes:
      config: its sizes.
      tensors: where each one is, by canonical key; those the model never uses included.
      ignored: checkpoint keys that are left out, with the reason.
      companions: tokenizer and processor files to be copied; `tokenizer.model` may be missing.
      detections: by directory what it was taken for, and why.
      files: every file the tensors come from.
      adapter: low-rank adapters that are kept as adapters; merged ones are in `tensors`.
      adapter_base: the model that adapters say they were trained on, "" where they do not say;
        None without adapters.
    """

    config: LlavaConfig
    tensors: Mapping[str, Tensor]
    ignored: Mapping[str, str]
    companions: tuple[pathlib.Path, ...]
    detections: Mapping[pathlib.Path, Detection]
    files: tuple[pathlib.Path, ...]
    adapter: peft.Adapter | None = None
    adapter_base: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, in the checkpoint's dtypes."""
        tensors = [*self.tensors.values(), *(self.adapter.tensors.values() if self.adapter else ())]
        return sum(tensor.info.nbytes for tensor in tensors)

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is the tokenizer that `Llava.load` needs."""
        names = {path.name for path in self.companions}
        return TOKENIZER in names or self.tokenizer_name in names

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's file: Qwen2 and Llama-3 have byte-level BPE, the others SentencePiece."""
        is_bpe = self.config.chat_template in ("qwen_1_5", "llava_llama_3")
        return BPE_TOKENIZER if is_bpe else TOKENIZER


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where the parts of a model are.

    Attributes:
      folder: the model itself, or its language model.
      vision_tower: a CLIP directory, for models that do not hold their tower.
      projector: a stage-1 directory (`config.json`, `mm_projector.bin`), for a plain LLaMA.
      adapter: a LoRA directory of PEFT.
      adapter_base: the user's statement that `folder` is this model, see `peft.check_base`.
      merge: add the adapter to the weights instead of keeping it as it is.
      allow_pickle: admit `.bin` files, see `torch_bin`.
    """

    folder: pathlib.Path
    vision_tower: pathlib.Path | None = None
    projector: pathlib.Path | None = None
    adapter: pathlib.Path | None = None
    adapter_base: str | None = None
    merge: bool = False
    allow_pickle: bool = False


def open_model(sources: Sources) -> OpenedModel:
    """Opens a model and matches all of its tensors.

    Raises:
      ConversionError: it cannot be converted; one line says why.
    """
    return _Opener(sources).open()


class _Opener:
    """Collects the parts of one model."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.tensors: dict[str, Tensor] = {}
        self.ignored: dict[str, str] = {}
        self.detections: dict[pathlib.Path, Detection] = {}
        self.files: list[pathlib.Path] = []

    def open(self) -> OpenedModel:
        folder = self.sources.folder
        if self.sources.merge and self.sources.adapter is None:
            raise ConversionError("--merge needs an adapter to merge, given as --adapter")
        if self.sources.adapter_base and self.sources.adapter is None:
            raise ConversionError("--adapter_base needs an adapter, given as --adapter")
        parts = (self.sources.vision_tower, self.sources.projector, self.sources.adapter)
        for part in (folder, *filter(None, parts)):
            check_folder(part)
        kind = self.detect(folder)
        if kind is Kind.HF:
            config = self.open_hf(folder)
        elif kind is Kind.LLAVA:
            config = self.open_llava(folder)
        elif kind is Kind.LLAMA:
            config = self.open_llama(folder)
        else:
            hint = {
                Kind.OURS: "use --to=hf, --to=llava or --to=peft",
                Kind.PEFT: "give its base model as --input and this as --adapter",
                Kind.PROJECTOR: "give its language model as --input and this as --projector",
                Kind.CLIP: "give a LLaVA as --input and this as --vision_tower",
            }[kind]
            raise ConversionError(f"{folder} is {kind.value}: {hint}")
        companions = self.companions(kind)
        for file in companions:
            if file.name == TOKENIZER:
                check_tokenizer(file, config.text.vocab_size)
            elif file.name == BPE_TOKENIZER:
                check_bpe_tokenizer(file, config.text.vocab_size)
        adapter = self.open_adapter(config, kind) if self.sources.adapter else None
        return OpenedModel(
            config,
            self.tensors,
            self.ignored,
            companions,
            self.detections,
            tuple(self.files),
            adapter if adapter and not self.sources.merge else None,
            (adapter.base or self.sources.adapter_base or "") if adapter else None,
        )

    def open_hf(self, folder: pathlib.Path) -> LlavaConfig:
        self.refuse_part("--vision_tower", self.sources.vision_tower)
        self.refuse_part("--projector", self.sources.projector)
        where = folder / "config.json"
        family = self.detections[folder].family
        assert family is not None  # `detect` found one
        values = load_object(where)
        config = family.parse(Section(without_packing(values), str(where)))
        config = with_stops(folder, with_processor(folder, config))
        expected = keys.expected_shapes(keys.weights(config)) | keys.unused_tower_tensors(config)
        checkpoint = self.unpacked(self.open_weights(folder), values, str(where))
        self.add_model(checkpoint, Dialect.HF, expected, folder, config)
        return config

    def add_model(
        self,
        checkpoint: Checkpoint,
        dialect: Dialect,
        expected: Mapping[str, tuple[int, ...]],
        folder: pathlib.Path,
        config: LlavaConfig,
        leave_out: Callable[[str], str | None] = keys.ignored_reason,
    ) -> None:
        """As `add`; a tied head, which files may hold or not, must be the embedding."""

        def without_head(canonical: str) -> str | None:
            if config.text.tied_head and canonical == "lm_head.weight":
                return "tied: the embedding, bit for bit"
            return leave_out(canonical)

        self.add(checkpoint, dialect, expected, folder, without_head)
        for key, reason in self.ignored.items():
            if reason.startswith("tied"):
                embedding = self.tensors["language_model.embed_tokens.weight"].read()
                if not np.array_equal(checkpoint.read(key), embedding):
                    raise ConversionError(
                        f"{folder}: {key} is not the embedding, although tie_word_embeddings is "
                        "true: expected the same values, or no such tensor"
                    )

    def open_llava(self, folder: pathlib.Path) -> LlavaConfig:
        self.refuse_part("--projector", self.sources.projector)
        values = load_object(folder / "config.json")
        in_file = keeps_in_file_tower(values)
        vision = self.vision_config(values, in_file)
        where = str(folder / "config.json")
        config = parse_llava(without_packing(values), where, vision)
        if in_file:
            expected = keys.expected_shapes(keys.weights(config))
            expected |= keys.unused_tower_tensors(config)
        else:
            expected = keys.expected_shapes(
                [*keys.projector_weights(config), *keys.decoder_weights(config.text)]
            )

        def leave_out(canonical: str) -> str | None:
            if canonical.startswith("vision_tower.") and not in_file:
                return "unfreeze_mm_vision_tower is not set: mm_vision_tower is used instead"
            return keys.ignored_reason(canonical)

        checkpoint = self.unpacked(self.open_weights(folder), values, where)
        self.add_model(checkpoint, Dialect.LLAVA, expected, folder, config, leave_out)
        if not in_file:
            self.open_tower(config.vision)
        return with_stops(folder, config)

    def open_llama(self, folder: pathlib.Path) -> LlavaConfig:
        multimodal = self.sources.projector or self.sources.adapter
        if multimodal is None:
            raise ConversionError(
                f"{folder} is {Kind.LLAMA.value}: to make it a LLaVA give a projector "
                "(--projector) or an adapter directory that holds one (--adapter)"
            )
        where = multimodal / "config.json"
        if not where.is_file():
            raise ConversionError(f"{where} is missing: it describes the projector and the tower")
        values = load_object(where)
        config = parse_llava(values, str(where), self.vision_config(values, in_file=False))
        own = folder / "config.json"
        plain = Section(load_object(own), str(own))
        plain.require("tie_word_embeddings", [False])
        text = parse_text(plain)
        if text != config.text:
            raise ConversionError(f"{where} describes {config.text}, {own} describes {text}")
        decoder = keys.expected_shapes(keys.decoder_weights(text))
        self.add(self.open_weights(folder), Dialect.LLAVA, decoder, folder)
        if self.sources.projector:
            self.detect(self.sources.projector)
            self.open_projector(self.sources.projector / "mm_projector.bin", config)
        elif not (multimodal / _TRAINED_WITH_ADAPTERS).is_file():
            raise ConversionError(
                f"{multimodal} holds no {_TRAINED_WITH_ADAPTERS}: "
                "the projector is missing, give it as --projector"
            )
        self.open_tower(config.vision)
        return config

    def open_adapter(self, config: LlavaConfig, base_kind: Kind) -> peft.Adapter:
        folder = self.sources.adapter
        assert folder is not None
        if self.detect(folder) is not Kind.PEFT:
            raise ConversionError(f"{folder} holds no adapter_config.json: not a LoRA directory")
        adapter_config, base = peft.parse_adapter_config(folder)
        checkpoint = self.open_single(folder, _PEFT_WEIGHTS)
        adapter = peft.match_adapter(checkpoint, adapter_config, base, config.text, str(folder))
        _check_dtypes(adapter.tensors)
        peft.check_base(adapter, self.sources.folder, self.sources.adapter_base)
        self.files += [file.path for file in checkpoint.files]
        projector = folder / _TRAINED_WITH_ADAPTERS
        if projector.is_file():
            if base_kind is Kind.LLAMA and self.sources.projector:
                raise ConversionError(f"{projector} and --projector both hold a projector")
            self.open_projector(projector, config)
        if self.sources.merge:
            self.tensors = peft.merge_into(self.tensors, adapter)
            return adapter
        expected = keys.expected_shapes(keys.adapter_weights(config.text, adapter_config.rank))
        if left_out := sorted(set(expected) - set(adapter.tensors)):
            raise ConversionError(
                f"{folder}: an adapter that is kept must be on every linear layer of the decoder, "
                f"this one lacks {len(left_out)} tensors, {left_out[0]} for one; use --merge"
            )
        return adapter

    def open_tower(self, vision: VisionConfig) -> None:
        folder = self.sources.vision_tower
        assert folder is not None  # `vision_config` has seen to it
        if self.detect(folder) is not Kind.CLIP:
            raise ConversionError(f"{folder} is {self.detections[folder].kind.value}, not CLIP")
        checkpoint = self.open_weights(folder)
        shapes = keys.expected_shapes(keys.vision_weights(vision)) | keys.unused_of_tower(vision)
        self.add(checkpoint, Dialect.CLIP, shapes, folder, keys.clip_ignored_reason)

    def open_projector(self, path: pathlib.Path, config: LlavaConfig) -> None:
        if not path.is_file():
            raise ConversionError(f"{path} is missing")
        expected = keys.expected_shapes(keys.projector_weights(config))
        self.add(Checkpoint([self.open_bin(path)]), Dialect.LLAVA, expected, path)

    def vision_config(self, values: Mapping[str, Any], in_file: bool) -> VisionConfig:
        """Sizes of the tower: its own config's, or the published ones where the name is known."""
        folder = self.sources.vision_tower
        if folder is not None:
            if not (folder / "config.json").is_file():
                raise ConversionError(f"{folder} holds no config.json: not a CLIP directory")
            return self.read_vision_config(folder)
        if not in_file:
            raise ConversionError(
                f"{self.sources.folder} does not hold its vision tower: give the CLIP directory "
                f"({OPENAI_TOWER} for published models) as --vision_tower"
            )
        # Our exports state the sizes of their tower in a separate folder.
        exported = self.sources.folder / "vision_tower"
        is_stated = (exported / "config.json").is_file()
        if is_stated and self.read_vision_config(exported) != VisionConfig():
            raise ConversionError(
                f"{self.sources.folder} holds a vision tower of other sizes than {OPENAI_TOWER}: "
                f"add --vision_tower {exported}"
            )
        if values.get("mm_vision_tower") == SIGLIP_TOWER:
            return SIGLIP_SO400M
        tower = values.get("mm_vision_tower", values.get(VIDEO_LLAVA_TOWERS[0]))
        if tower != OPENAI_TOWER:
            raise ConversionError(
                f"the vision tower is {tower!r:.80}, of unknown sizes: give a directory with its "
                "config.json as --vision_tower"
            )
        return VisionConfig()

    def read_vision_config(self, folder: pathlib.Path) -> VisionConfig:
        check_folder(folder)
        where = folder / "config.json"
        vision = parse_tower(load_object(where), str(where))
        return with_processor(folder, LlavaConfig(vision=vision)).vision

    def add(
        self,
        checkpoint: Checkpoint,
        dialect: Dialect,
        expected: Mapping[str, tuple[int, ...]],
        where: pathlib.Path,
        leave_out: Callable[[str], str | None] = keys.ignored_reason,
    ) -> None:
        """Matches one part; a later one (a trained projector) replaces an earlier one."""
        matched = keys.assign(checkpoint.tensors, dialect, expected, str(where), leave_out)
        found = {key: StoredTensor(checkpoint, own) for key, own in matched.key_of.items()}
        _check_dtypes(found)
        self.tensors.update(found)
        self.ignored.update(matched.ignored)
        self.files += [file.path for file in checkpoint.files]

    def open_weights(self, folder: pathlib.Path) -> Checkpoint:
        """The tensors of a model directory; safetensors where there are both containers."""
        if checkpoint := open_safetensors(folder):
            return checkpoint
        if (index := folder / "pytorch_model.bin.index.json").is_file():
            self.check_pickle_allowed(index)
            return open_indexed(index, TorchFile, ".bin")
        return self.open_single(folder, ("pytorch_model.bin",))

    def unpacked(self, checkpoint: Checkpoint, values: Mapping[str, Any], where: str) -> Checkpoint:
        """See `packed.unpacked`."""
        plain = unpacked(checkpoint, values, where)
        if isinstance(plain, PackedCheckpoint) and self.sources.merge:
            raise ConversionError(
                f"{where}: the base is quantised ({plain.method}); --merge adds an adapter to an "
                "unquantised base: give that, or keep the adapter"
            )
        return plain

    def open_single(self, folder: pathlib.Path, names: tuple[str, ...]) -> Checkpoint:
        """The first of these files that exists."""
        for path in (folder / name for name in names):
            if path.is_file():
                is_safe = path.suffix == ".safetensors"
                return Checkpoint([SafetensorsFile(path) if is_safe else self.open_bin(path)])
        raise ConversionError(
            f"{folder} holds no weights: no {' and no '.join(names)}, nor safetensors"
        )

    def open_bin(self, path: pathlib.Path) -> TorchFile:
        self.check_pickle_allowed(path)
        return TorchFile(path)

    def check_pickle_allowed(self, path: pathlib.Path) -> None:
        if not self.sources.allow_pickle:
            raise ConversionError(
                f"{path} is a PyTorch pickle; if you trust where it comes from, pass "
                "--allow_pickle (it is read without being executed)"
            )

    def detect(self, folder: pathlib.Path) -> Kind:
        self.detections[folder] = detect(folder)
        return self.detections[folder].kind

    def refuse_part(self, flag: str, part: pathlib.Path | None) -> None:
        if part is not None:
            folder = self.sources.folder
            raise ConversionError(f"{folder} holds this part itself: leave {flag} out")

    def companions(self, kind: Kind) -> tuple[pathlib.Path, ...]:
        places = {name: self.sources.folder for name in TEXT_FILES}
        pixels = self.sources.folder if kind is Kind.HF else self.sources.vision_tower
        if pixels:
            places |= dict.fromkeys(_IMAGE_FILES, pixels)
        files = (folder / name for name, folder in places.items())
        return tuple(file for file in files if file.is_file())


def _check_dtypes(tensors: Mapping[str, StoredTensor]) -> None:
    for tensor in tensors.values():
        dtype = tensor.info.dtype
        if str(dtype) not in ("float32", "float16", "bfloat16"):
            raise ConversionError(
                f"{tensor.key}: dtype {dtype}; weights must be float32, float16 or bfloat16"
            )

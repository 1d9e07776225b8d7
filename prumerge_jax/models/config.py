"""Sizes of the three parts of a LLaVA: vision tower, projector, language model.

The published sizes have names (`published`), every other size is a `dataclasses.replace` away.
Shapes use the axis letters of the package: B batch, N patches, R capacity, T/S query/key length,
H heads, D width, V vocabulary, L layers.
"""

import dataclasses

MAX_STOP_IDS = 4
"""Maximum number of stop ids of a request; the jitted functions compare tokens with this many."""
NEWLINE = -2
"""In place of a visual token's index: the vector that a model has learned for the end of a row."""
ATTENTION_SUBSTITUTES = ("received", "received_wide", "mean_query", "mean_query_wide", "map")
"""What stands for CLS attention in a tower without CLS token; see `models.patch_attention`."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A CLIP or SigLIP vision transformer. The defaults are openai/clip-vit-large-patch14-336.

    Attributes:
      image_size: S; pixels beyond the last whole patch of a side are not seen.
      cls_token: whether a CLS token stands before the patches (CLIP; SigLIP has none).
      pre_norm: whether a norm comes before the first block (CLIP).
      patch_bias: whether the patch embedding has a bias (SigLIP).
      feature_layer: which hidden state the features are: -2, the input of the last block, or -1,
        its output before the final norm.
      attention: what the importance of a patch is: `cls`, or one of `ATTENTION_SUBSTITUTES` for a
        tower without CLS token.
      pooling_head: whether the weights of SigLIP's attention pooling are there, which `map` needs.
    """

    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    mlp_width: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    layer_norm_eps: float = 1e-5
    activation: str = "quick_gelu"
    pixel_mean: tuple[float, float, float] = CLIP_MEAN
    pixel_std: tuple[float, float, float] = CLIP_STD
    cls_token: bool = True
    pre_norm: bool = True
    patch_bias: bool = False
    feature_layer: int = -2
    attention: str = "cls"
    pooling_head: bool = False

    def __post_init__(self) -> None:
        if self.image_size < self.patch_size:
            raise ValueError(
                f"image_size {self.image_size} is below patch_size {self.patch_size}: not one patch"
            )
        if self.feature_layer not in (-2, -1):
            raise ValueError(f"feature_layer is {self.feature_layer}; expected -2 or -1")
        self._check_attention()
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if self.num_layers < 2:
            raise ValueError(f"num_layers is {self.num_layers}; the tower needs at least 2")

    def _check_attention(self) -> None:
        supported: tuple[str, ...] = ("cls",)
        if not self.cls_token:
            supported = ATTENTION_SUBSTITUTES if self.pooling_head else ATTENTION_SUBSTITUTES[:-1]
        if self.attention not in supported:
            raise ValueError(
                f"attention is {self.attention!r}; a tower "
                f"{'with' if self.cls_token else 'without'} CLS token"
                f"{' and without pooling head' if len(supported) == 4 else ''} supports "
                f"{', '.join(supported)}"
            )
        if self.pooling_head and (self.cls_token or self.feature_layer != -1):
            raise ValueError("pooling_head is for a tower without CLS token and feature_layer -1")

    @property
    def grid(self) -> int:
        """Patches along one side; what is left over of the image is cut off."""
        return self.image_size // self.patch_size

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.num_heads

    @property
    def num_patches(self) -> int:
        """N, the CLS token not counted."""
        return self.grid**2

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: 1 for CLS, or none."""
        return int(self.cls_token)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are slowed down for texts longer than those of pre-training.

    Attributes:
      kind: `linear` (every frequency divided by `factor`) or `llama3` (the slow ones only, Llama
        3.1; transformers `modeling_rope_utils.py`).
      factor: the divisor.
      low_freq_factor, high_freq_factor: for `llama3`: wavelengths above `original_max_positions`
        over the first are divided, below that over the second kept, between the two interpolated.
      original_max_positions: length of pre-training, for `llama3`.
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(
                f"rope_scaling kind is {self.kind!r}; expected 'linear' or 'llama3', or none"
            )
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor} is not below high_freq_factor "
                f"{self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A LLaMA, Mistral or Qwen2 decoder. The defaults are Vicuna-7B-v1.5 with llava-hf's padded
    vocabulary.

    Attributes:
      qkv_bias: whether the query, key and value projections have biases (Qwen2).
      tied_head: whether the embedding is the head too: logits are x E^T.
      rope_scaling: None for plain rotary frequencies.
      model_type: what transformers calls the decoder, for exports.
    """

    vocab_size: int = 32064
    width: int = 4096
    mlp_width: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_positions: int = 4096
    qkv_bias: bool = False
    tied_head: bool = False
    rope_scaling: RopeScaling | None = None
    model_type: str = "llama"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary positions need an even one")


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """All sizes of a LLaVA.

    `projector` is `linear`, `mlpNx_gelu` or `identity`, LLaVA's own names. `image_token_id` and
    `pad_token_id` are the ids a Hugging Face directory declares; an original LLaVA directory has
    neither, and both are None. Any of `eos_token_ids` ends an answer; `bos_token_id` is None where
    prompts begin without one (Qwen2).

    Attributes:
      family: which relative of LLaVA-1.5, a name of `prumerge_jax.families`.
      video_token_id: the id a Hugging Face directory declares for a video.
      image_newline: whether a learnt token ends every row of an image's patches (LLaVA-NeXT).
      video_tower: whether videos have a tower of their own (Video-LLaVA).
      image_grid_pinpoints: (height, width) in pixels of the resolutions that an image may be cut
        into tiles at, in the order in which ties are broken; empty where images are not cut.
      anyres_max: tiles' worth of tokens beyond which an image's features are shrunk
        (OneVision's `anyres_max_N`); None for never.
      anyres_source: whose arithmetic decides how many rows and columns of tokens remain, `hf`
        (transformers) or `original`.
      chat_template: the conversation's default, a name of `data.templates.TEMPLATES`; None
        where it is not known.
    """

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    projector: str = "mlp2x_gelu"
    image_token_id: int | None = 32000
    pad_token_id: int | None = 32001
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    family: str = "llava_1_5"
    video_token_id: int | None = None
    image_newline: bool = False
    video_tower: bool = False
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()
    anyres_max: int | None = None
    anyres_source: str = "hf"
    chat_template: str | None = "vicuna_v1"

    @property
    def most_crops(self) -> int:
        """Most crops of an image: itself, and the tiles that it may be cut into."""
        area = self.vision.image_size**2
        return 1 + max((high * wide // area for high, wide in self.image_grid_pinpoints), default=0)

    def __post_init__(self) -> None:
        if len(self.eos_token_ids) > MAX_STOP_IDS:
            raise ValueError(
                f"eos_token_ids has {len(self.eos_token_ids)} ids; at most {MAX_STOP_IDS} can stop "
                "an answer"
            )
        if self.anyres_source not in ("hf", "original"):
            raise ValueError(
                f"anyres_source is {self.anyres_source!r}; expected 'hf' or 'original'"
            )
        for pinpoint in self.image_grid_pinpoints:
            if any(side % self.vision.image_size for side in pinpoint):
                raise ValueError(
                    f"image_grid_pinpoints holds {list(pinpoint)}; expected sides that are "
                    f"multiples of {self.vision.image_size}, the tower's"
                )


def decoder_linears(text: TextConfig) -> dict[str, tuple[int, int]]:
    """Input and output width of the seven linear layers of one decoder block."""
    queries, keys = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    return {
        "q_proj": (text.width, queries),
        "k_proj": (text.width, keys),
        "v_proj": (text.width, keys),
        "o_proj": (queries, text.width),
        "gate_proj": (text.width, text.mlp_width),
        "up_proj": (text.width, text.mlp_width),
        "down_proj": (text.mlp_width, text.width),
    }


_TEXT_13B = TextConfig(
    width=5120, mlp_width=13824, num_layers=40, num_heads=40, num_kv_heads=40, head_dim=128
)
_TINY = LlavaConfig(
    vision=VisionConfig(
        image_size=56, patch_size=14, width=32, mlp_width=64, num_layers=3, num_heads=2
    ),
    text=TextConfig(
        vocab_size=32064, width=48, mlp_width=96, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=12, max_positions=1024,
    ),
)  # fmt: skip
_PUBLISHED = {
    "llava-1.5-7b": LlavaConfig(),
    "llava-1.5-13b": LlavaConfig(text=_TEXT_13B),
    "tiny": _TINY,
}


def published(name: str) -> LlavaConfig:
    """The configuration of a named size: `llava-1.5-7b`, `llava-1.5-13b` or `tiny` (for tests).

    Raises:
      ValueError: the name is not one of these.
    """
    if name not in _PUBLISHED:
        raise ValueError(f"unknown model size {name!r}; expected one of {sorted(_PUBLISHED)}")
    return _PUBLISHED[name]

"""Parameters, FLOPs and bytes of a LLaVA and of its LoRA training.

One multiply-add counts as two FLOPs, attention is causal, logits are computed at one position.
Embedding lookups, norms, activation functions and softmax are not counted.
"""

import dataclasses
from collections.abc import Sequence

from prumerge_jax.cost.bits import PLAIN, SCALE_BITS, Bits
from prumerge_jax.models.config import LlavaConfig, TextConfig, VisionConfig, decoder_linears
from prumerge_jax.models.llava import projector_depth
from prumerge_jax.reductions import Reduction, Stage

ACTIVATION_BYTES = 2
"""Bytes per number, but for quantised weights: bfloat16 or float16."""


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Numbers of weights; `total` is the complete checkpoint.

    `head` is 0 where the embedding is the head too. `vision_used` are those of `vision` that the
    penultimate features and the last block's keys and CLS query depend on: all that PruMerge needs.
    """

    vision: int
    vision_used: int
    projector: int
    newline: int
    embedding: int
    blocks: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        """The complete checkpoint, biases, norms and unused last vision block included."""
        decoder = self.embedding + self.blocks + self.norms + self.head
        return self.vision + self.projector + self.newline + decoder


def parameters(config: LlavaConfig) -> Parameters:
    """Parameter counts of each part."""
    vision, text = config.vision, config.text
    width, mlp = vision.width, vision.mlp_width
    norm = 2 * width
    linear = width**2 + width
    block = 4 * linear + (2 * width * mlp + mlp + width) + 2 * norm
    patch = (3 * vision.patch_size**2 + vision.patch_bias) * width
    positions = (vision.num_patches + vision.num_prefix) * width
    stem = vision.num_prefix * width + patch + positions + vision.pre_norm * norm
    # Of the block after the features, the norm and the projections to queries and keys.
    after = norm + 2 * linear if vision.feature_layer == -2 else 0
    towers = 1 + config.video_tower
    depth = projector_depth(config.projector)
    first, later = (width + 1) * text.width, (text.width + 1) * text.width
    return Parameters(
        vision=towers * (stem + vision.num_layers * block + norm),
        vision_used=towers * (stem + whole_blocks(vision) * block + after),
        newline=text.width * config.image_newline,
        projector=first + (depth - 1) * later if depth else 0,
        embedding=text.vocab_size * text.width,
        blocks=block_parameters(text),
        norms=(2 * text.num_layers + 1) * text.width,
        head=0 if text.tied_head else text.width * text.vocab_size,
    )


def block_parameters(text: TextConfig) -> int:
    """Number of weights in the linear layers of all decoder blocks, biases included."""
    linears = decoder_linears(text)
    biases = sum(linears[f"{name}_proj"][1] for name in "qkv") if text.qkv_bias else 0
    return text.num_layers * (sum(i * o for i, o in linears.values()) + biases)


def lora_parameters(text: TextConfig, rank: int) -> int:
    """Number of weights of adapters on all seven linear layers of every decoder block."""
    return rank * text.num_layers * sum(i + o for i, o in decoder_linears(text).values())


def whole_blocks(vision: VisionConfig) -> int:
    """Blocks of the tower up to the features."""
    return vision.num_layers + 1 + vision.feature_layer


def vision_block_flops(vision: VisionConfig, patches: int | None = None) -> int:
    """One block over CLS, if there is one, and the patches, by default all."""
    width = vision.width
    tokens = (vision.num_patches if patches is None else patches) + vision.num_prefix
    return tokens * 2 * (4 * width**2 + 2 * width * vision.mlp_width) + 4 * tokens**2 * width


def patch_embedding_flops(vision: VisionConfig) -> int:
    """The convolution that turns patches into tokens."""
    return 2 * vision.num_patches * 3 * vision.patch_size**2 * vision.width


def tower_flops(vision: VisionConfig) -> int:
    """The tower as PruMerge needs it: blocks up to the features, and the attention of CLS, or of
    all patches where there is none, with its keys and queries."""
    tokens, width = vision.num_patches + vision.num_prefix, vision.width
    queries = 1 if vision.cls_token else tokens
    attention = 2 * (tokens + queries) * width**2 + 2 * queries * vision.num_patches * width
    blocks = whole_blocks(vision) * vision_block_flops(vision)
    return blocks + patch_embedding_flops(vision) + attention


def stages_of(vision: VisionConfig, reduction: Reduction) -> tuple[Stage, ...]:
    """The merges that a reduction makes inside the tower; none for most."""
    if "groups" not in reduction.needs:
        return ()
    return reduction.stages(whole_blocks(vision), vision.num_patches)


def staged_tower_flops(vision: VisionConfig, stages: Sequence[Stage]) -> int:
    """`tower_flops` with merges inside the tower, counted from the layer after each."""
    patches, block = vision.num_patches, vision_block_flops(vision)
    saved = 0
    for number, stage in enumerate(stages):
        following = (
            stages[number + 1].layer if number + 1 < len(stages) else whole_blocks(vision) - 1
        )
        fewer = block - vision_block_flops(vision, stage.tokens)
        saved += (following - stage.layer) * fewer
        patches = stage.tokens
    last = 2 * (vision.num_patches - patches) * (vision.width**2 + vision.width)
    return tower_flops(vision) - saved - last


def tower_attention_flops(vision: VisionConfig, pairs: float) -> float:
    """Scores and weighted sum over this many (query, key) pairs per head of the tower's blocks."""
    return 4 * pairs * vision.width * whole_blocks(vision)


def merge_flops(vision: VisionConfig) -> int:
    """Key similarity and merge over all N rows: an upper bound, R of them suffice."""
    return 2 * (2 * vision.num_patches**2 * vision.width)


def projector_flops(config: LlavaConfig) -> int:
    """FLOPs per visual token."""
    depth = projector_depth(config.projector)
    width = config.text.width
    return 2 * (config.vision.width * width + (depth - 1) * width**2) if depth else 0


def prefill_flops(text: TextConfig, sequence: float) -> float:
    """The decoder over one sequence, logits at its last position."""
    matmuls = 2 * block_parameters(text) * sequence + 2 * text.width * text.vocab_size
    return matmuls + attention_flops(text, sequence * sequence / 2)


def decode_flops(text: TextConfig, context: float) -> float:
    """One token that attends to `context` tokens."""
    matmuls = 2 * (block_parameters(text) + text.width * text.vocab_size)
    return matmuls + attention_flops(text, context)


def attention_flops(text: TextConfig, pairs: float) -> float:
    """Scores and weighted sum over this many (query, key) pairs per head and layer."""
    return 4 * pairs * text.num_heads * text.head_dim * text.num_layers


def kv_bytes_per_token(text: TextConfig, bits: Bits = PLAIN) -> int:
    """Keys and values of all layers."""
    of_head = text.head_dim * bits.cache + (SCALE_BITS if bits.cache == 8 else 0)
    return 2 * text.num_layers * text.num_kv_heads * of_head // 8


def kv_bytes(text: TextConfig, tokens: int, page_size: int = 1, bits: Bits = PLAIN) -> int:
    """Keys and values of a sequence of so many tokens, in pages of so many."""
    return -(-tokens // page_size) * page_size * kv_bytes_per_token(text, bits)


def weight_bytes(config: LlavaConfig, bits: Bits = PLAIN) -> float:
    """Resident weights: the tower as PruMerge needs it, projector, embedding, decoder."""
    counts = parameters(config)
    kept = counts.vision_used + counts.projector + counts.newline
    kept += counts.embedding + counts.norms
    return ACTIVATION_BYTES * kept + decoder_bytes(config, bits)


def decoder_bytes(config: LlavaConfig, bits: Bits = PLAIN) -> float:
    """Weights that a step of decoding reads: the blocks and the head."""
    counts = parameters(config)
    return counts.blocks * bits.kernels / 8 + counts.head * ACTIVATION_BYTES


def int8_share(text: TextConfig, bits: Bits) -> float:
    """Share of the blocks' products that are of int8 numbers: all but those of `down_proj`."""
    if not bits.int8_products:
        return 0.0
    sizes = {name: i * o for name, (i, o) in decoder_linears(text).items()}
    return 1 - sizes["down_proj"] / sum(sizes.values())


def training_flops(
    config: LlavaConfig,
    visual_tokens: float,
    text_tokens: float,
    lora_rank: int,
    crops: float = 1,
) -> dict[str, float]:
    """Model FLOPs of one sample: frozen tower and decoder, trained adapters and projector.

    `base` follows the 4N convention, N = blocks + head (a tied one included): the frozen weights
    need a forward and an activation gradient but no weight gradient. Recomputed activations do not
    count. MFU is the sum of the components that a report names, over time and peak. The tower sees
    `crops` crops of a sample's image.
    """
    counts = parameters(config)
    sequence = visual_tokens + text_tokens
    return {
        "base": 4 * (counts.blocks + config.text.width * config.text.vocab_size) * sequence,
        "vision": crops * tower_flops(config.vision),
        "attention": 3 * attention_flops(config.text, sequence * sequence / 2),
        "adapters": 6 * lora_parameters(config.text, lora_rank) * sequence,
        "projector": 3 * projector_flops(config) * visual_tokens,
    }

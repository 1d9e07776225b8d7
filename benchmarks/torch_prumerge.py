"""PruMerge in PyTorch as a loop over images and tokens: the form of the reference code.

Written from the paper (arXiv 2403.15388) and the reference's documented behaviour. As there, every
kept token puts "all other tokens" together again by concatenation before it looks for its
neighbours among them.
"""

import torch

NEIGHBOURS = 32


@torch.inference_mode()
def reduce_tokens(
    hidden: torch.Tensor, keys: torch.Tensor, attention: torch.Tensor, *, spatial: bool
) -> list[torch.Tensor]:
    """Selects and merges.

    Args:
      hidden, keys: [B, N, D].
      attention: [B, N].
      spatial: whether to add the raster samples of PruMerge+.

    Returns:
      One tensor [n + 1, D] per image, the extra token last.
    """
    images = zip(hidden, keys, attention, strict=True)
    return [_reduce_image(*image, spatial=spatial) for image in images]


def _reduce_image(
    hidden: torch.Tensor, keys: torch.Tensor, attention: torch.Tensor, *, spatial: bool
) -> torch.Tensor:
    kept = _outliers(attention)
    if spatial:
        kept += _raster(len(attention), kept)
    keys = torch.nn.functional.normalize(keys, dim=-1)
    tokens = []
    for i in kept:
        other_keys = torch.cat([keys[:i], keys[i + 1 :]])
        other_hidden = torch.cat([hidden[:i], hidden[i + 1 :]])
        other_attention = torch.cat([attention[:i], attention[i + 1 :]])
        nearest = (other_keys @ keys[i]).topk(min(NEIGHBOURS, len(other_keys))).indices
        weights = other_attention[nearest, None]
        tokens.append(hidden[i] + (weights * other_hidden[nearest]).sum(0))
    pruned = [i for i in range(len(attention)) if i not in kept]
    tokens.append((attention[pruned, None] * hidden[pruned]).sum(0))
    return torch.stack(tokens)


def _outliers(attention: torch.Tensor) -> list[int]:
    """Patches above the third quartile by 1.5 interquartile ranges, most attended first."""
    q1, q3 = torch.quantile(attention, attention.new_tensor([0.25, 0.75]))
    kept = (attention > q3 + 1.5 * (q3 - q1)).nonzero()[:, 0]
    return kept[attention[kept].argsort(descending=True)].tolist()


def _raster(num_patches: int, kept: list[int]) -> list[int]:
    """Every k-th patch, k a third of the distance of equally spread kept ones."""
    stride = num_patches // len(kept) // 3
    return [i for i in range(0, num_patches - 1, stride) if i not in kept]

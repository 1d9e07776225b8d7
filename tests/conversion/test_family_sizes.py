"""The published sizes: numbers of tensors and parameters, as spelt in transformers."""

import pytest

from prumerge_jax import families
from prumerge_jax.conversion import keys
from prumerge_jax.cost.counts import parameters

PUBLISHED = {
    "llava-next-vicuna-7b": (687, 7_063_431_168),
    "llava-next-vicuna-13b": (759, 13_351_499_776),
    "llava-next-mistral-7b": (687, 7_566_747_648),
    "llava-next-llama3-8b": (687, 8_355_276_800),
    "llava-onevision-0.5b": (716, 893_675_552),
    "llava-onevision-7b": (765, 8_030_807_584),
    "video-llava-7b": (1077, 7_366_279_168),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensors_and_parameters(name: str) -> None:
    config = families.published(name)
    tensors = keys.expected_shapes(keys.weights(config)) | keys.unused_tower_tensors(config)
    count, total = PUBLISHED[name]
    assert len(tensors) == count
    assert parameters(config).total == total


def test_every_family_has_sizes_of_its_own() -> None:
    for family in families.FAMILIES.values():
        for config in family.sizes.values():
            assert families.family_of(config) is family
    with pytest.raises(ValueError, match="unknown model size 'llava-2'.*llava-onevision-0.5b"):
        families.published("llava-2")

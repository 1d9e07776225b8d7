"""Prompts of an evaluation as one string."""

from prumerge_jax.data.templates import Template, evaluation_parts, joined
from prumerge_jax.data.tokens import IMAGE_PLACEHOLDER


def evaluation_prompt(template: Template, text: str, has_image: bool = True) -> str:
    """The prompt that asks `text`, with or without one image, as markup."""
    return joined(evaluation_parts(template, text, [IMAGE_PLACEHOLDER] * has_image))

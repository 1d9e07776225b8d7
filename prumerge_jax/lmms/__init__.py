"""The plug-in for lmms-eval, which finds it by its entry point: `--model prumerge_jax`."""

from typing import Any


def manifest() -> Any:
    """What lmms-eval is told; it imports the classes when they are used."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="prumerge_jax",
        simple_class_path="prumerge_jax.lmms.models.PruMergeSimple",
        chat_class_path="prumerge_jax.lmms.models.PruMergeChat",
    )

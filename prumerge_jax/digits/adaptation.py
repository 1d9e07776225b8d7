"""What an adapter changes in how the decoder looks at an image: attention before and after.

    python -m prumerge_jax.cli.checks --check adaptation --workdir DIR

Of the last token of every prompt, layer by layer: the share of its attention that visual tokens
get, and how many times more of that the digits' patches get than there are of them.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from prumerge_jax import reductions
from prumerge_jax.digits.benchmark import Digits
from prumerge_jax.digits.compare import Asked, draw, question_requests
from prumerge_jax.engine.kept import kept_patches
from prumerge_jax.engine.request import Answer
from prumerge_jax.engine.shapes import EngineConfig
from prumerge_jax.llava import Llava


@dataclasses.dataclass(frozen=True)
class Looks:
    """Attention of one model with one reduction, [L] each, means over questions.

    Attributes:
      visual: share that visual tokens get.
      evidence: of that share, what patches with ink get over the share of the visual tokens that
        they are; 1 is no preference. NaN where tokens are no patches.
    """

    visual: np.ndarray
    evidence: np.ndarray


def compare_models(
    checkpoints: Sequence[str], spellings: str, *, split: str, scenes: int, output: pathlib.Path
) -> dict[str, dict[str, Looks]]:
    """Prints the table of two models, and writes it as JSON.

    Args:
      checkpoints: the model before and the one after.
      spellings: reductions, separated by spaces.
      split, scenes: which questions are asked.
      output: file to write.

    Raises:
      ValueError: other than two checkpoints, a reduction that cannot be probed, or a question that
        cannot be asked.
    """
    if len(checkpoints) != 2:
        raise ValueError(f"{len(checkpoints)} checkpoints; expected two, before and after")
    asked, names = draw(split, scenes), list(reductions.parse_list(spellings))
    found: dict[str, dict[str, Looks]] = {name: {} for name in names}
    for checkpoint in checkpoints:
        model = Llava.load(checkpoint, engine=EngineConfig(share_prefixes=False))
        for name in names:
            found[name][checkpoint] = looks(model, asked, name)
    print(table(found), flush=True)
    stored = {
        name: {
            checkpoint: {"visual": own.visual.tolist(), "evidence": own.evidence.tolist()}
            for checkpoint, own in each.items()
        }
        for name, each in found.items()
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(stored, indent=1))
    return found


def looks(model: Llava, asked: Asked, name: str) -> Looks:
    """Where the last token of every question looks."""
    drafts, requests = question_requests(model, asked)
    engine = model.engine(
        name, drafts, max_new_tokens=Digits.max_new_tokens, position_ids="original"
    )
    visual, evidence = [], []
    with model.placed():
        kept = kept_patches(engine, requests)
        for result in engine.attention(requests):
            if isinstance(result, Answer):
                raise ValueError(f"question {result.key}: {result.error}")
            on_image = result.values[:, result.is_visual]
            visual.append(on_image.sum(1))
            length, patches = kept[result.key]
            scene = asked.scene_of[result.key]
            if len(patches) == length:
                ink = has_ink(scene.ink, model.config.vision.patch_size)[patches]
                if 0 < ink.sum() < length:
                    share = on_image[:, ink].sum(1) / on_image.sum(1)
                    evidence.append(share / ink.mean())
    nothing = np.full(len(visual[0]), np.nan)
    return Looks(np.mean(visual, 0), np.mean(evidence, 0) if evidence else nothing)


def has_ink(ink: np.ndarray, patch_size: int) -> np.ndarray:
    """Which patches have ink of a digit, [N] bool; `ink` as in `Scene.ink`."""
    side = len(ink) // patch_size
    return (ink > 0).reshape(side, patch_size, side, patch_size).any((1, 3)).reshape(-1)


def table(found: Mapping[str, Mapping[str, Looks]]) -> str:
    """One line per reduction and layer: before, after, of both figures."""
    names = next(iter(found.values()))
    columns = [
        f"{figure}, {name}" for figure in ("on the image %", "on digits x") for name in names
    ]
    widths = [max(len(column), 8) for column in columns]
    lines = ["  ".join([f"{'reduction':24} layer", *columns])]
    for reduction, each in found.items():
        for layer in range(len(next(iter(each.values())).visual)):
            values = [100 * own.visual[layer] for own in each.values()]
            values += [own.evidence[layer] for own in each.values()]
            cells = [f"{v:{w}.2f}" for v, w in zip(values, widths, strict=True)]
            lines.append("  ".join([f"{reduction:24} {layer:5}", *cells]))
    return "\n".join(lines)

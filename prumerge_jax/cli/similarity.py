"""Prints how alike consecutive frames of videos are, to choose `temporal` of PruMerge by.

python -m prumerge_jax.cli.similarity --checkpoint DIR --videos DIR
    [--taus "0.7 0.8 0.9 0.95"] [--reduction prumerge] [--frames 8] [--limit 100]

A histogram of the cosine between a patch and the one at its place in the frame before, as
`temporal=tau` compares them, and for every tau the share of the patches that it would merge away
and the visual tokens that a video would have. The videos need no questions: files, animated GIFs
and folders of frames.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

from prumerge_jax.cli import command_line
from prumerge_jax.messages import quoted

EDGES = (*(n / 10 for n in range(9)), 0.85, 0.9, 0.925, 0.95, 0.975, 0.99)
"""Where the bins of the histogram begin; one more is below them."""
BAR = 50
"""Length in characters of the bar of all patches."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program."""
    command_line.run(_main, argv)


def _flags() -> flags.FlagValues:
    values = command_line.strings(
        ("checkpoint", None, "model directory of a model that takes videos"),
        ("videos", None, "folder of videos, without labels"),
        ("taus", "0.6 0.7 0.8 0.9 0.95", "values of temporal, separated by spaces"),
        ("reduction", "prumerge", "what else happens to the frames: PruMerge, any preset"),
    )
    for name, default, meaning in (
        ("frames", None, "frames that are taken of a video; default: the model's"),
        ("limit", 100, "videos to read at most"),
    ):
        flags.DEFINE_integer(name, default, meaning, lower_bound=1, flag_values=values)
    return values


def _main(argv: Sequence[str]) -> None:
    values = _flags()
    command_line.parse(argv, values, __doc__)
    command_line.require(values, "checkpoint", "videos", "taus")
    videos = _videos(pathlib.Path(values.videos))[: values.limit]
    taus = _taus(values.taus)
    # These take seconds to import; a mistyped flag is answered before.
    from prumerge_jax import reductions
    from prumerge_jax.data.images import VideoFile
    from prumerge_jax.evaluation.similarity import frame_similarity
    from prumerge_jax.llava import Llava
    from prumerge_jax.reductions.prumerge import PruMerge

    rule = reductions.parse(values.reduction)
    if not isinstance(rule, PruMerge) or not rule.selects_patches:
        raise ValueError(
            f"--reduction {quoted(values.reduction)}: expected PruMerge, which `temporal` is of"
        )
    rules = [dataclasses.replace(rule, temporal=tau) for tau in (None, *taus)]
    model = Llava.load(values.checkpoint)
    found = [
        frame_similarity(model, VideoFile(path, values.frames), rules, str(path)) for path in videos
    ]
    cosine = np.stack([each.cosine for each in found])
    tokens = np.mean([each.tokens for each in found], axis=0)
    print("\n".join(lines(cosine, tokens, taus)))


def lines(cosine: np.ndarray, tokens: np.ndarray, taus: Sequence[float]) -> list[str]:
    """The histogram and the table.

    Args:
      cosine: [V, F - 1, N], of V videos.
      tokens: [1 + T], mean visual tokens of a video, at first without merging over time.
      taus: T values.
    """
    videos, later, patches = cosine.shape
    shown = [
        f"{videos} videos of {later + 1} frames with {patches} patches; cosine of a patch and the "
        "one at its place in the frame before:"
    ]
    bins = np.digitize(cosine.reshape(-1), np.array(EDGES, np.float32))
    counts = np.bincount(bins, minlength=len(EDGES) + 1)
    starts = ("below", *(f"{edge:.3f}" for edge in EDGES))
    for start, count in zip(starts, counts, strict=True):
        share = count / max(cosine.size, 1)
        shown.append(f"{start:>6}{100 * share:7.1f} %  {'#' * round(BAR * share)}".rstrip())
    shown.append(f"{'tau':>6}{'merged away':>14}{'tokens per video':>19}")
    total = videos * (later + 1) * patches
    for tau, count in zip((None, *taus), tokens, strict=True):
        away = 0 if tau is None else np.count_nonzero(cosine >= tau)
        name = "none" if tau is None else f"{tau:g}"
        shown.append(f"{name:>6}{100 * away / total:12.1f} %{count:19.1f}")
    return shown


def _taus(text: str) -> list[float]:
    try:
        taus = [float(part) for part in text.split()]
    except ValueError:
        taus = []
    if not taus or not all(0 <= tau <= 2 for tau in taus):
        raise ValueError(f"--taus {quoted(text)}: expected numbers from 0 to 2, as '0.8 0.9'")
    return taus


def _videos(folder: pathlib.Path) -> list[pathlib.Path]:
    """The videos of a folder by name: what does not begin with a dot."""
    if not folder.is_dir():
        raise ValueError(f"--videos {folder}: no such folder")
    videos = sorted(each for each in folder.iterdir() if not each.name.startswith("."))
    if not videos:
        raise ValueError(
            f"--videos {folder}: nothing in it; expected video files, GIFs or folders of frames"
        )
    return videos


if __name__ == "__main__":
    main()

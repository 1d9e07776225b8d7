"""`python -m prumerge_jax.cli.similarity`: by what `temporal` of PruMerge is chosen."""

import dataclasses
import pathlib

import numpy as np
import pytest
from PIL import Image

from prumerge_jax.cli import similarity
from tests.tiny_llava import CONFIG, write_tiny_llava

VIDEO = dataclasses.replace(
    CONFIG, family="video_llava", video_tower=True, chat_template="llava_v1"
)


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        similarity.main(["similarity.py", *arguments])
    assert not ended.value.code, ended.value.code


@pytest.mark.slow
def test_what_stays_still_is_merged_away(tmp_path: pathlib.Path, capsys) -> None:
    model = write_tiny_llava(tmp_path / "tiny", VIDEO)
    still = tmp_path / "videos" / "still"
    still.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(still / "0.png")
    run(f"--checkpoint={model}", f"--videos={still.parent}", "--taus=0.9 2")
    first, *bins, head, none, merged, apart = capsys.readouterr().out.splitlines()
    assert first.startswith(f"1 videos of 8 frames with {CONFIG.vision.num_patches} patches")
    assert len(bins) == len(similarity.EDGES) + 1
    assert bins[-1].split() == ["0.990", "100.0", "%", "#" * similarity.BAR]
    assert all(" 0.0 %" in each for each in bins[:-1])
    assert head.split()[0] == "tau"
    # Of 8 frames the last 7 are merged away, and with them 7 of 8 tokens.
    tokens = float(none.split()[-1])
    assert tokens > 8
    assert merged.split() == ["0.9", "87.5", "%", f"{tokens / 8:.1f}"]
    assert apart.split() == ["2", "0.0", "%", f"{tokens:.1f}"]


def test_the_histogram_and_the_shares_of_all_patches() -> None:
    cosine = np.array([[[0.95, 0.5, -np.inf, 0.8]], [[0.81, 0.79, 1.0, -0.2]]], np.float32)
    shown = similarity.lines(cosine, np.array([9.0, 4.5]), [0.8])
    assert shown[0].startswith("2 videos of 2 frames with 4 patches")
    shares = {line.split()[0]: line.split()[1] for line in shown[1:-3]}
    found = {start: share for start, share in shares.items() if share != "0.0"}
    assert found == {
        "below": "25.0", "0.500": "12.5", "0.700": "12.5", "0.800": "25.0", "0.950": "12.5",
        "0.990": "12.5",
    }  # fmt: skip
    assert shown[-2].split() == ["none", "0.0", "%", "9.0"]
    assert shown[-1].split() == ["0.8", "25.0", "%", "4.5"]  # 4 of 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--videos=docs"], "--checkpoint is missing"),
        (["--checkpoint=miniature", "--videos=nowhere"], "no such folder"),
        (["--checkpoint=miniature", "--videos=docs", "--taus=0.8,0.9"], "expected numbers from 0"),
        (["--checkpoint=miniature", "--videos=docs", "--taus=3"], "expected numbers from 0 to 2"),
        (["--checkpoint=miniature", "--videos=docs", "--reduction=top"], "expected PruMerge"),
        (["--checkpoint=miniature", "--videos=docs", "--frames=0"], "frames"),
        (["--checkpoint=miniature", "--videos=docs"], "a video; the model takes images alone"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message) as error:
        similarity.main(["similarity.py", *arguments])
    assert "\n" not in str(error.value)

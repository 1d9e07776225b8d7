"""Host preprocessing alone: JPEG files to the pixels that the engine takes.

    python benchmarks/preprocess.py
    python benchmarks/preprocess.py --width 1024 --height 768 --mode crop

First the steps on one core, in this process and in processor time, so that other jobs do not count:
decoding; padding or cropping with the resize; both. Then the stream that evaluation reads, with 1,
2, ... worker processes, in wall-clock time from the moment all of them are at work.

`ms` is per image and of this process alone: for the stream it is what taking over the workers'
results costs, which bounds the rate however many workers there are. `over_one_worker` is the rate
over that of the stream with one worker. The last line compares with the images that an accelerator
can take at most, by the cost model.
"""

import argparse
import io
import itertools
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from measuring import add_arguments, report
from PIL import Image

from prumerge_jax.cost import CHIPS, Workload, images_per_second
from prumerge_jax.data.images import CLIP_MEAN, ImageMode, ImageProcessor, load_image, preprocess
from prumerge_jax.data.loading import Named, stream_pixels
from prumerge_jax.families import published

SIZE = published("llava-1.5-7b").vision.image_size
IMAGES = 16
QUALITY = 90  # of the JPEG files


def jpeg(width: int, height: int, rng: np.random.Generator) -> bytes:
    """Smooth colours with fine noise: decodes about as fast as a photograph of this size."""
    coarse = rng.integers(0, 256, (height // 32 + 1, width // 32 + 1, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth) + rng.normal(0, 8, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def processor_ms(work: Callable[[pathlib.Path], object], paths: Sequence[pathlib.Path]) -> float:
    """Milliseconds per image of this process's processor time, median over the images."""
    times = []
    for path in paths:
        start = time.process_time()
        work(path)
        times.append(time.process_time() - start)
    return 1e3 * float(np.median(times))


def named(paths: Sequence[pathlib.Path]) -> Iterator[Named]:
    """The images again and again, under new names: the stream decodes a name only once."""
    for number, path in enumerate(itertools.cycle(paths)):
        yield f"request {number}", path


def stream(
    paths: Sequence[pathlib.Path], expected: Sequence[np.ndarray], images: int, mode: ImageMode,
    workers: int,
) -> tuple[float, float]:  # fmt: skip
    """Images per second of the stream, and milliseconds of this process per image.

    Raises:
      ValueError: the pixels are not those that this process computes.
    """
    ahead = 16 * workers
    warm_up = 2 * ahead  # the last worker starts while the first ones are at work
    pixels = stream_pixels(
        itertools.islice(named(paths), warm_up + images),
        ImageProcessor(SIZE, CLIP_MEAN, mode), num_workers=workers, ahead=ahead,
    )  # fmt: skip
    for number, array in enumerate(itertools.islice(pixels, warm_up)):
        known = expected[number % len(expected)]
        if not isinstance(array, np.ndarray) or not np.array_equal(array, known):
            raise ValueError(f"{paths[number % len(paths)]}: a worker's pixels differ from ours")
    start, start_processor = time.perf_counter(), time.process_time()
    for _ in pixels:
        pass
    seconds = time.perf_counter() - start
    return images / seconds, 1e3 * (time.process_time() - start_processor) / images


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the images, times the steps and the streams, and reports."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--mode", default="pad", choices=("pad", "crop"))
    parser.add_argument("--images", type=int, default=500, help="timed, per number of workers")
    parser.add_argument("--most_workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--visual_tokens", type=float, default=144, help="per image")
    parser.add_argument("--text_tokens", type=int, default=60)
    parser.add_argument("--chip", default="h100", choices=sorted(CHIPS), help="to be fed")
    parser.add_argument("--chip_cores", type=int, default=16, help="of the machine that feeds it")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    mode: ImageMode = arguments.mode

    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        paths = []
        for number in range(IMAGES):
            paths.append(pathlib.Path(folder) / f"{number}.jpg")
            paths[-1].write_bytes(jpeg(arguments.width, arguments.height, rng))
        images = {path: load_image(path) for path in paths}
        expected = [preprocess(image, SIZE, mode) for image in images.values()]
        steps: dict[str, Callable[[pathlib.Path], object]] = {
            "decode": load_image,
            f"{mode}, resize": lambda path: preprocess(images[path], SIZE, mode),
            "one core": lambda path: preprocess(load_image(path), SIZE, mode),
        }
        ms = {name: processor_ms(work, paths * arguments.repeats) for name, work in steps.items()}
        counts = range(1, arguments.most_workers + 1)
        streams: dict[int, list[tuple[float, float]]] = {workers: [] for workers in counts}
        for _ in range(arguments.repeats):
            for workers in counts:
                streams[workers].append(stream(paths, expected, arguments.images, mode, workers))

    rates = {name: (1e3 / step_ms, step_ms) for name, step_ms in ms.items()}
    for workers, runs in streams.items():
        rate, parent_ms = np.median(runs, axis=0).tolist()
        rates[f"{workers} workers"] = rate, parent_ms
    one_worker = rates["1 workers"][0]
    results: list[dict[str, Any]] = [
        {"arm": arm, "images_per_s": rate, "ms": own_ms, "over_one_worker": rate / one_worker}
        for arm, (rate, own_ms) in rates.items()
    ]
    report("preprocess", arguments, results, notes=[feeding(1e3 / ms["one core"], arguments)])


def feeding(per_core: float, arguments: argparse.Namespace) -> str:
    """What the accelerator needs against what its host's cores give."""
    workload = Workload(arguments.visual_tokens, arguments.text_tokens, batch=32)
    need = images_per_second(published("llava-1.5-7b"), workload, CHIPS[arguments.chip])
    given = arguments.chip_cores * per_core
    return (
        f"LLaVA-1.5-7B at {arguments.visual_tokens:g} visual tokens and the datasheet peaks of one "
        f"{arguments.chip}: at most {need:.0f} images/s; {arguments.chip_cores} such cores prepare "
        f"{given:.0f}, {given / need:.2g} times the need"
    )


if __name__ == "__main__":
    main()

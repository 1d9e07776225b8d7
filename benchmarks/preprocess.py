"""Host preprocessing alone: JPEG files to the pixels that the engine takes.

    python benchmarks/preprocess.py
    python benchmarks/preprocess.py --width 1024 --height 768 --mode crop

First the steps on one core, in this process and in processor time, so that other jobs do not count:
decoding; padding or cropping with the resize; both; what training does with a sample: its file is
read, its pixels are made, a conversation of about `--training_text_tokens` is tokenised and
labelled. Then the stream that evaluation reads, with 1, 2, ... worker processes, in wall-clock time
from the moment all of them are at work, and the one that training reads (`training, N workers`), by
grain's workers; `packing` places such samples in rows.

`ms` is per image and of this process alone: for a stream it is what taking over the workers'
results costs, which bounds the rate however many workers there are. `over_one_worker` is the rate
over that of the same stream with one worker. The last lines compare with the images that an
accelerator can take at most, by the cost model, and with the samples that the hosts of TPU slices
train on at `--utilisation`: the ratio, or how many such cores it takes.
"""

import argparse
import io
import itertools
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from measuring import add_arguments, begin, progress, report
from PIL import Image
from prefill import packed_rows

from prumerge_jax.conversion.miniature import model_directory
from prumerge_jax.cost import CHIPS, Workload, images_per_second, training_flops
from prumerge_jax.data import pipeline
from prumerge_jax.data.images import CLIP_MEAN, ImageMode, ImageProcessor, load_image, preprocess
from prumerge_jax.data.loading import Named, stream_pixels
from prumerge_jax.data.pipeline import Preprocessor
from prumerge_jax.data.samples import Sample
from prumerge_jax.data.templates import chat_template
from prumerge_jax.data.tokenizer import load_tokenizer, tokenizer_file
from prumerge_jax.families import published

SIZE = published("llava-1.5-7b").vision.image_size
IMAGES = 16
BATCH = 16  # samples that grain's workers hand over together
WORD = "north 3 yes, "  # of the miniature's vocabulary
TRAINING_HOSTS = {"tpu-v5e": (4, 56), "tpu-v6e": (8, 90)}
"""Chips and cores of a host of a slice: ct5lp-hightpu-4t, ct6e-standard-8t, two vCPUs a core."""
QUALITY = 90  # of the JPEG files


def jpeg(width: int, height: int, rng: np.random.Generator) -> bytes:
    """Smooth colours with fine noise: decodes about as fast as a photograph of this size."""
    coarse = rng.integers(0, 256, (height // 32 + 1, width // 32 + 1, 3), np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth) + rng.normal(0, 8, (height, width, 3))
    file = io.BytesIO()
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def processor_ms(work: Callable[[Any], object], items: Iterable[Any]) -> float:
    """Milliseconds per item of this process's processor time, median over the items."""
    times = []
    for item in items:
        start = time.process_time()
        work(item)
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


class Reader:
    """Reads a row of the training data as `Records.to_sample` does; picklable."""

    def __init__(self, text: str) -> None:
        self.turns = [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": text},
        ]

    def __call__(self, path: str) -> Sample:
        """The sample about an image file."""
        return {"id": path, "image": pathlib.Path(path).read_bytes(), "conversations": self.turns}


def training_rows(
    paths: Sequence[pathlib.Path], text_tokens: int
) -> grain.MapDataset[pipeline.Example]:
    """An epoch of conversations about the images, made when they are asked for."""
    tokenizer = load_tokenizer(tokenizer_file(model_directory("miniature")))
    text = WORD * (text_tokens // len(tokenizer.encode(WORD)))
    preprocess = Preprocessor(
        tokenizer, chat_template("vicuna_v1"), ImageProcessor(SIZE, CLIP_MEAN), "prumerge"
    )
    return pipeline.examples([str(path) for path in paths], preprocess, to_sample=Reader(text))


def training_stream(
    rows: grain.MapDataset[pipeline.Example], samples: int, workers: int
) -> tuple[float, float]:
    """Samples per second of grain's stream, and milliseconds of this process per sample."""
    batches = pipeline.grouped(pipeline.stream(rows, seed=0), BATCH)
    stream = pipeline.read(batches, num_workers=workers)
    for _ in range(4 * workers):  # until all of them are at work
        next(stream)
    start, start_processor = time.perf_counter(), time.process_time()
    for _ in range(-(-samples // BATCH)):
        next(stream)
    seconds = time.perf_counter() - start
    number = -(-samples // BATCH) * BATCH
    return number / seconds, 1e3 * (time.process_time() - start_processor) / number


def packing_ms(visual_tokens: int, text_tokens: int) -> float:
    """Milliseconds of processor time to place a sample in a row."""
    times, samples = [], 0
    for _ in range(5):
        start = time.process_time()
        _, samples = packed_rows(visual_tokens, text_tokens, 2048, 32)
        times.append(time.process_time() - start)
    return 1e3 * float(np.median(times)) / samples


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the images, times the steps and the streams, and reports."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--mode", default="pad", choices=("pad", "crop"))
    parser.add_argument("--images", type=int, default=200, help="timed, per number of workers")
    parser.add_argument("--most_workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--training_text_tokens", type=int, default=200, help="per sample")
    parser.add_argument("--utilisation", type=float, default=0.5, help="of a TPU, in training")
    parser.add_argument("--visual_tokens", type=float, default=144, help="per image")
    parser.add_argument("--text_tokens", type=int, default=60)
    parser.add_argument("--chip", default="h100", choices=sorted(CHIPS), help="to be fed")
    parser.add_argument("--chip_cores", type=int, default=16, help="of the machine that feeds it")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    begin("preprocess", __doc__, minutes=1)
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
        text, trained = arguments.training_text_tokens, {}
        rows = training_rows(paths, text)
        indices = [*range(IMAGES)] * arguments.repeats
        ms["training, one core"] = processor_ms(rows.__getitem__, indices)
        counts = range(1, arguments.most_workers + 1)
        streams: dict[int, list[tuple[float, float]]] = {workers: [] for workers in counts}
        for _ in range(arguments.repeats):
            for workers in counts:
                streams[workers].append(stream(paths, expected, arguments.images, mode, workers))
                progress(f"{workers} workers: {streams[workers][-1][0]:.0f} images/s")
        if not flags.FLAGS.is_parsed():
            flags.FLAGS(sys.argv[:1])  # grain's workers ask for it
        for workers in counts:
            trained[workers] = training_stream(rows, arguments.images, workers)
            progress(f"training, {workers} workers: {trained[workers][0]:.0f} samples/s")

    rates = {name: (1e3 / step_ms, step_ms) for name, step_ms in ms.items()}
    for workers, runs in streams.items():
        rate, parent_ms = np.median(runs, axis=0).tolist()
        rates[f"{workers} workers"] = rate, parent_ms
    for workers, measured in trained.items():
        rates[f"training, {workers} workers"] = measured
    pack = packing_ms(int(arguments.visual_tokens), text)
    rates["packing"] = 1e3 / pack, pack
    ones = {True: rates["training, 1 workers"][0], False: rates["1 workers"][0]}
    results: list[dict[str, Any]] = [
        {
            "arm": arm,
            "images_per_s": rate,
            "ms": own_ms,
            "over_one_worker": rate / ones[arm.startswith("training")],
        }
        for arm, (rate, own_ms) in rates.items()
    ]
    in_one_process = max(parent_ms for _, parent_ms in trained.values()) + pack
    notes = [feeding(1e3 / ms["one core"], arguments)]
    per_core = 1e3 / ms["training, one core"]
    notes += [training(host, per_core, 1e3 / in_one_process, arguments) for host in TRAINING_HOSTS]
    report("preprocess", arguments, results, notes=notes)


def training(host: str, per_core: float, most: float, arguments: argparse.Namespace) -> str:
    """What the training of a TPU host needs against what its cores give.

    Args:
      host: of `TRAINING_HOSTS`.
      per_core: samples per second of a core that does nothing else.
      most: samples per second that the main process takes over and packs.
      arguments: the flags.
    """
    chips, cores = TRAINING_HOSTS[host]
    flops = training_flops(
        published("llava-1.5-7b"), arguments.visual_tokens, arguments.training_text_tokens, 128
    )
    need = chips * CHIPS[host].flops * arguments.utilisation / sum(flops.values())
    given = min(cores * per_core, most)
    enough = f"{given / need:.2g} times the need"
    if given < 2 * need:
        enough += f"; twice the need takes {2 * need / per_core:.0f} cores"
        if most < 2 * need:
            enough += f" and a main process that is {2 * need / most:.2g} times as fast"
    return (
        f"LoRA of 7B on a host of {chips} {host} at {arguments.utilisation:.0%} of the peak "
        f"trains on {need:.0f} samples/s; {cores} such cores prepare {given:.0f}, {enough}"
    )


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

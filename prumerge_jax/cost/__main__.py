"""Prints the roofline times of a model on a chip: floors, not forecasts."""

import argparse
import dataclasses
from collections.abc import Sequence

from prumerge_jax.cost import counts
from prumerge_jax.cost.bits import Bits
from prumerge_jax.cost.roofline import CHIPS, Chip, Workload, floor_seconds, operations
from prumerge_jax.families import published
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.quantisation import FORMATS

VISUAL_TOKENS = (576, 144, 40)
BATCHES = (1, 8, 32)
OUTPUT_TOKENS = (1, 8, 32)
PAGE_SIZE = 32


def floor_lines(
    config: LlavaConfig,
    chip: Chip,
    text_tokens: int,
    bits: Bits,
    questions_per_image: int = 1,
) -> list[str]:
    """Roofline times per question, from the vision tower to the last output token."""
    asked = ""
    if questions_per_image > 1:
        asked = f", {questions_per_image} questions share each image"
    lines = [
        f"{chip.flops / 1e12:.0f} TFLOP/s, {chip.bandwidth / 1e12:.2f} TB/s, {text_tokens} text "
        f"tokens, {bits.kernels:g} bits per weight of the decoder's layers"
        f"{', products of int8 numbers' if bits.int8_products else ''}, {bits.cache} per number of "
        f"keys and values{asked}; "
        "ms per question at 1 to 32 output tokens:",
        f"{'batch':>5}{'visual':>8}{'vision+merge':>14}{'prefill':>16}"
        + "".join(f"{f'{n} out':>11}" for n in OUTPUT_TOKENS)
        + f"   questions/s at {' / '.join(map(str, OUTPUT_TOKENS))} out",
    ]
    for batch in BATCHES:
        for visual in VISUAL_TOKENS:
            workload = Workload(
                visual,
                text_tokens,
                batch,
                bits=bits,
                questions_per_image=questions_per_image,
            )
            seconds = floor_seconds(config, workload, chip)
            bound = operations(config, workload)["prefill"][0].bound(chip)
            totals = []
            for tokens in OUTPUT_TOKENS:
                longer = dataclasses.replace(workload, output_tokens=tokens)
                totals.append(sum(floor_seconds(config, longer, chip).values()) / batch)
            vision = 1e3 * (seconds["vision"] + seconds["merge"]) / batch
            prefill = f"{1e3 * seconds['prefill'] / batch:.2f} {bound}"
            lines.append(
                f"{batch:>5}{visual:>8}{vision:>14.2f}{prefill:>16}"
                + "".join(f"{1e3 * total:>11.2f}" for total in totals)
                + "   "
                + " / ".join(f"{1 / total:.0f}" for total in totals)
            )
    return lines


def page_lines(config: LlavaConfig, text_tokens: int, bits: Bits) -> list[str]:
    """What a sequence's keys and values take in pages, at its longest."""
    lines = []
    for visual in VISUAL_TOKENS:
        tokens = visual + text_tokens + max(OUTPUT_TOKENS)
        size = counts.kv_bytes(config.text, tokens, PAGE_SIZE, bits) / 1e6
        lines.append(
            f"{visual} visual tokens: keys and values of {tokens} tokens in pages of {PAGE_SIZE}: "
            f"{size:.0f} MB a sequence"
        )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table of floors."""
    parser = argparse.ArgumentParser(prog="python -m prumerge_jax.cost", description=__doc__)
    parser.add_argument("--model", default="llava-1.5-7b", help="a published size")
    parser.add_argument("--chip", default="h100", choices=sorted(CHIPS))
    parser.add_argument("--text_tokens", type=int, default=60, help="prompt tokens per request")
    parser.add_argument(
        "--quantize", choices=sorted(FORMATS), help="format of the decoder's kernels"
    )
    parser.add_argument("--cache_dtype", choices=("int8",), help="dtype of keys and values")
    parser.add_argument(
        "--questions_per_image", type=int, default=1, help="that share what is in front of them"
    )
    parser.add_argument(
        "--compute_fraction",
        type=float,
        default=790 / 989,
        help="assumed achievable share of peak FLOP/s (default: 790 of 989 TFLOP/s)",
    )
    parser.add_argument(
        "--bandwidth_fraction",
        type=float,
        default=3.0 / 3.35,
        help="assumed achievable share of peak bandwidth (default: 3.0 of 3.35 TB/s)",
    )
    arguments = parser.parse_args(argv)
    config = published(arguments.model)
    chip = CHIPS[arguments.chip].achievable(
        arguments.compute_fraction, arguments.bandwidth_fraction
    )
    bits = Bits.of(arguments.quantize, arguments.cache_dtype)
    print(f"Floors of {arguments.model} on one {arguments.chip}, assumed achievable:")
    for line in page_lines(config, arguments.text_tokens, bits):
        print(line)
    for line in floor_lines(
        config,
        chip,
        arguments.text_tokens,
        bits,
        arguments.questions_per_image,
    ):
        print(line)


if __name__ == "__main__":
    main()

"""Prints the paper's efficiency table recomputed and the floors of a model on a chip."""

import argparse
import dataclasses
import itertools
from collections.abc import Sequence

from prumerge_jax.cost import efficiency_table
from prumerge_jax.cost.roofline import CHIPS, Chip, Workload, floor_seconds, operations
from prumerge_jax.models.config import LlavaConfig, published

VICUNA_VOCABULARY = 32000
VISUAL_TOKENS = (576, 144, 40)
BATCHES = (1, 8, 32)
OUTPUT_TOKENS = (1, 8, 32)


def efficiency_lines(text_tokens: int) -> list[str]:
    """The paper's table: at the text lengths that explain it, then at a constant one."""
    lines = [
        "The paper's efficiency table (arXiv 2403.15388, Table 2), recomputed; paper in brackets.",
        "Language model only, prefill, batch 1, V100: 112 TFLOP/s at 16 bit, 62 TOP/s at 8 and 4",
        "bit, 900 GB/s; per-operator roofline with the attention scores in memory; weights,",
        "activations and KV of equal width. 'moved' is all memory traffic (the paper's total",
        "memory), 'stored' all activations written. The paper's FLOPs are operations x bits / 16.",
        "No tower, projector, PruMerge or decoding.",
    ]
    header = (
        f"{'model':<14}{'bits':>5}{'visual + text':>15}{'T operations':>14}"
        f"{'x bits / 16':>16}{'ms':>16}{'GB moved':>14}{'GB stored':>15}"
    )
    inferred = efficiency_table.INFERRED_TEXT_TOKENS
    rows = list(itertools.product(inferred, (16, 8, 4), (0, 1)))
    lines += ["", "Text lengths inferred from the paper's figures (its two rows differ):", header]
    for model, bits, row in rows:
        paper = efficiency_table.PUBLISHED.get((model, bits))
        text = inferred[model][row]
        lines.append(_efficiency_line(model, bits, row, text, paper[row] if paper else None))
    lines += ["", f"The same text in both rows, {text_tokens} tokens:", header]
    for model, bits, row in rows:
        lines.append(_efficiency_line(model, bits, row, text_tokens, None))
    for model in inferred:
        full, merged = (
            _recomputed(model, 16, visual + text_tokens)
            for visual in efficiency_table.VISUAL_TOKENS
        )
        lines.append(
            f"{model} at 16 bit: {full.operations / merged.operations:.1f} times fewer operations, "
            f"{full.seconds / merged.seconds:.1f} times shorter prefill"
        )
    return lines


def _recomputed(model: str, bits: int, sequence: int) -> efficiency_table.Efficiency:
    text = dataclasses.replace(published(model).text, vocab_size=VICUNA_VOCABULARY)
    return efficiency_table.efficiency(text, sequence, bits, CHIPS["v100"])


def _efficiency_line(
    model: str, bits: int, row: int, text: int, paper: efficiency_table.Efficiency | None
) -> str:
    visual = efficiency_table.VISUAL_TOKENS[row]
    ours = _recomputed(model, bits, visual + text)
    scaled = dataclasses.replace(ours, operations=ours.operations * bits / 16)

    def cell(field: str, unit: float, decimals: int) -> str:
        value = f"{getattr(scaled, field) / unit:.{decimals}f}"
        return value if paper is None else f"{value} ({getattr(paper, field) / unit:.4g})"

    return (
        f"{model:<14}{bits:>5}{f'{visual} + {text}':>15}{ours.operations / 1e12:>14.3f}"
        f"{cell('operations', 1e12, 2):>16}{cell('seconds', 1e-3, 1):>16}"
        f"{cell('bytes_moved', 1e9, 1):>14}{cell('bytes_stored', 1e9, 2):>15}"
    )


def floor_lines(config: LlavaConfig, chip: Chip, text_tokens: int, weight_bits: int) -> list[str]:
    """Roofline times per image, from the vision tower to the last output token."""
    lines = [
        f"{chip.flops / 1e12:.0f} TFLOP/s, {chip.bandwidth / 1e12:.2f} TB/s, {text_tokens} text "
        f"tokens, {weight_bits}-bit decoder weights; ms per image at 1 to 32 output tokens:",
        f"{'batch':>5}{'visual':>8}{'vision+merge':>14}{'prefill':>16}"
        + "".join(f"{f'{n} out':>11}" for n in OUTPUT_TOKENS)
        + f"   images/s at {' / '.join(map(str, OUTPUT_TOKENS))} out",
    ]
    for batch in BATCHES:
        for visual in VISUAL_TOKENS:
            workload = Workload(visual, text_tokens, batch, weight_bits=weight_bits)
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


def main(argv: Sequence[str] | None = None) -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(prog="python -m prumerge_jax.cost", description=__doc__)
    parser.add_argument("--model", default="llava-1.5-7b", help="of the floors: a published size")
    parser.add_argument("--chip", default="h100", choices=sorted(CHIPS), help="of the floors")
    parser.add_argument("--text_tokens", type=int, default=60, help="where text is constant")
    parser.add_argument("--weight_bits", type=int, default=16, choices=(16, 8, 4))
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
    for line in efficiency_lines(arguments.text_tokens):
        print(line)
    print(f"\nFloors of {arguments.model} on one {arguments.chip}, assumed achievable:")
    for line in floor_lines(config, chip, arguments.text_tokens, arguments.weight_bits):
        print(line)


if __name__ == "__main__":
    main()

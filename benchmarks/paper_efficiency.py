"""The paper's efficiency table (arXiv 2403.15388, Table 2), recomputed; nothing is measured.

    python benchmarks/paper_efficiency.py

The paper used LLM-Viewer (arXiv 2402.16363): the prefill of the language model alone, batch 1, on a
V100; each operator takes the longer of operations / peak and bytes / bandwidth; the times add up.
Attention scores are written to memory. Weights, activations and KV all have the same bit width, and
8 bit or less computes at the 8-bit peak. "Total memory" is bytes moved, not footprint;
"activation" is the outputs written, summed over the layers, keys and values not among them. The
vision tower, the projector, PruMerge itself and decoding are not in it.

Below it stand rows of ours: kernels of fewer bits, everything else at 16, on several chips.

The text lengths of the table are unpublished. `INFERRED_TEXT_TOKENS` are those with which this
model comes within 1.5 % of all its 16-bit columns: they differ between the two rows that the paper
compares.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from prumerge_jax.cost import Bits, counts
from prumerge_jax.cost.roofline import CHIPS, Chip, Operation, Workload, operations
from prumerge_jax.families import published
from prumerge_jax.models.config import TextConfig, decoder_linears

VICUNA_VOCABULARY = 32000

VISUAL_TOKENS = (576, 40)
"""Per image, without and with PruMerge."""

INFERRED_TEXT_TOKENS = {"llava-1.5-7b": (122, 30), "llava-1.5-13b": (124, 30)}


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """One row: operations, seconds, and bytes moved and stored."""

    operations: float
    seconds: float
    bytes_moved: float
    bytes_stored: float


PUBLISHED = {
    ("llava-1.5-7b", 16): (
        Efficiency(9.3e12, 88.6e-3, 23.3e9, 4.60e9),
        Efficiency(0.91e12, 15.3e-3, 13.7e9, 0.28e9),
    ),
    ("llava-1.5-7b", 4): (
        Efficiency(2.3e12, 151.6e-3, 5.9e9, 1.20e9),
        Efficiency(0.28e12, 14.9e-3, 3.5e9, 0.07e9),
    ),
    ("llava-1.5-13b", 16): (
        Efficiency(18.2e12, 170.5e-3, 41.6e9, 7.30e9),
        Efficiency(1.80e12, 29.5e-3, 26.6e9, 0.44e9),
    ),
    ("llava-1.5-13b", 4): (
        Efficiency(4.6e12, 294.9e-3, 10.5e9, 1.80e9),
        Efficiency(0.45e12, 29.0e-3, 6.8e9, 0.11e9),
    ),
}
"""Model and bits to the paper's figures without and with PruMerge.

At 4 bit the paper divides the number of operations by four (once by about three: 0.28).
"""


@dataclasses.dataclass(frozen=True)
class Operator:
    """One operator of a prefill, in operations and in numbers read or written."""

    operations: float
    read: float
    written: float
    is_activation: bool = True
    """Whether what it writes counts as activation: keys and values do not."""


def layer_operators(text: TextConfig, sequence: int) -> list[Operator]:
    """The operators of one decoder layer over `sequence` tokens, as LLM-Viewer counts them."""
    hidden = sequence * text.width
    queries = sequence * text.num_heads * text.head_dim
    keys = sequence * text.num_kv_heads * text.head_dim
    scores = sequence**2 * text.num_heads
    attention = 2 * sequence * queries
    norm = Operator(7 * hidden, hidden, hidden)
    residual = Operator(hidden, hidden, hidden)
    linears = [
        Operator(
            2 * sequence * inputs * outputs,
            inputs * outputs + sequence * inputs,
            sequence * outputs,
            is_activation=name not in ("k_proj", "v_proj"),
        )
        for name, (inputs, outputs) in decoder_linears(text).items()
    ]
    return [
        *linears,
        Operator(attention, queries + keys, scores),
        Operator(5 * scores, scores, scores),  # softmax
        Operator(attention, scores + keys, queries),
        norm,
        norm,
        residual,
        residual,
        # LLM-Viewer gives gate times up the model's width, not the MLP's.
        Operator(2 * hidden, 2 * hidden, hidden),
    ]


def efficiency(text: TextConfig, sequence: int, bits: int, chip: Chip) -> Efficiency:
    """The prefill of one sequence with weights, activations and KV of `bits` bits.

    Raises:
      ValueError: `bits` is 8 or less and the chip's 8-bit peak is unknown.
    """
    if bits > 8:
        peak = chip.flops
    elif chip.int8_ops is not None:
        peak = chip.int8_ops
    else:
        raise ValueError(f"{bits} bit needs Chip.int8_ops, which {chip} does not state")
    head = Operator(
        2 * text.width * text.vocab_size, text.width * (text.vocab_size + 1), text.vocab_size
    )
    operators = layer_operators(text, sequence) * text.num_layers + [head]
    rates = Chip(peak, chip.bandwidth)
    operations = [Operation(o.operations, (o.read + o.written) * bits / 8) for o in operators]
    return Efficiency(
        operations=sum(operation.flops for operation in operations),
        seconds=sum(operation.seconds(rates) for operation in operations),
        bytes_moved=sum(operation.bytes for operation in operations),
        bytes_stored=sum(o.written for o in operators if o.is_activation) * bits / 8,
    )


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
    inferred = INFERRED_TEXT_TOKENS
    rows = list(itertools.product(inferred, (16, 8, 4), (0, 1)))
    lines += ["", "Text lengths inferred from the paper's figures (its two rows differ):", header]
    for model, bits, row in rows:
        paper = PUBLISHED.get((model, bits))
        text = inferred[model][row]
        lines.append(_efficiency_line(model, bits, row, text, paper[row] if paper else None))
    lines += ["", f"The same text in both rows, {text_tokens} tokens:", header]
    for model, bits, row in rows:
        lines.append(_efficiency_line(model, bits, row, text_tokens, None))
    for model in inferred:
        full, merged = (_recomputed(model, 16, visual + text_tokens) for visual in VISUAL_TOKENS)
        lines.append(
            f"{model} at 16 bit: {full.operations / merged.operations:.1f} times fewer operations, "
            f"{full.seconds / merged.seconds:.1f} times shorter prefill"
        )
    return lines


OUR_CHIPS = ("v100", "h100", "tpu-v5e", "tpu-v6e")
OUR_FORMATS = (None, "int8", "int8x8", "int4")


def our_rows(model: str) -> list[dict[str, Any]]:
    """Prefill and one step of decoding at batch 1, by `cost.roofline`: kernels of the decoder's
    blocks in a format, everything else at 16 bit, each phase the longer of compute and traffic."""
    config, texts = published(model), INFERRED_TEXT_TOKENS[model]
    rows = []
    for chip, name in itertools.product(OUR_CHIPS, OUR_FORMATS):
        bits = Bits.of(name)
        row: dict[str, Any] = {
            "chip": chip,
            "format": name or "16 bit",
            "gb": counts.decoder_bytes(config, bits) / 1e9,
        }
        for visual, text in zip(VISUAL_TOKENS, texts, strict=True):
            found = operations(config, Workload(visual, text, output_tokens=2, bits=bits))
            for phase in ("prefill", "decode"):
                (operation,) = found[phase]
                row[f"{phase}_{visual}"] = 1e3 * operation.seconds(CHIPS[chip])
                row[f"{phase}_{visual}_bound"] = operation.bound(CHIPS[chip])
        rows.append(row)
    return rows


def our_lines(model: str) -> list[str]:
    """`our_rows` as a table."""
    lines = [
        "",
        f"Ours, {model}: kernels of the decoder's blocks in fewer bits; head, activations, KV at",
        "16; ms at batch 1 with the text lengths inferred above, and what bounds them. Where the",
        "weights' traffic bounds, fewer visual tokens make nothing faster; fewer bits do.",
        f"{'chip':<9}{'kernels':>8}{'GB read':>9}"
        + "".join(
            f"{f'{phase} {n}':>20}" for n in VISUAL_TOKENS for phase in ("prefill", "decode")
        ),
    ]
    for row in our_rows(model):
        cells = (
            f"{row[f'{phase}_{n}']:>12.2f} {row[f'{phase}_{n}_bound']:>7}"
            for n in VISUAL_TOKENS
            for phase in ("prefill", "decode")
        )
        lines.append(f"{row['chip']:<9}{row['format']:>8}{row['gb']:>9.2f}" + "".join(cells))
    return lines


def results(text_tokens: int) -> list[dict[str, Any]]:
    """The rows of the table as JSON values, at the inferred text lengths and at a constant one."""
    rows = itertools.product(INFERRED_TEXT_TOKENS, (16, 8, 4), (0, 1), (True, False))
    return [
        {
            "model": model,
            "bits": bits,
            "visual_tokens": VISUAL_TOKENS[row],
            "text_tokens": (text := INFERRED_TEXT_TOKENS[model][row] if inferred else text_tokens),
            **dataclasses.asdict(_recomputed(model, bits, VISUAL_TOKENS[row] + text)),
        }
        for model, bits, row, inferred in rows
    ]


def _recomputed(model: str, bits: int, sequence: int) -> Efficiency:
    text = dataclasses.replace(published(model).text, vocab_size=VICUNA_VOCABULARY)
    return efficiency(text, sequence, bits, CHIPS["v100"])


def _efficiency_line(model: str, bits: int, row: int, text: int, paper: Efficiency | None) -> str:
    visual = VISUAL_TOKENS[row]
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


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text_tokens", type=int, default=60, help="where text is constant")
    parser.add_argument("--json", type=pathlib.Path, help="also write the rows to this file")
    arguments = parser.parse_args(argv)
    print(f"paper_efficiency: {__doc__.splitlines()[0].rstrip('.')}; at once")
    for line in efficiency_lines(arguments.text_tokens):
        print(line)
    for model in INFERRED_TEXT_TOKENS:
        for line in our_lines(model):
            print(line)
    if arguments.json is not None:
        record = {
            "benchmark": "paper_efficiency",
            "arguments": {"text_tokens": arguments.text_tokens},
            "results": results(arguments.text_tokens),
            "notes": [],
        }
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

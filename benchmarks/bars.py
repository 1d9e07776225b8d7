"""What the figures of the benchmarks are compared with: one list, as data.

Bars are what is held to be reachable, stretches what would be very good. Those of an H100 are for
bfloat16 and 7B: published utilisations of comparable systems (TensorRT-LLM, ragged paged attention,
gpt-fast, NeMo) applied to the cost model's floors. A bar counts on the device and at the sizes that
it is for; elsewhere the figure stands without one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Bar:
    """One figure and what it should reach.

    Attributes:
      figure: what it is.
      step: the step of `all.py` that measures it.
      row: values that tell the row of the step's report.
      key: the column, or several where it was renamed: the first that there is.
      bar: to be reached.
      stretch: to be wished for.
      at_least: whether more is better.
      geometry: sizes of the model that the bar is for; None: all but `tiny`.
      device: part of the device's name that the bar is for, `cpu`, or None for all.
    """

    figure: str
    step: str
    row: Mapping[str, Any]
    key: str | tuple[str, ...]
    bar: float
    stretch: float | None = None
    at_least: bool = True
    geometry: str | None = None
    device: str | None = None

    def value(self, rows: Sequence[Mapping[str, Any]]) -> float | None:
        """The figure in a step's rows, None where it is not among them."""
        keys = (self.key,) if isinstance(self.key, str) else self.key
        for row in rows:
            if all(row.get(name) == wanted for name, wanted in self.row.items()):
                found = [row[key] for key in keys if row.get(key) is not None]
                return float(found[0]) if found else None
        return None

    def applies(self, geometry: str | None, device: str) -> bool:
        """Whether the bar is for these sizes on this device."""
        is_size = geometry == self.geometry if self.geometry else geometry != "tiny"
        return is_size and (self.device is None or self.device.lower() in device.lower())

    def reached(self, value: float, goal: float) -> bool:
        """Whether a figure reaches a goal."""
        return value >= goal if self.at_least else value <= goal


_RATE = ("questions_per_s", "images_per_s")
_H100: dict[str, Any] = {"geometry": "7b", "device": "nvidia h"}
_CPU: dict[str, Any] = {"geometry": "mid", "device": "cpu"}
_REDUCED, _PLUS = "prumerge", "prumerge+"

BARS = (
    Bar("tower, images/s", "vision_tower", {"arm": "tower", "batch": 32}, "images_per_s", 1200,
        **_H100),
    Bar("PruMerge of 32 images, ms", "prumerge_step", {"case": "prumerge 40"}, "ms", 1.6, 0.64,
        at_least=False, **_H100),
    Bar("decode of 8 slots, share of the floor", "decode", {"slots": 8}, "floor_share", 0.65, 0.82,
        **_H100),
    Bar("scoring at 40 visual tokens, questions/s", "scoring", {"arm": _REDUCED}, _RATE, 260, 355,
        **_H100),
    Bar("scoring at 576, questions/s", "scoring", {"arm": "full"}, _RATE, 50, 68, **_H100),
    Bar("speed-up of 40 tokens over 576", "scoring", {"arm": _REDUCED}, "speedup", 4.0, 4.8,
        **_H100),
    Bar("real over computed tokens, 40", "scoring", {"arm": _REDUCED}, "efficiency", 0.85, 0.97),
    Bar("LoRA at 144 visual tokens, 4N of the peak", "lora_training", {"visual": 144},
        "utilisation_4n", 0.35, 0.43, **_H100),
    *(
        Bar(f"{name}: KV bytes {verb} over valid", "decode", {"reduction": name, "slots": slots},
            f"kv_{verb}_over_valid", bar, stretch, at_least=False)
        for name in ("prumerge", "prumerge+")
        for verb, slots, bar, stretch in (("allocated", 8, 1.25, 1.10), ("read", 8, 1.35, 1.15))
    ),
    Bar("decode tokens/s of PruMerge+ over full, 16 slots", "decode",
        {"reduction": "prumerge+", "slots": 16}, "over_full", 2.0, 2.5, **_CPU),
    *(
        Bar(f"decode of {slots} slots, share of the floor", "decode",
            {"reduction": "prumerge+", "slots": slots}, "floor_share", 0.55, 0.70, **_CPU)
        for slots in (8, 16, 32)
    ),
    *(
        Bar(f"18 questions an image, {arm}: with sharing over without", "scoring, shared",
            {"arm": arm, "shared": True}, "sharing_speedup", bar, stretch)
        for arm, bar, stretch in (("full", 5, 8), (_PLUS, 3, 4.5), (_REDUCED, 2, 3))
    ),
)  # fmt: skip

"""The cost model against published parameter counts and hand-computed tables."""

import dataclasses
import re

import pytest

from prumerge_jax import cost
from prumerge_jax.cost import __main__ as command
from prumerge_jax.cost import counts
from prumerge_jax.models.config import TextConfig, published

CONFIG_7B = published("llava-1.5-7b")
CONFIG_13B = published("llava-1.5-13b")
VICUNA = {
    name: dataclasses.replace(published(name).text, vocab_size=32000)
    for name in ("llava-1.5-7b", "llava-1.5-13b")
}
ASSUMED_H100 = cost.Chip(790e12, 3.0e12)


def assert_prints(value, printed):
    """`value` rounds to the digits of `printed`."""
    decimals = len(printed.partition(".")[2])
    assert value == pytest.approx(float(printed), abs=0.5001 * 10**-decimals, rel=0)


def test_checkpoints_have_exactly_the_published_number_of_parameters():
    assert cost.parameters(CONFIG_7B).total == 7_063_427_072
    assert cost.parameters(CONFIG_13B).total == 13_351_494_656


def test_counts_equal_the_arrays_of_a_model():
    """The tiny size, with grouped queries, tensor by tensor."""
    config = published("tiny")
    sizes = cost.parameters(config)
    d, m, patches = 32, 64, 16
    block = 4 * (d * d + d) + (d * m + m) + (m * d + d) + 4 * d
    stem = d + 14 * 14 * 3 * d + (patches + 1) * d + 2 * d
    assert sizes.vision_used == stem + 2 * block + 2 * d + 2 * (d * d + d)
    assert sizes.vision == stem + 3 * block + 2 * d
    assert sizes.projector == (32 * 48 + 48) + (48 * 48 + 48)
    assert sizes.blocks == 2 * (48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 96)
    assert sizes.embedding == sizes.head == 32064 * 48
    assert sizes.norms == 5 * 48
    assert cost.lora_parameters(config.text, 4) == 4 * 2 * (
        2 * (48 + 48) + 2 * (48 + 24) + 3 * (48 + 96)
    )
    assert cost.kv_bytes_per_token(config.text) == 2 * 2 * 24 * 2


@pytest.mark.parametrize(("kind", "linears"), [("identity", 0), ("linear", 1), ("mlp3x_gelu", 3)])
def test_projector_kinds(kind, linears):
    config = dataclasses.replace(CONFIG_7B, projector=kind)
    weights = 1024 * 4096 + (linears - 1) * 4096**2 if linears else 0
    assert counts.projector_flops(config) == 2 * weights
    assert cost.parameters(config).projector == weights + linears * 4096


def test_parameter_table():
    for config, blocks, decoder, projector, rank_1, rank_128 in (
        (CONFIG_7B, "6.476", "6.607", "20.97", "2.499", "319.8"),
        (CONFIG_13B, "12.688", "12.852", "31.46", "3.912", "500.7"),
    ):
        sizes = cost.parameters(config)
        assert_prints(sizes.blocks / 1e9, blocks)
        assert_prints((sizes.blocks + config.text.width * 32000) / 1e9, decoder)
        biases = 2 * config.text.width
        assert_prints((sizes.projector - biases) / 1e6, projector)
        assert_prints(cost.lora_parameters(config.text, 1) / 1e6, rank_1)
        assert_prints(cost.lora_parameters(config.text, 128) / 1e6, rank_128)
        assert_prints(2 * sizes.vision_used / 1e9, "0.586")  # 0.585 without biases and norms


def test_vision_and_projector_flops():
    vision = CONFIG_7B.vision
    assert_prints(counts.vision_block_flops(vision) / 1e9, "15.88")
    assert_prints(counts.patch_embedding_flops(vision) / 1e9, "0.69")
    assert_prints(counts.tower_flops(vision) / 1e9, "367.2")
    assert_prints(counts.merge_flops(vision) / 1e9, "1.36")
    assert_prints(counts.projector_flops(CONFIG_7B) / 1e6, "41.9")
    assert_prints(counts.projector_flops(CONFIG_13B) / 1e6, "62.9")


@pytest.mark.parametrize(
    ("visual", "prefill_7b", "attention", "total_7b", "vision", "prefill_13b", "total_13b"),
    [
        (576, "8.344", "1.3", "8.735", "4.2", "16.305", "16.708"),
        (144, "2.653", "0.4", "3.027", "12.1", "5.194", "5.570"),
        (40, "1.298", "0.2", "1.667", "22.0", "2.542", "2.912"),
    ],
)
def test_prefill_flops_table(
    visual, prefill_7b, attention, total_7b, vision, prefill_13b, total_13b
):
    sequence = visual + 60
    tower = counts.tower_flops(CONFIG_7B.vision)
    for config, prefill, total in (
        (CONFIG_7B, prefill_7b, total_7b),
        (CONFIG_13B, prefill_13b, total_13b),
    ):
        text = dataclasses.replace(config.text, vocab_size=32000)
        flops = counts.prefill_flops(text, sequence)
        everything = flops + tower + visual * counts.projector_flops(config)
        assert_prints(flops / 1e12, prefill)
        assert_prints(everything / 1e12, total)
        if config is CONFIG_7B:
            share = 2 * sequence**2 * text.width * text.num_layers / flops
            assert_prints(100 * share, attention)
            assert_prints(100 * tower / everything, vision)


def test_decode_flops_and_causality():
    """Prefilling S tokens attends like decoding them one by one, up to the diagonal's half."""
    text = VICUNA["llava-1.5-7b"]
    weights = 2 * (32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000)
    assert counts.decode_flops(text, 100) == weights + 4 * 100 * 4096 * 32
    one_by_one = sum(counts.attention_flops(text, context) for context in range(1, 101))
    together = counts.attention_flops(text, 100 * 100 / 2)
    assert one_by_one == pytest.approx(together, rel=0.011)


def test_kv_memory():
    assert cost.kv_bytes_per_token(CONFIG_7B.text) == 524_288
    assert cost.kv_bytes_per_token(CONFIG_13B.text) == 819_200
    per_token = cost.kv_bytes_per_token(CONFIG_7B.text)
    for visual, megabytes, fitting in ((576, "333", 171), (144, "107", 484), (40, "52.4", 866)):
        prompt = cost.Workload(visual, 60)
        assert_prints(prompt.sequence * per_token / 1e6, megabytes)
        assert 60e9 // ((prompt.sequence + 32) * per_token) == fitting
    grouped = TextConfig(num_kv_heads=8)
    assert cost.kv_bytes_per_token(grouped) == 524_288 // 4


def test_quantised_weights_shrink_the_decoder_alone():
    blocks = cost.parameters(CONFIG_7B).blocks
    full = cost.weight_bytes(CONFIG_7B)
    for name, bits in (("int8", 8), ("int8x8", 8), ("int4", 4), ("nf4", 4.5)):
        saved = full - cost.weight_bytes(CONFIG_7B, cost.Bits.of(name))
        assert saved == blocks * (16 - bits) / 8
    steps = {
        bits: cost.operations(CONFIG_7B, cost.Workload(40, 60, bits=cost.Bits.of(bits)))
        for bits in (None, "int8", "int4")
    }
    assert steps[None]["vision"] == steps["int4"]["vision"]
    prefill, quantised = steps[None]["prefill"][0], steps["int4"]["prefill"][0]
    assert prefill.flops == quantised.flops
    assert prefill.bytes - quantised.bytes == 1.5 * blocks


def test_int8_products_run_at_their_own_peak():
    chip = cost.CHIPS["tpu-v5e"]
    plain, eight = (
        cost.operations(CONFIG_7B, cost.Workload(576, 60, 32, bits=cost.Bits.of(name)))["prefill"][
            0
        ]
        for name in ("int8", "int8x8")
    )
    of_down = 4096 * 11008 / (4 * 4096**2 + 3 * 4096 * 11008)
    blocks = 2 * 32 * 636 * cost.parameters(CONFIG_7B).blocks
    assert eight.int8_flops == pytest.approx(blocks * (1 - of_down))
    saved = plain.seconds(chip) - eight.seconds(chip)
    assert saved == pytest.approx(eight.int8_flops / chip.flops / 2)
    with pytest.raises(ValueError, match="int8_ops"):
        eight.seconds(cost.Chip(1e12, 1e12))


def test_int8_keys_and_values_have_a_scale_per_token_and_head():
    bits = cost.Bits.of(None, "int8")
    assert cost.kv_bytes_per_token(CONFIG_7B.text, bits) == 2 * 32 * 32 * (128 + 4)


FLOORS = """
| 1 | 576 | 0.46 | 10.56 compute | 11.06 | 42.7 | 151.1 | 90 / 23 / 7 |
| 1 | 144 | 0.47 | 4.44 memory | 4.92 | 36.0 | 142.7 | 203 / 28 / 7 |
| 1 | 40 | 0.47 | 4.42 memory | 4.90 | 35.9 | 142.1 | 204 / 28 / 7 |
| 8 | 576 | 0.46 | 10.56 compute | 11.06 | 15.7 | 31.7 | 90 / 64 / 32 |
| 8 | 144 | 0.47 | 3.36 compute | 3.83 | 7.94 | 22.1 | 261 / 126 / 45 |
| 8 | 40 | 0.47 | 1.64 compute | 2.11 | 6.09 | 19.8 | 474 / 164 / 50 |
| 32 | 576 | 0.46 | 10.56 compute | 11.06 | 12.8 | 18.9 | 90 / 78 / 53 |
| 32 | 144 | 0.47 | 3.36 compute | 3.83 | 5.05 | 9.29 | 261 / 198 / 108 |
| 32 | 40 | 0.47 | 1.64 compute | 2.11 | 3.20 | 7.01 | 474 / 312 / 143 |
"""


@pytest.mark.parametrize("row", FLOORS.strip().splitlines())
def test_floors_of_the_7b_on_an_assumed_h100(row):
    batch, visual, vision, prefill, *times, rates = (cell.strip() for cell in row.split("|")[1:-1])
    workload = cost.Workload(int(visual), 60, int(batch))
    seconds = cost.floor_seconds(CONFIG_7B, workload, ASSUMED_H100)
    assert_prints(1e3 * (seconds["vision"] + seconds["merge"]) / workload.batch, vision)
    milliseconds, bound = prefill.split()
    assert_prints(1e3 * seconds["prefill"] / workload.batch, milliseconds)
    assert cost.operations(CONFIG_7B, workload)["prefill"][0].bound(ASSUMED_H100) == bound
    for tokens, time, rate in zip((1, 8, 32), times, rates.split(" / "), strict=True):
        longer = dataclasses.replace(workload, output_tokens=tokens)
        per_second = cost.images_per_second(CONFIG_7B, longer, ASSUMED_H100)
        assert_prints(1e3 / per_second, time)
        assert_prints(per_second, rate)


@pytest.mark.parametrize(
    ("batch", "times"),
    [(128, ("15.7", "6.1", "3.8")), (256, (None, "5.6", "3.3")), (512, (None, "5.3", "3.0"))],
)
def test_deep_decode_floors(batch, times):
    for visual, time in zip((576, 144, 40), times, strict=True):
        workload = cost.Workload(visual, 60, batch, output_tokens=32)
        if time is None:
            tokens = batch * (workload.sequence + 32)
            assert tokens * cost.kv_bytes_per_token(CONFIG_7B.text) > 80e9
        else:
            assert_prints(1e3 / cost.images_per_second(CONFIG_7B, workload, ASSUMED_H100), time)


@pytest.mark.parametrize(
    ("chip", "rates"),
    [
        ("h100", (113, 327, 593)),
        ("a100", (36, 103, 187)),
        ("tpu-v5e", (23, 65, 118)),
        ("tpu-v5p", (53, 152, 275)),
        ("tpu-v6e", (105, 303, 551)),
        ("tpu7x", (264, 762, 1384)),
    ],
)
def test_chips_at_full_peak_and_large_batch(chip, rates):
    """The table that the rates come from leaves out the merge, at most a thousandth of the time."""
    for visual, rate in zip((576, 144, 40), rates, strict=True):
        workload = cost.Workload(visual, 60, batch=64)
        seconds = cost.floor_seconds(CONFIG_7B, workload, cost.CHIPS[chip])
        assert seconds["merge"] < 1e-3 * sum(seconds.values())
        del seconds["merge"]
        assert_prints(workload.batch / sum(seconds.values()), str(rate))


def test_achievable_chip_slows_compute_and_memory_apart():
    chip = cost.CHIPS["v100"].achievable(0.5, 0.25)
    assert chip == cost.Chip(56e12, 0.225e12, 31e12)
    assert cost.Operation(56e12, 0).seconds(chip) == 1
    assert cost.Operation(0, 0.225e12).bound(chip) == "memory"


@pytest.mark.parametrize(
    ("visual", "plain_ms", "all_ms", "hours"),
    [(576, "46.9", "51.3", "8.7"), (144, "21.3", "22.9", "3.9"), (40, "15.1", "16.2", "2.8")],
)
def test_training_table(visual, plain_ms, all_ms, hours):
    """H100 at 45 % of its peak, 200 text tokens, rank 128."""
    flops = cost.training_flops(CONFIG_7B, visual, 200, lora_rank=128)
    rate = 0.45 * 989e12
    plain = (flops["base"] + flops["vision"]) / rate
    assert_prints(1e3 * plain, plain_ms)
    assert_prints(1e3 * (plain + (flops["attention"] + flops["adapters"]) / rate), all_ms)
    assert_prints(plain * 665_000 / 3600, hours)
    assert flops["projector"] == 3 * visual * counts.projector_flops(CONFIG_7B)


def test_command_prints_the_floors(capsys):
    command.main([])
    output = capsys.readouterr().out
    assert re.search(r" 8 +40 +0.47 +1.64 compute +2.11 +6.09 +19.81 +474 / 164 / 50", output)
    # 40 + 60 + 32 tokens take five pages of 32, at half a mebibyte a token.
    assert "of 132 tokens in pages of 32: 84 MB a sequence" in output


def test_command_takes_model_and_chip(capsys):
    command.main(["--model", "tiny", "--chip", "tpu-v5e", "--compute_fraction", "0.5"])
    assert "98 TFLOP/s, 0.73 TB/s, 60 text tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("visual", "questions", "computed"),
    [(576, 1, 636), (576, 18, 59), (144, 18, 35), (40, 18, 29), (576, 3, 229), (144, 3, 85)],
)
def test_questions_about_an_image_share_what_is_in_front(visual, questions, computed):
    """35 of 60 text tokens are in front of the image; the rest sees all of it."""
    text = published("llava-1.5-7b").text
    workload = cost.Workload(visual, 60, questions, questions_per_image=questions)
    assert workload.images == 1
    assert workload.computed == pytest.approx(computed, abs=0.5)
    shared = cost.operations(published("llava-1.5-7b"), workload)
    front, behind = visual + 35, 25
    tokens = front + questions * behind if questions > 1 else visual + 60
    flops = 2 * counts.block_parameters(text) * tokens
    flops += 2 * questions * text.width * text.vocab_size
    pairs = front * front / 2 + questions * behind * (front + behind / 2)
    flops += counts.attention_flops(text, pairs)
    (prefill,) = shared["prefill"]
    assert prefill.flops == pytest.approx(flops, rel=1e-12)
    apart = cost.operations(published("llava-1.5-7b"), cost.Workload(visual, 60, 1))
    assert shared["vision"][0].flops == apart["vision"][0].flops
    assert shared["merge"] == apart["merge"]


def test_command_takes_questions_per_image(capsys):
    command.main(["--questions_per_image=18"])
    lines = capsys.readouterr().out
    assert "18 questions share each image" in lines
    rates = [float(line.split()[-1]) for line in lines.splitlines()[-2:]]
    command.main([])
    assert [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[-2:]] < rates

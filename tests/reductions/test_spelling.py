"""One spelling of a reduction: what is written is what runs, and a mistake is one line."""

import dataclasses
import re
import typing
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from prumerge_jax import options, prumerge, reductions
from prumerge_jax.models.config import published

REQUIRED = {"downsample": "downsample:2"}  # names that are not a reduction by themselves


def values(option: options.Option) -> st.SearchStrategy[Any]:
    """All that a parameter may be."""
    if option.kind is bool:
        allowed: st.SearchStrategy[Any] = st.booleans()
    elif option.kind is str:
        allowed = st.sampled_from(option.words)
    elif option.kind is int:
        assert option.bounds is not None
        allowed = st.integers(int(option.bounds.least), int(option.bounds.greatest))
    else:
        assert option.bounds is not None
        allowed = st.floats(option.bounds.least, option.bounds.greatest, allow_nan=False)
    return allowed | st.none() if option.may_be_none else allowed


@st.composite
def spellings(draw: st.DrawFn) -> str:
    name = draw(st.sampled_from(reductions.names()))
    known = reductions.parameters(name)
    parts = []
    for parameter in draw(st.lists(st.sampled_from(sorted(known)), unique=True, max_size=4)):
        parts.append(f"{parameter}={draw(values(known[parameter]))}")
    return f"{name}:{','.join(parts)}" if parts else name


@given(spellings())
def test_round_trip(spelling: str) -> None:
    try:
        reduction = reductions.parse(spelling)
    except ValueError as error:
        contradiction = re.search("max_tokens|seed|ranking|is missing", str(error))
        if not contradiction:
            raise
        return
    again = reductions.parse(reductions.spell(reduction))
    assert again == reduction
    assert hash(again) == hash(reduction)
    for part in spelling.partition(":")[2].split(","):
        parameter, separator, text = part.partition("=")
        counted = getattr(reduction, "counted", reduction)
        if separator and hasattr(counted, parameter) and parameter != "ranking":
            assert str(getattr(counted, parameter)) == text


@pytest.mark.parametrize("name", reductions.names())
def test_every_name_and_every_value_of_its_parameters(name: str) -> None:
    plain = reductions.parse(REQUIRED.get(name, name))
    assert reductions.parse(reductions.spell(plain)) == plain
    for parameter, option in reductions.parameters(name).items():
        words = option.words or {bool: ("True", "False")}.get(option.kind, ())
        for word in words:
            spelling = f"{name}:{parameter}={word}"
            if parameter == "ranking" or name in REQUIRED or word == "all":
                continue  # not of every reduction; see the round trip
            found = reductions.parse(spelling)
            assert str(getattr(getattr(found, "counted", found), parameter)) == word


def assert_one_line(error: ValueError) -> str:
    message = str(error)
    assert "\n" not in message
    assert len(message) < 600
    return message


@given(st.sampled_from(reductions.names()), st.data())
def test_a_misspelled_name_is_one_line_that_names_the_nearest(
    name: str, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(name) - 1))
    typo = data.draw(
        st.sampled_from([name[:at] + name[at + 1 :], name[:at] + "q" + name[at + 1 :]])
    )
    assume(typo not in reductions.names())
    with pytest.raises(ValueError, match="unknown reduction") as raised:
        reductions.parse(typo)
    message = assert_one_line(raised.value)
    assert repr(typo) in message
    near = re.search("did you mean '(.*?)'", message)
    assert near, message
    assert near[1] in reductions.names()
    assert message.endswith(", ".join(reductions.names()))


@given(st.text(max_size=400))
def test_any_text_is_a_reduction_or_one_line(text: str) -> None:
    for read in (reductions.parse, reductions.parse_list):
        try:
            read(text)
        except ValueError as error:
            assert_one_line(error)


@given(
    st.sampled_from(["prumerge", "random", "full"]), st.text(max_size=400), st.text(max_size=400)
)
def test_any_parameter_is_valid_or_one_line(name: str, parameter: str, value: str) -> None:
    for spelling in (f"{name}:{parameter}={value}", f"{name}:neighbours={value}"):
        try:
            reductions.parse(spelling)
        except ValueError as error:
            assert_one_line(error)


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("prumerge:neighbour=8", "no such parameter 'neighbour'; did you mean 'neighbours'?"),
        ("prumerge:speed=9", "no such parameter 'speed'"),
        ("prumerge:neighbours", "'neighbours' is not 'parameter=value'"),
        ("prumerge:", "'' is not 'parameter=value'"),
        ("prumerge:neighbours=0", "neighbours is 0; expected an integer from 1 to 65536"),
        ("prumerge:neighbours=8.5", "neighbours is '8.5'; expected an integer"),
        ("prumerge:neighbours=8,neighbours=9", "neighbours is given twice"),
        ("prumerge:merge=max", "merge is 'max'; expected one of sum, mean, none"),
        ("prumerge:iqr_factor=nan", "iqr_factor is nan; expected a number from 0"),
        ("prumerge:extra_token=yes", "extra_token is 'yes'; expected True or False"),
        ("prumerge:capacity=0", "capacity is 0; expected an integer from 1 to 65536, or None"),
        ("prumerge:ranking=best", "ranking is 'best'; expected one of attention, random, uniform"),
        ("prumerge:seed=3", "nothing is drawn; add ranking=random"),
        ("random:seed=-1", "seed is -1; expected an integer from 0"),
        ("full:ranking=random", "every patch is kept"),
        ("downsample", "grid is missing; expected an integer from 1"),
        ("downsample:0", "grid is 0"),
        ("downsample:8,8", "'8' is not 'parameter=value'"),
        ("prumerge:" + "y" * 500_000, "is not 'parameter=value'"),
    ],
)
def test_mistakes_say_what_was_expected(spelling: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        reductions.parse(spelling)
    assert_one_line(raised.value)


def test_several_are_separated_by_spaces() -> None:
    both = ["full", "prumerge+"]
    for text in ("full prumerge+", " full  prumerge+ full", "full,prumerge+", "full, prumerge+"):
        assert list(reductions.parse_list(text)) == both
    one = reductions.parse_list("prumerge:neighbours=8,merge=mean")
    assert one == {"prumerge:neighbours=8,merge=mean": reductions.parse(next(iter(one)))}
    assert len(reductions.parse_list("full prumerge:neighbours=8, prumerge")) == 3
    for text in ("full,prumerge:neighbours=8", "prumerge:neighbours=8,full"):
        with pytest.raises(ValueError, match="several reductions are separated by a space"):
            reductions.parse_list(text)
    for text in ("", "  ", ","):
        with pytest.raises(ValueError, match="no reduction is named"):
            reductions.parse_list(text)
    with pytest.raises(ValueError, match="unknown reduction 'prumerg'; did you mean 'prumerge'?"):
        reductions.parse_list("full prumerg")


def test_downsampling_is_by_patches_of_the_tower() -> None:
    vision = published("tiny").vision
    small = reductions.parse("downsample:3")
    assert small == reductions.parse("downsample:grid=3")
    assert small.image_size(vision.image_size, vision.patch_size) == 3 * vision.patch_size
    assert not small.selects_patches
    with pytest.raises(ValueError, match="from 1 to 3"):
        reductions.parse("downsample:4").image_size(vision.image_size, vision.patch_size)
    merged = reductions.parse("prumerge:neighbours=8,merge=mean")
    assert isinstance(merged, reductions.PruMerge)
    assert (merged.neighbours, merged.merge) == (8, "mean")
    assert merged.image_size(vision.image_size, vision.patch_size) == vision.image_size


def test_what_callers_may_pass() -> None:
    expected = reductions.parse("prumerge+:capacity=160")
    assert reductions.as_reduction("prumerge+:capacity=160") == expected
    assert reductions.as_reduction(expected) is expected
    assert reductions.as_reduction(prumerge.preset("prumerge+", capacity=160)) == expected
    for other in (None, 8, b"prumerge", ["prumerge"]):
        with pytest.raises(ValueError, match="reduction is .* expected text such as"):
            reductions.as_reduction(other)  # type: ignore[arg-type]


def test_a_name_is_registered_once_and_keeps_the_common_parameters_free() -> None:
    @dataclasses.dataclass(frozen=True)
    class Seeded(reductions.Reduction):
        seed: bool = False

    with pytest.raises(ValueError, match="every reduction has the parameters"):
        reductions.register("seeded", Seeded)
    for taken in ("full", "random", "a:b", "a b"):
        with pytest.raises(ValueError, match="cannot be registered"):
            reductions.register(taken, typing.cast(Any, reductions.Downsample))

"""The lmms-eval plug-in over the miniature, with a stand-in for lmms-eval."""

import dataclasses
import sys
import types
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile

from tests.serve.fakes import miniature


@dataclasses.dataclass
class GenerationResult:
    text: Any
    token_counts: Any = None


@dataclasses.dataclass
class Instance:
    args: tuple


class Base:
    is_simple = True

    def __init__(self) -> None:
        self.task_dict: dict = {}


@dataclasses.dataclass
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


@pytest.fixture(scope="module")
def classes():
    """The plug-in's module, imported over the stand-in."""
    stand_ins = {
        "lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.models": {},
        "lmms_eval.api.instance": {"GenerationResult": GenerationResult},
        "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, members in stand_ins.items():
            module = types.ModuleType(name)
            vars(module).update(members)
            patch.setitem(sys.modules, name, module)
        import prumerge_jax.lmms.models as plug_in

        yield plug_in
        sys.modules.pop("prumerge_jax.lmms.models")


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (96, 96, 3)).astype(np.uint8))


DOCUMENTS = {
    "digits": {
        "test": [
            {"images": [picture(0)], "question": "How many digits are there?", "answer": "3"},
            {"images": None, "question": "Is there a 7?", "answer": "yes"},
            {"images": [picture(1)], "question": "Is there a 4?", "answer": "no"},
        ]
    }
}
ROWS = DOCUMENTS["digits"]["test"]
PLACE = ("digits", "test")


def visual(document: dict) -> Any:
    return document["images"]


def model(kind: type, **options: str):
    made = kind("miniature", reduction="cover:tokens=32", batch_size=8, device=None, **options)
    made.task_dict = DOCUMENTS
    return made


def asked(number: int, **options: Any) -> str:
    (answer,) = miniature().generate(
        [ROWS[number]["images"]],
        [ROWS[number]["question"]],
        reduction="cover:tokens=32",
        **options,
    )
    return answer


def test_the_manifest_imports_nothing_heavy(classes) -> None:
    from prumerge_jax.lmms import manifest

    made = manifest()
    assert made.model_id == "prumerge_jax"
    for path in (made.simple_class_path, made.chat_class_path):
        module, _, name = path.rpartition(".")
        assert module == classes.__name__
        assert hasattr(classes, name)


@pytest.mark.slow
def test_answers_in_order_with_their_own_options(classes) -> None:
    kinds = [{"max_new_tokens": 9, "until": ["\n\n"], "temperature": 0.0}, {"max_new_tokens": 2}]
    requests = [
        Instance(("<image>\n" + ROWS[n]["question"], kinds[n % 2], visual, n, *PLACE))
        for n in range(3)
    ]
    answers = model(classes.PruMergeSimple).generate_until(requests)
    assert answers == [asked(n, max_new_tokens=9 - 7 * (n % 2)) for n in range(3)]


def test_an_answer_is_cut_at_until(classes) -> None:
    whole = asked(0, max_new_tokens=9)
    options = {"max_new_tokens": 9, "until": whole[-1]}
    request = Instance((ROWS[0]["question"], options, visual, 0, *PLACE))
    cut = whole[: whole.index(whole[-1])].strip()
    assert model(classes.PruMergeSimple).generate_until([request]) == [cut]


def test_messages(classes) -> None:
    def messages(document: dict) -> list[dict]:
        content = [{"type": "image", "url": image} for image in document["images"] or ()]
        content.append({"type": "text", "text": document["question"]})
        return [{"role": "user", "content": content}]

    requests = [Instance(("", messages, {"max_new_tokens": 9}, n, *PLACE)) for n in range(3)]
    chat = model(classes.PruMergeChat)
    assert not chat.is_simple
    assert chat.generate_until(requests) == [asked(n, max_new_tokens=9) for n in range(3)]


def test_losses_are_small_for_likely_answers(classes) -> None:
    targets = [" yes", lambda document: "no"]
    requests = [Instance((ROWS[1]["question"], t, visual, 1, *PLACE)) for t in targets]
    results = model(classes.PruMergeSimple).loglikelihood(requests)
    assert all(isinstance(result, GenerationResult) for result in results)
    question = ROWS[1]["question"]
    (scores,) = miniature().score([None], [question], [["yes", "no"]], reduction="cover:tokens=32")
    tokens = [len(miniature().tokenizer.encode(text)) for text in ("yes", "no")]
    expected = [-score / count for score, count in zip(scores, tokens, strict=True)]
    assert [result.text[0] for result in results] == pytest.approx(expected, rel=1e-5)


def test_rounds(classes) -> None:
    def next_round(document, previous_output, round_idx, previous_round_info):
        if round_idx == 2:
            return None, None, True, previous_output, previous_round_info
        return document["images"], "Is there a 7?", False, previous_output, round_idx

    options = {"max_new_tokens": 5}
    request = Instance((ROWS[0]["question"], options, visual, next_round, 0, *PLACE))
    ((first, second),) = model(classes.PruMergeSimple).generate_until_multi_round([request])
    assert first == asked(0, max_new_tokens=5)
    (again,) = miniature().generate(
        [ROWS[0]["images"]], ["Is there a 7?"], reduction="cover:tokens=32", max_new_tokens=5
    )
    assert second == again


def test_pillow_is_strict_during_a_call_and_as_before_afterwards(classes, monkeypatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as lmms-eval sets it
    request = Instance((ROWS[0]["question"], {"max_new_tokens": 2}, visual, 0, *PLACE))
    made = model(classes.PruMergeSimple)
    assert made.generate_until([request]) == [asked_strictly()]
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def asked_strictly() -> str:
    from prumerge_jax.lmms.adapter import whole_images_only

    with whole_images_only():
        return asked(0, max_new_tokens=2)


def test_what_is_not_offered_or_cannot_be_read_is_an_error(classes) -> None:
    made = model(classes.PruMergeSimple)
    beams = Instance((ROWS[0]["question"], {"num_beams": 4}, visual, 0, *PLACE))
    with pytest.raises(ValueError, match="beam search is not offered"):
        made.generate_until([beams])
    missing = Instance((ROWS[0]["question"], {}, lambda document: ["/nowhere.png"], 0, *PLACE))
    with pytest.raises(ValueError, match="nowhere"):
        made.generate_until([missing])
    with pytest.raises(ValueError, match="unknown reduction"):
        classes.PruMergeSimple("miniature", reduction="prunerge;neighbours=8")

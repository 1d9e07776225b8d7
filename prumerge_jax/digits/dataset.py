"""The data set `digits_vqa`: scenes of handwritten digits with conversations about them.

Every record is in LLaVA's form and holds a scene's questions as the turns of one conversation; a
last turn asks for the caption. What the scene shows is stored in addition. `caption_sample` gives
the same record as a sample of an image with its caption.
"""

import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from prumerge_jax.data import samples
from prumerge_jax.data.samples import Sample, Turn
from prumerge_jax.data.tokens import IMAGE_PLACEHOLDER
from prumerge_jax.digits import questions as digits_questions
from prumerge_jax.digits import scenes as digits

CAPTION_FAMILY = "caption"


@dataclasses.dataclass(eq=False)
class DigitsVqaConfig(tfds.core.BuilderConfig):
    """Size and seed of the data set. They form the name, so other sizes get another directory.

    Attributes:
      train_scenes: number of scenes of the training split.
      validation_scenes: the same of the validation split, for tuning.
      test_scenes: the same of the test split, for reported figures.
      questions_per_family: questions of each family about a training scene; the other splits
        have one.
      scenes_per_layout: training scenes in a row that occupy the same places; the other splits
        have a layout per scene. `train_scenes` must be a multiple.
      seed: seed of the scenes and the questions.
    """

    name: str = ""
    train_scenes: int = 20_000
    validation_scenes: int = 500
    test_scenes: int = 1_000
    questions_per_family: int = 2
    scenes_per_layout: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.train_scenes % self.scenes_per_layout:
            raise ValueError(
                f"train_scenes is {self.train_scenes}; expected a multiple of scenes_per_layout "
                f"({self.scenes_per_layout})"
            )
        self.name = (
            f"train{self.train_scenes}-validation{self.validation_scenes}-test{self.test_scenes}"
            f"-questions{self.questions_per_family}-layout{self.scenes_per_layout}-seed{self.seed}"
        )


class DigitsVqa(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `digits_vqa`; nothing is downloaded."""

    VERSION = tfds.core.Version("2.0.0")
    BUILDER_CONFIGS = [DigitsVqaConfig()]

    def _info(self) -> tfds.core.DatasetInfo:
        text, texts = tfds.features.Text(), tfds.features.Sequence(tfds.features.Text())
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "id": text,
                    "image": tfds.features.Image(
                        shape=(digits.CANVAS, digits.CANVAS, 3), encoding_format="png"
                    ),
                    "conversations": samples.conversation_feature(),
                    "families": texts,
                    "caption": text,
                    "places": texts,
                    "digits": tfds.features.Sequence(np.int32),
                }
            ),
            disable_shuffling=True,  # keeps the scenes of one layout together
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        config = self.builder_config
        counts = (config.train_scenes, config.validation_scenes, config.test_scenes)
        return {
            split: self._generate_examples(split, count)
            for split, count in zip(digits.SPLITS, counts, strict=True)
        }

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict]]:
        config = self.builder_config
        train = split == "train"
        for index in range(count):
            scene, questions = digits_questions.draw_with_questions(
                split,
                index,
                seed=config.seed,
                scenes_per_layout=config.scenes_per_layout if train else 1,
                questions_per_family=config.questions_per_family if train else 1,
            )
            yield index, _record(scene, questions)


def caption_sample(record: Mapping[str, Any]) -> Sample:
    """A stored record as an image with its caption, for training the projector."""
    sample = samples.from_record(record)
    sample["conversations"] = _turns([(IMAGE_PLACEHOLDER, record["caption"].decode())])
    return sample


def _record(scene: digits.Scene, questions: Sequence[digits_questions.Question]) -> dict[str, Any]:
    caption = digits_questions.caption(scene)
    exchanges = [(question.text, question.response) for question in questions]
    exchanges.append((digits_questions.CAPTION_REQUEST, caption))
    first_question, first_answer = exchanges[0]
    exchanges[0] = (f"{IMAGE_PLACEHOLDER}\n{first_question}", first_answer)
    return {
        "id": scene.id,
        "image": io.BytesIO(scene.png()),
        "conversations": _turns(exchanges),
        "families": [*(question.family for question in questions), CAPTION_FAMILY],
        "caption": caption,
        "places": list(scene.places),
        "digits": list(scene.digits),
    }


def _turns(exchanges: Sequence[tuple[str, str]]) -> list[Turn]:
    turns: list[Turn] = []
    for question, answer in exchanges:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return turns

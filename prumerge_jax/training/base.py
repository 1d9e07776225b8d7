"""The model a run starts from, and the model it leaves behind."""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from prumerge_jax.conversion.convert import REPORT
from prumerge_jax.conversion.miniature import model_directory
from prumerge_jax.data.tokenizer import Style, Tokenizer
from prumerge_jax.digits import tokenizer as digits_tokenizer
from prumerge_jax.models import config_json
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.layers import AdapterConfig
from prumerge_jax.store import model_directory as directories
from prumerge_jax.store.manifest import MANIFEST, StoredArray, size_and_sha256
from prumerge_jax.store.strict_json import to_json
from prumerge_jax.training.parameters import Template, Weights
from prumerge_jax.training.stages import Stage, adapter_config, llava_template, model_config

_logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer.model"


@dataclasses.dataclass(frozen=True)
class Base:
    """A model directory, or random weights where there is none.

    Attributes:
      model: sizes.
      directory: holds the weights and the tokenizer; None for random weights.
      stored: shape and dtype of every weight in the directory.
      seed: of random weights.
    """

    model: LlavaConfig
    directory: pathlib.Path | None
    stored: Mapping[str, StoredArray]
    seed: int

    def hash(self) -> str:
        """What identifies the weights: the hash of the directory's manifest, a list of hashes."""
        if self.directory is not None:
            return size_and_sha256(self.directory / MANIFEST)[1]
        identity = json.dumps([to_json(self.model), self.seed], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()

    def tokenizer(self, style: Style) -> Tokenizer:
        """The directory's tokenizer; the miniature's belongs to random weights.

        Raises:
          DirectoryError: it has more pieces than the model's embedding has rows.
        """
        if self.directory is not None:
            tokenizer = Tokenizer(self.directory / TOKENIZER, style)
        else:
            with tempfile.TemporaryDirectory() as folder:
                file = pathlib.Path(folder) / TOKENIZER
                file.write_bytes(digits_tokenizer.build_for_digits())
                tokenizer = Tokenizer(file, style)
        if tokenizer.vocab_size > self.model.text.vocab_size:
            raise directories.DirectoryError(
                f"the tokenizer of {self.directory or 'the miniature'} has {tokenizer.vocab_size} "
                f"pieces, the model's embedding {self.model.text.vocab_size} rows"
            )
        return tokenizer

    def weights(self, stage: Stage, paths: Collection[str], mesh: Mesh) -> Weights:
        """Weights of a stage, each read or created in its shards.

        What trains and is not in the directory (adapters, the projector of a first stage, the
        parts of one stage) starts random; the log names it.

        Raises:
          DirectoryError: the directory lacks a frozen weight, or holds one of another shape.
        """
        shapes, shardings = stage.shapes(), stage.template.shardings(mesh)
        new = sorted(set(paths) - set(self.stored))
        lacking = [path for path in new if path not in stage.learning_rates]
        if self.directory is not None and lacking:
            raise directories.DirectoryError(
                f"{self.directory} lacks the weights {lacking}, which this run does not train"
            )
        if new:
            _logger.info("%d weights start random, %s to %s", len(new), new[0], new[-1])
        drawn = {path: shapes[path] for path in new}
        weights = stage.template.random(self.seed, drawn, shardings) if new else {}
        for path in sorted(set(paths) & set(self.stored)):
            target = jax.ShapeDtypeStruct(
                shapes[path].shape, shapes[path].dtype, sharding=shardings[path]
            )
            weights[path] = self._load(path, target)
        return weights

    def export(
        self,
        directory: str | os.PathLike[str],
        trained: Weights,
        adapter: AdapterConfig | None,
        mesh: Mesh,
        source: Mapping[str, Any],
    ) -> None:
        """Writes a whole model: the trained weights, the others exactly as the base has them.

        Args:
          directory: must not exist yet.
          trained: what the model does not have (parts of one stage) is left out.
          adapter: configuration of the adapters among the weights, if there are any.
          mesh: the devices.
          source: facts for the manifest.
        """
        template = llava_template(self.model, adapter)
        others = [path for path in template.variables if path not in trained]
        with directories.DirectoryWriter(
            directory, self.model, adapter=adapter, source=source
        ) as writer:
            for path in sorted(set(template.variables) & set(trained)):
                writer.write_array(path, trained[path])
            for path, array in self._untouched(template, others, mesh):
                writer.write_array(path, array)
            for name, content in self._files().items():
                writer.write_file(name, content)

    def _untouched(
        self, template: Template[Any], paths: list[str], mesh: Mesh
    ) -> Iterator[tuple[str, jax.Array]]:
        shardings = template.shardings(mesh)
        if self.directory is None:
            shapes = {path: template.shapes()[path] for path in paths}
            yield from template.random(self.seed, shapes, shardings).items()
            return
        for path in paths:
            # In the stored dtype, which may be wider than the one the run computed in.
            shape, dtype = self.stored[path].shape, self.stored[path].dtype
            target = jax.ShapeDtypeStruct(shape, dtype, sharding=shardings[path])
            yield path, self._load(path, target)

    def _load(self, path: str, target: jax.ShapeDtypeStruct) -> jax.Array:
        assert self.directory is not None
        stored = self.stored[path].shape
        if stored != target.shape:
            raise directories.DirectoryError(
                f"{self.directory}: {path} has the shape {stored}, this run expects {target.shape}"
            )
        return directories.load_array(self.directory, path, target)

    def _files(self) -> dict[str, bytes | pathlib.Path]:
        """Tokenizer and processor files, passed through; a report tells of other weights."""
        if self.directory is None:
            return {TOKENIZER: digits_tokenizer.build_for_digits()}
        own = (directories.CONFIG, MANIFEST, REPORT)
        plain = (file for file in self.directory.iterdir() if file.is_file())
        return {file.name: file for file in plain if file.name not in own}


def open_base(config: ml_collections.ConfigDict) -> Base:
    """The base that `config.weights` names, verified; random weights where it is None.

    Raises:
      DirectoryError: the directory is incomplete or altered, its sizes are not those of
        `config.model`, or it has adapters that the run does not have.
    """
    expected = model_config(config.model)
    if config.weights is None:
        return Base(expected, None, {}, config.seed)
    directory = model_directory(config.weights)
    directories.verify(directory, hashes=config.run.verify_weights)
    found, adapter = config_json.read_config(directory), config_json.read_adapter(directory)
    if _sizes(found) != _sizes(expected):
        raise directories.DirectoryError(
            f"{directory} holds a model with {_sizes(found)}; config.model says {_sizes(expected)}"
        )
    if adapter not in (None, adapter_config(config)):
        raise directories.DirectoryError(
            f"{directory} holds a model with adapters {adapter}; this run has "
            f"{adapter_config(config)}: go on with the same, or merge them into the weights first"
        )
    return Base(found, directory, directories.read_manifest(directory).arrays, config.seed)


def _sizes(model: LlavaConfig) -> dict[str, Any]:
    """What a recipe fixes. Vocabularies differ: llava-hf's is padded, the original one is not."""
    fields = to_json(model)
    del fields["text"]["vocab_size"]
    return {name: fields[name] for name in ("vision", "text", "projector")}

"""Weights as one flat dictionary, where they come from, and the model that a run exports.

Between the jitted functions a model is a dictionary from dotted path to array (`Weights`), the
form in which model directories and checkpoints hold it too. Inside a jitted function an
`AbstractModule` turns the dictionary back into the module.
"""

import dataclasses
import fnmatch
import hashlib
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from prumerge_jax.conversion.convert import REPORT
from prumerge_jax.conversion.miniature import model_directory
from prumerge_jax.data.sentencepiece_tokenizer import Style
from prumerge_jax.data.tokenizer import (
    SENTENCEPIECE_FILE,
    Tokenizer,
    load_tokenizer,
    tokenizer_file,
)
from prumerge_jax.messages import quoted
from prumerge_jax.models import config_json, quantised_weights
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.layers import AdapterConfig
from prumerge_jax.models.llava import LlavaModel
from prumerge_jax.models.quantisation import format_named
from prumerge_jax.sharding.mesh import use_mesh
from prumerge_jax.store import model_directory as directories
from prumerge_jax.store.manifest import MANIFEST, StoredArray, weights_identity
from prumerge_jax.store.strict_json import to_json
from prumerge_jax.training.config import RANDOM, ConfigError, TrainConfig

_logger = logging.getLogger(__name__)


Weights = dict[str, jax.Array]
Shapes = dict[str, jax.ShapeDtypeStruct]
LearningRates = Sequence[tuple[str, float]]
Leaf = Any
"""An array, or what takes its place in a tree of the same form: its shape, its sharding."""

Module = TypeVar("Module", bound=nnx.Module)

_TOKENIZERS: dict[str, Callable[[], bytes]] = {}


def register_tokenizer(name: str, build: Callable[[], bytes]) -> None:
    """Makes a tokenizer known to `TrainConfig.tokenizer`; `build` gives its `tokenizer.model`."""
    _TOKENIZERS[name] = build


@dataclasses.dataclass(frozen=True, eq=False)
class AbstractModule(Generic[Module]):
    """A module without its arrays.

    Attributes:
      make: builds the module with random weights from a seed.
      graphdef: its structure.
      variables: its abstract variables (shape, dtype, logical axes) by dotted path.
    """

    make: Callable[[int], Module]
    graphdef: nnx.GraphDef
    variables: Mapping[str, nnx.Variable]

    @classmethod
    def of(cls, make: Callable[[int], Module]) -> "AbstractModule[Module]":
        """The abstract module of those that `make` builds; allocates nothing."""
        with nnx.use_eager_sharding(False):
            graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(0)))
        return cls(make, graphdef, _flatten(abstract))

    def merge(self, weights: Mapping[str, jax.Array]) -> Module:
        """The module with these weights.

        Raises:
          KeyError: a weight is missing.
        """
        variables = {path: self.variables[path].replace(weights[path]) for path in self.variables}
        return nnx.merge(self.graphdef, _unflatten(variables))

    def shapes(self) -> Shapes:
        """Shape and dtype of every weight as created: float32 but for codes."""
        return {
            path: jax.ShapeDtypeStruct(variable.shape, variable.dtype)
            for path, variable in self.variables.items()
        }

    def shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
        """The declared sharding of every weight."""
        with use_mesh(mesh):
            placed = _flatten(nnx.get_named_sharding(_unflatten(self.variables), mesh))
        return {path: variable.get_value() for path, variable in placed.items()}

    def random(self, seed: int, shapes: Shapes, shardings: Mapping[str, NamedSharding]) -> Weights:
        """Fresh weights for the paths of `shapes`, created in their shards; others cost nothing."""

        def create() -> Weights:
            # Drawn in float32: other dtypes would draw other numbers.
            with nnx.use_eager_sharding(False):
                weights = _flatten(nnx.split(self.make(seed))[1])
            return {path: weights[path][...].astype(shapes[path].dtype) for path in shapes}

        return jax.jit(create, out_shardings={path: shardings[path] for path in shapes})()


def llava_module(
    model: LlavaConfig, adapter: AdapterConfig | None, quantize: str | None = None
) -> AbstractModule[LlavaModel]:
    """The abstract module of a `LlavaModel`; `quantize` is a format of its decoder's kernels."""
    form = None if quantize is None else format_named(quantize)
    return AbstractModule.of(
        lambda seed: LlavaModel(model, adapter=adapter, quantize=form, rngs=nnx.Rngs(seed))
    )


def trained_paths(paths: Collection[str], learning_rates: LearningRates) -> dict[str, float]:
    """The weights that train, each with its learning rate; what is not named is frozen.

    Args:
      paths: dotted paths of all weights.
      learning_rates: pairs of a path pattern (`*` matches anything, dots included) and a rate.

    Raises:
      ValueError: a pattern matches no weight, two match the same one, one matches a quantised
        kernel, or nothing would train.
    """
    rates: dict[str, float] = {}
    pattern_of: dict[str, str] = {}
    parts = ", ".join(sorted({path.split(".")[0] + ".…" for path in paths}))
    if not learning_rates:
        raise ValueError(
            f"learning_rates is empty, so nothing would train; expected pairs of a pattern of "
            f"weights and a rate; the weights are {parts}"
        )
    for pattern, rate in learning_rates:
        fitting = fnmatch.filter(sorted(paths), pattern)
        if not fitting:
            lora = ", lora_a and lora_b where there are adapters" if "lora" in pattern else ""
            raise ValueError(
                f"learning_rates: pattern {quoted(pattern)} fits no weight; the weights are "
                f"{parts}{lora}"
            )
        for path in fitting:
            if path.endswith((quantised_weights.CODES, quantised_weights.SCALE)):
                raise ValueError(
                    f"learning_rates: {path} fits {pattern!r}; quantised kernels do not train, "
                    "adapters on them do"
                )
            if path in rates:
                raise ValueError(
                    f"learning_rates: {path} fits both {pattern_of[path]!r} and {pattern!r}; "
                    "expected one learning rate per weight"
                )
            rates[path], pattern_of[path] = rate, pattern
    return rates


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """The model that a run starts from: a model directory, or random weights.

    Attributes:
      model: sizes.
      directory: holds the weights and the tokenizer; None for random weights.
      stored: shape and dtype of every weight in the directory.
      seed: seed of random weights.
      random_tokenizer: for random weights, a `tokenizer.model` or a registered name.
      quantize: format that the run holds the decoder's kernels in; None for none.
      stored_quantized: whether the directory holds them so; else they are quantised when read, and
        the run exports them as the directory has them.
    """

    model: LlavaConfig
    directory: pathlib.Path | None
    stored: Mapping[str, StoredArray]
    seed: int
    random_tokenizer: str | None = None
    quantize: str | None = None
    stored_quantized: bool = False

    def verify(self, *, hashes: bool) -> None:
        """Compares the files with the manifest: sizes, and SHA-256 if `hashes`.

        Raises:
          DirectoryError: the directory is incomplete or altered.
        """
        if self.directory is not None:
            directories.verify(self.directory, hashes=hashes)

    def identity(self) -> str:
        """What identifies the weights: a hash of their content, or of sizes and seed."""
        if self.directory is not None:
            return weights_identity(self.directory)
        identity = json.dumps([to_json(self.model), self.seed], sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()

    def tokenizer(self, style: Style) -> Tokenizer:
        """The directory's tokenizer, or the one for random weights.

        Raises:
          DirectoryError: it is missing, or has more pieces than the model's embedding has rows.
          ValueError: it is not a tokenizer of the expected kind.
        """
        source = self._tokenizer_source()
        if isinstance(source, bytes):
            with tempfile.TemporaryDirectory() as folder:
                file = pathlib.Path(folder) / SENTENCEPIECE_FILE
                file.write_bytes(source)
                tokenizer = load_tokenizer(file, style)
        else:
            tokenizer = load_tokenizer(source, style)
        if tokenizer.vocab_size > self.model.text.vocab_size:
            raise directories.DirectoryError(
                f"the tokenizer of {self.directory or quoted(self.random_tokenizer)} has "
                f"{tokenizer.vocab_size} pieces, the model's embedding "
                f"{self.model.text.vocab_size} rows"
            )
        return tokenizer

    def load(
        self,
        module: AbstractModule[Any],
        wanted: Shapes,
        trained: Collection[str],
        shardings: Mapping[str, NamedSharding],
    ) -> Weights:
        """Weights of a module, each read or created in its shards.

        What trains and is not in the directory (adapters, the projector of a first stage, the
        parts of one objective) starts random; the log names it.

        Args:
          module: has the weights, and maybe more.
          wanted: shapes and dtypes of those to load.
          trained: paths of those that train.
          shardings: of those to load, at least.

        Raises:
          DirectoryError: the directory lacks a frozen weight, or holds one of another shape.
        """
        kernels = quantised_weights.to_quantise(wanted, self.stored)
        made = {part for parts in kernels.values() for part in parts}
        new = sorted(set(wanted) - set(self.stored) - made)
        lacking = [path for path in new if path not in trained]
        if self.directory is not None and lacking:
            raise directories.DirectoryError(
                f"{self.directory} lacks the weights {quoted(lacking, 200)}, which this run does "
                "not train"
            )
        if new:
            _logger.info("%d weights start random, %s to %s", len(new), new[0], new[-1])
        drawn = {path: wanted[path] for path in new}
        weights = module.random(self.seed, drawn, shardings) if new else {}
        for path in sorted(set(wanted) & set(self.stored)):
            shape, dtype = wanted[path].shape, wanted[path].dtype
            target = jax.ShapeDtypeStruct(shape, dtype, sharding=shardings[path])
            weights[path] = self._read(path, target)
        for kernel, parts in kernels.items():
            weights |= self._quantised(kernel, parts, wanted, shardings)
        return weights

    def _quantised(
        self,
        kernel: str,
        parts: tuple[str, str],
        wanted: Shapes,
        shardings: Mapping[str, NamedSharding],
    ) -> Weights:
        """Codes and scales of a kernel that the directory holds unquantised."""
        assert self.directory is not None
        assert self.quantize is not None
        self._check_shape(kernel, wanted[parts[0]].shape)
        targets = [
            jax.ShapeDtypeStruct(wanted[part].shape, wanted[part].dtype, sharding=shardings[part])
            for part in parts
        ]
        form = format_named(self.quantize)
        quantised = quantised_weights.load_quantised(self.directory, kernel, targets, form)
        return dict(zip(parts, quantised, strict=True))

    def export(
        self,
        directory: str | os.PathLike[str],
        trained: Weights,
        adapter: AdapterConfig | None,
        mesh: Mesh,
        source: Mapping[str, Any],
    ) -> None:
        """Writes a complete model: the trained weights, the others exactly as they were, which is
        unquantised unless the directory held them quantised.

        Args:
          directory: must not exist yet.
          trained: what the model does not have (parts of one objective) is left out.
          adapter: configuration of the adapters among the weights, if there are any.
          mesh: the devices.
          source: facts for the manifest.
        """
        quantize = self.quantize if self.stored_quantized else None
        module = llava_module(self.model, adapter, quantize)
        others = [path for path in module.variables if path not in trained]
        with directories.DirectoryWriter(
            directory, self.model, adapter=adapter, quantize=quantize, source=source
        ) as writer:
            for path in sorted(set(module.variables) & set(trained)):
                writer.write_array(path, trained[path])
            for path, array in self._untouched(module, others, mesh):
                writer.write_array(path, array)
            for name, content in self._files().items():
                writer.write_file(name, content)

    def _untouched(
        self, module: AbstractModule[Any], paths: list[str], mesh: Mesh
    ) -> Iterator[tuple[str, jax.Array]]:
        shardings = module.shardings(mesh)
        if self.directory is None:
            shapes = {path: module.shapes()[path] for path in paths}
            yield from module.random(self.seed, shapes, shardings).items()
            return
        for path in paths:
            # In the stored dtype, which may be wider than the one the run computed in.
            shape, dtype = self.stored[path].shape, self.stored[path].dtype
            target = jax.ShapeDtypeStruct(shape, dtype, sharding=shardings[path])
            yield path, self._read(path, target)

    def _read(self, path: str, target: jax.ShapeDtypeStruct) -> jax.Array:
        assert self.directory is not None
        self._check_shape(path, target.shape)
        return directories.load_array(self.directory, path, target)

    def _check_shape(self, path: str, shape: tuple[int, ...]) -> None:
        stored = self.stored[path].shape
        if stored != shape:
            raise directories.DirectoryError(
                f"{self.directory}: {path} has the shape {stored}, this run expects {shape}"
            )

    def _files(self) -> dict[str, bytes | pathlib.Path]:
        """Tokenizer and processor files, passed through; a report tells of other weights."""
        if self.directory is None:
            source = self._tokenizer_source()
            name = SENTENCEPIECE_FILE if isinstance(source, bytes) else source.name
            return {name: source}
        own = (directories.CONFIG, MANIFEST, REPORT)
        plain = (file for file in self.directory.iterdir() if file.is_file())
        return {file.name: file for file in plain if file.name not in own}

    def _tokenizer_source(self) -> bytes | pathlib.Path:
        if self.directory is None and self.random_tokenizer in _TOKENIZERS:
            return _TOKENIZERS[self.random_tokenizer]()
        if self.directory is None:
            file = pathlib.Path(self.random_tokenizer or "").expanduser()
        else:
            file = tokenizer_file(self.directory)
        if not file.is_file():
            raise directories.DirectoryError(f"{file}: no such file, or not a regular file")
        return file


def load_pretrained(config: TrainConfig) -> Pretrained:
    """The model that `config.weights` names; its files are not hashed yet, see `verify`.

    Raises:
      ConfigError: `config.weights` is not set, or random weights lack sizes or a tokenizer.
      DirectoryError: the directory is incomplete, its sizes are not those of `config.model`, or it
        has adapters that the run does not have.
    """
    if config.weights is None:
        raise ConfigError(
            "config.weights is not set; expected a model directory that convert_weights.py wrote, "
            f"'miniature', or {RANDOM!r} for random weights"
        )
    if config.weights == RANDOM:
        return _random(config)
    directory = model_directory(config.weights)
    if not directory.is_dir():
        raise directories.DirectoryError(
            f"{directory}: no such directory; config.weights names the model to start from"
        )
    manifest = directories.read_manifest(directory)
    found, adapter = config_json.read_config(directory), config_json.read_adapter(directory)
    if config.model is not None and _sizes(found) != _sizes(config.model):
        raise directories.DirectoryError(
            f"{directory} holds a model with {_sizes(found)}; config.model says "
            f"{_sizes(config.model)}"
        )
    if adapter not in (None, config.adapter):
        raise directories.DirectoryError(
            f"{directory} holds a model with adapters {adapter}; this run has "
            f"{config.adapter}: continue with the same, or merge them into the weights first"
        )
    stored = quantised_weights.stored_format(directory)
    if stored is not None and config.quantize != stored.stored_as:
        raise ConfigError(
            f"{directory} holds {stored.stored_as} weights, config.quantize is "
            f"{quoted(config.quantize)}; expected {stored.stored_as!r}, or unquantised weights"
        )
    return Pretrained(
        found,
        directory,
        manifest.arrays,
        config.seed,
        quantize=config.quantize,
        stored_quantized=stored is not None,
    )


def _random(config: TrainConfig) -> Pretrained:
    if config.model is None:
        raise ConfigError(
            f"config.weights is {RANDOM!r}, but config.model names no sizes; expected a recipe "
            "that does, or a model directory"
        )
    if config.tokenizer is None:
        raise ConfigError(
            f"config.weights is {RANDOM!r}, so config.tokenizer must name a tokenizer.model"
            + (f" or one of {sorted(_TOKENIZERS)}" if _TOKENIZERS else "")
        )
    return Pretrained(
        config.model, None, {}, config.seed, config.tokenizer, quantize=config.quantize
    )


def _sizes(model: LlavaConfig) -> dict[str, Any]:
    """What a recipe fixes. Vocabularies differ: llava-hf's is padded, the original one is not."""
    fields = to_json(model)
    del fields["text"]["vocab_size"]
    return {name: fields[name] for name in ("vision", "text", "projector")}


def _flatten(state: nnx.State) -> dict[str, nnx.Variable]:
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def _unflatten(variables: Mapping[str, nnx.Variable]) -> nnx.State:
    flat: Mapping[Any, Any] = {tuple(path.split(".")): v for path, v in variables.items()}
    return nnx.from_flat_state(flat)

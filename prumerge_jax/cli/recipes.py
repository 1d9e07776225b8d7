"""Configurations by the name of a published recipe, or by the path of a file.

`prumerge_7b_lora`, `digits/lora:tiny` or `configs/digits/lora.py:tiny`: what follows the colon is
the argument of the file's `get_config`. Published are the files of `configs/`; an installed package
carries them as `prumerge_jax/configs`. They import each other as `configs` in either place, and so
may a file of the user's.
"""

import importlib.util
import inspect
import pathlib
import sys
import traceback
from types import ModuleType

from ml_collections import ConfigDict

from prumerge_jax.messages import nearest, shortened

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
_INSTALLED, _CLONE = _PACKAGE / "configs", _PACKAGE.parent / "configs"
FOLDER = _INSTALLED if _INSTALLED.is_dir() else _CLONE
"""Where the published recipes are stored."""

_PACKAGE_NAME = "configs"


def names() -> list[str]:
    """Every published recipe, as `--config` takes it: `eval`, `digits/lora`, ..."""
    files = (file for file in FOLDER.rglob("*.py") if "def get_config(" in file.read_text("utf-8"))
    return sorted(file.relative_to(FOLDER).with_suffix("").as_posix() for file in files)


def load(recipe: str) -> ConfigDict:
    """The configuration that a recipe describes.

    Args:
      recipe: a published name, or the path of a Python file with a function `get_config`; either
        may be followed by `:` and that function's argument.

    Raises:
      ValueError: no such recipe, or the file fails; the message says where.
    """
    path, has_argument, argument = recipe.partition(":")
    file = _find(path)
    module = _execute(recipe, file)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ValueError(f"{file} defines no function get_config")
    arguments = [argument] if has_argument else []
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        expected = "needs an argument after a colon" if not arguments else "takes no argument"
        raise ValueError(f"--config {shortened(recipe)}: the recipe {expected}") from None
    try:
        config = get_config(*arguments)
    except Exception as error:
        raise ValueError(_failure(recipe, file, error)) from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{file}: get_config returned {type(config).__name__}, not a ConfigDict")
    return config


def _find(path: str) -> pathlib.Path:
    file = pathlib.Path(path)
    if file.suffix == ".py":
        if not file.is_file():
            raise ValueError(f"--config {shortened(path)}: no such file")
        _make_importable(replace=False)
        return file.resolve()
    published = names()
    if path not in published:
        near = nearest(path, published)
        hint = f"did you mean {near}?" if near else f"published are {', '.join(published)}"
        raise ValueError(
            f"--config {shortened(path)}: no recipe of that name, and no .py file; {hint}"
        )
    _make_importable(replace=True)
    return FOLDER / f"{path}.py"


def _make_importable(*, replace: bool) -> None:
    """Makes `from configs import common` mean the published recipes.

    Args:
      replace: also where another package of that name is on the path.
    """
    loaded = sys.modules.get(_PACKAGE_NAME)
    if loaded is not None and FOLDER in map(pathlib.Path, loaded.__path__):
        return
    if not replace and (loaded or importlib.util.find_spec(_PACKAGE_NAME)):
        return
    _load_module(_PACKAGE_NAME, FOLDER / "__init__.py", package=FOLDER)


def _execute(recipe: str, file: pathlib.Path) -> ModuleType:
    try:
        return _load_module(f"recipe_{file.stem}", file)
    except Exception as error:
        raise ValueError(_failure(recipe, file, error)) from error


def _load_module(name: str, file: pathlib.Path, package: pathlib.Path | None = None) -> ModuleType:
    folders = None if package is None else [str(package)]
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=folders)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _failure(recipe: str, file: pathlib.Path, error: Exception) -> str:
    """Names the line of the recipe that failed, or that Python cannot read."""
    if isinstance(error, SyntaxError):
        return f"--config {shortened(recipe)}: {error.filename}, line {error.lineno}: {error.msg}"
    own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    where = f"line {own[-1].lineno}: " if own else ""
    return f"--config {shortened(recipe)}: {where}{type(error).__name__}: {error}"

"""Puts a model directory on the Hugging Face hub, with a model card, only when asked to."""

import os
import pathlib
import re
from typing import Any

from prumerge_jax.conversion.tensor_files import ConversionError
from prumerge_jax.messages import quoted
from prumerge_jax.models import config_json
from prumerge_jax.store import model_directory as directories
from prumerge_jax.store.manifest import weights_identity

CARD = "README.md"

_TEMPLATE = """---
library_name: prumerge_jax
pipeline_tag: image-text-to-text
tags:
- llava
- jax
- prumerge
---

# {name}

A LLaVA for prumerge_jax, which answers questions about images with few visual tokens.

| | |
|---|---|
| decoder | {layers} layers of width {width}, {vocabulary:,} tokens |
| vision tower | {vision_layers} layers of width {vision_width}, {patches} patches |
| images | {side} x {side} pixels |
| weights | {dtype}, identity `{identity}` |

```python
from prumerge_jax import Llava

llava = Llava.load("{repository}", revision="COMMIT")
print(llava.generate(["image.jpg"], ["What is this?"], reduction="prumerge+"))
```

COMMIT is one of this repository, 40 digits. Please add the license of the weights, what they were
trained on, and what the model is not to be used for.
"""


def model_card(folder: pathlib.Path, repository: str) -> str:
    """The card of a model directory: what its files say, and places for what they do not."""
    config = config_json.read_config(folder)
    arrays = directories.read_manifest(folder).arrays
    text, vision = config.text, config.vision
    return _TEMPLATE.format(
        name=repository.partition("/")[2],
        repository=repository,
        layers=text.num_layers,
        width=text.width,
        vocabulary=text.vocab_size,
        vision_layers=vision.num_layers,
        vision_width=vision.width,
        side=vision.image_size,
        patches=vision.num_patches,
        dtype=" and ".join(sorted({str(stored.dtype) for stored in arrays.values()})),
        identity=weights_identity(folder)[:12],
    )


def push(folder: str | os.PathLike[str], repository: str, api: Any = None) -> str:
    """Uploads a verified model directory with its card to a repository.

    A repository that does not exist is made private: making it public is a decision of its owner.
    A card that is there already is kept.

    Args:
      folder: a directory that `convert_weights.py` or `train.py` wrote.
      repository: `user/name`.
      api: a `huggingface_hub.HfApi`; by default with the token that is logged in.

    Returns:
      The address of the commit.

    Raises:
      ConversionError: no such name, or the hub refuses.
      DirectoryError: the directory is incomplete or altered.
    """
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", repository, re.ASCII):
        raise ConversionError(f"--push={repository[:80]}: expected USER/NAME")
    root = pathlib.Path(folder)
    directories.verify(root)
    card = model_card(root, repository)
    try:
        if api is None:
            import huggingface_hub

            api = huggingface_hub.HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        if not api.file_exists(repository, CARD):
            api.upload_file(path_or_fileobj=card.encode(), path_in_repo=CARD, repo_id=repository)
        done = api.upload_folder(repo_id=repository, folder_path=root, ignore_patterns=[CARD])
    except Exception as error:  # the hub client raises errors of several HTTP libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConversionError(f"cannot push to {quoted(repository)}: {reason[:200]}") from error
    return str(done.commit_url)

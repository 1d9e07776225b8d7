"""An engine whose shapes fit the requests that will run."""

import dataclasses
from collections.abc import Sequence

from prumerge_jax import sharding
from prumerge_jax.data.sequences import PositionIds
from prumerge_jax.data.visual_layout import Newlines
from prumerge_jax.engine.build import Draft
from prumerge_jax.engine.encoding import PlacedModel, resized
from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.pages import pages_that_fit
from prumerge_jax.engine.shapes import EngineConfig, fit
from prumerge_jax.models import tuning
from prumerge_jax.reductions import Reduction


def fitted_engine(
    model: PlacedModel,
    config: EngineConfig,
    reduction: Reduction,
    drafts: Sequence[Draft],
    *,
    max_new_tokens: int,
    position_ids: PositionIds,
    newlines: Newlines,
    image_budget: int | None,
) -> Engine:
    """An engine for these requests, on images of the size that the reduction wants.

    Args:
      model: the model.
      config: shapes to fix; the others are fitted.
      reduction, drafts, max_new_tokens, position_ids, newlines, image_budget: as in `Llava.engine`.
    """
    model = dataclasses.replace(model, config=resized(model.config, reduction))
    with sharding.use_mesh(model.mesh):
        page_size = config.page_size or tuning.current().page_size
        shapes = fit(
            config,
            reduction,
            model.config.vision.num_patches,
            [draft.opening for draft in drafts],
            max_new_tokens=max_new_tokens,
            max_positions=model.config.text.max_positions,
            shards=model.shards,
            pages_that_fit=pages_that_fit(model, page_size),
        )
    if model.mesh is None:
        layouts = [layout for draft in drafts for layout in draft.layouts]
        crops = sum(layout.num_crops for layout in layouts)
        kinds = len({layout.frames > 0 for layout in layouts})
        shapes = shapes.limited_to(len(drafts), crops, max(kinds, 1))
    return Engine(
        model,
        reduction,
        shapes,
        position_ids=position_ids,
        newlines=newlines,
        image_budget=image_budget,
    )

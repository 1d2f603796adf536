"""What a run's own task makes of images: filled in, coloured, turned back.

Shape suffixes: N images, K columns, S side in pixels.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data_pipeline.reading.open_data import OpenData
from trainer.config import RunConfig, from_json
from trainer.evaluation.load_encoder import fill
from trainer.objectives.base import Given, Inputs, Objective
from trainer.parallel.networks import build_objective
from trainer.report.samples import Images, drawn_views
from trainer.state.checkpoint import load_model_state

_IMAGES = 16


class TaskPictures(NamedTuple):
    """Rows of images."""

    titles: tuple[str, ...]
    """K, of the columns."""
    images_NKSS3: Images  # noqa: N815


def task_pictures(
    run: Path, settings: dict[str, Any], train: OpenData, device: torch.device
) -> TaskPictures | None:
    """Of a run's first samples, by its newest checkpoint; None: its objective has none.

    Raises:
        CheckpointError: there is no checkpoint.
        DataError: a sample cannot be read.
    """
    saved = {name: value for name, value in settings.items() if name != "run"}
    config = from_json(RunConfig, saved, "config.json")
    objective = build_objective(config, None, train.info.num_samples, train.num_classes)
    if type(objective).pictures is Objective.pictures:
        return None
    fill(objective, load_model_state(run), f"{run}: its checkpoint")
    plan = config.view_plan()
    ids_N, groups = drawn_views(train, settings, plan, _IMAGES, normalized=True)
    views, ids_N = tuple(group.to(device) for group in groups), ids_N.to(device)
    with torch.no_grad():
        shown = objective.to(device).eval().pictures(Inputs(views, ids_N, ids_N >= 0))
    if not shown:
        return None
    mean, std = config.augment.normalisation()
    as_views = Given(mean=mean, std=std)
    colours = [as_views.colours(images.float()) for images in shown.values()]
    images_NK3SS = (torch.stack(colours, 1) * 255).round().to(torch.uint8).cpu()
    images_NKSS3 = images_NK3SS.permute(0, 1, 3, 4, 2)
    return TaskPictures(tuple(shown), np.ascontiguousarray(images_NKSS3.numpy()))

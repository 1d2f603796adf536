"""What a run's own task makes of images: filled in, coloured, turned back, put in clusters.

Shape suffixes: N images or clusters, K columns, S side in pixels.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.reading.open_data import OpenData
from trainer.config import RunConfig, from_json
from trainer.evaluation.load_encoder import Preprocessing, fill
from trainer.evaluation.pictures import Album
from trainer.objectives.base import Given, Inputs, Objective
from trainer.parallel.networks import build_objective
from trainer.report.samples import Images, drawn_views, evenly
from trainer.state.checkpoint import load_model_state

_IMAGES = 16
_CLUSTERS = 8  # that are shown, and images of each


class TaskPictures(NamedTuple):
    """Rows of images."""

    titles: tuple[str, ...]
    """K, of the columns; empty where they are all of one kind."""
    images_NKSS3: Images  # noqa: N815
    rows: tuple[str, ...]
    """N, what each is."""
    hint: str = "Images of the first epoch, and what the run's own task makes of them."


def task_pictures(
    run: Path, settings: dict[str, Any], train: OpenData, device: torch.device
) -> TaskPictures | None:
    """Of a run's first samples, by its newest checkpoint, or of its clusters; None: its objective
    has neither.

    Raises:
        CheckpointError: there is no checkpoint.
        DataError: a sample cannot be read.
    """
    saved = {name: value for name, value in settings.items() if name != "run"}
    config = from_json(RunConfig, saved, "config.json")
    objective = build_objective(config, None, train.info.num_samples, train.num_classes)
    kind = type(objective)
    if kind.pictures is Objective.pictures and kind.sample_clusters is Objective.sample_clusters:
        return None
    fill(objective, load_model_state(run), f"{run}: its checkpoint")
    plan = config.view_plan()
    ids_N, groups = drawn_views(train, settings, plan, _IMAGES, normalized=True)
    views, ids_N = tuple(group.to(device) for group in groups), ids_N.to(device)
    with torch.no_grad():
        shown = objective.to(device).eval().pictures(Inputs(views, ids_N, ids_N >= 0))
    clusters_M = objective.sample_clusters()
    if not shown:
        side = config.crop.size
        how = Preprocessing(size=side, resize=side)
        return None if clusters_M is None else _clusters(clusters_M.cpu().numpy(), train, how)
    mean, std = config.augment.normalisation()
    as_views = Given(mean=mean, std=std)
    colours = [as_views.colours(images.float()) for images in shown.values()]
    images_NK3SS = (torch.stack(colours, 1) * 255).round().to(torch.uint8).cpu()
    images_NKSS3 = images_NK3SS.permute(0, 1, 3, 4, 2)
    rows = tuple(f"image {n + 1}" for n in range(len(images_NKSS3)))
    return TaskPictures(tuple(shown), np.ascontiguousarray(images_NKSS3.numpy()), rows)


def _clusters(
    groups_M: npt.NDArray[np.int64], train: OpenData, how: Preprocessing
) -> TaskPictures | None:
    """Some clusters from the largest to the smallest that has as many images as are shown."""
    numbers, sizes = np.unique(groups_M[groups_M >= 0], return_counts=True)
    if not len(sizes):
        return None
    columns = min(_CLUSTERS, int(sizes.max()))
    shown = [n for n in np.argsort(-sizes, kind="stable") if sizes[n] >= columns]
    shown = [shown[place] for place in evenly(len(shown), _CLUSTERS)]
    members = [np.flatnonzero(groups_M == numbers[n]) for n in shown]
    ids_NK = np.stack([each[evenly(len(each), columns)] for each in members])
    images = Album(train, how).read(ids_NK.flatten().tolist())
    return TaskPictures(
        ("",) * columns,
        images.reshape(*ids_NK.shape, *images.shape[1:]),
        tuple(f"cluster {numbers[n]}: {sizes[n]} images" for n in shown),
        f"Of {len(numbers)} clusters of the newest checkpoint's epoch some, the largest first.",
    )

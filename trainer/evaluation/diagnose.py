"""What features tell of themselves, without labels: ``widebatch evaluate diagnose``.

Alignment and uniformity (Wang & Isola 2020, arXiv 2005.10242), effective rank (RankMe, Garrido et
al. 2023, arXiv 2210.02885), feature standard deviation (Chen & He 2021, arXiv 2011.10566). All of
features scaled to length 1, before any head. In training, the same two last figures are those of
the projections: see :mod:`trainer.health.collapse`.

Shape suffixes: N samples, B samples of a block, F features, V views (2).
"""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from common.bounds import check_bounds
from common.errors import ConfigError
from data_pipeline.augment import AugmentConfig
from data_pipeline.crops import CropConfig
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import permute
from trainer.config import from_json
from trainer.evaluation.job import Job, JobConfig, TrainFiles
from trainer.features.neighbours import full_float32, unit_rows
from trainer.health.collapse import figures

_TEMPERATURE = 2.0  # Wang & Isola's t
_ROWS = 1024  # of a block


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(JobConfig):
    """What features tell of themselves, without labels.

    Alignment of two augmented views and uniformity (Wang & Isola 2020), effective rank (RankMe) and
    feature standard deviation, which both fall when a network collapses. They order encoders of one
    architecture and data set, and say little elsewhere.
    """

    train: TrainFiles
    """Images that are looked at, labelled or not."""
    pairs_of: int = 10_000
    """Samples of which all pairs are compared for the uniformity."""
    views_of: int = 2048
    """Samples of which two views are compared for the alignment."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        super().__post_init__()
        check_bounds(self, "--", pairs_of="[2, inf)", views_of="[2, inf)")


def diagnose(config: DiagnoseConfig) -> dict[str, Any] | None:
    """Measure. A collective where several processes were started.

    Returns:
        JSON values on rank 0, ``None`` on the others: ``alignment`` (0 is best), ``uniformity``
        (lower is better), ``effective_rank`` (1 to ``feature_dim``), ``feature_std`` (1 is spread
        evenly, 0 a single point), ``positive_similarity`` and ``negative_similarity`` (mean
        cosines of two augmented views of one image, and of two images).

    Raises: as :func:`trainer.evaluation.knn.knn`.
    """
    job, data = Job(config), OpenData(config.train)
    info = data.info
    if info.num_samples < 2:
        raise ConfigError(f"{info.name} has one sample: two are the least to compare")
    with job:
        features_NF = job.features(data).features_NF
        job.leave()
        if job.rank:
            return None
        positive, negative, compared = _view_cosines(config, job, data)
        device = job.device
        std, rank = spectrum(features_NF, device)
        spread_N = permute(config.seed, 0, np.arange(info.num_samples), info.num_samples)
        chosen = torch.from_numpy(np.sort(spread_N[: config.pairs_of]))
        uniform = uniformity(features_NF[chosen], device)
    of_run = "crop" in job.loaded.settings
    whose = "the run's settings" if of_run else "SimCLR's settings for ImageNet"
    return {
        "method": "diagnose",
        "protocol": "alignment-uniformity",
        "alignment": 2 - 2 * positive,  # |x - y|² of rows of length 1
        "uniformity": uniform,
        "effective_rank": rank,
        "feature_std": std,
        "positive_similarity": positive,
        "negative_similarity": negative,
        "feature_dim": features_NF.shape[1],
        "n_train": info.num_samples,
        "settings": {"pairs_of": len(chosen), "views_of": compared, "t": _TEMPERATURE, "alpha": 2},
        "measured": job.measured(
            features="scaled to length 1, before any head",
            alignment=f"two augmented views by {whose}, without those that training drew",
        ),
        "notes": [],
        **job.facts(train=info),
    }


def _view_cosines(config: DiagnoseConfig, job: Job, data: OpenData) -> tuple[float, float, int]:
    """Mean cosines of two views of one image and of two images; how many images.

    Views are made a run's own way, elsewhere SimCLR's.
    """
    saved, crop, augment = job.loaded.settings, CropConfig(), AugmentConfig()
    if "crop" in saved:
        crop = from_json(CropConfig, saved["crop"], "config.json: crop")
        augment = from_json(AugmentConfig, saved["augment"], "config.json: augment")
    crop = dataclasses.replace(crop, size=job.preprocessing.size)
    batch = min(config.batch, config.views_of, data.info.num_samples)
    found, views = [], (augment.view1, augment.view2)
    with job.augmented(data, crop, batch, views, alone=True) as (steps, batches):
        for images, _ in itertools.islice(batches, min(steps, -(-config.views_of // batch))):
            features = job.encode(images).double()
            found.append(torch.nn.functional.normalize(features, dim=1).cpu().chunk(2))
    first_NF, second_NF = (torch.cat(views)[: config.views_of] for views in zip(*found))
    count = len(first_NF)
    same = float((first_NF * second_NF).sum())
    every = float(first_NF.sum(dim=0) @ second_NF.sum(dim=0))
    return same / count, (every - same) / (count * (count - 1)), count


@torch.no_grad()
def spectrum(features_NF: torch.Tensor, device: torch.device | str) -> tuple[float, float]:
    """Feature standard deviation and effective rank, as in training, of any number of features."""
    width = features_NF.shape[1]
    squares_FF = torch.zeros(width, width, dtype=torch.float64, device=device)
    sums_F = torch.zeros(width, dtype=torch.float64, device=device)
    for x_BF in features_NF.split(_ROWS):
        z_BF = torch.nn.functional.normalize(x_BF.to(device).double(), dim=1)
        squares_FF += z_BF.T @ z_BF
        sums_F += z_BF.sum(dim=0)
    count = sums_F.new_full((1,), len(features_NF))
    std, rank = figures(torch.cat([squares_FF.flatten(), sums_F, count]).cpu(), width)
    if rank is None:  # of one feature, whose moments look like a diagonal
        rank = 1.0
    return std, rank


@torch.no_grad()
def uniformity(features_NF: torch.Tensor, device: torch.device | str) -> float:
    """``log mean exp(-2 |x - y|²)`` over all pairs of rows, scaled to length 1."""
    device, count = torch.device(device), len(features_NF)
    potential = torch.zeros((), dtype=torch.float64, device=device)
    with full_float32(device):
        unit_NF = unit_rows(features_NF, device)
        for first in range(0, count, _ROWS):
            # Each pair once: the rows of a block with those after them.
            cosine_BT = (unit_NF[first : first + _ROWS] @ unit_NF[first:].T).double()
            later_BT = torch.ones_like(cosine_BT, dtype=torch.bool).triu(diagonal=1)
            potential += (-_TEMPERATURE * (2 - 2 * cosine_BT[later_BT])).exp().sum()
    return math.log(float(potential) / (count * (count - 1) / 2))

"""The proof of an export: features of real images, ours beside those of the foreign library."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import DataError, NumericalError
from data_pipeline.augment import Augment
from data_pipeline.packing.embedded import NAME, embedded_images
from data_pipeline.reading.open_data import OpenData
from trainer.evaluation.load_encoder import Preprocessing
from trainer.evaluation.pictures import Album
from trainer.export.target import Features, Target
from trainer.state.run_data import run_data

log = logging.getLogger(__name__)

_IMAGES = 8


@dataclass(frozen=True)
class Proof:
    """Features of the run's encoder beside those of the foreign model that loaded the file."""

    images: int
    image_source: str
    """The run's data, or the embedded digits where it is not there."""
    largest_feature: float
    largest_difference: float
    relative_difference: float
    """``largest_difference / largest_feature``."""
    tolerance: float
    """Of the relative difference."""
    dtype: str
    """Of the foreign model's arithmetic; ours is float64."""
    computed_by: str
    versions: Mapping[str, str]
    """Of the packages that took part."""


@torch.no_grad()
def prove(
    encoder: nn.Module,
    foreign: Features,
    target: type[Target],
    images: torch.Tensor,
    image_source: str,
) -> Proof:
    """Compare a foreign model's features of normalised ``images`` (N, 3, H, W) with the encoder's.

    The encoder, which becomes float64, computes in that, the foreign model in the target's dtype.

    Raises:
        NumericalError: they differ by more than the tolerance, are not finite, or all zero.
    """
    ours_NF = encoder.double().eval()(images.double())
    theirs_NF = foreign(images.to(target.dtype)).double()
    if ours_NF.shape != theirs_NF.shape:
        raise NumericalError(
            f"export: features have shape {tuple(theirs_NF.shape)} in the foreign model and "
            f"{tuple(ours_NF.shape)} in the run; nothing was written"
        )
    largest = ours_NF.abs().max().item()
    difference = (ours_NF - theirs_NF).abs().max().item()
    if not 0 < largest < float("inf"):
        raise NumericalError(
            f"export: the largest feature of {len(images)} images is {largest:g}, so equal "
            "features would prove nothing; export an earlier checkpoint; nothing was written"
        )
    relative = difference / largest
    if not relative <= target.tolerance:
        raise NumericalError(
            f"export: the foreign model's features differ by {relative:.1e} of the largest "
            f"feature, more than {target.tolerance:.0e}; nothing was written"
        )
    return Proof(
        images=len(images),
        image_source=image_source,
        largest_feature=largest,
        largest_difference=difference,
        relative_difference=relative,
        tolerance=target.tolerance,
        dtype=str(target.dtype).removeprefix("torch."),
        computed_by=target.built_by,
        versions=target.versions(),
    )


def proof_images(
    run: Path, config: Mapping[str, Any], how: Preprocessing
) -> tuple[torch.Tensor, str]:
    """Images as the encoder sees them: the run's own where its data is still there, else digits.

    Returns:
        (N, 3, H, W) float32 normalised, and where they come from.
    """
    plain = Augment(how.augment(), seed=0).plain
    try:
        data = OpenData(run_data(run, config, "train"))
        first = range(min(_IMAGES, data.info.num_samples))
        return plain(torch.from_numpy(Album(data, how).read(first))[:, None]), data.info.name
    except DataError as error:
        log.warning("%s; the proof uses the embedded digits", error)
    return plain(_digits(how.size)), f"embedded:{NAME}"


def _digits(side: int) -> torch.Tensor:
    """(N, 1, S, S, 3) uint8, enlarged to the encoder's size."""
    images_NHWC = torch.from_numpy(embedded_images("test")[0][:_IMAGES])
    enlarged_NCHW = nn.functional.interpolate(
        images_NHWC.permute(0, 3, 1, 2).float(), (side, side), mode="bilinear", antialias=True
    )
    return enlarged_NCHW.round().to(torch.uint8).permute(0, 2, 3, 1).unsqueeze(1).contiguous()

"""Which images look the same to an encoder, and which are negatives that should not be?
``widebatch evaluate duplicates``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import ConfigError
from data_pipeline.reading.beton import BetonInfo, check_beton
from trainer.evaluation.job import Job
from trainer.evaluation.labelled_subset import names_or_why_not
from trainer.evaluation.pairs import (
    Pairs,
    groups,
    likely_classmates,
    near_identical,
    neighbourhoods,
    pairs_of,
)
from trainer.evaluation.pictures import Cell, CropReader, PictureConfig, file_name, save_rows
from trainer.features.extraction import Features

_SUSPICIOUS = 0.2  # share of samples with a duplicate above which the encoder is rather to blame

_SAME_PIXELS = 5.0  # of 256 levels, mean difference: what storing a JPEG anew can change


@dataclass(frozen=True, kw_only=True)
class DuplicatesConfig(PictureConfig):
    """Finds images that look the same to the encoder, and likely false negatives.

    The former are copies, where the encoder sees much. The latter are pairs that a contrastive loss
    wrongly pushes apart: each among the other's nearest, with neighbours in common. Told as lists
    (--json) and a picture. The JSON says how far the pixels of each pair differ.
    """

    threshold: float = 0.98
    """Cosine similarity from which on two images are near-identical."""
    k: int = 10
    """Neighbours of each image that are looked at."""
    least_shared: float = 0.5
    """Jaccard index of the neighbourhoods of a likely false negative."""
    limit: int = 1000
    """Pairs of each kind that are listed."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        super().__post_init__()
        self.at_least(1, "k", "limit")
        for name in ("threshold", "least_shared"):
            if not 0 < getattr(self, name) <= 1:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} {getattr(self, name)}: choose above 0, at most 1")


def duplicates(config: DuplicatesConfig) -> dict[str, Any] | None:
    """Look through a file. A collective where several processes were started.

    Returns:
        JSON values on rank 0, ``None`` on the others: ``duplicates`` and ``false_negatives``, lists
        of pairs (``samples``, ``files`` below the packed folder where known, ``labels``,
        ``similarity``, ``shared_neighbours``, ``pixel_difference``: mean of 256 levels between the
        centre crops), the most alike first; ``groups`` of duplicates, and ``group_files``;
        ``n_duplicates``, ``n_false_negatives``, how many there are; ``n_same_pixels``, how many of
        the listed duplicates differ by less than 5 levels (others may show one thing in two
        pictures, or tell of an encoder that sees little); ``doubt``, in words, where the latter is
        likely, else ``None``.

    Raises:
        ConfigError, CheckpointError, DataError, NumericalError: as
            :func:`trainer.evaluation.knn.knn`.
    """
    job, info = Job(config), check_beton(config.train)
    with job:
        features = job.features(config.train)
        nearest = neighbourhoods(
            features.features_NF,
            config.k,
            device=job.device,
            rank=job.rank,
            world_size=job.world_size,
        )
    if job.rank:
        return None
    pairs = pairs_of(*nearest)
    twice = near_identical(pairs, config.threshold)
    alike = likely_classmates(pairs, config.threshold, config.least_shared)
    listed = [each.take(torch.arange(min(len(each), config.limit))) for each in (twice, alike)]
    crops = CropReader(config.train, job.preprocessing)
    names, unnamed = names_or_why_not(config.train)
    lists = [_described(each, features, crops, names) for each in listed]
    together = groups(twice.samples_P2)[: config.limit]
    pictured = []
    if config.picture is not None:
        _draw(config.picture, [each[: config.pictured] for each in lists], crops, names)
        if max(len(twice), len(alike)) > config.pictured:
            pictured = [f"{config.pictured} pairs of each kind are in the picture: --pictured"]
    return {
        "method": "duplicates",
        "protocol": "embedding-neighbours",
        "n_train": info.num_samples,
        "n_duplicates": len(twice),
        "n_same_pixels": sum(pair["pixel_difference"] < _SAME_PIXELS for pair in lists[0]),
        "n_false_negatives": len(alike),
        "false_negatives_of_one_class": _same_label(alike, features),
        "groups": together,
        "group_files": names and [[names[sample] for sample in group] for group in together],
        "duplicates": lists[0],
        "false_negatives": lists[1],
        "settings": {
            "threshold": config.threshold,
            "k": config.k,
            "least_shared": config.least_shared,
            "limit": config.limit,
        },
        "measured": job.measured(
            k=min(config.k, info.num_samples - 1),
            duplicates="cosine similarity at or above the threshold",
            false_negatives="below it, each among the other's neighbours, ranked by the share of "
            "neighbours in common",
        ),
        "doubt": _doubt(info, twice),
        "notes": [*_notes(config, info, listed), *pictured, *unnamed],
        **job.facts(train=info),
    }


def _described(
    pairs: Pairs, features: Features, crops: CropReader, names: list[str] | None
) -> list[dict[str, Any]]:
    described = []
    columns = pairs.samples_P2, pairs.similarity_P, pairs.shared_P
    for samples, similarity, shared in zip(*(column.tolist() for column in columns)):
        first, second = crops.read(samples).astype(np.int16)
        described.append(
            {
                "samples": samples,
                "files": names and [names[sample] for sample in samples],
                "labels": features.labels_N[samples].tolist(),
                "similarity": similarity,
                "shared_neighbours": shared,
                "pixel_difference": float(np.abs(first - second).mean()),
            }
        )
    return described


def _same_label(pairs: Pairs, features: Features) -> float | None:
    """Share of the pairs whose labels agree; None without labels or pairs."""
    labels_P2 = features.labels_N[pairs.samples_P2]
    if not len(pairs) or bool((features.labels_N < 0).any()):
        return None
    return float((labels_P2[:, 0] == labels_P2[:, 1]).double().mean())


def _doubt(info: BetonInfo, twice: Pairs) -> str | None:
    share = len(twice.samples_P2.unique()) / info.num_samples
    if share <= _SUSPICIOUS:
        return None
    return (
        f"{100 * share:.0f} % of the images have a near-identical one: rather the encoder tells "
        "few apart (see 'widebatch evaluate diagnose'); look at how far pixels differ, or raise "
        "--threshold"
    )


def _notes(config: DuplicatesConfig, info: BetonInfo, listed: list[Pairs]) -> Iterator[str]:
    if config.k >= info.num_samples:
        others = info.num_samples - 1
        yield f"--k {config.k} is more than the {others} other images: all of them are looked at"
    if any(len(pairs) == config.limit for pairs in listed):
        yield f"at most {config.limit} pairs of each kind are listed: see --limit"


def _draw(
    path: Path, lists: list[list[dict[str, Any]]], crops: CropReader, files: list[str] | None
) -> None:
    """What looks the same on the left, likely false negatives on the right, a pair in a row."""
    rows = []
    blank = Cell(np.full((1, 1, 3), 255, np.uint8))
    for number in range(max(map(len, lists))):
        row: list[Cell] = []
        for pairs, name in zip(lists, ("same", "alike")):
            if number >= len(pairs):
                row += [blank, blank]
                continue
            pair = pairs[number]
            images = crops.read(pair["samples"])
            for image, sample in zip(images, pair["samples"]):
                file = file_name(sample, files)
                row.append(Cell(image, f"{file}\n{name} {pair['similarity']:.3f}"))
        rows.append(row)
    save_rows(rows or [[Cell(blank.image_SS3, "none found")]], path)

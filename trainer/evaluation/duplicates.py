"""Which images look the same to an encoder, and which are negatives that should not be?
``widebatch evaluate duplicates``.

Shape suffixes: N samples, K neighbours of each, P pairs.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from common.bounds import check_bounds
from data_pipeline.reading.beton import DataInfo
from data_pipeline.reading.open_data import OpenData
from trainer.evaluation.job import Job
from trainer.evaluation.pictures import Album, Cell, PictureConfig, save_rows
from trainer.features.extraction import Features
from trainer.features.neighbours import nearest_others

_SUSPICIOUS = 0.2  # share of samples with a duplicate above which the encoder is rather to blame
_ROWS = 1 << 14  # pairs whose lists of neighbours are compared at once
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
        check_bounds(self, "--", k="[1, inf)", limit="[1, inf)")
        check_bounds(self, "--", threshold="(0, 1]", least_shared="(0, 1]")


@dataclass(frozen=True)
class Pairs:
    """Pairs of samples of which one has the other among its neighbours, the lower number first."""

    samples_P2: torch.Tensor  # int64  # noqa: N815
    similarity_P: torch.Tensor  # float32, cosine  # noqa: N815
    shared_P: torch.Tensor  # float64, 0 to 1: see shared_neighbours  # noqa: N815
    mutual_P: torch.Tensor  # bool: each has the other  # noqa: N815

    def __len__(self) -> int:
        return len(self.samples_P2)

    def take(self, which: torch.Tensor) -> "Pairs":
        """The pairs at ``which``."""
        columns = self.samples_P2, self.similarity_P, self.shared_P, self.mutual_P
        return Pairs(*(column[which] for column in columns))


def duplicates(config: DuplicatesConfig) -> dict[str, Any] | None:
    """Look through a set. A collective where several processes were started.

    Returns:
        JSON values on rank 0, ``None`` on the others: ``duplicates`` and ``false_negatives``, lists
        of pairs (``samples``, ``files`` below the packed folder where known, ``labels``,
        ``similarity``, ``shared_neighbours``, ``pixel_difference``: mean of 256 levels between the
        centre crops), the most alike first; ``groups`` of duplicates, and ``group_files``;
        ``n_duplicates``, ``n_false_negatives``, how many there are; ``n_same_pixels``, how many of
        the listed duplicates differ by less than 5 levels (others may show one thing in two
        pictures, or tell of an encoder that sees little); ``doubt``, in words, where the latter is
        likely, else ``None``.

    Raises: as :func:`trainer.evaluation.knn.knn`.
    """
    job, data = Job(config), OpenData(config.train)
    info = data.info
    with job:
        features = job.features(data)
    if job.rank:
        return None
    every_N = torch.arange(info.num_samples)
    nearest = nearest_others(features.features_NF, every_N, config.k, device=job.device)
    pairs = pairs_of(*nearest)
    twice = near_identical(pairs, config.threshold)
    alike = likely_classmates(pairs, config.threshold, config.least_shared)
    listed = [each.take(torch.arange(min(len(each), config.limit))) for each in (twice, alike)]
    album = Album(data, job.preprocessing)
    names = album.names
    lists = [_described(each, features, album) for each in listed]
    together = groups(twice.samples_P2)[: config.limit]
    pictured = []
    if config.picture is not None:
        save_rows(_rows([each[: config.pictured] for each in lists], album), config.picture)
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
            name: getattr(config, name) for name in ("threshold", "k", "least_shared", "limit")
        },
        "measured": job.measured(
            k=min(config.k, info.num_samples - 1),
            duplicates="cosine similarity at or above the threshold",
            false_negatives="below it, each among the other's neighbours, ranked by the share of "
            "neighbours in common",
        ),
        "doubt": _doubt(info, twice),
        "notes": [*_notes(config, info, listed), *pictured, *album.notes],
        **job.facts(train=info),
    }


def _described(pairs: Pairs, features: Features, album: Album) -> list[dict[str, Any]]:
    described = []
    columns = pairs.samples_P2, pairs.similarity_P, pairs.shared_P
    for samples, similarity, shared in zip(*(column.tolist() for column in columns)):
        first, second = album.read(samples).astype(np.int16)
        described.append(
            {
                "samples": samples,
                "files": album.names and [album.names[sample] for sample in samples],
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


def _doubt(info: DataInfo, twice: Pairs) -> str | None:
    share = len(twice.samples_P2.unique()) / info.num_samples
    if share <= _SUSPICIOUS:
        return None
    return (
        f"{100 * share:.0f} % of the images have a near-identical one: rather the encoder tells "
        "few apart (see 'widebatch evaluate diagnose'); look at how far pixels differ, or raise "
        "--threshold"
    )


def _notes(config: DuplicatesConfig, info: DataInfo, listed: list[Pairs]) -> Iterator[str]:
    if config.k >= info.num_samples:
        others = info.num_samples - 1
        yield f"--k {config.k} is more than the {others} other images: all of them are looked at"
    if any(len(pairs) == config.limit for pairs in listed):
        yield f"at most {config.limit} pairs of each kind are listed: see --limit"


def _rows(lists: list[list[dict[str, Any]]], album: Album) -> list[list[Cell]]:
    """What looks the same on the left, likely false negatives on the right, a pair in a row."""
    blank = Cell(np.full((1, 1, 3), 255, np.uint8))
    sides = [
        [album.cells(p["samples"], [f"{name} {p['similarity']:.3f}"] * 2) for p in pairs]
        for pairs, name in zip(lists, ("same", "alike"))
    ]
    rows = [same + alike for same, alike in zip_longest(*sides, fillvalue=[blank, blank])]
    return rows or [[dataclasses.replace(blank, text="none found")]]


def pairs_of(similarity_NK: torch.Tensor, index_NK: torch.Tensor) -> Pairs:
    """Every sample with each of its :func:`trainer.features.neighbours.nearest_others`, once."""
    count, width = index_NK.shape
    asker_P = torch.arange(count).repeat_interleave(width)
    ends_P2 = torch.stack([asker_P, index_NK.flatten()], dim=1).sort(dim=1).values
    key_P = ends_P2[:, 0] * count + ends_P2[:, 1]
    unique_P, place_P, lists_P = key_P.unique(return_inverse=True, return_counts=True)
    # The two directions may differ in the last bit: the larger one counts.
    similarity_P = torch.full((len(unique_P),), -2.0).scatter_reduce(
        0, place_P, similarity_NK.flatten(), "amax"
    )
    samples_P2 = torch.stack([unique_P // count, unique_P % count], dim=1)
    return Pairs(samples_P2, similarity_P, shared_neighbours(index_NK, samples_P2), lists_P == 2)


def near_identical(pairs: Pairs, threshold: float) -> Pairs:
    """Pairs at a similarity of ``threshold``, the most alike first."""
    return _most_alike_first(pairs.take(pairs.similarity_P >= threshold))


def likely_classmates(pairs: Pairs, below: float, least_shared: float) -> Pairs:
    """Mutual pairs that have ``least_shared`` of their neighbours in common, most of them first.

    A contrastive loss pushes them apart as negatives though they show the same thing: candidates
    for false negatives. Pairs of a similarity of ``below`` or more are left out: near-identical.
    """
    alike = pairs.mutual_P & (pairs.similarity_P < below) & (pairs.shared_P >= least_shared)
    found = _most_alike_first(pairs.take(alike))
    return found.take(found.shared_P.sort(descending=True, stable=True).indices)


def _most_alike_first(pairs: Pairs) -> Pairs:
    return pairs.take(pairs.similarity_P.sort(descending=True, stable=True).indices)


def groups(samples_P2: torch.Tensor) -> list[list[int]]:
    """Samples that pairs connect, each group ascending, the largest first."""
    samples_S, places_P2 = samples_P2.unique(return_inverse=True)
    if not len(samples_S):
        return []
    joined = coo_array((np.ones(len(places_P2)), tuple(places_P2.T.numpy())), (len(samples_S),) * 2)
    _, group_S = connected_components(joined, directed=False)
    together_S = samples_S[torch.from_numpy(group_S).argsort(stable=True)]
    found = [part.tolist() for part in together_S.split(np.bincount(group_S).tolist())]
    return sorted(found, key=lambda group: (-len(group), group))


def shared_neighbours(index_NK: torch.Tensor, samples_P2: torch.Tensor) -> torch.Tensor:
    """Jaccard index of both neighbourhoods, each with its own sample in it: float64 (P,)."""
    own_N1 = torch.arange(len(index_NK))[:, None]
    whole_NK = torch.cat([own_N1, index_NK], dim=1)
    width, parts = whole_NK.shape[1], []
    for pairs in samples_P2.split(_ROWS):
        first_PK, second_PK = whole_NK[pairs[:, 0]], whole_NK[pairs[:, 1]]
        common_P = (first_PK[:, :, None] == second_PK[:, None, :]).any(dim=2).sum(dim=1)
        parts.append(common_P.double() / (2 * width - common_P))
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)

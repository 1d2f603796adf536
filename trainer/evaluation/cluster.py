"""What groups do the features make, and are they the classes? ``widebatch evaluate cluster``."""

from dataclasses import dataclass
from typing import Any

from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from common.bounds import check_bounds
from common.errors import ConfigError
from data_pipeline.reading.beton import DataInfo
from data_pipeline.reading.open_data import OpenData
from trainer.evaluation.job import Job
from trainer.evaluation.pictures import Album, Cell, PictureConfig, save_rows
from trainer.features.extraction import Features
from trainer.features.k_means import Clustering, k_means
from trainer.features.neighbours import unit_rows

_LISTED = 1_000_000  # samples up to which the JSON says where each is
_CELLS = 10  # images of a cluster in the picture


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(PictureConfig):
    """k-means on features scaled to length 1, started by k-means++, the best of --restarts.

    With labels normalised mutual information (NMI), adjusted Rand index (ARI) and purity. The
    picture shows clusters by their most central images.
    """

    k: int | None = None
    """Clusters. None: as many as the file has classes."""
    restarts: int = 10
    """Starts, of which the best is kept."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        super().__post_init__()
        check_bounds(self, "--", k="[1, inf)", restarts="[1, inf)")


def cluster(config: ClusterConfig) -> dict[str, Any] | None:
    """Group a set's images. A collective where several processes were started.

    Returns:
        JSON values on rank 0, ``None`` on the others: ``nmi``, ``ari`` and ``purity`` against the
        labels (``None`` without labels), ``clusters`` found, their ``sizes``, ``inertia`` and
        ``assignments`` (a cluster for each sample, of up to a million).

    Raises: as :func:`trainer.evaluation.knn.knn`; ConfigError: there are neither labels nor ``k``.
    """
    job, data = Job(config), OpenData(config.train)
    info = data.info
    if config.k is None and not info.has_label:
        raise ConfigError(f"{info.name} has no labels to count classes by: give --k")
    with job:
        features = job.features(data)
        job.leave()
        if job.rank:
            return None
        count = config.k or len(features.labels_N.unique())
        device = job.device
        unit_NF = unit_rows(features.features_NF, device)
        found = k_means(unit_NF, count, seed=config.seed, restarts=config.restarts, device=device)
    if config.picture is not None:
        rows = _largest(found, Album(data, job.preprocessing), config.pictured)
        save_rows(rows, config.picture)
    return {**_report(config, job, info, features, found), **job.facts(train=info)}


def _report(
    config: ClusterConfig, job: Job, info: DataInfo, features: Features, found: Clustering
) -> dict[str, Any]:
    assigned_N, labels_N = found.assigned_N, features.labels_N
    agreement: dict[str, float | None] = dict.fromkeys(("nmi", "ari", "purity"))
    notes = []
    if info.has_label:
        partitions = labels_N.numpy(), assigned_N.numpy()
        agreement["nmi"] = float(normalized_mutual_info_score(*partitions))
        agreement["ari"] = float(adjusted_rand_score(*partitions))
        most = contingency_matrix(*partitions).max(axis=0)
        agreement["purity"] = float(most.sum()) / len(labels_N)
    else:
        notes.append("no agreement with classes: not all samples have labels")
    if not found.converged:
        notes.append(f"k-means stopped after {found.iterations} iterations, still moving samples")
    if len(assigned_N) > _LISTED:
        notes.append(f"assignments are left out above {_LISTED} samples")
    clusters = len(found.centres_KF)
    if found.found < clusters:
        notes.append(
            f"k-means found {found.found} clusters of the {clusters} asked for: no more of the "
            "images differ in their features"
        )
    return {
        "method": "cluster",
        "protocol": "k-means",
        **agreement,
        "n_train": len(assigned_N),
        "num_classes": len(labels_N.unique()) if info.has_label else None,
        "clusters": found.found,
        "inertia": found.inertia,
        "sizes": assigned_N.bincount(minlength=clusters).tolist(),
        "settings": {"k": clusters, "restarts": config.restarts, "seed": config.seed},
        "measured": job.measured(
            k=found.found,
            features="scaled to length 1",
            start="k-means++",
            kept=f"the least inertia of {config.restarts} starts",
            iterations=found.iterations,
            normalisation="NMI by the arithmetic mean of both entropies",
        ),
        "assignments": assigned_N.tolist() if len(assigned_N) <= _LISTED else None,
        "notes": notes,
    }


def _largest(found: Clustering, album: Album, most: int) -> list[list[Cell]]:
    """A row for each of the largest clusters: its samples nearest to the centre."""
    sizes_K = found.assigned_N.bincount()
    rows = []
    largest = sizes_K.sort(descending=True, stable=True).indices[: min(most, found.found)]
    for number in largest.tolist():
        members = (found.assigned_N == number).nonzero()[:, 0]
        order = found.distance_N[members].sort(stable=True).indices[:_CELLS]
        texts = [f"{number}: {int(sizes_K[number])} images", *[""] * (len(order) - 1)]
        rows.append(album.cells(members[order].tolist(), texts))
    return rows

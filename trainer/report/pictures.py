"""What a run's data looks like, and what its encoder sees in it: the costly part of a report.

Shape suffixes: N images, R rows and K columns of a grid, V views, S side in pixels, F features, P
pairs.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from common.errors import DataError, ExplainedError
from data_pipeline.augment import Augment
from data_pipeline.reading.loader import Batch
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import Position
from trainer.evaluation.job import choose_device
from trainer.evaluation.load_encoder import load_encoder
from trainer.features.extraction import extract_features
from trainer.features.labelled_files import compare_labels
from trainer.features.neighbours import nearest_others, nearest_rows
from trainer.report.evaluations import KINDS
from trainer.report.samples import (
    Images,
    Samples,
    Views,
    evenly,
    first_views,
    read_spread,
    view_pairs,
)
from trainer.report.task import TaskPictures, task_pictures
from trainer.state.run_data import run_data, section

log = logging.getLogger(__name__)
T = TypeVar("T")

_VIEW_ROWS = 8  # samples whose views are shown
_QUERIES = 8  # images whose nearest neighbours are shown
_NEIGHBOURS = 6  # of each
_ON_THE_MAP = 400  # images
_FEWEST_ON_A_MAP = 10
_PAIRED = 256  # images whose views' similarities are compared
_BATCH = 128  # images per forward pass


@dataclass(frozen=True)
class Answers:
    """The nearest images of some queries, by one measure."""

    title: str
    images_RKSS3: Images  # noqa: N815
    labels_RK: npt.NDArray[np.int64]  # noqa: N815
    """-1 where there is none."""


@dataclass(frozen=True)
class Queries:
    """Images, and the nearest others to them by each measure."""

    asked: Samples
    answers: tuple[Answers, ...]

    @property
    def labelled(self) -> bool:
        """Whether right and wrong can be told."""
        labels = [self.asked.labels_N, *(answer.labels_RK for answer in self.answers)]
        return all(bool((part >= 0).all()) for part in labels)

    def agree(self, answer: Answers) -> npt.NDArray[np.bool_]:
        """Whether a neighbour (R, K) has its query's label."""
        return answer.labels_RK == self.asked.labels_N[:, None]


@dataclass(frozen=True)
class EmbeddingMap:
    """Images on a plane by each measure, in the order of their labels."""

    points: dict[str, npt.NDArray[np.float64]]
    """(N, 2) each."""
    samples: Samples


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """All of it; what could not be made is ``None``, and ``missing`` says why."""

    views: Views | None = None
    task: TaskPictures | None = None
    queries: Queries | None = None
    map: EmbeddingMap | None = None
    similarities: dict[str, npt.NDArray[np.float32]] | None = None
    """Cosines (P,) of the encoder's features of views: "positives" of one image, "negatives"."""
    missing: tuple[tuple[str, str], ...] = ()


COMPARED = Pictures(
    missing=(("pictures", "a page of several runs has none; report one run alone"),)
)
"""Of a page that compares runs."""


def attempt(missing: list[tuple[str, str]], name: str, part: Callable[[], T]) -> T | None:
    """A part of a report, or ``None`` where it cannot be made: ``missing`` then says why."""
    try:
        return part()
    except (ExplainedError, FileNotFoundError, PermissionError) as reason:
        missing.append((name, str(reason)))
        return None


def make_pictures(
    run: Path, settings: dict[str, Any], *, max_images: int = 1000, device: str = "auto"
) -> Pictures:
    """Draw views, and put ``max_images`` of each data set through the newest encoder.

    Raises:
        ConfigError: the device is not there.
    """
    where = choose_device(device)
    missing: list[tuple[str, str]] = []

    def views() -> Views:
        return first_views(OpenData(run_data(run, settings, "train")), settings, _VIEW_ROWS)

    def task() -> TaskPictures | None:
        return task_pictures(run, settings, OpenData(run_data(run, settings, "train")), where)

    found: dict[str, Any] = {
        "views": attempt(missing, "views", views),
        "task": attempt(missing, "the task's pictures", task),
    }
    seen = attempt(
        missing,
        "neighbours, map and similarities",
        lambda: _Seen(run, settings, max_images, where),
    )
    if seen is not None:
        found["queries"] = attempt(missing, "neighbours", seen.queries)
        found["map"] = attempt(missing, "map", seen.map)
        found["similarities"] = attempt(missing, "similarities", seen.similarities)
    return Pictures(**found, missing=tuple(missing))


class _Seen:
    """Features of images, by the encoder and as raw pixels.

    Neighbours are looked for among training images; those that ask are held out where the run has
    such, else they are training images too.
    """

    def __init__(
        self, run: Path, settings: dict[str, Any], max_images: int, device: torch.device
    ) -> None:
        self._settings, self._device = settings, device
        self._train = OpenData(run_data(run, settings, "train"))
        loaded = load_encoder(str(run))
        self._encoder, self._how = loaded.encoder.to(device), loaded.preprocessing
        self._bank = self._asked = read_spread(self._train, max_images, self._how)
        if section(settings, "data").get("test"):
            self._asked = self._held_out(OpenData(run_data(run, settings, "test")), max_images)
        log.info(
            "the encoder looks at %d images; --max-images lowers this",
            len(self._bank.ids_N) + len(self._asked.ids_N),
        )
        # Pixels are compared as the encoder gets to see them.
        self._features = {
            KINDS["pixels"]: self._by(nn.Flatten()),
            KINDS["run"]: self._by(self._encoder),
        }

    def _held_out(self, test: OpenData, max_images: int) -> Samples:
        asked = read_spread(test, max_images, self._how)
        classes = compare_labels(self._train, test).classes
        labels_N = classes.renumbered(torch.from_numpy(asked.labels_N)).numpy()
        return asked._replace(
            labels_N=labels_N, class_names=self._bank.class_names or asked.class_names
        )

    def _by(self, encoder: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (N, F) of the bank's images and of those that ask."""
        bank_NF = self._features_of(encoder, self._bank.images_NSS3)
        if self._asked is self._bank:
            return bank_NF, bank_NF
        return bank_NF, self._features_of(encoder, self._asked.images_NSS3)

    def _features_of(self, encoder: nn.Module, images_NSS3: Images) -> torch.Tensor:
        plain = Augment(self._how.augment(), seed=0)
        crops_NVSS3 = torch.from_numpy(np.ascontiguousarray(images_NSS3))[:, None]
        ids_N = torch.arange(len(images_NSS3))
        batches = (
            Batch((crops,), ids, torch.zeros_like(ids), Position())
            for crops, ids in zip(crops_NVSS3.split(_BATCH), ids_N.split(_BATCH))
        )
        return extract_features(encoder, batches, plain, self._device).features_NF

    def _some(self, most: int) -> npt.NDArray[np.int64]:
        """Indices of images that ask, of every class its share, in the order of classes."""
        by_class_N = np.argsort(self._asked.labels_N, kind="stable")
        return by_class_N[evenly(len(by_class_N), most)]

    def queries(self) -> Queries:
        """A few images and their neighbours."""
        chosen_R = self._some(_QUERIES)
        how: dict[str, Any] = {"k": _NEIGHBOURS, "device": self._device}
        answers = []
        for title, (bank_NF, asked_NF) in self._features.items():
            if self._asked is self._bank:
                _, found_RK = nearest_others(bank_NF, torch.from_numpy(chosen_R), **how)
            else:
                _, found_RK = nearest_rows(bank_NF, asked_NF[chosen_R], **how)
            indices_RK = found_RK.numpy()
            images = self._bank.images_NSS3[indices_RK]
            answers.append(Answers(title, images, self._bank.labels_N[indices_RK]))
        return Queries(self._asked.take(chosen_R), tuple(answers))

    def map(self) -> EmbeddingMap:
        """Some of the images on a plane."""
        chosen_N = self._some(_ON_THE_MAP)
        points = {
            title: project(asked_NF[chosen_N]) for title, (_, asked_NF) in self._features.items()
        }
        return EmbeddingMap(points, self._asked.take(chosen_N))

    @torch.no_grad()
    def similarities(self) -> dict[str, npt.NDArray[np.float32]]:
        """Of pairs of views."""
        views_VN3SS = view_pairs(self._train, self._settings, _PAIRED)
        count = views_VN3SS.shape[1]
        if count < 2:
            raise DataError("one image makes no negatives")
        parts = views_VN3SS.flatten(0, 1).split(_BATCH)
        features = torch.cat([self._encoder(part.to(self._device)).float().cpu() for part in parts])
        first_NF, second_NF = nn.functional.normalize(features, dim=1).chunk(2)
        cosine_NN = (first_NF @ second_NF.T).numpy()
        own_NN = np.eye(count, dtype=bool)
        return {"positives": cosine_NN[own_NN], "negatives": cosine_NN[~own_NN]}


def project(features_NF: torch.Tensor) -> npt.NDArray[np.float64]:
    """A two-dimensional map (N, 2) of features by t-SNE of cosine distances; deterministic.

    Raises:
        DataError: there are too few images.
    """
    from sklearn.manifold import TSNE

    unit_NF = nn.functional.normalize(features_NF, dim=1).double()
    count, width = unit_NF.shape
    if count < _FEWEST_ON_A_MAP:
        raise DataError(f"{count} images are too few for a map")
    # As van der Maaten recommends: 50 principal components hold what neighbourhoods depend on.
    u_NK, s_K, _ = torch.linalg.svd(unit_NF - unit_NF.mean(dim=0), full_matrices=False)
    reduced_NK = (u_NK * s_K)[:, : min(50, count, width)].numpy()
    perplexity = min(30.0, (count - 1) / 3)
    tsne = TSNE(
        perplexity=perplexity, init="pca", learning_rate="auto", max_iter=500, random_state=0
    )
    return np.asarray(tsne.fit_transform(reduced_NK), np.float64)

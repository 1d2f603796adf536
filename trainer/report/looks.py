"""What a run's data looks like, and what its encoder sees in it: the costly part of a report.

Shape suffixes: N images, R rows and K columns of a grid, V views, S side in pixels, F features, P
pairs.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from common.errors import CheckpointError, ConfigError, DataError, NumericalError
from data_pipeline.reading.beton import check_beton
from trainer.evaluation.job import choose_device
from trainer.evaluation.load_encoder import LoadedEncoder, load_encoder
from trainer.features.labelled_files import compare_labels
from trainer.report.embedding import features_of, nearest, project
from trainer.report.evaluations import KINDS
from trainer.report.options import MissingError, ReportConfig
from trainer.report.samples import Images, Samples, evenly, first_views, read_spread, view_batch
from trainer.report.settings import section
from trainer.state.run_data import run_data

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Views:
    """Images and what augmentation made of them."""

    ids_R: npt.NDArray[np.int64]  # noqa: N815
    originals_RSS3: Images  # noqa: N815
    views_RVSS3: Images  # noqa: N815

    def rows(self) -> Iterator[tuple[int, Images, Images]]:
        """Id, image (S, S, 3) and views (V, S, S, 3) of each."""
        return zip(self.ids_R.tolist(), self.originals_RSS3, self.views_RVSS3)


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

    images_RSS3: Images  # noqa: N815
    labels_R: npt.NDArray[np.int64]  # noqa: N815
    answers: tuple[Answers, ...]
    class_names: tuple[str, ...]

    @property
    def labelled(self) -> bool:
        """Whether right and wrong can be told."""
        labels = [self.labels_R, *(answer.labels_RK for answer in self.answers)]
        return all(bool((part >= 0).all()) for part in labels)

    def agree(self, answer: Answers) -> npt.NDArray[np.bool_]:
        """Whether a neighbour (R, K) has its query's label."""
        return answer.labels_RK == self.labels_R[:, None]


@dataclass(frozen=True)
class EmbeddingMap:
    """Images on a plane by each measure, in the order of their labels."""

    points: dict[str, npt.NDArray[np.float64]]
    """(N, 2) each."""
    images_NSS3: Images  # noqa: N815
    ids_N: npt.NDArray[np.int64]  # noqa: N815
    labels_N: npt.NDArray[np.int64]  # noqa: N815
    class_names: tuple[str, ...]
    method: str
    """How it was made."""


@dataclass(frozen=True)
class Similarities:
    """Cosines of the encoder's features of views."""

    positive_P: npt.NDArray[np.float32]  # noqa: N815
    """Of two views of one image."""
    negative_P: npt.NDArray[np.float32]  # noqa: N815
    """Of views of two images."""


@dataclass(frozen=True, kw_only=True)
class Looks:
    """All of it; what could not be made is ``None``, and ``missing`` says why."""

    views: Views | None = None
    queries: Queries | None = None
    map: EmbeddingMap | None = None
    similarities: Similarities | None = None
    missing: tuple[tuple[str, str], ...] = ()


COMPARED = Looks(missing=(("pictures", "a page of several runs has none; report one run alone"),))
"""Of a page that compares runs."""


class Attempts:
    """Makes the parts of a report; notes what is left out, and why."""

    def __init__(self) -> None:
        self.missing: list[tuple[str, str]] = []

    def make(self, name: str, part: Callable[[], T]) -> T | None:
        """The part, or ``None`` where it cannot be made."""
        try:
            return part()
        except (
            *(DataError, CheckpointError, ConfigError, NumericalError, MissingError),
            *(FileNotFoundError, PermissionError),
        ) as reason:
            self.missing.append((name, str(reason)))
            return None


def look(run: Path, settings: dict[str, Any], config: ReportConfig) -> Looks:
    """Draw views and put images through the newest encoder.

    Raises:
        ConfigError: the device is not there.
    """
    choose_device(config.device)
    attempts = Attempts()
    views = attempts.make("views", lambda: _views(run, settings, config))
    seen = attempts.make("neighbours, map and similarities", lambda: _Seen(run, settings, config))
    if seen is None:
        return Looks(views=views, missing=tuple(attempts.missing))
    return Looks(
        views=views,
        queries=attempts.make("neighbours", seen.queries),
        map=attempts.make("map", seen.map),
        similarities=attempts.make("similarities", seen.similarities),
        missing=tuple(attempts.missing),
    )


def _views(run: Path, settings: dict[str, Any], config: ReportConfig) -> Views:
    return Views(*first_views(run_data(run, settings, "train"), settings, config.view_rows))


class _Seen:
    """Features of images, by the encoder and as raw pixels.

    Neighbours are looked for among training images; those that ask are held out where the run has
    such, else they are training images too.
    """

    def __init__(self, run: Path, settings: dict[str, Any], config: ReportConfig) -> None:
        self._run, self._settings, self._config = run, settings, config
        self._train = run_data(run, settings, "train")
        self._encoder = load_encoder(str(run))
        how = self._encoder.preprocessing
        self._bank = read_spread(self._train, config.max_images, how)
        self._asked = self._held_out()
        # Pixels are compared as the encoder gets to see them.
        pixels = dataclasses.replace(load_encoder(f"pixels:{how.size}"), preprocessing=how)
        log.info(
            "the encoder looks at %d images; --max-images lowers this",
            len(self._bank.ids_N) + len(self._asked.ids_N),
        )
        self._features = {
            KINDS["pixels"]: self._by(pixels),
            KINDS["run"]: self._by(self._encoder),
        }

    def _held_out(self) -> Samples:
        if not section(self._settings, "data").get("test"):
            return self._bank
        test = run_data(self._run, self._settings, "test")
        asked = read_spread(test, self._config.max_images, self._encoder.preprocessing)
        classes = compare_labels(check_beton(self._train), check_beton(test)).classes
        labels_N = classes.renumbered(torch.from_numpy(asked.labels_N)).numpy()
        return asked._replace(
            labels_N=labels_N, class_names=self._bank.class_names or asked.class_names
        )

    def _by(self, source: LoadedEncoder) -> tuple[torch.Tensor, torch.Tensor]:
        device = self._config.device
        bank_NF = features_of(source, self._bank.images_NSS3, device)
        if self._asked is self._bank:
            return bank_NF, bank_NF
        return bank_NF, features_of(source, self._asked.images_NSS3, device)

    def queries(self) -> Queries:
        """A few images and their neighbours."""
        chosen_R = one_per_class(self._asked.labels_N, self._config.queries)
        itself = int(self._asked is self._bank)
        answers = []
        for title, (bank_NF, asked_NF) in self._features.items():
            found_RK = nearest(asked_NF[chosen_R], bank_NF, self._config.neighbours + itself)
            indices_RK = found_RK.numpy()
            if itself:  # nothing is nearer than the image itself
                kept = [[i for i in row if i != own] for row, own in zip(indices_RK, chosen_R)]
                indices_RK = np.array([row[: self._config.neighbours] for row in kept], np.int64)
            images = self._bank.images_NSS3[indices_RK]
            answers.append(Answers(title, images, self._bank.labels_N[indices_RK]))
        return Queries(
            self._asked.images_NSS3[chosen_R],
            self._asked.labels_N[chosen_R],
            tuple(answers),
            self._asked.class_names,
        )

    def map(self) -> EmbeddingMap:
        """Some of the images on a plane."""
        chosen_N = evenly(len(self._asked.ids_N), self._config.map_images)
        chosen_N = chosen_N[np.argsort(self._asked.labels_N[chosen_N], kind="stable")]
        points, method = {}, ""
        for title, (_, asked_NF) in self._features.items():
            points[title], method = project(asked_NF[chosen_N])
        return EmbeddingMap(
            points,
            self._asked.images_NSS3[chosen_N],
            self._asked.ids_N[chosen_N],
            self._asked.labels_N[chosen_N],
            self._asked.class_names,
            method,
        )

    def similarities(self) -> Similarities:
        """Of pairs of views."""
        views_VN3HW = view_batch(self._train, self._settings, self._config.pairs)
        count = views_VN3HW.shape[1]
        if count < 2:
            raise MissingError("one image makes no negatives")
        device = choose_device(self._config.device)
        encoder = self._encoder.encoder.to(device).eval()
        with torch.no_grad():
            parts = [
                encoder(part.to(device)).float().cpu()
                for part in views_VN3HW[:2].flatten(0, 1).split(128)
            ]
        first_NF, second_NF = torch.nn.functional.normalize(torch.cat(parts), dim=1).chunk(2)
        cosine_NN = (first_NF @ second_NF.T).numpy()
        own_NN = np.eye(count, dtype=bool)
        return Similarities(cosine_NN[own_NN], cosine_NN[~own_NN])


def one_per_class(labels_N: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Indices of ``count`` images that take turns among the classes, in the order of classes."""
    turn_N = np.zeros_like(labels_N)
    for label in np.unique(labels_N):
        mine = labels_N == label
        turn_N[mine] = np.arange(mine.sum())
    return np.lexsort((labels_N, turn_N))[:count]


def class_name(label: int, names: Sequence[str]) -> str:
    """A label in words."""
    if label < 0:
        return "no label"
    return names[label] if label < len(names) else f"class {label}"

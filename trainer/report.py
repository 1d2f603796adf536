"""The pictures of a run: read its folder and data, look through its encoder, draw.

:func:`write_figures` is what ``widebatch report`` runs. The reading functions return plain values
and the drawing ones (:mod:`trainer.figures`) take them, so that another page can arrange both anew.

Shape suffixes: N images, R rows and K columns of a grid, V views, S side in pixels, F features.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.augment import Augment, AugmentConfig
from data_pipeline.beton import check_beton, read_sample_table
from data_pipeline.errors import DataError
from data_pipeline.loader import Batch, LoaderConfig, train_loader
from data_pipeline.order import Position
from data_pipeline.strict_json import read_json_file
from data_pipeline.torchvision_loader import TorchvisionDecoder
from data_pipeline.views import CropConfig, centre_crop_boxes
from trainer import figures
from trainer.config import from_json
from trainer.errors import CheckpointError, ConfigError
from trainer.evaluation.features import extract_features
from trainer.evaluation.session import choose_device
from trainer.figures import Bar, Images, Metrics, Neighbours, Overview
from trainer.weights import LoadedEncoder, Preprocessing, load_encoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)
T = TypeVar("T")

KINDS = {"pixels": "raw pixels", "untrained": "untrained encoder", "run": "pretrained encoder"}
"""What is compared: kinds of sources of ``widebatch evaluate``, in the order they are shown."""
# FFCV would compile for seconds to read a few images.
_LOADER = LoaderConfig(backend="torchvision", workers=1)
_BATCH = 128  # images per forward pass


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """How much a report looks at."""

    max_images: int = 1000
    """Images of each data set that go through the encoder, evenly spread over the file."""
    view_rows: int = 8
    """Samples whose views are shown."""
    queries: int = 8
    """Images whose nearest neighbours are shown."""
    neighbours: int = 6
    """Neighbours of each."""
    device: str = "auto"
    """Of the encoder: auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"report.{field.name} must be 1 or more, got {value}")


def write_figures(run: Path, out: Path, config: ReportConfig | None = None) -> list[Path]:
    """Draw what the run's folder and its data allow; what is missing is logged and left out.

    ``curves.png``, ``accuracy.png`` (from ``evaluation/*.json``), ``views.png``,
    ``neighbours.png``, ``map.png``, and ``overview.png`` with the best of them.

    Args:
        run: the run's folder.
        out: folder for the figures; made if need be.
        config: how much to look at.

    Returns:
        The files written.

    Raises:
        ConfigError: ``run`` is no run's folder, or matplotlib is not installed.
    """
    report = _Report(run, out, config or ReportConfig())
    report.draw()
    if not report.written:
        log.warning("%s: nothing to draw yet", run)
    return report.written


class _MissingError(Exception):
    """A figure's input is not there; the message says what."""


class _Report:
    """The figures of one run, in the making."""

    def __init__(self, run: Path, out: Path, config: ReportConfig) -> None:
        self.run, self.out, self.config = run, out, config
        self.settings = read_settings(run)
        self.written: list[Path] = []
        self.overview = Overview(title=_title(self.settings))

    def draw(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self._try("curves", self._curves)
        self._try("accuracy", self._accuracy)
        self._try("views", self._views)
        seen = self._try("neighbours and map", self._look)
        if seen is not None:
            self._try("neighbours", lambda: self._neighbours(seen))
            self._try("map", lambda: self._map(seen))
        if self.written:
            path = self.out / "overview.png"
            figure = figures.overview(self.overview)
            self.written.append(figures.save_png(figure, path, max_colours=256))

    def _try(self, name: str, part: Callable[[], T]) -> T | None:
        try:
            return part()
        except (DataError, CheckpointError, _MissingError) as reason:
            log.info("left out: %s (%s)", name, reason)
            return None

    def _save(self, figure: "Figure", name: str, **parts: Any) -> None:
        self.written.append(figures.save_png(figure, self.out / f"{name}.png"))
        self.overview = dataclasses.replace(self.overview, **parts)

    def _curves(self) -> None:
        metrics = read_metrics(self.run)
        self._save(figures.curves(metrics), "curves", metrics=metrics)

    def _accuracy(self) -> None:
        bars, chance = read_evaluations(self.run)
        self._save(figures.accuracy_bars(bars, chance), "accuracy", bars=bars, chance=chance)

    def _views(self) -> None:
        train = _data_path(self.settings, "train")
        originals, views = first_views(train, self.settings, self.config.view_rows)
        figure = figures.views_grid(originals, views)
        self._save(figure, "views", originals_RSS3=originals, views_RVSS3=views)

    def _look(self) -> "_Seen":
        """Features of images of both data sets, by the encoder and as raw pixels."""
        train, test = _data_path(self.settings, "train"), _data_path(self.settings, "test")
        encoder = load_encoder(str(self.run))
        chosen = encoder.preprocessing
        # Pixels are compared as the encoder gets to see them.
        pixels = dataclasses.replace(load_encoder(f"pixels:{chosen.size}"), preprocessing=chosen)
        names = check_beton(test).class_names
        bank, asked = (read_spread(f, self.config.max_images, chosen) for f in (train, test))
        features = {
            title: (features_of(source, bank, device), features_of(source, asked, device))
            for device in [self.config.device]
            for title, source in ((KINDS["pixels"], pixels), (KINDS["run"], encoder))
        }
        return _Seen(bank, asked, names, features)

    def _neighbours(self, seen: "_Seen") -> None:
        if (seen.bank.labels_B < 0).any() or (seen.asked.labels_B < 0).any():
            raise _MissingError("both data sets need labels")
        queries = _one_per_class(seen.asked.labels_B, self.config.queries)
        measures = []
        for title, (bank_NF, asked_NF) in seen.features.items():
            indices_RK = nearest(asked_NF[queries], bank_NF, self.config.neighbours)
            measures.append(
                Neighbours(
                    title,
                    seen.bank.crops_BVHWC[indices_RK, 0].numpy(),
                    (seen.bank.labels_B[indices_RK] == seen.asked.labels_B[queries, None]).numpy(),
                )
            )
        shown = seen.asked.crops_BVHWC[queries, 0].numpy()
        self._save(figures.neighbours(shown, measures), "neighbours")

    def _map(self, seen: "_Seen") -> None:
        maps = {title: project(asked_NF) for title, (_, asked_NF) in seen.features.items()}
        labels_N = seen.asked.labels_B.numpy()
        figure = figures.embedding_maps(maps, labels_N, seen.class_names)
        self._save(figure, "map", maps=maps, labels_N=labels_N, class_names=seen.class_names)


@dataclass(frozen=True)
class _Seen:
    bank: Batch
    """Images among which neighbours are looked for."""
    asked: Batch
    """Held-out images."""
    class_names: tuple[str, ...]
    features: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Of both, by each measure."""


def read_settings(run: Path) -> dict[str, Any]:
    """``config.json`` of a run.

    Raises:
        ConfigError: it is not there or unreadable.
    """
    path = run / "config.json"
    try:
        return read_json_file(path)
    except FileNotFoundError:
        raise ConfigError(f"{run}: holds no config.json; name the folder of a run") from None
    except DataError as error:
        raise ConfigError(str(error)) from None


def read_metrics(run: Path) -> Metrics:
    """Columns of ``metrics.jsonl`` in the order of steps, NaN where a step has no value.

    A torn last line, of a run that is being written or was killed, is left out.

    Raises:
        DataError: there is no step yet, or another line is unreadable.
    """
    path = run / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: not there yet") from None
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            if number < len(lines):
                raise DataError(f"{path}: line {number} is no JSON object") from None
    records = [record for record in records if _is_number(record.get("step"))]
    if not records:
        raise DataError(f"{path}: holds no step yet")
    keys = dict.fromkeys(key for record in records for key in record)
    columns = {
        key: np.array([_number(record.get(key)) for record in records], np.float64) for key in keys
    }
    return {key: column for key, column in columns.items() if np.isfinite(column).any()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float:
    return float(value) if _is_number(value) else float("nan")


def read_evaluations(run: Path) -> tuple[list[Bar], float]:
    """Accuracies that ``widebatch evaluate --json RUN/evaluation/NAME.json`` left, and chance.

    Pixels come before untrained and trained encoders, whatever the files are called.

    Raises:
        DataError: there is none.
    """
    folder = run / "evaluation"
    reports = []
    for path in sorted(folder.glob("*.json")):
        try:
            report = json.loads(path.read_text())
            bar = _bar(report)
            reports.append((bar, int(report["num_classes"])))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            log.info("left out: %s (no evaluation: %r)", path, error)
    if not reports:
        raise DataError(f"{folder}: no evaluations; 'widebatch evaluate --json' writes them there")
    return [bar for bar, _ in reports], 1.0 / max(classes for _, classes in reports)


def _bar(report: dict[str, Any]) -> Bar:
    kind = report["encoder"]["kind"]
    kind = "run" if kind == "exported" else kind
    return Bar(_protocol(report), KINDS[kind], float(report["top1"]), list(KINDS).index(kind))


def _protocol(report: dict[str, Any]) -> str:
    """How an accuracy was measured, in words for an axis."""
    name = "kNN" if report["protocol"] == "weighted-knn" else f"linear ({report['protocol']})"
    few = report["settings"].get("labels_per_class")
    labels = f"{few} labels\nper class" if few else f"{report['n_train']:,}\nlabels"
    return f"{name}\n{labels}"


def first_views(train: Path, settings: dict[str, Any], rows: int) -> tuple[Images, Images]:
    """The first samples of a run and the very views of them that its first epoch saw.

    Returns:
        Images (R, S, S, 3), cut to their middle square, and views (R, V, S, S, 3), both uint8.
    """
    crop = from_json(CropConfig, settings["crop"], "config.json: crop")
    augment = from_json(AugmentConfig, settings["augment"], "config.json: augment")
    seed = int(settings.get("seed", 0))
    rows = min(rows, check_beton(train).num_samples)
    loader = train_loader(train, crop, _LOADER, seed=seed, batch_size=rows)
    with contextlib.closing(loader):
        batch = next(loader.starting_at(Position(0, 0)))
    # Without normalisation, views are colours.
    view = Augment(dataclasses.replace(augment, normalize=False), seed)
    views_NCHW = view(batch.crops_BVHWC, batch.ids_B, batch.position.epoch)
    views_VRSSC = views_NCHW.clamp(0, 1).unflatten(0, (-1, rows)).permute(0, 1, 3, 4, 2)
    views_RVSS3 = (views_VRSSC.transpose(0, 1) * 255).round().to(torch.uint8).contiguous()
    originals = read_images(train, batch.ids_B.numpy(), crop.size, crop.size)
    return originals.crops_BVHWC[:, 0].numpy(), views_RVSS3.numpy()


def read_spread(path: Path, limit: int, how: Preprocessing) -> Batch:
    """At most ``limit`` images, evenly spread over a file, as the encoder is to see them."""
    count = check_beton(path).num_samples
    ids_N = np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64))
    return read_images(path, ids_N, how.size, how.resize)


def read_images(path: Path, ids_N: npt.NDArray[np.int64], size: int, resize: int) -> Batch:
    """Centre crops of chosen samples, as one batch of one view.

    Raises:
        DataError: the file or a sample cannot be read.
    """
    check_beton(path)
    table = read_sample_table(path)
    boxes_NV4 = centre_crop_boxes(table.heights[ids_N], table.widths[ids_N], size, resize)
    crops = np.empty((len(ids_N), 1, size, size, 3), np.uint8)
    TorchvisionDecoder(path, table).decode(ids_N, boxes_NV4, crops)
    labels = torch.from_numpy(table.labels[ids_N])
    return Batch(torch.from_numpy(crops), torch.from_numpy(ids_N), labels, Position())


def features_of(source: LoadedEncoder, images: Batch, device: str = "auto") -> torch.Tensor:
    """Features (N, F) of a batch's images by an encoder, float32 on the CPU, in their order."""
    where = choose_device(device)
    how = source.preprocessing
    plain = Augment(AugmentConfig(normalize=how.normalize, mean=how.mean, std=how.std), seed=0)
    parts = (
        Batch(
            images.crops_BVHWC[part],
            torch.arange(len(images.ids_B))[part],
            images.labels_B[part],
            images.position,
        )
        for first in range(0, len(images.ids_B), _BATCH)
        for part in [slice(first, first + _BATCH)]
    )
    encoder = source.encoder.to(where)
    return extract_features(encoder, parts, plain, where, gather=False).features_NF


def nearest(asked_RF: torch.Tensor, bank_NF: torch.Tensor, k: int) -> torch.Tensor:
    """Indices (R, K) of the bank's rows of highest cosine similarity, the nearest first."""
    asked_RF = torch.nn.functional.normalize(asked_RF, dim=1)
    bank_NF = torch.nn.functional.normalize(bank_NF, dim=1)
    return (asked_RF @ bank_NF.T).topk(min(k, len(bank_NF)), dim=1).indices


def project(features_NF: torch.Tensor) -> npt.NDArray[np.float64]:
    """A two-dimensional map (N, 2) of features by t-SNE on cosine distances; deterministic."""
    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    except ImportError:
        raise _MissingError(
            "scikit-learn is not installed; run `pip install scikit-learn`"
        ) from None
    unit_NF = torch.nn.functional.normalize(features_NF, dim=1).numpy()
    count, width = unit_NF.shape
    if count < 10:
        raise _MissingError(f"{count} images are too few")
    # As van der Maaten recommends: 50 principal components hold what neighbourhoods depend on.
    reduced = PCA(min(50, count, width), random_state=0).fit_transform(unit_NF)
    perplexity = min(30.0, (count - 1) / 3)
    tsne = TSNE(perplexity=perplexity, init="pca", learning_rate="auto", random_state=0)
    return np.asarray(tsne.fit_transform(reduced), np.float64)


def _one_per_class(labels_N: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of ``count`` images that take turns among the classes, in the order of classes."""
    turn = torch.zeros_like(labels_N)
    for label in labels_N.unique():
        mine = labels_N == label
        turn[mine] = torch.arange(int(mine.sum()))
    order = torch.argsort(turn * (int(labels_N.max()) + 1) + labels_N, stable=True)
    return order[:count]


def _data_path(settings: dict[str, Any], name: str) -> Path:
    path = (settings.get("data") or {}).get(name)
    if not path:
        raise _MissingError(f"the run had no --data.{name}")
    if not Path(path).is_file():
        raise _MissingError(f"{path} is not there any more")
    return Path(path)


def _title(settings: dict[str, Any]) -> str:
    facts = settings.get("run") or {}
    steps, batch = facts.get("total_steps"), settings.get("batch")
    encoder = (settings.get("encoder") or {}).get("name", "encoder")
    length = f", {steps:,} steps of {batch:,} images" if steps and batch else ""
    return f"{settings.get('recipe') or 'run'}: {encoder}{length}"

"""Nearest-neighbour and linear accuracy while a run goes on: the cheapest honest look at an
encoder.

The training set is the reference and the test set is asked, both by their centre crops through the
encoder in evaluation mode, so nothing of the run changes. Each rank extracts a share of features.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from common.bounds import check_bounds
from common.collectives import all_gather_json
from common.errors import ConfigError
from data_pipeline.augment import Augment
from data_pipeline.reading.batch import Batch
from data_pipeline.reading.beton import DataInfo
from data_pipeline.reading.damage import Damage
from data_pipeline.reading.loader import EvalLoader
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.pool import LoaderConfig
from trainer.features.extraction import default_resize, extract_features
from trainer.features.knn import knn_classify, remark_on_k
from trainer.features.labelled_files import read_labels
from trainer.features.least_squares import linear_top1

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OnlineKnnConfig:
    """Needs `--data.test`. An online figure: it uses the newest weights, not the best."""

    every_epochs: int = 10
    """Evaluate after every so many epochs, and after the last step; 0: never."""
    k: int = 200
    """Neighbours that vote, at most the size of the training set."""
    temperature: float = 0.07
    """Votes weigh exp(cosine similarity / temperature)."""
    linear: bool = True
    """Fit a linear classifier to the same features as well, by least squares."""
    batch: int = 256
    """Images per process and forward pass."""
    size: int | None = None
    """Side of the images that this and later evaluations see, in pixels; none: --crop.size."""
    resize: int | None = None
    """Shorter side before the centre crop, in pixels; none: 8/7 of the crop's side, or the whole
    image up to crops of 64 pixels."""

    def __post_init__(self) -> None:
        """Refuse at the start what the first evaluation would, hours later."""
        counts = dict.fromkeys(("k", "batch", "size", "resize"), "[1, 1e9]")
        check_bounds(self, "--knn.", every_epochs="[0, 1e9]", temperature="(0, inf)", **counts)


class OnlineKnn:
    """Evaluates the live encoder on the run's own data sets."""

    def __init__(
        self,
        config: OnlineKnnConfig,
        train: OpenData,
        test: OpenData,
        size: int,
        loader: LoaderConfig,
        rank: int,
        world_size: int,
    ) -> None:
        size = config.size or size

        def load(data: OpenData) -> EvalLoader:
            return EvalLoader(
                data,
                size,
                default_resize(size) if config.resize is None else config.resize,
                loader,
                batch_size=config.batch,
                rank=rank,
                world_size=world_size,
            )

        self.config = config
        self._train, self._test = load(train), load(test)
        for info in (train.info, test.info):
            if not info.num_labelled or (info is test.info and not info.has_label):
                raise ConfigError(
                    f"{info.name}: {info.num_labelled} of {info.num_samples} samples have labels"
                    " for the online kNN; leave out --data.test"
                )
        self._classes = read_labels(train, test, throughout=False).classes
        count, classes = train.info.num_samples, len(train.info.class_names)
        crowded = remark_on_k(config.k, count, classes, "--knn.k")
        for remark in (*self._classes.remarks, *crowded) if rank == 0 else ():
            log.warning("online kNN: %s", remark.removeprefix("warning: "))

    @property
    def test(self) -> DataInfo:
        """The set that asks."""
        return self._test.data.info

    @property
    def identity(self) -> str:
        """Equal where figures can be compared: both sets' contents, and how they are looked at."""
        chosen = self.config
        prints = [loader.data.info.identity[:16] for loader in (self._train, self._test)]
        looked_at = f"{chosen.k} {chosen.temperature} {chosen.resize}"
        if chosen.size is not None:  # a setting younger than runs whose figures these are
            looked_at += f" {chosen.size}"
        return f"{' '.join(prints)} {looked_at}"

    def evaluate(
        self, encoder: nn.Module, augment: Augment, device: torch.device, dtype: torch.dtype
    ) -> dict[str, float]:
        """Top-1 and top-5 on the test set, and of a linear classifier its top-1, 0 to 1. A
        collective: all ranks call it together.

        Raises:
            DataError: on all ranks: more samples of a set are damaged than may be.
        """
        bank = extract_features(encoder, self._counted(self._train), augment, device, dtype)
        bank = bank.take((bank.labels_N >= 0).nonzero()[:, 0])
        asked = extract_features(encoder, self._counted(self._test), augment, device, dtype)
        asked = asked._replace(labels_N=self._classes.renumbered(asked.labels_N))
        k = min(self.config.k, len(bank.labels_N))
        result = knn_classify(bank, asked, k, temperature=self.config.temperature)
        found = {"knn_top1": result.top1, "knn_top5": result.top5}
        if self.config.linear:
            found["linear_top1"] = linear_top1(bank, asked, device)
        return found

    @staticmethod
    def _counted(loader: EvalLoader) -> Iterator[Batch]:
        """Its batches; in the end all ranks count the damaged samples that any has met."""
        data, met = loader.data, list[tuple[int, str]]()
        for batch in loader:
            met += [(each.sample, each.why) for each in batch.substitutes]
            yield batch
        damage = Damage(data.info.name, data.info.num_samples, data.max_damaged)
        for sample, why in sorted(row for rows in all_gather_json(met) for row in rows):
            damage.note(sample, why)

    def close(self) -> None:
        """Release both loaders."""
        self._train.close()
        self._test.close()

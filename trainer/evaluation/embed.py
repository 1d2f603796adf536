"""Features of images in a file, for whatever comes next: ``widebatch embed``.

Shape suffixes: N images, F features.
"""

import csv
import importlib
import io
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import safetensors.torch
import torch
import tyro

from common.errors import ConfigError, DataError
from common.files.atomic_file import AtomicFile, check_replaceable, write_atomically
from data_pipeline.reading.beton import name_of
from trainer.evaluation.job import Job, JobConfig
from trainer.evaluation.labelled_subset import packed_names
from trainer.evaluation.open_images import OpenImages, open_images
from trainer.features.extraction import Features

_KINDS = (".npy", ".safetensors", ".parquet")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(JobConfig):
    """Writes the features of images to a file: a row each, in the order of the images.

    OUT.parquet has them beside the images' numbers, files, labels and classes. OUT.npy and
    OUT.safetensors have numbers alone, and OUT.csv beside them a line for each row. OUT.json says
    which encoder, how it looked, and at what.
    """

    json: Path | None = None
    """Where it is told how the features were made. None: OUT.json."""
    train: Annotated[tuple[Path, ...], tyro.conf.arg(name="data")]
    """.beton files, one folder of images (with one sub-folder per class, if you like), or image
    files."""
    out: Path = Path("features.npy")
    """OUT.npy, OUT.safetensors, or OUT.parquet, which takes pyarrow."""

    def __post_init__(self) -> None:
        """Refuse a file that could not be written at the end."""
        super().__post_init__()
        if self.out.suffix not in _KINDS:
            raise ConfigError(f"--out {self.out}: name a file that ends in {', '.join(_KINDS)}")
        check_replaceable(self.out, self.out.suffix)
        if self.out.suffix == ".parquet":
            _parquet()
        else:
            check_replaceable(self.out.with_suffix(".csv"), ".csv")


def embed(config: EmbedConfig) -> dict[str, Any] | None:
    """Compute and write. A collective where several processes were started.

    Returns:
        JSON values on rank 0, ``None`` on the others: ``rows``, ``feature_dim``, ``files`` that
        were written, and ``left_out``, images that cannot be used, each with its reason.

    Raises: as :func:`trainer.evaluation.knn.knn`; ConfigError: pyarrow is missing.
    """
    job = Job(config)
    with job, open_images(config.train, "--data") as images:
        features = job.features(images.data)
        job.leave()
        if job.rank:
            return None
        names, notes = _names(images)
        table = _table(features, names, images.data.info.class_names)
        config.out.parent.mkdir(parents=True, exist_ok=True)
        files = [config.out]
        if config.out.suffix == ".parquet":
            _write_parquet(config.out, table, features.features_NF)
        else:
            _write_numbers(config.out, features)
            files.append(config.out.with_suffix(".csv"))
            _write_csv(files[1], table)
        facts = job.facts(train=images.data.info)
        facts["data"]["train"]["path"] = name_of([path.absolute() for path in config.train])
        if images.left_out:
            first, why = images.left_out[0]
            notes.append(f"left out {len(images.left_out)} images, the first {first}: {why}")
        return {
            "method": "embed",
            "protocol": "features",
            "rows": len(features.ids_N),
            "n_train": len(features.ids_N),
            "feature_dim": features.features_NF.shape[1],
            "files": [str(path) for path in files],
            "left_out": [{"image": image, "reason": why} for image, why in images.left_out],
            "measured": job.measured(features="as the encoder gives them, before any head"),
            "notes": notes,
            **facts,
        }


def _names(images: OpenImages) -> tuple[list[str] | None, list[str]]:
    """The images' files, and what a reader ought to know of them."""
    try:
        return images.names or packed_names(images.data), []
    except DataError as error:
        return None, [f"rows have numbers and no file names: {error}"]


def _table(
    features: Features, names: list[str] | None, classes: tuple[str, ...]
) -> dict[str, list[Any]]:
    """A column each; None where nothing is known."""
    labels = [label if label >= 0 else None for label in features.labels_N.tolist()]
    table: dict[str, list[Any]] = {
        "id": features.ids_N.tolist(),
        "file": names or [None] * len(labels),
        "label": labels,
    }
    table["class"] = [None if label is None or not classes else classes[label] for label in labels]
    return table


def _write_csv(path: Path, table: dict[str, list[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values()))
    # Names of files may be of any bytes: they come out as they are.
    write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))


def _write_numbers(path: Path, features: Features) -> None:
    with AtomicFile(path) as atomic:
        if path.suffix == ".npy":
            np.save(atomic.file, features.features_NF.numpy(), allow_pickle=False)
        else:
            tensors = {"features": features.features_NF, "labels": features.labels_N}
            atomic.file.write(safetensors.torch.save({**tensors, "ids": features.ids_N}))
        atomic.publish()


def _parquet() -> tuple[ModuleType, ModuleType]:
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigError(
            "--out: .parquet takes pyarrow, which is not installed: pip install pyarrow, or name a"
            " file that ends in .npy"
        ) from None


def _write_parquet(path: Path, table: dict[str, list[Any]], rows_NF: torch.Tensor) -> None:
    arrow, parquet = _parquet()
    file = [name and name.encode("utf-8", "replace").decode() for name in table["file"]]
    kinds = {"id": arrow.int64(), "label": arrow.int64()}
    columns = {
        name: arrow.array(values, kinds.get(name, arrow.string()))
        for name, values in {**table, "file": file}.items()
    }
    columns["features"] = arrow.FixedSizeListArray.from_arrays(
        rows_NF.numpy().reshape(-1), rows_NF.shape[1]
    )
    with AtomicFile(path) as atomic:
        parquet.write_table(arrow.table(columns), atomic.file)
        atomic.publish()

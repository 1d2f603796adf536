"""Features of images in a file, for whatever comes next: ``widebatch embed``.

Shape suffixes: N images, F features.
"""

import contextlib
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
import tyro

from common.errors import ConfigError, DataError
from common.files.atomic_file import AtomicFile
from common.files.strict_json import dump_json, read_json_file
from data_pipeline.reading.beton import name_of
from trainer.evaluation.job import Job, JobConfig
from trainer.evaluation.labelled_subset import told_apart
from trainer.evaluation.open_images import OpenImages, are_packed, open_images
from trainer.features.extraction import Features

_KINDS = (".npy", ".safetensors", ".parquet")
_METHOD = "embed"

Table = dict[str, list[Any]]


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(JobConfig):
    """Writes the features of images to a file: a row each, in the order of the images.

    A .parquet has them beside the images' numbers, files, labels and classes. A .npy or
    .safetensors has numbers alone, and OUT.csv a line for each row. OUT.json says which encoder it
    was, how it looked, at what, and what was left out.
    """

    json: Path | None = None
    """Where it is told how the features were made. None: OUT.json (features.npy.json)."""
    train: Annotated[tuple[Path, ...], tyro.conf.arg(name="data")]
    """.beton files; or one folder of images (with one sub-folder per class, if you like), one .tar,
    or image files, which are packed on the way, into TMPDIR."""
    out: Path = Path("features.npy")
    """OUT, which ends in .npy, .safetensors, or .parquet, for which pyarrow is needed. Replaced if
    it is of this command."""

    def __post_init__(self) -> None:
        """Refuse what cannot be written at the end, or should not be."""
        super().__post_init__()
        if self.out.suffix not in _KINDS:
            raise ConfigError(f"--out {self.out}: name a file that ends in {', '.join(_KINDS)}")
        if not self.train:
            raise ConfigError("--data: name .beton files, one folder, one .tar, or image files")
        if self.out.suffix == ".parquet":
            _parquet()
        paths = [self.out, *self.beside()]
        if len({path.absolute() for path in paths}) < len(paths):
            raise ConfigError(f"--json {self.json}: --out writes this file; name another")
        for path in paths:
            if path.exists() and not self._is_ours(path):
                raise ConfigError(
                    f"--out {self.out}: {path} exists and is not of 'widebatch embed'; name another"
                )

    def beside(self) -> list[Path]:
        """OUT.json, and OUT.csv where the rows' images are not in OUT itself."""
        kinds = ("json",) if self.out.suffix == ".parquet" else ("json", "csv")
        own = [self.out.with_name(f"{self.out.name}.{kind}") for kind in kinds]
        return own if self.json is None else [self.json, *own[1:]]

    def _is_ours(self, path: Path) -> bool:
        """Whether what is there was written by this command, as the JSON beside it says."""
        try:
            told = read_json_file(self.beside()[0])
        except (DataError, OSError):
            return False
        return told.get("method") == _METHOD and str(path.absolute()) in told.get("files", ())


def embed(config: EmbedConfig) -> dict[str, Any] | None:
    """Compute and write. A collective where several processes were started.

    Returns:
        JSON values on rank 0, ``None`` on the others: ``rows``, ``feature_dim``, ``files`` that
        were written, and ``left_out``, images that cannot be used, each with its reason.

    Raises: as :func:`trainer.evaluation.knn.knn`; ConfigError: several processes are to share what
        is not packed.
    """
    job = Job(config)
    if job.world_size > 1 and not are_packed(config.train):
        folder = config.train[0]
        raise ConfigError(
            f"--data {folder}: several processes share what is packed: 'widebatch pack {folder}"
            " images.beton' first, or take one process"
        )
    with contextlib.ExitStack() as stack:
        paths = [config.out, *config.beside()]
        images = stack.enter_context(open_images(config.train, "--data", workers=0, progress=True))
        config.out.parent.mkdir(parents=True, exist_ok=True)
        files = [] if job.rank else [stack.enter_context(AtomicFile(path)) for path in paths]
        stack.enter_context(job)
        features = job.features(images.data)
        job.leave()
        if job.rank:
            return None
        names, notes = _names(images)
        report = {
            "method": _METHOD,
            "protocol": "features",
            "rows": len(features.ids_N),
            "n_train": len(features.ids_N),
            "feature_dim": features.features_NF.shape[1],
            "files": [str(path.absolute()) for path in paths],
            "left_out": [{"image": image, "reason": why} for image, why in images.left_out],
            "measured": job.measured(features="as the encoder gives them, before any head"),
            "notes": notes,
            **job.facts(train=images.data.info),
        }
        given = [path.absolute() for path in config.train]
        report["data"]["train"] |= {"path": name_of(given), "paths": list(map(str, given))}
        table = _table(features, names, images.data.info.class_names)
        _write(files, config.out.suffix, table, features, report)
    return report


def _names(images: OpenImages) -> tuple[list[str] | None, list[str]]:
    """The images' files, and what a reader ought to know of them."""
    notes = [f"{count} files passed over: {why}" for why, count in images.passed_over.items()]
    if images.left_out:
        first, why = images.left_out[0]
        notes.append(f"left out {len(images.left_out)} images, the first {first}: {why}")
    try:
        return images.names or told_apart(images.data), notes
    except DataError:
        name = images.data.info.name
        return None, [*notes, f"rows have numbers alone: {name} does not say which files they were"]


def _table(features: Features, names: list[str] | None, classes: tuple[str, ...]) -> Table:
    """A column each; None where nothing is known."""
    labels = [label if label >= 0 else None for label in features.labels_N.tolist()]
    named = [None if label is None or not classes else classes[label] for label in labels]
    ids = features.ids_N.tolist()
    return {"id": ids, "file": names or [None for _ in ids], "label": labels, "class": named}


def _write(
    files: Sequence[AtomicFile],
    kind: str,
    table: Table,
    features: Features,
    report: dict[str, Any],
) -> None:
    """All of them whole, or none."""
    out, told, *lines = (atomic.file for atomic in files)
    if kind == ".parquet":
        _write_parquet(out, table, features.features_NF)
    elif kind == ".npy":
        np.save(out, features.features_NF.numpy(), allow_pickle=False)
    else:
        tensors = {"features": features.features_NF, "labels": features.labels_N}
        out.write(safetensors.torch.save({**tensors, "ids": features.ids_N}))
    for file in lines:
        _write_csv(file, table)
    told.write((dump_json(report, indent=1) + "\n").encode())
    for atomic in files:
        atomic.stage()
    for atomic in reversed(files):
        atomic.publish()


def _write_csv(file: BinaryIO, table: Table) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values()))
    # Names of files may be of any bytes: they come out as they are.
    try:
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError:  # of a manifest that nobody's files have made
        file.write(text.getvalue().encode("utf-8", "backslashreplace"))


def _parquet() -> tuple[ModuleType, ModuleType]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(
            "--out: .parquet takes pyarrow, which is not installed: pip install pyarrow, or name a"
            " file that ends in .npy"
        ) from None
    return pyarrow, parquet


def _write_parquet(file: BinaryIO, table: Table, rows_NF: torch.Tensor) -> None:
    arrow, parquet = _parquet()
    columns = {name: arrow.array(table[name], arrow.int64()) for name in ("id", "label")}
    for name in ("file", "class"):  # which may be of bytes that are no text
        texts = [each and each.encode("utf-8", "replace").decode() for each in table[name]]
        columns[name] = arrow.array(texts, arrow.string())
    columns = {name: columns[name] for name in table}
    columns["features"] = arrow.FixedSizeListArray.from_arrays(
        rows_NF.numpy().reshape(-1), rows_NF.shape[1]
    )
    parquet.write_table(arrow.table(columns), file)

"""A file from elsewhere is data, whatever it is called: what it would run is never run."""

import dataclasses
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import CheckpointError, ConfigError, DataError
from data_pipeline.reading.manifest import manifest_path
from tests.data_pipeline.betons import check_beton
from tests.fuzz.targets import packed
from trainer.evaluation.load_encoder import FILE_FORMAT, FILE_VERSION, Preprocessing, load_encoder
from trainer.models.encoders import EncoderConfig
from trainer.state.checkpoint import CheckpointStore, load_encoder_state
from trainer.state.checkpoint.files import MANIFEST, read_manifest, write_manifest
from trainer.state.run_data import read_settings

pytestmark = pytest.mark.reliability(30)

REFUSALS = (DataError, ConfigError, CheckpointError)


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, sentinel: Path) -> None:
        self._sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._sentinel),)


def payloads(sentinel: Path) -> dict[str, bytes]:
    """Files that run something in a reader that trusts them."""
    archive = sentinel.with_name("archive.pt")
    torch.save({"model": Payload(sentinel)}, archive)
    return {
        "pickle": pickle.dumps(Payload(sentinel)),
        "old pickle": pickle.dumps(Payload(sentinel), protocol=0),
        "torch.save": archive.read_bytes(),
        "yaml": f"!!python/object/apply:os.mkdir [{json.dumps(str(sentinel))}]".encode(),
        "yaml in an object": f'{{"a": !!python/object/apply:os.mkdir ["{sentinel}"]}}'.encode(),
    }


KINDS = ["pickle", "old pickle", "torch.save", "yaml", "yaml in an object"]


def as_beton(folder: Path, data: bytes) -> tuple[Path, Callable[[], object]]:
    path = folder / "x.beton"
    path.write_bytes(data)
    return path, lambda: check_beton(path)


def as_manifest(folder: Path, data: bytes) -> tuple[Path, Callable[[], object]]:
    beton = packed(folder, "jpeg")
    manifest_path(beton).write_bytes(data)
    return manifest_path(beton), lambda: check_beton(beton)


def as_exported_weights(folder: Path, data: bytes) -> tuple[Path, Callable[[], object]]:
    """With a description whose checksum is right."""
    path = folder / "encoder.safetensors"
    path.write_bytes(data)
    encoder = dataclasses.asdict(EncoderConfig(name="shufflenet_v2_x0_5"))
    facts = {
        "format": FILE_FORMAT,
        "version": FILE_VERSION,
        "sha256": hashlib.sha256(data).hexdigest(),
        "encoder": encoder,
        "preprocessing": dataclasses.asdict(Preprocessing(size=32, resize=32)),
    }
    path.with_suffix(".json").write_text(json.dumps(facts))
    return path, lambda: load_encoder(str(path))


def as_description(folder: Path, data: bytes) -> tuple[Path, Callable[[], object]]:
    path = folder / "encoder.json"
    path.write_bytes(data)
    path.with_suffix(".safetensors").write_bytes(b"")
    return path, lambda: load_encoder(str(path.with_suffix(".safetensors")))


def as_checkpoint(folder: Path, data: bytes) -> tuple[Path, Callable[[], object]]:
    """With a manifest whose checksums are right."""
    store = CheckpointStore(folder / "checkpoints")
    saved = store.save({"step": 3}, {"model": {"x": torch.ones(2)}})
    path = saved / "model.safetensors"
    path.write_bytes(data)
    files = read_manifest(saved / MANIFEST)
    digest = hashlib.sha256(data).hexdigest()
    files["model.safetensors"] |= {"sha256": digest, "bytes": len(data)}
    write_manifest(saved / MANIFEST, files)

    def load() -> None:
        found = CheckpointStore(folder / "checkpoints").newest()
        assert found is not None
        found.tensors("model")

    return path, load


def as_state(folder: Path, data: bytes) -> tuple[Path, Callable[[], object]]:
    path, load = as_checkpoint(folder, b"")
    path = path.with_name("state.json")
    path.write_bytes(data)
    return path, load


def as_config(folder: Path, data: bytes) -> tuple[Path, Callable[[], object]]:
    path = folder / "config.json"
    path.write_bytes(data)
    return path, lambda: load_encoder_state(folder)


def as_settings(folder: Path, data: bytes) -> tuple[Path, Callable[[], object]]:
    path = folder / "config.json"
    path.write_bytes(data)
    return path, lambda: read_settings(folder)


PLACES = [
    *(as_beton, as_manifest, as_exported_weights, as_description),
    *(as_checkpoint, as_state, as_config, as_settings),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES, ids=[place.__name__ for place in PLACES])
def test_code_in_a_file_is_not_run(
    tmp_path: Path, place: Callable[[Path, bytes], tuple[Path, Callable[[], object]]], kind: str
) -> None:
    sentinel = tmp_path / "sentinel"
    folder = tmp_path / "files"
    folder.mkdir()
    path, read = place(folder, payloads(sentinel)[kind])
    with pytest.raises(REFUSALS) as refused:
        read()
    assert path.name in str(refused.value)
    assert not sentinel.exists()


@pytest.mark.parametrize("kind", ["pickle", "old pickle", "torch.save"])
def test_the_payloads_would_work(tmp_path: Path, kind: str) -> None:
    sentinel = tmp_path / "sentinel"
    data = payloads(sentinel)[kind]
    if kind == "torch.save":
        torch.load(tmp_path / "archive.pt", weights_only=False)
    else:
        pickle.loads(data)  # noqa: S301
    assert sentinel.exists()


def test_links_in_a_checkpoint_are_refused(tmp_path: Path) -> None:
    """A link would have a resumed run read, and a retired one delete, what lies elsewhere."""
    store = CheckpointStore(tmp_path / "checkpoints")
    saved = store.save({"step": 3}, {"model": {"x": torch.ones(2)}})
    file = saved / "model.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: missing or not a plain file"):
        CheckpointStore(tmp_path / "checkpoints").newest()


@pytest.mark.parametrize(
    "name", ["../stolen.json", "/etc/passwd", "a/b.json", "..", "", ".hidden.json", "x.json\0"]
)
def test_a_manifest_names_files_beside_it_only(tmp_path: Path, name: str) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    saved = store.save({"step": 3}, {"model": {"x": torch.ones(2)}})
    (tmp_path / "checkpoints" / "stolen.json").write_bytes(b"{}")
    files = read_manifest(saved / MANIFEST)
    facts = {"sha256": hashlib.sha256(b"{}").hexdigest(), "bytes": 2}
    write_manifest(saved / MANIFEST, {**files, name: facts})
    with pytest.raises(CheckpointError, match="bad entry"):
        CheckpointStore(tmp_path / "checkpoints").newest()


def test_a_path_with_a_zero_byte_is_refused(tmp_path: Path) -> None:
    from trainer.config import DataConfig, from_json

    with pytest.raises(ConfigError, match=r"config\.train: expected Path"):
        from_json(DataConfig, {"train": "x\0y"})
    with pytest.raises(ConfigError, match=r"config\.train: expected Path"):
        from_json(DataConfig, {"train": 3})

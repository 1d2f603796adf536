"""Write an export: nothing has its name before the library it is for has loaded and run it.

A file format gives ``NAME.SUFFIX``, ``NAME.json``, which says what it is and how to use it, and the
model card ``NAME.md``. Hugging Face's is a folder, in which they are ``widebatch.json`` and
``README.md``.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import ConfigError, DataError
from common.files.atomic_file import AtomicFile, as_utf8, check_replaceable
from common.files.strict_json import dump_json, read_json_file
from trainer.evaluation.load_encoder import (
    FILE_FORMAT,
    FILE_VERSION,
    Preprocessing,
    Which,
    description_path,
    fill,
    run_encoder_config,
    run_preprocessing,
)
from trainer.export.atomic_folder import AtomicFolder
from trainer.export.card import model_card
from trainer.export.proof import Proof, proof_images, prove
from trainer.export.target import RefusedError, Target, Tensors
from trainer.export.to_detectron2 import ToDetectron2
from trainer.export.to_huggingface import ToHuggingFace
from trainer.export.to_onnx import ToOnnx
from trainer.export.to_timm import ToTimm
from trainer.export.to_torch_export import ToTorchExport
from trainer.export.to_torchvision import ToTorchvision
from trainer.models.encoders import EncoderConfig, build_encoder
from trainer.state.checkpoint import load_encoder_state
from trainer.state.provenance import versions

TARGETS: dict[str, type[Target]] = {
    target.name: target
    for target in (ToTorchvision, ToTimm, ToHuggingFace, ToDetectron2, ToOnnx, ToTorchExport)
}
FORMATS = tuple(TARGETS)

# `widebatch evaluate` reads torchvision's keys alone; others' files must not look like them.
_FOREIGN_FORMAT = "widebatch-export"
_DESCRIPTION, _CARD, _MODEL = "widebatch.json", "README.md", "model.safetensors"


@dataclass(frozen=True)
class Exported:
    """What was written."""

    weights: Path
    """The file, or the folder."""
    description: Path
    card: Path
    proof: Proof
    tensors: int
    num_bytes: int
    """Of the weights' file."""
    facts: dict[str, Any]
    """Content of the JSON."""


@dataclass(frozen=True)
class _Outgoing:
    """The encoder that goes out."""

    run: Path
    config: dict[str, Any]
    encoder_config: EncoderConfig
    preprocessing: Preprocessing
    encoder: nn.Module
    tensors: Tensors
    which: Which


def export(
    run: Path,
    out: Path,
    file_format: str = "torchvision",
    which: Which = "last",
    force: bool = False,
    card: Path | None = None,
) -> Exported:
    """Write a run's encoder and prove it; all files appear whole, or none does.

    Args:
        run: the run's folder.
        out: a file with the format's suffix; for ``huggingface`` a folder.
        file_format: one of ``FORMATS``.
        which: the newest whole checkpoint, or that of the best online kNN.
        force: replace existing files.
        card: where the model card goes, if not beside ``out``; not for a folder, which has it in.

    Raises:
        ConfigError: ``out`` exists or has another suffix; the format cannot hold the encoder; the
            library is not installed.
        CheckpointError: the run has no whole checkpoint, or no best one.
        NumericalError: the proof failed; nothing is written.
    """
    if file_format not in TARGETS:
        raise ConfigError(f"--format {file_format}: choose from {', '.join(FORMATS)}")
    kind = TARGETS[file_format]
    if not kind.suffix and card is not None:
        raise ConfigError(f"--card {card}: the card of a folder is {out / _CARD}; leave it out")
    card = card or (out.with_suffix(".md") if kind.suffix else out / _CARD)
    _check_target(kind, out, card, force)
    tensors, config = load_encoder_state(run, best=which == "best")
    where = str(run / "config.json")
    encoder_config = run_encoder_config(config, where)
    preprocessing = run_preprocessing(config, where)
    target = _target(kind, encoder_config, preprocessing)
    encoder = build_encoder(encoder_config)
    fill(encoder, tensors, f"{run}: its checkpoint")
    source = _Outgoing(
        run, config, encoder_config, preprocessing, encoder.eval(), _plain(tensors), which
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write = _write_file if kind.suffix else _write_folder
    return write(source, target, out, card, force)


def _target(kind: type[Target], encoder: EncoderConfig, preprocessing: Preprocessing) -> Target:
    try:
        return kind(encoder, preprocessing)
    except RefusedError as error:
        able = []
        for name, other in TARGETS.items():
            with suppress(RefusedError):
                other(encoder, preprocessing)
                able.append(name)
        raise RefusedError(f"{error}; take --format {' or '.join(able)}") from None


def _write_file(source: _Outgoing, target: Target, out: Path, card: Path, force: bool) -> Exported:
    card.parent.mkdir(parents=True, exist_ok=True)
    content = target.write(source.encoder, source.tensors)[""]
    with ExitStack() as stack:
        paths = (out, description_path(out), card)
        weights, description, text = (stack.enter_context(AtomicFile(path)) for path in paths)
        written = _put(weights, content)
        facts, proof = _proven(source, target, written, out.name)
        facts["sha256"] = hashlib.sha256(written).hexdigest()
        _put(description, _json(facts))
        _put(text, as_utf8(model_card(source.run, source.config, facts)))
        _check_target(type(target), out, card, force)
        _publish(weights, description, text, out)
    return Exported(
        out, description_path(out), card, proof, len(source.tensors), len(written), facts
    )


def _write_folder(
    source: _Outgoing, target: Target, out: Path, card: Path, force: bool
) -> Exported:
    files = target.write(source.encoder, source.tensors)
    with AtomicFolder(out) as atomic:
        atomic.write(files)
        facts, proof = _proven(source, target, atomic.folder, out.name)
        facts["sha256"] = {name: hashlib.sha256(files[name]).hexdigest() for name in files}
        text = model_card(source.run, source.config, facts)
        atomic.write({_DESCRIPTION: _json(facts), _CARD: as_utf8(text)})
        _check_target(type(target), out, card, force)
        atomic.publish()
    count, size = len(source.tensors), len(files[_MODEL])
    return Exported(out, out / _DESCRIPTION, card, proof, count, size, facts)


def _proven(
    source: _Outgoing, target: Target, written: Path | bytes, name: str
) -> tuple[dict[str, Any], Proof]:
    """Load what was written into the library, compare, and say all that is known of it."""
    images, image_source = proof_images(source.run, source.config, source.preprocessing)
    feature_dim = int(source.encoder.feature_dim)  # type: ignore[arg-type]
    proof = prove(
        source.encoder,
        target.load(written),
        images,
        image_source,
        tolerance=target.tolerance,
        dtype=target.dtype,
        computed_by=target.built_by,
        versions=target.versions(),
    )
    facts = {
        **_facts(source, target.name),
        "feature_dim": feature_dim,
        target.name: target.facts(),
        "load": target.instructions(name),
        "proof": dataclasses.asdict(proof),
    }
    return facts, proof


def _check_target(kind: type[Target], out: Path, card: Path, force: bool) -> None:
    if kind.suffix and out.suffix != kind.suffix:
        raise ConfigError(
            f"{out}: name the output NAME{kind.suffix} (its JSON will be NAME.json, its card "
            "NAME.md)"
        )
    if not kind.suffix:
        _check_folder(out, force)
        return
    if card in (out, description_path(out)):
        raise ConfigError(f"--card {card}: is the name of another file of this export")
    for path in (out, description_path(out), card):
        check_replaceable(path)
        if path.exists() and not force:
            raise ConfigError(f"{path}: exists; choose another name, or --force to replace it")


def _check_folder(out: Path, force: bool) -> None:
    if not out.name:
        raise ConfigError(f"{out}: is no name for a new folder")
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise ConfigError(f"{out}: exists; choose another name, or --force to replace an export")
    # A whole folder would be deleted: only one that an export made.
    if out.is_symlink() or not _is_export(out):
        raise ConfigError(
            f"{out}: exists and is no export of ours ({_DESCRIPTION} is not in it), so --force "
            "does not replace it; choose another name"
        )


def _is_export(folder: Path) -> bool:
    try:
        return read_json_file(folder / _DESCRIPTION).get("format") == _FOREIGN_FORMAT
    except (FileNotFoundError, DataError):
        return False


def _plain(tensors: Tensors) -> Tensors:
    """Contiguous in the default layout, each with its own memory."""
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }


def _put(atomic: AtomicFile, data: bytes) -> bytes:
    """Write ``data``, and return what the file then holds."""
    atomic.file.write(data)
    atomic.file.flush()
    atomic.file.seek(0)
    return atomic.file.read()


def _publish(weights: AtomicFile, description: AtomicFile, card: AtomicFile, out: Path) -> None:
    """Name them. Weights never stand beside the JSON of others: an old one goes first."""
    for file in (weights, description, card):
        file.stage()
    description_path(out).unlink(missing_ok=True)
    weights.publish()
    card.publish()
    description.publish()


def _json(facts: Mapping[str, Any]) -> bytes:
    return (dump_json(facts, indent=1) + "\n").encode()


def _facts(source: _Outgoing, target: str) -> dict[str, Any]:
    config = source.config
    saved, run_facts = config["checkpoint"], config.get("run") or {}
    trained_by = run_facts.get("versions") or run_facts  # older runs had these beside the rest
    return {
        "format": FILE_FORMAT if target == "torchvision" else _FOREIGN_FORMAT,
        "version": FILE_VERSION,
        "target": target,
        "architecture": source.encoder_config.name,
        "encoder": dataclasses.asdict(source.encoder_config),
        "preprocessing": {
            **dataclasses.asdict(source.preprocessing),
            "interpolation": "bilinear, antialiased",
            "input": "RGB in [0, 1], (N, 3, size, size): shorter side to `resize`, centre crop, "
            "then (x - mean) / std if `normalize`",
        },
        "recipe": config.get("recipe"),
        "seed": config.get("seed"),
        "batch": config.get("batch"),
        "init_from": Path(str(config["init_from"])).name if config.get("init_from") else None,
        "which": source.which,
        **{name: saved.get(name) for name in ("step", "epoch", "data_fingerprint")},
        "class_names": run_facts.get("class_names"),
        "trained_by": {"commit": trained_by.get("commit"), "torch": trained_by.get("torch")},
        "exported_by": versions(),
    }

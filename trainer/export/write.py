"""Write an export: nothing has its name before the library it is for has loaded and run it.

A file format gives ``NAME.SUFFIX``, ``NAME.json``, which says what it is and how to use it, and the
model card ``NAME.md``. Hugging Face's is a folder, in which they are ``widebatch.json`` and
``README.md``.
"""

import contextlib
import dataclasses
import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import ConfigError, DataError
from common.files.atomic_file import (
    AtomicFile,
    as_utf8,
    check_replaceable,
    sync_folder,
    write_atomically,
)
from common.files.strict_json import dump_json, read_json_file
from trainer.evaluation.load_encoder import (
    FILE_FORMAT,
    FILE_VERSION,
    LoadedEncoder,
    Which,
    description_path,
    load_run,
)
from trainer.export.card import model_card
from trainer.export.named_models import ToTimm, ToTorchvision
from trainer.export.programs import ToOnnx, ToTorchExport
from trainer.export.proof import Proof, proof_images, prove
from trainer.export.target import RefusedError, Target, Tensors
from trainer.export.to_detectron2 import ToDetectron2
from trainer.export.to_huggingface import ToHuggingFace
from trainer.models.encoders import fixed_image_size
from trainer.state.provenance import versions

TARGETS: dict[str, type[Target]] = {
    target.name: target
    for target in (ToTorchvision, ToTimm, ToHuggingFace, ToDetectron2, ToOnnx, ToTorchExport)
}

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


def export(
    run: Path,
    out: Path,
    file_format: str = "torchvision",
    which: Which = "last",
    force: bool = False,
    card: Path | None = None,
    average: bool = False,
) -> Exported:
    """Write a run's encoder and prove it; all files appear whole, or none does.

    Args:
        run: the run's folder.
        out: a file with the format's suffix; for ``huggingface`` a folder.
        file_format: one of ``TARGETS``.
        which: of the run's checkpoints.
        force: replace existing files.
        card: where the model card goes, if not beside ``out``; not for a folder, which has it in.
        average: the encoder's moving average instead of itself.

    Raises:
        ConfigError: ``out`` exists or has another suffix; the format cannot hold the encoder; the
            library is not installed.
        CheckpointError: the run has no whole checkpoint, or no best one.
        NumericalError: the proof failed; nothing is written.
    """
    if file_format not in TARGETS:
        raise ConfigError(f"--format {file_format}: choose from {', '.join(TARGETS)}")
    kind = TARGETS[file_format]
    if not kind.suffix and card is not None:
        raise ConfigError(f"--card {card}: the card of a folder is {out / _CARD}; leave it out")
    card = card or (out.with_suffix(".md") if kind.suffix else out / _CARD)
    _check_target(kind, out, card, force)
    source = load_run(run, which, average)
    target = _target(kind, source)
    tensors = _plain(source.encoder.state_dict())
    files = target.write(source.encoder, tensors)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    if kind.suffix:
        description, model = description_path(out), files[""]
        facts, text = _told(run, source, target, out.name, model, digests[""])
        card.parent.mkdir(parents=True, exist_ok=True)
        _check_target(kind, out, card, force)
        _publish({out: model, card: as_utf8(text), description: _json(facts)})
    else:
        description, model = out / _DESCRIPTION, files[_MODEL]
        with atomic_folder(out) as folder:
            for name, content in files.items():
                write_atomically(folder / name, content)
            facts, text = _told(run, source, target, out.name, folder, digests)
            write_atomically(folder / _DESCRIPTION, _json(facts))
            write_atomically(folder / _CARD, as_utf8(text))
            _check_target(kind, out, card, force)
    proof = Proof(**facts["proof"])
    return Exported(out, description, card, proof, len(tensors), len(model), facts)


def _target(kind: type[Target], source: LoadedEncoder) -> Target:
    config = source.config
    assert config is not None  # noqa: S101  (a run's encoder has one)
    try:
        return kind(config, source.preprocessing)
    except RefusedError as error:
        able = []
        for name, other in TARGETS.items():
            with suppress(RefusedError):
                other(config, source.preprocessing)
                able.append(name)
        raise RefusedError(f"{error}; take --format {' or '.join(able)}") from None


def _told(
    run: Path, source: LoadedEncoder, target: Target, name: str, written: Path | bytes, digest: Any
) -> tuple[dict[str, Any], str]:
    """Load what was written into the library, compare, and say all that is known of it."""
    images, image_source = proof_images(run, source.settings, source.preprocessing)
    proof = prove(source.encoder, target.load(written), type(target), images, image_source)
    facts = {
        **_facts(source, target.name),
        target.name: target.facts(),
        "load": target.instructions(name),
        "proof": dataclasses.asdict(proof),
        "sha256": digest,
    }
    return facts, model_card(run, source.settings, facts)


def _publish(contents: dict[Path, bytes]) -> None:
    """Write all of them or none. The last one is the description."""
    with ExitStack() as stack:
        files = [stack.enter_context(AtomicFile(path)) for path in contents]
        for atomic, content in zip(files, contents.values()):
            atomic.file.write(content)
            atomic.stage()
        # Weights never stand beside the JSON of others: an old one goes first.
        list(contents)[-1].unlink(missing_ok=True)
        for atomic in files:
            atomic.publish()


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A new folder, which gets its name at the block's end; one that has the name goes then.

    Nothing is left of it after an error. No system call replaces a folder that has files in it: for
    an instant the name is free, and a power cut then leaves both in ``.NAME.RANDOM.part``.
    """
    with tempfile.TemporaryDirectory(".part", f".{path.name}.", path.parent) as beside:
        new, old = Path(beside, "new"), Path(beside, "old")
        new.mkdir()
        yield new
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
        sync_folder(path.parent)


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


def _json(facts: dict[str, Any]) -> bytes:
    return (dump_json(facts, indent=1) + "\n").encode()


def _facts(source: LoadedEncoder, target: str) -> dict[str, Any]:
    assert source.config is not None  # noqa: S101  (a run's encoder has one)
    encoder = dataclasses.asdict(source.config)
    del encoder["sees"]  # every export takes coloured images
    if fixed_image_size(source.config) is None:
        del encoder["image_size"]  # it takes any: those of its run have the preprocessing's size
    settings, known = source.settings, source.description
    run_facts = settings.get("run") or {}
    trained_by = run_facts.get("versions") or run_facts  # older runs had these beside the rest
    started = settings.get("init_from")
    origin = ("recipe", "seed", "batch", "which", "step", "epoch", "data_fingerprint")
    return {
        "format": FILE_FORMAT if target == "torchvision" else _FOREIGN_FORMAT,
        "version": FILE_VERSION,
        "target": target,
        "architecture": source.config.name,
        "feature_dim": known["feature_dim"],
        "encoder": encoder,
        "preprocessing": {
            **dataclasses.asdict(source.preprocessing),
            "interpolation": "bilinear, antialiased",
            "input": "RGB in [0, 1], (N, 3, size, size): shorter side to `resize`, centre crop, "
            "then (x - mean) / std if `normalize`",
        },
        **{name: known[name] for name in origin},
        "average": known["kind"] == "average",
        "init_from": Path(str(started)).name if started else None,
        "class_names": run_facts.get("class_names"),
        "trained_by": {"commit": trained_by.get("commit"), "torch": trained_by.get("torch")},
        "exported_by": versions(),
    }

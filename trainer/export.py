"""Hand an encoder on: weights under another library's names, with a proof that they are the same.

``torchvision``: a safetensors file that ``torchvision.models.NAME().load_state_dict(strict=False)``
takes with only the classifier's keys missing, and a JSON beside it that says what it is and how to
use it. Before either file gets its name, the written weights are loaded into a model that
torchvision built, and its features of some images are compared with the run's encoder's in float64.

Other formats belong into ``FORMATS``.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from torch import nn

from data_pipeline.atomic_file import AtomicFile
from data_pipeline.augment import Augment, AugmentConfig
from data_pipeline.errors import DataError
from data_pipeline.loader import LoaderConfig, eval_loader
from trainer.checkpoint import load_encoder_state
from trainer.encoders import EncoderConfig, build_encoder, remove_classifier
from trainer.errors import ConfigError, NumericalError
from trainer.provenance import versions
from trainer.safetensors_file import parse_safetensors
from trainer.weights import (
    FILE_FORMAT,
    FILE_VERSION,
    Preprocessing,
    Which,
    description_path,
    fill,
    run_encoder_config,
    run_preprocessing,
)

log = logging.getLogger(__name__)

FORMATS = ("torchvision",)

_PROOF_IMAGES = 8
# Both models compute in float64 what training computed in float32 or less: any difference beyond
# the order of additions means that they are not the same function.
_TOLERANCE = 1e-9

_CIFAR_STEM = (
    "model.conv1 = torch.nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)",
    "model.maxpool = torch.nn.Identity()",
)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Proof:
    """Features of the run's encoder beside those of the foreign model that loaded the file."""

    images: int
    image_source: str
    largest_feature: float
    largest_difference: float
    relative_difference: float
    """``largest_difference / largest_feature``."""
    tolerance: float
    """Of the relative difference."""
    dtype: str = "float64"


@dataclass(frozen=True)
class Exported:
    """What was written."""

    weights: Path
    description: Path
    proof: Proof
    tensors: int
    num_bytes: int
    facts: dict[str, Any]
    """Content of the JSON."""


def export(
    run: Path,
    out: Path,
    file_format: str = "torchvision",
    which: Which = "last",
    force: bool = False,
) -> Exported:
    """Write a run's encoder and prove it; both files appear whole, or neither does.

    Args:
        run: the run's folder.
        out: ``NAME.safetensors``; the JSON is ``NAME.json``.
        file_format: one of ``FORMATS``.
        which: the newest whole checkpoint, or that of the best online kNN.
        force: replace existing files.

    Raises:
        ConfigError: ``out`` exists or has another suffix; the format cannot hold the encoder.
        CheckpointError: the run has no whole checkpoint, or no best one.
        NumericalError: the proof failed; nothing is written.
    """
    if file_format not in FORMATS:
        raise ConfigError(f"--format {file_format}: choose from {', '.join(FORMATS)}")
    _check_target(out, force)
    tensors, config = load_encoder_state(run, best=which == "best")
    where = str(run / "config.json")
    encoder_config = run_encoder_config(config, where)
    preprocessing = run_preprocessing(config, where)
    recipe = TorchvisionRecipe.of(encoder_config)
    encoder = build_encoder(encoder_config)
    fill(encoder, tensors, f"{run}: its checkpoint")
    images, image_source = _proof_images(config, preprocessing)

    out.parent.mkdir(parents=True, exist_ok=True)
    with AtomicFile(out) as weights, AtomicFile(description_path(out)) as description:
        written = _write(weights, safetensors.torch.save(_plain(tensors)))
        model = recipe.model(parse_safetensors(written, out))
        proof = prove(encoder, model, images, image_source)
        facts = {
            **_facts(config, encoder_config, preprocessing, which),
            "sha256": hashlib.sha256(written).hexdigest(),
            "feature_dim": int(encoder.feature_dim),
            "torchvision": dataclasses.asdict(recipe),
            "load": recipe.instructions(out.name),
            "proof": dataclasses.asdict(proof),
        }
        _write(description, (json.dumps(facts, indent=1) + "\n").encode())
        _check_target(out, force)
        _publish(weights, description, out)
    return Exported(out, description_path(out), proof, len(tensors), len(written), facts)


@dataclass(frozen=True)
class TorchvisionRecipe:
    """How to make the torchvision model that takes the weights."""

    architecture: str
    options: dict[str, Any]
    """Arguments of ``torchvision.models.ARCHITECTURE`` beside ``weights=None``."""
    adapt: list[str]
    """Lines of Python that change ``model`` before it takes the weights."""
    classifier: str
    """The layer whose weights the file leaves out; an identity in its place gives features."""

    @staticmethod
    def of(config: EncoderConfig) -> "TorchvisionRecipe":
        """The recipe for an encoder of ours.

        Raises:
            ConfigError: it is none of torchvision's.
        """
        if ":" in config.name:
            raise ConfigError(
                f"--format torchvision: {config.name} is no architecture of torchvision's; its "
                "weights are in the run's checkpoints (safetensors)"
            )
        options = _torchvision_options(config)
        with torch.device("meta"):
            model = torchvision.models.get_model(config.name, weights=None, **options)
        adapt = list(_CIFAR_STEM) if config.stem == "cifar" else []
        return TorchvisionRecipe(config.name, options, adapt, remove_classifier(model))

    def model(self, tensors: Tensors) -> nn.Module:
        """A fresh model of torchvision's with ``tensors`` in it, its classifier an identity.

        Raises:
            NumericalError: keys are missing or too many, or shapes differ.
        """
        model: nn.Module = torchvision.models.get_model(
            self.architecture, weights=None, **self.options
        )
        if self.adapt:
            model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
            model.maxpool = nn.Identity()
        try:
            missing, unexpected = model.load_state_dict(tensors, strict=False)
        except RuntimeError as error:
            raise NumericalError(f"export: {error}; nothing was written") from None
        left_out = {f"{self.classifier}.weight", f"{self.classifier}.bias"}
        if unexpected or set(missing) != left_out:
            raise NumericalError(
                f"export: torchvision's {self.architecture} misses "
                f"{sorted(set(missing) - left_out)} and does not know {sorted(unexpected)}; "
                "nothing was written"
            )
        parent, _, name = self.classifier.rpartition(".")
        model.get_submodule(parent).add_module(name, nn.Identity())
        return model

    def instructions(self, name: str) -> list[str]:
        """Lines of Python that load the file called ``name``."""
        options = "".join(f", {key}={value!r}" for key, value in self.options.items())
        return [
            "import torch",
            "import torchvision",
            "from safetensors.torch import load_file",
            "",
            f"model = torchvision.models.{self.architecture}(weights=None{options})",
            *self.adapt,
            f"missing, unexpected = model.load_state_dict(load_file({name!r}), strict=False)",
            f"# missing: {self.classifier}.weight and {self.classifier}.bias, your new classifier",
        ]


def _torchvision_options(config: EncoderConfig) -> dict[str, Any]:
    """What torchvision has to be told so that its model has the encoder's shape."""
    if config.name.startswith("vit_"):
        return {"image_size": config.image_size}
    if config.name.startswith("maxvit"):
        return {"input_size": (config.image_size, config.image_size)}
    if config.name in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    return {}


@torch.no_grad()
def prove(encoder: nn.Module, model: nn.Module, images: torch.Tensor, image_source: str) -> Proof:
    """Compare two encoders' features of ``images`` in float64.

    Raises:
        NumericalError: they differ by more than the tolerance, are not finite, or all zero.
    """
    ours_NF = encoder.double().eval()(images.double())
    theirs_NF = model.double().eval()(images.double())
    if ours_NF.shape != theirs_NF.shape:
        raise NumericalError(
            f"export: features have shape {tuple(theirs_NF.shape)} in the foreign model and "
            f"{tuple(ours_NF.shape)} in the run; nothing was written"
        )
    largest = ours_NF.abs().max().item()
    difference = (ours_NF - theirs_NF).abs().max().item()
    if not 0 < largest < float("inf"):
        raise NumericalError(
            f"export: the largest feature of {len(images)} images is {largest:g}, so equal "
            "features would prove nothing; export an earlier checkpoint; nothing was written"
        )
    proof = Proof(len(images), image_source, largest, difference, difference / largest, _TOLERANCE)
    if not proof.relative_difference <= _TOLERANCE:
        raise NumericalError(
            f"export: the foreign model's features differ by {proof.relative_difference:.1e} of "
            f"the largest feature, more than {_TOLERANCE:.0e}; nothing was written"
        )
    return proof


def _check_target(out: Path, force: bool) -> None:
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out}: name the output NAME.safetensors (its JSON will be NAME.json)")
    for path in (out, description_path(out)):
        if path.is_dir():
            raise ConfigError(f"{path}: is a folder; choose another name")
        if path.exists() and not force:
            raise ConfigError(f"{path}: exists; choose another name, or --force to replace it")


def _plain(tensors: Tensors) -> Tensors:
    """Contiguous in the default layout, each with its own memory."""
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }


def _write(atomic: AtomicFile, data: bytes) -> bytes:
    """Write ``data``, and return what the file then holds."""
    atomic.file.write(data)
    atomic.file.flush()
    atomic.file.seek(0)
    return atomic.file.read()


def _publish(weights: AtomicFile, description: AtomicFile, out: Path) -> None:
    """Name both. Weights never stand beside the JSON of others: an old one goes first."""
    weights.stage()
    description.stage()
    description_path(out).unlink(missing_ok=True)
    weights.publish()
    description.publish()


def _proof_images(
    config: Mapping[str, Any], preprocessing: Preprocessing
) -> tuple[torch.Tensor, str]:
    """Images as the encoder sees them: the run's own where its data is still there, else noise."""
    plain = Augment(
        AugmentConfig(
            normalize=preprocessing.normalize, mean=preprocessing.mean, std=preprocessing.std
        ),
        seed=0,
    ).plain
    path = Path(str((config.get("data") or {}).get("train")))
    try:
        if path.is_file():
            return plain(_first_crops(path, preprocessing)), str(path)
        log.warning("%s is not there: the proof uses random images", path)
    except DataError as error:
        log.warning("%s; the proof uses random images", error)
    side = preprocessing.size
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(
        0, 256, (_PROOF_IMAGES, 1, side, side, 3), dtype=torch.uint8, generator=generator
    )
    return plain(noise), "random"


def _first_crops(path: Path, preprocessing: Preprocessing) -> torch.Tensor:
    # The torchvision backend: FFCV would compile for seconds to read eight images.
    loader = eval_loader(
        path,
        preprocessing.size,
        preprocessing.resize,
        LoaderConfig(backend="torchvision", workers=1),
        batch_size=_PROOF_IMAGES,
        rank=0,
        world_size=1,
    )
    try:
        return next(iter(loader)).crops_BVHWC
    finally:
        loader.close()


def _facts(
    config: Mapping[str, Any],
    encoder_config: EncoderConfig,
    preprocessing: Preprocessing,
    which: Which,
) -> dict[str, Any]:
    saved, run_facts = config["checkpoint"], config.get("run") or {}
    return {
        "format": FILE_FORMAT,
        "version": FILE_VERSION,
        "architecture": encoder_config.name,
        "encoder": dataclasses.asdict(encoder_config),
        "preprocessing": {
            **dataclasses.asdict(preprocessing),
            "interpolation": "bilinear, antialiased",
            "input": "RGB in [0, 1], (N, 3, size, size): shorter side to `resize`, centre crop, "
            "then (x - mean) / std if `normalize`",
        },
        "recipe": config.get("recipe"),
        "seed": config.get("seed"),
        "batch": config.get("batch"),
        "which": which,
        **{name: saved.get(name) for name in ("step", "epoch", "data_fingerprint")},
        "class_names": run_facts.get("class_names"),
        "trained_by": {"commit": run_facts.get("commit"), "torch": run_facts.get("torch")},
        "exported_by": versions(),
    }

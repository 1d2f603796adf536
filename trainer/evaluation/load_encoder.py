"""Encoders to evaluate or export, from wherever they come: :func:`load_encoder`.

A source is a text that names one of

* ``RUN``: a run's folder; the newest checkpoint, or the one with the best online kNN;
* ``FILE.safetensors``: what ``widebatch export`` wrote, with its JSON beside it;
* ``average:RUN``: the moving average of that encoder, which BYOL, DINO and MoCo keep;
* ``untrained:RUN`` or ``untrained:FILE.safetensors``: that encoder before its first step;
* ``pixels:SIZE``: no encoder, the image itself at SIZE x SIZE, as a baseline.

Nothing here unpickles. A file from elsewhere is read by the safetensors library, its checksum
compared with its JSON's, and its JSON may name torchvision's architectures only: naming other code
is left to runs, whose folder is the user's own.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from common.errors import CheckpointError, ConfigError, DataError
from common.files.safetensors_file import parse_safetensors
from common.files.strict_json import read_json_file
from data_pipeline.augment import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig
from data_pipeline.crops import CropConfig
from trainer.config import from_json
from trainer.features.extraction import default_resize
from trainer.features.layer import LayerFeatures
from trainer.features.online_knn import OnlineKnnConfig
from trainer.models.encoders import EncoderConfig, build_encoder, is_resnet, see_colours
from trainer.models.timm_encoder import is_timms
from trainer.state.checkpoint import load_encoder_state
from trainer.state.run_data import read_settings, section

Which = Literal["last", "best"]

FILE_FORMAT = "widebatch-encoder"
FILE_VERSION = 1
_MAX_IMAGE_SIZE = 4096
_AVERAGE, _UNTRAINED, _PIXELS = "average:", "untrained:", "pixels:"


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How an image becomes an encoder's input at evaluation."""

    size: int
    """Side of the square centre crop, pixels."""
    resize: int
    """The image's shorter side before the crop, pixels."""
    normalize: bool = True
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Of red, green, blue scaled to [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD

    def augment(self) -> AugmentConfig:
        """This normalisation."""
        return AugmentConfig(normalize=self.normalize, mean=self.mean, std=self.std)

    def resized(self, size: int | None, resize: int | None) -> "Preprocessing":
        """The same with another crop; without ``resize`` the default one of the new size."""
        if size is None and resize is None:
            return self
        side = size or self.size
        shorter = resize or (default_resize(side) if size else self.resize)
        if not 0 < side <= shorter:
            raise ConfigError(
                f"a crop of {side} pixels from an image whose shorter side is {shorter}: "
                "--resize must be at least --size, and both above 0"
            )
        return dataclasses.replace(self, size=side, resize=shorter)


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder ready to be evaluated, and where it comes from."""

    encoder: nn.Module
    """(B, 3, H, W) -> (B, F), float32 on the CPU, in evaluation mode."""
    preprocessing: Preprocessing
    description: dict[str, Any]
    """JSON values: source, kind, architecture, feature_dim, weights_file, sha256, step, epoch..."""
    config: EncoderConfig | None = None
    """Of the architecture; None: raw pixels."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """All that the run's ``config.json``, or the JSON of an exported file, says."""


def load_encoder(source: str, which: Which = "last") -> LoadedEncoder:
    """Load the encoder that ``source`` names (see the module's docstring).

    Raises:
        ConfigError: ``source`` names nothing that is there, or its settings are unusable.
        CheckpointError: a run's checkpoints are missing or damaged.
        DataError: an exported file or its JSON is missing, damaged, or of another kind.
    """
    kind, path = _named(source)
    if kind == _PIXELS:
        return _pixels(source)
    if kind == _UNTRAINED:
        return _untrained(path)
    if kind == _AVERAGE or path.is_dir():
        return load_run(path, which, average=kind == _AVERAGE)
    return _from_file(path)


def at_layer(loaded: LoadedEncoder, layer: str) -> LoadedEncoder:
    """The same with the features of a layer in its middle.

    Raises:
        ConfigError: as :class:`trainer.features.layer.LayerFeatures`.
    """
    encoder = LayerFeatures(loaded.encoder, layer).eval()
    side = loaded.preprocessing.size
    with torch.no_grad():
        width = encoder(torch.zeros(1, 3, side, side)).shape[1]
    described = {**loaded.description, "layer": layer, "feature_dim": width}
    return dataclasses.replace(loaded, encoder=encoder, description=described)


def run_of(source: str) -> Path | None:
    """The folder of the run that ``source`` names, trained or untrained; None: it names none.

    Raises:
        ConfigError, DataError: as :func:`load_encoder`, before anything is read.
    """
    kind, path = _named(source)
    return path if kind != _PIXELS and (path / "config.json").is_file() else None


def _named(source: str) -> tuple[str, Path]:
    """The prefix of a source, empty where there is none, and the path behind it."""
    prefixes = () if Path(source).exists() else (_AVERAGE, _UNTRAINED, _PIXELS)
    kind = next(filter(source.startswith, prefixes), "")
    path = Path(source.removeprefix(kind))
    if kind != _PIXELS and not path.is_dir() and not path.is_file():
        raise ConfigError(
            f"{source}: no such run folder or weights file; give RUN, FILE.safetensors, "
            f"{_AVERAGE}RUN, {_UNTRAINED}RUN or {_PIXELS}SIZE"
        )
    if kind == _AVERAGE and not path.is_dir():
        raise ConfigError(f"{source}: a file has one encoder; name the run's folder")
    if path.is_file() and path.suffix != ".safetensors":
        raise DataError(
            f"{path}: not a .safetensors file, which evaluate takes beside a run's folder; the"
            " formats torch-export and onnx cannot be evaluated: name the run"
        )
    return kind, path


def description_path(weights: Path) -> Path:
    """Where the JSON of an exported weights file lies."""
    return weights.with_suffix(".json")


def run_preprocessing(config: Mapping[str, Any], where: str) -> Preprocessing:
    """Evaluation preprocessing of a run, from its ``config.json``."""
    augment = from_json(AugmentConfig, _section(config, "augment", where), f"{where}: augment")
    crop = from_json(CropConfig, _section(config, "crop", where), f"{where}: crop")
    knn = from_json(OnlineKnnConfig, section(config, "knn"), f"{where}: knn")
    size = knn.size or crop.size
    resize = knn.resize or default_resize(size)
    return Preprocessing(
        size=size,
        resize=resize,
        normalize=augment.normalize,
        mean=augment.mean,
        std=augment.std,
    )


def run_encoder_config(config: Mapping[str, Any], where: str) -> EncoderConfig:
    """Encoder settings of a run, from its ``config.json``."""
    return from_json(EncoderConfig, _section(config, "encoder", where), f"{where}: encoder")


def load_run(run: Path, which: Which = "last", average: bool = False) -> LoadedEncoder:
    """The encoder of a run's folder, or its moving average; ``settings`` are what
    ``load_encoder_state`` gives.

    Raises:
        CheckpointError, ConfigError: as :func:`load_encoder`.
    """
    tensors, settings = load_encoder_state(run, which == "best", average)
    where, saved = str(run / "config.json"), settings["checkpoint"]
    weights = run / "checkpoints" / f"step-{saved['step']:08d}" / "model.safetensors"
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    config = run_encoder_config(settings, where)
    known = settings, config, run_preprocessing(settings, where)
    source = str(run.absolute())
    named = (f"{_AVERAGE}{source}", "average") if average else (source, "run")
    loaded = _built(named[0], named[1], *known)
    fill(loaded.encoder, tensors, f"{run}: its checkpoint")
    loaded.description.update(_origin(weights, digest, {**saved, **settings, "which": which}))
    if config.sees == "grey" and ":" not in config.name:
        see_colours(loaded.encoder)
        return dataclasses.replace(loaded, config=dataclasses.replace(config, sees="colours"))
    return loaded


def _from_file(path: Path) -> LoadedEncoder:
    known = _read_settings(path)
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != known[0].get("sha256"):
        raise DataError(
            f"{path}: its content does not match the checksum in {description_path(path).name}; "
            "copy both files again, or export again"
        )
    kind = "average" if known[0].get("average") is True else "exported"
    loaded = _built(str(path.absolute()), kind, *known)
    fill(loaded.encoder, parse_safetensors(data, path), str(path))
    loaded.description.update(_origin(path, digest, known[0]))
    return loaded


def _untrained(path: Path) -> LoadedEncoder:
    """The architecture with the random weights that the run's seed decides.

    Training started from them, unless its ``init_from`` names a file.
    """
    known = _read_settings(path)
    seed = known[0].get("seed")
    seed = seed if isinstance(seed, int) else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # as the run does before it builds its encoder
        loaded = _built(f"{_UNTRAINED}{path.absolute()}", "untrained", *known)
    loaded.description["seed"] = seed
    return loaded


def _pixels(source: str) -> LoadedEncoder:
    text = source.removeprefix(_PIXELS)
    if not text.isdecimal() or not 0 < int(text) <= 512:
        raise ConfigError(f"{source}: give the side in pixels, 1 to 512, such as {_PIXELS}32")
    size = int(text)
    described = {
        "source": source,
        "kind": "pixels",
        "architecture": "raw pixels",
        "feature_dim": 3 * size * size,
    }
    preprocessing = Preprocessing(size=size, resize=size)
    return LoadedEncoder(nn.Flatten().eval(), preprocessing, described)


def _built(
    source: str,
    kind: str,
    settings: Mapping[str, Any],
    config: EncoderConfig,
    preprocessing: Preprocessing,
) -> LoadedEncoder:
    """With random weights."""
    encoder = build_encoder(config)
    described = {
        "source": source,
        "kind": kind,
        "architecture": config.name,
        **({"stem": config.stem} if is_resnet(config.name) else {}),
        "feature_dim": encoder.feature_dim,
    }
    return LoadedEncoder(encoder.eval(), preprocessing, described, config, settings)


def _origin(weights: Path, digest: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    names = ("which", "step", "epoch", "data_fingerprint", "recipe", "seed", "batch")
    return {
        "weights_file": str(weights.absolute()),
        "sha256": digest,
        **{name: facts.get(name) for name in names},
    }


def _read_settings(path: Path) -> tuple[dict[str, Any], EncoderConfig, Preprocessing]:
    """What ``config.json`` of a run, or the JSON beside exported weights, says of the encoder."""
    if path.is_dir():
        where = path / "config.json"
        settings = read_settings(path)
        config = run_encoder_config(settings, str(where))
        return settings, config, run_preprocessing(settings, str(where))
    where = description_path(path)
    if not where.is_file():
        raise DataError(
            f"{where}: missing; 'widebatch export' writes it beside the weights: copy it too, or "
            "export again"
        )
    facts = read_json_file(where)
    if facts.get("format") != FILE_FORMAT or facts.get("version") != FILE_VERSION:
        raise DataError(
            f"{where}: says format {facts.get('format')!r} version {facts.get('version')!r}, this "
            f"program reads {FILE_FORMAT!r} version {FILE_VERSION}"
        )
    config = run_encoder_config(facts, str(where))
    if is_timms(config.name) or ":" in config.name:
        raise DataError(
            f"{where}: names the code {config.name!r}; exported files may name torchvision's "
            "architectures only"
        )
    if not 0 < config.image_size <= _MAX_IMAGE_SIZE:  # a transformer's weights grow with it
        raise DataError(f"{where}: image_size {config.image_size} is not in 1 to {_MAX_IMAGE_SIZE}")
    values = _section(facts, "preprocessing", str(where))
    names = {field.name for field in dataclasses.fields(Preprocessing)}
    known = {name: value for name, value in values.items() if name in names}
    return facts, config, from_json(Preprocessing, known, f"{where}: preprocessing")


def fill(encoder: nn.Module, tensors: dict[str, torch.Tensor], where: str) -> None:
    """Load all tensors, exactly: no key more or less, no other shape. Of an objective too."""
    try:
        encoder.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise CheckpointError(
            f"{where} does not hold the encoder that its settings describe: {first}"
        ) from None


def _section(config: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    section = config.get(name)
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where}: has no section {name!r}")
    return section

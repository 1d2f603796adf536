"""What all evaluations share: which encoder, on which images, how; and what a report says of it."""

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_pipeline.beton import BetonInfo
from data_pipeline.counter_rng import SEEDS
from data_pipeline.loader import LoaderConfig
from trainer.errors import ConfigError
from trainer.evaluation.session import Session
from trainer.provenance import versions
from trainer.rendezvous import JOIN_TIMEOUT
from trainer.weights import LoadedEncoder, Which, load_encoder

Precision = Literal["fp32", "bf16", "fp64"]


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """An encoder and how it looks at images."""

    source: str
    """What :func:`trainer.weights.load_encoder` takes."""
    which: Which = "last"
    size: int | None = None
    """Side of the centre crop, pixels; None: the encoder's."""
    resize: int | None = None
    """Shorter side before the crop, pixels; None: the encoder's."""
    batch: int = 256
    """Images per process and forward pass."""
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    device: str = "auto"
    precision: Precision = "fp32"
    """Arithmetic of the encoder; features are compared and probed in float32 or better."""
    seed: int = 0
    """Of everything that is chosen or drawn."""
    join_timeout: float = JOIN_TIMEOUT
    """Seconds to wait for the other processes; 0: for ever."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.batch < 1:
            raise ConfigError(f"--batch {self.batch}: take at least 1 image")
        if self.seed not in SEEDS:
            raise ConfigError(f"--seed {self.seed}: choose {SEEDS[0]} to {SEEDS[-1]} (64 bits)")


class Job:
    """A loaded encoder in its :class:`Session`, and the clock.

    Raises:
        ConfigError, CheckpointError, DataError: as :func:`trainer.weights.load_encoder`; the device
            or the crop is impossible.
    """

    def __init__(self, config: JobConfig) -> None:
        self.config, self._started = config, time.monotonic()
        self.loaded: LoadedEncoder = load_encoder(config.source, config.which)
        self.preprocessing = self.loaded.preprocessing.resized(config.size, config.resize)
        self.session = Session(
            self.loaded,
            self.preprocessing,
            config.loader,
            batch=config.batch,
            device=config.device,
            precision=config.precision,
            seed=config.seed,
            join_timeout=config.join_timeout,
        )

    def measured(self, views: str | None = None, **facts: Any) -> dict[str, Any]:
        """The protocol in words and numbers: JSON values.

        Args:
            views: what of an image the encoder sees; None: its centre crop.
            facts: what else decides the result.
        """
        size, resize = self.preprocessing.size, self.preprocessing.resize
        centre = f"one centre crop of {size} pixels, shorter side {resize}"
        known = self.loaded.description
        return {
            "checkpoint": known.get("which") or known["kind"],
            "online": False,
            "views": views or centre,
            **facts,
        }

    def facts(self, **files: BetonInfo) -> dict[str, Any]:
        """What every report ends with: encoder, preprocessing, data, machine, time, versions.

        Args:
            files: that were looked at, by their names in ``data``.
        """
        return {
            "encoder": self.loaded.description,
            "preprocessing": dataclasses.asdict(self.preprocessing),
            "data": {name: data_facts(info) for name, info in files.items()},
            "precision": self.config.precision,
            "device": str(self.session.device),
            "processes": self.session.world_size,
            "seconds": round(time.monotonic() - self._started, 2),
            "versions": versions(),
        }


def data_facts(info: BetonInfo) -> dict[str, Any]:
    """What identifies a file."""
    return {
        "path": str(info.path.absolute()),
        "fingerprint": info.fingerprint or None,
        "identity": info.identity,
        "num_samples": info.num_samples,
        "class_names": list(info.class_names),
    }


def check_picture(path: Path | None) -> None:
    """Refuse a picture's path that cannot be written, before anything slow happens.

    Raises:
        ConfigError: it is a folder or does not end in .png.
    """
    if path is not None and (path.is_dir() or path.suffix.lower() != ".png"):
        raise ConfigError(f"--picture {path}: name a file that ends in .png")

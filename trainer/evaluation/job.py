"""What all evaluations share: which encoder, on which images, how; and what a report says of it."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import tyro
from torch import nn

from common.bounds import check_bounds
from common.errors import ConfigError
from common.files.atomic_file import check_replaceable
from common.randomness import SEEDS
from common.rendezvous import JOIN_TIMEOUT, join, shutdown
from data_pipeline.augment import FLIPS, Augment, ViewConfig
from data_pipeline.crops import CropConfig
from data_pipeline.reading.beton import DataInfo, name_of
from data_pipeline.reading.loader import EvalLoader, TrainLoader
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import EpochOrder, Position
from data_pipeline.reading.pool import LoaderConfig
from data_pipeline.views import views_of_one_size
from trainer.evaluation.load_encoder import LoadedEncoder, Which, load_encoder
from trainer.evaluation.supervised import Batches
from trainer.features.extraction import Features, extract_features, reduced_precision
from trainer.models.encoders import takes_size
from trainer.parallel.machine import settle_threads
from trainer.state.provenance import versions

Precision = Literal["fp32", "bf16", "fp64"]
TrainFiles = Annotated[tuple[Path, ...], tyro.conf.arg(name="data.train")]
TestFiles = Annotated[tuple[Path, ...], tyro.conf.arg(name="data.test")]


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """An encoder and how it looks at images."""

    source: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN_OR_WEIGHTS")]]
    """What to evaluate: see above."""
    json: Path | None = None
    """Where the result goes, with its protocol. None: a file in RUN/evaluation."""
    which: Which = "last"
    """Checkpoint of a run: the newest, or the one with the best online kNN."""
    size: int | None = None
    """Side of the centre crop, pixels. None: the encoder's."""
    resize: int | None = None
    """Shorter side before the crop, pixels. None: the encoder's; 8/7 of a new --size above 64."""
    batch: int = 256
    """Images per process and forward pass."""
    loader: Annotated[LoaderConfig, tyro.conf.arg(name="")] = field(default_factory=LoaderConfig)
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "fp32"
    """Arithmetic of the encoder; features are compared and probed in float32 or better."""
    seed: int = 0
    """Of everything that is chosen or drawn."""
    join_timeout: float = JOIN_TIMEOUT
    """Seconds to wait for the other processes; 0: for ever."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself."""
        if self.json is not None:
            check_replaceable(self.json, ".json")
        check_bounds(self, "--", batch="[1, inf)")
        if self.seed not in SEEDS:
            raise ConfigError(f"--seed {self.seed}: choose {SEEDS[0]} to {SEEDS[-1]} (64 bits)")


class Job:
    """An encoder on its device, and the clock; a context in which all processes work together.

    Without ``loaded`` the encoder is the one that ``config`` names.

    Raises:
        ConfigError, CheckpointError, DataError: as
            :func:`trainer.evaluation.load_encoder.load_encoder`; the device or the crop is
            impossible.
    """

    def __init__(self, config: JobConfig, loaded: LoadedEncoder | None = None) -> None:
        self.config, self._started = config, time.monotonic()
        self.loaded = load_encoder(config.source, config.which) if loaded is None else loaded
        self.preprocessing = self.loaded.preprocessing.resized(config.size, config.resize)
        of, side = self.loaded.config, self.preprocessing.size
        if of is not None and not takes_size(of, side):
            raise ConfigError(
                f"{of.name} takes no images of {side} pixels; --size {of.image_size}: it was built"
                " for those"
            )
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.device, self.loader, self._joined = choose_device(config.device), config.loader, False
        self.autocast = torch.bfloat16 if config.precision == "bf16" else None
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self.encoder: nn.Module = self.loaded.encoder.to(self.device, self.dtype).to(
            memory_format=torch.channels_last
        )

    def __enter__(self) -> "Job":
        if self.world_size > 1 and not dist.is_initialized():
            on_gpu = self.device.type == "cuda"
            join(
                "nccl" if on_gpu else "gloo",
                self.config.join_timeout,
                self.device if on_gpu else None,
            )
            self._joined = True
        self.loader = settle_threads(self.loader, self.device)
        return self

    def __exit__(self, *exception: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Leave the process group, all ranks together; what follows is each rank's own."""
        if self._joined:
            self._joined = False
            shutdown()

    def features(self, data: OpenData, model: nn.Module | None = None) -> Features:
        """Features of the centre crops of all samples of a set, on every rank. A collective.

        ``model``, on the job's device, may stand in the encoder's place.
        """
        chosen = self.preprocessing
        loader = EvalLoader(
            data,
            chosen.size,
            chosen.resize,
            self.loader,
            batch_size=self.config.batch,
            rank=self.rank,
            world_size=self.world_size,
        )
        with contextlib.closing(loader):
            return extract_features(
                self.encoder if model is None else model,
                loader,
                Augment(chosen.augment(), self.config.seed, self.dtype),
                self.device,
                self.autocast,
                progress=f"features of {data.info.paths[0].name}" if self.rank == 0 else None,
            )

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, F) of images, float32, in evaluation mode."""
        with reduced_precision(self.device, self.autocast):
            features: torch.Tensor = self.encoder(images)
        return features.float()

    @contextlib.contextmanager
    def augmented(
        self,
        data: OpenData,
        crop: CropConfig,
        batch_size: int,
        views: tuple[ViewConfig, ...] = (FLIPS,),
        *,
        alone: bool = False,
        order: EpochOrder | None = None,
        answers: torch.Tensor | None = None,
    ) -> Iterator[tuple[int, Batches]]:
        """Steps of an epoch, and endless batches: this rank's share of augmented random crops.

        Images are (V * B, 3, H, W) on the device, view after view; labels (B,), or answers.

        Args:
            data: the set.
            crop: of each view.
            batch_size: samples of the global batch.
            views: one or two; flips alone by default.
            alone: give this process the whole batch.
            order: which samples to read; None: all.
            answers: of each sample of the set, in the place of labels.

        Raises:
            ConfigError: the batch does not divide by the processes.
        """
        rank, world_size = (0, 1) if alone else (self.rank, self.world_size)
        if batch_size % world_size:
            raise ConfigError(
                f"a batch of {batch_size} does not divide by {world_size} processes; "
                f"take {batch_size - batch_size % world_size}"
            )
        loader = TrainLoader(
            data,
            views_of_one_size(crop, len(views)),
            self.loader,
            seed=self.config.seed,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            order=order,
        )
        how = self.preprocessing.augment()
        augment = Augment(how, self.config.seed, self.dtype, looks=[views])

        def batches() -> Batches:
            for batch in loader.starting_at(Position(0, 0)):
                crops = batch.crops_BVHWC.to(self.device, non_blocking=True)
                images = augment(crops, batch.ids_B, batch.position.epoch)
                of_them = batch.labels_B if answers is None else answers[batch.ids_B]
                yield images, of_them.to(self.device)

        with contextlib.closing(loader):
            yield loader.steps_per_epoch, batches()

    def measured(self, views: str | None = None, **facts: Any) -> dict[str, Any]:
        """The protocol in words and numbers: the views (None: a centre crop), and other facts."""
        size, resize = self.preprocessing.size, self.preprocessing.resize
        centre = f"one centre crop of {size} pixels, shorter side {resize}"
        known = self.loaded.description
        return {
            "checkpoint": known.get("which") or known["kind"],
            "online": False,
            "views": views or centre,
            **facts,
        }

    def facts(self, **sets: DataInfo) -> dict[str, Any]:
        """What every report ends with: encoder, preprocessing, data, machine, time, versions."""
        return {
            "encoder": self.loaded.description,
            "preprocessing": dataclasses.asdict(self.preprocessing),
            "data": {
                name: {
                    "path": name_of([path.absolute() for path in info.paths]),
                    "paths": [str(path.absolute()) for path in info.paths],
                    "fingerprint": info.fingerprint or None,
                    "identity": info.identity,
                    "num_samples": info.num_samples,
                    "class_names": list(info.class_names),
                }
                for name, info in sets.items()
            },
            "precision": self.config.precision,
            "device": str(self.device),
            "processes": self.world_size,
            "seconds": round(time.monotonic() - self._started, 2),
            "versions": versions(),
        }


def choose_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``; with several processes a node, one GPU each.

    Raises:
        ConfigError: there is no such device.
    """
    gpus = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()):
        raise ConfigError(f"--device {name}: choose auto, cpu, cuda or cuda:N")
    index = int(number or os.environ.get("LOCAL_RANK", "0"))
    if index >= gpus:
        raise ConfigError(f"--device {name}: this machine shows {gpus} GPUs; choose cpu or auto")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device

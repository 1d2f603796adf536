"""An encoder on its device, among the ranks: what evaluation runs on."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from data_pipeline.augment import Augment, AugmentConfig, ViewConfig
from data_pipeline.loader import LoaderConfig, eval_loader, train_loader
from data_pipeline.order import Position
from data_pipeline.views import CropConfig
from trainer.cores import settle_threads
from trainer.distributed import shutdown
from trainer.errors import ConfigError
from trainer.evaluation.features import Features, extract_features, reduced_precision
from trainer.evaluation.supervised import Batches
from trainer.rendezvous import JOIN_TIMEOUT, join
from trainer.weights import LoadedEncoder, Preprocessing

# Random crops and flips, nothing else: what a linear classifier is trained with.
FLIP = ViewConfig(jitter=0.0, grayscale=0.0, blur=0.0)
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp64": None}


class Session:
    """A context in which all ranks extract features together.

    Args:
        loaded: the encoder.
        preprocessing: of its images, in place of the encoder's own.
        loader: how files are read.
        batch: images per process and forward pass.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        precision: ``fp32``, ``bf16`` (autocast) or ``fp64``.
        seed: of random crops and flips.
        join_timeout: seconds to wait for the other ranks; 0: for ever.
    """

    def __init__(
        self,
        loaded: LoadedEncoder,
        preprocessing: Preprocessing,
        loader: LoaderConfig,
        *,
        batch: int = 256,
        device: str = "auto",
        precision: str = "fp32",
        seed: int = 0,
        join_timeout: float = JOIN_TIMEOUT,
    ) -> None:
        self.preprocessing, self.loader, self.batch, self.seed = preprocessing, loader, batch, seed
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = choose_device(device)
        self.autocast = _AUTOCAST[precision]
        self.dtype = torch.float64 if precision == "fp64" else torch.float32
        self.encoder: nn.Module = loaded.encoder.to(self.device, self.dtype).to(
            memory_format=torch.channels_last
        )
        self._joined, self._join_timeout = False, join_timeout

    def __enter__(self) -> "Session":
        if self.world_size > 1 and not dist.is_initialized():
            on_gpu = self.device.type == "cuda"
            join("nccl" if on_gpu else "gloo", self._join_timeout, self.device if on_gpu else None)
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

    def features(self, path: Path, model: nn.Module | None = None) -> Features:
        """Features of the centre crops of all samples of a file, on every rank. A collective.

        Args:
            path: the file.
            model: on the session's device, in the encoder's place.
        """
        chosen = self.preprocessing
        loader = eval_loader(
            path,
            chosen.size,
            chosen.resize,
            self.loader,
            batch_size=self.batch,
            rank=self.rank,
            world_size=self.world_size,
        )
        with contextlib.closing(loader):
            return extract_features(
                self.encoder if model is None else model,
                loader,
                self._augment(),
                self.device,
                self.autocast,
                progress=f"features of {path.name}" if self.rank == 0 else None,
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
        path: Path,
        crop: CropConfig,
        batch_size: int,
        views: tuple[ViewConfig, ...] = (FLIP,),
        *,
        alone: bool = False,
        only: npt.NDArray[np.int64] | None = None,
    ) -> Iterator[tuple[int, Batches]]:
        """Steps of an epoch, and endless batches: this rank's share of augmented random crops.

        Images are (V * B, 3, H, W) on the device, view after view; labels (B,).

        Args:
            path: the file.
            crop: of each view.
            batch_size: samples of the global batch.
            views: how each of one or two views is augmented; flips alone by default.
            alone: give this process the whole batch.
            only: samples to read; None: all.

        Raises:
            ConfigError: the batch does not divide by the processes.
        """
        rank, world_size = (0, 1) if alone else (self.rank, self.world_size)
        if batch_size % world_size:
            raise ConfigError(
                f"a batch of {batch_size} does not divide by {world_size} processes; "
                f"take {batch_size - batch_size % world_size}"
            )
        loader = train_loader(
            path,
            crop,
            self.loader,
            views=len(views),
            seed=self.seed,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            only=only,
        )
        augment = self._augment(view1=views[0], view2=views[-1])

        def batches() -> Batches:
            for batch in loader.starting_at(Position(0, 0)):
                crops = batch.crops_BVHWC.to(self.device, non_blocking=True)
                images = augment(crops, batch.ids_B, batch.position.epoch)
                yield images, batch.labels_B.to(self.device)

        with contextlib.closing(loader):
            yield loader.steps_per_epoch, batches()

    def _augment(self, **views: ViewConfig) -> Augment:
        chosen = self.preprocessing
        normalized = {"normalize": chosen.normalize, "mean": chosen.mean, "std": chosen.std}
        return Augment(AugmentConfig(**normalized, **views), self.seed, self.dtype)  # type: ignore[arg-type]


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

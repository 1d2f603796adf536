"""An encoder with a classifier on top, trained as a whole.

SimCLR's fine-tuning (Chen et al. 2020, arXiv 2002.05709, appendix B.5): SGD with Nesterov momentum
0.9, learning rate 0.05 x batch / 256 without warm-up, cosine to 0 per step, no weight decay, random
crops and flips alone. SimCLR v2 (arXiv 2006.10029) keeps the first layers of the projection head.

BatchNorm takes its statistics over the global batch and gradients are means over it, so the result
is the same on any number of processes, up to rounding.

Shape suffixes: B batch of this process, C classes.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data_pipeline.batch import Batch
from data_pipeline.strict_json import read_json_file
from trainer.checkpoint import CheckpointStore
from trainer.config import from_json
from trainer.distributed import release
from trainer.encoders import seed_stochastic_layers
from trainer.errors import ConfigError
from trainer.evaluation.features import reduced_precision
from trainer.heads import HeadConfig, ProjectionHead, build_head
from trainer.schedule import half_cosine
from trainer.sync_batch_norm import convert_sync_batch_norm
from trainer.weights import LoadedEncoder, fill

_HEAD = "head."


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """SimCLR's fine-tuning."""

    base_lr: float = 0.05  # per 256 samples of the batch
    batch_size: int = 1024  # over all processes; all labelled samples where there are fewer
    epochs: int | None = None  # None: 30, or 60 below 5 % of the labels, as SimCLR has it
    momentum: float = 0.9  # Nesterov's
    weight_decay: float = 0.0
    seed: int = 0  # of the order of samples, crops and flips

    def __post_init__(self) -> None:
        """Refuse what cannot train."""
        for name in ("base_lr", "batch_size", "epochs"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"fine-tuning: {name}={value} must be above 0")
        if not self.weight_decay >= 0:
            raise ConfigError(f"fine-tuning: weight_decay={self.weight_decay} must be 0 or more")

    def peak_lr(self, batch_size: int) -> float:
        """Learning rate of the first step with ``batch_size`` samples in a step."""
        return self.base_lr * batch_size / 256


def load_head(loaded: LoadedEncoder) -> ProjectionHead:
    """The projection head of a run, of the very checkpoint that its encoder was loaded from.

    Raises:
        ConfigError: the encoder is not of a run's folder: exports have no head.
        CheckpointError: the checkpoint does not hold the head that the run's settings describe.
    """
    known = loaded.description
    if known["kind"] != "run":
        raise ConfigError(
            f"--head-layers: {known['source']} has no projection head; give the run's folder"
        )
    run = Path(known["source"])
    settings = read_json_file(run / "config.json").get("head", {})
    head = build_head(
        from_json(HeadConfig, settings, f"{run / 'config.json'}: head"), known["feature_dim"]
    )
    tensors = CheckpointStore(run / "checkpoints").read(known["step"]).tensors("model")
    own = {k.removeprefix(_HEAD): v for k, v in tensors.items() if k.startswith(_HEAD)}
    fill(head, own, f"{run}: the head in its checkpoint")
    return head


def build_classifier(
    encoder: nn.Module, width: int, num_classes: int, head: ProjectionHead | None, depth: int
) -> nn.Sequential:
    """Encoder, ``depth`` layers of the head, and a linear layer of zeros, in the encoder's dtype.

    Args:
        encoder: ``(B, 3, H, W) -> (B, width)``; trained in place.
        width: features of the encoder.
        num_classes: C.
        head: needed where ``depth`` is above 0.
        depth: layers of the head to keep, each with its norm and ReLU.

    Raises:
        ConfigError: the head has not so many layers below its last one.
    """
    parts = [encoder]
    if depth:
        layers = [] if head is None else list(head.layers)
        if not 0 < depth < len(layers):
            raise ConfigError(
                f"--head-layers {depth}: the run's head has {len(layers)} layers, and the last is "
                f"never kept; choose 0 to {max(0, len(layers) - 1)}"
            )
        parts += layers[:depth]
        width = layers[depth].linear.in_features  # type: ignore[union-attr,assignment]
    linear = nn.Linear(width, num_classes)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    of_encoder = next(encoder.parameters(), torch.empty(0))
    return nn.Sequential(*parts, linear).to(of_encoder.device, of_encoder.dtype)


def tune(
    model: nn.Module,
    batches: Iterable[Batch],
    augment: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
    steps_per_epoch: int,
    batch_size: int,
    epochs: int,
    config: TuningConfig,
    *,
    device: torch.device,
    autocast_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> float:
    """Train ``model`` in place; it is left in evaluation mode. A collective above one process.

    Args:
        model: images to logits, on ``device``, equal on all ranks.
        batches: endless; this rank's equal share of each global batch.
        augment: (crops, ids, epoch) -> images.
        steps_per_epoch: global batches in an epoch.
        batch_size: the global batch.
        epochs: passes.
        config: its ``batch_size`` and ``epochs`` are not looked at.
        device: of the model.
        autocast_dtype: compute dtype; ``None``: the model's own.
        progress: show a bar on a terminal.

    Returns:
        Mean cross-entropy of the last epoch, nats.

    Raises:
        ConfigError: training diverged.
    """
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=config.peak_lr(batch_size),
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
    )
    total, step = epochs * steps_per_epoch, 0
    rank = dist.get_rank() if dist.is_initialized() else 0
    endless, loss_mean = iter(batches), math.nan
    bar = tqdm(total=total, desc="fine-tuning", leave=False, disable=None if progress else True)
    with _training(model) as wrapped, bar:
        for _ in range(epochs):
            loss_sum = torch.zeros((), device=device)
            for _ in range(steps_per_epoch):
                cosine = half_cosine(step / total)
                optimizer.param_groups[0]["lr"] = config.peak_lr(batch_size) * cosine
                seed_stochastic_layers(config.seed, step, rank)
                batch = next(endless)
                crops = batch.crops_BVHWC.to(device, non_blocking=True)
                images = augment(crops, batch.ids_B, batch.position.epoch)
                with reduced_precision(device, autocast_dtype):
                    logits_BC = wrapped(images)
                labels_B = batch.labels_B.to(device)
                loss = nn.functional.cross_entropy(_at_least_float32(logits_BC), labels_B)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss_sum += loss.detach().float()
                step += 1
                bar.update()
            loss_mean = _mean_over_ranks(loss_sum / steps_per_epoch).item()
            if not math.isfinite(loss_mean):
                raise ConfigError(
                    f"fine-tuning diverged by step {step}: give a lower --base-lr than "
                    f"{config.base_lr:g}"
                )
    return loss_mean


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` in training mode, its BatchNorm and gradients over all processes."""
    convert_sync_batch_norm(model)
    model.train()
    wrapped = model
    if dist.is_initialized() and dist.get_world_size() > 1:
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    try:
        yield wrapped
    finally:
        release(wrapped)
        model.eval()


def _at_least_float32(logits_BC: torch.Tensor) -> torch.Tensor:
    return logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()


def _mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x

"""lightly's methods as its own CIFAR-10 examples and benchmark write them.

From lightly: transforms, heads, losses with their memory bank, the momentum update, LARS and the
schedule. Loops follow its `examples/pytorch`; settings are those of its `cifar10_benchmark.py` (SGD
0.06 per 128 images, momentum 0.9, weight decay 5e-4, Adam for SwAV, no blur, colours at half
strength), the networks are in `_accuracy_lightly_models.py`.

Three things are kinder to it than its own code: images lie decoded in memory, workers persist over
epochs, and the cosine goes by steps instead of epochs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from _accuracy_budget import SIDE, Budget, Images, read_images
from _accuracy_lightly_models import MODELS
from lightly.transforms import SimCLRTransform
from lightly.utils.lars import LARS
from lightly.utils.scheduler import CosineWarmupScheduler
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True)
class Settings:
    """A method of lightly's and its optimizer."""

    method: str
    """One of MODELS."""
    optimizer: Literal["sgd", "lars", "adam"] = "sgd"
    rate_per_256: float = 0.12
    weight_decay: float = 5e-4

    def describe(self, budget: Budget, factor: float) -> str:
        warmup = f", {budget.warmup_steps} warm-up steps" if self.optimizer == "lars" else ""
        return (
            f"{self.optimizer} at {self.peak(budget, factor):.3g}, decay {self.weight_decay:g}, "
            f"cosine{warmup}; {MODELS[self.method].__doc__}"
        )

    def peak(self, budget: Budget, factor: float) -> float:
        return factor * self.rate_per_256 * budget.batch / 256


class InMemory(Dataset):
    """As torchvision's CIFAR10: an array, an image of PIL for each item, the transform."""

    def __init__(self, images: Images, transform: Callable[[Image.Image], list[torch.Tensor]]):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images.labels_N)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return self.transform(Image.fromarray(self.images.pixels_NHWC[index]))


def train(
    settings: Settings, budget: Budget, factor: float, on_step: Callable[[], None]
) -> tuple[nn.Module, float]:
    """Train from the common weights; the encoder and the last step's loss.

    Args:
        settings: method and optimizer.
        budget: what all contenders get.
        factor: of the learning rate.
        on_step: called after every step.
    """
    backbone = budget.initial_encoder()
    model = MODELS[settings.method](backbone, backbone.feature_dim, budget.steps)
    optimizer, scheduler = build_optimizer(model, settings, budget, factor)
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=budget.precision == "bf16")
    loss = torch.zeros(())
    for x0, x1 in batches(budget):
        with bf16:
            outputs = model.outputs(x0, x1)
        loss = model.loss(*(z.float() for z in outputs))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        on_step()
    return backbone, loss.item()


def batches(budget: Budget) -> Iterator[list[torch.Tensor]]:
    """Pairs of views for as many steps as the budget has."""
    transform = SimCLRTransform(input_size=SIDE, cj_strength=0.5, gaussian_blur=0.0)
    loader = DataLoader(
        InMemory(read_images(budget.train), transform),
        budget.batch,
        shuffle=True,
        drop_last=True,
        num_workers=budget.workers,
        persistent_workers=True,
    )
    left = budget.steps
    while left:
        for views in loader:
            yield views
            left -= 1
            if not left:
                return


def build_optimizer(
    model: nn.Module, settings: Settings, budget: Budget, factor: float
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rate = settings.peak(budget, factor)
    if settings.optimizer != "lars":
        parameters = [p for _, p in named]
        if settings.optimizer == "adam":
            optimizer: torch.optim.Optimizer = torch.optim.Adam(
                parameters, rate, weight_decay=settings.weight_decay
            )
        else:
            optimizer = torch.optim.SGD(
                parameters, rate, momentum=0.9, weight_decay=settings.weight_decay
            )
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.steps)
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": settings.weight_decay},
        # lightly's LARS scales no group without weight decay.
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = LARS(groups, rate, momentum=0.9)
    return optimizer, CosineWarmupScheduler(
        optimizer, budget.warmup_steps, budget.steps, end_value=0.0
    )

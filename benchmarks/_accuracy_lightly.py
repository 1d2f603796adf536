"""lightly's SimCLR and MoCo as its own CIFAR-10 examples and benchmark write them.

From lightly: transforms, heads, losses with their memory bank, the momentum update, LARS and the
schedule. Networks and loops follow its `examples/pytorch/{simclr,moco}.py`; settings are those of
its `cifar10_benchmark.py` (SGD 0.06 per 128 images, momentum 0.9, weight decay 5e-4, temperatures
0.5 and 0.1, key momentum 0.99, no blur, colours at half strength, symmetric MoCo loss).

Three things are kinder to it than its own code: images lie decoded in memory, workers persist over
epochs, and the cosine goes by steps instead of epochs.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from _accuracy_budget import SIDE, Budget, Images, read_images
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead, SimCLRProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import SimCLRTransform
from lightly.utils.lars import LARS
from lightly.utils.scheduler import CosineWarmupScheduler
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

HIDDEN, OUT, BANK, KEY_MOMENTUM = 512, 128, 4096, 0.99
Method = Literal["simclr", "moco", "moco-symmetric"]


@dataclass(frozen=True)
class Settings:
    """A method of lightly's and its optimizer."""

    method: Method
    optimizer: Literal["sgd", "lars"] = "sgd"
    rate_per_256: float = 0.12
    weight_decay: float = 5e-4

    @property
    def temperature(self) -> float:
        return 0.5 if self.method == "simclr" else 0.1

    def describe(self, budget: Budget, factor: float) -> str:
        warmup = f", {budget.warmup_steps} warm-up steps" if self.optimizer == "lars" else ""
        method = f"T {self.temperature:g}"
        if self.method != "simclr":
            method += f", bank {BANK}, key momentum {KEY_MOMENTUM}"
        return (
            f"{self.optimizer} at {self.peak(budget, factor):.3g}, decay {self.weight_decay:g}, "
            f"cosine{warmup}; {method}; head {HIDDEN}-{OUT}"
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


class SimCLR(nn.Module):
    def __init__(self, backbone: nn.Module, features: int, temperature: float) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection_head = SimCLRProjectionHead(features, HIDDEN, OUT)
        self.criterion = NTXentLoss(temperature)

    def outputs(self, x0: torch.Tensor, x1: torch.Tensor) -> list[torch.Tensor]:
        return [self.projection_head(self.backbone(x)) for x in (x0, x1)]

    def loss(self, z0: torch.Tensor, z1: torch.Tensor) -> torch.Tensor:
        return self.criterion(z0, z1)


class MoCo(nn.Module):
    def __init__(
        self, backbone: nn.Module, features: int, temperature: float, symmetric: bool
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection_head = MoCoProjectionHead(features, HIDDEN, OUT)
        self.backbone_momentum = copy.deepcopy(backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NTXentLoss(temperature, memory_bank_size=(BANK, OUT))
        self.symmetric = symmetric

    def outputs(self, x0: torch.Tensor, x1: torch.Tensor) -> list[torch.Tensor]:
        update_momentum(self.backbone, self.backbone_momentum, KEY_MOMENTUM)
        update_momentum(self.projection_head, self.projection_head_momentum, KEY_MOMENTUM)
        pairs = [(x0, x1), (x1, x0)] if self.symmetric else [(x0, x1)]
        outputs = []
        for query, key in pairs:
            outputs.append(self.projection_head(self.backbone(query)))
            with torch.no_grad():
                outputs.append(self.projection_head_momentum(self.backbone_momentum(key)))
        return outputs

    def loss(self, *outputs: torch.Tensor) -> torch.Tensor:
        losses = [self.criterion(*outputs[i : i + 2]) for i in range(0, len(outputs), 2)]
        return sum(losses[1:], losses[0]) / len(losses)


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
    features = backbone.feature_dim
    if settings.method == "simclr":
        model: SimCLR | MoCo = SimCLR(backbone, features, settings.temperature)
    else:
        symmetric = settings.method == "moco-symmetric"
        model = MoCo(backbone, features, settings.temperature, symmetric)
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
    if settings.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            [p for _, p in named], rate, momentum=0.9, weight_decay=settings.weight_decay
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

"""lightly's networks and losses, one class a method; the underscore keeps `make bench` away.

``outputs`` are what autocast sees, ``loss`` is of them in float32. Sizes of heads, temperatures and
momenta are those of lightly's `cifar10_benchmark.py`, of VICReg those of its example.
"""

import copy
from collections.abc import Callable

import torch
from lightly.loss import (
    BarlowTwinsLoss,
    DINOLoss,
    NegativeCosineSimilarity,
    NTXentLoss,
    SwaVLoss,
    VICRegLoss,
)
from lightly.models.modules import MoCoProjectionHead, SimCLRProjectionHead
from lightly.models.modules.heads import (
    BarlowTwinsProjectionHead,
    BYOLPredictionHead,
    BYOLProjectionHead,
    DINOProjectionHead,
    SimSiamPredictionHead,
    SimSiamProjectionHead,
    SwaVProjectionHead,
    SwaVPrototypes,
    VICRegProjectionHead,
)
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn
from torch.nn.functional import normalize

HIDDEN, OUT, BANK, KEY_MOMENTUM = 512, 128, 4096, 0.99


class Model(nn.Module):
    """A backbone and what stands on it."""

    def __init__(self, backbone: nn.Module, features: int, steps: int) -> None:
        super().__init__()
        self.backbone, self.steps, self.step = backbone, steps, 0
        self.build(features)

    def build(self, features: int) -> None:
        raise NotImplementedError

    def outputs(self, x0: Tensor, x1: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def loss(self, *outputs: Tensor) -> Tensor:
        raise NotImplementedError

    def averages(self, *parts: nn.Module) -> list[nn.Module]:
        copies = [copy.deepcopy(part) for part in parts]
        for each in copies:
            deactivate_requires_grad(each)
        return copies

    def momentum(self, first: float) -> float:
        self.step += 1
        return cosine_schedule(self.step - 1, self.steps, first, 1.0)


class SimCLR(Model):
    """T 0.5; head 512-128"""

    def build(self, features: int) -> None:
        self.projection_head = SimCLRProjectionHead(features, HIDDEN, OUT)
        self.criterion = NTXentLoss(0.5)

    def outputs(self, x0: Tensor, x1: Tensor) -> list[Tensor]:
        return [self.projection_head(self.backbone(x)) for x in (x0, x1)]

    def loss(self, *outputs: Tensor) -> Tensor:
        return self.criterion(*outputs)


class MoCo(Model):
    """T 0.1, bank 4096, key momentum 0.99; head 512-128"""

    symmetric = False

    def build(self, features: int) -> None:
        self.projection_head = MoCoProjectionHead(features, HIDDEN, OUT)
        self.key, self.key_head = self.averages(self.backbone, self.projection_head)
        self.criterion = NTXentLoss(0.1, memory_bank_size=(BANK, OUT))

    def outputs(self, x0: Tensor, x1: Tensor) -> list[Tensor]:
        update_momentum(self.backbone, self.key, KEY_MOMENTUM)
        update_momentum(self.projection_head, self.key_head, KEY_MOMENTUM)
        pairs = [(x0, x1), (x1, x0)] if self.symmetric else [(x0, x1)]
        outputs = []
        for query, key in pairs:
            outputs.append(self.projection_head(self.backbone(query)))
            with torch.no_grad():
                outputs.append(self.key_head(self.key(key)))
        return outputs

    def loss(self, *outputs: Tensor) -> Tensor:
        losses = [self.criterion(*outputs[i : i + 2]) for i in range(0, len(outputs), 2)]
        return sum(losses[1:], losses[0]) / len(losses)


class SymmetricMoCo(MoCo):
    """T 0.1, bank 4096, key momentum 0.99, both views asked; head 512-128"""

    symmetric = True


class BYOL(Model):
    """momentum 0.996 to 1; heads 1024-256"""

    def build(self, features: int) -> None:
        self.projection_head = BYOLProjectionHead(features, 1024, 256)
        self.prediction_head = BYOLPredictionHead(256, 1024, 256)
        self.key, self.key_head = self.averages(self.backbone, self.projection_head)
        self.criterion = NegativeCosineSimilarity()

    def outputs(self, x0: Tensor, x1: Tensor) -> list[Tensor]:
        momentum = self.momentum(0.996)
        update_momentum(self.backbone, self.key, momentum)
        update_momentum(self.projection_head, self.key_head, momentum)
        predicted = [self.prediction_head(self.projection_head(self.backbone(x))) for x in (x0, x1)]
        with torch.no_grad():
            keys = [self.key_head(self.key(x)) for x in (x0, x1)]
        return predicted + keys

    def loss(self, *outputs: Tensor) -> Tensor:
        p0, p1, k0, k1 = outputs
        return 0.5 * (self.criterion(p0, k1) + self.criterion(p1, k0))


class SimSiam(Model):
    """heads 2048-2048, 512-2048"""

    def build(self, features: int) -> None:
        self.projection_head = SimSiamProjectionHead(features, 2048, 2048)
        self.prediction_head = SimSiamPredictionHead(2048, 512, 2048)
        self.criterion = NegativeCosineSimilarity()

    def outputs(self, x0: Tensor, x1: Tensor) -> list[Tensor]:
        z0, z1 = (self.projection_head(self.backbone(x)) for x in (x0, x1))
        return [self.prediction_head(z0), self.prediction_head(z1), z0.detach(), z1.detach()]

    def loss(self, *outputs: Tensor) -> Tensor:
        p0, p1, z0, z1 = outputs
        return 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))


class BarlowTwins(SimCLR):
    """lambda 0.005; head 2048-2048"""

    def build(self, features: int) -> None:
        self.projection_head = BarlowTwinsProjectionHead(features, 2048, 2048)
        self.criterion = BarlowTwinsLoss()


class VICReg(SimCLR):
    """25, 25, 1; head 2048-2048"""

    def build(self, features: int) -> None:
        self.projection_head = VICRegProjectionHead(features, 2048, 2048, num_layers=2)
        self.criterion = VICRegLoss()


class SwAV(Model):
    """512 prototypes; head 512-128"""

    def build(self, features: int) -> None:
        self.projection_head = SwaVProjectionHead(features, HIDDEN, OUT)
        self.prototypes = SwaVPrototypes(OUT, 512)
        self.criterion = SwaVLoss()

    def outputs(self, x0: Tensor, x1: Tensor) -> list[Tensor]:
        self.prototypes.normalize()
        projected = [self.projection_head(self.backbone(x)) for x in (x0, x1)]
        return [self.prototypes(normalize(z, dim=1)) for z in projected]

    def loss(self, *outputs: Tensor) -> Tensor:
        return self.criterion(list(outputs), [])


class DINO(Model):
    """2048 directions, momentum 0.99 to 1; head 2048-256"""

    def build(self, features: int) -> None:
        self.head, self.teacher_head = (
            DINOProjectionHead(features, 2048, 256, 2048, batch_norm=True) for _ in range(2)
        )
        self.teacher_head.load_state_dict(self.head.state_dict())
        deactivate_requires_grad(self.teacher_head)
        (self.teacher,) = self.averages(self.backbone)
        self.criterion = DINOLoss(output_dim=2048)

    def outputs(self, x0: Tensor, x1: Tensor) -> list[Tensor]:
        momentum = self.momentum(0.99)
        update_momentum(self.backbone, self.teacher, momentum)
        update_momentum(self.head, self.teacher_head, momentum)
        said = [self.head(self.backbone(x)) for x in (x0, x1)]
        with torch.no_grad():
            taught = [self.teacher_head(self.teacher(x)) for x in (x0, x1)]
        return taught + said

    def loss(self, *outputs: Tensor) -> Tensor:
        return self.criterion(list(outputs[:2]), list(outputs[2:]), epoch=0)


MODELS: dict[str, Callable[[nn.Module, int, int], Model]] = {
    "simclr": SimCLR,
    "moco": MoCo,
    "moco-symmetric": SymmetricMoCo,
    "byol": BYOL,
    "simsiam": SimSiam,
    "barlowtwins": BarlowTwins,
    "vicreg": VICReg,
    "swav": SwAV,
    "dino": DINO,
}

"""Rotation prediction: which of four turns was an image given?

Gidaris, Singh & Komodakis 2018, arXiv 1803.07728. All four turns of every image are in the batch.
Flip, crop and colours come before the turn: a flip after it would make 90 and 270 degrees look
alike. A turn by 90 degrees only moves pixels, so that no border or interpolation gives it away.

Shapes: N images of this process, T = 4 turns, R = T * N rows, turn-major.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import tyro
from torch import nn

from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs, Loss, Objective, ObjectiveConfig, Outputs
from trainer.objectives.cost import LossCost, StepSizes, softmax_cost
from trainer.objectives.parts.classification import classification

_TURNS = 4  # of 0, 90, 180 and 270 degrees, anticlockwise


@dataclass(frozen=True, kw_only=True)
class RotationConfig(ObjectiveConfig):
    """Cross-entropy over the four turns; there is nothing to set."""

    looks: ClassVar[int] = 1

    name: tyro.conf.Suppress[Literal["rotation"]] = "rotation"
    """Which objective a saved configuration describes."""

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "Rotation":
        """The encoder and a linear classifier; there is no projection head."""
        return Rotation(encoder, self)

    def cost(self, step: StepSizes) -> LossCost:
        """A linear classifier, counted with the networks."""
        return softmax_cost(_TURNS * step.local_batch, _TURNS, 1)

    def compares(self, batch: int, num_samples: int) -> str:
        """Every turn with the four turns."""
        return f"{_TURNS} turns of an image, {_TURNS} logits each"


class Rotation(Objective):
    """An encoder and a linear classifier of turns."""

    def __init__(self, encoder: Encoder, config: RotationConfig) -> None:
        super().__init__(encoder, None, config)
        self.classifier = nn.Linear(encoder.feature_dim, _TURNS)

    def forward(self, inputs: Inputs) -> Outputs:
        """``logits``, ``(N, T, 4)``: of every turn of an image, those of the four turns."""
        images_NCHW = inputs.views[0][0]
        turned_RCHW = torch.cat([images_NCHW.rot90(turn, (2, 3)) for turn in range(_TURNS)])
        turned_RCHW = turned_RCHW.contiguous(memory_format=torch.channels_last)
        logits_R4 = self.classifier(self.encoder(turned_RCHW))
        return Outputs({"logits": logits_R4.unflatten(0, (_TURNS, -1)).transpose(0, 1)})

    def pictures(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Each image in another turn, and turned back as far as the classifier says."""
        images_NCHW = inputs.views[0][0]
        turns = [number % _TURNS for number in range(len(images_NCHW))]
        told_NT = self(inputs).rows["logits"].argmax(2)
        turned = [image.rot90(turn, (1, 2)) for image, turn in zip(images_NCHW, turns)]
        back = [image.rot90(-int(told_NT[n, turns[n]]), (1, 2)) for n, image in enumerate(turned)]
        return {"turned": torch.stack(turned), "turned back": torch.stack(back)}

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """Mean cross-entropy over all turns of all images; ln 4 by chance."""
        logits_NT4 = outputs.rows["logits"]
        turns_NT = torch.arange(_TURNS, device=logits_NT4.device).expand(logits_NT4.shape[:2])
        value, top1 = classification(logits_NT4, turns_NT)
        return Loss(value, {"rotation_top1": top1})

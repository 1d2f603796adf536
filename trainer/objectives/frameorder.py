"""Frame order: in what order do frames of a clip come?

``between``: does a frame lie between two others? Misra, Zitnick & Hebert 2016 ("Shuffle and
Learn"), arXiv 1603.08561. Of five frames a < b < c < d < e, c lies between b and d, and a and e do
not: only the frame in the middle differs.

``order``: in which of twelve orders are four frames shown? Lee et al. 2017 ("Order Prediction
Network"), arXiv 1708.01246. An order and its reverse are one, because much looks alike backwards.

Every frame is encoded once, and all questions about a tuple are asked of its features.

Shapes: N tuples of this process, F frames, Q questions about a tuple, K answers, W width.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import tyro
from torch import nn

from common.bounds import check_bounds
from common.errors import ConfigError
from common.randomness import Stream
from data_pipeline.augment import AugmentConfig
from data_pipeline.crops import CropConfig
from data_pipeline.views import FrameDraw, ViewGroup, ViewPlan
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs, Loss, Objective, ObjectiveConfig, Outputs
from trainer.objectives.cost import LossCost, StepSizes, softmax_cost
from trainer.objectives.parts.chromatic_aberration import one_colour
from trainer.objectives.parts.classification import classification
from trainer.objectives.parts.draws import uniform_draws
from trainer.objectives.parts.frames import QUESTIONS, FrameFeatures, said


@dataclass(frozen=True, kw_only=True)
class FrameOrderConfig(ObjectiveConfig):
    """Cross-entropy over orders; the defaults are those for videos of 25 frames a second."""

    looks: ClassVar[int] = 1

    name: tyro.conf.Suppress[Literal["frameorder"]] = "frameorder"
    """Which objective a saved configuration describes."""
    task: Literal["between", "order"] = "between"
    """between: does a frame lie between two others? order: which of twelve orders have four?"""
    gap: tuple[int, int] = (1, 30)
    """Least and greatest distance of neighbours among the frames in question, in frames that
    differ from the one before."""
    apart: tuple[int, int] = (15, 60)
    """The same between them and the frame before all of them, or after, that does not lie between
    (task between)."""
    shift: float = 0.06
    """Every frame is cut by the tuple's one crop, shifted by at most so much of its side: borders
    are not to tell the order."""
    colours: Literal["keep", "split"] = "keep"
    """split shows one channel of each frame in the place of all: colours are not to tell it."""
    flip: float = 0.5
    """Probability that a tuple is mirrored, all frames alike, in the place of
    --augment.view1.flip."""
    width: int = 1024
    """W: of a frame's features before it meets others."""

    def __post_init__(self) -> None:
        frames, share = "[1, 1e6]", "[0, 1]"
        bounds = {"gap": frames, "apart": frames, "shift": share, "flip": share}
        check_bounds(self, "--objective.", **bounds, width="[1, 1e9]")
        for name, (least, most) in (("gap", self.gap), ("apart", self.apart)):
            if least > most:
                raise ConfigError(f"--objective.{name} {least} {most}: the least comes first")

    def views(self, crop: CropConfig, augment: AugmentConfig) -> ViewPlan:
        """Frames of a clip, each altered as the first view is."""
        if self.task == "between":
            draw = FrameDraw((self.apart, self.gap, self.gap, self.apart), 2, self.shift)
        else:
            draw = FrameDraw((self.gap,) * 3, 1, self.shift)
        looks = (replace(augment.view1, flip=0.0),) * (len(draw.gaps) + 1)
        return (ViewGroup(crop, looks, frames=draw),)

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "FrameOrder":
        """The encoder and a classifier of several frames; there is no projection head."""
        return FrameOrder(encoder, self, given)

    def cost(self, step: StepSizes) -> LossCost:
        """A linear classifier, counted with the networks."""
        asked = QUESTIONS[self.task]
        return softmax_cost(len(asked.forwards) * step.local_batch, asked.answers, 1)

    def compares(self, batch: int, num_samples: int) -> str:
        """What is asked about frames."""
        if self.task == "between":
            return "3 frames of a clip, between the others or not"
        return f"{QUESTIONS[self.task].answers} orders of 4 frames of a clip"


class FrameOrder(Objective):
    """An encoder of frames and a classifier of several frames' features."""

    config: FrameOrderConfig

    def __init__(self, encoder: Encoder, config: FrameOrderConfig, given: Given) -> None:
        super().__init__(encoder, None, config)
        self.seed = given.seed
        asked = QUESTIONS[config.task]
        self.frames = FrameFeatures(encoder, given.side, config.width)
        self.together = nn.Sequential(
            nn.Linear(len(asked.shown[0]) * config.width, config.width, bias=False),
            nn.BatchNorm1d(config.width),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(len(asked.forwards[0]) * config.width, asked.answers)

    def forward(self, inputs: Inputs) -> Outputs:
        """``logits``, ``(N, Q, K)``: of each question, those of the answers."""
        config, asked = self.config, QUESTIONS[self.config.task]
        frames_FNCHW = inputs.views[0]
        count = len(frames_FNCHW)
        draws = uniform_draws(self.seed, inputs.step, inputs.ids_N, Stream.FRAME_LOOK, 2 + count)
        is_mirrored_N = (draws[:, 0] < config.flip)[:, None, None, None]
        frames_FNCHW = torch.where(is_mirrored_N, frames_FNCHW.flip(-1), frames_FNCHW)
        if config.colours == "split":
            frames_FNCHW = one_colour(frames_FNCHW, draws[:, 2:].T)
        frames_RCHW = frames_FNCHW.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        features = self.frames(self.encoder, frames_RCHW).unflatten(0, (count, -1)).unbind()
        looks_RW = self.together(asked.looks(features))
        asked_NQW = asked.asked(looks_RW, is_backwards_N=draws[:, 1] < 0.5)
        return Outputs({"logits": self.classifier(asked_NQW)})

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """Mean cross-entropy over all questions about all tuples; ln 2 by chance, or ln 12."""
        logits_NQK = outputs.rows["logits"]
        right_Q = torch.arange(logits_NQK.shape[1], device=logits_NQK.device)
        if self.config.task == "between":
            right_Q = (right_Q < 2).long()
        value, top1 = classification(logits_NQK, right_Q.expand(logits_NQK.shape[:2]))
        return Loss(value, {"frameorder_top1": top1})

    def pictures(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Two frames and which of three lies between them most surely, or four in the order that
        they are said to have."""
        frames_FNCHW, logits_NQK = inputs.views[0], self(inputs).rows["logits"]
        numbers_N = torch.arange(len(logits_NQK), device=logits_NQK.device)
        found = said(logits_NQK)
        return {what: frames_FNCHW[which_N, numbers_N] for what, which_N in found.items()}

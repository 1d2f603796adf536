"""Several objectives at once, by one encoder: each has its views, its networks and a weight.

SimCLR with rotation on a third, small view is E-SSL (Dangovski et al. 2022, arXiv 2111.00899); more
tasks than two were joined by Doersch & Zisserman 2017 (arXiv 1708.07860).

Shapes: N images of this process.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from common.bounds import check_bounds
from common.errors import ConfigError
from data_pipeline.augment import AugmentConfig
from data_pipeline.crops import CropConfig
from data_pipeline.views import ViewPlan
from trainer.models.encoders import Encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Objective, ObjectiveConfig
from trainer.objectives.cost import LossCost, StepSizes
from trainer.objectives.parts.joint import Joint, gives_order, has_epochs, keeps_samples
from trainer.objectives.tasks import AnyTaskConfig


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One of the objectives."""

    task: Annotated[tyro.conf.AvoidSubcommands[AnyTaskConfig], tyro.conf.arg(name="")]
    weight: float = 1.0
    """Of its loss in the sum."""
    side: int = 0
    """Of its views in pixels; 0: --crop.size."""
    scale: tuple[float, float] = (0.0, 0.0)
    """Least and greatest area of its crops; 0 0: --crop.scale."""

    def __post_init__(self) -> None:
        check_bounds(
            self, "--objective.tasks.N.", weight="(0, inf)", side="[0, 65535]", scale="[0, 1]"
        )

    def crop(self, crop: CropConfig) -> CropConfig:
        """Of its views, in a run that has ``crop``."""
        side, scale = self.side or crop.size, self.scale if any(self.scale) else crop.scale
        return dataclasses.replace(crop, size=side, scale=scale)


@dataclass(frozen=True, kw_only=True)
class JointConfig(ObjectiveConfig):
    """The weighted sum of the losses of several objectives."""

    name: tyro.conf.Suppress[Literal["joint"]] = "joint"
    """Which objective a saved configuration describes."""
    tasks: tuple[TaskConfig, ...]
    """Of different kinds; their places in the list are their numbers on the command line."""

    def __post_init__(self) -> None:
        names = [each.task.name for each in self.tasks]
        if not names or len(set(names)) < len(names):
            found = ", ".join(names) or "none"
            raise ConfigError(f"objective.tasks: one of each kind, found {found}")

    def views(self, crop: CropConfig, augment: AugmentConfig) -> ViewPlan:
        """Those of every task, one after the other."""
        return tuple(itertools.chain(*self._plans(crop, augment)))

    def _plans(self, crop: CropConfig, augment: AugmentConfig) -> list[ViewPlan]:
        return [each.task.views(each.crop(crop), augment) for each in self.tasks]

    def least_samples(self) -> tuple[int, str]:
        """As the most demanding task."""
        return max(each.task.least_samples() for each in self.tasks)

    def build(self, encoder: Encoder, head: HeadConfig, given: Given) -> "Joint":
        """One encoder, and what every task adds to it.

        Raises:
            ConfigError: more than one task makes something anew for each epoch.
        """
        own = CropConfig(size=given.side)
        built: list[Objective] = [
            each.task.build(encoder, head, given._replace(side=each.crop(own).size))
            for each in self.tasks
        ]
        by_epoch = [each for each in built if has_epochs(each)]
        if len(by_epoch) > 1:
            names = " and ".join(each.config.name for each in by_epoch)
            raise ConfigError(f"objective.tasks: {names} cluster before epochs; take one of them")
        plans = self._plans(own, AugmentConfig())
        frames = [
            each.task.name
            for each, plan in zip(self.tasks, plans)
            if any(group.frames for group in plan)
        ]
        uneven = frames + [each.config.name for each in built if gives_order(each)]
        by_sample = [each.config.name for each in built if has_epochs(each) or keeps_samples(each)]
        for one, other in itertools.product(by_sample, uneven):
            if one != other:
                raise ConfigError(
                    f"objective.tasks: {one} needs every sample once, and {other} shows some more"
                    " often than others; take one of them"
                )
        groups = [len(plan) for plan in plans]
        return Joint(encoder, self, built, [each.weight for each in self.tasks], groups)

    def costs(self, step: StepSizes) -> tuple[LossCost, ...]:
        """Of every task."""
        steps = [step._replace(side=each.side or step.side) for each in self.tasks]
        return tuple(each.task.cost(own) for each, own in zip(self.tasks, steps))

    def compares(self, batch: int, num_samples: int) -> str:
        """What every task does."""
        found = (each.task.compares(batch, num_samples) for each in self.tasks)
        return " and ".join(filter(None, found))

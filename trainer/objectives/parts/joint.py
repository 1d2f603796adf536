"""Several objectives of one encoder, as one.

Shapes: N images of this process.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn

from data_pipeline.reading.order import EpochOrder
from trainer.models.encoders import Encoder
from trainer.objectives.base import Inputs, Loss, Objective, ObjectiveConfig, Outputs
from trainer.objectives.parts.per_sample import PerSample


class Joint(Objective):
    """An encoder and the tasks that it learns by.

    Args:
        encoder: which every task has been built for.
        tasks: of different names.
        weights: of their losses in the sum.
        groups: of views that each has, in this order.
    """

    def __init__(
        self,
        encoder: Encoder,
        config: ObjectiveConfig,
        tasks: Sequence[Objective],
        weights: Sequence[float],
        groups: Sequence[int],
    ) -> None:
        super().__init__(encoder, None, config)
        self.weights, self.groups = weights, groups
        self.tasks = nn.ModuleDict({task.config.name: task for task in tasks})
        for task in tasks:
            # One name for a weight: a part of the whole alone, and no part of the task.
            del task._modules["encoder"]
            object.__setattr__(task, "encoder", encoder)

    def _each(self) -> Iterator[tuple[str, Objective, float]]:
        for (name, task), weight in zip(self.tasks.items(), self.weights):
            assert isinstance(task, Objective)  # noqa: S101  (for the type checker)
            yield name, task, weight

    def forward(self, inputs: Inputs) -> Outputs:
        """What every task makes of its views, by ``task.name``."""
        rows: dict[str, torch.Tensor] = {}
        fixed: dict[str, torch.Tensor] = {}
        for name, part in self._inputs(inputs):
            outputs: Outputs = self.tasks[name](part)
            rows |= {f"{name}.{key}": value for key, value in outputs.rows.items()}
            fixed |= {f"{name}.{key}": value for key, value in outputs.fixed.items()}
        return Outputs(rows, fixed)

    def _inputs(self, inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
        views = iter(inputs.views)
        for name, count in zip(self.tasks, self.groups):
            yield name, inputs._replace(views=tuple(itertools.islice(views, count)))

    def loss(self, outputs: Outputs, step: int) -> Loss:
        """The weighted sum, and beside it every task's own loss and metrics."""
        losses, metrics = [], {}
        for name, task, weight in self._each():
            value, more = task.loss(_of(name, outputs), step)
            losses.append(weight * value)
            metrics[f"{name}_loss"] = value.detach()
            metrics |= {key if key.startswith(name) else f"{name}_{key}": more[key] for key in more}
        return Loss(torch.stack(losses).sum(), metrics)

    def embedding(self, outputs: Outputs) -> torch.Tensor | None:
        """Of the first task that has one."""
        found = (task.embedding(_of(name, outputs)) for name, task, _ in self._each())
        return next((each for each in found if each is not None), None)

    def after_step(
        self, outputs: Outputs, step: int, total_steps: int, skipped: torch.Tensor
    ) -> None:
        """What follows in every task."""
        for name, task, _ in self._each():
            task.after_step(_of(name, outputs), step, total_steps, skipped)

    def before_epoch(self, epoch: int, whole_epoch: Callable[[], Iterator[Outputs]]) -> None:
        """Of the task that has something to make anew, if one has."""
        for name, task, _ in self._each():
            if has_epochs(task):
                task.before_epoch(epoch, lambda: map(partial(_of, name), whole_epoch()))  # noqa: B023

    def order(self, num_samples: int) -> EpochOrder | None:
        """As that task has it."""
        found = (task.order(num_samples) for _, task, _ in self._each())
        return next((each for each in found if each is not None), None)

    def pictures(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        """Of the first task that has any."""
        found = (
            task.pictures(part)
            for (_, task, _), (_, part) in zip(self._each(), self._inputs(inputs))
        )
        return next(filter(None, found), {})

    def sample_clusters(self) -> torch.Tensor | None:
        """Of the task that makes any."""
        found = (task.sample_clusters() for _, task, _ in self._each())
        return next((each for each in found if each is not None), None)

    def synchronised_parts(self, sync_batch_norm: bool) -> list[nn.Module]:
        """The encoder by the run's setting, and what every task says of its own."""
        parts: list[nn.Module] = [self.encoder] if sync_batch_norm else []
        for _, task, _ in self._each():
            parts += task.synchronised_parts(sync_batch_norm)
        return parts

    def caveats(self, sync_batch_norm: bool) -> list[str]:
        """Every task's, once."""
        lines = (line for _, task, _ in self._each() for line in task.caveats(sync_batch_norm))
        return list(dict.fromkeys(lines))


def _of(name: str, outputs: Outputs) -> Outputs:
    start = f"{name}."
    rows, fixed = (
        {key.removeprefix(start): value for key, value in part.items() if key.startswith(start)}
        for part in outputs
    )
    return Outputs(rows, fixed)


def keeps_samples(task: Objective) -> bool:
    """Whether a task has a row for every sample, of which a batch shows none twice."""
    return any(isinstance(part, PerSample) for part in task.modules())


def has_epochs(task: Objective) -> bool:
    """Whether a task makes something anew before an epoch."""
    return type(task).before_epoch is not Objective.before_epoch


def gives_order(task: Objective) -> bool:
    """Whether a task says which samples an epoch shows."""
    return type(task).order is not Objective.order

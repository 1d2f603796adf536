"""One step's loss and gradients: of a whole batch at once, or of one that does not fit, in pieces.

A contrastive loss does not split: every image meets every other. In pieces (``--micro-batch``) the
projections of all images are made first, without gradient; then the loss and its derivative by the
projections; then every piece again, with its own part of that derivative (the gradient cache of Gao
et al. 2021, arXiv 2101.06983). The second time makes the same views, because augmentation is a
function of the sample's id. BatchNorm, which that leaves wrong, is exact here too:
:mod:`trainer.parallel.micro_batch_norm`.

Kept for the whole batch are crops (uint8) and projections; all else is a piece's.

Shapes: N images of this process, V views, M rows of projections, D dimensions.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal, NamedTuple

import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from common import fault_injection
from common.errors import ConfigError
from data_pipeline.augment import Augment
from data_pipeline.reading.batch import Batch
from trainer.objectives.base import Loss, Objective, Projections
from trainer.parallel.micro_batch_norm import PieceStatistics
from trainer.parallel.sync_batch_norm import SyncBatchNorm

MicroBatchNorm = Literal["exact", "piece"]


class StepDone(NamedTuple):
    """What a step leaves for those that watch the run."""

    number: int
    """Optimizer steps done, this one among them."""
    batch: Batch
    outputs: Projections
    loss: Loss
    lr: float
    gradient_norm: torch.Tensor
    skipped: torch.Tensor
    """0-d, 1 where a gradient was not finite and nothing was changed; on the device."""


Gradients = Callable[[Batch, int], tuple[Projections, Loss]]
"""From a batch and the number of steps done before it, leaves gradients in the parameters and
returns the projections and the loss."""


class WholeBatch:
    """Gradients of a batch in one forward and one backward pass.

    Args:
        fabric: precision and gradient averaging.
        objective: what is learnt.
        model: ``objective`` as Fabric wraps it.
        augment: makes the views.
        enter: told which phase of the step begins; see :mod:`trainer.health.phases`.
    """

    def __init__(
        self,
        fabric: Fabric,
        objective: Objective,
        model: nn.Module,
        augment: Augment,
        enter: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self._fabric, self._objective, self._model = fabric, objective, model
        self._augment, self._enter = augment, enter

    def __call__(self, batch: Batch, step: int) -> tuple[Projections, Loss]:
        """See :data:`Gradients`."""
        self._enter("augment")
        views_VNCHW = self._augment(batch.crops_BVHWC, batch.ids_B, batch.position.epoch)
        self._enter("forward")
        outputs: Projections = self._model(views_VNCHW, step)
        loss = self._objective.loss(outputs)
        self._enter("backward")
        self._fabric.backward(fault_injection.tensor("step.backward", loss.value))
        return outputs, loss


class InPieces:
    """The same gradients, ``size`` images of this process at a time.

    Args:
        fabric: precision and gradient averaging.
        objective: its BatchNorm layers are all synchronised ones.
        model: ``objective`` as Fabric wraps it.
        augment: as for the whole batch.
        size: images of a piece.
        norm: "exact" takes BatchNorm's statistics over the global batch; "piece" over the piece
            (of all processes), in two forward passes instead of many.
        reseed: called with a step and the number of a piece before the piece's every forward pass,
            so that layers which draw random numbers draw the same again.
        enter: as for the whole batch; a piece's views belong to its forward pass.
    """

    def __init__(
        self,
        fabric: Fabric,
        objective: Objective,
        model: nn.Module,
        augment: Augment,
        *,
        size: int,
        norm: MicroBatchNorm,
        reseed: Callable[[int, int], None],
        enter: Callable[[str], None] = lambda phase: None,
    ) -> None:
        self._fabric, self._objective, self._model = fabric, objective, model
        self._augment, self._size, self._norm, self._reseed = augment, size, norm, reseed
        self._enter = enter

    def __call__(self, batch: Batch, step: int) -> tuple[Projections, Loss]:
        """See :data:`Gradients`."""
        pieces = range(0, len(batch.ids_B), self._size)
        forward = partial(self._forward, self._objective, batch, step)
        statistics = PieceStatistics(self._objective, exact=self._norm == "exact")
        outputs = statistics.project(forward, len(pieces))
        whole, loss, gradients = self._loss([Projections(*output) for output in outputs])
        if self._norm == "exact":
            statistics.collect_gradient_sums(lambda piece: forward(piece).queries, gradients)
        with statistics.known():
            for piece, gradient in enumerate(gradients):
                statistics.start_piece()
                with self._averaging(last=piece == len(pieces) - 1):
                    queries = self._forward(self._model, batch, step, piece).queries
                    self._enter("backward")
                    self._fabric.backward(queries, gradient)
        return whole, loss

    def _forward(self, module: nn.Module, batch: Batch, step: int, piece: int) -> Projections:
        self._enter("forward")
        self._reseed(step, piece)
        rows = slice(piece * self._size, (piece + 1) * self._size)
        views_VNCHW = self._augment(
            batch.crops_BVHWC[rows], batch.ids_B[rows], batch.position.epoch
        )
        # Fabric's wrapper brings its own autocast.
        with nullcontext() if module is self._model else self._fabric.autocast():
            outputs: Projections = module(views_VNCHW, step)
        return outputs

    def _loss(self, outputs: list[Projections]) -> tuple[Projections, Loss, list[torch.Tensor]]:
        """The whole batch's projections and loss, and its derivative by every piece's queries."""
        keys = [output.keys for output in outputs if output.keys is not None]
        rows = self._size if len(outputs) > 1 else None
        queries_MD = _join([output.queries for output in outputs], rows).requires_grad_()
        whole = Projections(queries_MD, _join(keys, rows) if keys else None)
        loss = self._objective.loss(whole)
        (gradient_MD,) = torch.autograd.grad(
            fault_injection.tensor("step.backward", loss.value), queries_MD
        )
        shapes = [output.queries for output in outputs]
        return whole, Loss(loss.value.detach(), loss.top1), _split(gradient_MD, shapes, rows)

    def _averaging(self, last: bool) -> AbstractContextManager[object]:
        """DDP averages gradients after the last piece, all pieces' at once."""
        if last:
            return nullcontext()
        assert isinstance(self._model, _FabricModule)  # noqa: S101 - for the type checker
        no_average: AbstractContextManager[object] = self._fabric.no_backward_sync(self._model)
        return no_average


def refuse_own_statistics(objective: Objective) -> None:
    """Refuse a batch in pieces where a BatchNorm is not synchronised.

    Raises:
        ConfigError: names the layer and what to set.
    """
    for name, module in objective.named_modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
            raise ConfigError(
                f"--micro-batch: {name} would normalise every piece on its own, another batch than "
                "the one asked for; set --sync-batch-norm, and --objective.key-batch-norm sync for "
                "MoCo"
            )


def _join(parts: list[torch.Tensor], size: int | None) -> torch.Tensor:
    """View-major rows of all pieces, view-major."""
    if size is None:
        return parts[0].detach()
    blocks = len(parts[0]) // size
    return torch.cat([part.unflatten(0, (blocks, -1)) for part in parts], 1).flatten(0, 1).detach()


def _split(
    rows_MD: torch.Tensor, parts: list[torch.Tensor], size: int | None
) -> list[torch.Tensor]:
    """What :func:`_join` joined."""
    if size is None:
        return [rows_MD]
    blocks = len(parts[0]) // size
    counts = [len(part) // blocks for part in parts]
    pieces = rows_MD.unflatten(0, (blocks, -1)).split(counts, dim=1)
    return [piece.flatten(0, 1).contiguous() for piece in pieces]

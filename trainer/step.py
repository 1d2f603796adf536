"""One step's loss and gradients: of a whole batch at once, or of one that does not fit, in pieces.

A contrastive loss does not split: every image meets every other. In pieces (``--micro-batch``) the
outputs of all images are made first, without gradient; then the loss and its derivative by their
rows; then every piece again, with its own part of that derivative (the gradient cache of Gao
et al. 2021, arXiv 2101.06983). The second time makes the same views, because augmentation is a
function of the sample's id. BatchNorm, which that leaves wrong, is exact here too:
:mod:`trainer.parallel.micro_batch_norm`.

Kept for the whole batch are crops (uint8) and outputs; all else is a piece's.
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
from trainer.objectives.base import Inputs, Loss, Objective, Outputs
from trainer.parallel.micro_batch_norm import PieceStatistics
from trainer.parallel.sync_batch_norm import SyncBatchNorm

MicroBatchNorm = Literal["exact", "piece"]


class StepDone(NamedTuple):
    """What a step leaves for those that watch the run."""

    number: int
    """Optimizer steps done, this one among them."""
    batch: Batch
    outputs: Outputs
    loss: Loss
    lr: float
    gradient_norm: torch.Tensor
    skipped: torch.Tensor
    """0-d, 1 where a gradient was not finite and nothing was changed; on the device."""


Gradients = Callable[[Batch, int], tuple[Outputs, Loss]]
"""From a batch and the number of steps done before it, leaves gradients in the parameters and
returns the outputs and the loss."""


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

    def __call__(self, batch: Batch, step: int) -> tuple[Outputs, Loss]:
        """See :data:`Gradients`."""
        self._enter("augment")
        inputs = make_inputs(self._augment, batch, step)
        self._enter("forward")
        outputs: Outputs = self._model(inputs)
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

    def __call__(self, batch: Batch, step: int) -> tuple[Outputs, Loss]:
        """See :data:`Gradients`."""
        pieces = range(0, len(batch.ids_B), self._size)
        forward = partial(self._forward, self._objective, batch, step)
        statistics = PieceStatistics(self._objective, exact=self._norm == "exact")
        whole, loss, gradients = self._loss(statistics.project(forward, len(pieces)))
        if self._norm == "exact":
            statistics.collect_gradient_sums(forward, [partial(_inner, g) for g in gradients])
        with statistics.known():
            for piece, gradient in enumerate(gradients):
                statistics.start_piece()
                with self._averaging(last=piece == len(pieces) - 1):
                    outputs = self._forward(self._model, batch, step, piece)
                    self._enter("backward")
                    self._fabric.backward(_inner(gradient, outputs))
        return whole, loss

    def _forward(self, module: nn.Module, batch: Batch, step: int, piece: int) -> Outputs:
        self._enter("forward")
        self._reseed(step, piece)
        rows = slice(piece * self._size, (piece + 1) * self._size)
        inputs = make_inputs(self._augment, batch, step, rows)
        # Fabric's wrapper brings its own autocast.
        with nullcontext() if module is self._model else self._fabric.autocast():
            outputs: Outputs = module(inputs)
        return outputs

    def _loss(self, pieces: list[Outputs]) -> tuple[Outputs, Loss, list[dict[str, torch.Tensor]]]:
        """The whole batch's outputs and loss, and its derivative by the rows of every piece."""
        rows = _join([piece.rows for piece in pieces])
        whole = Outputs(rows, _join([piece.fixed for piece in pieces]))
        leaves = [each.requires_grad_() for each in rows.values()]
        loss = self._objective.loss(whole)
        value = fault_injection.tensor("step.backward", loss.value)
        split = (each.split(self._size) for each in torch.autograd.grad(value, leaves))
        gradients = [dict(zip(rows, piece)) for piece in zip(*split)]
        return whole, loss._replace(value=value.detach()), gradients

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


def make_inputs(augment: Augment, batch: Batch, step: int, rows: slice = slice(None)) -> Inputs:
    """What an objective sees of the images ``rows`` of a batch."""
    crops_BVHWC = batch.crops_BVHWC[rows]
    views_RCHW = augment(crops_BVHWC, batch.ids_B[rows], batch.position.epoch)
    return Inputs((views_RCHW.unflatten(0, (crops_BVHWC.shape[1], -1)),), step)


def _join(pieces: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([piece[name] for piece in pieces]).detach() for name in pieces[0]}


def _inner(gradient: dict[str, torch.Tensor], outputs: Outputs) -> torch.Tensor:
    """The inner product, whose derivative by the outputs' rows is ``gradient``, to the bit."""
    products = [(outputs.rows[name] * gradient[name]).sum() for name in gradient]
    return torch.stack(products).sum()

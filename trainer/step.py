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
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Protocol

import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from common import fault_injection
from data_pipeline.augment import Augment
from data_pipeline.reading.batch import Batch
from kernels.augment import to_device
from trainer.objectives.base import Inputs, Loss, Objective, Outputs
from trainer.parallel.micro_batch_norm import PieceStatistics

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


class Gradients(Protocol):
    """Leaves gradients in the parameters."""

    def __call__(self, batch: Batch, step: int) -> tuple[Outputs, Loss]:
        """From a batch and the number of steps done before it, gradients; its outputs and loss."""

    def outputs(self, batch: Batch, step: int) -> Outputs:
        """The outputs alone, without gradient; BatchNorm as in a step."""


@dataclass
class WholeBatch:
    """Gradients of a batch in one forward and one backward pass."""

    fabric: Fabric
    """Precision and gradient averaging."""
    objective: Objective
    """What is learnt."""
    model: _FabricModule
    """``objective`` as Fabric wraps it."""
    augment: Augment
    """Makes the views."""
    enter: Callable[[str], None] = lambda phase: None
    """Told which phase of the step begins; see :mod:`trainer.health.phases`."""

    def __call__(self, batch: Batch, step: int) -> tuple[Outputs, Loss]:
        """See :class:`Gradients`."""
        self.enter("augment")
        inputs = make_inputs(self.augment, batch, step)
        self.enter("forward")
        outputs: Outputs = self.model(inputs)
        loss = self.objective.loss(outputs, step)
        self.enter("backward")
        self.fabric.backward(fault_injection.tensor("step.backward", loss.value))
        return outputs, loss

    def outputs(self, batch: Batch, step: int) -> Outputs:
        """See :class:`Gradients`."""
        with torch.no_grad():
            outputs: Outputs = self.model(make_inputs(self.augment, batch, step))
        return outputs


@dataclass(kw_only=True)
class InPieces(WholeBatch):
    """The same gradients, ``size`` images of this process at a time.

    The objective's BatchNorm layers are all synchronised ones. A piece's views belong to its
    forward pass.
    """

    size: int
    """Images of a piece."""
    norm: MicroBatchNorm
    """exact takes BatchNorm's statistics over the global batch; piece over the piece (of all
    processes), in two forward passes instead of many."""
    reseed: Callable[[int, int], None]
    """Called with a step and the number of a piece before the piece's every forward pass, so that
    layers which draw random numbers draw the same again."""

    def __call__(self, batch: Batch, step: int) -> tuple[Outputs, Loss]:
        """See :class:`Gradients`."""
        forward, statistics, pieces = self._project(batch, step)
        whole, loss, gradients = self._loss(pieces, step)
        if self.norm == "exact":
            statistics.collect_gradient_sums(forward, [partial(_inner, g) for g in gradients])
        with statistics.known():
            for piece, gradient in enumerate(gradients):
                statistics.start_piece()
                # DDP averages gradients after the last piece, all pieces' at once.
                last = piece == len(pieces) - 1
                with self.fabric.no_backward_sync(self.model, enabled=not last):
                    outputs = self._forward(self.model, batch, step, piece)
                    self.enter("backward")
                    self.fabric.backward(_inner(gradient, outputs))
        return whole, loss

    def outputs(self, batch: Batch, step: int) -> Outputs:
        """See :class:`Gradients`."""
        _, _, pieces = self._project(batch, step)
        return Outputs(*(_join([piece[part] for piece in pieces]) for part in range(2)))

    def _project(
        self, batch: Batch, step: int
    ) -> tuple[Callable[[int], Outputs], PieceStatistics, list[Outputs]]:
        """The pieces' outputs without gradient, and what BatchNorm knows by them."""
        forward = partial(self._forward, self.objective, batch, step)
        statistics = PieceStatistics(self.objective, exact=self.norm == "exact")
        count = -(-len(batch.ids_B) // self.size)
        return forward, statistics, statistics.project(forward, count)

    def _forward(self, module: nn.Module, batch: Batch, step: int, piece: int) -> Outputs:
        self.enter("forward")
        self.reseed(step, piece)
        rows = slice(piece * self.size, (piece + 1) * self.size)
        inputs = make_inputs(self.augment, batch, step, rows)
        # Fabric's wrapper brings its own autocast.
        with nullcontext() if module is self.model else self.fabric.autocast():
            outputs: Outputs = module(inputs)
        return outputs

    def _loss(
        self, pieces: list[Outputs], step: int
    ) -> tuple[Outputs, Loss, list[dict[str, torch.Tensor]]]:
        """The whole batch's outputs and loss, and its derivative by the rows of every piece."""
        rows = _join([piece.rows for piece in pieces])
        whole = Outputs(rows, _join([piece.fixed for piece in pieces]))
        leaves = [each.requires_grad_() for each in rows.values()]
        loss = self.objective.loss(whole, step)
        value = fault_injection.tensor("step.backward", loss.value)
        split = (each.split(self.size) for each in torch.autograd.grad(value, leaves))
        gradients = [dict(zip(rows, piece)) for piece in zip(*split)]
        return whole, loss._replace(value=value.detach()), gradients


class RunningStatistics:
    """Those of every BatchNorm of a module, kept beside a step that may be left out.

    They move in the forward pass, before it is known whether the gradients are finite; one batch
    that is not would leave NaN in them for good.

    Args:
        module: its layers' buffers are looked up once; they must stay the same tensors.
    """

    def __init__(self, module: nn.Module) -> None:
        layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
        self._live = [buffer for layer in layers for buffer in layer.buffers(recurse=False)]
        self._kept = [buffer.clone() for buffer in self._live]

    @torch.no_grad()
    def keep(self) -> None:
        """Remember them, before a forward pass. Device work only."""
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    @torch.no_grad()
    def restore(self, skipped: torch.Tensor) -> None:
        """Put back what was kept, to the bit, where ``skipped`` (0-d, on the device) holds 1."""
        left_out = skipped.bool()
        for live, kept in zip(self._live, self._kept, strict=True):
            live.copy_(torch.where(left_out, kept, live))


def make_inputs(augment: Augment, batch: Batch, step: int, rows: slice = slice(None)) -> Inputs:
    """What an objective sees of the images ``rows`` of a batch."""
    crops, ids_N = [group[rows] for group in batch.crops], batch.ids_B[rows]
    replaced = torch.tensor([each.sample for each in batch.substitutes], dtype=torch.int64)
    device = crops[0].device
    return Inputs(
        augment.groups(crops, batch.drawn_by_B[rows], batch.position.epoch),
        to_device(ids_N, device),
        to_device(~torch.isin(ids_N, replaced), device),
        step,
        to_device(batch.labels_B[rows], device),
    )


def _join(pieces: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([piece[name] for piece in pieces]).detach() for name in pieces[0]}


def _inner(gradient: dict[str, torch.Tensor], outputs: Outputs) -> torch.Tensor:
    """The inner product, whose derivative by the outputs' rows is ``gradient``, to the bit."""
    products = [(outputs.rows[name] * gradient[name]).sum() for name in gradient]
    return torch.stack(products).sum()

"""BatchNorm over a batch that is never in memory as a whole: exact, at the price of more passes.

A batch is processed in pieces. The statistics of the l-th BatchNorm need the activations of *all*
pieces at that layer, and those need the statistics of the layers before it; backwards likewise. So
what L layers need is found one layer at a time, each time from the images on, and only sums of
a channel are kept:

1. For l = 1 ... L: every piece runs forward as far as layer l, with the statistics of the layers
   before it, and stops there; its moments join the layer's statistics. The last sweep reaches the
   end and gives the projections. No gradient is recorded.
2. The loss and its derivative by the projections.
3. For l = L ... 1: every piece runs forward again, records from the output of layer l on, and takes
   the derivative of the loss by that output; its two sums (of dy and of dy * xhat) join those of
   the layer, which the backward pass through the layers before it needs.
4. Every piece runs forward and backward as usual, with all statistics and sums known.

In forward passes over the batch that is L/2 for step 1, 3/2 L for step 3 (half of a forward pass's
worth of gradients by activations each) and 3 for step 4, where a step usually costs 3: some 15
times as much for ResNet-18 (L = 21 with the head's) and 38 times for ResNet-50 (L = 54). Memory is
that of one piece.

Shapes: C channels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trainer.parallel.sync_batch_norm import (
    Moments,
    Statistics,
    SyncBatchNorm,
    combine_moments,
    gradient_sums,
    local_moments,
    normalise,
    normalised_by,
    over_group,
)


class _StatisticsMissing(Exception):  # noqa: N818 - a signal, not an error
    """Ends a forward pass at the first layer whose statistics are not known."""

    def __init__(self, layer: SyncBatchNorm, moments: Moments) -> None:
        super().__init__()
        self.layer = layer
        self.moments = moments


class PieceStatistics:
    """Statistics of one batch for all synchronised BatchNorm layers of a module.

    Layers are known by the order of their calls, which must be the same for every piece. Made anew
    for every step.

    Args:
        module: every BatchNorm in it is a :class:`~trainer.parallel.sync_batch_norm.SyncBatchNorm`.
        exact: False takes each piece's own statistics instead (of all processes' pieces), in one
            sweep; another batch norm, with noisier statistics. Running statistics then follow
            every piece's.
    """

    def __init__(self, module: nn.Module, exact: bool = True) -> None:
        self._exact = exact
        self._layers = [m for m in module.modules() if isinstance(m, SyncBatchNorm)]
        self._statistics: list[Statistics] = []
        self._called: list[SyncBatchNorm] = []
        self._sums: dict[int, torch.Tensor] = {}
        self._next = 0
        self._updates_running = True
        self._leaf: int | None = None
        self._leaf_input: torch.Tensor | None = None
        self._leaf_output: torch.Tensor | None = None

    def project(self, forward: Callable[[int], Any], pieces: int) -> list[Any]:
        """Steps 1: all layers' statistics, and what ``forward`` returns for every piece.

        Args:
            forward: runs the module on the piece of this number, the same at every call.
            pieces: how many there are.

        Returns:
            The results, without gradient. Running statistics have been updated, once a layer.
        """
        with normalised_by(self._layers, self._normalise), torch.no_grad():
            while True:
                outputs, missing = [], []
                for piece in range(pieces):
                    self.start_piece()
                    try:
                        outputs.append(forward(piece))
                    except _StatisticsMissing as signal:
                        missing.append(signal.with_traceback(None))
                if not missing:
                    return outputs
                layer = missing[0].layer
                moments = combine_moments(*_stacked([m.moments for m in missing]))
                statistics = over_group(moments, layer.handle)
                layer.update_running(statistics)
                self._statistics.append(statistics)
                self._called.append(layer)

    def collect_gradient_sums(
        self, forward: Callable[[int], Any], losses: Sequence[Callable[[Any], torch.Tensor]]
    ) -> None:
        """Step 3: what the backward pass of every layer needs of the other pieces.

        Args:
            forward: as in :meth:`project`.
            losses: of what it returns for each piece, a number with the loss's derivative.
        """
        with normalised_by(self._layers, self._normalise), torch.no_grad():
            for index in reversed(range(len(self._statistics))):
                self._sums[index] = self._gradient_sums(index, forward, losses)

    @contextmanager
    def known(self) -> Iterator[None]:
        """Step 4: within, forward passes of pieces, and their backward passes, are the batch's."""
        self._updates_running = False
        with normalised_by(self._layers, self._normalise):
            yield

    def start_piece(self) -> None:
        """Say that the next layer called is a piece's first."""
        self._next = 0

    def _normalise(self, layer: SyncBatchNorm, x: torch.Tensor) -> torch.Tensor:
        """Forward pass of a layer; see :func:`trainer.parallel.sync_batch_norm.normalised_by`."""
        if not self._exact:
            return normalise(layer, x, layer.statistics(x, self._updates_running))
        index, self._next = self._next, self._next + 1
        if index >= len(self._statistics):
            raise _StatisticsMissing(layer, local_moments(x))
        y = normalise(layer, x, self._statistics[index], self._sums.get(index))
        if index == self._leaf:
            torch.set_grad_enabled(True)
            self._leaf_input, self._leaf_output = x, y.detach().requires_grad_()
            return self._leaf_output.clone()  # what follows may overwrite it
        return y

    def _gradient_sums(
        self,
        index: int,
        forward: Callable[[int], Any],
        losses: Sequence[Callable[[Any], torch.Tensor]],
    ) -> torch.Tensor:
        layer, statistics = self._called[index], self._statistics[index]
        sums_2C = statistics.mean.new_zeros(2, layer.num_features)
        for piece, loss in enumerate(losses):
            dy = self._output_gradient(index, forward, piece, loss)
            if dy is not None and self._leaf_input is not None:
                sums_2C += gradient_sums(dy, self._leaf_input, statistics, layer.eps)
        self._leaf_input = self._leaf_output = None
        layer.handle.add_up(sums_2C)
        return sums_2C

    def _output_gradient(
        self,
        index: int,
        forward: Callable[[int], Any],
        piece: int,
        loss: Callable[[Any], torch.Tensor],
    ) -> torch.Tensor | None:
        """The loss's derivative by a layer's output; none if the loss does not see it (keys)."""
        self.start_piece()
        self._leaf = index
        try:
            with torch.no_grad():  # what the layer switches on ends here
                value = loss(forward(piece))
        finally:
            self._leaf = None
        if not value.requires_grad or self._leaf_output is None:
            return None
        dy: torch.Tensor | None
        (dy,) = torch.autograd.grad(value, self._leaf_output, allow_unused=True)
        return dy


def _stacked(parts: Sequence[Moments]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    counts = torch.tensor([[part.values] for part in parts], dtype=torch.float64)
    mean_KC = torch.stack([part.mean for part in parts])
    return mean_KC, torch.stack([part.m2 for part in parts]), counts.to(mean_KC.device)

"""MoCo's loss and queue against lightly's, on one process. Needs the `bench` extra.

lightly has no loss of MoCo v3; tests/trainer/objectives/test_moco.py holds ours to plain torch.
"""

import pytest
import torch
from lightly.loss import NTXentLoss

from kernels.ntxent import info_nce
from kernels.ntxent.reference import unit_rows
from trainer.objectives.parts.key_queue import KeyQueue

SIZE, BATCH, DIM = 24, 8, 16  # lightly's memory bank drops rows unless the batch divides its size


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_loss_gradient_and_queue_are_lightlys(temperature: float) -> None:
    torch.manual_seed(0)
    peer = NTXentLoss(temperature=temperature, memory_bank_size=(SIZE, DIM))
    queue = KeyQueue(SIZE, DIM)
    queue.rows.copy_(peer.memory_bank.bank)
    for _ in range(7):  # more than twice around
        keys = torch.randn(BATCH, DIM)
        theirs = (keys + torch.randn(BATCH, DIM)).requires_grad_()
        ours = theirs.detach().clone().requires_grad_()
        their_loss = peer(theirs, keys)
        our_loss, _ = info_nce(ours, keys, temperature, queue_QD=queue.rows)
        their_loss.backward()
        our_loss.backward()
        assert our_loss.item() == pytest.approx(their_loss.item(), abs=1e-5)
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
        queue.push(unit_rows(keys), torch.zeros(()))
        assert torch.allclose(queue.rows, peer.memory_bank.bank, atol=1e-6)

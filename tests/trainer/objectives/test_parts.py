"""Means over all processes, rows by sample, key encoders."""

import pytest
import torch
from torch import nn

from tests.dist import run_ranks
from trainer.objectives.parts.global_mean import global_mean
from trainer.objectives.parts.key_encoder import KeyEncoder
from trainer.objectives.parts.per_sample import PerSample

TAKEN, LEFT_OUT = torch.tensor(0.0), torch.tensor(1.0)


# --- means ---


def _mean(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    values = torch.arange(12.0).view(6, 2).square().chunk(world_size)[rank].clone()
    values.requires_grad_()
    means = global_mean(values)
    (means * torch.tensor([1.0, 10.0])).sum().backward()
    return {"means": means.detach(), "gradient": values.grad}  # type: ignore[dict-item]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_mean_is_that_of_all_images_and_ddps_mean_its_gradient(world_size: int) -> None:
    for found in run_ranks(_mean, world_size):
        assert torch.equal(found["means"], torch.arange(12.0).view(6, 2).square().mean(0))
        # W times the derivative of the global mean, which DDP divides by W again.
        expected = world_size * torch.tensor([[1.0, 10.0]]).expand(6 // world_size, 2) / 6
        torch.testing.assert_close(found["gradient"], expected)


# --- rows by sample ---


def _write(rank: int, world_size: int) -> torch.Tensor:
    table = PerSample(torch.zeros(7, 2))
    ids = torch.tensor([5, 0, 3, 6]).chunk(world_size)[rank]
    genuine = torch.tensor([True, True, False, True]).chunk(world_size)[rank]
    table.write(ids, torch.stack([ids, ids + 0.5], 1), genuine, TAKEN)
    table.write(ids, torch.full((len(ids), 2), 9.0), genuine, LEFT_OUT)
    return table.rows


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_process_has_the_rows_of_all_and_damaged_samples_and_skipped_steps_none(
    world_size: int,
) -> None:
    expected = torch.zeros(7, 2)
    for sample in (5, 0, 6):  # 3 is damaged: another image stood in its place
        expected[sample] = torch.tensor([sample, sample + 0.5])
    for rows in run_ranks(_write, world_size):
        assert torch.equal(rows, expected)


# --- key encoders ---


def test_a_momentum_of_one_keeps_the_keys_whatever_the_queries_hold() -> None:
    encoder, head = nn.Linear(2, 2), nn.Linear(2, 2)
    keys = KeyEncoder(encoder, head)
    before = [key.clone() for key in keys.parameters()]
    nn.init.constant_(encoder.weight, torch.nan)
    keys.follow(encoder, head, 1.0, TAKEN)
    assert all(torch.equal(key, old) for key, old in zip(keys.parameters(), before))

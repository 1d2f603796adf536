"""Where a run does not fit, the plan says what to change, and that change fits."""

import dataclasses

from tests.trainer.plans import MIB, plan, small, tiny_gpu
from trainer.planner.table import table


def test_what_does_not_fit_gets_a_micro_batch_and_a_number_of_gpus_that_do() -> None:
    config = small(batch=1024)
    needed = plan(config, gpus=2, rates=tiny_gpu(1e6)).memory.total
    tight = tiny_gpu(0.6 * needed / MIB)
    found = plan(config, gpus=2, rates=tight)
    assert not found.fits
    assert found.remedy is not None
    assert "DOES NOT FIT" in table(found)
    piece = found.remedy.micro_batch
    assert 0 < piece < 512
    assert plan(dataclasses.replace(config, micro_batch=piece), gpus=2, rates=tight).fits
    larger = dataclasses.replace(config, micro_batch=piece + 32)
    assert not plan(larger, gpus=2, rates=tight).fits
    enough = found.remedy.gpus
    assert enough > 2
    assert enough % 2 == 0
    assert plan(config, nodes=enough // 2, gpus=2, rates=tight).fits
    assert not plan(config, nodes=enough // 2 - 1 or 1, gpus=2, rates=tight).fits


def test_what_nothing_helps_is_said() -> None:
    found = plan(small(batch=64), rates=tiny_gpu(0.01))
    assert found.remedy is not None
    assert (found.remedy.gpus, found.remedy.micro_batch) == (0, 0)
    assert "smaller encoder" in table(found)


def test_what_fits_gets_no_advice() -> None:
    found = plan(small(batch=64))
    assert found.fits
    assert found.remedy is None
    assert "fits" in table(found)

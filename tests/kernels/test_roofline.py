"""The page of counts says what the code counts, and the counts are those of the formulas."""

from pathlib import Path

import pytest
import torch

from benchmarks import roofline
from benchmarks.roofline import GPUS, augmentation, ntxent, tables
from kernels.ntxent.triton import MAX_GROUPS, tile_config

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


def test_the_page_holds_the_tables_as_they_are_computed() -> None:
    page = PAGE.read_text()
    for table in tables().split("\n\n"):
        assert table in page, "docs/kernels.md: put in what `python benchmarks/roofline.py` prints"


@pytest.mark.parametrize("rows", [4096, 65536])
def test_a_step_takes_five_products_and_three_halves_exponentials_a_pair(rows: int) -> None:
    count = ntxent(rows, 128)
    assert count.flops == pytest.approx(5 * rows**2 * 128, rel=0.01)
    assert count.exponentials == pytest.approx(1.5 * rows**2, rel=0.02)


def test_memory_grows_with_the_rows_and_not_with_their_square() -> None:
    assert ntxent(262144).memory == pytest.approx(4 * ntxent(65536).memory)


def test_tiles_are_those_of_the_launches() -> None:
    tiles = tile_config(128, torch.bfloat16, (9, 0))
    assert (tiles.own_block.rows, tiles.rectangle.rows) == (roofline.OWN_BLOCK, roofline.BLOCK)
    assert (tiles.gradient.rows, MAX_GROUPS) == (roofline.BLOCK, roofline.GROUPS)


def test_no_time_is_shorter_than_its_products_take() -> None:
    for gpu in GPUS:
        least, in_turn = ntxent(32768).seconds(gpu)
        assert in_turn >= least >= ntxent(32768).flops / gpu.flops


def test_traffic_is_the_floor_while_the_cache_holds_what_is_in_work() -> None:
    for dtype, floor in ((torch.bfloat16, 9), (torch.float16, 9), (torch.float32, 15)):
        traffic = augmentation(1024, 224, dtype)
        assert traffic.floor == floor * 1024 * 224 * 224
        assert traffic.planned < 1.001 * traffic.floor
        assert traffic.uncached > traffic.planned
        assert traffic.cache < 40e6  # A100 has 40 MB, H100 50 MB
    assert augmentation(0, 224, torch.bfloat16) == (0, 0, 0, 0)
    sharp = augmentation(8, 32, torch.float32, p_blur=0.0, p_contrast=0.0)
    assert sharp.uncached == sharp.planned

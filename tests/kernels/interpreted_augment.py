"""The Triton augmentation against the reference in float64; run by ``test_augment_triton.py``."""

import logging
from itertools import cycle, permutations, product

import numpy as np
import pytest
import torch

from data_pipeline.augment import (
    Augment,
    mocov3_views,
)
from kernels import dispatch
from kernels.augment import (
    Column,
    Jitter,
    augment,
    gaussian_half_kernels,
    identity_table,
)
from kernels.augment.plan import plan_launch

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
JITTERS = (Jitter.BRIGHTNESS, Jitter.CONTRAST, Jitter.SATURATION, Jitter.HUE)


def crops(rows: int, height: int, width: int, views: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + 7 * height)
    shape = (rows, views, height, width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def random_table(rows: int, radius: int, seed: int = 0) -> np.ndarray:
    """Everything on, in random order and strength."""
    rng = np.random.default_rng(seed)
    table = identity_table(rows, radius)
    table[:, Column.JITTER : Column.JITTER + 4] = rng.permuted(np.tile(JITTERS, (rows, 1)), axis=1)
    table[:, Column.BRIGHTNESS : Column.SATURATION + 1] = rng.uniform(0.2, 1.8, (rows, 3))
    table[:, Column.HUE] = rng.uniform(-0.5, 0.5, rows)
    table[:, Column.BLUR :] = gaussian_half_kernels(
        torch.from_numpy(rng.uniform(0.3, 2.0, rows)), radius
    )
    # Where solarisation is continuous: elsewhere a last bit decides between x and 1 - x.
    table[:, Column.SOLARIZE] = 0.5
    table[:, Column.FLIP] = 1
    table[::3, Column.GRAYSCALE] = 1
    return table


def run(
    images: torch.Tensor,
    table: np.ndarray | torch.Tensor,
    dtype: torch.dtype = torch.float32,
    implementation: str = "triton",
) -> torch.Tensor:
    return augment(
        images,
        table,  # type: ignore[arg-type]
        mean=MEAN,
        std=STD,
        dtype=dtype,
        implementation=implementation,  # type: ignore[arg-type]
    )


def assert_as_accurate_as_torch(images: torch.Tensor, table: np.ndarray) -> None:
    exact = run(images, table, torch.float64, "reference")
    plain = (run(images, table, implementation="reference") - exact).abs().max()
    ours = (run(images, table) - exact).abs().max()
    assert ours <= 2 * plain, f"off by {ours:.2e}, plain torch by {plain:.2e}"


def test_every_order_of_jitter_and_every_combination_of_the_rest() -> None:
    switches = cycle(product((False, True), repeat=4))
    orders = list(permutations(JITTERS))
    table = random_table(len(orders), 2)
    for row, order, (gray, blur, solarize, flip) in zip(table, orders, switches):
        row[Column.JITTER : Column.JITTER + 4] = order
        row[Column.GRAYSCALE], row[Column.FLIP] = gray, flip
        if not blur:
            row[Column.BLUR :] = identity_table(1, 2)[0, Column.BLUR :]
        if not solarize:
            row[Column.SOLARIZE] = np.inf
    assert_as_accurate_as_torch(crops(len(table), 6, 9), table)


def test_steps_left_out_of_the_jitter_are_left_out() -> None:
    subsets = np.array(list(product((False, True), repeat=4)))
    table = random_table(len(subsets), 0, seed=1)
    table[:, Column.JITTER : Column.JITTER + 4] *= subsets
    assert_as_accurate_as_torch(crops(len(table), 5, 7), table)


@pytest.mark.parametrize(
    ("height", "width", "radius", "rows"),
    [
        (1, 1, 0, 12),
        (1, 3, 0, 4),
        (5, 6, 4, 2),  # the widest blur that reflects
        (13, 11, 1, 2),
        (27, 77, 3, 1),  # two strips, the ring is the image
        (70, 90, 6, 1),  # four strips, the ring wraps
    ],
)
def test_sizes(height: int, width: int, radius: int, rows: int) -> None:
    assert_as_accurate_as_torch(crops(rows, height, width), random_table(rows, radius))


def test_a_ring_that_wraps_is_among_the_sizes() -> None:
    launch = plan_launch(70, 90, 6)
    assert launch.strip * 3 < 70
    assert launch.ring < 70


@pytest.mark.slow
@pytest.mark.parametrize(
    ("height", "width", "radius"),
    [(96, 96, 4), (97, 131, 11), (224, 224, 11), (224, 31, 11), (31, 224, 11), (64, 64, 63)],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_more_sizes(height: int, width: int, radius: int, seed: int) -> None:
    assert_as_accurate_as_torch(crops(1, height, width), random_table(1, radius, seed))


def test_colours_on_a_lattice_of_all_ties_between_channels() -> None:
    levels = torch.tensor([0, 1, 100, 128, 254, 255], dtype=torch.uint8)
    image = torch.cartesian_prod(levels, levels, levels).reshape(1, 1, 12, 18, 3)
    turns = (-0.5, -0.2, 0.0, 1 / 6, 0.5)
    table = identity_table(len(turns))
    table[:, Column.JITTER] = Jitter.HUE
    table[:, Column.HUE] = turns
    assert_as_accurate_as_torch(image.expand(len(turns), -1, -1, -1, -1), table)


def test_half_precision_is_the_float32_result_rounded_once() -> None:
    images, table = crops(2, 9, 10), random_table(2, 2)
    exact = run(images, table)
    assert torch.equal(run(images, table, torch.float16), exact.half())
    # The interpreter cuts bfloat16 off where a GPU rounds (test_augment_triton.py looks at the
    # instruction): what is left to show here is that nothing else differs.
    cut = (exact.view(torch.int32) & -0x10000).view(torch.float32)
    assert torch.equal(run(images, table, torch.bfloat16).float(), cut)


def test_an_image_is_byte_equal_in_every_batch() -> None:
    images, table = crops(4, 6, 7), random_table(4, 2)
    table[1, Column.BLUR :] = identity_table(1, 2)[0, Column.BLUR :]
    whole = run(images, table)
    for size in (1, 3):
        parts = [
            run(images[i : i + size], table[i : i + size]) for i in range(0, len(images), size)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_rows_are_view_major_and_memory_channels_last() -> None:
    images = crops(3, 4, 5, views=2)
    table = identity_table(6)
    table[3:, Column.FLIP] = 1  # all of the second view
    out = augment(images, table, implementation="triton")
    assert out.is_contiguous(memory_format=torch.channels_last)
    for sample in range(3):
        first, second = images[sample].permute(0, 3, 1, 2) / 255
        torch.testing.assert_close(out[sample], first)
        torch.testing.assert_close(out[3 + sample], second.flip(2))


def test_crops_need_not_be_contiguous_and_stay_as_they_were() -> None:
    images, table = crops(2, 9, 20), random_table(2, 2)
    part, before = images[:, :, :, ::2], images.clone()
    assert torch.equal(run(part, table), run(part.contiguous(), table))
    assert torch.equal(images, before)


def test_an_empty_batch_gives_an_empty_batch() -> None:
    out = run(crops(1, 6, 5)[:0], identity_table(0))
    assert out.shape == (0, 3, 6, 5)
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_a_blur_too_narrow_to_see_is_left_out() -> None:
    table = identity_table(1, 2)
    table[0, Column.BLUR :] = gaussian_half_kernels(torch.tensor([0.05]).double(), 2)
    images = crops(1, 6, 5)
    assert torch.equal(run(images, table), run(images, identity_table(1)))


def test_the_choice_is_recorded(caplog: pytest.LogCaptureFixture) -> None:
    dispatch._say.cache_clear()
    with caplog.at_level(logging.DEBUG, logger="kernels.dispatch"):
        run(crops(1, 3, 3), identity_table(1))
    assert "augment: triton: as asked" in caplog.messages


def test_wrong_tables_are_refused() -> None:
    images, table = crops(1, 3, 3), torch.zeros(1, 12)
    for wrong in (table.double(), table[0], table.repeat(1, 2)[:, ::2]):
        with pytest.raises(ValueError, match="must be float32"):
            run(images, wrong)
    with pytest.raises(ValueError, match="takes a table on the host"):
        run(images, table, implementation="cpu")
    with pytest.raises(ValueError, match="float32, not float64"):
        run(images, identity_table(1), torch.float64)


def test_a_pipeline_on_the_kernel_makes_the_views_of_one_on_the_host() -> None:
    images, ids = crops(5, 16, 16, views=2), torch.tensor([3, 1, 4, 1, 2**40])
    made = [
        Augment(mocov3_views(), 7, implementation=name)(images, ids, 2)  # type: ignore[arg-type]
        for name in ("triton", "reference")
    ]
    torch.testing.assert_close(*made, rtol=1e-5, atol=1e-5)

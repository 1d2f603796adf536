"""Every operation, order and combination against torchvision, image by image."""

import hashlib
import os
import subprocess
import sys
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F
from torchvision.transforms.v2.functional._color import _hsv_to_rgb, _rgb_to_hsv

from kernels.augment import (
    Column,
    Implementation,
    Jitter,
    augment,
    choose,
    gaussian_half_kernels,
    identity_table,
)

IMPLEMENTATIONS: tuple[Implementation, ...] = ("cpu", "reference")
JITTERS = (Jitter.BRIGHTNESS, Jitter.CONTRAST, Jitter.SATURATION, Jitter.HUE)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
RADIUS = 2
HEIGHT, WIDTH = 11, 14

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def crops(rows: int, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    shape = (rows, 1, height, width, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def rgb_lattice() -> torch.Tensor:
    """One image with all ties between channels, grays, black, white and the pure colours."""
    levels = torch.arange(0, 256, 15, dtype=torch.uint8)  # 18, 0 and 255 included
    return torch.cartesian_prod(levels, levels, levels).reshape(1, 1, 72, 81, 3)


def random_table(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Everything turned on in random order and strength, and the sigmas of the blur."""
    rng = np.random.default_rng(seed)
    table = identity_table(rows, RADIUS)
    table[:, Column.JITTER : Column.JITTER + 4] = rng.permuted(np.tile(JITTERS, (rows, 1)), axis=1)
    table[:, Column.BRIGHTNESS : Column.SATURATION + 1] = rng.uniform(0.2, 1.8, (rows, 3))
    table[:, Column.HUE] = rng.uniform(-0.5, 0.5, rows)
    sigmas = rng.uniform(0.1, 2.0, rows)
    table[:, Column.BLUR :] = gaussian_half_kernels(torch.from_numpy(sigmas), RADIUS)
    # Where solarisation is continuous: elsewhere a last bit decides between x and 1 - x.
    table[:, Column.SOLARIZE] = 0.5
    table[:, Column.FLIP] = 1
    table[:, Column.GRAYSCALE] = 1
    return table, sigmas


def adjust_hue(image: torch.Tensor, turns: float) -> torch.Tensor:
    """torchvision's; it goes through float32 whatever it is given, so its parts for float64."""
    if image.dtype == torch.float32:
        return F.adjust_hue(image, turns)
    hue, saturation, value = _rgb_to_hsv(image).unbind(-3)
    return _hsv_to_rgb(torch.stack(((hue + turns).remainder(1.0), saturation, value), dim=-3))


def torchvision_view(
    crop_HWC: torch.Tensor, row: np.ndarray, sigma: float | None, dtype: torch.dtype
) -> torch.Tensor:
    image = F.to_dtype(crop_HWC.permute(2, 0, 1), dtype, scale=True)
    adjust = {
        Jitter.BRIGHTNESS: F.adjust_brightness,
        Jitter.CONTRAST: F.adjust_contrast,
        Jitter.SATURATION: F.adjust_saturation,
        Jitter.HUE: adjust_hue,
    }
    for code in row[Column.JITTER : Column.JITTER + 4]:
        if code:
            image = adjust[Jitter(int(code))](image, row[Column[Jitter(int(code)).name]])
    if row[Column.GRAYSCALE]:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if sigma is not None:
        image = F.gaussian_blur(image, [2 * RADIUS + 1] * 2, [sigma, sigma])
    if np.isfinite(row[Column.SOLARIZE]):
        image = F.solarize(image, row[Column.SOLARIZE])
    if row[Column.FLIP]:
        image = F.horizontal_flip(image)
    return F.normalize(image, MEAN, STD)


def assert_same_as_torchvision(
    crops_R1HWC: torch.Tensor,
    table: np.ndarray,
    sigmas: list[float | None],
    implementation: Implementation,
    dtype: torch.dtype,
) -> None:
    ours = augment(
        crops_R1HWC, table, mean=MEAN, std=STD, dtype=dtype, implementation=implementation
    )
    theirs = torch.stack(
        [
            torchvision_view(crop[0], row, sigma, dtype)
            for crop, row, sigma in zip(crops_R1HWC, table, sigmas)
        ]
    )
    # Before division by a deviation of 0.2: bounds are on the pixels in [0, 1].
    scale = torch.tensor(STD, dtype=dtype)[:, None, None]
    error = ((ours - theirs) * scale).abs().amax((1, 2, 3))
    assert ours.dtype == dtype
    assert error.max() < TOLERANCE[dtype], f"row {int(error.argmax())} is off by {error.max():.2e}"


FACTORS = {
    "brightness": (0.0, 0.3, 1.0, 1.8),
    "contrast": (0.0, 0.3, 1.0, 1.8),
    "saturation": (0.0, 0.3, 1.0, 1.8),
    "hue": (-0.5, -0.2, -0.01, 0.0, 0.05, 1 / 6, 1 / 3, 0.5),
}


@both
@precisions
@pytest.mark.parametrize("name", FACTORS)
def test_jitter_operation_equals_torchvision_on_every_kind_of_colour(name, implementation, dtype):
    factors = FACTORS[name]
    table = identity_table(len(factors))
    table[:, Column.JITTER + 2] = Jitter[name.upper()]
    table[:, Column[name.upper()]] = factors
    images = rgb_lattice().expand(len(factors), -1, -1, -1, -1)
    assert_same_as_torchvision(images, table, [None] * len(factors), implementation, dtype)


@both
@precisions
@pytest.mark.parametrize("threshold", [0.0, 0.3, 128 / 255, 1.0])
def test_solarise_equals_torchvision_at_and_beside_the_threshold(threshold, implementation, dtype):
    table = identity_table(1)
    table[:, Column.SOLARIZE] = threshold
    assert_same_as_torchvision(rgb_lattice(), table, [None], implementation, dtype)


@both
@precisions
def test_grayscale_and_flip_equal_torchvision(implementation, dtype):
    table = identity_table(4)
    table[1::2, Column.GRAYSCALE] = 1
    table[2:, Column.FLIP] = 1
    assert_same_as_torchvision(crops(4), table, [None] * 4, implementation, dtype)


@both
@precisions
@pytest.mark.parametrize(
    ("height", "width", "radius"), [(32, 32, 1), (11, 14, 2), (5, 6, 4), (24, 8, 7), (30, 31, 11)]
)
def test_blur_equals_torchvision_up_to_the_widest_kernel_an_image_reflects(
    height, width, radius, implementation, dtype
):
    sigmas = np.array([0.05, 0.1, 0.3, 0.7, 1.3, 2.0, 9.0])
    table = identity_table(len(sigmas), radius)
    table[:, Column.BLUR :] = gaussian_half_kernels(torch.from_numpy(sigmas), radius)
    images = crops(len(sigmas), height, width)
    ours = augment(images, table, dtype=dtype, implementation=implementation)
    for crop, sigma, blurred in zip(images[:, 0], sigmas, ours):
        image = F.to_dtype(crop.permute(2, 0, 1), dtype, scale=True)
        theirs = F.gaussian_blur(image, [2 * radius + 1] * 2, [sigma, sigma])
        bound = 3e-6 if dtype == torch.float32 else 1e-14
        torch.testing.assert_close(blurred, theirs, rtol=0, atol=bound)


@pytest.mark.processors
@both
@precisions
def test_every_order_and_combination_equals_torchvision(implementation, dtype):
    orders = list(permutations(JITTERS))
    switches = list(product((False, True), repeat=4))
    table, sigmas = random_table(len(orders) * len(switches))
    drawn: list[float | None] = list(sigmas)
    for number, (order, (gray, blur, solarize, flip)) in enumerate(product(orders, switches)):
        row = table[number]
        row[Column.JITTER : Column.JITTER + 4] = order
        row[Column.GRAYSCALE], row[Column.FLIP] = gray, flip
        if not blur:
            row[Column.BLUR :] = identity_table(1, RADIUS)[0, Column.BLUR :]
            drawn[number] = None
        if not solarize:
            row[Column.SOLARIZE] = np.inf
    assert_same_as_torchvision(crops(len(table)), table, drawn, implementation, dtype)


@both
@precisions
def test_operations_left_out_of_the_jitter_are_left_out(implementation, dtype):
    subsets = list(product((False, True), repeat=4))
    table, sigmas = random_table(len(subsets), seed=1)
    table[:, Column.JITTER : Column.JITTER + 4] *= np.array(subsets)
    assert_same_as_torchvision(crops(len(table)), table, list(sigmas), implementation, dtype)


@pytest.mark.processors
def test_the_implementations_agree_to_the_last_digits_of_float64():
    table, _ = random_table(200)
    images = crops(200, 20, 23)
    one, other = (
        augment(images, table, dtype=torch.float64, implementation=name) for name in IMPLEMENTATIONS
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@both
@pytest.mark.parametrize("side", [13, 64])
@pytest.mark.parametrize("threads", [1, 2])
def test_an_image_is_byte_equal_in_every_batch(side, threads, implementation):
    rows = 24
    table, _ = random_table(rows)
    table[::3, Column.GRAYSCALE] = 0
    table[::5, Column.BLUR :] = identity_table(1, RADIUS)[0, Column.BLUR :]
    images = crops(rows, side, side)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = augment(images, table, mean=MEAN, std=STD, implementation=implementation)
        for size in (1, 2, 3, 6):
            parts = [
                augment(
                    images[first : first + size],
                    table[first : first + size],
                    mean=MEAN,
                    std=STD,
                    implementation=implementation,
                )
                for first in range(0, rows, size)
            ]
            assert torch.equal(torch.cat(parts), whole), f"batches of {size}"
    finally:
        torch.set_num_threads(before)


def digest() -> str:
    """Of all operations together, on images whose sizes leave a remainder and on others."""
    found = hashlib.sha256()
    for side in (19, 32, 64):
        table, _ = random_table(24)
        views = augment(crops(24, side, side), table, mean=MEAN, std=STD, implementation="cpu")
        found.update(views.contiguous().numpy().tobytes())
    return found.hexdigest()


def test_the_first_run_on_a_machine_has_the_bits_of_those_that_find_its_code(tmp_path: Path):
    command = [sys.executable, "-c", "import tests.kernels.test_augment as t; print(t.digest())"]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    compiled, found = (
        subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=240
        ).stdout
        for _ in range(2)
    )
    assert list(tmp_path.rglob("*.nbc")), "nothing was left for the second"
    assert compiled == found


@both
def test_rows_are_view_major_and_memory_channels_last(implementation):
    samples, views = 3, 2
    images = crops(samples * views).reshape(samples, views, HEIGHT, WIDTH, 3)
    table = identity_table(samples * views)
    table[samples:, Column.FLIP] = 1  # all of the second view
    out = augment(images, table, implementation=implementation)
    assert out.shape == (samples * views, 3, HEIGHT, WIDTH)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for sample in range(samples):
        first = images[sample, 0].permute(2, 0, 1) / 255
        second = images[sample, 1].permute(2, 0, 1).flip(2) / 255
        torch.testing.assert_close(out[sample], first)
        torch.testing.assert_close(out[samples + sample], second)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_the_float32_result_rounded_once(dtype, implementation):
    table, _ = random_table(12)
    exact = augment(crops(12), table, mean=MEAN, std=STD, implementation=implementation)
    half = augment(crops(12), table, mean=MEAN, std=STD, dtype=dtype, implementation=implementation)
    assert torch.equal(half, exact.to(dtype))
    assert half.is_contiguous(memory_format=torch.channels_last)


@both
def test_inputs_are_left_as_they_were(implementation):
    images, (table, _) = crops(6), random_table(6)
    images_before, table_before = images.clone(), table.copy()
    augment(images, table, mean=MEAN, std=STD, implementation=implementation)
    assert torch.equal(images, images_before)
    np.testing.assert_array_equal(table, table_before)


@both
def test_crops_need_not_be_contiguous(implementation):
    table, _ = random_table(4)
    images = crops(4, HEIGHT, 2 * WIDTH)
    part = images[:, :, :, ::2]
    one = augment(part, table, implementation=implementation)
    other = augment(part.contiguous(), table, implementation=implementation)
    assert torch.equal(one, other)


def test_the_reference_never_asks_the_device_for_a_value():
    # A meta tensor has no values: whatever would wait for a GPU raises here.
    table, _ = random_table(6)
    out = augment(crops(6).to("meta"), table, mean=MEAN, std=STD, dtype=torch.bfloat16)
    assert out.shape == (6, 3, HEIGHT, WIDTH)
    assert out.device.type == "meta"
    assert out.dtype == torch.bfloat16


def test_an_empty_batch_gives_an_empty_batch():
    for implementation in IMPLEMENTATIONS:
        out = augment(crops(3)[:0], identity_table(0), implementation=implementation)
        assert out.shape == (0, 3, HEIGHT, WIDTH)


def test_half_kernels_are_normalised_and_do_not_depend_on_each_other():
    sigmas = torch.linspace(0.1, 2.0, 37, dtype=torch.float64)
    together = gaussian_half_kernels(sigmas, 11)
    np.testing.assert_allclose(2 * together.sum(1) - together[:, 0], 1.0, rtol=1e-14)
    for number, sigma in enumerate(sigmas):
        np.testing.assert_array_equal(gaussian_half_kernels(sigma[None], 11)[0], together[number])


@pytest.mark.parametrize(
    ("images", "table", "message"),
    [
        (crops(2).float(), identity_table(2), "must be uint8"),
        (crops(2)[0], identity_table(1), "must be uint8"),
        (crops(2).transpose(2, 4), identity_table(2), "must be uint8"),
        (crops(2), identity_table(3), "rows of parameters"),
        (crops(2), identity_table(2).astype(np.float32), "must be float64"),
        (crops(2), identity_table(2, HEIGHT), "cannot reflect"),
        (crops(2), identity_table(2)[:, :5], "cannot reflect"),
    ],
)
def test_wrong_inputs_are_refused(images, table, message):
    with pytest.raises(ValueError, match=message):
        augment(images, table)


@pytest.mark.parametrize("std", [(0.2, 0.0, 0.2), (0.2, np.nan, 0.2), (0.2, -0.2, 0.2)])
def test_what_cannot_be_divided_by_is_refused(std: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="cannot normalise"):
        augment(crops(1), identity_table(1), std=std)


def test_choice_is_explained_and_an_impossible_one_refused():
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    for device, asked, dtype, name in (
        (cpu, "auto", torch.float32, "cpu"),
        (cuda, "auto", torch.float32, "triton"),
        (cuda, "auto", torch.float64, "reference"),
        (cpu, "reference", torch.float32, "reference"),
    ):
        assert choose(device, asked, dtype).implementation == name
    for device, asked, said in (
        (cuda, "cpu", "cannot run on cuda"),
        (cpu, "triton", "does not run on cpu"),
        (cpu, "magic", "no implementation"),
    ):
        with pytest.raises(ValueError, match=said):
            choose(device, asked, torch.float32)
    with pytest.raises(ValueError, match="dtype"):
        augment(crops(1), identity_table(1), dtype=torch.int32)

"""What is drawn, from what it is drawn, and that views do not know about batches."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from common.errors import ConfigError
from common.randomness import Stream, sample_keys, uniforms
from data_pipeline.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Augment,
    AugmentConfig,
    ViewConfig,
    draw_parameters,
    mocov2_views,
    mocov3_views,
    simclr_views,
)
from kernels.augment import Column, Jitter

VIEWS = ("view1", "view2")
N = 20_000
# Draws are fixed by the seed, so these never flicker; the bounds are those of a fair generator.
ECDF_BOUND = 1.95 / N**0.5  # Kolmogorov-Smirnov, p about 0.001
CORRELATION_BOUND = 4.5 / N**0.5


def draw(config: AugmentConfig, seed: int = 1, epoch: int = 0, side: int = 224) -> np.ndarray:
    """Columns of the table as ``(views, N, P)`` for ids 0 to N."""
    looks = config.view1, config.view2
    table = draw_parameters(looks, seed, epoch, torch.arange(N), side=side).numpy()
    return table.reshape(2, N, -1)


def crops(samples: int, side: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    shape = (samples, 2, side, side, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    assert values.min() >= low
    assert values.max() <= high
    ranks = np.sort((values - low) / (high - low))
    assert (
        np.abs(ranks - (np.arange(len(ranks)) + 0.5) / len(ranks)).max()
        < ECDF_BOUND * (N / len(ranks)) ** 0.5
    )


def assert_rate(drawn: np.ndarray, probability: float) -> None:
    bound = 4 * (probability * (1 - probability) / drawn.size) ** 0.5
    assert abs(drawn.mean() - probability) <= bound


def test_presets_are_the_papers():
    simclr = ViewConfig(
        flip=0.5,
        jitter=0.8,
        brightness=0.8,
        contrast=0.8,
        saturation=0.8,
        hue=0.2,
        grayscale=0.2,
        blur=0.5,
        blur_sigma=(0.1, 2.0),
        blur_kernel=0.1,
        solarize=0.0,
    )
    assert simclr_views() == AugmentConfig(view1=simclr, view2=simclr)
    cifar = replace(simclr, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.0)
    assert simclr_views(strength=0.5, blur=False) == AugmentConfig(view1=cifar, view2=cifar)

    moco = replace(simclr, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
    assert mocov2_views() == AugmentConfig(view1=moco, view2=moco)

    moco = replace(moco, saturation=0.2)
    assert mocov3_views() == AugmentConfig(
        view1=replace(moco, blur=1.0), view2=replace(moco, blur=0.1, solarize=0.2)
    )


def test_blur_kernel_is_a_tenth_of_the_side_made_odd():
    widths = {side: 2 * ViewConfig().blur_radius(side) + 1 for side in (8, 32, 64, 96, 224, 230)}
    assert widths == {8: 1, 32: 3, 64: 7, 96: 9, 224: 23, 230: 23}
    assert ViewConfig(blur_kernel=0.29).blur_radius(200) == 29  # 0.29 * 200 is 57.999...


@pytest.mark.parametrize("config", [simclr_views(), mocov2_views(), mocov3_views()])
def test_every_operation_is_drawn_as_often_as_configured(config):
    # The narrowest kernels round to a point and could not be counted.
    wide = {name: replace(getattr(config, name), blur_sigma=(0.5, 2.0)) for name in VIEWS}
    for view, table in zip((config.view1, config.view2), draw(AugmentConfig(**wide))):
        assert_rate(table[:, Column.FLIP], view.flip)
        assert_rate(table[:, Column.JITTER] != Jitter.NONE, view.jitter)
        assert_rate(table[:, Column.GRAYSCALE], view.grayscale)
        assert_rate(table[:, Column.BLUR] != 1, view.blur)
        assert_rate(np.isfinite(table[:, Column.SOLARIZE]), view.solarize)


def test_jitter_factors_are_uniform_over_their_ranges():
    spreads = ViewConfig(brightness=0.4, contrast=0.8, saturation=1.7, hue=0.3)
    for table in draw(AugmentConfig(view1=spreads, view2=spreads)):
        assert_uniform(table[:, Column.BRIGHTNESS], 0.6, 1.4)
        assert_uniform(table[:, Column.CONTRAST], 0.2, 1.8)
        assert_uniform(table[:, Column.SATURATION], 0.0, 2.7)  # never below 0
        assert_uniform(table[:, Column.HUE], -0.3, 0.3)


def test_every_sample_has_its_own_sigma_uniform_over_its_range():
    view = ViewConfig(blur=1.0, blur_sigma=(0.5, 2.0))
    table = draw(AugmentConfig(view1=view, view2=view))[0]
    # Neighbour over centre is exp(-1 / (2 sigma^2)).
    ratio = table[:, Column.BLUR + 1] / table[:, Column.BLUR]
    assert_uniform(np.sqrt(-0.5 / np.log(ratio)), 0.5, 2.0)


def test_all_24_orders_of_jitter_are_equally_likely():
    always = ViewConfig(jitter=1.0)
    for table in draw(AugmentConfig(view1=always, view2=always)):
        orders, counts = np.unique(
            table[:, Column.JITTER : Column.JITTER + 4], axis=0, return_counts=True
        )
        assert len(orders) == 24
        assert all(sorted(order) == [1, 2, 3, 4] for order in orders.tolist())
        chi_squared = ((counts - N / 24) ** 2 / (N / 24)).sum()
        assert chi_squared < 49.7  # 23 degrees of freedom, p = 0.001


def test_an_operation_without_strength_leaves_the_order_of_the_others():
    whole = draw(AugmentConfig(view1=ViewConfig(), view2=ViewConfig()))
    no_hue = ViewConfig(hue=0.0)
    without = draw(AugmentConfig(view1=no_hue, view2=no_hue))
    steps = slice(Column.JITTER, Column.JITTER + 4)
    expected = np.where(whole[..., steps] == Jitter.HUE, Jitter.NONE, whole[..., steps])
    np.testing.assert_array_equal(without[..., steps], expected)
    assert (without[..., Column.HUE] == 0).all()


RANDOM_COLUMNS = [
    Column.FLIP,
    Column.JITTER,
    Column.BRIGHTNESS,
    Column.CONTRAST,
    Column.SATURATION,
    Column.HUE,
    Column.GRAYSCALE,
    Column.BLUR,
    Column.SOLARIZE,
]


def test_parameters_are_independent_of_each_other_and_across_views_epochs_seeds_and_samples():
    view = ViewConfig(solarize=0.3)
    config = AugmentConfig(view1=view, view2=view)
    first, second = draw(config)[..., RANDOM_COLUMNS]
    groups = [
        first,
        second,  # the other view
        draw(config, epoch=1)[0][:, RANDOM_COLUMNS],
        draw(config, seed=2)[0][:, RANDOM_COLUMNS],
        np.roll(first, 1, axis=0),  # the neighbour
    ]
    columns = np.concatenate(groups, axis=1)
    columns[np.isinf(columns)] = 1.0
    correlation = np.corrcoef(columns, rowvar=False)
    np.fill_diagonal(correlation, 0.0)
    assert np.abs(correlation).max() < CORRELATION_BOUND


def test_drawn_numbers_of_a_run_never_change():
    # The format of a run: whoever changes these makes old runs impossible to resume or repeat.
    ids = torch.tensor([0, 453, 2**40 + 3])
    views = mocov3_views()
    table = draw_parameters((views.view1, views.view2), 17, 3, ids, side=40)
    np.testing.assert_allclose(table, GOLDEN, rtol=1e-12, atol=0)


inf = np.inf
GOLDEN = [
    [
        0,
        1,
        2,
        4,
        3,
        0.7246492001311539,
        0.6529421564237822,
        0.8402082508898183,
        0.016736788016523563,
        0,
        inf,
        0.26417537638581046,
        0.22611755997425007,
        0.14179475183284468,
    ],
    [
        0,
        3,
        2,
        4,
        1,
        1.0382246381280846,
        0.8639792395149768,
        0.968689245669079,
        -0.020276427449474513,
        0,
        inf,
        0.33389694669117076,
        0.24156989524478648,
        0.09148163140962816,
    ],
    [
        0,
        1,
        3,
        4,
        2,
        0.9336806974611842,
        1.3635338794816927,
        1.0681048300821545,
        -0.09198239267675799,
        0,
        inf,
        0.4295853531382227,
        0.2419677414671693,
        0.04323958196371932,
    ],
    [
        0,
        0,
        0,
        0,
        0,
        0.9216628516694113,
        1.2018135981302036,
        1.0065379108967616,
        0.022699830658173825,
        0,
        inf,
        1,
        0,
        0,
    ],
    [
        1,
        1,
        4,
        2,
        3,
        0.8329648448537168,
        1.1938156358539707,
        1.048513403377069,
        -0.06503615159614054,
        1,
        0.5,
        0.2740074569857103,
        0.22909586864395773,
        0.1339004028631872,
    ],
    [
        0,
        0,
        0,
        0,
        0,
        1.3774356598364845,
        1.083771487583572,
        0.9313030327663022,
        0.04875693019389857,
        0,
        inf,
        1,
        0,
        0,
    ],
]


def test_a_sample_draws_the_same_in_every_batch():
    config = mocov3_views()
    ids = torch.from_numpy(np.random.default_rng(0).permutation(50_000)[:24])
    looks = config.view1, config.view2
    whole = draw_parameters(looks, 5, 2, ids, side=224).reshape(2, 24, -1)
    for size in (1, 2, 3, 6):
        for first in range(0, 24, size):
            part = draw_parameters(looks, 5, 2, ids[first : first + size], side=224)
            np.testing.assert_array_equal(part.reshape(2, size, -1), whole[:, first : first + size])


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_a_view_is_byte_equal_whatever_process_and_place_it_is_in(implementation):
    augment = Augment(mocov3_views(), seed=3, implementation=implementation)
    images, ids = crops(24, side=32), torch.arange(100, 124)
    whole = augment(images, ids, 1).unflatten(0, (2, 24))
    for size in (1, 2, 3, 6, 12):  # what a rank carries of the global batch
        for first in range(0, 24, size):
            share = slice(first, first + size)
            views = augment(images[share], ids[share], 1).unflatten(0, (2, size))
            assert torch.equal(views, whole[:, share])
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    views = augment(images[shuffled], ids[shuffled], 1).unflatten(0, (2, 24))
    assert torch.equal(views, whole[:, shuffled])


def test_views_are_what_torchvision_makes_of_the_drawn_numbers():
    """From the streams to the pixels, without our table in between."""
    config = mocov3_views()
    images, ids, seed, epoch = crops(16), torch.arange(16) * 1000, 11, 4
    views = Augment(config, seed)(images, ids, epoch).unflatten(0, (2, 16))
    for number, view in enumerate((config.view1, config.view2)):
        for place, sample in enumerate(ids.tolist()):

            def u(stream: Stream, sample: int = sample, number: int = number) -> float:
                return float(uniforms(sample_keys(seed, epoch, sample, number, stream)))

            expected = torchvision_view(images[place, number], view, u)
            torch.testing.assert_close(views[number, place], expected, rtol=0, atol=5e-5)


def torchvision_view(crop_HWC, view, u):
    def factor(stream, spread):
        return 1 - spread + 2 * spread * u(stream)

    image = F.to_dtype(crop_HWC.permute(2, 0, 1), torch.float32, scale=True)
    if u(Stream.JITTER) < view.jitter:
        todo = [
            lambda x: F.adjust_brightness(x, factor(Stream.BRIGHTNESS, view.brightness)),
            lambda x: F.adjust_contrast(x, factor(Stream.CONTRAST, view.contrast)),
            lambda x: F.adjust_saturation(x, factor(Stream.SATURATION, view.saturation)),
            lambda x: F.adjust_hue(x, view.hue * (2 * u(Stream.HUE) - 1)),
        ]
        # The order's number, written in the factorial system, picks one of those left each time.
        order = int(u(Stream.JITTER_ORDER) * 24)
        for base in (6, 2, 1, 1):
            image = todo.pop(order // base)(image)
            order %= base
    if u(Stream.GRAYSCALE) < view.grayscale:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if u(Stream.BLUR) < view.blur:
        low, high = view.blur_sigma
        sigma = low + (high - low) * u(Stream.BLUR_SIGMA)
        image = F.gaussian_blur(image, [3, 3], [sigma, sigma])  # a tenth of 20, made odd
    if u(Stream.SOLARIZE) < view.solarize:
        image = F.solarize(image, view.solarize_threshold)
    if u(Stream.FLIP) < view.flip:
        image = F.horizontal_flip(image)
    return F.normalize(image, IMAGENET_MEAN, IMAGENET_STD)


def test_views_of_different_kernel_widths_keep_their_own():
    narrow = ViewConfig(blur=1.0, blur_kernel=0.1)
    wide = ViewConfig(blur=1.0, blur_kernel=0.5)
    mixed = draw_parameters((narrow, wide), 1, 0, torch.arange(5), side=40).reshape(2, 5, -1)
    alone = draw_parameters((narrow, narrow), 1, 0, torch.arange(5), side=40)
    width = alone.shape[1]
    np.testing.assert_array_equal(mixed[0, :, :width], alone[:5])
    assert (mixed[0, :, width:] == 0).all()
    assert (mixed[1, :, width] > 0).any()


def test_plain_only_scales_and_normalises():
    images = crops(3)
    expected = images.transpose(0, 1).flatten(0, 1).permute(0, 3, 1, 2) / 255
    raw = Augment(replace(simclr_views(), normalize=False), seed=1).plain(images)
    torch.testing.assert_close(raw, expected)
    normalised = Augment(simclr_views(), seed=1).plain(images)
    torch.testing.assert_close(
        normalised, F.normalize(expected, IMAGENET_MEAN, IMAGENET_STD), rtol=0, atol=2e-6
    )
    assert Augment(simclr_views(), seed=1).plain(images[:, :1]).shape == (3, 3, 20, 20)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_views_come_channels_last_in_the_dtype_asked_for(dtype):
    views = Augment(simclr_views(), seed=1, dtype=dtype)(crops(4), torch.arange(4), 0)
    assert views.dtype == dtype
    assert views.shape == (8, 3, 20, 20)
    assert views.is_contiguous(memory_format=torch.channels_last)


def test_epochs_and_views_of_one_image_differ():
    images = crops(8)[:, :1].expand(-1, 2, -1, -1, -1)
    augment = Augment(simclr_views(), seed=1)
    first, second = (augment(images, torch.arange(8), epoch) for epoch in (0, 1))
    assert not torch.isclose(first, second).flatten(1).all(1).any()
    assert not torch.isclose(first[:8], first[8:]).flatten(1).all(1).any()
    assert torch.equal(first, augment(images, torch.arange(8), 0))


@pytest.mark.parametrize(
    "settings",
    [
        {"flip": 1.5},
        {"jitter": -0.1},
        {"grayscale": float("nan")},
        {"brightness": -1.0},
        {"contrast": float("inf")},
        {"hue": 0.6},
        {"blur_sigma": (0.0, 1.0)},
        {"blur_sigma": (2.0, 1.0)},
        {"blur_kernel": 0.0},
        {"blur_kernel": 1.5},
        {"solarize_threshold": 2.0},
    ],
    ids=str,
)
def test_impossible_view_settings_are_refused_by_name(settings):
    with pytest.raises(ConfigError, match=next(iter(settings)).replace("_", "-")):
        ViewConfig(**settings)


def test_impossible_normalisation_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"--augment.std 0.2 0.0 0.2: must be a number above 0"):
        AugmentConfig(std=(0.2, 0.0, 0.2))
    with pytest.raises(
        ConfigError, match=r"--augment.mean 124.0 116.0 104.0: must be a number from 0 to 1"
    ):
        AugmentConfig(mean=(124.0, 116.0, 104.0))


def test_wrong_batches_are_refused():
    augment = Augment(simclr_views(), seed=1)
    with pytest.raises(ValueError, match="3 ids and 2 looks for crops of shape"):
        augment(crops(4), torch.arange(3), 0)
    with pytest.raises(ValueError, match="4 ids and 2 looks for crops of shape"):
        augment(crops(4)[:, [0, 1, 0]], torch.arange(4), 0)

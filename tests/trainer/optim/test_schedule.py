"""Learning-rate schedules: values worked out by hand, and what holds for all of them."""

import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from common.errors import ConfigError
from trainer.optim.schedule import ScheduleConfig, lr_factor, warmup_steps


def test_warmup_and_cosine_at_hand_computed_steps() -> None:
    config = ScheduleConfig(warmup_epochs=2)  # 5 steps per epoch: 10 of 50 steps
    expected = {
        0: 0.0,
        1: 0.1,
        9: 0.9,
        10: 1.0,
        20: (1 + math.sqrt(0.5)) / 2,  # a quarter of the way
        30: 0.5,
        40: (1 - math.sqrt(0.5)) / 2,
        49: (1 + math.cos(math.pi * 39 / 40)) / 2,
        50: 0.0,
        51: 0.0,
    }
    for step, value in expected.items():
        assert lr_factor(config, step, 5, 50) == pytest.approx(value, abs=1e-15), step


def test_simclr_imagenet_rate_at_known_steps() -> None:
    """Batch 4096: 312 steps per epoch, 100 epochs, peak 4.8."""
    config = ScheduleConfig(warmup_epochs=10)
    total = 312 * 100
    assert warmup_steps(config, 312) == 3120
    assert 4.8 * lr_factor(config, 1560, 312, total) == pytest.approx(2.4)
    assert 4.8 * lr_factor(config, 3120, 312, total) == 4.8
    assert 4.8 * lr_factor(config, 3120 + 14040, 312, total) == pytest.approx(2.4)
    assert 0 < 4.8 * lr_factor(config, total - 1, 312, total) < 2e-8


def test_start_and_final_fractions() -> None:
    config = ScheduleConfig(warmup_epochs=1, warmup_start_fraction=0.25, final_lr_fraction=0.1)
    values = [lr_factor(config, step, 4, 12) for step in (0, 2, 4, 8, 12)]
    assert values == pytest.approx([0.25, 0.625, 1.0, 0.55, 0.1])


def test_cosine_by_epoch_is_mocos() -> None:
    """MoCo v2: lr *= 0.5 (1 + cos(pi epoch / epochs)), constant through an epoch."""
    config = ScheduleConfig(warmup_epochs=0, cosine_per="epoch")
    for epoch in range(200):
        for step in (0, 1, 6):
            want = 0.5 * (1 + math.cos(math.pi * epoch / 200))
            assert lr_factor(config, 7 * epoch + step, 7, 1400) == pytest.approx(want, abs=1e-15)


def test_cosine_by_epoch_after_a_warmup_that_ends_within_an_epoch() -> None:
    config = ScheduleConfig(warmup_epochs=1.5, cosine_per="epoch")
    values = [lr_factor(config, step, 4, 16) for step in (5, 6, 7, 8, 11, 12)]
    second, third = ((1 + math.cos(math.pi * (s - 6) / 10)) / 2 for s in (8, 12))
    assert values == pytest.approx([5 / 6, 1.0, 1.0, second, second, third])


def test_steps_fall_at_the_milestones() -> None:
    config = ScheduleConfig(kind="steps", warmup_epochs=0, milestones=(120, 160))
    values = [lr_factor(config, 10 * e + s, 10, 2000) for e, s in ((119, 9), (120, 0), (160, 0))]
    assert values == pytest.approx([1.0, 0.1, 0.01])


def test_constant_after_warmup() -> None:
    config = ScheduleConfig(kind="constant", warmup_epochs=1)
    assert [lr_factor(config, s, 4, 100) for s in (0, 3, 4, 99)] == [0.0, 0.75, 1.0, 1.0]


schedules = st.builds(
    ScheduleConfig,
    kind=st.sampled_from(["cosine", "steps", "constant"]),
    warmup_epochs=st.floats(0, 20),
    warmup_start_fraction=st.floats(0, 1),
    final_lr_fraction=st.floats(0, 1),
    cosine_per=st.sampled_from(["step", "epoch"]),
    milestones=st.lists(st.floats(0, 30), max_size=3).map(lambda m: tuple(sorted(m))),
    gamma=st.floats(0, 1),
)


@given(schedules, st.integers(1, 12), st.integers(1, 300))
def test_rises_to_the_end_of_warmup_and_never_after(
    config: ScheduleConfig, steps_per_epoch: int, total: int
) -> None:
    factors = [lr_factor(config, step, steps_per_epoch, total) for step in range(total + 2)]
    assert all(0 <= f <= 1 for f in factors)
    peak = warmup_steps(config, steps_per_epoch)
    rising, falling = factors[: peak + 1], factors[peak:]
    if config.kind == "steps":
        rising = rising[:-1]  # a milestone may lie within the warm-up
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


@given(st.floats(0, 20), st.integers(1, 12), st.integers(1, 300))
def test_cosine_is_symmetric_about_its_middle(
    warmup_epochs: float, steps_per_epoch: int, total: int
) -> None:
    config = ScheduleConfig(warmup_epochs=warmup_epochs)
    warmup = warmup_steps(config, steps_per_epoch)
    assume(total > warmup)
    for i in range(total - warmup + 1):
        pair = (lr_factor(config, step, steps_per_epoch, total) for step in (warmup + i, total - i))
        assert sum(pair) == pytest.approx(1.0)


def test_a_run_shorter_than_its_warmup_is_all_warmup() -> None:
    config = ScheduleConfig(warmup_epochs=10)
    assert [lr_factor(config, step, 10, 3) for step in range(3)] == [0.0, 0.01, 0.02]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_epochs": -1.0}, r"--schedule.warmup-epochs"),
        ({"warmup_epochs": math.inf}, r"--schedule.warmup-epochs"),
        ({"warmup_start_fraction": 1.5}, r"--schedule.warmup-start-fraction"),
        ({"final_lr_fraction": -0.1}, r"--schedule.final-lr-fraction"),
        ({"gamma": math.nan}, r"schedule\.gamma"),
        ({"milestones": (160.0, 120.0)}, r"schedule\.milestones"),
    ],
)
def test_bad_settings_name_their_field(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(**options)

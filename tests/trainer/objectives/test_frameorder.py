"""Frame order: questions whose answers are right, and what must not tell them."""

from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from common.errors import ConfigError
from data_pipeline.augment import AugmentConfig
from data_pipeline.crops import CropConfig
from tests.dist import RankFailure
from tests.trainer.runs import pack_images, train
from tests.trainer.tiny import tiny_frameorder_config
from trainer.config import DataConfig
from trainer.models.encoders import EncoderConfig, build_encoder
from trainer.models.heads import HeadConfig
from trainer.objectives.base import Given, Inputs
from trainer.objectives.deepclusterv2 import DeepClusterV2Config
from trainer.objectives.frameorder import FrameOrder, FrameOrderConfig
from trainer.objectives.joint import JointConfig, TaskConfig
from trainer.objectives.npid import NPIDConfig
from trainer.objectives.parts.chromatic_aberration import one_colour
from trainer.objectives.parts.frames import MIDDLES, ORDERS, QUESTIONS, FrameFeatures, said

SIDE = 16


def shown(task: str, backwards: bool) -> list[tuple[int, ...]]:
    """The frames of each question in the order in which they are shown, as looks made of them."""
    questions = QUESTIONS[task]
    asked = questions.backwards if backwards else questions.forwards
    return [tuple(frame for look in each for frame in questions.shown[look]) for each in asked]


def test_only_the_frame_in_the_middle_tells_whether_it_lies_between() -> None:
    for backwards in (False, True):
        ends = {(triple[0], triple[2]) for triple in shown("between", backwards)}
        assert ends == {(3, 1) if backwards else (1, 3)}
        middles = [triple[1] for triple in shown("between", backwards)]
        assert [1 < middle < 3 for middle in middles] == [True, True, False, False]
        assert sorted(set(middles)) == sorted(MIDDLES)


def test_an_order_and_its_reverse_are_one_and_all_others_are_asked_for() -> None:
    assert len({frozenset((order, order[::-1])) for order in ORDERS}) == 12
    for backwards in (False, True):
        for order, pairs in zip(ORDERS, shown("order", backwards), strict=True):
            in_turn = order[::-1] if backwards else order
            assert pairs == tuple(frame for pair in combinations(in_turn, 2) for frame in pair)


def test_every_frame_is_at_every_place_alike_often() -> None:
    counts = Counter(
        (place, frame)
        for backwards in (False, True)
        for pairs in shown("order", backwards)
        for place, frame in enumerate(pairs)
    )
    assert set(counts.values()) == {6}
    assert len(counts) == 12 * 4


def _objective(task: str, **settings: object) -> FrameOrder:
    torch.manual_seed(0)
    encoder = build_encoder(EncoderConfig(name="resnet8", stem="cifar-stride2"))
    config = FrameOrderConfig(task=task, width=32, flip=0.0, **settings)  # type: ignore[arg-type]
    return config.build(encoder, HeadConfig(), Given(seed=5, side=SIDE)).double()


def _inputs(frames: int, tuples: int = 6, step: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(frames, tuples, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    ids = torch.arange(tuples)
    return Inputs((views,), ids, ids >= 0, step)


def test_a_question_depends_on_its_frames_alone() -> None:
    objective, inputs = _objective("between").eval(), _inputs(5)
    before = objective(inputs).rows["logits"]
    assert before.shape == (6, 4, 2)
    assert torch.equal(before[:, 0], before[:, 1])
    inputs.views[0][4] += 1
    after = objective(inputs).rows["logits"]
    # Forwards and backwards: frame 4 is in the last question.
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 3] != after[:, 3]).all()


def test_tuples_are_shown_backwards_half_the_time() -> None:
    """What is shown backwards is what the reversed frames are shown as forwards."""
    objective, inputs = _objective("order").eval(), _inputs(4, tuples=400)
    logits = objective(inputs).rows["logits"]
    later = objective(inputs._replace(step=1)).rows["logits"]
    changed = (logits != later).flatten(1).any(1).double().mean()
    assert abs(float(changed) - 0.5) < 5 * (0.25 / 400) ** 0.5


def test_a_tuple_is_mirrored_as_a_whole_or_not_at_all() -> None:
    plain, inputs = _objective("between").eval(), _inputs(5, tuples=200)
    mirrored = inputs._replace(views=(inputs.views[0].flip(-1),))
    found, other = (plain(each).rows["logits"] for each in (inputs, mirrored))
    plain.config = FrameOrderConfig(width=32, flip=0.5)
    mixed = plain(inputs).rows["logits"]
    as_it_is = (mixed == found).flatten(1).all(1)
    assert torch.equal(~as_it_is, (mixed == other).flatten(1).all(1))
    assert abs(float(as_it_is.double().mean()) - 0.5) < 5 * (0.25 / 200) ** 0.5


def test_one_colour_is_that_of_a_channel_drawn_for_each_frame() -> None:
    frames = torch.rand(2, 3, 3, 4, 4)
    draws = torch.tensor([[0.0, 0.34, 0.99], [0.5, 0.1, 0.7]])
    kept = one_colour(frames, draws)
    for row, channels in enumerate(([0, 1, 2], [1, 0, 2])):
        for frame, channel in enumerate(channels):
            expected = frames[row, frame, channel].expand(3, 4, 4)
            assert torch.equal(kept[row, frame], expected)


def test_features_tell_where_something_is() -> None:
    """An average over all of an image would not: here it is the same but for rounding."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    features = FrameFeatures(encoder, 24, 16).double().eval()  # type: ignore[arg-type]
    encoder.double()
    images = torch.zeros(2, 3, 24, 24, dtype=torch.float64)
    images[0, :, 4:8, 4:8] = images[1, :, 16:20, 8:12] = 1
    pooled = encoder(images)
    # Means of 36 numbers that are the same, in another order.
    assert torch.allclose(pooled[0], pooled[1], rtol=0, atol=36 * 2**-52)
    found = features(encoder, images)  # type: ignore[arg-type]
    assert (found[0] - found[1]).abs().max() > 0.01


def test_what_is_said_of_frames_is_what_the_answers_say() -> None:
    """Answers that are right put the frames in order, or in its reverse."""
    right = torch.eye(12).repeat(13, 1, 1)
    frames = torch.stack(list(said(right).values()), 1).tolist()
    assert {tuple(frames_4) for frames_4 in frames} == {(0, 1, 2, 3)}
    wrong = torch.eye(12).roll(1, 1).expand(12, 12, 12)
    frames = torch.stack(list(said(wrong).values()), 1).tolist()
    assert (0, 1, 2, 3) not in {tuple(frames_4) for frames_4 in frames}
    logits = torch.zeros(3, 4, 2)
    for number, question in enumerate((1, 2, 3)):
        logits[number, question, 1] = 1
    assert said(logits)["said to lie between"].tolist() == list(MIDDLES)


def test_frames_get_no_flips_of_their_own() -> None:
    for task, frames in (("between", 5), ("order", 4)):
        (group,) = FrameOrderConfig(task=task).views(CropConfig(), AugmentConfig())  # type: ignore[arg-type]
        assert len(group.looks) == frames
        assert {look.flip for look in group.looks} == {0.0}


def test_gaps_that_contradict_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--objective.gap 3 2: the least comes first"):
        FrameOrderConfig(gap=(3, 2))
    with pytest.raises(ConfigError, match=r"--objective.apart 0 2"):
        FrameOrderConfig(apart=(0, 2))


@pytest.mark.parametrize("other", [DeepClusterV2Config(), NPIDConfig()])
def test_what_keeps_something_of_every_sample_is_refused_beside_frames(other: Any) -> None:
    """An epoch of frames shows some samples more often than others, and twice in a batch."""
    tasks = (TaskConfig(task=FrameOrderConfig()), TaskConfig(task=other))
    encoder = build_encoder(EncoderConfig(name="resnet8", stem="cifar-stride2"))
    with pytest.raises(ConfigError, match=rf"objective.tasks: {other.name} .* frameorder"):
        JointConfig(tasks=tasks).build(encoder, HeadConfig(), Given(num_samples=5000))


def test_a_set_without_clips_is_refused_before_the_first_step(tmp_path: Path) -> None:
    data = pack_images(tmp_path, count=30)
    config = tiny_frameorder_config(data, tmp_path / "run")
    config = replace(config, data=DataConfig(train=(data,)))
    with pytest.raises(RankFailure, match=r"images.beton: frame order needs clips; .* --clips"):
        train(1, config)

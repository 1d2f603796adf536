import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from common.errors import ConfigError, DataError
from data_pipeline.reading.order import permute, rank_slice
from tests.dist import run_ranks
from trainer.evaluation import logistic, sweep
from trainer.evaluation.linear import ProbeConfig, preset_config
from trainer.evaluation.logistic import LogisticConfig, logistic_regression
from trainer.evaluation.supervised import (
    Batches,
    Heads,
    Recipe,
    cached_batches,
    fit,
    linear_probe,
    train_linear,
    zero_linear,
)
from trainer.evaluation.sweep import sweep_probe
from trainer.features.extraction import Features
from trainer.features.labels import count_hits, few_per_class, hold_out


def mixture(n: int, seed: int, classes: int = 4, width: int = 12) -> Features:
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=rng)
    noise = torch.randn(n, width, generator=rng)
    scales = torch.logspace(-2, 2, width)  # standardising must matter
    return Features((centres[labels] + 1.5 * noise) * scales + 3.0, labels, torch.arange(n))


TRAIN, TEST = mixture(500, 1), mixture(200, 2)


# --- logistic regression ---


@pytest.mark.processors
@pytest.mark.parametrize("c", [1e-3, 1.0, 30.0])
def test_coefficients_and_accuracy_equal_scikit_learns(c: float) -> None:
    result = logistic_regression(TRAIN, TEST, LogisticConfig(c=c, gradient_tolerance=1e-7))
    scaler = StandardScaler().fit(TRAIN.features_NF.double().numpy())
    theirs = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(
        scaler.transform(TRAIN.features_NF.double().numpy()), TRAIN.labels_N.numpy()
    )
    assert result.iterations < 1000
    np.testing.assert_allclose(result.model[-1].coef_, theirs.coef_, atol=1e-4)
    # A constant added to every class's bias changes nothing: compare them centred.
    ours, other = result.model[-1].intercept_, theirs.intercept_
    np.testing.assert_allclose(ours - ours.mean(), other - other.mean(), atol=1e-4)
    score = theirs.score(scaler.transform(TEST.features_NF.double().numpy()), TEST.labels_N)
    assert result.reached.top1 == pytest.approx(score, abs=1e-12)
    assert 0.5 < result.reached.top1 < 1.0


def test_classes_of_the_test_set_alone_are_never_predicted() -> None:
    """Nor do they move the others, of which there may be two."""
    few = TRAIN.take((TRAIN.labels_N % 2 == 0).nonzero()[:, 0])
    result = logistic_regression(few, TEST, LogisticConfig(c=1.0))
    assert result.model.classes_.tolist() == [0, 2]
    known = TEST.labels_N % 2 == 0
    right = result.model.score(TEST.features_NF[known].double().numpy(), TEST.labels_N[known])
    assert result.reached.top1 == pytest.approx(right * known.double().mean().item())
    assert result.reached.top5 == 1.0


def test_strength_is_the_best_on_held_out_training_samples() -> None:
    few = TRAIN.take(torch.arange(60))
    kept, held = (few.take(part) for part in hold_out(few.labels_N, 0.2, seed=0))
    chosen = logistic_regression(few, TEST)

    def reached(test: Features) -> list[float]:
        return [
            logistic_regression(kept, test, LogisticConfig(c=c)).reached.top1
            for c in logistic.STRENGTHS
        ]

    place = logistic.STRENGTHS.index(chosen.c)
    assert reached(held)[place] == max(reached(held))
    assert reached(kept)[place] < max(reached(kept))  # where weak penalties look best
    assert chosen.chosen_on == len(held.labels_N)
    whole = logistic_regression(few, TEST, LogisticConfig(c=chosen.c))
    assert chosen.reached.top1 == whole.reached.top1  # in the end all labels are learnt from


def test_the_choice_of_strength_never_sees_the_test_set() -> None:
    wrong = TEST._replace(labels_N=TEST.labels_N.flip(0))
    assert logistic_regression(TRAIN, TEST).c == logistic_regression(TRAIN, wrong).c


def test_one_label_per_class_leaves_strength_at_one() -> None:
    one = TRAIN.take(few_per_class(TRAIN.labels_N, 1, seed=0))
    result = logistic_regression(one, TEST)
    assert (result.c, result.chosen_on) == (1.0, 0)


def test_a_feature_that_never_varies_is_ignored() -> None:
    def with_constant(data: Features) -> Features:
        constant = torch.full((len(data.labels_N), 1), 0.1)
        return data._replace(features_NF=torch.cat([data.features_NF, constant], dim=1))

    plain = logistic_regression(TRAIN, TEST, LogisticConfig(c=1.0))
    result = logistic_regression(with_constant(TRAIN), with_constant(TEST), LogisticConfig(c=1.0))
    assert result.reached.top1 == plain.reached.top1
    assert np.abs(result.model[-1].coef_[:, -1]).max() < 1e-6


def test_a_single_class_is_refused() -> None:
    single = TRAIN._replace(labels_N=torch.zeros_like(TRAIN.labels_N))
    with pytest.raises(DataError, match="one class"):
        logistic_regression(single, TEST)


# --- SimCLR's linear probe ---


def straightforward_probe(train: Features, config: Recipe, batch: int) -> torch.Tensor:
    """Nesterov momentum written out (Sutskever et al. 2013), as torch and TensorFlow have it."""
    classes, width = int(train.labels_N.max()) + 1, train.features_NF.shape[1]
    weight = torch.zeros(classes, width + 1, dtype=torch.float64)
    velocity = torch.zeros_like(weight)
    x = torch.cat([train.features_NF, torch.ones(len(train.labels_N), 1)], dim=1).double()
    per_epoch = len(train.labels_N) // batch
    for step in range(config.epochs * per_epoch):
        places = step % per_epoch * batch + np.arange(batch)
        ids = permute(config.seed, step // per_epoch, places, len(train.labels_N))
        p = torch.softmax(x[ids] @ weight.T, dim=1)
        p[torch.arange(batch), train.labels_N[ids]] -= 1
        gradient = p.T @ x[ids] / batch + config.weight_decay * weight
        velocity = config.momentum * velocity + gradient
        cosine = 0.5 * (1 + math.cos(math.pi * step / (config.epochs * per_epoch)))
        lr = config.base_lr * batch / 256 * cosine
        weight -= lr * (gradient + config.momentum * velocity)
    return weight


def unscaled(data: Features) -> Features:
    return data._replace(features_NF=(data.features_NF - 3.0) / torch.logspace(-2, 2, 12))


def test_the_probe_follows_simclrs_recipe() -> None:
    train = unscaled(TRAIN)
    config = Recipe(batch_size=128, epochs=5, weight_decay=1e-2, seed=4)
    result = linear_probe(train, unscaled(TEST), config)
    expected = straightforward_probe(train, config, 128)
    torch.testing.assert_close(
        result.classifier.weight.detach().double(), expected[:, :-1], atol=1e-5, rtol=1e-4
    )
    torch.testing.assert_close(
        result.classifier.bias.detach().double(), expected[:, -1], atol=1e-5, rtol=1e-4
    )
    assert result.steps == 5 * 3
    assert result.reached.top1 > 0.6


def test_a_set_smaller_than_the_batch_is_one_batch() -> None:
    result = linear_probe(unscaled(TRAIN), unscaled(TEST), Recipe(epochs=3))
    assert (result.recipe.batch_size, result.steps) == (500, 3)


def test_a_diverging_probe_is_refused_with_a_remedy() -> None:
    with pytest.raises(ConfigError, match="lower --base-lr"):
        linear_probe(TRAIN, TEST, Recipe(base_lr=1e30, epochs=3))


def probe_on_crops(rank: int, world_size: int) -> list[torch.Tensor]:
    train, config = unscaled(TRAIN), Recipe(batch_size=128, epochs=3, weight_decay=1e-2)

    def batches() -> Batches:
        for step in range(3 * (500 // 128)):
            epoch, in_epoch = divmod(step, 500 // 128)
            ids = permute(4, epoch, in_epoch * 128 + np.arange(128), 500)
            ids_B = torch.from_numpy(ids[rank_slice(128, rank, world_size)])
            yield train.features_NF[ids_B], train.labels_N[ids_B]

    test, together = unscaled(TEST), world_size > 1
    result = train_linear(batches(), 500 // 128, test, 4, config, together=together)
    return [
        result.classifier.weight.detach(),
        torch.tensor([result.reached.top1, result.final_loss]),
    ]


@pytest.mark.processors
def test_crops_and_cached_features_train_the_same_classifier_on_any_number_of_processes() -> None:
    config = Recipe(batch_size=128, epochs=3, weight_decay=1e-2, seed=4)
    cached = linear_probe(unscaled(TRAIN), unscaled(TEST), config)
    for weight, (top1, loss) in [probe_on_crops(0, 1), *run_ranks(probe_on_crops, 2)]:
        torch.testing.assert_close(weight, cached.classifier.weight.detach(), atol=1e-5, rtol=1e-4)
        assert (top1.item(), loss.item()) == pytest.approx(
            (cached.reached.top1, cached.final_loss), rel=1e-4
        )


# --- labels ---


def test_a_label_budget_is_balanced_seeded_and_nested() -> None:
    labels = torch.randint(5, (300,), generator=torch.Generator().manual_seed(1))
    ten = few_per_class(labels, 10, seed=1)
    assert labels[ten].bincount().tolist() == [10] * 5
    assert torch.equal(ten, few_per_class(labels, 10, seed=1))
    assert not torch.equal(ten, few_per_class(labels, 10, seed=2))
    assert set(few_per_class(labels, 3, seed=1).tolist()) < set(ten.tolist())


def test_a_label_budget_above_the_smallest_class_is_refused() -> None:
    with pytest.raises(DataError, match=r"class 1 has 2 labelled samples.*at most 2"):
        few_per_class(torch.tensor([0, 0, 0, 1, 1]), 3, seed=0)


def test_a_split_keeps_and_holds_out_some_of_every_class() -> None:
    labels = torch.tensor([0] * 20 + [1] * 2 + [2])
    kept, held = hold_out(labels, 0.2, seed=0)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(23))
    assert labels[kept].bincount().tolist() == [16, 1, 1]
    assert labels[held].bincount().tolist() == [4, 1]


def test_equal_scores_go_to_the_lower_class() -> None:
    scores = torch.zeros(2, 8)
    assert count_hits(scores, torch.tensor([0, 4])).tolist() == [1, 2]
    assert count_hits(scores, torch.tensor([1, 5])).tolist() == [0, 1]


# --- many probes at once ---


@pytest.mark.processors
def test_each_of_many_probes_learns_what_it_learns_alone() -> None:
    train = unscaled(TRAIN)
    shared = Recipe(batch_size=128, epochs=4, seed=4)
    configs = [
        dataclasses.replace(shared, base_lr=lr, weight_decay=decay)
        for lr in (0.01, 0.3)
        for decay in (0.0, 1e-2)
    ]
    heads = [zero_linear(12, 4) for _ in configs]
    batches = cached_batches(train, shared, torch.device("cpu"))
    losses = fit(Heads(heads), configs, batches, 500 // 128)
    for head, loss, config in zip(heads, losses, configs):
        alone = linear_probe(train, unscaled(TEST), config)
        close = {"atol": 1e-5, "rtol": 1e-4}
        torch.testing.assert_close(head.weight, alone.classifier.weight, **close)
        torch.testing.assert_close(head.bias, alone.classifier.bias, **close)
        assert loss == pytest.approx(alone.final_loss, rel=1e-4)


def test_a_sweep_takes_the_best_on_held_out_samples_and_never_sees_the_test_set() -> None:
    train, test = unscaled(TRAIN), unscaled(TEST)
    config = Recipe(batch_size=128, epochs=4)
    found, chosen_on, trials = sweep_probe(train, test, config, (1e-5, 0.1, 1e30), (1e-6, 1e-3))
    best = max(trial.top1 for trial in trials)
    chosen = next(
        t
        for t in trials
        if (t.base_lr, t.weight_decay) == (found.recipe.base_lr, found.recipe.weight_decay)
    )
    assert chosen.top1 == best > 0.6
    assert [trial.loss is None for trial in trials] == [False] * 4 + [True] * 2
    assert chosen_on == 50
    wrong = test._replace(labels_N=test.labels_N.flip(0))
    again, _, _ = sweep_probe(train, wrong, config, (1e-5, 0.1), (1e-6, 1e-3))
    assert again.recipe == found.recipe
    assert found.reached.top1 == linear_probe(train, test, found.recipe).reached.top1


def test_of_equal_accuracies_the_lower_loss_wins_even_one_of_zero() -> None:
    trials = [sweep.Trial(1.0, 0.0, top1, loss) for top1, loss in ((1, 0.1), (1, 0.0), (0, None))]
    assert max(trials, key=lambda trial: trial.merit) is trials[1]
    assert min(trials, key=lambda trial: trial.merit) is trials[2]


def test_a_sweep_of_which_nothing_is_left_is_refused_with_a_remedy() -> None:
    one = TRAIN.take(few_per_class(TRAIN.labels_N, 1, seed=0))
    with pytest.raises(ConfigError, match="--protocol cached"):
        sweep_probe(one, TEST, Recipe(epochs=2), (0.1,), (0.0,))
    with pytest.raises(ConfigError, match="lower --base-lr"):
        sweep_probe(TRAIN, TEST, Recipe(epochs=2), (1e30,), (1.0,))


def test_the_preset_of_imagenet_has_the_published_values() -> None:
    preset = Recipe()
    assert (preset.epochs, preset.batch_size, preset.weight_decay) == (90, 4096, 1e-6)
    assert preset.peak_lr == pytest.approx(1.6)


def test_a_preset_says_everything_and_bears_no_other_word() -> None:
    files = {name: Path(f"{name}.beton") for name in ("train", "test")}
    config = ProbeConfig(source="run", **files, preset="simclr-imagenet", seed=4)
    full = preset_config(config)
    assert (full.protocol, full.size, full.resize) == ("canonical", 224, 256)
    assert full.recipe() == Recipe(seed=4)
    for words in ({"base_lr": (0.2,)}, {"c": 1.0}, {"size": 96}, {"protocol": "cached"}):
        with pytest.raises(ConfigError, match=r"--preset simclr-imagenet .*leave "):
            preset_config(dataclasses.replace(config, **words))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"protocol": "logistic", "epochs": 5}, "--epochs is not for --protocol logistic: "),
        ({"protocol": "logistic", "base_lr": (0.2,)}, "--base-lr is not for --protocol logistic: "),
        ({"protocol": "cached", "c": 1.0}, "--c is not for --protocol cached: "),
    ],
    ids=str,
)
def test_a_setting_of_another_protocol_is_refused(settings: dict, named: str) -> None:
    files = {name: Path(f"{name}.beton") for name in ("train", "test")}
    with pytest.raises(ConfigError, match=named) as caught:
        ProbeConfig(source="run", **files, **settings)
    assert "\n" not in str(caught.value)

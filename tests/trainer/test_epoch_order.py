"""An objective may say which samples an epoch shows: the same on any ranks, after any stop."""

from collections import Counter
from pathlib import Path
from typing import Any

from data_pipeline.reading.order import EpochOrder
from tests.dist import run_ranks
from tests.trainer.runs import (
    _train_rank,
    assert_equal_runs,
    pack_images,
    samples,
    tiny_deepclusterv2_config,
)
from trainer.config import to_json
from trainer.objectives.deepclusterv2 import DeepClusterV2

PLACES = 120


def by_cluster(self: DeepClusterV2, num_samples: int) -> EpochOrder | None:
    """Every cluster of the first head alike, in every epoch but the second."""
    clusters_N = self.clusters[0].cpu().numpy()
    return None if self.epoch_seen == 1 else EpochOrder.balanced(clusters_N, num_samples)


def train_by_cluster(rank: int, world_size: int, runs: list[tuple[Any, int]]) -> list[str]:
    """As :func:`tests.trainer.runs._train_rank`, of an objective that gives orders."""
    made_before = DeepClusterV2.before_epoch

    def before_epoch(self: DeepClusterV2, epoch: int, whole_epoch: Any) -> None:
        made_before(self, epoch, whole_epoch)
        self.epoch_seen = epoch

    DeepClusterV2.before_epoch = before_epoch  # type: ignore[method-assign]
    DeepClusterV2.order = by_cluster  # type: ignore[method-assign]
    DeepClusterV2.epoch_seen = 0  # type: ignore[attr-defined]
    return _train_rank(rank, world_size, runs)


def test_an_epoch_shows_what_the_objective_says(tmp_path: Path) -> None:
    data = pack_images(tmp_path, count=PLACES)
    whole, other, stopped = (
        tiny_deepclusterv2_config(data, tmp_path / name, steps=12, precision="fp64")
        for name in ("whole", "other", "stopped")
    )

    def train(world_size: int, *runs: tuple[Any, int]) -> list[str]:
        values = [(to_json(config), stop) for config, stop in runs]
        ranks = run_ranks(
            train_by_cluster, world_size, values, timeout=240, init_process_group=False
        )
        return list(ranks[0])

    assert train(2, (whole, 0), (stopped, 3)) == ["done", "stopped"]
    assert train(2, (stopped, 0)) == ["done"]
    assert train(1, (other, 0)) == ["done"]
    assert_equal_runs(whole.out, stopped.out)
    assert samples(whole.out) == samples(other.out)
    shown = [
        [i for record in samples(whole.out)[first : first + 5] for i in record["ids"]]
        for first in (0, 5)
    ]
    assert max(Counter(shown[0]).values()) > 1, "small clusters come often"
    assert sorted(shown[1]) == list(range(PLACES)), "without an order every sample comes once"

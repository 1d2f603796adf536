"""Before an epoch an objective may look at the whole set, and say which samples the epoch shows:
the same on any ranks, after any stop."""

from collections import Counter
from pathlib import Path
from typing import Any

from data_pipeline.reading.order import EpochOrder
from tests.dist import run_ranks
from tests.trainer.runs import _train_rank, assert_equal_runs, pack_images, samples, saved_state
from tests.trainer.tiny import tiny_deepclusterv2_config
from trainer.config import to_json
from trainer.objectives.deepclusterv2 import DeepClusterV2

PLACES, STEPS = 120, 5  # of an epoch


def by_cluster(self: DeepClusterV2, num_samples: int) -> EpochOrder | None:
    """Every cluster of the first head alike, in every epoch but the second."""
    clusters_N = self.clusters[0].cpu().numpy()
    return None if self.epoch_seen == 1 else EpochOrder.balanced(clusters_N, num_samples)


def train_by_cluster(rank: int, world_size: int, runs: list[tuple[Any, int]]) -> list[str]:
    """As :func:`tests.trainer.runs._train_rank`, of an objective that gives orders."""
    made_before = DeepClusterV2.before_epoch

    def before_epoch(self: DeepClusterV2, epoch: int, whole_epoch: Any) -> None:
        for _ in whole_epoch() if epoch else ():
            pass  # the pass of the first epoch is the objective's own
        made_before(self, epoch, whole_epoch)
        self.epoch_seen = epoch

    DeepClusterV2.before_epoch = before_epoch  # type: ignore[method-assign]
    DeepClusterV2.order = by_cluster  # type: ignore[method-assign]
    DeepClusterV2.epoch_seen = 0  # type: ignore[attr-defined]
    return _train_rank(rank, world_size, runs)


def test_an_epoch_shows_what_the_objective_says(tmp_path: Path) -> None:
    data = pack_images(tmp_path, count=PLACES)
    whole, other, stopped, broken_off = (
        tiny_deepclusterv2_config(data, tmp_path / name, steps=12, precision="fp64")
        for name in ("whole", "other", "stopped", "broken off")
    )

    def train(world_size: int, *runs: tuple[Any, int]) -> list[str]:
        values = [(to_json(config), stop) for config, stop in runs]
        ranks = run_ranks(
            train_by_cluster, world_size, values, timeout=240, init_process_group=False
        )
        return list(ranks[0])

    in_the_epoch, in_the_next_pass = STEPS + 3, STEPS + STEPS + 3  # asked at each batch
    asked = (whole, 0), (stopped, in_the_epoch), (broken_off, in_the_next_pass)
    assert train(2, *asked) == ["done", "stopped", "stopped"]
    assert [saved_state(run.out)["step"] for run in (stopped, broken_off)] == [3, STEPS]
    assert train(2, (stopped, 0), (broken_off, 0)) == ["done", "done"]
    assert train(1, (other, 0)) == ["done"]
    assert_equal_runs(whole.out, stopped.out)
    assert_equal_runs(whole.out, broken_off.out)
    assert samples(whole.out) == samples(other.out)
    shown = [
        [i for record in samples(whole.out)[first : first + 5] for i in record["ids"]]
        for first in (0, 5)
    ]
    assert max(Counter(shown[0]).values()) > 1, "small clusters come often"
    assert sorted(shown[1]) == list(range(PLACES)), "without an order every sample comes once"

"""Evaluation shows every sample once, in order, whatever the number of processes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.reading.loader import EvalLoader
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.pool import LoaderConfig
from tests.data_pipeline.batches import SIZE, N, evaluate
from tests.data_pipeline.images import encoded, picture


def test_evaluation_shows_every_sample_once_in_order(jpegs: Path) -> None:
    batches = evaluate(jpegs)
    assert [len(batch.ids_B) for batch in batches] == [10, 10, 10, 10, 5]
    assert torch.cat([batch.ids_B for batch in batches]).tolist() == list(range(N))
    assert batches[0].crops_BVHWC.shape == (10, 1, SIZE, SIZE, 3)


@pytest.mark.parametrize("world_size", [2, 4])
def test_shards_of_evaluation_are_its_parts(jpegs: Path, world_size: int) -> None:
    whole = torch.cat([batch.crops_BVHWC for batch in evaluate(jpegs)])
    shards = [
        batch.crops_BVHWC
        for rank in range(world_size)
        for batch in evaluate(jpegs, rank=rank, world_size=world_size)
    ]
    assert torch.equal(torch.cat(shards), whole)


def test_a_process_without_samples_to_evaluate_gets_no_batches(jpegs: Path) -> None:
    assert evaluate(jpegs, rank=0, world_size=50) == []


def test_evaluating_images_of_the_crops_size_changes_nothing(tmp_path: Path) -> None:
    pictures = [picture(24, 24, seed) for seed in range(3)]
    for number, pixels in enumerate(pictures):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{number}.png").write_bytes(encoded(pixels, "PNG"))
    config = PackConfig(workers=1, format="raw")
    pack(str(tmp_path / "images"), tmp_path / "x.beton", config, progress=False)
    for backend in ("ffcv", "torchvision"):
        source = EvalLoader(
            OpenData(tmp_path / "x.beton"),
            24,
            24,
            LoaderConfig(backend=backend),
            batch_size=8,  # type: ignore[arg-type]
        )
        (batch,) = source
        assert np.array_equal(batch.crops_BVHWC[:, 0].numpy(), np.stack(pictures))
        source.close()


def test_decoding_reduced_is_bounded_and_only_where_asked_for(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for seed in range(4):
        data = encoded(picture(400, 600, seed), "JPEG", quality=90)
        (tmp_path / "images" / f"{seed}.jpg").write_bytes(data)
    path = tmp_path / "x.beton"
    pack(str(tmp_path / "images"), path, PackConfig(workers=1), progress=False)
    crops = {}
    for reduction in (1, 2, 8):
        config = LoaderConfig(workers=1, max_reduction=reduction)  # type: ignore[arg-type]
        source = EvalLoader(OpenData(path), SIZE, SIZE, config, batch_size=4)
        crops[reduction] = next(iter(source)).crops_BVHWC.int()
        source.close()
    for reduction in (2, 8):
        difference = (crops[reduction] - crops[1]).abs().float()
        assert 0 < difference.mean() < 2

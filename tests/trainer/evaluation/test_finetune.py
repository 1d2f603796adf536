import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import CheckpointError, ConfigError, DataError
from data_pipeline.crops import CropConfig
from data_pipeline.packing.pack import PackConfig, pack
from data_pipeline.reading.loader import TrainLoader
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import EpochOrder, Position
from data_pipeline.reading.pool import LoaderConfig
from data_pipeline.views import views_of_one_size
from tests.dist import run_ranks
from tests.trainer.runs import SMALL_ENCODER, pack_images
from tests.trainer.saved_runs import save_run
from trainer.evaluation.finetune import FinetuneConfig, build_classifier, finetune, load_head
from trainer.evaluation.labelled_subset import balanced_share, packed_names, read_list, told_apart
from trainer.evaluation.load_encoder import load_encoder
from trainer.models.encoders import build_encoder
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.state.checkpoint import CheckpointStore

LOADER = LoaderConfig(backend="torchvision", workers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    data = pack_images(folder, count=90)
    save_run(folder / "run", data, SMALL_ENCODER)
    return folder


def config(folder: Path, **changes: object) -> FinetuneConfig:
    given = FinetuneConfig(
        source=str(folder / "run"),
        train=folder / "images.beton",
        test=folder / "images.beton",
        loader=LOADER,
        device="cpu",
        precision="fp64",
        epochs=4,
        tuning_batch=24,
        base_lr=0.5,
    )
    return dataclasses.replace(given, **changes)  # type: ignore[arg-type]


# --- which labels ---


def test_a_share_has_as_many_of_every_class_and_grows_from_a_smaller_one() -> None:
    labels = np.random.default_rng(0).integers(0, 4, 1000)
    one, ten = (balanced_share(labels, share, seed=1) for share in (0.01, 0.1))
    assert np.bincount(labels[one]).tolist() == [2] * 4  # 2.5, rounded to even
    assert np.bincount(labels[ten]).tolist() == [25] * 4
    assert set(one) < set(ten)
    assert not np.array_equal(ten, balanced_share(labels, 0.1, seed=2))
    assert balanced_share(labels, 1.0, seed=1).tolist() == list(range(1000))


def test_every_class_gives_at_least_one_and_at_most_what_it_has() -> None:
    labels = np.array([0] * 97 + [1] * 2 + [2])
    assert np.bincount(labels[balanced_share(labels, 0.001, 0)]).tolist() == [1, 1, 1]
    assert np.bincount(labels[balanced_share(labels, 0.3, 0)]).tolist() == [10, 2, 1]


def test_a_published_list_of_file_names_finds_its_samples(folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "1percent.txt"
    data = folder / "images.beton"
    names = packed_names(OpenData(data))
    assert names[:2] == ["class0/0000.png", "class0/0003.png"]
    listed.write_text("0004.png\nclass2/0002.png\n")
    assert [names[i] for i in read_list(listed, OpenData(data))] == [
        "class1/0004.png",
        "class2/0002.png",
    ]
    listed.write_text("\ufeff17\n3\n", "utf-8")  # as Windows marks text
    assert read_list(listed, OpenData(data)).tolist() == [3, 17]


def test_a_name_in_two_files_of_a_set_is_ambiguous(folder: Path, tmp_path: Path) -> None:
    train = folder / "images.beton"
    names = packed_names(OpenData([train]))
    listed = tmp_path / "list.txt"
    listed.write_text(names[3])
    assert read_list(listed, OpenData([train])).tolist() == [3]
    other = tmp_path / "other.beton"
    pack(str(folder / "images"), other, PackConfig(workers=1, format="jpeg"), progress=False)
    twice = OpenData([train, other])
    with pytest.raises(DataError, match=f"several images of .* are called {names[3]}.* sample ids"):
        read_list(listed, twice)
    assert (
        told_apart(twice)[3] == f"images.beton: {names[3]}" and told_apart(OpenData(train)) == names
    )


def test_listed_names_may_have_spaces(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "images", tmp_path / "images")
    photo = tmp_path / "images" / "class0" / "0000.png"
    photo.rename(photo.with_name("my own cat.png"))
    data, listed = tmp_path / "spaces.beton", tmp_path / "list.txt"
    pack(str(tmp_path / "images"), data, PackConfig(workers=1), progress=False)
    listed.write_text("\nmy own cat.png\r\n 0004.png\n")
    found = [packed_names(OpenData(data))[i] for i in read_list(listed, OpenData(data))]
    assert sorted(found) == ["class0/my own cat.png", "class1/0004.png"]


def test_names_skip_images_that_packing_left_out(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "images", tmp_path / "images")
    (tmp_path / "images" / "class0" / "0000a.png").write_bytes(b"no image")
    pack(str(tmp_path / "images"), tmp_path / "some.beton", PackConfig(workers=1), progress=False)
    some, every = OpenData(tmp_path / "some.beton"), OpenData(folder / "images.beton")
    assert packed_names(some) == packed_names(every)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "lists no samples"),
        ("3\n90\n", "90 is no sample"),
        ("3\n4\n3\n", "lists 3 twice"),
        ("nothing.png\n", "nothing.png is no image"),
        ("9" * 30, "is no sample"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(
    folder: Path, tmp_path: Path, lines: str, message: str
) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text(lines)
    with pytest.raises(DataError, match=message):
        read_list(listed, OpenData(folder / "images.beton"))


def test_a_folder_that_changed_since_packing_names_nothing(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "images", tmp_path / "images")
    (tmp_path / "images" / "class0" / "0000.png").unlink()
    with pytest.raises(DataError, match="not those that"):
        packed_names(OpenData(folder / "images.beton"), tmp_path / "images")
    with pytest.raises(DataError, match="--images"):
        packed_names(OpenData(folder / "images.beton"), tmp_path / "gone")


def test_a_loader_of_some_samples_reads_no_others(folder: Path) -> None:
    only, data = np.array([2, 3, 5, 7, 11, 13, 17]), folder / "images.beton"
    views = views_of_one_size(CropConfig(size=8), 1)
    loader = TrainLoader(
        OpenData(data), views, LOADER, seed=0, batch_size=3, order=EpochOrder.of(only)
    )
    batches = [batch for _, batch in zip(range(4), loader.starting_at(Position(0, 0)))]
    loader.close()
    assert loader.steps_per_epoch == 2
    for epoch in (batches[:2], batches[2:]):
        ids = torch.cat([batch.ids_B for batch in epoch]).tolist()
        assert len(set(ids)) == 6 and set(ids) < set(only.tolist())
    whole = TrainLoader(OpenData(data), views, LOADER, seed=0, batch_size=90)
    every = next(whole.starting_at(Position(0, 0)))
    whole.close()
    place = every.ids_B.tolist().index(int(batches[0].ids_B[0]))
    assert torch.equal(batches[0].crops_BVHWC[0], every.crops_BVHWC[place])


# --- the model ---


def test_a_middle_layer_of_the_head_is_kept_and_the_rest_dropped() -> None:
    encoder = build_encoder(SMALL_ENCODER)
    head = ProjectionHead(64, HeadConfig(layers=3, hidden_dim=48, out_dim=16)).eval()
    model = build_classifier(encoder, 64, 5, head, 1).eval()
    images = torch.randn(4, 3, 32, 32)
    assert model(images).abs().max() == 0  # the classifier starts at zero
    torch.testing.assert_close(model[:-1](images), head.layers[0](encoder.eval()(images)))
    assert model[-1].in_features == 48
    for depth in (3, 4):
        with pytest.raises(ConfigError, match=f"--head-layers {depth}: .* 3 layers"):
            build_classifier(encoder, 64, 5, head, depth)


def test_the_head_is_that_of_the_encoders_checkpoint(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="the head in its checkpoint"):
        load_head(load_encoder(str(folder / "run")))  # holds a stub of a head
    with pytest.raises(ConfigError, match="has no projection head"):
        load_head(load_encoder(f"untrained:{folder / 'run'}"))


def test_a_runs_own_head_comes_with_its_encoder_and_is_tuned(folder: Path, tmp_path: Path) -> None:
    encoder = save_run(tmp_path / "run", folder / "images.beton", SMALL_ENCODER)
    head = ProjectionHead(
        64, HeadConfig(layers=2, hidden_dim=64, out_dim=32)
    )  # as its settings say
    tensors = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    tensors |= {f"head.{name}": value for name, value in head.state_dict().items()}
    state = {"step": 9, "epoch": 3.0, "data_fingerprint": "f" * 64}
    store = CheckpointStore(tmp_path / "run" / "checkpoints")
    store.save(state, {"model": tensors, "optimizer": {"x": torch.zeros(1)}})
    loaded = load_head(load_encoder(str(tmp_path / "run")))
    for name, value in head.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    run = config(folder, source=str(tmp_path / "run"), head_layers=1)
    result = finetune(run)
    assert result is not None
    assert result["settings"]["head_layers"] == 1
    assert "the first layer of the head" in result["measured"]["trained"]
    assert result["settings"]["final_loss"] < np.log(3)


# --- training ---


def test_fine_tuning_learns_and_its_json_says_how(folder: Path) -> None:
    result = finetune(config(folder, epochs=12))
    assert result is not None
    assert result["top1"] > 0.6  # by chance a third
    assert result["settings"]["final_loss"] < 0.9 * np.log(3)
    assert result["settings"]["steps"] == 12 * 3
    assert result["measured"]["trained"] == "encoder and classifier"
    assert result["labelled_ids"] == list(range(90))
    json.dumps(result, allow_nan=False)


def test_few_labels_train_longer_on_exactly_those_samples(folder: Path) -> None:
    few = config(folder, labels=0.04, epochs=None, base_lr=0.05, seed=3)
    result = finetune(few)
    assert result is not None
    assert result["n_train"] == len(result["labelled_ids"]) == 3
    assert (result["settings"]["epochs"], result["settings"]["batch_size"]) == (60, 3)


def _tuned(rank: int, world_size: int, folder: str) -> list[float]:
    result = finetune(config(Path(folder), labels=0.5))
    return [] if result is None else [result["top1"], result["settings"]["final_loss"]]


@pytest.mark.slow
def test_two_processes_tune_to_the_result_of_one(folder: Path) -> None:
    alone = _tuned(0, 1, str(folder))
    together, nothing = run_ranks(_tuned, 2, str(folder), init_process_group=False, timeout=240)
    assert nothing == []
    assert together == pytest.approx(alone, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": 0.0}, "--labels 0"),
        ({"labels": 0.5, "label_list": Path("x")}, "exclude each other"),
        ({"head_layers": -1}, "--head-layers -1"),
        ({"source": "pixels:8"}, "nothing to train"),
        ({"base_lr": 1e30, "epochs": 2}, "lower --base-lr"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_tuned_is_refused(folder: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        finetune(config(folder, **changes))

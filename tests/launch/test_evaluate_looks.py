"""``widebatch evaluate retrieve|cluster|diagnose|duplicates``, as a user types them."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.packing.pack import PackConfig, pack
from launch.__main__ import main
from tests.dist import run_ranks
from tests.launch.evaluated import look, main_on_a_rank, make_folder, report
from tests.said import error_line
from trainer.evaluation import cluster, duplicates, retrieve
from trainer.evaluation.pictures import Cell

METHODS = ("retrieve", "cluster", "diagnose", "duplicates")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("looks"))


def picture_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert np.asarray(image).std() > 10  # it shows something
        return image.size


def test_samples_of_the_searched_file_find_others_of_their_kind(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = folder / "new" / "found.png"
    words = ["--indices", "4", "17", "--k", "6", "--picture", str(picture)]
    result = report(folder, look(folder, "retrieve", str(folder / "run"), *words))
    assert [query["sample"] for query in result["queries"]] == [4, 17]
    for query in result["queries"]:
        near = query["neighbours"]
        assert len(near) == 6
        assert query["sample"] not in {each["sample"] for each in near}
        similarities = [each["similarity"] for each in near]
        assert similarities == sorted(similarities, reverse=True)
    assert 0.34 < result["mean_average_precision"] <= 1
    assert result["recall_at"].keys() == {"1", "5", "10"}
    width, height = picture_size(picture)
    assert width > 7 * 96 and 2 * 96 < height < 3 * 96 + 60
    said = capsys.readouterr().out
    assert "mAP" in said and f"written to {picture}" in said
    nearest = result["queries"][0]["neighbours"][0]
    assert result["queries"][0]["file"] == "class0/0012.png"  # 20 of each class come in turn
    assert nearest["file"].startswith(f"class{nearest['label']}/")
    assert f"#{nearest['sample']} {nearest['file']}" in said
    assert "nearest   5 of 6 images to 2 queries (--json)\n" in said


def test_how_many_of_the_queries_are_shown_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--k", "3", "--picture", str(tmp_path / "found.png"), "--pictured", "4"]
    report(folder, look(folder, "retrieve", "pixels:8", *words))
    said = capsys.readouterr()
    assert "nearest   3 images to 5 of 60 queries (--json)\n" in said.out
    assert "note: 4 of 60 queries are in the picture: --pictured\n" in said.err


def test_the_picture_names_files_and_classes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[list[str]]] = []
    for module in (retrieve, cluster, duplicates):

        def note(rows: Sequence[Sequence[Cell]], *_: object, **__: object) -> None:
            drawn.append([[cell.text for cell in row] for row in rows])

        monkeypatch.setattr(module, "save_rows", note)
    picture = ["--picture", str(tmp_path / "x.png"), "--pictured", "2"]
    query = ["--query", str(folder / "train" / "images" / "class2"), "--k", "1"]
    report(folder, look(folder, "retrieve", "pixels:16", *picture, *query))
    report(folder, look(folder, "cluster", "pixels:16", *picture, "--k", "2"))
    report(folder, look(folder, "duplicates", "pixels:16", *picture, "--threshold", "0.1"))
    found, grouped, paired = drawn
    assert found == [
        ["0002.png\nclass2", "0002.png\n1.000 class2"],
        ["0005.png\nclass2", "0005.png\n1.000 class2"],
    ]
    assert re.fullmatch(r"\d{4}\.png\n\d: \d+ images", grouped[0][0])
    assert re.fullmatch(r"\d{4}\.png", grouped[0][1])
    assert re.fullmatch(r"\d{4}\.png\nsame [01]\.\d{3}", paired[0][0])


def test_an_image_file_finds_itself_in_the_packed_folder(folder: Path) -> None:
    images = folder / "train" / "images"
    queries = [images / "class2" / "0002.png", images / "class0" / "0000.png"]
    words = ["--query", *map(str, queries), "--k", "3"]
    result = report(folder, look(folder, "retrieve", "pixels:16", *words))
    nearest = [query["neighbours"][0] for query in result["queries"]]
    assert [each["label"] for each in nearest] == [2, 0]  # in the order they were given
    assert all(each["similarity"] > 0.99 for each in nearest)
    assert [each["file"] for each in nearest] == ["class2/0002.png", "class0/0000.png"]
    assert [query["file"] for query in result["queries"]] == list(map(str, queries))
    assert [query["label"] for query in result["queries"]] == [-1, -1]
    assert result["mean_average_precision"] is None
    assert "not judged" in result["notes"][0]


def test_a_folder_with_classes_is_judged_by_their_names(folder: Path, tmp_path: Path) -> None:
    images = folder / "train" / "images"
    for name in ("class1", "class2"):  # numbered 0 and 1 there, 1 and 2 in the searched file
        shutil.copytree(images / name, tmp_path / "queries" / name)
    words = ["--query", str(tmp_path / "queries"), "--recall-at", "1"]
    result = report(folder, look(folder, "retrieve", "pixels:16", *words))
    assert {query["label"] for query in result["queries"]} == {1, 2}
    assert result["recall_at"]["1"] == 1.0  # each finds its own copy
    assert result["n_judged"] == 40


def test_a_folder_called_as_a_class_is_judged_as_it(folder: Path, tmp_path: Path) -> None:
    images = folder / "train" / "images"
    words = ["--query", str(images / "class1"), "--recall-at", "1"]
    result = report(folder, look(folder, "retrieve", "pixels:16", *words))
    assert {query["label"] for query in result["queries"]} == {1}
    assert (result["recall_at"]["1"], result["n_judged"]) == (1.0, 20)
    assert "the queries are judged as class1: their folder is called so" in result["notes"]
    shutil.copytree(images / "class1", tmp_path / "somewhere")
    words = ["--query", str(tmp_path / "somewhere")]
    result = report(folder, look(folder, "retrieve", "pixels:16", *words))
    assert (result["mean_average_precision"], result["n_judged"]) == (None, 0)
    assert result["notes"][0].startswith("not judged: no query is of a class that is there")


def test_a_damaged_query_is_refused_by_its_own_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound, damaged = folder / "train/images/class0/0000.png", tmp_path / "damaged.png"
    damaged.write_bytes(sound.read_bytes()[:90])
    line = look(folder, "retrieve", "pixels:8", "--query", str(sound), str(damaged))
    assert main(line) == 2
    assert f"--query {damaged}: " in error_line(capsys.readouterr().err)


def test_clusters_are_compared_with_the_classes(folder: Path) -> None:
    picture = folder / "clusters.png"
    line = look(folder, "cluster", str(folder / "run"), "--picture", str(picture))
    result = report(folder, line)
    assert len(result["sizes"]) == 3 and sum(result["sizes"]) == 60
    assert len(result["assignments"]) == 60
    for name in ("nmi", "ari", "purity"):
        assert -0.5 <= result[name] <= 1
    picture_size(picture)
    assert report(folder, line)["assignments"] == result["assignments"]


def test_few_different_images_make_few_clusters(folder: Path, tmp_path: Path) -> None:
    images = folder / "train" / "images" / "class0"
    for number in range(10):
        twin = images / ("0000.png" if number < 5 else "0003.png")
        (tmp_path / "images").mkdir(exist_ok=True)
        shutil.copyfile(twin, tmp_path / "images" / f"{number}.png")
    packed = tmp_path / "twins.beton"
    pack(str(tmp_path / "images"), packed, PackConfig(workers=1), progress=False)
    line = look(folder, "cluster", "pixels:8", "--data.train", str(packed), "--k", "5")
    result = report(folder, line)
    assert (result["clusters"], result["measured"]["k"], result["settings"]["k"]) == (2, 2, 5)
    assert "found 2 clusters of the 5 asked for" in " ".join(result["notes"])


@pytest.mark.parametrize("method", ["retrieve", "duplicates"])
def test_a_k_above_the_number_of_images_is_cut_and_said(folder: Path, method: str) -> None:
    result = report(folder, look(folder, method, "pixels:8", "--k", "60"))
    assert result["measured"]["k"] == 59
    assert "--k 60 is more than the 59" in " ".join(result["notes"])


def test_recall_among_more_than_there_are_is_left_out_and_said(folder: Path) -> None:
    result = report(folder, look(folder, "retrieve", "pixels:8", "--recall-at", "1", "60"))
    assert list(result["recall_at"]) == ["1"]
    assert "--recall-at 60 is more than the 59 images" in result["notes"][0]


def test_files_without_labels_are_clustered_and_diagnosed_too(folder: Path) -> None:
    flat = ["--data.train", str(folder / "flat.beton")]
    result = report(folder, look(folder, "cluster", "pixels:8", *flat, "--k", "2"))
    assert result["nmi"] is None and len(result["sizes"]) == 2
    assert report(folder, look(folder, "diagnose", "pixels:8", *flat))["effective_rank"] > 1
    assert report(folder, look(folder, "duplicates", "pixels:8", *flat))["n_train"] == 30


def test_a_diagnosis_tells_views_of_an_image_from_two_images(folder: Path) -> None:
    result = report(folder, look(folder, "diagnose", str(folder / "run"), "--views-of", "40"))
    assert result["positive_similarity"] > result["negative_similarity"]
    assert result["alignment"] == pytest.approx(2 - 2 * result["positive_similarity"])
    assert result["uniformity"] < 0 < result["feature_std"] < 1
    assert 1 < result["effective_rank"] < 60
    assert result["settings"]["views_of"] == 40
    assert "the run's settings" in result["measured"]["alignment"]


def test_an_untrained_encoder_is_shown_the_views_of_its_run(folder: Path) -> None:
    """Else its alignment could not be compared with the trained one's."""
    trained, untrained, baseline = (
        report(folder, look(folder, "diagnose", source, "--views-of", "20"))["measured"]
        for source in (str(folder / "run"), f"untrained:{folder / 'run'}", "pixels:8")
    )
    assert untrained["alignment"] == trained["alignment"] != baseline["alignment"]


def test_a_planted_duplicate_is_found_and_shown(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "train" / "images", tmp_path / "images")
    copy = tmp_path / "images" / "class1" / "zzz.png"
    shutil.copyfile(tmp_path / "images" / "class0" / "0000.png", copy)
    packed, picture = tmp_path / "twice.beton", tmp_path / "twice.png"
    pack(str(tmp_path / "images"), packed, PackConfig(workers=1), progress=False)
    words = ["--data.train", str(packed), "--threshold", "0.99999", "--picture", str(picture)]
    result = report(folder, look(folder, "duplicates", str(folder / "run"), *words))
    first = result["duplicates"][0]
    assert first["pixel_difference"] == 0.0
    assert sorted(first["labels"]) == [0, 1]  # a wrong label, found by the way
    assert first["samples"] in result["groups"]
    assert first["files"] == ["class0/0000.png", "class1/zzz.png"]
    assert first["files"] in result["group_files"]
    assert result["n_same_pixels"] == 1
    picture_size(picture)


def test_an_encoder_that_sees_little_is_said_first_and_calls_nothing_twice(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = report(folder, look(folder, "duplicates", "pixels:8", "--threshold", "0.1"))
    said = capsys.readouterr().out
    assert said.startswith("doubt     100 % of the images have a near-identical one: rather the en")
    assert result["doubt"] in said and result["doubt"] not in result["notes"]
    assert "twice" not in said and "look the same to this encoder: similarity 0.1" in said
    lines = said.splitlines()
    kinds = [next(i for i, line in enumerate(lines) if line.startswith(k)) for k in ("same", "al")]
    heading = f"3 of {result['n_duplicates']:,} pairs, the most alike first:"
    assert lines[kinds[0] + 2].strip() == heading
    assert all(" and #" in line for line in lines[kinds[0] + 3 : kinds[1]])
    strict = ["--threshold", "1", "--least-shared", "1"]
    assert report(folder, look(folder, "duplicates", "pixels:8", *strict))["doubt"] is None
    assert capsys.readouterr().out.count("pairs, the most alike first:") == 1  # none is the same


def test_samples_without_file_names_keep_their_numbers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(folder / "train.beton", tmp_path / "alone.beton")
    line = look(folder, "duplicates", "pixels:8", "--data.train", str(tmp_path / "alone.beton"))
    result = report(folder, [*line, "--threshold", "0.1"])
    first = result["duplicates"][0]
    assert (first["files"], result["group_files"]) == (None, None)
    said = capsys.readouterr()
    assert "and #".join(f"{sample} " for sample in first["samples"]).strip() in said.out
    assert "have their numbers and no file names" in said.err


@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        ("retrieve", ["--indices", "60"], "--indices 60"),
        ("retrieve", ["--query", "{folder}/nothing.jpg"], "no such file"),
        ("retrieve", ["--query", "{folder}/train.beton.json"], "name .beton files"),
        ("retrieve", ["--picture", "{folder}/found.jpg"], "ends in .png"),
        ("retrieve", ["--k", "0"], "--k 0"),
        ("cluster", ["--data.train", "{folder}/flat.beton"], "give --k"),
        ("cluster", ["--k", "61"], "--k 61"),
        ("diagnose", ["--views-of", "1"], "--views-of 1"),
        ("duplicates", ["--threshold", "1.5"], "--threshold 1.5"),
        ("duplicates", ["--data.train", "{folder}/none.beton"], "no such file"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_what_cannot_be_looked_at_gets_one_line_and_exit_code_2(
    folder: Path, method: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [word.format(folder=folder) for word in words]
    assert main(look(folder, method, "pixels:8", *filled)) == 2
    assert message in error_line(capsys.readouterr().err)


def _on_a_rank(rank: int, world_size: int, lines: list[list[str]]) -> list[str]:
    return [main_on_a_rank(rank, world_size, line) for line in lines]


@pytest.mark.slow
def test_two_processes_see_what_one_sees(folder: Path, tmp_path: Path) -> None:
    # fp64: batches of another size round differently.
    lines = [look(folder, name, str(folder / "run"), "--precision", "fp64") for name in METHODS]
    outs = [tmp_path / f"{name}.json" for name in METHODS]
    ending = [[*line, "--json", str(out)] for line, out in zip(lines, outs)]
    said = run_ranks(_on_a_rank, 2, ending, init_process_group=False, timeout=240)
    assert said[1] == [""] * len(METHODS)  # rank 0 speaks for all
    for line, out in zip(lines, outs):
        together, alone = json.loads(out.read_text()), report(folder, line)
        assert (together.pop("processes"), alone.pop("processes")) == (2, 1)
        assert together.pop("seconds") > 0 < alone.pop("seconds")
        assert together == alone


@pytest.mark.parametrize("method", METHODS)
def test_help_explains_each_method(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", method, "--help"]) == 0
    said = capsys.readouterr().out
    assert "RUN_OR_WEIGHTS" in said and "--data.train" in said and "(default" in said

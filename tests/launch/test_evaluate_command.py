import json
import re
import shutil
from pathlib import Path

import pytest

from launch.__main__ import main
from tests.dist import run_ranks
from tests.launch.evaluated import (
    CLASSES,
    READING,
    command,
    evaluate,
    main_on_a_rank,
    make_folder,
    report,
)
from tests.said import error_line
from trainer.features.knn import remark_on_k


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("evaluate"))


def test_knn_writes_fractions_and_prints_percent(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(folder, "knn", str(folder / "run"), "--k", "20")
    assert (result["n_train"], result["n_test"], result["num_classes"]) == (60, 30, CLASSES)
    assert 0.34 < result["top1"] <= 1.0
    assert result["top5"] == 1.0
    assert result["settings"]["k"] == 20
    assert result["settings"]["temperature"] == 0.07
    assert result["encoder"]["step"] == 6
    assert result["preprocessing"]["size"] == 32
    assert len(result["data"]["train"]["fingerprint"]) == 64
    said = capsys.readouterr().out
    assert f"top-1     {100 * result['top1']:.2f} %" in said
    assert f"top-{CLASSES}     100.00 %" in said


def test_a_run_knows_its_data_and_keeps_its_results(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, kept = folder / "run", folder / "run" / "evaluation"
    few = [*READING, "--k", "5"]
    named = evaluate(folder, "knn", str(run), "--k", "5")
    assert main(["evaluate", "knn", str(run), *few]) == 0
    assert f"written to {kept / 'knn-k-5.json'}" in capsys.readouterr().out
    written = json.loads((kept / "knn-k-5.json").read_text())
    assert (written["top1"], written["data"]) == (named["top1"], named["data"])
    assert main(["evaluate", "diagnose", f"untrained:{run}", *READING, "--views-of", "4"]) == 0
    assert (kept / "diagnose-untrained-views_of-4.json").exists()
    other = ["--data.test", str(folder / "train.beton")]
    assert (
        main(["evaluate", "knn", str(run), *few, "--data.train", str(folder / "train.beton")]) == 0
    )
    assert main(["evaluate", "knn", str(run), *few, *other]) == 0
    aside = folder / "aside"  # another file of the same name, whose result is another one
    aside.mkdir()
    for ending in ("beton", "beton.json"):
        (aside / f"train.{ending}").write_bytes((folder / f"test.{ending}").read_bytes())
    other = ["--data.test", str(aside / "train.beton")]
    assert main(["evaluate", "knn", str(run), *few, *other]) == 0
    names = sorted(path.name for path in kept.iterdir())
    assert names[:2] == ["diagnose-untrained-views_of-4.json", "knn-k-5.json"]
    assert [re.sub("[0-9a-f]{8}", "#", name) for name in names[2:]] == 2 * [
        "knn-test-train-k-5-#.json"
    ]


def test_a_run_that_cannot_be_written_is_evaluated_all_the_same(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "run", run, ignore=shutil.ignore_patterns("evaluation"))
    (run / "evaluation").touch()
    assert main(["evaluate", "knn", str(run), *READING]) == 0
    said = capsys.readouterr()
    assert "top-1" in said.out and "written to" not in said.out
    assert "note: the result is not kept: " in said.err
    assert main(["evaluate", "knn", str(run), *READING, "--json", str(run / "x" / "y")]) == 0
    assert main(["evaluate", "knn", str(run), *READING, "--json", str(run / "evaluation/y")]) == 2


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("r18.safetensors", "--data.train FILE.beton is missing, and "),
        ("alone", "{folder}/alone: the run had no --data.test; name the file by --data.test"),
        ("moved", "{folder}/gone.beton is not there any more; name the file by --data.train"),
    ],
)
def test_data_that_no_run_names_has_to_be_named(
    folder: Path, source: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data in (
        ("alone", {"train": str(folder / "train.beton"), "test": None}),
        ("moved", {"train": str(folder / "gone.beton")}),
    ):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps({"data": data}))
    assert main(["evaluate", "knn", str(folder / source)]) == 2
    assert said.format(folder=folder) in error_line(capsys.readouterr().err)


def test_several_k_stand_in_the_json_beside_the_first(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(folder, "knn", str(folder / "run"), "--k", "5", "1", "60")
    assert [each["k"] for each in result["by_k"]] == [5, 1, 60]
    assert result["top1"] == result["by_k"][0]["top1"]
    alone = evaluate(folder, "knn", str(folder / "run"), "--k", "1")
    assert alone["by_k"] == result["by_k"][1:2]
    assert "k 60 " in capsys.readouterr().out


def test_every_json_states_its_protocol(folder: Path) -> None:
    measured = evaluate(folder, "knn", str(folder / "run"), "--k", "5", "--which", "best")[
        "measured"
    ]
    assert measured["checkpoint"] == "best"
    assert measured["online"] is False
    assert measured["views"] == "one centre crop of 32 pixels, shorter side 32"
    assert (measured["k"], measured["temperature"]) == ([5], 0.07)


def test_k_above_the_training_samples_is_clipped_and_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(folder, "knn", str(folder / "run"))
    assert (result["settings"]["k"], result["settings"]["requested_k"]) == (60, 200)
    assert "k 200 is more than the 60 training samples" in capsys.readouterr().err


@pytest.mark.parametrize(("k", "said"), [(20, False), (21, True), (60, True)])
def test_k_above_the_samples_of_a_class_is_remarked(k: int, said: bool) -> None:
    """Beyond all samples, that it is cut is what is said."""
    remarks = remark_on_k(k, 60, CLASSES, "--k")
    assert bool(remarks) is said
    assert all(f"k {k} is more than the 20 " in r and "compare --k 10" in r for r in remarks)
    assert not remark_on_k(k, 60, 1, "--k")
    (cut,) = remark_on_k(61, 60, CLASSES, "--k")
    assert cut == "k 61 is more than the 60 training samples: all of them vote"


def test_an_exported_file_scores_as_its_run(folder: Path) -> None:
    run, exported = (
        evaluate(folder, "knn", str(folder / name), "--k", "5")
        for name in ("run", "r18.safetensors")
    )
    assert (run["top1"], run["settings"]) == (exported["top1"], exported["settings"])
    assert exported["encoder"]["kind"] == "exported"
    assert exported["encoder"]["sha256"]


def test_the_baselines_are_evaluated_like_any_encoder(folder: Path) -> None:
    for source, kind in (
        (f"untrained:{folder / 'run'}", "untrained"),
        ("pixels:16", "pixels"),
    ):
        result = evaluate(folder, "knn", source, "--k", "5")
        assert result["encoder"]["kind"] == kind
        assert 0 < result["top1"] <= 1
    assert result["encoder"]["feature_dim"] == 3 * 16 * 16


@pytest.mark.parametrize("protocol", ["auto", "cached", "canonical"])
def test_linear_protocols_learn_the_classes(
    folder: Path, protocol: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--protocol", protocol]
    if protocol != "auto":
        words += ["--epochs", "20", "--linear-batch", "20", "--base-lr", "0.3"]
    result = evaluate(folder, "linear", str(folder / "run"), *words)
    assert result["protocol"] == ("logistic" if protocol == "auto" else protocol)
    assert result["top1"] > 0.5
    assert result["n_train"] == 60
    captured = capsys.readouterr()
    assert ("logistic was chosen for 60 samples x 512" in captured.err) == (protocol == "auto")
    if protocol != "auto":
        assert result["settings"]["steps"] == 60
        assert result["settings"]["peak_lr"] == pytest.approx(0.3 * 20 / 256)


def test_a_sweep_names_what_it_tried_and_chose(folder: Path) -> None:
    words = ["--protocol", "sweep", "--epochs", "10", "--linear-batch", "20"]
    words += ["--base-lr", "1e-6", "1", "--weight-decay", "0", "1e-4"]
    result = evaluate(folder, "linear", str(folder / "run"), *words)
    assert result["protocol"] == "sweep"
    assert [trial["base_lr"] for trial in result["trials"]] == [1e-6, 1e-6, 1.0, 1.0]
    assert result["settings"]["base_lr"] == 1.0
    assert result["top1"] > 0.5


def test_fine_tuning_lists_the_labels_it_used(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--labels", "0.2", "--epochs", "1", "--tuning-batch", "6"]
    result = evaluate(folder, "finetune", str(folder / "run"), *words)
    assert result["protocol"] == "finetune"
    assert result["n_train"] == len(result["labelled_ids"]) == 4 * CLASSES
    assert result["settings"]["steps"] == 2
    assert "finetune, epochs 1, batch 6" in capsys.readouterr().out
    listed = tmp_path / "ids.txt"
    listed.write_text("".join(f"{sample}\n" for sample in result["labelled_ids"]))
    words = ["--label-list", str(listed), "--epochs", "1", "--tuning-batch", "6"]
    again = evaluate(folder, "finetune", str(folder / "run"), *words)
    assert again["labelled_ids"] == result["labelled_ids"]
    assert again["settings"]["final_loss"] == result["settings"]["final_loss"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labels", "1.5"], "--labels 1.5"),
        (["--label-list", "{folder}/none.txt"], "none.txt: no such file"),
        (["--label-list", "{folder}/train.beton"], "not text"),
        (["--head-layers", "9"], "head"),
        (["--epochs", "0"], "--epochs 0"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_fine_tuning_that_cannot_work_is_refused(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [word.format(folder=folder) for word in words]
    assert main(command(folder, "finetune", str(folder / "run"), *filled)) == 2
    assert message in error_line(capsys.readouterr().err)


@pytest.mark.parametrize("method", ["knn", "linear"])
def test_a_label_budget_takes_as_many_of_every_class(folder: Path, method: str) -> None:
    result = evaluate(folder, method, "pixels:8", "--labels-per-class", "4", "--seed", "3")
    assert result["n_train"] == 4 * CLASSES
    assert result["n_test"] == 30
    assert result["settings"]["labels_per_class"] == 4
    again = evaluate(folder, method, "pixels:8", "--labels-per-class", "4", "--seed", "3")
    assert again["top1"] == result["top1"]


def test_testing_on_the_training_file_is_remarked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(folder, "knn", "pixels:8", "--data.test", str(folder / "train.beton"))
    assert "have the same content" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.test", "{folder}/flat.beton"], "flat.beton: 30 of 30 samples have no label"),
        (["--data.test", "{folder}/renamed.beton"], "1 of its 3 classes are not in "),
        (["--data.test", "{folder}/none.beton"], "none.beton"),
        (["--labels-per-class", "21"], "ask for at most 20"),
        (["--labels-per-class", "0"], "--labels-per-class 0"),
        (["--k", "0"], "--k 0"),
        (["--k"], "--k: name at least one"),
        (["--temperature", "0"], "--temperature 0"),
        (["--size", "64", "--resize", "32"], "--resize must be at least --size"),
        (["--batch", "0"], "--batch 0"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "tpu"], "tpu"),
        (["--json", "{folder}"], "is a folder"),
        (["--json", "{folder}/train.beton"], "train.beton: exists and is no .json file"),
        (["--which", "first"], "first"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_what_cannot_be_evaluated_gets_one_line_and_exit_code_2(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [word.format(folder=folder) for word in words]
    assert main(command(folder, "knn", "pixels:8", *filled)) == 2
    assert message in error_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--protocol", "canonical", "--labels-per-class", "2"], "--protocol cached or logistic"),
        (["--protocol", "cached", "--base-lr", "1e30"], "lower --base-lr"),
        (["--c", "-1"], "--c -1"),
        (["--epochs", "0"], "--epochs 0"),
        (["--protocol", "cached", "--base-lr", "1", "2"], "--base-lr: several values"),
        (["--preset", "simclr-imagenet", "--epochs", "3"], "leave it out"),
        (["--preset", "simclr-imagenet", "--protocol", "cached"], "leave out --protocol"),
        (["--weight-decay", "-1"], "--weight-decay -1"),
        (["--epochs", "5"], "--epochs is not for --protocol logistic, which auto chose here: "),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_linear_settings_that_cannot_work_are_refused(
    folder: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(folder, "linear", str(folder / "run"), *words)) == 2
    assert message in capsys.readouterr().err


TOGETHER = {
    "knn": [],
    "linear --protocol logistic": ["--c", "1"],
    "linear --protocol canonical": ["--epochs", "3", "--linear-batch", "20"],
}


def _on_a_rank(rank: int, world_size: int, lines: list[list[str]]) -> list[str]:
    return [main_on_a_rank(rank, world_size, line) for line in lines]


def test_two_processes_give_the_result_of_one(folder: Path, tmp_path: Path) -> None:
    lines = []
    for name, words in TOGETHER.items():
        method, *protocol = name.split()
        lines.append(command(folder, method, str(folder / "run"), *protocol, *words))
    outs = [tmp_path / f"{number}.json" for number in range(len(lines))]
    ending = [[*line, "--json", str(out)] for line, out in zip(lines, outs)]
    first, second = run_ranks(_on_a_rank, 2, ending, init_process_group=False, timeout=240)
    assert second == [""] * len(lines)  # rank 0 speaks for all
    for line, out, said in zip(lines, outs, first):
        assert "top-1" in said
        alone, together = report(folder, line), json.loads(out.read_text())
        assert together["processes"] == 2
        for key in ("top1", "top5"):
            assert together[key] == alone[key]

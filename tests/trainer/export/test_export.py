import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from common.errors import CheckpointError, ConfigError, DataError, NumericalError
from tests.trainer.runs import pack_images
from tests.trainer.saved_runs import FINGERPRINT, SMALL, save_run, saved_run
from trainer.evaluation.load_encoder import Preprocessing, load_encoder
from trainer.export import Exported, export, write
from trainer.export.named_models import ToTorchvision
from trainer.export.proof import prove
from trainer.features.extraction import default_resize
from trainer.models.encoders import EncoderConfig, build_encoder

RESNET18 = EncoderConfig(name="resnet18")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_images(tmp_path_factory.mktemp("data"), count=12)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return saved_run(tmp_path_factory.mktemp("cifar stem"), data)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return saved_run(tmp_path_factory.mktemp("small"), data, SMALL)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, run: Path) -> Exported:
    return export(run, tmp_path_factory.mktemp("exported") / "o'dd name.safetensors")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def feature_images(side: int = 32) -> torch.Tensor:
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def features_of(model: nn.Module, side: int = 32) -> torch.Tensor:
    return model.eval()(feature_images(side))


# --- the file ---


def test_torchvision_takes_the_file_with_only_its_classifier_missing(
    tmp_path: Path, data: Path
) -> None:
    encoder = save_run(tmp_path / "run", data, RESNET18)
    done = export(tmp_path / "run", tmp_path / "out.safetensors")
    model = torchvision.models.resnet18(weights=None)
    weights = safetensors.torch.load_file(done.weights)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    model.fc = nn.Identity()
    assert torch.equal(features_of(model), features_of(encoder))
    assert files(tmp_path) == ["out.json", "out.md", "out.safetensors", "run"]


def test_the_jsons_own_instructions_load_the_file_in_a_fresh_interpreter(
    tmp_path: Path, run: Path, exported: Exported
) -> None:
    facts = json.loads(exported.description.read_text())
    safetensors.torch.save_file({"images": feature_images()}, tmp_path / "images")
    script = [
        *facts["load"],
        f"model.{facts['torchvision']['classifier']} = torch.nn.Identity()",
        f"images = load_file({str(tmp_path / 'images')!r})['images']",
        "from safetensors.torch import save_file",
        "with torch.no_grad(): features = model.eval()(images)",
        f"save_file({{'features': features}}, {str(tmp_path / 'features')!r})",
        "assert sorted(missing) == ['fc.bias', 'fc.weight'] and not unexpected",
    ]
    subprocess.run(
        [sys.executable, "-I", "-c", "\n".join(script)],
        cwd=exported.weights.parent,
        check=True,
        timeout=120,
    )
    theirs = safetensors.torch.load_file(tmp_path / "features")["features"]
    ours = features_of(load_encoder(str(run)).encoder)
    torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=1e-6)


def test_the_json_says_what_the_file_is(exported: Exported) -> None:
    facts = json.loads(exported.description.read_text())
    expected = {
        "architecture": "resnet18",
        "recipe": "simclr-cifar10-r18",
        "seed": 5,
        "step": 6,
        "epoch": 2.0,
        "which": "last",
        "data_fingerprint": FINGERPRINT,
        "feature_dim": 512,
        "class_names": ["a", "b"],
        "sha256": hashlib.sha256(exported.weights.read_bytes()).hexdigest(),
    }
    assert {name: facts[name] for name in expected} == expected
    # Any size is taken; the one of the run is the preprocessing's.
    assert facts["encoder"] == {
        "name": "resnet18", "stem": "cifar", "zero_init_residual": False, "norm": "batch",
    }  # fmt: skip
    preprocessing = facts["preprocessing"]
    assert {name: preprocessing[name] for name in ("size", "resize", "normalize", "mean")} == {
        "size": 32, "resize": 32, "normalize": True, "mean": [0.485, 0.456, 0.406],
    }  # fmt: skip
    assert facts["trained_by"]["commit"] == "c0ffee"
    assert facts["exported_by"]["torchvision"] == torchvision.__version__
    assert 0 <= facts["proof"]["relative_difference"] <= facts["proof"]["tolerance"] <= 1e-8


def test_the_proof_uses_the_runs_images_while_they_are_there_and_digits_after(
    tmp_path: Path, exported: Exported, data: Path
) -> None:
    assert exported.proof.image_source == str(data)
    save_run(tmp_path / "moved", tmp_path / "gone.beton", SMALL)
    done = export(tmp_path / "moved", tmp_path / "b.safetensors")
    assert done.proof.image_source == "embedded:digits"


def test_the_proof_names_what_it_was_made_with(exported: Exported) -> None:
    proof = json.loads(exported.description.read_text())["proof"]
    assert proof["images"] == 8
    assert torchvision.__version__.startswith(proof["versions"]["torchvision"])
    assert proof["largest_difference"] <= proof["tolerance"] * proof["largest_feature"]
    assert (proof["computed_by"], proof["dtype"]) == ("a model that torchvision built", "float64")


def test_the_best_checkpoint_can_be_exported(tmp_path: Path, run: Path, exported: Exported) -> None:
    best = export(run, tmp_path / "best.safetensors", which="best")
    assert (best.facts["step"], exported.facts["step"]) == (3, 6)
    assert best.weights.read_bytes() != exported.weights.read_bytes()


@pytest.mark.parametrize(
    "name",
    ["squeezenet1_1", "shufflenet_v2_x0_5", pytest.param("vit_b_32", marks=pytest.mark.slow)],
)
def test_other_architectures_of_torchvision_are_proven_too(
    tmp_path: Path, data: Path, name: str
) -> None:
    save_run(tmp_path / "run", data, EncoderConfig(name=name, image_size=64))
    done = export(tmp_path / "run", tmp_path / "out.safetensors")
    assert done.proof.relative_difference <= 1e-9
    assert done.facts["encoder"].get("image_size") == (64 if name == "vit_b_32" else None)
    loaded = load_encoder(str(done.weights))
    assert features_of(loaded.encoder, 64).shape == (3, done.facts["feature_dim"])


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5"])
def test_an_encoder_that_sees_grey_is_exported_as_one_of_coloured_images(
    tmp_path: Path, data: Path, name: str
) -> None:
    trained = save_run(tmp_path / "run", data, EncoderConfig(name=name, sees="grey"))
    done = export(tmp_path / "run", tmp_path / "out.safetensors")
    assert done.proof.relative_difference <= 1e-9
    for source in (tmp_path / "run", done.weights):
        theirs = features_of(load_encoder(str(source)).encoder)
        # Float32 sums of other order, through a network's depth; grey itself moves them far more.
        torch.testing.assert_close(theirs, features_of(trained), rtol=1e-3, atol=1e-4)


# --- what is refused, and what is left behind then ---


def test_a_model_that_computes_something_else_leaves_no_file(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ToTorchvision.load

    def with_another_epsilon(*arguments):  # type: ignore[no-untyped-def]
        model = whole(*arguments)
        model.bn1.eps = 1.1e-5
        return model

    monkeypatch.setattr(ToTorchvision, "load", with_another_epsilon)
    with pytest.raises(NumericalError, match="differ by"):
        export(run, tmp_path / "out.safetensors")
    assert files(tmp_path) == []


def test_a_file_with_a_key_too_few_leaves_no_file(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        write, "_plain", lambda t: {k: v for k, v in t.items() if k != "bn1.running_mean"}
    )
    with pytest.raises(NumericalError, match=r"bn1\.running_mean"):
        export(run, tmp_path / "out.safetensors")
    assert files(tmp_path) == []


def test_features_that_are_all_zero_prove_nothing(tmp_path: Path) -> None:
    class Zero(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0 * x.flatten(1)

    with pytest.raises(NumericalError, match="would prove nothing"):
        prove(Zero(), Zero(), ToTorchvision, feature_images(), "random")


@pytest.mark.parametrize("existing", ["out.safetensors", "out.json", "out.md"])
def test_existing_files_are_kept_unless_forced(
    tmp_path: Path, small_run: Path, existing: str
) -> None:
    (tmp_path / existing).write_text("precious")
    with pytest.raises(ConfigError, match="--force"):
        export(small_run, tmp_path / "out.safetensors")
    assert (tmp_path / existing).read_text() == "precious"
    assert files(tmp_path) == [existing]
    export(small_run, tmp_path / "out.safetensors", force=True)
    assert load_encoder(str(tmp_path / "out.safetensors")).description["step"] == 6


def test_killed_between_the_two_files_leaves_no_mismatched_pair(
    tmp_path: Path, small_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(small_run, tmp_path / "out.safetensors", which="best")
    publish = write.AtomicFile.publish

    def power_cut(self) -> None:  # type: ignore[no-untyped-def]
        if self._path.suffix == ".json":
            raise KeyboardInterrupt
        publish(self)

    monkeypatch.setattr(write.AtomicFile, "publish", power_cut)
    with pytest.raises(KeyboardInterrupt):
        export(small_run, tmp_path / "out.safetensors", force=True)
    with pytest.raises(DataError, match=r"out\.json: missing"):
        load_encoder(str(tmp_path / "out.safetensors"))
    assert files(tmp_path) == ["out.md", "out.safetensors"]


@pytest.mark.parametrize(
    ("name", "message"), [("out.pt", "NAME.safetensors"), ("out", "NAME.safetensors")]
)
def test_other_suffixes_are_refused(tmp_path: Path, run: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export(run, tmp_path / name)


def test_an_encoder_that_is_not_torchvisions_is_refused(tmp_path: Path, data: Path) -> None:
    save_run(
        tmp_path / "run", data, EncoderConfig(name="tests.trainer.export.test_export:small_encoder")
    )
    with pytest.raises(ConfigError, match="no architecture of torchvision's"):
        export(tmp_path / "run", tmp_path / "out.safetensors")


def small_encoder() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.feature_dim = 8
    return model


# --- reading it back ---


def test_a_run_and_its_export_are_the_same_encoder(run: Path, exported: Exported) -> None:
    ours, theirs = load_encoder(str(run)), load_encoder(str(exported.weights))
    assert torch.equal(features_of(ours.encoder), features_of(theirs.encoder))
    assert ours.preprocessing == theirs.preprocessing
    for name in ("architecture", "stem", "feature_dim", "step", "epoch", "recipe", "seed"):
        assert ours.description[name] == theirs.description[name], name


def test_untrained_is_what_the_runs_seed_started_from(run: Path, exported: Exported) -> None:
    torch.manual_seed(5)
    fresh = build_encoder(EncoderConfig(name="resnet18", stem="cifar"))
    torch.manual_seed(77)
    for source in (f"untrained:{run}", f"untrained:{exported.weights}"):
        assert torch.equal(features_of(load_encoder(source).encoder), features_of(fresh))
    after = torch.rand(1)
    torch.manual_seed(77)
    assert torch.equal(torch.rand(1), after)  # nobody else's random numbers were touched


def test_pixels_are_the_image_itself() -> None:
    loaded = load_encoder("pixels:32")
    assert torch.equal(features_of(loaded.encoder), feature_images().flatten(1))
    assert loaded.preprocessing == Preprocessing(size=32, resize=32)


def test_a_users_own_encoder_is_loaded_from_its_run_but_never_named_by_a_file(
    tmp_path: Path, data: Path, exported: Exported
) -> None:
    name = "tests.trainer.export.test_export:small_encoder"
    save_run(tmp_path / "run", data, EncoderConfig(name=name))
    assert features_of(load_encoder(str(tmp_path / "run")).encoder).shape == (3, 8)
    weights = edited(tmp_path, exported, lambda facts: facts["encoder"].update(name="os:getcwd"))
    with pytest.raises(DataError, match="names the code 'os:getcwd'"):
        load_encoder(str(weights))


def edited(folder: Path, exported: Exported, edit: Callable[[dict], object]) -> Path:
    """The exported pair with another JSON."""
    facts = json.loads(exported.description.read_text())
    edit(facts)
    (folder / "edited.json").write_text(json.dumps(facts))
    (folder / "edited.safetensors").symlink_to(exported.weights)
    return folder / "edited.safetensors"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: f.update(sha256="0" * 64), "does not match the checksum"),
        (lambda f: f.update(version=99), "version 99"),
        (lambda f: f.update(format="other"), "format 'other'"),
        (lambda f: f.pop("encoder"), "no section 'encoder'"),
        (lambda f: f["encoder"].update(name="resnet19"), "did you mean resnet1"),
        (lambda f: f["encoder"].update(name="resnet34"), "does not hold the encoder"),
        (lambda f: f["encoder"].update(image_size=10**7), "image-size 10000000"),
        (lambda f: f["encoder"].update(evil=1), "evil"),
        (lambda f: f["preprocessing"].update(mean=[0.5]), "mean"),
    ],
)
def test_a_json_that_does_not_fit_is_refused_by_one_line(
    tmp_path: Path, exported: Exported, edit: Callable[[dict], object], message: str
) -> None:
    weights = edited(tmp_path, exported, edit)
    with pytest.raises((DataError, ConfigError, CheckpointError), match=message) as caught:
        load_encoder(str(weights))
    assert "\n" not in str(caught.value)


def damaged_header(weights: bytes) -> bytes:
    return (1 << 40).to_bytes(8, "little") + weights[8:]


def overlapping(weights: bytes) -> bytes:
    size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + size])
    first, second = [name for name in header if name != "__metadata__"][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + weights[8 + size :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda w: w[: len(w) // 2],
        lambda w: b"",
        lambda w: b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        damaged_header,
        overlapping,
    ],
    ids=["cut", "empty", "pickle", "header too large", "overlap"],
)
def test_damaged_weights_are_refused_even_with_a_matching_checksum(
    tmp_path: Path, exported: Exported, damage: Callable[[bytes], bytes]
) -> None:
    weights, content = tmp_path / "w.safetensors", damage(exported.weights.read_bytes())
    weights.write_bytes(content)
    weights.with_suffix(".json").write_text(json.dumps(exported.facts))
    with pytest.raises(DataError, match="checksum"):
        load_encoder(str(weights))
    facts = {**exported.facts, "sha256": hashlib.sha256(content).hexdigest()}
    weights.with_suffix(".json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="no valid safetensors file"):
        load_encoder(str(weights))


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("nowhere", ConfigError, "no such run folder or weights file"),
        ("untrained:nowhere", ConfigError, "no such run folder"),
        ("pixels:0", ConfigError, "1 to 512"),
        ("pixels:big", ConfigError, "1 to 512"),
        (".", CheckpointError, "no config.json"),
        (__file__, DataError, "not a .safetensors file"),
    ],
)
def test_sources_that_name_nothing_are_refused(
    source: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_encoder(source)


def test_small_images_are_evaluated_whole_and_large_ones_cropped_as_usual() -> None:
    assert [default_resize(size) for size in (28, 32, 64, 96, 224)] == [28, 32, 64, 110, 256]
    whole = Preprocessing(size=224, resize=256)
    assert whole.resized(96, None) == Preprocessing(size=96, resize=110)
    assert whole.resized(None, 224) == Preprocessing(size=224, resize=224)
    with pytest.raises(ConfigError, match="--resize must be at least --size"):
        whole.resized(None, 200)

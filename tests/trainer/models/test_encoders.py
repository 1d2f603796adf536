"""Encoders keep torchvision's names and functions; heads are what the papers describe."""

import dataclasses
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from common.errors import ConfigError
from tests.trainer.tiny import tiny_config
from trainer.models.encoders import (
    EncoderConfig,
    build_encoder,
    remove_classifier,
    stochastic_layers,
)
from trainer.models.heads import HeadConfig, ProjectionHead
from trainer.objectives.base import Objective
from trainer.parallel.networks import training_objective
from trainer.parallel.sync_batch_norm import convert_sync_batch_norm


def parameter_count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


# One of each family: name -> (feature size as published, path of the classifier).
FAMILIES = {
    "resnet18": (512, "fc"),
    "resnet50": (2048, "fc"),
    "wide_resnet50_2": (2048, "fc"),
    "resnext50_32x4d": (2048, "fc"),
    "alexnet": (4096, "classifier.6"),
    "convnext_tiny": (768, "classifier.2"),
    "densenet121": (1024, "classifier"),
    "efficientnet_b0": (1280, "classifier.1"),
    "googlenet": (1024, "fc"),
    "inception_v3": (2048, "fc"),
    "maxvit_t": (512, "classifier.5"),
    "mnasnet0_5": (1280, "classifier.1"),
    "mobilenet_v2": (1280, "classifier.1"),
    "mobilenet_v3_small": (1024, "classifier.3"),
    "regnet_y_400mf": (440, "fc"),
    "shufflenet_v2_x0_5": (1024, "fc"),
    "squeezenet1_1": (512, "classifier.1"),
    "swin_t": (768, "head"),
    "vgg11_bn": (4096, "classifier.6"),
    "vit_b_32": (768, "heads.head"),
}


@pytest.fixture
def _no_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights of twenty networks take seconds, and names do not depend on them."""
    for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_", "trunc_normal_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)


@pytest.mark.usefixtures("_no_initialisation")
@pytest.mark.parametrize("name", FAMILIES)
def test_keys_are_torchvisions_without_the_classifier(name: str) -> None:
    feature_dim, classifier = FAMILIES[name]
    encoder = build_encoder(EncoderConfig(name=name))
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": False}
    original = torchvision.models.get_model(name, weights=None, **options)
    assert encoder.feature_dim == feature_dim
    kept = {
        key: value.shape
        for key, value in original.state_dict().items()
        if not key.startswith(f"{classifier}.")
    }
    assert {key: value.shape for key, value in encoder.state_dict().items()} == kept
    assert len(kept) < len(original.state_dict())
    assert remove_classifier(original) == classifier


def test_features_are_the_classifiers_input() -> None:
    torch.manual_seed(0)
    original = torchvision.models.resnet18().eval()
    encoder = build_encoder(EncoderConfig(name="resnet18")).eval()
    encoder.load_state_dict(
        {k: v for k, v in original.state_dict().items() if not k.startswith("fc.")}
    )
    images = torch.randn(2, 3, 64, 64)
    features = encoder(images)
    assert features.shape == (2, encoder.feature_dim)
    torch.testing.assert_close(original.fc(features), original(images))


def test_same_seed_same_weights_and_torchvisions() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return build_encoder(EncoderConfig(name="resnet18")).layer4[1].conv2.weight  # type: ignore

    torch.manual_seed(7)
    reference = torchvision.models.resnet18()
    assert torch.equal(weights(7), reference.layer4[1].conv2.weight)
    assert not torch.equal(weights(8), reference.layer4[1].conv2.weight)


def test_finding_the_feature_size_draws_no_random_numbers_and_keeps_modes() -> None:
    torch.manual_seed(7)
    torchvision.models.resnet18()
    after_torchvision = torch.rand(1)
    torch.manual_seed(7)
    encoder = build_encoder(EncoderConfig(name="resnet18"))
    assert torch.equal(torch.rand(1), after_torchvision)
    assert all(module.training for module in encoder.modules())
    assert not any(p.is_meta for p in encoder.parameters())
    assert torch.equal(encoder.bn1.running_mean, torch.zeros(64))  # type: ignore[union-attr]


def test_cifar_stem_keeps_resolution_and_names() -> None:
    plain = build_encoder(EncoderConfig(name="resnet18"))
    cifar = build_encoder(EncoderConfig(name="resnet18", stem="cifar"))
    assert list(cifar.state_dict()) == list(plain.state_dict())
    assert cifar.state_dict()["conv1.weight"].shape == (64, 3, 3, 3)
    assert parameter_count(cifar) == 11_168_832  # 11,173,962 with a classifier of ten, as published
    seen: list[torch.Size] = []
    cifar.get_submodule("layer1").register_forward_pre_hook(lambda _, x: seen.append(x[0].shape))
    cifar.eval()(torch.randn(1, 3, 32, 32))
    assert seen == [torch.Size([1, 64, 32, 32])]


@pytest.mark.parametrize(
    ("name", "published"), [("resnet20", 269_722), ("resnet56", 853_018), ("resnet110", 1_727_962)]
)
def test_small_resnets_are_those_of_the_paper(name: str, published: int) -> None:
    """0.27, 0.85 and 1.7 million (arXiv 1512.03385, table 6); to the digit as they are trained at
    github.com/akamaster/pytorch_resnet_cifar10, less the classifier."""
    encoder = build_encoder(EncoderConfig(name=name, stem="cifar"))
    assert parameter_count(encoder) == published - 650
    assert encoder.feature_dim == 64
    convolutions = [m for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) + 1 == int(name.removeprefix("resnet"))


@pytest.mark.parametrize(
    ("name", "side", "published"), [("vit_s_16", 224, 22_050_664), ("vit_ti_16", 224, 5_717_416)]
)
def test_small_transformers_are_those_of_deit(name: str, side: int, published: int) -> None:
    """22 and 5 million (arXiv 2012.12877, table 1); to the digit as timm counts them, less the
    classifier of 1,000."""
    encoder = build_encoder(EncoderConfig(name=name, image_size=side))
    assert parameter_count(encoder) == published - 1000 * (encoder.feature_dim + 1)
    small = build_encoder(EncoderConfig(name=name.replace("16", "4"), image_size=32)).eval()
    assert small(torch.randn(2, 3, 32, 32)).shape == (2, encoder.feature_dim)


def test_a_small_resnets_settings_are_a_resnets() -> None:
    settings: dict[str, Any] = {"name": "resnet8x2", "zero_init_residual": True}
    seen: list[tuple[int, ...]] = []
    for stem in ("cifar", "cifar-stride2"):
        encoder = build_encoder(EncoderConfig(stem=stem, **settings)).eval()
        last = encoder.get_submodule("layer3")
        last.register_forward_hook(lambda _, x, y: seen.append(tuple(y.shape)))
        assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 128) == (2, encoder.feature_dim)
    assert seen == [(2, 128, 8, 8), (2, 128, 4, 4)]
    residual = [m.weight for name, m in encoder.named_modules() if name.endswith("0.bn2")]
    assert len(residual) == 3
    assert not any(weight.any() for weight in residual)  # type: ignore[operator, union-attr]


def test_parameter_count_is_the_published_one() -> None:
    assert parameter_count(build_encoder(EncoderConfig(name="resnet18"))) == 11_689_512 - 513_000


def test_zero_initialised_residuals_begin_as_identities() -> None:
    encoder = build_encoder(EncoderConfig(name="resnet18", zero_init_residual=True))
    norms = [m for name, m in encoder.named_modules() if name.endswith("bn2")]
    assert len(norms) == 8
    assert all(not norm.weight.any() for norm in norms)  # type: ignore[operator, union-attr]


def test_dropout_of_the_classifier_goes_with_it() -> None:
    assert stochastic_layers(torchvision.models.mobilenet_v2()) == ["classifier.0"]
    assert stochastic_layers(build_encoder(EncoderConfig(name="mobilenet_v2"))) == []
    assert "features.2.0.stochastic_depth" in stochastic_layers(
        build_encoder(EncoderConfig(name="efficientnet_b0"))
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EncoderConfig(name="resnet5O"), "did you mean .*resnet50"),
        (EncoderConfig(name="RESNET50"), "did you mean resnet50"),
        (EncoderConfig(name="zzz"), "there is no model 'zzz'$"),
        (EncoderConfig(name="resnet2O"), "did you mean .*resnet20"),
        (EncoderConfig(name="vgg11", stem="cifar"), "for ResNets.* set --encoder.stem imagenet"),
        (
            EncoderConfig(name="vgg11", zero_init_residual=True),
            "for ResNets.* set --encoder.no-zero-init-residual",
        ),
        (EncoderConfig(name="resnet20"), "set --encoder.stem cifar or cifar-stride2"),
        (EncoderConfig(name="vit_b_32", image_size=50), r"image-size 50: .*divisible"),
    ],
)
@pytest.mark.usefixtures("_no_initialisation")
def test_impossible_encoders_are_refused_in_one_line(config: EncoderConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_encoder(config)
    assert "\n" not in str(caught.value)


class Pooled(nn.Module):
    """A user's module: its feature size has to be found."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 11, 3)
        self.norm = nn.BatchNorm2d(11)
        self.frozen = nn.BatchNorm2d(11).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.norm(self.conv(x))).mean((2, 3))


class Declared(nn.Module):
    """One that cannot run on the meta device and says its size."""

    feature_dim = 5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, : int(x.numel() > 0 and 5)]


@pytest.fixture
def user_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    module = types.ModuleType("my_encoders")
    monkeypatch.setitem(sys.modules, "my_encoders", module)
    module.pooled = Pooled  # type: ignore[attr-defined]
    module.declared = Declared  # type: ignore[attr-defined]
    module.image = nn.Identity  # type: ignore[attr-defined]
    module.number = lambda: 3  # type: ignore[attr-defined]
    module.broken = lambda: 1 // 0  # type: ignore[attr-defined]
    module.ReadsValues = ReadsValues  # type: ignore[attr-defined]
    return module


class ReadsValues(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) if x.sum() > 0 else x


def test_users_module_by_import_path(user_module: types.ModuleType) -> None:
    encoder = build_encoder(EncoderConfig(name="my_encoders:pooled"))
    assert encoder.feature_dim == 11
    assert isinstance(encoder, Pooled)
    assert encoder.training
    assert not encoder.frozen.training
    assert encoder(torch.randn(2, 3, 8, 8)).shape == (2, 11)
    assert build_encoder(EncoderConfig(name="my_encoders:declared")).feature_dim == 5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_encoders:poold", "no callable 'poold'; did you mean pooled"),
        ("my_encoders:READVALUES", "did you mean ReadsValues"),
        ("my_encodings:pooled", "cannot import my_encodings .*PYTHONPATH"),
        ("my_encoders:", "not of the form package.module:callable"),
        (":pooled", "not of the form package.module:callable"),
        ("my_encoders:number", "returned a int, not an nn.Module"),
        ("my_encoders:broken", "failed: ZeroDivisionError"),
        ("my_encoders:image", r"returns \(2, 3, 224, 224\), not \(N, F\) features"),
        ("my_encoders:ReadsValues", "give your module an int attribute feature_dim"),
    ],
)
def test_users_mistakes_are_named(name: str, message: str, user_module: types.ModuleType) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_encoder(EncoderConfig(name=name))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"for ResNets.* set --encoder\.stem imagenet"):
        build_encoder(EncoderConfig(name="my_encoders:pooled", stem="cifar"))


def test_the_working_folder_is_the_last_place_to_find_a_users_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "from torch import nn\n\ndef net():\n    return nn.Flatten()\n"
    (tmp_path / "net_of_the_working_folder.py").write_text(code)
    (tmp_path / "trainer.py").write_text("raise AssertionError('hides ours')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    before = list(sys.path)
    assert build_encoder(EncoderConfig(name="resnet8", stem="cifar")).feature_dim == 64
    assert sys.path == before  # for those encoders alone
    name = "net_of_the_working_folder:net"
    assert build_encoder(EncoderConfig(name=name, image_size=4)).feature_dim == 48
    assert sys.path == [*before, str(tmp_path)]


class WithSpare(Pooled):
    """One that has a layer which it does not use."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2).requires_grad_(not frozen)


@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_that_no_gradient_reaches_are_named_on_any_number_of_processes(
    world_size: int, user_module: types.ModuleType
) -> None:
    """DDP would end at the second step; one process and FSDP would go on."""
    user_module.spare = WithSpare  # type: ignore[attr-defined]
    user_module.frozen = lambda: WithSpare(frozen=True)  # type: ignore[attr-defined]
    user_module.narrow = lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, 2))  # type: ignore
    config = tiny_config(Path("x"), Path("run"))

    def objective(name: str) -> Objective:
        encoder = EncoderConfig(name=f"my_encoders:{name}", image_size=4)
        run = dataclasses.replace(config, encoder=encoder)
        return training_objective(run, world_size, None, num_samples=120)

    with pytest.raises(ConfigError, match=r"no gradient reaches spare\.weight, spare\.bias; leave"):
        objective("spare")
    with pytest.raises(ConfigError, match=r"fails on images of --crop\.size 32 \(RuntimeError: "):
        objective("narrow")
    trained = objective("frozen").encoder
    assert torch.equal(trained.norm.running_mean, torch.zeros(11))  # type: ignore[union-attr]
    assert all(weight.grad is None for weight in trained.parameters())


def _shapes(config: HeadConfig, in_dim: int = 16) -> list[str]:
    """A head as a list: ``16->8+b`` a layer with bias, then its norm's learnt tensors, ReLU."""
    out = []
    for module in ProjectionHead(in_dim, config).modules():
        if isinstance(module, nn.Linear):
            bias = "+b" if module.bias is not None else ""
            out.append(f"{module.in_features}->{module.out_features}{bias}")
        elif isinstance(module, nn.BatchNorm1d):
            out.append("bn(" + ",".join(name for name, _ in module.named_parameters()) + ")")
        elif isinstance(module, nn.ReLU):
            out.append("relu")
    return out


def test_heads_of_the_papers() -> None:
    simclr = HeadConfig(hidden_dim=0, out_dim=4)
    assert _shapes(simclr) == ["16->16", "bn(weight,bias)", "relu", "16->4", "bn(weight)"]
    v2 = HeadConfig(layers=3, hidden_dim=8, out_dim=4)
    hidden = ["bn(weight,bias)", "relu"]
    assert _shapes(v2) == ["16->8", *hidden, "8->8", *hidden, "8->4", "bn(weight)"]
    moco_v1 = HeadConfig(layers=1, out_dim=4, last_norm="none")
    assert _shapes(moco_v1) == ["16->4+b"]
    moco_v2 = HeadConfig(hidden_dim=8, out_dim=4, hidden_norm="none", last_norm="none")
    assert _shapes(moco_v2) == ["16->8+b", "relu", "8->4+b"]
    v3_projector = HeadConfig(layers=3, hidden_dim=8, out_dim=4, last_norm="plain")
    assert _shapes(v3_projector) == ["16->8", *hidden, "8->8", *hidden, "8->4", "bn()"]
    v3_predictor = HeadConfig(hidden_dim=8, out_dim=4, last_norm="none", linear_bias="never")
    assert _shapes(v3_predictor) == ["16->8", *hidden, "8->4"]


def test_default_head_is_simclrs() -> None:
    head = ProjectionHead(2048, HeadConfig())
    assert head.out_dim == 128
    assert parameter_count(head) == 2048 * 2048 + 2 * 2048 + 2048 * 128 + 128


def test_head_with_synchronised_norms_is_the_same_function() -> None:
    torch.manual_seed(0)
    head = ProjectionHead(16, HeadConfig(hidden_dim=8, out_dim=4)).double()
    features = torch.randn(6, 16, dtype=torch.float64)
    want = head(features)
    torch.testing.assert_close(convert_sync_batch_norm(head)(features), want)


@pytest.mark.parametrize("options", [{"layers": 0}, {"hidden_dim": -1}, {"out_dim": 0}])
def test_impossible_heads_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options)).replace("_", "-")):
        HeadConfig(**options)  # type: ignore[arg-type]

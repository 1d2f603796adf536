"""The settings as flags: tyro's command line and our walk of the dataclasses are one."""

import contextlib
import dataclasses
import io
import re
from pathlib import Path

import pytest

from launch.settings_arguments import parse_settings
from trainer.config import DataConfig, RunConfig, to_json
from trainer.recipes import RECIPES
from trainer.state.settings import changed_from, settings

DATA = ["--data.train", "a.beton"]


def config_of(recipe: str, *words: str) -> RunConfig:
    return parse_settings("pretrain", recipe, [*DATA, *words])


@pytest.mark.parametrize("recipe", ["simclr-r50", "mocov2-r50", "mocov3-r50"])
def test_the_flags_are_those_that_help_shows(recipe: str) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        config_of(recipe, "--help")
    shown = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*\w", said.getvalue()))
    ours = {flag for setting in settings(RECIPES[recipe]()) for flag in setting.flags}
    assert ours - {"--help"} == shown - {"--help"}


def test_a_recipes_first_line_says_what_it_is() -> None:
    """A run's README quotes it."""
    for build in RECIPES.values():
        assert (build.__doc__ or "").partition("\n")[0].endswith(".")


def test_the_words_of_all_settings_give_the_same_configuration() -> None:
    for recipe, build in RECIPES.items():
        config = dataclasses.replace(
            build(),
            data=DataConfig(train=(Path("a.beton"),), test=(Path("b c.beton"),)),
            steps=7,
            compile=True,
            sync_batch_norm=False,
        )
        words = [word for setting in settings(config) for word in setting.words()]
        assert to_json(parse_settings("pretrain", recipe, words)) == to_json(config)


def test_what_a_recipe_sets_of_a_resnet_stays_with_resnets() -> None:
    """The encoders that help suggests start without another option."""
    own = config_of("simclr-cifar10-r18").encoder
    for name in ("convnext_tiny", "my.module:encoder"):
        words = ["--encoder.name", name]
        for recipe in ("simclr-r50", "simclr-cifar10-r18"):
            encoder = config_of(recipe, *words).encoder
            assert (encoder.stem, encoder.zero_init_residual) == ("imagenet", False)
        asked = config_of("mocov2-r50", *words, "--encoder.zero-init-residual").encoder
        assert asked.zero_init_residual  # asked for: to be refused
    sized = ("simclr-cifar10-r18", "--encoder.name", "my:encoder", "--encoder.image-size", "16")
    assert config_of(*sized).encoder.image_size == 16
    assert config_of(*sized[:3], "--crop.size", "48").encoder.image_size == 48  # else the crop's
    for name in ("resnet34", "resnet20"):
        kept = config_of("simclr-cifar10-r18", "--encoder.name", name).encoder
        assert kept == dataclasses.replace(own, name=name)


def test_only_what_differs_is_said_to_differ() -> None:
    base = config_of("simclr-r50")
    assert changed_from(base, base) == []
    changed = changed_from(base, config_of("simclr-r50", "--batch", "8", "--optim.base-lr", "0.3"))
    assert [(s.key, s.flag, s.value) for s in changed] == [("batch", "--batch", 8)]

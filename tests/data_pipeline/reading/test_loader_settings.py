"""What the loader cannot do is refused by name; without FFCV, torchvision takes its place."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import ConfigError, DataError
from data_pipeline.reading import ffcv_compat
from data_pipeline.reading.loader import EvalLoader
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import Position
from data_pipeline.reading.pool import LoaderConfig
from tests.data_pipeline.batches import open_train

# ---- refusals ----


def test_a_batch_larger_than_the_data_is_refused(jpegs: Path) -> None:
    with pytest.raises(DataError, match="45 samples are fewer than one global batch of 46"):
        open_train(jpegs, batch_size=46)


def test_a_batch_that_does_not_divide_is_refused(jpegs: Path) -> None:
    with pytest.raises(ValueError, match="12 does not divide by 5"):
        open_train(jpegs, rank=0, world_size=5)


@pytest.mark.parametrize("position", [Position(0, 3), Position(0, -1), Position(-1, 0)])
def test_a_position_that_no_epoch_has_is_refused(jpegs: Path, position: Position) -> None:
    source = open_train(jpegs)
    with pytest.raises(IndexError, match="epochs have steps 0 to 2"):
        source.starting_at(position)
    source.close()


def test_impossible_evaluation_sizes_are_refused(jpegs: Path) -> None:
    with pytest.raises(DataError, match="resize >= size"):
        EvalLoader(OpenData(jpegs), 64, 32, LoaderConfig(), batch_size=8)


@pytest.mark.parametrize(
    "settings",
    [{"backend": "dali"}, {"workers": -1}, {"prefetch": 0}, {"max_reduction": 3}],
)
def test_impossible_settings_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        LoaderConfig(**settings)  # type: ignore[arg-type]


# ---- what is chosen on this machine ----


@pytest.fixture
def no_ffcv(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine on which ``import ffcv`` fails."""
    for cached in (ffcv_compat.import_ffcv, ffcv_compat.bind_symbols):
        cached.cache_clear()
    monkeypatch.setitem(sys.modules, "ffcv", None)
    yield
    for cached in (ffcv_compat.import_ffcv, ffcv_compat.bind_symbols):
        cached.cache_clear()


@pytest.mark.usefixtures("no_ffcv")
def test_without_ffcv_auto_falls_back_and_ffcv_says_why(jpegs: Path) -> None:
    source = open_train(jpegs, "auto")
    assert type(source._decoder).__name__ == "TorchvisionDecoder"
    source.close()
    with pytest.raises(DataError, match=r"FFCV cannot be used here .*--loader.backend torchvision"):
        open_train(jpegs, "ffcv")


def test_the_fallback_imports_neither_ffcv_nor_numba(jpegs: Path) -> None:
    code = f"""
import sys
sys.modules["ffcv"] = sys.modules["numba"] = None
from data_pipeline.crops import CropConfig
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.loader import *
from data_pipeline.views import views_of_one_size
config = LoaderConfig(backend="torchvision", workers=1)
views = views_of_one_size(CropConfig(size=8))
source = TrainLoader(OpenData({str(jpegs)!r}), views, config, seed=0, batch_size=4)
print(len(next(source.starting_at(Position())).ids_B))
"""
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "4", done.stderr

"""The PNG figures of a run: what they show is what is there."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from common.errors import ConfigError
from tests.report.made_runs import SMALL, bare_run, finished_run
from tests.trainer.runs import pack_images
from tests.trainer.saved_runs import save_run
from trainer.report import png
from trainer.report.contents import read_contents
from trainer.report.evaluations import KINDS, Bar
from trainer.report.history import running_mean
from trainer.report.pictures import Answers, Pictures, Queries, make_pictures
from trainer.report.png import write_figures
from trainer.report.samples import Samples
from trainer.state.run_data import read_settings

NAMES = ["curves", "accuracy", "views", "neighbours", "map", "overview"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pack_images(tmp_path_factory.mktemp("data"), count=72, side=32)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    run = finished_run(tmp_path_factory.mktemp("runs") / "run", data)
    return read_contents([run], make_pictures(run, read_settings(run), **SMALL))[0]


def test_a_finished_gets_every_figure(finished, tmp_path):
    written = write_figures(finished, tmp_path / "figures")
    assert [path.stem for path in written] == NAMES
    for path in written:
        image = np.asarray(Image.open(path).convert("L"))
        assert min(image.shape) > 200
        assert image.std() > 10, f"{path} is blank"
        assert path.stat().st_size < 400_000
        # Nothing is cut off: the outermost pixels are the page.
        rim = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        assert rim.min() > 200, f"something reaches the rim of {path}"
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == sorted(
        f"{name}.png" for name in NAMES
    )


def test_the_same_run_gives_the_same_bytes(finished, tmp_path):
    first, second = (
        [path.read_bytes() for path in write_figures(finished, tmp_path / name)]
        for name in ("first", "second")
    )
    assert first == second


def test_without_matplotlib_the_remedy_is_named(finished, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        write_figures(finished, tmp_path / "out")


def test_a_failure_while_drawing_keeps_the_previous_figure(finished, tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"previous")

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        write_figures(finished, tmp_path)
    assert path.read_bytes() == b"previous"
    assert list(tmp_path.iterdir()) == [path]


def test_the_running_mean_keeps_a_ramp_and_its_ends():
    ramp = np.arange(500.0)
    assert np.allclose(running_mean(ramp), ramp)
    noise = np.random.default_rng(0).normal(size=5000)
    assert running_mean(noise).std() < 0.2


def test_a_name_has_one_colour_and_one_place_in_every_group():
    first, second = KINDS["pixels"], KINDS["run"]
    bars = [Bar("g", second, 0.5), Bar("h", first, 0.2), Bar("h", second, 0.7)]
    figure = Figure()
    png._accuracy(figure, bars)
    (a,), b = (container.patches for container in figure.axes[0].containers)
    names = [container.get_label() for container in figure.axes[0].containers]
    assert names == [first, second]
    assert a.get_facecolor() != b[0].get_facecolor() == b[1].get_facecolor()
    assert a.get_x() < b[1].get_x()
    assert b[1].get_height() == pytest.approx(70)


def test_crossed_neighbours_are_those_of_another_class():
    labels = np.array([[0, 1, 0], [2, 0, 1]])
    answer = Answers("t", np.zeros((2, 3, 8, 8, 3), np.uint8), labels)
    figure = Figure()
    asked = Samples(np.zeros((2, 8, 8, 3), np.uint8), np.arange(2), np.array([0, 1]), ())
    png._neighbours(figure, Queries(asked, (answer,)))
    _, axes = figure.axes
    black, white = axes.collections
    assert np.array_equal(black.get_offsets(), white.get_offsets())
    cells = {(int(x // 9), int(y // 9)) for x, y in white.get_offsets()}
    assert cells == {(1, 0), (0, 1), (1, 1)}


def test_a_run_that_has_just_begun_gets_what_there_is(tmp_path):
    """No checkpoint yet, no data any more: curves all the same."""
    contents = read_contents([bare_run(tmp_path / "run")], Pictures())[0]
    written = write_figures(contents, tmp_path / "out")
    assert [path.stem for path in written] == ["curves", "overview"]


def test_a_run_without_metrics_gets_its_views(tmp_path, data):
    run = tmp_path / "run"
    save_run(run, data)
    views = make_pictures(run, read_settings(run), **SMALL).views
    (contents,) = read_contents([run], Pictures(views=views))
    written = write_figures(contents, tmp_path / "out")
    assert [path.stem for path in written] == ["views", "overview"]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        read_contents([tmp_path], Pictures())

"""The embedded digits: the same everywhere, honest splits, and hard for raw pixels."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from common.errors import DataError
from data_pipeline.packing import embedded
from data_pipeline.packing.embedded import SIDE, embedded_images


@pytest.fixture(scope="module")
def drawn():
    return {split: embedded_images(split) for split in ("train", "test")}


@pytest.mark.parametrize(
    ("split", "checksum"),
    [
        ("train", "ba0ed99866fb504d"),
        ("test", "7027d805a9d1d2f3"),
    ],
)
def test_the_bytes_never_change(drawn, split, checksum):
    """Runs are compared by their data's fingerprint: a new drawing would be another data set."""
    images, _, _ = drawn[split]
    found = hashlib.sha256(images.tobytes()).hexdigest()[:16]
    assert found == checksum


def test_shapes_types_and_labels_are_as_promised(drawn):
    target = load_digits().target
    for split, digits in (("train", target[:1437]), ("test", target[1437:])):
        images, labels, names = drawn[split]
        count = embedded.RENDERINGS[split] * len(digits)
        assert images.shape == (count, SIDE, SIDE, 3)
        assert images.dtype == np.uint8
        assert labels.dtype == np.int64
        assert np.array_equal(labels, np.tile(digits, embedded.RENDERINGS[split]))
        assert names == tuple("0123456789")


def test_an_image_does_not_depend_on_those_drawn_with_it(drawn, monkeypatch):
    monkeypatch.setattr(embedded, "_BATCH", 77)
    images, _, _ = embedded_images("test")
    assert np.array_equal(images, drawn["test"][0])


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_is_drawn_from_its_own_handwriting_alone(drawn, monkeypatch, split):
    """With the other split's digits wiped out, this split stays the same."""
    digits, labels = embedded._handwritten_digits()
    wiped = digits.copy()
    if split == "train":
        wiped[1437:] = 0
    else:
        wiped[:1437] = 0
    monkeypatch.setattr(embedded, "_handwritten_digits", lambda: (wiped, labels))
    assert np.array_equal(embedded_images(split)[0], drawn[split][0])


def test_renderings_of_a_digit_share_its_shape_and_nothing_else(drawn):
    images, _, _ = drawn["train"]
    first, second = images[:1437], images[1437 : 2 * 1437]
    assert not (first == second).all(axis=(1, 2, 3)).any()
    corners = [np.sort(part[:, 0, 0].astype(float), axis=0) for part in (first, second)]
    # The corner is background nearly everywhere: its colours spread alike, but are not the same.
    assert np.abs(corners[0] - corners[1]).mean() < 10
    assert np.abs(first[:, 0, 0].astype(float) - second[:, 0, 0]).mean() > 60


def test_no_two_images_of_both_splits_have_the_same_colours(drawn):
    corners = np.concatenate([drawn[split][0][:, 0, 0] for split in ("train", "test")])
    repeated = len(corners) - len(np.unique(corners, axis=0))
    assert repeated < 10  # of 256**3 colours, two of 6,468 meet by chance


def test_ink_stands_out_on_either_side_of_its_background():
    rng = np.random.default_rng(0)
    colours, backgrounds = rng.random((2, 5000, 3))
    ink = embedded._contrasting(colours, embedded._luma(backgrounds), rng.random(5000))
    assert ink.min() >= 0
    assert ink.max() <= 1
    contrast = embedded._luma(ink) - embedded._luma(backgrounds)
    assert np.abs(contrast).min() > embedded._LEAST_CONTRAST - 1e-9
    assert 0.35 < (contrast > 0).mean() < 0.65


def test_every_image_shows_a_digit_of_sensible_size(drawn):
    images, _, _ = drawn["test"]
    background = np.median(images.reshape(len(images), -1, 3), axis=1)
    covered = (np.abs(images - background[:, None, None]) > 20).any(axis=-1).mean(axis=(1, 2))
    assert covered.min() > 0.03
    assert covered.max() < 0.5


def test_smoothing_keeps_what_it_smooths():
    """A cell's samples average to the cell in flat surroundings, and a ramp stays a ramp."""
    ramp = np.broadcast_to(np.arange(8.0), (1, 8, 8))
    fine = embedded._smooth(ramp)[0]
    assert fine.shape == (36, 36)
    middle = fine[16, 10:26]
    assert np.allclose(np.diff(middle), 0.25)


def test_raw_pixels_tell_little_of_the_digits(drawn):
    """Why this set: on the plain digits, pixels alone are 96 % right."""
    (train, labels, _), (test, wanted, _) = drawn["train"], drawn["test"]
    bank, asked = (x.reshape(len(x), -1) / 255.0 - 0.5 for x in (train, test))
    bank, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, asked))
    few = np.concatenate([np.flatnonzero(labels == digit)[:10] for digit in range(10)])
    nearest = few[(asked @ bank[few].T).argmax(axis=1)]
    assert (labels[nearest] == wanted).mean() < 0.30


def test_an_unknown_split_is_refused_with_those_there_are():
    with pytest.raises(DataError, match="the splits are train and test"):
        embedded_images("validation")


def test_scikit_learn_is_loaded_only_when_digits_are_drawn():
    code = "import sys, data_pipeline.packing.embedded; sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

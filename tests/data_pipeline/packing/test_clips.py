"""Folders of frames and videos, packed as clips."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from common.errors import DataError
from data_pipeline.packing.clip_source import ClipSource, by_numbers
from data_pipeline.packing.embedded import FRAMES, embedded_clips
from data_pipeline.packing.folder_source import IMAGE_EXTENSIONS
from data_pipeline.packing.pack import PackReport
from data_pipeline.reading.manifest import load_manifest
from tests.data_pipeline.packed import packed


def write_frames(folder: Path, levels: list[int], suffix: str = "png") -> None:
    """Grey images, one of each level, called 1, 2, ... 10, 11."""
    folder.mkdir(parents=True)
    for number, level in enumerate(levels, 1):
        Image.new("RGB", (40, 36), (level,) * 3).save(folder / f"{number}.{suffix}", quality=95)


def write_video(path: Path, levels: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, (64, 48))
    for level in levels:
        writer.write(np.full((48, 64, 3), (0, 0, level), np.uint8))  # blue, green, red
    writer.release()


def clips_of(report: PackReport) -> dict[str, Any]:
    manifest = load_manifest(report.path)
    assert manifest is not None
    return manifest["clips"]


def opened(folder: Path) -> ClipSource:
    return ClipSource(folder, labels=True, extensions=IMAGE_EXTENSIONS)


def test_frames_follow_each_other_by_their_numbers(tmp_path: Path) -> None:
    """By their names as text, 10 would come after 1."""
    levels = [10 * number for number in range(1, 13)]
    write_frames(tmp_path / "set" / "run" / "b10", levels)
    write_frames(tmp_path / "set" / "run" / "b9", [50, 50, 55])
    write_frames(tmp_path / "set" / "jump" / "a", [0, 200])
    report = packed(tmp_path / "set", tmp_path / "out.beton", clips=True)
    manifest = load_manifest(report.path)
    assert manifest is not None
    assert report.class_names == ("jump", "run")
    assert manifest["images"][:6] == [
        *("jump/a/1.png", "jump/a/2.png"),
        *("run/b9/1.png", "run/b9/2.png", "run/b9/3.png", "run/b10/1.png"),
    ]
    assert manifest["images"][-3:] == ["run/b10/10.png", "run/b10/11.png", "run/b10/12.png"]
    assert manifest["class_counts"] == [2, 15]
    assert manifest["clips"]["starts"] == [0, 2, 5]
    assert manifest["clips"]["motion"] == [0, 200, 0, 0, 5, 0, *[10] * 11]


@pytest.mark.parametrize(
    ("names", "in_order"),
    [
        (["f10", "f9", "f09", "f1"], ["f1", "f09", "f9", "f10"]),
        (["a2b10", "a2b9", "a10b1"], ["a2b9", "a2b10", "a10b1"]),
        (["x", "1", "", "x1"], ["", "1", "x", "x1"]),
        (["\u0662", "3", "\u00b2"], ["3", "\u00b2", "\u0662"]),  # digits, but not ours
    ],
)
def test_names_sort_as_people_count(names: list[str], in_order: list[str]) -> None:
    assert sorted(names, key=by_numbers) == in_order


def test_folders_at_the_top_that_are_clips_are_no_classes(tmp_path: Path) -> None:
    write_frames(tmp_path / "set" / "first", [1, 2, 3])
    write_frames(tmp_path / "set" / "second", [4, 5])
    report = packed(tmp_path / "set", tmp_path / "out.beton", clips=True)
    assert report.class_names == ()
    assert clips_of(report)["starts"] == [0, 3]


def test_a_flat_folder_is_one_clip(tmp_path: Path) -> None:
    write_frames(tmp_path / "set", list(range(20)))
    source = opened(tmp_path / "set")
    assert [source.name(n) for n in (0, 9, 19)] == ["1.png", "10.png", "20.png"]
    assert source.starts == [0]


def test_frames_beside_folders_of_clips_are_refused(tmp_path: Path) -> None:
    write_frames(tmp_path / "set" / "class" / "clip", [1, 2])
    write_frames(tmp_path / "set" / "other", [1, 2])
    with pytest.raises(DataError, match=r"frames lie in other, .* and in class/clip, .*; move one"):
        opened(tmp_path / "set")


def test_a_frame_that_is_left_out_leaves_the_clip_whole(tmp_path: Path) -> None:
    write_frames(tmp_path / "set" / "a", [0, 10, 20, 30])
    write_frames(tmp_path / "set" / "b", [0, 1])
    for name in ("a/2", "b/1"):
        (tmp_path / "set" / f"{name}.png").write_bytes(b"")
    report = packed(tmp_path / "set", tmp_path / "out.beton", clips=True)
    assert len(report.left_out) == 2
    assert clips_of(report) == {"starts": [0, 3], "motion": [0, 20, 10, 0]}


@pytest.mark.parametrize("form", ["auto", "jpeg", "raw"])
def test_motion_is_that_of_the_pixels_however_they_are_stored(tmp_path: Path, form: str) -> None:
    write_frames(tmp_path / "set", [0, 40, 40, 140])
    report = packed(tmp_path / "set", tmp_path / "out.beton", clips=True, format=form)
    # A JPEG of one level is off by a level at most.
    assert clips_of(report)["motion"] == pytest.approx([0, 40, 0, 100], abs=2)


def test_a_video_is_a_clip_and_its_file_lies_in_a_class(tmp_path: Path) -> None:
    write_video(tmp_path / "set" / "red" / "long.avi", [20 * n for n in range(11)])
    write_video(tmp_path / "set" / "red" / "short.avi", [200, 100])
    write_frames(tmp_path / "set" / "still" / "one", [7])
    (tmp_path / "set" / "red" / "broken.mp4").write_bytes(b"no video")
    source = opened(tmp_path / "set")
    assert source.class_names == ("red", "still")
    assert source.starts == [0, 11, 13]
    assert source.name(12) == "red/short.avi#1"
    assert source.passed_over == {"no video that OpenCV reads": ["red/broken.mp4"]}
    for index, level in ((3, 60), (10, 200), (2, 40), (11, 200), (12, 100)):  # back and forth
        image, label = source.sample(index)
        assert label == 0
        assert isinstance(image, np.ndarray)
        assert image.shape == (48, 64, 3)
        # Red is told from blue; JPEG in the limited range of videos keeps a level within a few.
        assert np.abs(image.astype(int) - [level, 0, 0]).max() < 8
    report = packed(tmp_path / "set", tmp_path / "out.beton", clips=True, workers=2)
    assert report.num_samples == 14
    assert clips_of(report)["starts"] == [0, 11, 13]


def test_a_video_without_its_end_is_packed_so_far_and_named(tmp_path: Path) -> None:
    write_video(tmp_path / "set" / "a.avi", list(range(0, 200, 5)))
    data = (tmp_path / "set" / "a.avi").read_bytes()
    (tmp_path / "set" / "a.avi").write_bytes(data[: len(data) // 2])
    (tmp_path / "set" / "b.mp4").write_bytes(b"no video")
    source = opened(tmp_path / "set")
    assert 5 < len(source) < 36
    assert source.passed_over == {
        "no video that OpenCV reads": ["b.mp4"],
        "video's end, which is missing; it is packed so far": ["a.avi"],
    }
    # A process of its own: libraries read once how much they are to say.
    command = ["pack", str(tmp_path / "set"), str(tmp_path / "out.beton"), "--clips"]
    done = subprocess.run(
        [sys.executable, "-m", "launch", *command], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.count("1 files passed over") == 2
    assert "@ 0x" not in done.stderr


def test_a_folder_of_broken_videos_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(DataError, match="none of its videos can be read"):
        opened(tmp_path)


def test_the_same_frames_in_other_clips_are_other_data(tmp_path: Path) -> None:
    """Runs are compared by the file's checksum: which tuples there are is a part of it."""
    write_frames(tmp_path / "one" / "a", [0, 10, 20, 30])
    write_frames(tmp_path / "two" / "a", [0, 10])
    write_frames(tmp_path / "two" / "b", [20, 30])
    reports = [
        packed(tmp_path / name, tmp_path / f"{name}.beton", clips=True) for name in ("one", "two")
    ]
    assert reports[0].fingerprint != reports[1].fingerprint
    plain = [packed(tmp_path / name, tmp_path / "p.beton", labels=False) for name in ("one", "two")]
    assert plain[0].fingerprint == plain[1].fingerprint


def test_clips_are_asked_for_of_folders_alone(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no clips; embedded:moving-digits has some"):
        packed("embedded:digits", tmp_path / "out.beton", clips=True)
    with pytest.raises(DataError, match="--clips is for folders of frames or videos"):
        packed("torchvision:CIFAR10", tmp_path / "out.beton", clips=True)


@pytest.mark.parametrize(
    ("split", "checksum"), [("train", "81773d0869d73672"), ("test", "4fa4a582193f7bd4")]
)
def test_embedded_clips_never_change(split: Any, checksum: str) -> None:
    images, labels, names = embedded_clips(split)
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == checksum
    assert len(images) == len(labels) == FRAMES * (1437 if split == "train" else 360)
    assert (labels.reshape(-1, FRAMES) == labels[::FRAMES, None]).all()
    assert len(names) == 10


def test_an_embedded_digit_goes_one_way_at_a_steady_speed() -> None:
    images, _, _ = embedded_clips("test")
    frames = images.reshape(-1, FRAMES, 32, 32, 3).astype(float)[:100]
    ground = np.median(frames, (2, 3), keepdims=True)
    weight = np.abs(frames - ground).sum(-1)
    weight /= weight.sum((2, 3), keepdims=True)
    y = (weight.sum(3) * np.arange(32)).sum(2)
    x = (weight.sum(2) * np.arange(32)).sum(2)
    places = np.stack([y, x], -1)
    steps = np.diff(places, axis=1)
    way = places[:, -1] - places[:, 0]
    length = np.linalg.norm(way, axis=1)
    assert (length > 8).all()
    along = (steps * (way / length[:, None])[:, None]).sum(2) / (length / (FRAMES - 1))[:, None]
    # Pixels sample an edge at whole places: a step is off by a fraction of a pixel.
    assert (np.abs(along - 1) * length[:, None] / (FRAMES - 1) < 0.5).all()


def test_embedded_clips_are_packed_as_clips(tmp_path: Path) -> None:
    report = packed("embedded:moving-digits:test", tmp_path / "out.beton", workers=0)
    found = clips_of(report)
    assert found["starts"] == list(range(0, 360 * FRAMES, FRAMES))
    motion = np.reshape(found["motion"], (-1, FRAMES))
    assert not motion[:, 0].any()
    assert (motion[:, 1:] > 0.5).all()

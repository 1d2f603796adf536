"""Clips in a folder: folders of frames, in the order of their numbers, and videos."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import DataError
from data_pipeline.packing.folder_source import FolderSource
from data_pipeline.packing.image_codec import NO_LABEL, LeftOut, Sample

VIDEO_EXTENSIONS = (*(".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg"),)
_WHOLE = 0.9  # of the frames that a header says


class ClipSource(FolderSource):
    """A folder whose images are frames: all of one folder are a clip, and so is every video.

    The folders at the top are classes where clips lie in them, and no classes where they are clips
    themselves. Frames follow each other by the numbers in their names: 10 comes after 9.
    """

    def __init__(self, folder: Path, *, labels: bool, extensions: Sequence[str]) -> None:
        super().__init__(folder, labels=labels, extensions=(*extensions, *VIDEO_EXTENSIONS))
        clips: dict[tuple[int, str], list[str]] = {}
        for path, label in zip(self._paths, self._labels):
            is_video = path.lower().endswith(VIDEO_EXTENSIONS)
            clips.setdefault((label, path if is_video else path.rpartition("/")[0]), []).append(
                path
            )
        if self._tops_are_clips(name for _, name in clips):
            self.class_names = ()
            clips = {(NO_LABEL, name): paths for (_, name), paths in clips.items()}
        self._clips: list[tuple[str, list[str], int]] = []  # a name, and frames or a video
        lengths = []
        for label, name in sorted(clips, key=lambda clip: (clip[0], by_numbers(clip[1]))):
            paths = sorted(clips[label, name], key=by_numbers)
            count = len(paths)
            if paths == [name]:
                count, stated = _frames(f"{self._folder}/{name}")
                if not count:
                    self._pass_over("no video that OpenCV reads", name)
                    continue
                if count < _WHOLE * stated:
                    self._pass_over("video's end, which is missing; it is packed so far", name)
            self._clips.append((name, paths, label))
            lengths.append(count)
        if not lengths:
            raise DataError(f"{folder}: none of its videos can be read")
        self._ends = np.cumsum(lengths)
        self.starts = (self._ends - lengths).tolist()
        self._video: _Video | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, index: int) -> str:
        """A frame's path below the folder, or a video's and the frame's number."""
        clip, number = self._at(index)
        name, paths, _ = self._clips[clip]
        return f"{name}#{number}" if paths == [name] else paths[number]

    def sample(self, index: int) -> Sample:
        """The frame, and its clip's class; frames of a video are best asked for one by one."""
        clip, number = self._at(index)
        name, paths, label = self._clips[clip]
        if paths != [name]:
            return Sample(f"{self._folder}/{paths[number]}", label)
        path = f"{self._folder}/{name}"
        if self._video is None or self._video.path != path or self._video.next > number:
            self._video = _Video(path)
        frame = self._video.frame(number)
        return Sample(LeftOut("the video does not decode") if frame is None else frame, label)

    def _at(self, index: int) -> tuple[int, int]:
        clip = int(np.searchsorted(self._ends, index, side="right"))
        return clip, index - self.starts[clip]

    def _tops_are_clips(self, names: Iterator[str]) -> bool:
        """Whether classes' folders hold frames themselves.

        Raises:
            DataError: some do, and others hold clips.
        """
        if not self.class_names:
            return False
        tops, within = list[str](), list[str]()
        for name in names:
            (within if "/" in name else tops).append(name)
        if tops and within:
            raise DataError(
                f"{self._folder}: frames lie in {tops[0]}, which would be a clip, and in"
                f" {within[0]}, whose first folder would be a class; move one of them"
            )
        return bool(tops)


def by_numbers(name: str) -> list[tuple[int, str]]:
    """A key by which names sort as people count: numbers in them by their values."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in parts]


class _Video:
    """A video that is read frame by frame."""

    def __init__(self, path: str) -> None:
        self.path, self.next = path, 0
        self._capture = _opencv(path).VideoCapture(path)

    def frame(self, number: int) -> npt.NDArray[np.uint8] | None:
        """A frame ahead, uint8 RGB (H, W, 3), upright; None: it does not decode."""
        while self.next < number:
            self._capture.grab()
            self.next += 1
        self.next += 1
        found, frame_BGR = self._capture.read()
        return np.ascontiguousarray(frame_BGR[..., ::-1]) if found else None


def _frames(path: str) -> tuple[int, float]:
    """Of a video, counted, and as many as its header says, which is an estimate. 0: it is none."""
    cv2, count = _opencv(path), 0
    capture = cv2.VideoCapture(path)
    stated = float(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    while capture.grab():
        count += 1
    return count, stated


def _opencv(path: str) -> Any:
    # What cannot be read we say ourselves, by its name.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
    try:
        import cv2
    except ImportError:
        raise DataError(
            f"{path}: videos are read by OpenCV, which FFCV brings along; install"
            " opencv-python-headless, or pack folders of frames"
        ) from None
    return cv2

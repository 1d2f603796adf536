"""Rows of images as one PNG: what retrieval and the search for duplicates show.

Shape suffixes: N images, S side in pixels.
"""

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from common.bounds import check_bounds
from common.errors import ConfigError, DataError
from common.files.atomic_file import check_replaceable, write_atomically
from data_pipeline.crops import centre_crop_boxes
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.substitutes import Cut
from data_pipeline.reading.torchvision_loader import TorchvisionDecoder
from trainer.evaluation.job import JobConfig, TrainFiles
from trainer.evaluation.labelled_subset import told_apart
from trainer.evaluation.load_encoder import Preprocessing

Images = npt.NDArray[np.uint8]

_SIDE = 96  # least and usual side of a cell, pixels
_GAP, _LINE = 6, 14  # between cells; height of a line under an image
_SIGN = {True: (0, 158, 115), False: (213, 94, 0)}  # Okabe and Ito's green and vermilion


@dataclass(frozen=True, kw_only=True)
class PictureConfig(JobConfig):
    """Looks through a set, and draws what it finds if asked."""

    train: TrainFiles
    """Images that are looked through, labelled or not."""
    picture: Path | None = None
    """OUT.png to draw the first of what is found in."""
    pictured: int = 10
    """Rows of the picture: queries, clusters (the largest), or pairs (the most alike)."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself, and a picture that could not be written at the end."""
        super().__post_init__()
        check_bounds(self, "--", pictured="[1, inf)")
        if self.picture is None:
            return
        if self.picture.suffix.lower() != ".png":
            raise ConfigError(f"--picture {self.picture}: name a file that ends in .png")
        check_replaceable(self.picture)


@dataclass(frozen=True)
class Cell:
    """One image of a row."""

    image_SS3: Images  # noqa: N815
    text: str = ""
    """Lines under the image, cut to its width."""
    agrees: bool | None = None
    """A green frame, or a red one with a cross: told apart without colour too. None: neither."""


class Album:
    """Images of a set as the encoder sees them before normalisation, read when asked for."""

    def __init__(self, data: OpenData, how: Preprocessing) -> None:
        self._data, self._how = data, how
        self._decoder = TorchvisionDecoder(data)
        self.notes = list[str]()
        """What a reader of :attr:`names` ought to know."""

    def read(self, ids: Sequence[int]) -> Images:
        """(N, S, S, 3).

        Raises:
            DataError: a sample cannot be read.
        """
        ids_N, side = np.asarray(ids, np.int64), self._how.size
        crops = np.empty((len(ids_N), 1, side, side, 3), np.uint8)
        heights_N, widths_N = self._data.table.heights[ids_N], self._data.table.widths[ids_N]
        boxes = centre_crop_boxes(heights_N, widths_N, side, self._how.resize)
        self._decoder.decode(ids_N, (Cut(boxes, crops),))
        return crops[:, 0]

    @functools.cached_property
    def names(self) -> list[str] | None:
        """The samples' files, as they were packed; None where that is not known any more."""
        try:
            return told_apart(self._data)
        except DataError as error:
            self.notes.append(
                f"samples of {self._data.info.name} have their numbers and no file names: {error}"
            )
            return None

    def cells(self, samples: Sequence[int], texts: Sequence[str]) -> list[Cell]:
        """Images over the last parts of their files' names (else their numbers) and ``texts``."""
        shown = [self.names[n].rpartition("/")[2] if self.names else f"#{n}" for n in samples]
        lines = ["\n".join(filter(None, pair)) for pair in zip(shown, texts)]
        return [Cell(image, text) for image, text in zip(self.read(samples), lines)]


def save_rows(rows: Sequence[Sequence[Cell]], path: Path, *, first_apart: bool = False) -> None:
    """Write the rows under each other, whole or not at all.

    Args:
        rows: may differ in length.
        path: of the PNG; its folder is made if need be.
        first_apart: leave a wider gap after each row's first image: it asks, the others answer.
    """
    side, apart = _SIDE, 3 * _GAP if first_apart else 0
    columns = max(len(row) for row in rows)
    lines = 1 + max(cell.text.count("\n") for row in rows for cell in row)
    step = (side + _GAP, side + lines * _LINE + _GAP)
    size = (columns * step[0] + _GAP + apart, len(rows) * step[1] + _GAP)
    canvas = Image.new("RGB", size, "white")
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            left = _GAP + x * step[0] + (apart if x else 0)
            _draw(canvas, cell, left, _GAP + y * step[1])
    encoded = io.BytesIO()
    canvas.save(encoded, "PNG", optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, encoded.getvalue())


def _draw(canvas: Image.Image, cell: Cell, left: int, top: int) -> None:
    small = cell.image_SS3.shape[0] < _SIDE  # pixels stay visible as such
    how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
    canvas.paste(Image.fromarray(cell.image_SS3).resize((_SIDE, _SIDE), how), (left, top))
    draw = ImageDraw.Draw(canvas)
    right, bottom = left + _SIDE - 1, top + _SIDE - 1
    if cell.agrees is not None:
        draw.rectangle((left, top, right, bottom), outline=_SIGN[cell.agrees], width=3)
    if cell.agrees is False:
        for colour, width in (("black", 5), ("white", 2)):
            draw.line((right - 20, top + 6, right - 6, top + 20), fill=colour, width=width)
            draw.line((right - 6, top + 6, right - 20, top + 20), fill=colour, width=width)
    for number, text in enumerate(cell.text.split("\n")):
        while draw.textlength(text) > _SIDE:
            text = text[:-1]
        draw.text((left, bottom + 2 + number * _LINE), text, fill="black")

"""CIE Lab of sRGB colours (IEC 61966-2-1, white D65, 2 degrees), and its plane of hues in cells.

Shapes: N images, h and w pixels, Q cells.
"""

import torch

from common.constants import constants

_FROM_LINEAR_RGB = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_WHITE = (0.95047, 1.0, 1.08883)
# Zhang et al. 2016 take cells of 10 x 10, too. Of each from -90 to 100 of a, those of b that a
# colour of sRGB falls in, by their centres.
_LOWEST, _STEP = -90, 10
_COLUMNS = (
    *((80, 80), (40, 80), (20, 90), (0, 90), (-20, 90), (-30, 90), (-40, 90), (-40, 90)),
    *((-50, 90), (-60, 90), (-70, 80), (-70, 80), (-80, 80), (-90, 80), (-90, 70), (-100, 70)),
    *((-110, 70), (-110, 70), (-90, 0), (-70, -50)),
)
_SQUARE, _SIDE = -110, 22  # a square of cells from there on, in which all of them lie


def rgb_to_lab(images_N3hw: torch.Tensor) -> torch.Tensor:
    """L from 0 to 100, a and b, ``(N, 3, h, w)``, of values from 0 to 1; float32 or better."""
    linear = torch.where(
        images_N3hw > 0.04045, ((images_N3hw + 0.055) / 1.055) ** 2.4, images_N3hw / 12.92
    )
    matrix = _matrix(linear)
    xyz = torch.einsum("oc,nchw->nohw", matrix, linear)
    f = torch.where(xyz > 0.008856, xyz.clamp_min(0.008856) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def lab_to_rgb(lab_N3hw: torch.Tensor) -> torch.Tensor:
    """Values from 0 to 1, ``(N, 3, h, w)``; colours that sRGB does not have are cut to it."""
    lightness, a, b = lab_N3hw.unbind(1)
    y = (lightness + 16) / 116
    f = torch.stack([y + a / 500, y, y - b / 200], 1)
    xyz = torch.where(f**3 > 0.008856, f**3, (f - 16 / 116) / 7.787)
    linear = torch.einsum("oc,nchw->nohw", _matrix(xyz).inverse(), xyz).clamp(0, 1)
    return torch.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)


def _matrix(like: torch.Tensor) -> torch.Tensor:
    """Linear red, green and blue to X, Y and Z, white being 1, 1, 1."""
    rows = [constants(row, like) / white for row, white in zip(_FROM_LINEAR_RGB, _WHITE)]
    return torch.stack(rows)


class HueCells:
    """Cells of 10 x 10 in the plane of a and b, those alone that a colour of sRGB falls in: 261.

    Zhang et al. 2016 (arXiv 1603.08511) have 313, with some that no colour reaches.
    """

    def __init__(self) -> None:
        self._centres = [
            (_LOWEST + _STEP * place, b)
            for place, (least, most) in enumerate(_COLUMNS)
            for b in range(least, most + _STEP, _STEP)
        ]
        side = [_SQUARE + _STEP * place for place in range(_SIDE)]
        square_S2 = _on_cpu([(a, b) for a in side for b in side])
        self.centres_Q2 = _on_cpu(self._centres)
        self._cell_of_square = torch.cdist(square_S2, self.centres_Q2).argmin(1)

    def __len__(self) -> int:
        return len(self._centres)

    def of(self, hues_N2hw: torch.Tensor) -> torch.Tensor:
        """The nearest cell's number, int64 ``(N, h, w)``."""
        places = ((hues_N2hw - _SQUARE) / _STEP).round().long().clamp(0, _SIDE - 1)
        # Once: a copy in each step would have the host wait.
        self._cell_of_square = self._cell_of_square.to(hues_N2hw.device)
        return self._cell_of_square[places[:, 0] * _SIDE + places[:, 1]]


def _on_cpu(values: list[tuple[int, int]]) -> torch.Tensor:
    # Where plans count networks that have no data, torch's default device has none.
    return torch.tensor(values, dtype=torch.float32, device="cpu")

"""The fallback backend, in torchvision, for where FFCV cannot be built; and the FFCV one's oracle.

Reads the same files, cuts the same boxes, and finds the same samples damaged. Pixels differ as
libjpeg's colour upsampling and rounding do: by less than one of 256 levels on average.

torchvision shows noise for a JPEG with damaged coefficients and says nothing. Where FFCV's
libjpeg-turbo is there, each sample is therefore put to it once, at an eighth of its size, when it
is first read; where it is not, such samples pass.

Shape suffixes: N samples, V views, S side.
"""

import re

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as tv

from data_pipeline.reading.beton import JPEG_MODE
from data_pipeline.reading.jpeg import JpegError, read_jpeg_header, soundness_check
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import IdArray
from data_pipeline.reading.substitutes import Cuts, Decoder

_SOURCE_LINE = re.compile(r"^decode_jpeg, \S+:\d+, ")  # where in torchvision it was noticed
_UNKNOWN, _SOUND, _DAMAGED = 0, 1, 2


class TorchvisionDecoder(Decoder):
    """Decodes by torchvision."""

    def __init__(self, data: OpenData) -> None:
        super().__init__(data)
        name, self._libjpeg_problem = soundness_check()
        # Pillow hears no more than torchvision does; asking it would be time for nothing.
        self._asks_libjpeg = name == "libjpeg-turbo"
        self._verdicts = np.full(len(data.table.sizes), _UNKNOWN, np.uint8)

    def try_decode(self, ids_N: IdArray, cuts: Cuts) -> IdArray:
        """See :class:`Decoder`."""
        failed = []
        for place, sample in enumerate(ids_N.tolist()):
            try:
                image_3HW = self._image(sample)
            except JpegError:
                failed.append(place)
                continue
            for boxes_NV4, out_NVSS3 in cuts:
                for box, out_SS3 in zip(boxes_NV4[place].tolist(), out_NVSS3[place]):
                    size = list(out_SS3.shape[:2])
                    view_3SS = tv.resized_crop(image_3HW, *box, size, antialias=True)
                    out_SS3[:] = view_3SS.permute(1, 2, 0).numpy()
        return np.array(failed, np.int64)

    def why(self, sample: int) -> str:
        """What the decoder says of a sample."""
        self._verdicts[sample] = _UNKNOWN
        try:
            self._image(sample)
        except JpegError as error:
            return str(error)
        return "it did not a moment ago"

    def _image(self, sample: int) -> torch.Tensor:
        """A sample's pixels, uint8 (3, H, W).

        Raises:
            JpegError: it is damaged.
        """
        table = self._data.table
        if sample in table.damaged:
            raise JpegError(table.damaged[sample])
        if self._verdicts[sample] == _DAMAGED:
            raise JpegError("found damaged before")
        data = self._data.read(sample)
        shape = (int(table.heights[sample]), int(table.widths[sample]))
        if table.modes[sample] != JPEG_MODE:
            return torch.from_numpy(data).view(*shape, 3).permute(2, 0, 1).contiguous()
        try:
            if self._verdicts[sample] == _UNKNOWN:
                self._examine(data.tobytes(), shape)
            image_3HW = decode_jpeg(torch.from_numpy(data), mode=ImageReadMode.RGB)
            if tuple(image_3HW.shape[1:]) != shape:
                raise JpegError("decodes to other dimensions than its header says")
        except (JpegError, RuntimeError) as error:
            self._verdicts[sample] = _DAMAGED
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise JpegError(_SOURCE_LINE.sub("", reason)) from error
        self._verdicts[sample] = _SOUND
        return image_3HW

    def _examine(self, data: bytes, shape: tuple[int, int]) -> None:
        """Refuse a JPEG that FFCV's decoder refuses."""
        header = read_jpeg_header(data)
        if (header.height, header.width) != shape:
            raise JpegError(f"its own header says {header.width} x {header.height} pixels")
        if header.components not in (1, 3):
            raise JpegError("unsupported colours")
        problem = self._libjpeg_problem(data, header) if self._asks_libjpeg else None
        if problem is not None:
            raise JpegError(problem)

"""The fallback backend, in torchvision, for where FFCV cannot be built; and the FFCV one's oracle.

Reads the same files, cuts the same boxes, and raises the same errors. Pixels differ as libjpeg's
colour upsampling and rounding do: by less than one of 256 levels on average.

Shape suffixes: N samples, V views, S side.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as tv

from data_pipeline.beton import JPEG_MODE, SampleTable
from data_pipeline.errors import DataError
from data_pipeline.jpeg import JpegError, read_jpeg_header


class TorchvisionDecoder:
    """Decodes samples of a .beton and cuts boxes out of them. Safe to call from several threads.

    Args:
        path: the file, accepted by ``check_beton``.
        table: where its samples lie.
    """

    def __init__(self, path: Path, table: SampleTable) -> None:
        self._path, self._table = path, table
        self._bytes = np.memmap(path, np.uint8, mode="r")

    def decode(
        self,
        ids_N: npt.NDArray[np.int64],
        boxes_NV4: npt.NDArray[np.int64],
        out_NVSS3: npt.NDArray[np.uint8],
    ) -> None:
        """Fill ``out_NVSS3`` with the boxes of the samples, resized to S x S.

        Raises:
            DataError: a sample does not decode; names the first.
        """
        side = out_NVSS3.shape[2]
        for sample, boxes_V4, out_VSS3 in zip(ids_N.tolist(), boxes_NV4.tolist(), out_NVSS3):
            image_3HW = self._image(sample)
            for box, out_SS3 in zip(boxes_V4, out_VSS3):
                view_3SS = tv.resized_crop(image_3HW, *box, [side, side], antialias=True)
                out_SS3[:] = view_3SS.permute(1, 2, 0).numpy()

    def _image(self, sample: int) -> torch.Tensor:
        table = self._table
        start = int(table.offsets[sample])
        # A copy: torch takes no read-only memory.
        data = np.array(self._bytes[start : start + int(table.sizes[sample])])
        shape = (int(table.heights[sample]), int(table.widths[sample]))
        if table.modes[sample] != JPEG_MODE:
            return torch.from_numpy(data).view(*shape, 3).permute(2, 0, 1).contiguous()
        try:
            header = read_jpeg_header(data.tobytes())
            if (header.height, header.width) != shape:
                raise self._error(
                    sample, f"its own header says {header.width} x {header.height} pixels"
                )
            return decode_jpeg(torch.from_numpy(data), mode=ImageReadMode.RGB)
        except (JpegError, RuntimeError) as error:
            raise self._error(sample, str(error).splitlines()[0]) from error

    def _error(self, sample: int, reason: str) -> DataError:
        return DataError(
            f"{self._path}: sample {sample} does not decode ({reason}); pack it again with "
            "'widebatch pack', which leaves damaged images out and lists them"
        )

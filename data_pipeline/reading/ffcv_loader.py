"""The FFCV backend: each JPEG decoded once, and all views cut out of it.

:func:`decode_views` is a stage in the calling convention of FFCV's decoders. It decodes with the
libjpeg-turbo that FFCV links, to the planes that a JPEG stores rather than to RGB: upsampling the
colours and converting a whole image, to keep crops of it, is work for nothing. The views are cut
out of the planes by :mod:`data_pipeline.reading.resample`.

Compiled code lies in Numba's cache beside this file (or where NUMBA_CACHE_DIR says): the first use
of an installation compiles for some seconds, later ones load in tenths.

Shape suffixes: N samples, V views, S side.
"""

from collections.abc import Sequence

import numpy as np

from common.compiled import compiled
from data_pipeline.reading.beton import JPEG_MODE, MAX_PIXELS
from data_pipeline.reading.ffcv_compat import bind_symbols, external, jpeg_problem
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.order import IdArray
from data_pipeline.reading.resample import crop, make_scratch, split_channels
from data_pipeline.reading.substitutes import Cut, Cuts, Decoder, cuts_of

_compiled = compiled(nogil=True, error_model="numpy")

# What became of a sample: its planes are YCbCr or grey, or RGB, or it did not decode, or the file
# did not give its bytes.
_FINE, _FINE_RGB, _DAMAGED, _UNREAD = 0, 1, 2, 3

# TurboJPEG's colour spaces and its code for a picture without colour planes.
_YCBCR, _GREY_COLOURS = 1, 2
_SAMP_GREY = 3
_TJPF_RGB = 0

_tj_init, _tj_destroy = external("tjInitDecompress"), external("tjDestroy")
_tj_header, _tj_planes = external("tjDecompressHeader3"), external("tjDecompressToYUVPlanes")
_tj_plane_width, _tj_plane_height = external("tjPlaneWidth"), external("tjPlaneHeight")
_tj_pixels = external("tjDecompress2")
_pread = external("pread")


@_compiled
def _read(descriptor, data, offset):  # type: ignore[no-untyped-def]
    """Fill ``data`` from the file; whether it gave all of that."""
    done = 0
    while done < data.size:
        target, left = np.int64(data.ctypes.data) + done, np.uint64(data.size - done)
        count = _pread(descriptor, target, left, offset + done)
        if count <= 0:
            return False
        done += count
    return True


@_compiled
def _reduction(boxes, outs, sample, limit):  # type: ignore[no-untyped-def]
    """Largest of 1, 2, 4, 8 that leaves every box a pixel for each pixel of its view."""
    factor = limit
    for group in range(len(boxes)):
        boxes_V4, size = boxes[group][sample], outs[group].shape[2]
        for view in range(boxes_V4.shape[0]):
            while factor > 1 and min(boxes_V4[view, 2], boxes_V4[view, 3]) < factor * size:
                factor //= 2
    return factor


@_compiled
def _split(rgb_HW3, decoded, layout_4):  # type: ignore[no-untyped-def]
    """Interleaved RGB to three planes of full size."""
    height, width = rgb_HW3.shape[0], rgb_HW3.shape[1]
    split_channels(rgb_HW3, decoded[: 3 * height * width].reshape(3, height, width))
    layout_4[0], layout_4[1], layout_4[2], layout_4[3] = height, width, height, width


@_compiled
def _decode_rgb(handle, data, height, width, decoded, layout_4):  # type: ignore[no-untyped-def]
    """A JPEG that does not store YCbCr, converted by libjpeg-turbo."""
    rgb_HW3 = np.empty((height, width, 3), np.uint8)
    source, target = np.int64(data.ctypes.data), np.int64(rgb_HW3.ctypes.data)
    size = np.uint64(data.size)
    if _tj_pixels(handle, source, size, target, width, 0, height, _TJPF_RGB, 0) != 0:
        return _DAMAGED
    _split(rgb_HW3, decoded, layout_4)
    return _FINE_RGB


@_compiled
def _decode_jpeg(handle, data, height, width, factor, decoded, layout_4):  # type: ignore[no-untyped-def]
    """A JPEG to planes, one after the other in ``decoded``; their dimensions to ``layout_4``."""
    source, size = np.int64(data.ctypes.data), np.uint64(data.size)
    header = np.zeros(4, np.int32)  # width, height, subsampling, colour space
    at = np.int64(header.ctypes.data)
    if _tj_header(handle, source, size, at, at + 4, at + 8, at + 12) != 0:
        return _DAMAGED
    if header[0] != width or header[1] != height:
        return _DAMAGED  # decoding would write past the end of the planes
    sampling, colours = header[2], header[3]
    if sampling < 0 or (colours != _YCBCR and colours != _GREY_COLOURS):
        return _decode_rgb(handle, data, height, width, decoded, layout_4)

    h, w = (height + factor - 1) // factor, (width + factor - 1) // factor
    layout_4[0], layout_4[1] = _tj_plane_height(0, h, sampling), _tj_plane_width(0, w, sampling)
    layout_4[2] = layout_4[3] = 0
    if sampling != _SAMP_GREY:
        layout_4[2], layout_4[3] = _tj_plane_height(1, h, sampling), _tj_plane_width(1, w, sampling)
    luma = np.int64(decoded.ctypes.data)
    cb = luma + layout_4[0] * layout_4[1]
    cr = cb + layout_4[2] * layout_4[3]
    starts = np.array([luma, cb, cr], np.int64)
    if _tj_planes(handle, source, size, np.int64(starts.ctypes.data), w, 0, h, 0) != 0:
        return _DAMAGED
    return _FINE


@_compiled
def _cut_views(decoded, layout_4, is_rgb, factor, boxes_V4, scratch, out_VSS3):  # type: ignore[no-untyped-def]
    rows, columns, colour_rows, colour_columns = layout_4
    second = rows * columns
    third = second + colour_rows * colour_columns
    planes = (
        decoded[:second].reshape(rows, columns),
        decoded[second:third].reshape(colour_rows, colour_columns),
        decoded[third : 2 * third - second].reshape(colour_rows, colour_columns),
    )
    # Padded planes stand in the ratio of the subsampling, which the true sizes only round to.
    scale = np.array([1.0, 1.0, colour_rows / rows, colour_columns / columns]) / factor
    for view in range(boxes_V4.shape[0]):
        crop(planes, scale, is_rgb, boxes_V4[view], scratch, out_VSS3[view])


@_compiled
def decode_views(batch_indices, storage, metadata, storage_state):  # type: ignore[no-untyped-def]
    """Decode each sample once and cut its boxes out, resized to S x S.

    Args:
        batch_indices: int64 (N,), sample ids.
        storage: of each group of views uint8 (N, V, S, S, 3) to fill, int64 (N, V, 4) boxes and
            working memory; uint8 (N,), set to what became of each sample; the greatest reduction
            while decoding.
        metadata: of the whole file: modes, heights, widths.
        storage_state: of each sample its file's descriptor, where it begins in that, and how many
            bytes it has.
    """
    outs, boxes, scratches, status_N, limit = storage
    decoded = scratches[0].decoded
    modes, heights, widths = metadata
    descriptors, offsets, sizes = storage_state
    layout_4 = np.zeros(4, np.int64)
    content = np.empty(max(0, sizes[batch_indices].max()) if len(batch_indices) else 0, np.uint8)
    for n in range(len(batch_indices)):
        sample = batch_indices[n]
        if sizes[sample] == 0:  # damaged in the tables: nothing that they say is to be followed
            status_N[n] = _DAMAGED
            continue
        height, width = heights[sample], widths[sample]
        data = content[: sizes[sample]]
        if not _read(descriptors[sample], data, offsets[sample]):
            status_N[n] = _UNREAD
            continue
        factor = 1
        if modes[sample] == JPEG_MODE:
            factor = _reduction(boxes, outs, n, limit)
            # A handle keeps tables for pictures that bring none, and one that failed inside a
            # header fails at the next picture too: with one of its own, none depends on another.
            handle = _tj_init()
            status_N[n] = _decode_jpeg(handle, data, height, width, factor, decoded, layout_4)
            _tj_destroy(handle)
        else:
            _split(data.reshape(height, width, 3), decoded, layout_4)
            status_N[n] = _FINE_RGB
        if status_N[n] == _FINE_RGB:
            factor = 1
        if status_N[n] != _DAMAGED:
            is_rgb = status_N[n] == _FINE_RGB
            for group in range(len(outs)):
                boxes_V4, scratch, out_VSS3 = boxes[group][n], scratches[group], outs[group][n]
                _cut_views(decoded, layout_4, is_rgb, factor, boxes_V4, scratch, out_VSS3)
    return outs


class FfcvDecoder(Decoder):
    """Decodes by FFCV's libjpeg-turbo.

    Args:
        data: whose samples these are.
        max_reduction: 1, 2, 4 or 8: how much smaller a JPEG may be decoded, in the frequency
            domain, where every box has pixels to spare.
        groups: numbers of groups of views, of different sizes, for which code is compiled now.

    Raises:
        DataError: FFCV cannot be used here.
    """

    def __init__(
        self, data: OpenData, max_reduction: int = 1, groups: Sequence[int] = (1,)
    ) -> None:
        bind_symbols()
        super().__init__(data)
        self._max_reduction = max_reduction
        # Compile or load now, on one thread, rather than in the first batch on all of them.
        nothing = Cut(np.empty((0, 1, 4), np.int64), np.empty((0, 1, 4, 4, 3), np.uint8))
        for count in groups:
            self.decode(np.empty(0, np.int64), (nothing,) * count)

    def try_decode(self, ids_N: IdArray, cuts: Cuts) -> IdArray:
        """See :class:`Decoder`."""
        table = self._data.table
        status_N = np.full(len(ids_N), _DAMAGED, np.uint8)
        max_height = int(table.heights[ids_N].max(initial=1))
        max_width = int(table.widths[ids_N].max(initial=1))
        if max_height * max_width > MAX_PIXELS and len(ids_N) > 1:
            # Working memory has room for both sides: a tall and a wide image go one by one.
            alone = [slice(n, n + 1) for n in range(len(ids_N))]
            failed = [self.try_decode(ids_N[n], cuts_of(cuts, n)) for n in alone]
            return np.flatnonzero([each.size for each in failed])
        boxes, outs = (tuple(each) for each in zip(*cuts))
        scratches = tuple(make_scratch(out.shape[2], max_height, max_width) for out in outs)
        storage = (outs, boxes, scratches, status_N, self._max_reduction)
        metadata = (table.modes, table.heights, table.widths)
        state = (self._data.descriptors_N, table.offsets, table.sizes)
        decode_views(ids_N, storage, metadata, state)
        for n in np.flatnonzero(status_N == _UNREAD).tolist():
            self._data.read(int(ids_N[n]))  # says what is wrong, or it was a moment's trouble
            again = slice(n, n + 1)
            if not self.try_decode(ids_N[again], cuts_of(cuts, again)).size:
                status_N[n] = _FINE
        return np.flatnonzero((status_N == _DAMAGED) | (status_N == _UNREAD))

    def why(self, sample: int) -> str:
        """What libjpeg-turbo says of a sample."""
        table, data = self._data.table, self._data.read(sample).tobytes()
        return jpeg_problem(data, int(table.heights[sample]), int(table.widths[sample]))

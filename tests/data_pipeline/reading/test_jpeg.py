"""Whether a JPEG is sound depends on its own bytes alone."""

from data_pipeline.reading.jpeg import read_jpeg_header, soundness_check
from tests.data_pipeline.images import jpeg

_DHT = b"\xff\xc4"
_SECOND_DC_TABLE = 0x01


def without_a_table(data: bytes, table: int) -> bytes:
    """The JPEG less one of its Huffman tables, each in a segment of its own."""
    at = data.index(_DHT)
    while data[at + 4] != table:
        at = data.index(_DHT, at + 2)
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def test_what_was_decoded_before_does_not_decide_whether_a_jpeg_is_sound() -> None:
    """A decoder keeps the tables of the last picture, for pictures that bring none."""
    _, problem = soundness_check()
    lacking = without_a_table(jpeg(quality=75), _SECOND_DC_TABLE)
    header = read_jpeg_header(lacking)
    alone = problem(lacking, header)
    for seed in range(4):
        other = jpeg(48, 64, seed, quality=95, optimize=True)
        assert problem(other, read_jpeg_header(other)) is None
        assert problem(lacking, header) == alone

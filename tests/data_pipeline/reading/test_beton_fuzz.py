"""Any bytes are a sound .beton or a DataError, never anything else."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import DataError
from data_pipeline.packing import beton_writer
from data_pipeline.reading import beton
from tests.data_pipeline.betons import check_beton
from tests.data_pipeline.damaged import TABLES
from tests.data_pipeline.small_beton import COUNT, pack_small_beton


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_small_beton(tmp_path_factory.mktemp("beton"))


def only_data_errors(path: Path) -> None:
    try:
        info = check_beton(path)
    except DataError:
        return
    assert info.num_samples <= path.stat().st_size


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(data=st.binary(max_size=4000))
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.beton"
    path.write_bytes(data)
    only_data_errors(path)


@FUZZ
@given(draw=st.data())
def test_flipped_bits_in_the_tables_and_cuts(
    packed: Path, tmp_path: Path, draw: st.DataObject
) -> None:
    data = bytearray(packed.read_bytes())
    tail = int(np.frombuffer(data, beton.HEADER, 1)["alloc_table_ptr"][0])
    head = TABLES + COUNT * beton_writer.METADATA.itemsize
    names = st.integers(0, beton.HEADER.itemsize + 20)  # where the header and first name lie
    places = st.one_of(names, st.integers(TABLES, head - 1), st.integers(tail, len(data) - 1))
    for at, bit in draw.draw(st.lists(st.tuples(places, st.integers(0, 7)), max_size=4)):
        data[at] ^= 1 << bit
    keep = draw.draw(st.sampled_from([0, 0, 0, 1, 24, len(data) // 2]))
    path = tmp_path / "x.beton"
    path.write_bytes(data[: len(data) - keep])
    only_data_errors(path)


@FUZZ
@given(
    header=st.tuples(
        st.sampled_from([2, 2, 2, 0, 3]),
        st.integers(0, 2**16 - 1) | st.sampled_from([1, 2, 3]),
        st.integers(0, 2**32 - 1) | st.sampled_from([1 << 21, 1 << 23, 1 << 31]),
        st.integers(0, 2**64 - 1) | st.integers(0, 20),
        st.integers(0, 2**64 - 1) | st.integers(0, 20_000),
    ),
    kinds=st.lists(st.integers(0, 6), min_size=2, max_size=2),
)
def test_any_header(
    packed: Path, tmp_path: Path, header: tuple[int, ...], kinds: list[int]
) -> None:
    data = bytearray(packed.read_bytes())
    data[: beton.HEADER.itemsize] = np.array(header, beton.HEADER).tobytes()
    fields = np.frombuffer(data, beton.FIELD, 2, beton.HEADER.itemsize)
    fields["type_id"] = kinds
    path = tmp_path / "x.beton"
    path.write_bytes(data)
    only_data_errors(path)

"""A sample that does not decode is an error that names it, on both backends."""

from contextlib import closing
from pathlib import Path

import pytest

from common.errors import DataError
from data_pipeline.reading.loader import EvalLoader
from data_pipeline.reading.open_data import OpenData
from data_pipeline.reading.pool import LoaderConfig
from tests.data_pipeline.batches import SIZE, evaluate
from tests.data_pipeline.betons import read_sample_table
from tests.data_pipeline.damaged import NOISE, ZEROS, overwritten

DAMAGES = {
    "beginning": (b"XXXX", 0),
    "all zero": ZEROS,
    "end": (bytes(200), -200),
    "noise": NOISE,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_jpeg_is_named(jpegs: Path, tmp_path: Path, kind: str) -> None:
    bad = overwritten(jpegs, tmp_path / "bad.beton", {7: DAMAGES[kind]})
    with pytest.raises(
        DataError, match=r"bad.beton: sample 7 does not decode \(.+\); pack"
    ) as info:
        evaluate(bad)
    assert "\n" not in str(info.value)


def test_the_fallback_names_a_damaged_jpeg_too(jpegs: Path, tmp_path: Path) -> None:
    bad = overwritten(jpegs, tmp_path / "bad.beton", {7: ZEROS})
    source = EvalLoader(
        OpenData(bad), SIZE, None, LoaderConfig(backend="torchvision"), batch_size=10
    )
    with pytest.raises(DataError, match=r"bad.beton: sample 7 does not decode \(.+\); pack"):
        list(source)
    source.close()


@pytest.mark.parametrize("backend", ["ffcv", "torchvision"])
def test_a_jpeg_of_other_dimensions_than_the_table_says_is_refused(
    jpegs: Path, tmp_path: Path, backend: str
) -> None:
    """FFCV decodes such a sample to stale pixels, or past the end of its buffer."""
    table, data = read_sample_table(jpegs), jpegs.read_bytes()
    start = int(table.offsets[7])
    frame = min(at for m in (b"\xff\xc0", b"\xff\xc2") if (at := data.find(m, start)) >= 0) - start
    patch = ((9000).to_bytes(2, "big") * 2, frame + 5)
    bad = overwritten(jpegs, tmp_path / "bad.beton", {7: patch})
    config = LoaderConfig(backend=backend)  # type: ignore[arg-type]
    with (
        closing(EvalLoader(OpenData(bad), SIZE, None, config, batch_size=10)) as source,
        pytest.raises(DataError, match=r"sample 7 .*its own header says 9000 x 9000 pixels"),
    ):
        list(source)

"""What tests of the data's way share: packed images, and that no loader leaves a thread behind."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data_pipeline.batches import decoding_threads, pack_jpegs


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 JPEGs of every kind that is passed through, packed."""
    return pack_jpegs(tmp_path_factory.mktemp("jpegs"))


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not decoding_threads()

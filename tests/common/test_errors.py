"""What is told of other libraries' errors."""

import pytest

from common.errors import first_sentence


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "[/__w/gloo/tcp/pair.cc:545] Read error [127.0.0.1]:28065: Connection reset by peer. "
            "This is typically caused by a remote worker hanging. GLHF! \N{BEACH WITH UMBRELLA}",
            "Read error [127.0.0.1]:28065: Connection reset by peer",
        ),
        (
            "NCCL error in: x.cpp:3, NCCL version 2.21.5\nncclSystemError: ...",
            "NCCL error in: x.cpp:3, NCCL version 2.21.5",
        ),
        ("It failed.", "It failed"),
        ("", ""),
    ],
)
def test_a_librarys_first_sentence_is_told_without_its_advice(said: str, told: str) -> None:
    assert first_sentence(RuntimeError(said)) == told

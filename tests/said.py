"""What a command says to a user who got something wrong."""


def error_line(stderr: str) -> str:
    """The one line of ``stderr`` that is neither a log line nor a progress bar."""
    lines = [line for line in stderr.splitlines() if "error:" in line]
    assert len(lines) == 1, lines
    return lines[0]

"""``widebatch COMMAND ...`` and ``python -m launch COMMAND ...``: where a process begins.

What the command line needs is imported inside, so that Ctrl-C ends a process in one word from its
very beginning.
"""

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    try:
        from launch import command_line

        return command_line.run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:  # before a command has begun, or while its end is told
        os.write(2, b"interrupted\n")
        return 130  # launch.exit_codes.ExitCode.INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())

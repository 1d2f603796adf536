"""``widebatch COMMAND ...`` and ``python -m launch COMMAND ...``: where a process begins.

What the command line needs is imported inside, so that Ctrl-C ends a process in one word from its
very beginning.
"""

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        from launch import command_line

        code = command_line.run(words)
    except KeyboardInterrupt:  # before a command has begun, or while its end is told
        os.write(2, b"interrupted\n")
        code = 130  # launch.exit_codes.ExitCode.INTERRUPTED
    command = next((word for word in words if not word.startswith("-")), "")
    if (command, code) == ("pretrain", 130) and not {"-h", "--help"} & set(words):
        return 75  # ExitCode.PREEMPTED
    return code


if __name__ == "__main__":
    sys.exit(main())

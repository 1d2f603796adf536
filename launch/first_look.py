"""What a command line is refused for before torch is imported, which takes seconds.

These are the files that it names. Settings and their values are tyro's to read, and whether all
goes together the trainer says.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from common.errors import ConfigError
from launch.arguments import Parser


def refuse_files(prog: str, words: Sequence[str]) -> None:
    """Refuse data files that are none, and a run's folder that cannot be one.

    Raises:
        ConfigError, DataError: names the file and what to do.
    """
    if {"-h", "--help"} & set(words):
        return
    parser = Parser(prog=prog, passes_on=True, add_help=False, allow_abbrev=False)
    parser.add_argument("--data.train", metavar="FILE", dest="train")
    parser.add_argument("--data.test", metavar="FILE", dest="test")
    parser.add_argument("--out", metavar="RUN", type=Path)
    args, _ = parser.parse_known_args(words)
    if args.train is None:
        raise ConfigError(f"--data.train FILE is required; see '{prog} --help'")
    from data_pipeline.reading.beton import sample_count

    for file in filter(None, (args.train, args.test)):
        sample_count(file)
    if args.out is not None:
        _refuse_folder(args.out)


def _refuse_folder(out: Path) -> None:
    place = out.absolute()
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if not place.is_dir():
        raise ConfigError(f"--out {out}: {place} exists and is no folder; choose another name")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--out {out}: {place} cannot be written by this user; choose another folder"
        )

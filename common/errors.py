"""Errors that a user can mend, as against defects of the program."""

import re


class ExplainedError(Exception):
    """Its message alone tells a user what to do: it needs no traceback."""


class InputError(ExplainedError):
    """What the program was given cannot be used."""


class DataError(InputError, ValueError):
    """Input data cannot be used. The message names the place and the remedy."""


class ConfigError(InputError, ValueError):
    """Settings contradict each other or the data. Names the setting and the remedy."""


class CheckpointError(InputError, RuntimeError):
    """A checkpoint is damaged, or belongs to another run. Names the file and the remedy."""


class NumericalError(ExplainedError, RuntimeError):
    """The run stopped learning: non-finite gradients in a row. Names the step and the samples."""


class NonFiniteError(NumericalError):
    """Too many steps in a row whose gradients were not finite."""


class RankLostError(ExplainedError, RuntimeError):
    """Another process of the run is gone, ended by itself, or went another way. Names it.

    For the process that raises it the run may be tried again; the other may know better.
    """


def first_sentence(error: BaseException) -> str:
    """What the message of a library says first: no place in its source, no pages, no advice."""
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).partition(". ")[0].rstrip(".")

"""Errors that a user can mend, as against defects of the program."""

from data_pipeline.errors import ConfigError as ConfigError


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or belongs to another run. Names the file and the remedy."""


class NumericalError(RuntimeError):
    """The run stopped learning: non-finite gradients in a row. Names the step and the samples."""


class NonFiniteError(NumericalError):
    """Too many steps in a row whose gradients were not finite."""


class RankLostError(RuntimeError):
    """Another process of the run is gone, ended by itself, or went another way. Names it.

    For the process that raises it the run may be tried again; the other may know better.
    """

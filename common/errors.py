"""Errors of what was given: data, and the settings of what reads it."""


class DataError(ValueError):
    """Input data cannot be used. The message names the place and the remedy."""


class ConfigError(ValueError):
    """Settings contradict each other or the data. Names the setting and the remedy."""


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

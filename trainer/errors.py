"""Errors that a user can mend, as against defects of the program."""


class ConfigError(ValueError):
    """The settings of a run contradict each other or the data. Names the setting and the remedy."""


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or belongs to another run. Names the file and the remedy."""


class NumericalError(RuntimeError):
    """The run stopped learning: non-finite gradients in a row. Names the step and the samples."""

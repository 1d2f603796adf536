"""The one kind of error that bad input data raises."""


class DataError(ValueError):
    """Input data cannot be used. The message names the place and the remedy."""

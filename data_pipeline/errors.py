"""Errors of what was given: data, and the settings of what reads it."""


class DataError(ValueError):
    """Input data cannot be used. The message names the place and the remedy."""


class ConfigError(ValueError):
    """Settings contradict each other or the data. Names the setting and the remedy."""

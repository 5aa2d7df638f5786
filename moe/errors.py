"""Named errors of the data sets."""


class DataMissingError(FileNotFoundError):
    """A data set that was asked for is not on this machine."""


class DataCorruptError(ValueError):
    """A data file does not hold what it should."""

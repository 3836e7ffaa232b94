"""Errors meant for a person: each says what is wrong, where, and what to do about it."""


class MllmSrecError(Exception):
    """Something failed that the user can act on; the command line prints it without a traceback and exits with 1."""

    exit_code = 1


class UsageError(MllmSrecError):
    """The command, the configuration or the call is wrong; the command line exits with 2."""

    exit_code = 2


class DataError(MllmSrecError):
    """The input data breaks the contract; the message names file, line and column where they exist."""


class StoreError(MllmSrecError):
    """The workspace cannot be read or written (busy, full, damaged, not a workspace)."""


class ModelError(MllmSrecError):
    """A model cannot be loaded, cannot do what was asked, or gave unusable results."""

"""The one exception for input that cannot be used."""


class InputError(ValueError):
    """What was expected, what was found and what to do, in one sentence; commands print it without a traceback and exit with code 2."""

"""The one error that a wrong input raises."""

from __future__ import annotations


class InputError(ValueError):
    """Say in one line what was expected, what was found and what to do.

    Raised for what a user can mend: data, parameters, paths. Faults of the program itself keep Python's
    own exceptions, so that nobody is sent to look for them in their files.
    """

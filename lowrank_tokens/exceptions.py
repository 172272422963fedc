"""The exception for wrong input of the caller, as opposed to a fault of the code."""

from __future__ import annotations


class InputError(ValueError):
    """A wrong argument, file or folder; the message says what is wrong and what to do instead.

    The commands print it as one line and end with exit status 2; any other ValueError is a
    programming error there and keeps its traceback.
    """

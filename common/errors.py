"""The one exception that every module may raise at a user: it imports nothing."""

from __future__ import annotations


class UserError(Exception):
    """A mistake of the user: reported as one line `error: ...` with exit status 2.

    The message says what is wrong, where (flag or file), and what to type instead.
    """

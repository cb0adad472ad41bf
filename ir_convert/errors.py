"""The one exception that reaches the user as a line of text instead of a traceback."""


class UserError(Exception):
    """Says in one line what is wrong, which value, and what to do about it."""

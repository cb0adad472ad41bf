"""The one exception that reaches the user as a line of text instead of a traceback."""


class UserError(Exception):
    """Says in one line what is wrong, which value, and what to do about it."""


def reason(error: BaseException) -> str:
    """Returns what the system says of a failed call, or the exception's one line."""
    return getattr(error, "strerror", None) or one_line(error)


def one_line(error: BaseException) -> str:
    """Returns the first line of what an exception says, with what it announces there, or its type."""
    said = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)  # which says the key alone
    first, *rest = (said.strip() or type(error).__name__).splitlines()
    return " ".join([first.strip(), *(line.strip() for line in rest)]) if first.strip().endswith(":") else first

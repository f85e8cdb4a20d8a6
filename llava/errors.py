"""The one exception that means "the user can fix this"."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input. The message is one sentence: what was expected, what came, what to do.

    Command lines print it alone, without a traceback, and exit with code 2.
    """


class MethodError(UserError):
    """A method broke its contract. It is no fault of a question, so it ends a run at once."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a sentence that asks whether the nearest known name was meant; "" where none is near."""
    close = get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest name that does."""
    known = sorted(known)
    return UserError(f"Unknown {kind} {name!r}.{suggestion(name, known)} Available: {', '.join(known)}.")

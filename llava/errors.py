"""The one exception that means "the user can mend this"."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input. The message is one sentence: what was expected, what came, what to do.

    Command lines print it alone, without a traceback, and exit with code 2.
    """


class MethodError(UserError):
    """A method broke its contract. It is no fault of a question, so it ends a run at once."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest name that does."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UserError(f"Unknown {kind} {name!r}.{hint} Available: {', '.join(known)}.")

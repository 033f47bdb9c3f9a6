"""Messages: one wording per kind of mistake, so that a reader of an error always finds where, what and the remedy.

Every builder returns text; callers choose the exception type (``ValueError`` for a value, ``TypeError`` for a kind of
thing, ``KeyError`` for a path or name). Imports nothing of the package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NoMatchError(ValueError):
    """Raised when an entry of a target rule matches nothing in the model."""


class NameMissingError(KeyError):
    """A ``KeyError`` that prints its message as written, without the quotes that ``KeyError`` adds."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class CheckpointError(ValueError):
    """Raised when a file is not what it claims to be: corrupt, truncated, or with missing, extra or misshapen tensors."""


class NoMergedFormError(ValueError):
    """Raised by ``merge`` and ``unmerge`` where a method has no weight that would compute the same."""


class CannotRequantizeError(ValueError):
    """Raised when a weight cannot be stored in a format from its values alone; the message names the alternatives."""


class LostUpdateError(ValueError):
    """Raised when requantizing a merged weight would lose more of the update than was allowed."""


def say(where: str, required: str, found: object = None, remedy: str = "") -> str:
    """Builds the one sentence: where, what was required, what was found, what to do."""
    text = f"{where}: {required}"
    if found is not None:
        text += f", got {found}"
    if not remedy:
        return f"{text}."
    return f"{text}; {remedy}" if remedy.endswith("?") else f"{text}; {remedy}."


def listed(names: Iterable[object], limit: int = 8) -> str:
    """Lists names in quotes, the first ``limit`` of them, and how many more there are."""
    names = list(names)
    text = ", ".join(repr(n) for n in names[:limit])
    return text + (f" and {len(names) - limit} more" if len(names) > limit else "")


def nearest(name: str, choices: Iterable[str], limit: int = 3) -> str:
    """Says which of the choices are closest to a misspelt name, compared whole and by their last component."""
    choices = list(dict.fromkeys(choices))
    found = difflib.get_close_matches(name, choices, n=limit, cutoff=0.6)
    last = {c.rsplit(".", 1)[-1]: c for c in choices}
    found += [m for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, n=limit, cutoff=0.6) if m not in found]
    found = found[:limit]
    return f"did you mean {' or '.join(repr(f) for f in found)}?" if found else f"known are {listed(sorted(choices))}"


def one_of(where: str, field: str, value: object, choices: Iterable[object]) -> str:
    """Says that a field must be one of some choices."""
    return say(where, f"{field} must be one of {listed(choices, 20)}", repr(value))


def divisors(n: int, limit: int = 12) -> str:
    """Lists the divisors of ``n``, to name the valid values of a block size."""
    found = [str(d) for d in range(1, n + 1) if n % d == 0]
    return ", ".join(found[:limit]) + (", ..." if len(found) > limit else "")

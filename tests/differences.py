"""Marks a test as one of a difference from peft; the table in the docs is made of the marks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Test = TypeVar("Test", bound=Callable[..., object])


def differs(method: str, theirs: str, ours: str) -> Callable[[Test], Test]:
    """Says what peft 0.21.2 does, what is done here, and that the decorated test checks both independently.

    Args:
        method: Class name here, or a few words where no one method is meant.
        theirs: What peft does.
        ours: What is done here instead.
    """

    def mark(test: Test) -> Test:
        test.__dict__["difference"] = (method, theirs, ours)
        return test

    return mark

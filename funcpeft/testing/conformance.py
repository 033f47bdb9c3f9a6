"""Conformance: run every law on a method. Imports laws and strategies; hypothesis comes with the ``test`` extra."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from funcpeft import errors
from funcpeft.method import Method
from funcpeft.quant.format import Format
from funcpeft.testing.format_laws import FORMAT_LAWS
from funcpeft.testing.laws import LAWS

#: Laws whose single case is slow; they get a fraction of the examples.
_SLOW = {"compiled": 8, "round_trip": 2, "vmap": 2, "many": 3, "product": 4}


def check_law(
    method: Method,
    law: str,
    *,
    max_examples: int = 20,
    kinds: Sequence[str] | None = None,
    formats: Sequence[Format] | None = None,
) -> None:
    """Runs one law on generated cases of a method.

    Args:
        method: An instance; its targets are set by the cases.
        law: Name of a law; one that the method waives holds.
        max_examples: Generated cases; slow laws get fewer.
        kinds: Layer kinds, by default all that the method takes.
        formats: Formats in which the bases' weights are stored; dense by default. A method without matrices is not run then.

    Raises:
        AssertionError: With the smallest case found that breaks the law.
        KeyError: If there is no such law.
    """
    from funcpeft.testing.strategies import cases, stored_cases

    if law not in LAWS:
        raise errors.NameMissingError(errors.say("check_law", "law must exist", repr(law), errors.nearest(law, LAWS)))
    if law in method.waived:
        return
    drawn = cases(method, kinds) if formats is None else stored_cases(method, formats)
    if drawn is None:
        return
    _run(LAWS[law], law, drawn, max_examples)


def check_format_law(format: Format, law: str, *, max_examples: int = 30) -> None:
    """Runs one law on weights of many shapes, sizes and dtypes stored in a format.

    Raises:
        AssertionError: With the smallest case found that breaks the law.
        KeyError: If there is no such law.
    """
    from funcpeft.testing.strategies import weights

    if law not in FORMAT_LAWS:
        hint = errors.nearest(law, FORMAT_LAWS)
        raise errors.NameMissingError(errors.say("check_format_law", "law must exist", repr(law), hint))
    _run(FORMAT_LAWS[law], law, weights(format), max_examples)


def _run(check: Callable[[Any], None], law: str, drawn: Any, max_examples: int) -> None:
    """Runs a law on cases of a hypothesis strategy, the same ones every time."""
    from hypothesis import HealthCheck, Phase, given, settings

    phases = [Phase.explicit, Phase.generate]
    if law not in _SLOW:  # a smaller case is worth the time where a case is cheap
        phases.append(Phase.shrink)

    @settings(
        max_examples=max(1, max_examples // _SLOW.get(law, 1)),
        deadline=None,
        derandomize=True,
        database=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(drawn)
    def run(case: Any) -> None:
        check(case)

    run()


def check_format(format: Format, *, laws: Iterable[str] | None = None, max_examples: int = 30) -> None:
    """Runs every law of formats on one: cells, grids, trees, transforms.

    Raises:
        AssertionError: With the law and the smallest case found that breaks it.
    """
    for law in laws or FORMAT_LAWS:
        check_format_law(format, law, max_examples=max_examples)


def check_method(method: Method, *, laws: Iterable[str] | None = None, max_examples: int = 20) -> dict[str, str]:
    """Runs every law on a method over the layer kinds it takes, sizes and dtypes.

    Args:
        method: An instance; its targets are set by the cases.
        laws: Names of laws; all of them by default.
        max_examples: Generated cases per law; slow laws get fewer.

    Returns:
        ``{law: "holds" or the reason for which the method waives it}``.

    Raises:
        AssertionError: With the law and the smallest case found that breaks it.
    """
    done: dict[str, str] = {}
    for law in laws or LAWS:
        check_law(method, law, max_examples=max_examples)
        done[law] = method.waived.get(law, "holds")
    return done

"""Conformance: run every law on a method. Imports laws and strategies; hypothesis comes with the ``test`` extra."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from funcpeft import errors
from funcpeft.method import Method
from funcpeft.testing.laws import LAWS

#: Laws whose single case is slow; they get a fraction of the examples.
_SLOW = {"compiled": 8, "round_trip": 2, "vmap": 2}


def check_law(method: Method, law: str, *, max_examples: int = 20, kinds: Sequence[str] | None = None) -> None:
    """Runs one law on generated cases of a method.

    Raises:
        AssertionError: With the smallest case found that breaks the law.
        KeyError: If there is no such law.
    """
    from hypothesis import HealthCheck, Phase, given, settings

    from funcpeft.testing.strategies import cases

    if law not in LAWS:
        raise errors.NameMissingError(errors.say("check_law", "law must exist", repr(law), errors.nearest(law, LAWS)))
    if law in method.waived:
        return
    examples = max(1, max_examples // _SLOW.get(law, 1))
    phases = [Phase.explicit, Phase.generate]
    if law not in _SLOW:  # a smaller case is worth the time where a case is cheap
        phases.append(Phase.shrink)
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=phases,
        report_multiple_bugs=False,
        suppress_health_check=quiet,
    )
    @given(cases(method, kinds))
    def run(case: object) -> None:
        LAWS[law](case)  # type: ignore[arg-type]

    run()


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

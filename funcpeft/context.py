"""Context: the values of a call that are neither weights nor inputs of the model (training flag, seed of its draws).

Immutable, and passed explicitly as ``net(..., context=...)``, so a call is a function of its arguments alone. Imports rng.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from funcpeft import errors, rng
from funcpeft.tree import register


@dataclass(frozen=True, eq=False)
class Context:
    """Says how a call is made.

    Args:
        training: Whether adapter dropout is on. The base model always runs in eval mode.
        seed: Determines every draw of the call; needed when training. A 0-d integer tensor may vary per member under
            ``vmap`` and from step to step without a recompile; an int is fixed in a compiled graph.
        salts: Which draw this is: ints mixed into the seed on the way to a site. Not set by callers.

    Raises:
        ValueError: If ``training`` is set without a seed: a missing seed is never a constant.
    """

    training: bool = False
    seed: int | Tensor | None = None
    salts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.training and self.seed is None:
            raise ValueError(
                errors.say("context", "training needs a seed", "seed=None", "pass Context(training=True, seed=step)")
            )

    def at(self, *salts: int) -> Context:
        """Returns the context of one place inside the call, whose draws differ from those of other places."""
        return replace(self, salts=self.salts + salts) if self.training else self

    def dropout(self, x: Tensor, p: float, slot: int = 0) -> Tensor:
        """Drops elements of ``x`` with probability ``p`` when training; ``slot`` tells several draws of a site apart."""
        if not self.training or not p:
            return x
        assert self.seed is not None
        return rng.dropout(x, p, rng.key(self.seed, *self.salts, slot))


def _flatten(c: Context) -> tuple[tuple[Any, ...], Any]:
    if isinstance(c.seed, int) or c.seed is None:
        return (), (c.training, c.seed, c.salts, False)
    return (c.seed,), (c.training, None, c.salts, True)


def _unflatten(static: Any, children: Any) -> Context:
    training, seed, salts, held = static
    made = object.__new__(Context)  # a transform may put a placeholder where the seed was: no checks here
    for name, value in (("training", training), ("seed", tuple(children)[0] if held else seed), ("salts", salts)):
        object.__setattr__(made, name, value)
    return made


register(Context, _flatten, _unflatten)

#: The context of a call that names none: evaluation.
EVAL = Context()

"""Context: the values of a call that are neither weights nor inputs of the model (training flag, seed of its draws).

Immutable, and passed explicitly as ``net(..., context=...)``, so a call is a function of its arguments alone. Imports rng.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

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
        ValueError: If ``training`` is set without a seed (a missing seed is never a constant), or a seed has over 64 bits.
        TypeError: If the seed is neither an int nor a tensor of integers.
    """

    training: bool = False
    seed: int | Tensor | None = None
    salts: tuple[int, ...] = ()
    #: Whether the seed is a child of the node, be it a tensor or what a transform puts in its place.
    _held: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.training and self.seed is None:
            raise ValueError(
                errors.say("context", "training needs a seed", "seed=None", "pass Context(training=True, seed=step)")
            )
        whole = not self.seed.is_floating_point() if isinstance(self.seed, Tensor) else isinstance(self.seed, int)
        if self.seed is not None and (not whole or isinstance(self.seed, bool)):
            raise TypeError(errors.say("context", "seed must be an int or an integer tensor", repr(self.seed)))
        if isinstance(self.seed, int) and not -(2**63) <= self.seed < 2**64:
            raise ValueError(errors.say("context", "seed must have at most 64 bits", self.seed))

    def at(self, *salts: int) -> Context:
        """Returns the context of one place inside the call, whose draws differ from those of other places."""
        return replace(self, salts=self.salts + salts) if self.training else self

    def dropout(self, x: Tensor, p: float, slot: int = 0) -> Tensor:
        """Drops elements of ``x`` with probability ``p`` when training; ``slot`` tells several draws of a site apart.

        Raises:
            ValueError: If the seed is a tensor with axes: seeds of several members are for a call under ``vmap``.
        """
        if not self.training or not p:
            return x
        assert self.seed is not None
        if isinstance(self.seed, Tensor) and self.seed.ndim:
            found = f"shape {tuple(self.seed.shape)}"
            raise ValueError(errors.say("context", "a seed tensor must be 0-d in a call", found, "vmap over the context"))
        return rng.dropout(x, p, rng.key(self.seed, *self.salts, slot))


def _flatten(c: Context) -> tuple[tuple[Any, ...], Any]:
    if c._held or isinstance(c.seed, Tensor):
        return (c.seed,), (c.training, None, c.salts, True)
    return (), (c.training, c.seed, c.salts, False)


def _unflatten(static: Any, children: Any) -> Context:
    training, seed, salts, held = static
    made = object.__new__(Context)  # a transform may put a placeholder where the seed was: no checks here
    value = next(iter(children)) if held else seed
    for name, v in (("training", training), ("seed", value), ("salts", salts), ("_held", held)):
        object.__setattr__(made, name, v)
    return made


register(Context, _flatten, _unflatten, lambda c: ("seed",) if c._held or isinstance(c.seed, Tensor) else ())

#: The context of a call that names none: evaluation.
EVAL = Context()

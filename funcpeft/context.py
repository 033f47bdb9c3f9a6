"""Context: the values of a call that are neither weights nor inputs of the model (training flag, seed of its draws, routes).

Immutable, and passed explicitly as ``net(..., context=...)``, so a call is a function of its arguments alone. Imports rng.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
        values: Tensors by name that methods of the net read at the call, such as the task of every row; rows come first.
            In a call of many adapters they are mapped as inputs are.
        salts: Which draw this is: ints mixed into the seed on the way to a site. Not set by callers.

    Raises:
        ValueError: If ``training`` is set without a seed (a missing seed is never a constant), or a seed has over 64 bits.
        TypeError: If the seed is neither an int nor a tensor of integers, or ``values`` holds anything but tensors.
    """

    training: bool = False
    seed: int | Tensor | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)
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
        if not isinstance(self.values, Mapping):
            raise TypeError(errors.say("context", "values must be a mapping of tensors", type(self.values).__name__))
        for name, value in self.values.items():
            if not isinstance(value, Tensor):
                raise TypeError(errors.say("context", f"value {name!r} must be a tensor", type(value).__name__))

    def at(self, *salts: int) -> Context:
        """Returns the context of one place inside the call, whose draws differ from those of other places."""
        return replace(self, salts=self.salts + salts) if self.training or self.seed is not None else self

    def value(self, name: str) -> Tensor:
        """Returns a value of the call.

        Raises:
            ValueError: If the call was made without it.
        """
        if name not in self.values:
            given, remedy = sorted(self.values) or "none", f"pass context=Context(values={{{name!r}: tensor}})"
            raise ValueError(errors.say("context", f"the call needs the value {name!r}", given, remedy))
        return self.values[name]

    def uniform(self, like: Tensor, slot: int = 0) -> Tensor:
        """Draws U[0, 1) in the shape and dtype of a tensor; for a training call."""
        assert self.seed is not None
        return rng.unit(like, rng.key(self.seed, *self.salts, slot))

    def gaussian(self, like: Tensor, slot: int = 0) -> Tensor:
        """Draws N(0, 1) in the shape and dtype of a tensor; for a training call."""
        assert self.seed is not None
        return rng.gaussian(like, rng.key(self.seed, *self.salts, slot))

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


#: What a value of the context is called among the inputs of a call of many adapters, where it is mapped as they are.
PREFIX = "context."


def as_inputs(context: Context) -> tuple[Context, dict[str, Tensor]]:
    """Returns the context without its values, and these under the names they have among a call's keyword inputs."""
    if not context.values:
        return context, {}
    return replace(context, values={}), {PREFIX + name: t for name, t in context.values.items()}


def from_inputs(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Splits keyword inputs into the model's own and values of the context."""
    values = {k.removeprefix(PREFIX): v for k, v in kwargs.items() if k.startswith(PREFIX)}
    return ({k: v for k, v in kwargs.items() if not k.startswith(PREFIX)} if values else dict(kwargs)), values


def _flatten(c: Context) -> tuple[tuple[Any, ...], Any]:
    held, names = c._held or isinstance(c.seed, Tensor), tuple(c.values)
    seeds, seed = ((c.seed,), None) if held else ((), c.seed)
    return (*seeds, *c.values.values()), (c.training, seed, c.salts, held, names)


def _unflatten(static: Any, children: Any) -> Context:
    training, seed, salts, held, names = static
    made, given = object.__new__(Context), iter(children)  # a transform may put a placeholder for a tensor: no checks here
    value = next(given) if held else seed
    values = dict(zip(names, given, strict=True))
    for name, v in (("training", training), ("seed", value), ("values", values), ("salts", salts), ("_held", held)):
        object.__setattr__(made, name, v)
    return made


def _names(c: Context) -> tuple[str, ...]:
    return (*(("seed",) if c._held or isinstance(c.seed, Tensor) else ()), *(f"values[{n!r}]" for n in c.values))


register(Context, _flatten, _unflatten, _names)

#: The context of a call that names none: evaluation.
EVAL = Context()

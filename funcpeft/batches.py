"""Batches as a pure function of seed and step, so that a run resumes without the state of an iterator.

Imports rng, errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate

from funcpeft import errors, rng

#: Examples along the first axis: a tensor, tensors by name, or a tuple of them.
Batch = Tensor | dict[str, Tensor] | tuple[Tensor, ...]


class Batches:
    """Draws the batch of a member at a step.

    Args:
        where: What a message says is wrong.
        data: Columns (a tensor, a mapping or a tuple of tensors with one first axis), examples (any other sequence, collated
            by torch's ``default_collate``), or a function ``(step, seed) -> batch``.
        size: Examples per batch; ``None`` for a function.
        device: Where batches go.
        at_most: Whether ``size`` is but a limit, ``None`` for none.

    Raises:
        TypeError: If ``data`` is none of these.
        ValueError: If it is empty, lengths differ, or a batch would have no example or more than there are.
    """

    def __init__(self, where: str, data: Any, size: int | None, device: torch.device, *, at_most: bool = False) -> None:
        self.where, self.device, self.size = where, device, 0
        self._orders: dict[int, tuple[int, Tensor]] = {}
        self._draw, self._rows, self.count = _source(where, data)
        if self._draw is not None:
            if size is not None:
                raise ValueError(errors.say(where, "batch_size must be None where data is a function", size))
            return
        if not self.count:
            raise ValueError(errors.say(where, "at least one example is required", 0))
        if at_most:
            size = min(size or self.count, self.count)
        if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= self.count:
            raise ValueError(errors.say(where, f"batch_size must be an int in 1 to {self.count}, the examples", repr(size)))
        self.size = size

    def at(self, step: int, seeds: Sequence[int]) -> tuple[Batch, int | None]:
        """Returns the batches of members at a step, counted from 0, and the axis of members.

        That axis is ``None``, for one batch that all members share, where all their seeds are equal.
        """
        made = {seed: self._batch(step, seed) for seed in dict.fromkeys(seeds)}
        if len(made) == 1:
            return made[seeds[0]], None
        each = [made[seed] for seed in seeds]
        shapes = {str(shapes_of(batch)): None for batch in each}
        if len(shapes) > 1:
            rule = f"the batches of step {step} must have one form and shape"
            raise ValueError(
                errors.say(self.where, rule, " and ".join(list(shapes)[:2]), "pad them, or let members share them")
            )
        return map_batch(lambda *t: torch.stack(t), *each), 0

    def all(self) -> Iterator[tuple[Batch, int]]:
        """Yields all examples in order, in batches, each with the number of its examples."""
        for start in range(0, self.count, self.size):
            rows = torch.arange(start, min(start + self.size, self.count))
            yield self._placed(self._rows(rows)), len(rows)

    def _batch(self, step: int, seed: int) -> Batch:
        if self._draw is not None:
            return self._placed(as_batch(self.where, self._draw(step, seed)))
        epoch, place = divmod(step, self.count // self.size)
        if self._orders.get(seed, (-1,))[0] != epoch:
            order = torch.randperm(self.count, generator=rng.generator(seed, f"epoch {epoch}"))
            self._orders[seed] = (epoch, order)
        return self._placed(self._rows(self._orders[seed][1][place * self.size : (place + 1) * self.size]))

    def _placed(self, batch: Batch) -> Batch:
        return map_batch(lambda t: t.to(self.device), batch)


_Draw = Callable[[int, int], Any]
_Rows = Callable[[Tensor], Batch]


def _source(where: str, data: Any) -> tuple[_Draw | None, _Rows, int]:
    """Returns the function that draws, or the one that picks rows with their number."""
    if isinstance(data, Tensor | Mapping | tuple):
        columns = as_batch(where, data)
        return None, lambda rows: map_batch(lambda t: t.detach()[rows.to(t.device)], columns), _length(where, columns)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return None, lambda rows: as_batch(where, default_collate([data[i] for i in rows.tolist()])), len(data)
    if callable(data):
        return data, lambda rows: (), 0
    rule = "data must be tensors, a sequence of examples or a function of (step, seed)"
    raise TypeError(errors.say(where, rule, type(data).__name__))


def as_batch(where: str, data: Any) -> Batch:
    """Returns columns as a tensor, a dict or a tuple.

    Raises:
        TypeError: If they are of another form, or not tensors.
    """
    if isinstance(data, Tensor):
        return data
    items: dict[Any, Any] | None = None
    if isinstance(data, Mapping | tuple | list):
        items = dict(data) if isinstance(data, Mapping) else dict(enumerate(data))
    if not items:
        rule = "a batch must be a tensor, or a mapping or tuple of tensors"
        raise TypeError(errors.say(where, rule, type(data).__name__ if items is None else "an empty one"))
    for name, t in items.items():
        if not isinstance(t, Tensor) or not t.ndim or not isinstance(name, str | int):
            found = type(t).__name__ if not isinstance(t, Tensor) else f"shape {tuple(t.shape)}"
            raise TypeError(errors.say(where, f"entry {name!r} of a batch must be a tensor of examples", found))
    return items if isinstance(data, Mapping) else tuple(items.values())


def map_batch(f: Callable[..., Tensor], *batches: Batch) -> Any:
    """Maps a function over the tensors of batches of one form."""
    first = batches[0]
    if isinstance(first, Tensor):
        return f(*batches)
    if isinstance(first, dict):
        return {name: f(*(b[name] for b in batches)) for name in first}  # type: ignore[call-overload]  # all are dicts
    return tuple(f(*each) for each in zip(*batches, strict=True))


def shapes_of(batch: Batch) -> Any:
    """Returns the shapes of a batch, in its form."""
    return map_batch(lambda t: tuple(t.shape), batch)  # type: ignore[arg-type,return-value]  # shapes in place of tensors


def _length(where: str, columns: Batch) -> int:
    tensors = [columns] if isinstance(columns, Tensor) else list(columns.values() if isinstance(columns, dict) else columns)
    counts = sorted({t.shape[0] if t.ndim else 0 for t in tensors})
    if len(counts) > 1:
        raise ValueError(errors.say(where, "every tensor of data must have as many examples", shapes_of(columns)))
    return counts[0]

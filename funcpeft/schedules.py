"""Hyperparameters of optimizers: numbers, one number per member, or schedules of the step.

All are tensors in an optimizer's state, so changing one recompiles nothing. ``optim`` re-exports the schedules. Imports
tree, errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.tree import register


@dataclass(frozen=True, eq=False)
class Schedule:
    """A hyperparameter that depends on the step: ``formula(step, **values)``.

    Args:
        formula: Pure tensor operations on a 0-d step and 0-d values, with a 0-d result.
        values: The schedule's own hyperparameters, numbers or (N,) tensors; they are leaves of the optimizer's state.
    """

    formula: Callable[..., Tensor]
    values: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, step: Tensor) -> Tensor:
        return self.formula(step, **self.values)


#: What a hyperparameter may be: a number, an (N,) tensor, a schedule.
Hyper = float | Tensor | Schedule | Callable[[Tensor], Tensor]


register(
    Schedule,
    lambda s: ((s.values,), s.formula),
    lambda formula, children: Schedule(formula, *children),
    lambda s: ("values",),
)


def constant(value: float | Tensor) -> Schedule:
    """Schedules one value for all steps."""
    return linear_warmup(value, 0)


def linear_warmup(peak: float | Tensor, steps: float | Tensor) -> Schedule:
    """Schedules a line from 0 at step 0 to ``peak`` at step ``steps``, and ``peak`` from there on."""
    return Schedule(_line, {"peak": _number("schedule: peak", peak), "steps": _number("schedule: steps", steps)})


def cosine(peak: float | Tensor, steps: float | Tensor, end: float | Tensor = 0.0) -> Schedule:
    """Schedules half a cosine from ``peak`` at step 0 down to ``end`` at step ``steps``, and ``end`` from there on."""
    return warmup_cosine(peak, 0, steps, end)


def warmup_cosine(peak: float | Tensor, warmup: float | Tensor, steps: float | Tensor, end: float | Tensor = 0.0) -> Schedule:
    """Schedules ``linear_warmup(peak, warmup)``, then half a cosine down to ``end`` at step ``steps``, warmup included.

    Example:
        >>> schedule = warmup_cosine(peak=1.0, warmup=2, steps=6)
        >>> [round(float(schedule(torch.tensor(step))), 2) for step in range(8)]
        [0.0, 0.5, 1.0, 0.85, 0.5, 0.15, 0.0, 0.0]
    """
    given = {"peak": peak, "warmup": warmup, "steps": steps, "end": end}
    return Schedule(_warmup_cosine, {name: _number(f"schedule: {name}", value) for name, value in given.items()})


def _line(step: Tensor, peak: Tensor, steps: Tensor) -> Tensor:
    return torch.where(step < steps, peak * step / steps.clamp(min=1.0), peak)


def _warmup_cosine(step: Tensor, peak: Tensor, warmup: Tensor, steps: Tensor, end: Tensor) -> Tensor:
    progress = ((step - warmup) / (steps - warmup).clamp(min=1.0)).clamp(0.0, 1.0)
    return torch.where(step < warmup, _line(step, peak, warmup), end + (peak - end) * 0.5 * (1 + torch.cos(math.pi * progress)))


def evaluate(where: str, hyper: Tensor | Schedule, step: Tensor) -> Tensor:
    """Returns a hyperparameter's value at a step, member by member where the step has one entry per member."""

    def one(step: Tensor, schedule: Schedule) -> Tensor:
        value = schedule(step)
        if not isinstance(value, Tensor) or value.ndim:
            raise TypeError(
                errors.say(where, "a schedule must return a 0-d tensor", getattr(value, "shape", type(value).__name__))
            )
        return value.double()

    if isinstance(hyper, Tensor):
        return hyper
    return torch.func.vmap(one)(step, hyper) if step.ndim else one(step, hyper)


def hyperparameter(where: str, value: Hyper, interval: str) -> Tensor | Schedule:
    """Checks what a user gave as a hyperparameter; a tensor, or a schedule whose values are tensors."""
    if isinstance(value, Tensor) or not callable(value):
        return _number(where, value, interval)
    schedule = value if isinstance(value, Schedule) else Schedule(value)
    return Schedule(schedule.formula, {k: _number(f"{where}: {k}", v, "[-inf, inf]") for k, v in schedule.values.items()})


def _number(where: str, value: Any, interval: str = "[0, inf)") -> Tensor:
    """Checks a hyperparameter and makes it a float64 tensor, 0-d or (N,)."""
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise TypeError(errors.say(where, "a number, an (N,) tensor or a schedule is required", type(value).__name__))
    t = torch.as_tensor(value, dtype=torch.float64)
    if t.ndim > 1:
        raise ValueError(errors.say(where, "a tensor must be 0-d or (N,), one value per member", f"shape {tuple(t.shape)}"))
    low, high = map(float, interval[1:-1].split(","))
    above, below = t >= low if interval[0] == "[" else t > low, t <= high if interval[-1] == "]" else t < high
    try:
        valid = torch.compiler.is_compiling() or bool((above & below).all())
    except RuntimeError:  # under vmap a value cannot steer Python
        valid = True
    if not valid:
        raise ValueError(errors.say(where, f"must be in {interval}", value))
    return t

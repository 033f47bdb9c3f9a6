"""What training a population gives: the adapters, the optimizer's state, and the history, in one tree of tensors.

Imports optim, tree, errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from funcpeft import errors
from funcpeft.optim import State
from funcpeft.tree import Adapters, register, tree_map

#: What ``status`` counts to: what became of a member.
STATUS = ("running", "stopped", "diverged")
RUNNING, STOPPED, DIVERGED = range(3)


@dataclass(frozen=True, eq=False)
class Result:
    """A population after some steps of training; a tree of tensors, which ``train.save`` writes and ``load`` reads.

    Given to ``train.population`` in place of adapters it is where training goes on.

    Attributes:
        adapters: All members, stacked, in the order given.
        state: The optimizer's state, one entry per member.
        history: ``"loss"`` and ``"lr"`` ``(steps, N)`` in float64, ``"active"`` ``(steps, N)``, whether a member took part in
            the step; ``"evaluated"`` ``(evaluations,)``, after how many steps the members were evaluated, and
            ``"evaluation"`` ``(evaluations, N)``. NaN where a member took no part. ``"lr"`` is there if the optimizer has it.
        seeds: ``"dropout"`` and ``"order"`` ``(N,)``, from which every draw of a member is derived.
        status: What became of each member ``(N,)``, an index of ``STATUS``.
        stopping: ``"best"`` ``(N,)``, the lowest evaluation, and ``"waited"`` ``(N,)``, evaluations since then.
    """

    adapters: Adapters
    state: State
    history: dict[str, Tensor]
    seeds: dict[str, Tensor]
    status: Tensor
    stopping: dict[str, Tensor]

    @property
    def members(self) -> int:
        """Number of members."""
        return len(self.status)

    @property
    def step(self) -> int:
        """Steps that the population has made."""
        return len(self.history["loss"])

    @property
    def outcomes(self) -> list[str]:
        """What became of each member: ``"running"``, ``"stopped"`` early, or ``"diverged"``: its loss was not finite."""
        return [STATUS[i] for i in self.status.tolist()]

    @property
    def losses(self) -> Tensor:
        """Last evaluation of each member ``(N,)``, last loss where there is none; infinite if it diverged."""
        last = _last(self.history["evaluation"])
        last = torch.where(last.isnan(), _last(self.history["loss"]), last)
        return torch.where((self.status == DIVERGED) | last.isnan(), torch.inf, last)

    def select(self, index: Sequence[int] | Tensor) -> Result:
        """Picks members, by numbers or by a mask ``(N,)``.

        Raises:
            ValueError: If the index is empty, or of members that there are not.
        """
        chosen = _numbers("Result.select", index, self.members)
        each = (self.adapters, self.state, self.seeds, self.status, self.stopping)
        adapters, state, seeds, status, stopping = pick(each, chosen)
        history = {k: t.clone() if t.ndim == 1 else t.index_select(1, chosen) for k, t in self.history.items()}
        return Result(adapters, state, history, seeds, status, stopping)

    def replace(self, **changes: Any) -> Result:
        """Returns a copy with some attributes replaced."""
        return replace(self, **changes)

    def plot(self) -> Any:
        """Draws losses, and evaluations where there are any, against the step; returns a matplotlib ``Figure``.

        A cross ends the curve of a member that diverged, a bar that of one that stopped early; the best is drawn thick.
        """
        from matplotlib import colormaps
        from matplotlib.figure import Figure

        panels = {"loss": (torch.arange(1, self.step + 1), self.history["loss"])}
        if len(self.history["evaluated"]):
            panels["evaluation"] = (self.history["evaluated"], self.history["evaluation"])
        figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
        shades, best = colormaps["viridis"](torch.linspace(0, 0.9, self.members).tolist()), int(self.losses.argmin())
        for axes, (title, (steps, values)) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            for i in range(self.members):
                drawn = values[:, i].isfinite()
                x, y = steps[drawn].tolist(), values[drawn, i].tolist()
                ending = {RUNNING: "", STOPPED: "|", DIVERGED: "x"}[int(self.status[i])]
                axes.plot(x, y, color=shades[i], linewidth=2.5 if i == best else 1, label=f"member {i}")
                axes.plot(x[-1:], y[-1:], color=shades[i], marker=ending, markersize=10, label="_")
            axes.set(title=title, xlabel="step")
            axes.spines[["top", "right"]].set_visible(False)
        if self.members <= 12:
            handles, names = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=8)
        return figure

    def __repr__(self) -> str:
        counts = ", ".join(f"{self.outcomes.count(name)} {name}" for name in STATUS if name in self.outcomes)
        return f"Result({self.members} members after {self.step} steps: {counts})"


def _last(rows: Tensor) -> Tensor:
    """Returns the last entry of each column that is not NaN, NaN where there is none."""
    if not len(rows):
        return torch.full(rows.shape[1:], torch.nan, dtype=rows.dtype)
    at = torch.where(rows.isnan(), -1, torch.arange(len(rows))[:, None]).amax(0)
    return rows.gather(0, at.clamp(min=0)[None])[0]


_FIELDS = ("adapters", "state", "history", "seeds", "status", "stopping")

register(
    Result,
    lambda r: (tuple(getattr(r, name) for name in _FIELDS), None),
    lambda _, children: Result(*children),
    lambda r: _FIELDS,
)


def _numbers(where: str, index: Sequence[int] | Tensor, count: int) -> Tensor:
    """Checks an index of members, given as numbers or as a mask, and returns the numbers ``(n,)``."""
    found = torch.as_tensor(index)
    mask = found.dtype == torch.bool
    if found.ndim != 1 or found.is_floating_point() or (mask and len(found) != count):
        rule = f"members must be numbers (n,) or a mask ({count},)"
        raise ValueError(errors.say(where, rule, f"{found.dtype} of shape {tuple(found.shape)}"))
    found = found.nonzero()[:, 0] if mask else found.long()
    if not len(found) or found.min() < 0 or found.max() >= count:
        raise ValueError(errors.say(where, f"at least one member is required, of 0 to {count - 1}", found.tolist()))
    return found.cpu()


def pick(tree: Any, index: Tensor) -> Any:
    """Copies entries along the leading axis of every tensor of a tree; what is kept once for all stays so."""

    def one(t: Tensor) -> Tensor:
        if t.shape[0] > 1 and t.stride(0) == 0:
            return t[0].detach().clone().expand(len(index), *t.shape[1:])
        return t.detach().index_select(0, index.to(t.device))

    return tree_map(one, tree)


def require_result(where: str, found: object) -> Result:
    """Returns what was found if it is a ``Result``.

    Raises:
        CheckpointError: If it is something else.
    """
    if not isinstance(found, Result):
        raise errors.CheckpointError(errors.say(where, "a Result of train.population is required", type(found).__name__))
    return found

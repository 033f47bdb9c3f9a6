r"""Poly: Polytropon, a bank of skills of which every task takes a mixture.

.. math:: y = W x + b + \tfrac1r \hat B_t \hat A_t x, \quad
    \hat A_t[q] = \sum_k w_{tqk} A_{qk}, \quad w_{tqk} = \frac{g_{tqk}}{\sum_j g_{tqj} + \epsilon}

A (S, K, in / S, r) and B (S, K, r, out / S): K skills, each cut into S splits along the input and the output (S > 1 is
multi-head routing, S = 1 Polytropon); Z (tasks, S * K): logits of the gates, t: the task of the row, and eps 1e-12.
The gate is g = sigmoid(Z) in evaluation; in training it is a relaxed Bernoulli draw at temperature 1 for every row,
sigmoid(Z + log u - log(1 - u)), with one u in (0, 1) per gate.

The tasks of a call are its value ``task_ids`` (rows,): ``net(..., context=Context(values={"task_ids": ids}))``. A layer whose
input has several entries per row on its first axis (rows repeated for beams, tokens laid end to end) takes the row's task for
each. Tasks differ by row, so no one weight stands for them, and there is no merged form.

References:
    Ponti et al., Combining Modular Skills in Multitask Learning, 2022, arXiv 2202.13914, section 2.
    Caccia et al., Multi-Head Adapter Routing for Cross-Task Generalization, 2022, arXiv 2211.03831, section 3.
    Maddison et al., The Concrete Distribution, 2016, arXiv 1611.00712, appendix B (the relaxed gate).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import Context
from funcpeft.method import Method
from funcpeft.tree import Leaves
from funcpeft.weights import Base

#: What keeps the sum of a row's gates from zero.
EPS = 1e-12


def mixed(weights: Tensor, bank: Tensor) -> Tensor:
    """Mixes the skills ``(S, K, a, b)`` of a bank by ``weights (rows, S, K)``: ``(rows, S, a, b)``."""
    return torch.einsum("nqk,qkab->nqab", weights, bank)


def values_of(t: Tensor) -> tuple[int, int] | None:
    """Returns the smallest and the largest value, ``None`` where a trace or a transform hides them."""
    if torch.compiler.is_compiling() or not t.numel():
        return None
    try:
        return int(t.min()), int(t.max())
    except RuntimeError:  # under vmap a value cannot steer Python
        return None


@dataclass(frozen=True, kw_only=True)
class Poly(Method):
    """Low-rank skills mixed by the task of the row.

    Args:
        r: Rank of every skill.
        init_weights: Whether B starts at 0; else it is drawn as A is, and a fresh adapter acts.
        poly_type: ``"poly"``, the router that reads the task alone.
        n_tasks: Number of tasks.
        n_skills: K.
        n_splits: S; must divide the inputs and the outputs of every target.
    """

    r: int = 8
    init_weights: bool = True
    poly_type: str = "poly"
    n_tasks: int = 1
    n_skills: int = 4
    n_splits: int = 1

    peft_type: ClassVar[str] = "POLY"
    keys: ClassVar[dict[str, str]] = {"A": "poly_lora_A", "B": "poly_lora_B", "Z": "poly_router.module_logits"}
    peft_lacks: ClassVar[tuple[str, ...]] = ("layers_to_transform", "layers_pattern")
    leaf_names: ClassVar[tuple[str, ...]] = ("A", "B", "Z", "scaling", "rank")
    rank_axes: ClassVar[dict[str, int]] = {"A": -1, "B": -2}
    context_names: ClassVar[tuple[str, ...]] = ("task_ids",)
    weight_free: ClassVar[bool] = True
    size: ClassVar[str] = "n_skills * r * (in_ + out) + n_tasks * n_splits * n_skills"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r", "n_tasks", "n_skills", "n_splits")
        self.require(self.poly_type == "poly", "poly_type", "'poly'", self.poly_type)

    @classmethod
    def examples(cls) -> tuple[Poly, ...]:
        """Returns Polytropon, and two heads of routing."""
        return cls(r=2, n_tasks=3, n_skills=2), cls(r=1, n_tasks=2, n_skills=3, n_splits=2)

    def sample_values(self, rows: int) -> dict[str, Tensor]:
        return {"task_ids": torch.arange(rows) % self.n_tasks}

    def check_site(self, base: Base) -> None:
        out, in_ = base.shape[-2:]
        rule, remedy = f"n_splits must divide the {in_} inputs and the {out} outputs", "use another, or leave the site out"
        self.require_at(not in_ % self.n_splits and not out % self.n_splits, base, rule, self.n_splits, remedy)

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        out, in_ = base.shape[-2:]
        a = self._bank(base, (self.r, in_ // self.n_splits), gen)
        b = self._bank(base, (out // self.n_splits, self.r), gen) if not self.init_weights else None
        if b is None:
            b = torch.zeros(self.n_splits, self.n_skills, self.r, out // self.n_splits)
        z = rng.uniform((self.n_tasks, self.n_splits * self.n_skills), gen, 1e-3)
        consts = {"scaling": torch.tensor(1 / self.r, dtype=torch.float64), "rank": torch.tensor(self.r)}
        return {"A": a, "B": b, "Z": z}, consts

    def _bank(self, base: Base, shape: tuple[int, int], gen: Any) -> Tensor:
        """Draws a layer of a shape for every skill and, of it, every split: ``(S, K, *shape transposed)``."""
        if base.device.type == "meta":  # there is nothing to draw
            return torch.empty(self.n_splits, self.n_skills, *reversed(shape))
        drawn = [[rng.kaiming(shape, gen).mT for _ in range(self.n_splits)] for _ in range(self.n_skills)]
        return torch.stack([torch.stack(splits) for splits in drawn], 1).contiguous()

    def gates(self, leaves: Leaves, tasks: Tensor, context: Context) -> Tensor:
        """Computes w, the weights of the skills for every row: ``(rows, S, K)``."""
        z = leaves["Z"][tasks].unflatten(-1, (self.n_splits, self.n_skills))
        if context.training:
            u = context.uniform(z).to(torch.float64) + 2.0**-25  # the middle of its step, never 0
            z = z + (torch.log(u) - torch.log1p(-u)).to(z.dtype)
        g = torch.sigmoid(z)
        return g / (g.sum(-1, keepdim=True) + EPS)

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        tasks = self._tasks(base, x, context)
        w = self.gates(leaves, tasks, context)
        a = mixed(w, leaves["A"]).flatten(1, 2)
        b = mixed(w, leaves["B"]).transpose(1, 2).flatten(2)
        rows = x.to(a.dtype).reshape(tasks.shape[0], -1, x.shape[-1])
        update = leaves["scaling"] * (rows @ a @ b)
        return base(x) + update.reshape(*x.shape[:-1], b.shape[-1])

    def _tasks(self, base: Base, x: Tensor, context: Context) -> Tensor:
        tasks = context.value("task_ids")
        rule = "task_ids must be integers (rows,), one for each row of the input"
        whole = not (tasks.is_floating_point() or tasks.is_complex() or tasks.dtype is torch.bool)
        fits = whole and tasks.ndim == 1 and len(tasks) and x.ndim > 1 and not x.shape[0] % len(tasks)
        self.require_at(bool(fits), base, rule, f"{tasks.dtype} {tuple(tasks.shape)} with input {tuple(x.shape)}")
        found = values_of(tasks) if not base.index else None  # the values of a call are the same at all sites
        if found is not None and not 0 <= found[0] <= found[1] < self.n_tasks:
            raise ValueError(errors.say(f"{self.label} at {base.path!r}", f"task_ids must be in [0, {self.n_tasks})", found))
        return tasks.long()  # bytes would be read as a mask

    def to_peft_config(self, leaves: Mapping[str, Leaves]) -> dict[str, Any]:
        """Takes the rank from the leaves."""
        return {**super().to_peft_config(leaves), "r": next(t["A"].shape[-1] for t in leaves.values() if "A" in t)}

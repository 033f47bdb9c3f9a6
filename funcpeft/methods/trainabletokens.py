r"""Trainable tokens: chosen rows of an embedding are trained, all others stay.

.. math:: E'[t] = D_{k} \text{ for } t = i_k, \quad E'[t] = E[t] \text{ otherwise}

D: replacement rows (k, dim), a copy of E[i] at the start; i: the chosen ids. A tied output head uses the same rows.

References:
    peft's ``TrainableTokensConfig``; no paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import Context
from funcpeft.method import Factor, Method
from funcpeft.tree import Leaves
from funcpeft.weights import Base


@dataclass(frozen=True, kw_only=True)
class TrainableTokens(Method):
    """Trains rows of an embedding.

    Args:
        token_indices: The ids whose rows are trained, each once.
        init_weights: Whether rows start as the base's; else N(0, 1).
    """

    token_indices: tuple[int, ...] | list[int] = (0,)
    init_weights: bool = True

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    kinds: ClassVar[frozenset[str]] = frozenset({"embedding", "linear"})
    keys: ClassVar[dict[str, str]] = {"D": "trainable_tokens_delta"}
    peft_lacks: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    leaf_names: ClassVar[tuple[str, ...]] = ("D", "ids")
    weight_free: ClassVar[bool] = True
    binds_ties: ClassVar[bool] = True
    waived: ClassVar[dict[str, str]] = {"unmerge": "the original rows are not in the adapter; keep the base params"}

    def __post_init__(self) -> None:
        super().__post_init__()
        ids = self.token_indices
        self.require(
            bool(ids) and all(i >= 0 for i in ids),
            "token_indices",
            "non-negative ids, at least one",
            ids,
        )
        self.require(len(set(ids)) == len(ids), "token_indices", "without repetition", ids)

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return (cls(token_indices=(0,)), cls(token_indices=(2, 0)))

    def check_site(self, base: Base) -> None:
        rows = base.shape[-1] if base.takes_ids else base.shape[-2]
        if max(self.token_indices) >= rows:
            raise IndexError(
                errors.say(f"{self.label} at {base.path!r}", f"token_indices must be below {rows}", max(self.token_indices))
            )

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        ids = torch.tensor(self.token_indices, device=base.device)
        if self.init_weights:
            rows = _rows(base)[ids].clone()
        else:
            rows = rng.normal((len(ids), _rows(base).shape[1]), gen)
        return {"D": rows}, {"ids": ids}

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        rows, ids, y = leaves["D"], leaves["ids"], base(x)
        if not base.takes_ids:  # a tied head: the chosen logits are products with the trained rows
            logits = x.to(rows.dtype) @ rows.mT
            logits = logits if base.bias is None else logits + base.bias[ids]
            chosen = _position(torch.arange(y.shape[-1], device=ids.device), ids)
            return torch.where(chosen < 0, y, logits[..., chosen.clamp(min=0)])
        position = _position(x, ids)
        return torch.where((position < 0)[..., None], y, rows[position.clamp(min=0)])

    def factors(self, leaves: Leaves, base: Base, x: Tensor, grad_out: Tensor, context: Context) -> dict[str, Factor]:
        if not base.takes_ids:
            return {"D": (grad_out[..., leaves["ids"]], x)}
        return {"D": ((x[..., None] == leaves["ids"]).to(grad_out.dtype), grad_out)}

    def merge(self, leaves: Leaves, base: Base) -> Base:
        position = _position(torch.arange(_rows(base).shape[0], device=leaves["ids"].device), leaves["ids"])
        rows = torch.where((position < 0)[:, None], _rows(base), leaves["D"][position.clamp(min=0)])
        return base.replace(weight=rows.mT if base.takes_ids else rows)


def _rows(base: Base) -> Tensor:
    """Returns the table with one row per id: an embedding's matrix is (dim, vocab), a head's (vocab, dim)."""
    return base.weight.mT if base.takes_ids else base.weight


def _position(x: Tensor, ids: Tensor) -> Tensor:
    """Returns, for every id in ``x``, its position among ``ids``, or -1."""
    hit = x[..., None] == ids
    return torch.where(hit.any(-1), hit.to(torch.int64).argmax(-1), -1)

r"""SHiRA: sparse high-rank adaptation, few entries of the weight are trained.

.. math:: W'[i_k, j_k] = W[i_k, j_k] + w_k

w (K): trained values, K = r (in + out), as many as LoRA of that rank has; (i_k, j_k): rows and columns, the constant leaf
``indices`` (2, K), int32. Random positions depend on ``random_seed`` and the weight's shape alone, so that layers of one
shape and adapters of all seeds share them, as in peft.

References:
    Bhardwaj et al., Sparse High Rank Adapters, 2024, arXiv 2406.13175.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import Context
from funcpeft.method import Additive
from funcpeft.tree import Adapter, Leaves
from funcpeft.weights import Base

#: The seed of a torch generator that nobody has seeded, which is what peft's is without a ``random_seed``.
TORCH_SEED = 67280421310721


def random_positions(out: int, in_: int, count: int, seed: int) -> Tensor:
    """Draws ``count`` distinct positions of a matrix ``(out, in)``, in row-major order: ``(2, count)`` int32."""
    drawn = torch.randperm(out * in_, generator=rng.stream(seed).generator, device="cpu")[:count].sort().values
    return torch.stack([drawn // in_, drawn % in_]).to(torch.int32)


@dataclass(frozen=True, kw_only=True)
class SHiRA(Additive):
    """Sparse high-rank adaptation.

    ``net.init(params, seed=..., masks={path: mask})`` chooses the entries by boolean masks ``(out, in)`` with
    ``r * (in + out)`` ones each; sites without one draw theirs.

    Args:
        r: Budget: ``r * (in + out)`` entries are trained.
        mask_type: ``"random"``, or any other name for positions that masks or a file give. Until they are given they are
            -1, on which a call fails.
        random_seed: Seed of random positions; ``None`` for torch's default.
        init_weights: ``True`` for w = 0; ``False`` for N(0, 1).
    """

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    init_weights: bool = True

    peft_type: ClassVar[str] = "SHIRA"
    needs: ClassVar[tuple[str, ...]] = ("masks",)
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed"})
    keys: ClassVar[dict[str, str]] = {"w": "shira_weight", "indices": "shira_indices"}
    peft_fixed: ClassVar[dict[str, Any]] = {"fan_in_fan_out": False}
    peft_lacks: ClassVar[tuple[str, ...]] = ("exclude_modules", "layers_to_transform", "layers_pattern")
    size: ClassVar[str] = "r * (in_ + out)"
    leaf_names: ClassVar[tuple[str, ...]] = ("w", "indices")
    weight_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r")

    @classmethod
    def examples(cls) -> tuple[SHiRA, ...]:
        """Returns one with torch's default mask seed and one with a seed of its own."""
        return cls(r=1), cls(r=2, random_seed=3)

    def count(self, base: Base) -> int:
        """Counts the entries that are trained at a site."""
        return self.r * sum(base.shape)

    def check_site(self, base: Base) -> None:
        out, in_ = base.shape
        most = out * in_ // (out + in_)
        fits = self.count(base) <= out * in_
        rule = f"r (in + out) entries must fit in a weight of shape {(out, in_)}, r must be at most {most}"
        self.require_at(fits, base, rule, self.r, "" if most else "leave the site out of target_modules")

    def init(self, sites: Mapping[str, Base], *, seed: int | rng.Stream, **needs: Any) -> Adapter:
        """Makes the leaves; ``masks`` among the needs are boolean ``(out, in)`` by path, and win over ``random_seed``."""
        masks: Mapping[str, Tensor] = needs.pop("masks", {})
        if not isinstance(masks, Mapping):
            raise TypeError(errors.say(self.label, "masks must be a dict from paths to masks", type(masks).__name__))
        for path in masks.keys() - sites.keys():
            raise errors.NameMissingError(
                errors.say(self.label, "masks must be of sites", repr(path), errors.nearest(path, sites))
            )
        made = super().init(sites, seed=seed, **needs)
        given = {path: {"indices": self._positions(sites[path], mask)} for path, mask in masks.items()}
        return made.replace(consts={**made.consts, **given})

    def _positions(self, base: Base, mask: Tensor) -> Tensor:
        self.require_at(mask.shape == base.shape, base, f"a mask must have shape {tuple(base.shape)}", tuple(mask.shape))
        self.require_at(mask.dtype is torch.bool, base, "a mask must be boolean", mask.dtype, "compare it, as in mask > 0")
        positions = mask.nonzero().T.to(torch.int32).contiguous()
        count = self.count(base)
        self.require_at(positions.shape[1] == count, base, f"a mask must have {count} ones", positions.shape[1])
        return positions

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        count = self.count(base)
        if self.mask_type != "random" or base.device.type == "meta":
            indices = torch.full((2, count), -1, dtype=torch.int32)
        else:
            seed = TORCH_SEED if self.random_seed is None else self.random_seed
            indices = random_positions(base.shape[0], base.shape[1], count, seed)
        return {"w": torch.zeros(count) if self.init_weights else rng.randn((count,), gen)}, {"indices": indices}

    def delta(self, leaves: Leaves, base: Base) -> Tensor:
        (out, in_), (rows, cols), w = base.shape, leaves["indices"].long().unbind(0), leaves["w"]
        return w.new_zeros(out * in_).scatter_add(0, rows * in_ + cols, w).view(out, in_)

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        (out, in_), w = base.shape, leaves["w"]
        tokens = x.numel() // in_
        if 4 * tokens * w.shape[-1] > out * in_:  # then one dense product is faster than touching every entry per token
            return super().apply(leaves, base, x, context)
        rows, cols = leaves["indices"].unbind(0)
        update = x.to(w.dtype).index_select(-1, cols) * w
        y = base(x)
        return y.to(torch.promote_types(y.dtype, w.dtype)).index_add(-1, rows, update)

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        """Reads positions as integers, which some files hold as floats; raises ``ValueError`` unless they are distinct ones."""
        leaves = super().from_peft(base, tensors)
        if base is None or "indices" not in leaves:
            return leaves
        indices, (out, in_) = leaves["indices"], base.shape
        for name, places, size in zip(("rows", "columns"), indices.unbind(0), (out, in_), strict=True):
            self.require_places(places, f"{name} of {self.keys['indices']}", size, distinct=False)
        whole = indices.to(torch.int64)
        self.require_places(whole[0] * in_ + whole[1], self.keys["indices"], out * in_)
        return {**leaves, "indices": whole.to(torch.int32)}

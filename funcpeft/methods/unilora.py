r"""UniLoRA: every low-rank factor of a model from one short vector.

.. math:: A_{kj} = \theta_{i(k, j)} / \sqrt{n_{i(k, j)}}, \qquad W' = W + B A

theta (d,): trained, one for all sites; i: the entry of theta that an entry of A (r, in) or B (out, r) takes, assigned at random
so that each is taken nearly equally often; n: how often. The assignment is of all sites in order, from ``proj_seed`` alone.

References:
    Li et al., Uni-LoRA: One Vector is All You Need, 2025, arXiv 2506.00799, eq. (3) and section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from funcpeft import rng
from funcpeft.families import Factored, rounded
from funcpeft.method import Method
from funcpeft.tree import Adapter, Leaves, Tree
from funcpeft.weights import Base


def assignment(count: int, length: int, seed: int) -> Tensor:
    """Draws which of ``length`` entries each of ``count`` places takes, each entry nearly equally often, with numpy's PCG64."""
    import numpy as np

    gen = np.random.default_rng(seed)
    places = np.repeat(np.arange(length), count // length)
    if rest := count % length:
        places = np.concatenate([places, gen.choice(length, size=rest, replace=False)])
    gen.shuffle(places)
    return torch.as_tensor(places, dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class UniLoRA(Factored):
    """Low-rank adaptation by one shared vector.

    Args:
        r: Rank of the updates.
        proj_seed: Determines the assignment.
        theta_d_length: Length d of theta.
        unilora_dropout: Probability with which elements of the adapter's input are dropped in training.
        init_theta_d_bound: Theta starts as U(+-bound), so the start changes the model by the bound's square.
        init_weights: Whether theta starts so; else N(0, 1).
        save_indices: Whether checkpoints hold the assignment; without it, reading draws it again.
        bias: Which biases are trained beside: ``"none"``, ``"all"`` of the model, ``"unilora_only"`` those of the targets.
    """

    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    unilora_dropout: float = 0.0
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False
    bias: str = "none"

    peft_type: ClassVar[str] = "UNILORA"
    keys: ClassVar[dict[str, str]] = {
        "iA": "unilora_indices_A",
        "iB": "unilora_indices_B",
        "sA": "unilora_scales_A",
        "sB": "unilora_scales_B",
    }
    shared_keys: ClassVar[dict[str, str]] = {"theta": "unilora_theta_d"}
    peft_fixed: ClassVar[dict[str, Any]] = {"fan_in_fan_out": False}
    peft_lacks: ClassVar[tuple[str, ...]] = ("exclude_modules",)
    leaf_names: ClassVar[tuple[str, ...]] = ("theta", "iA", "iB", "sA", "sB")
    dropout_field: ClassVar[str] = "unilora_dropout"
    depends_on_sites: ClassVar[bool] = True
    identity_at_init: ClassVar[bool] = False
    bias_only: ClassVar[str] = "unilora_only"
    size: ClassVar[str] = "0"
    size_shared: ClassVar[str] = "theta_d_length"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r", "theta_d_length")
        self.require(self.proj_seed >= 0, "proj_seed", "a non-negative integer", self.proj_seed)
        self.require(self.init_theta_d_bound > 0, "init_theta_d_bound", "positive", self.init_theta_d_bound)
        self.require_probability("unilora_dropout")
        self.require_bias()

    @classmethod
    def examples(cls) -> tuple[Method, ...]:
        return cls(r=2, theta_d_length=7, unilora_dropout=0.25), cls(r=1, theta_d_length=5, save_indices=True)

    def init_shared(self, sites: Mapping[str, Base], seed: int | rng.Stream) -> tuple[Tree, Tree]:
        gen, shape = rng.generator(seed, ""), (self.theta_d_length,)
        theta = rng.uniform(shape, gen, self.init_theta_d_bound) if self.init_weights else rng.randn(shape, gen)
        if isinstance(seed, rng.Stream):
            theta = rounded(theta, next(iter(sites.values())).dtype)
        return {"": {"theta": theta}}, {}

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        return {}, {}

    def init(self, sites: Mapping[str, Base], *, seed: int | rng.Stream, **needs: Any) -> Adapter:
        made = super().init(sites, seed=seed, **needs)
        shapes = {path: ((self.r, b.shape[-1]), (b.shape[-2], self.r)) for path, b in sites.items()}
        if next(iter(sites.values())).device.type == "meta":  # there is nothing to draw
            return made.replace(consts={path: _blank(pair) for path, pair in shapes.items()})
        sizes = [shape[0] * shape[1] for pair in shapes.values() for shape in pair]
        with torch.device("cpu"):
            index = assignment(sum(sizes), self.theta_d_length, self.proj_seed)
            counts = torch.bincount(index, minlength=self.theta_d_length)
            scales = torch.where(counts > 0, counts.clamp(min=1).float().rsqrt(), 0)
        consts, parts = dict(made.consts), iter(index.split(sizes))
        for path, pair in shapes.items():
            (a, b), of_site = (next(parts).view(shape).clone() for shape in pair), rounded(scales, sites[path].dtype)
            consts[path] = {"iA": a, "iB": b, "sA": of_site[a], "sB": of_site[b]}
        return made.replace(consts=consts)

    def pair(self, leaves: Leaves, base: Base) -> tuple[Tensor, Tensor]:
        theta = leaves["theta"]
        return theta[leaves["iA"]] * leaves["sA"], theta[leaves["iB"]] * leaves["sB"]

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        return super().to_peft(base, leaves) if self.save_indices else {}

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        """Raises ``ValueError`` unless indices are those of entries of theta."""
        for key in (self.keys["iA"], self.keys["iB"]):
            if key in tensors:
                self.require_places(tensors[key], key, self.theta_d_length, distinct=False)
        return super().from_peft(base, tensors)


def _blank(pair: tuple[tuple[int, int], tuple[int, int]]) -> Leaves:
    """Returns the frozen leaves of a site without values."""
    a, b = (torch.empty(shape, dtype=torch.int64) for shape in pair)
    return {"iA": a, "iB": b, "sA": torch.empty(a.shape), "sB": torch.empty(b.shape)}

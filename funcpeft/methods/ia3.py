r"""IA3: infused adapter by inhibiting and amplifying inner activations, (IA)^3.

.. math:: y = l \circ (W x + b) \quad \text{or, at feed-forward modules,} \quad y = W (l \circ x) + b

l (out,): one factor per output feature, hence W' = diag(l) W and b' = l b; at feed-forward modules l (channels,): one
factor per input feature, W' = W diag(l), at every position of a kernel and group by group in a grouped convolution.
Unmerging divides by l itself (peft 0.21 divides by l + 1e-8 and is inexact), and refuses an l with a zero.

References:
    Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, 2022,
    arXiv 2205.05638, section 3.3.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import Context
from funcpeft.method import Factor, Method
from funcpeft.tree import Leaves, all_finite
from funcpeft.weights import Base


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """Trained factors of activations.

    Args:
        feedforward_modules: Which targets have their input scaled rather than their output: endings of the path (not only at
            a dot, as in peft), or a regular expression that must match it whole. ``None`` is the architecture's default, and
            no module where the model has no architecture.
        init_ia3_weights: Whether factors start at 1; else N(0, 1).
    """

    feedforward_modules: tuple[str, ...] | list[str] | str | None = None
    init_ia3_weights: bool = True

    peft_type: ClassVar[str] = "IA3"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "transposed", "conv"})
    keys: ClassVar[dict[str, str]] = {"l": "ia3_l"}
    peft_lacks: ClassVar[tuple[str, ...]] = ("layers_to_transform", "layers_pattern")
    size: ClassVar[str] = "out"
    leaf_names: ClassVar[tuple[str, ...]] = ("l",)
    weight_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.feedforward_modules
        if isinstance(names, str):
            self.require(_compiles(names), "feedforward_modules", "a valid regular expression or a list", names)
        elif names and isinstance(self.target_modules, tuple):
            stray = [n for n in names if not self._may_target(n)]
            self.require(not stray, "feedforward_modules", f"among target_modules {list(self.target_modules)}", stray)

    @classmethod
    def examples(cls) -> tuple[IA3, ...]:
        """Returns one that scales outputs, and one that scales inputs at some sites."""
        return cls(), cls(feedforward_modules=".*second")

    def _may_target(self, feedforward: str) -> bool:
        """Whether the targets can contain a module with this ending; a target may be the longer or the shorter name."""
        targets = self.target_modules
        return not isinstance(targets, tuple) or any(t.endswith(feedforward) or feedforward.endswith(t) for t in targets)

    def resolve(self, default: Callable[[str, str], Any]) -> Self:
        """Returns the method with ``feedforward_modules`` filled in.

        Args:
            default: From the names of a table of defaults and of the field it fills to the architecture's entry; ``None`` where
                the model has no architecture.
        """
        if self.feedforward_modules is not None:
            return self
        found = default("IA3_FEEDFORWARD", "feedforward_modules") or ()
        names = found if isinstance(found, str) else tuple(f for f in found if self._may_target(f))
        return dataclasses.replace(self, feedforward_modules=names)

    def scales_input(self, path: str) -> bool:
        """Whether a module is a feed-forward module, whose input is scaled."""
        rule = self.feedforward_modules or ()
        return re.fullmatch(rule, path) is not None if isinstance(rule, str) else path.endswith(tuple(rule))

    def init_site(self, base: Base, gen: Any) -> tuple[Leaves, Leaves]:
        size = base.channels if self.scales_input(base.path) else base.shape[-2]
        drawn = rng.randn((size,), gen)  # drawn even if not used, as peft does
        return {"l": torch.ones_like(drawn) if self.init_ia3_weights else drawn}, {}

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        def scaled(h: Tensor) -> Tensor:
            return h * leaves["l"]

        return base(base.over_in(x, scaled)) if self.scales_input(base.path) else base.over_out(base(x), scaled)

    def factors(self, leaves: Leaves, base: Base, x: Tensor, grad_out: Tensor, context: Context) -> dict[str, Factor]:
        if not self.scales_input(base.path):
            return {"l": base.features_last(grad_out * base(x))}
        back: Any = torch.func.vjp(base, base.over_in(x, lambda h: h * leaves["l"]))[1]
        return {"l": base.features_last(x * back(grad_out.to(base.dtype))[0])}

    def merge(self, leaves: Leaves, base: Base) -> Base:
        return self._scaled(leaves["l"], base)

    def unmerge(self, leaves: Leaves, base: Base) -> Base:
        inverse = 1 / leaves["l"]
        if not all_finite(inverse):
            where = f"{self.label} at {base.path!r}"
            text = errors.say(where, "unmerging divides by l", "an l with a zero", "keep the base params instead")
            raise errors.NoMergedFormError(text)
        return self._scaled(leaves["l"], base, inverse=True)

    def unmerge_gain(self, leaves: Leaves, base: Base) -> Tensor:
        return (1 / leaves["l"].abs()).amax().clamp(min=1)

    def _scaled(self, l: Tensor, base: Base, *, inverse: bool = False) -> Base:  # noqa: E741 # the paper's symbol
        ahead = self.scales_input(base.path)
        spread = base.over_columns(l) if ahead else l[:, None]
        weight = base.weight / spread if inverse else base.weight * spread
        if ahead or base.bias is None:
            return base.replace(weight=weight)
        return base.replace(weight=weight, bias=base.bias / l if inverse else base.bias * l)

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        assert base is not None
        if base.kind.name == "conv":
            shape = (1, -1, *(1 for _ in base.site.shape[2:]))
        else:
            shape = (1, -1) if self.scales_input(base.path) else (-1, 1)
        return super().to_peft(base, {"l": leaves["l"].reshape(shape)})

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        return {"l": super().from_peft(base, tensors)["l"].flatten()}

    def to_peft_config(self, leaves: Mapping[str, Leaves]) -> dict[str, Any]:
        """Writes endings that are no literal targets as a regular expression: peft 0.21 refuses them in a list."""
        config, names, targets = super().to_peft_config(leaves), self.feedforward_modules, self.target_modules
        if isinstance(names, tuple) and not (isinstance(targets, tuple) and set(names) <= set(targets)) and names:
            config["feedforward_modules"] = f".*(?:{'|'.join(map(re.escape, names))})"
        return config


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True

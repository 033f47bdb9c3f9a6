r"""Arrow: every token is routed to the experts whose main direction it points along.

.. math:: y = W x + b + \mathrm{drop}\Big(\sum_{e \in T(x)} c_e \, s_e B_e A_e x\Big), \quad
    c = \mathrm{softmax}_{e \in T(x)} \frac{|p_e \cdot x|}{\tau}

A (E, r, in), B (E, out, r), scaling s (E,): the factors of E LoRA experts, none of them trained; P (E, in): their prototypes,
p_e the right singular vector of B_e A_e with the largest singular value; T(x): the ``top_k`` experts with the largest
:math:`|p_e \cdot x|`; tau: the temperature. A fresh expert, with B_e = 0, has p_e = 0. Experts of smaller rank are padded
with zeros, which changes nothing. Tokens differ in their experts, so there is no merged form.

With ``use_gks`` (GenKnowSub) the means of A and of B over general adapters are subtracted from every expert's before, factor
by factor as in peft; the experts that are given stay as they are.

Experts are adapters of ``LoRA`` at sites of this net: ``net.init(params, seed, experts=[...], general=[...])``. A file is that
of peft's router, an adapter without effect of its own with the config (its A and B are written as zeros), so that it is read
with them: ``load_peft(model, params, path, experts=[...])``. peft 0.21 itself cannot read the router's file. Its prototypes are
15 steps of power iteration from a random start, near the singular vector where the largest singular value stands out.

References:
    Ostapenko et al., Towards Modular LLMs by Building and Reusing a Library of LoRAs, 2024, arXiv 2405.11157 (Arrow routing).
    Bagherifard et al., GenKnowSub: Improving Modularity and Reusability of LLMs through General Knowledge Subtraction, ACL
    2025, short paper 54.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from funcpeft import errors, rng
from funcpeft.context import Context
from funcpeft.fields import thaw
from funcpeft.method import Method
from funcpeft.methods.lora import LoRA
from funcpeft.tree import Adapter, Leaves, Tree
from funcpeft.weights import Base

#: Leaves of a plain LoRA adapter.
_PLAIN = {"A", "B", "scaling", "rank"}

_DEFAULTS: dict[str, Any] = {
    "top_k": 3,
    "router_temperature": 1.0,
    "use_gks": False,
    "rng_seed": None,
    "task_adapter_names": None,
    "gks_adapter_names": None,
}


def listed_experts(where: str, experts: Any, name: str = "experts") -> list[Adapter]:
    """Returns experts as a list; raises ``TypeError`` if they are no sequence of adapters."""
    given = list(experts) if isinstance(experts, Sequence) else [experts]
    for one in given:
        if not isinstance(one, Adapter):
            rule, found = f"{name} must be a list of LoRA adapters, one Adapter each", type(one).__name__
            raise TypeError(errors.say(where, rule, found, f"pass {name}=[...]"))
    return given


def checked_experts(where: str, experts: Any, sites: Mapping[str, Base], name: str = "experts") -> list[Adapter]:
    """Returns experts as a list, after a check that they are adapters at sites of a net.

    Raises:
        TypeError: If they are no sequence of adapters.
        ValueError: If there is none, or one adapts something else.
    """
    given = listed_experts(where, experts, name)
    odd = sorted({p for one in given for p in (*one.params, *one.consts)} - sites.keys())
    if not given or odd:
        rule, remedy = f"{name} must adapt sites of the net", "widen target_modules"
        raise ValueError(errors.say(where, rule, errors.listed(odd) if given else "no adapter", remedy))
    return given


def bank(method: Method, experts: Sequence[Adapter], base: Base) -> Leaves:
    """Stacks the factors of LoRA experts at one site, ranks padded with zeros; one that leaves the site alone gets zeros.

    Returns:
        A ``(E, r, in)``, B ``(E, out, r)``, scaling ``(E,)`` and ranks ``(E,)``.

    Raises:
        ValueError: If an expert is not plain LoRA, or does not fit the site.
    """
    out, in_ = base.shape[-2:]
    found = [one.leaves(base.path) for one in experts]
    ranks = [t["A"].shape[-2] if "A" in t else 0 for t in found]
    r = max(1, *ranks)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for i, (t, rank) in enumerate(zip(found, ranks, strict=True)):
        odd = sorted(t.keys() - _PLAIN)
        remedy = "convert it to plain LoRA, or leave it out"
        method.require_at(not odd, base, f"expert {i} must be a plain LoRA adapter", f"leaves {odd}", remedy)
        if not t:
            parts.append((torch.zeros(r, in_), torch.zeros(out, r), torch.zeros(())))
            continue
        a, b = t["A"].detach(), t["B"].detach()
        rule = f"expert {i} must have A (r, {in_}) and B ({out}, r)"
        fits = tuple(a.shape) == (rank, in_) and tuple(b.shape) == (out, rank)
        method.require_at(fits, base, rule, f"{tuple(a.shape)} and {tuple(b.shape)}")
        parts.append((F.pad(a, (0, 0, 0, r - rank)), F.pad(b, (0, r - rank)), t["scaling"].detach()))
    a, b, s = (torch.stack([t.to(dtype=torch.float64, device="cpu") for t in ts]) for ts in zip(*parts, strict=True))
    return {"A": a, "B": b, "scaling": s, "ranks": torch.tensor(ranks)}


def prototypes(a: Tensor, b: Tensor) -> Tensor:
    """Computes the main right singular vectors ``(E, in)`` of ``B A``, up to sign, without making the products.

    Args:
        a: ``(E, r, in)``.
        b: ``(E, out, r)``.
    """
    q, triangle = torch.linalg.qr(a.mT)
    _, values, right = torch.linalg.svd(b @ triangle.mT, full_matrices=False)
    return (values[..., :1, None] > 0).squeeze(-1) * (q @ right[..., 0, :, None]).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class Arrow(Method):
    """LoRA experts, of which every token takes the nearest.

    Args:
        r: Rank of the experts in a file of the router; what ``net.init`` is given decides it otherwise.
        lora_dropout: Probability with which elements of the experts' output are dropped in training.
        arrow_config: ``top_k`` (3), experts of a token; ``router_temperature`` (1.0), tau; ``use_gks`` (``False``), whether the
            general adapters' means are subtracted; ``rng_seed``, ``task_adapter_names`` and ``gks_adapter_names``, which peft
            keeps there and which change nothing here.
    """

    r: int = 8
    lora_dropout: float = 0.0
    arrow_config: Mapping[str, Any] | None = None

    peft_type: ClassVar[str] = "LORA"
    peft_switch: ClassVar[str] = "arrow_config"
    keys: ClassVar[dict[str, str]] = {}
    peft_fixed: ClassVar[dict[str, Any]] = {
        **LoRA.peft_fixed,
        "lora_alpha": 8,
        "init_lora_weights": True,
    }
    leaf_names: ClassVar[tuple[str, ...]] = ("A", "B", "P", "scaling", "rank")
    rank_axes: ClassVar[dict[str, int]] = {"A": -2, "B": -1}
    weight_free: ClassVar[bool] = True
    identity_at_init: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ("experts", "general")
    file_needs: ClassVar[tuple[str, ...]] = ("experts", "general")
    size: ClassVar[str] = "0"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("r")
        self.require_probability("lora_dropout")
        given = dict(self.arrow_config or {})
        for name in given:
            if name not in _DEFAULTS:
                raise ValueError(errors.one_of(self.label, "a name in arrow_config", name, _DEFAULTS))
        k, tau = self.option("top_k"), self.option("router_temperature")
        self.require(type(k) is int and k > 0, "top_k", "a positive integer", k)
        self.require(tau > 0, "router_temperature", "positive", tau)

    def option(self, name: str) -> Any:
        """Returns a value of ``arrow_config``, its default if it is not there."""
        found = (self.arrow_config or {}).get(name)
        return _DEFAULTS[name] if found is None else found

    @classmethod
    def examples(cls) -> tuple[Arrow, ...]:
        """Returns two of three experts, and GenKnowSub with dropout."""
        return (
            cls(r=2, arrow_config={"top_k": 2}),
            cls(r=2, lora_dropout=0.25, arrow_config={"top_k": 1, "router_temperature": 0.5, "use_gks": True}),
        )

    def sample_needs(self, sites: Mapping[str, Base], seed: int) -> dict[str, Any]:
        plain = LoRA(r=2, lora_alpha=3, init_lora_weights=False)
        made = [plain.init(sites, seed=rng.fold_in(seed, "expert", i)) for i in range(3 + self.option("use_gks"))]
        return {"experts": made[:3], **({"general": made[3:]} if made[3:] else {})}

    def completed(self, needs: Mapping[str, Any]) -> Self:
        if needs.get("experts") is None:
            rule, remedy = "the router's file does not hold the experts", "pass load_peft(..., experts=[...])"
            raise ValueError(errors.say(self.label, rule, None, remedy))
        return self

    def init(self, sites: Mapping[str, Base], *, seed: int | rng.Stream, **needs: Any) -> Adapter:
        """Takes the experts in.

        Args:
            sites: The sites.
            seed: Nothing is drawn.
            needs: ``experts``, a list of LoRA adapters; ``general``, likewise, with ``use_gks``. Where only shapes are asked
                for (``inference_mode``) and there are none, there are no leaves.
        """
        if needs.get("experts") is None and needs.get("inference_mode"):
            return Adapter({}, {}, tuple(sorted(self.rank_axes.items())))
        experts = checked_experts(self.label, needs.get("experts"), sites)
        k, rule = self.option("top_k"), f"at most the number of experts, {len(experts)}"
        self.require(k <= len(experts), "top_k", rule, k, "lower it in arrow_config, or give more experts")
        general: list[Adapter] = []
        if self.option("use_gks"):
            general = checked_experts(self.label, needs.get("general"), sites, "general")
        elif needs.get("general"):
            self.require(False, "use_gks", "set in arrow_config for general adapters to count", False)
        consts: Tree = {path: self._site(base, experts, general) for path, base in sites.items()}
        return Adapter({}, consts, tuple(sorted(self.rank_axes.items())))

    def _site(self, base: Base, experts: Sequence[Adapter], general: Sequence[Adapter]) -> Leaves:
        all_ = bank(self, [*experts, *general], base)
        ranks, n = all_.pop("ranks"), len(experts)
        a, b, s = all_["A"][:n], all_["B"][:n], all_["scaling"][:n]
        if general:
            rule = "with use_gks all adapters must have one rank, as factors are subtracted"
            self.require_at(len(set(ranks.tolist())) == 1, base, rule, ranks.tolist())
            a, b = a - all_["A"][n:].mean(0), b - all_["B"][n:].mean(0)
        return {"A": a, "B": b, "P": prototypes(a, b), "scaling": s, "rank": torch.tensor(a.shape[-2])}

    def weights(self, leaves: Leaves, x: Tensor) -> Tensor:
        """Computes c for every token, 0 for experts that it does not take: ``(..., E)``."""
        near, which = torch.topk(F.linear(x, leaves["P"]).abs(), self.option("top_k"), dim=-1)
        c = torch.softmax(near / self.option("router_temperature"), -1)
        return c.new_zeros(*c.shape[:-1], leaves["P"].shape[-2]).scatter(-1, which, c)

    def apply(self, leaves: Leaves, base: Base, x: Tensor, context: Context) -> Tensor:
        remedy = "make it with net.init(params, seed, experts=[...])"
        self.require_at("P" in leaves, base, "prototypes of experts are required", f"leaves {sorted(leaves)}", remedy)
        a, b = leaves["A"], leaves["B"]
        gain = leaves["scaling"] * self.weights(leaves, x.to(a.dtype))
        hidden = gain[..., None] * base.map(x, a.flatten(0, 1)).unflatten(-1, a.shape[:2])
        update = F.linear(hidden.flatten(-2), b.transpose(0, 1).flatten(1))
        return base(x) + context.dropout(update, self.lora_dropout)

    def to_peft(self, base: Base | None, leaves: Leaves) -> dict[str, Tensor]:
        return {"lora_A.weight": torch.zeros_like(leaves["A"][0]), "lora_B.weight": torch.zeros_like(leaves["B"][0])}

    def from_peft(self, base: Base | None, tensors: Mapping[str, Tensor]) -> Leaves:
        """Returns nothing: the router's own factors have no effect."""
        return {}

    def to_peft_config(self, leaves: Mapping[str, Leaves]) -> dict[str, Any]:
        """Takes rank and number of experts from the leaves."""
        count, r, _ = next(t["A"].shape for t in leaves.values() if "A" in t)
        options = {name: thaw(self.option(name)) for name in _DEFAULTS}
        options["task_adapter_names"] = options["task_adapter_names"] or [f"task_{i}" for i in range(count)]
        options["gks_adapter_names"] = options["gks_adapter_names"] or []
        return {**super().to_peft_config(leaves), "r": r, "arrow_config": options}

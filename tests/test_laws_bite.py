"""The laws bite: methods with one deliberate fault each, and the law that must catch it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from funcpeft.methods import LoRA
from funcpeft.testing import check_law, check_method
from funcpeft.tree import Adapter


@dataclass(frozen=True, kw_only=True)
class Plain(LoRA):
    """The control: LoRA on linear layers, correct."""

    peft_type: ClassVar[str] = ""
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})


@dataclass(frozen=True, kw_only=True)
class ForgotScaling(Plain):
    def delta(self, leaves, base):
        return leaves["B"] @ leaves["A"]


@dataclass(frozen=True, kw_only=True)
class MergedBiasTwice(Plain):
    def merge(self, leaves, base):
        bias = None if base.bias is None else base.bias * 2
        return super().merge(leaves, base).replace(bias=bias)


@dataclass(frozen=True, kw_only=True)
class TransposedUpdate(Plain):
    def delta(self, leaves, base):
        right = super().delta(leaves, base)
        return right.mT.reshape(right.shape)


@dataclass(frozen=True, kw_only=True)
class SharedSeed(Plain):
    def init(self, sites, *, seed, **needs):
        draws = {p: self.init_site(b, torch.Generator().manual_seed(seed)) for p, b in sites.items()}
        return Adapter({p: d[0] for p, d in draws.items()}, {p: d[1] for p, d in draws.items()}, (("A", -2), ("B", -1)))


@dataclass(frozen=True, kw_only=True)
class SeedOfOtherSites(Plain):
    def init(self, sites, *, seed, **needs):
        return super().init(sites, seed=seed + len(sites), **needs)


@dataclass(frozen=True, kw_only=True)
class MutatesArgument(Plain):
    def apply(self, leaves, base, x, context):
        y = super().apply(leaves, base, x, context)
        x.add_(0.0).mul_(1.5)
        return y


@dataclass(frozen=True, kw_only=True)
class MutatesLeaf(Plain):
    def merge(self, leaves, base):
        leaves["A"].mul_(1.0).add_(1.0)
        return super().merge(leaves, base)


@dataclass(frozen=True, kw_only=True)
class AliasesBase(Plain):
    def init_site(self, base, gen):
        params, consts = super().init_site(base, gen)
        return params, {**consts, "kept": base.weight}


@dataclass(frozen=True, kw_only=True)
class AppliesTwiceTheUpdate(Plain):
    def product(self, leaves, base, x):
        return 2 * super().product(leaves, base, x)


@dataclass(frozen=True, kw_only=True)
class NotIdentity(Plain):
    def _draw(self, base, r, s, gen):
        return {n: t + 0.1 for n, t in super()._draw(base, r, s, gen).items()}


@dataclass(frozen=True, kw_only=True)
class WrongUnmerge(Plain):
    def unmerge(self, leaves, base):
        return base.replace(weight=base.weight - 1.001 * self.delta(leaves, base))


@dataclass(frozen=True, kw_only=True)
class DetachedLeaf(Plain):
    def product(self, leaves, base, x):
        return super().product({**leaves, "A": leaves["A"].detach()}, base, x)


@dataclass(frozen=True, kw_only=True)
class DetachedInput(Plain):
    def apply(self, leaves, base, x, context):
        return base(x) + self.product(leaves, base, x.detach())


@dataclass(frozen=True, kw_only=True)
class ReadsTheBase(Plain):
    def apply(self, leaves, base, x, context):
        return F.linear(x, base.weight + self.delta(leaves, base), base.bias)


@dataclass(frozen=True, kw_only=True)
class StatefulDropout(Plain):
    def apply(self, leaves, base, x, context):
        return super().apply(leaves, base, F.dropout(x, 0.5) if context.training else x, context)


@dataclass(frozen=True, kw_only=True)
class DataDependent(Plain):
    def apply(self, leaves, base, x, context):
        y = super().apply(leaves, base, x, context)
        return y if float(leaves["A"].sum()) > 1e9 else y * 1.0


@dataclass(frozen=True, kw_only=True)
class WidensOutput(Plain):
    def init_site(self, base, gen):
        params, consts = super().init_site(base, gen)
        size = 3 if int(torch.randint(0, 2, (), generator=gen)) else 4
        return {**params, "spare": torch.ones(size)}, consts


@dataclass(frozen=True, kw_only=True)
class ClaimsToAdd(Plain):
    def delta(self, leaves, base):
        return super().delta(leaves, base) * (1 + base.weight.abs().sum())

    def apply(self, leaves, base, x, context):
        return self.merge(leaves, base).meet(x)


@dataclass(frozen=True, kw_only=True)
class FirstMembersLeaf(Plain):
    def apply_rows(self, groups, base, x, layout):
        same = [({**leaves, "A": leaves["A"][:1].expand_as(leaves["A"])}, context) for leaves, context in groups]
        return super().apply_rows(same, base, x, layout)


@dataclass(frozen=True, kw_only=True)
class BatchedOtherwise(Plain):
    apply_rows = LoRA.apply_rows

    def product(self, leaves, base, x):
        return super().product(leaves, base, x) * 2


@dataclass(frozen=True, kw_only=True)
class Doubled(Plain):
    """Correct: what changes the formula does not inherit the batched form of the old one."""

    def delta(self, leaves, base):
        return super().delta(leaves, base) * 2

    def product(self, leaves, base, x):
        return super().product(leaves, base, x) * 2


CAUGHT = [
    (FirstMembersLeaf, "many"),
    (BatchedOtherwise, "many"),
    (ForgotScaling, "merge"),
    (MergedBiasTwice, "merge"),
    (TransposedUpdate, "merge"),
    (AppliesTwiceTheUpdate, "merge"),
    (SharedSeed, "seed"),
    (SeedOfOtherSites, "seed"),
    (MutatesArgument, "purity"),
    (MutatesLeaf, "purity"),
    (AliasesBase, "purity"),
    (NotIdentity, "identity"),
    (WrongUnmerge, "unmerge"),
    (DetachedLeaf, "derivative"),
    (DetachedInput, "derivative"),
    (ReadsTheBase, "lean"),
    (StatefulDropout, "replay"),
    (DataDependent, "compiled"),
    (WidensOutput, "kind"),
    (ClaimsToAdd, "add"),
]


@pytest.mark.parametrize(("faulty", "law"), CAUGHT, ids=lambda v: getattr(v, "__name__", v))
def test_the_law_catches_the_fault(faulty, law):
    with pytest.raises(Exception) as caught:  # noqa: PT011 # torch's own error counts for compiled and replay
        check_law(faulty(r=2, lora_alpha=6), law)
    assert law in ("compiled", "replay") or isinstance(caught.value, AssertionError)


def test_a_changed_formula_is_batched_as_it_is():
    check_law(Doubled(r=2, lora_alpha=6), "many")
    check_law(Doubled(r=2, lora_alpha=6), "merge")


def test_the_control_satisfies_every_law():
    report = check_method(Plain(r=2, lora_alpha=6), max_examples=8)
    assert set(report.values()) == {"holds"}


def test_an_unknown_law_names_the_nearest():
    with pytest.raises(KeyError, match="did you mean 'merge'"):
        check_law(Plain(), "merg")

"""The laws of formats bite: formats with one deliberate fault each, and the law that must catch it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from funcpeft.quant import NF4, AffineInt, Int8
from funcpeft.testing import FORMAT_LAWS, check_format, check_format_law


class Held(NF4):
    """The control: NF4 under another name, correct."""


@dataclass(frozen=True, kw_only=True)
class StepTooSmall(Int8):
    def step(self, quantized):
        return super().step(quantized) * 0.9


@dataclass(frozen=True, kw_only=True)
class NegativeStep(Int8):
    def step(self, quantized):
        return -super().step(quantized)


@dataclass(frozen=True, kw_only=True)
class RefitsInsteadOfKeeping(AffineInt):
    bits: int = 2

    def encode_like(self, weight, like):
        return self.encode(weight)


@dataclass(frozen=True, kw_only=True)
class ClaimsToRefit(AffineInt):
    symmetric: bool = False
    refits_exactly = True


@dataclass(frozen=True, kw_only=True)
class Aliases(Int8):
    def misfit(self, shape):
        return None if len(shape) == 2 else "a matrix is required"

    def encode(self, weight):
        return {"qdata": weight, "scale": weight.abs().amax(1)}

    def decode(self, quantized):
        return quantized.data["qdata"]


@dataclass(frozen=True, kw_only=True)
class WrongDtype(Int8):
    def dequant(self, quantized):
        return super().dequant(quantized).float()


@dataclass(frozen=True, kw_only=True)
class ChangesItsCodes(Int8):
    def decode(self, quantized):
        out = super().decode(quantized)
        quantized.data["scale"].mul_(1.5)
        return out


@dataclass(frozen=True, kw_only=True)
class LooksAtValues(Int8):
    def decode(self, quantized):
        return super().decode(quantized) * (1.0 if float(quantized.data["scale"].sum()) >= 0 else -1.0)


@dataclass(frozen=True, kw_only=True)
class DecodesByPosition(Int8):
    """Right alone, wrong where the codes are stacked, since it counts on their strides."""

    def decode(self, quantized):
        return super().decode(quantized) * (1 if quantized.data["qdata"].is_contiguous() else 2)


@dataclass(frozen=True, kw_only=True)
class Unhashed(Int8):
    sizes: tuple[float, ...] = (1.0,)

    def to_dict(self):
        return {**super().to_dict(), "sizes": (2.0,)}


FAULTS = [
    (StepTooSmall(), "cell"),
    (NegativeStep(), "cell"),
    (RefitsInsteadOfKeeping(), "grid"),
    (ClaimsToRefit(), "refit"),
    (Aliases(), "kind"),
    (WrongDtype(), "kind"),
    (ChangesItsCodes(), "kind"),
    (Unhashed(), "node"),
]


@pytest.mark.parametrize(("fmt", "law"), FAULTS, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_a_fault_is_caught_by_its_law(fmt, law):
    with pytest.raises(AssertionError, match=f"{law}: "):
        check_format_law(fmt, law, max_examples=40)


def test_what_looks_at_values_does_not_map():
    with pytest.raises(RuntimeError, match="vmap"):
        check_format_law(LooksAtValues(), "vmap", max_examples=4)


def test_the_control_passes_every_law():
    check_format(Held(block_size=32), max_examples=6)


def test_laws_are_named():
    with pytest.raises(KeyError, match="check_format_law: law must exist, got 'cel'; did you mean 'cell'"):
        check_format_law(NF4(), "cel")
    assert all(f.__doc__ for f in FORMAT_LAWS.values())


def test_a_format_that_fits_no_shape_says_so():
    class Odd(Int8):
        def misfit(self, shape):
            return "no shape will do"

    with pytest.raises(ValueError, match=r"weights: .*Odd\(\) fits none of the shapes"):
        check_format_law(Odd(), "cell")


def test_a_product_that_forgets_its_weight_is_caught(monkeypatch):
    from funcpeft import storage

    right = storage._plain

    def doubled(x, bias, tensors, static, kind, adjoint):
        return right(x, bias, tensors, static, kind, adjoint) * (1 + adjoint)

    monkeypatch.setattr(storage, "_plain", doubled)
    with pytest.raises(AssertionError, match="product: grad differs"):
        check_format_law(Int8(), "product", max_examples=8)


def test_a_law_at_other_sizes_of_values():
    q = Int8().requant(torch.full((2, 2), 1e30))
    assert torch.equal(Int8().dequant(replace(q, dtype=torch.float32)), torch.full((2, 2), 1e30))

"""Merging: what the report says against an independent computation, precision, purity, undoing."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from funcpeft.adapt import adapt
from funcpeft.errors import NoMergedFormError
from funcpeft.functional import functionalize
from funcpeft.merging import MergeReport
from funcpeft.methods import IA3, OFT, DoRA, Full, LoHa, LoRA, PrefixTuning
from funcpeft.stacking import stack
from funcpeft.tree import tree_map

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(12, 16), nn.LayerNorm(16), nn.Linear(16, 6, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.norm(self.up(x))))


def functional(dtype=torch.float64, module=None):
    torch.manual_seed(2)
    return functionalize((module or Mlp()).to(dtype))


def moved(adapter, by=0.3, seed=7):
    gen = torch.Generator().manual_seed(seed)

    def move(t):
        return t + by * torch.randn(t.shape, generator=gen, dtype=torch.float64).to(t.dtype)

    return adapter.replace(params=tree_map(move, adapter.params))


def method_at(method, paths=("up", "down")):
    return dataclasses.replace(method, target_modules=paths)


def exact(net, model, params, adapter):
    """Merges in float64 from the same stored numbers: what rounding is measured against."""
    wide = {k: t.double() for k, t in params.items()}
    return net.merge(wide, tree_map(lambda t: t.double() if t.is_floating_point() else t, adapter))[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_merged_weight_is_the_exact_one_rounded_once(dtype):
    model, params = functional(dtype)
    net = adapt(model, LoRA(r=2, target_modules=["up", "down"]))
    adapter = moved(net.init(params, 0))
    merged, _ = net.merge(params, adapter)
    for path in ("up", "down"):
        leaves = adapter.leaves(path)
        update = leaves["scaling"].double() * leaves["B"].double() @ leaves["A"].double()
        assert torch.equal(merged[f"{path}.weight"], (params[f"{path}.weight"].double() + update).to(dtype))


@pytest.mark.parametrize("asked", DTYPES, ids=str)
def test_a_dtype_may_be_named(asked):
    model, params = functional(torch.bfloat16)
    net = adapt(model, IA3(target_modules=["up"]))
    adapter = moved(net.init(params, 0))
    merged, report = net.merge(params, adapter, dtype=asked)
    factor = adapter.params["up"]["l"].double()
    assert torch.equal(merged["up.weight"], (factor[:, None] * params["up.weight"].double()).to(asked))
    assert torch.equal(merged["up.bias"], (factor * params["up.bias"].double()).to(asked))
    assert merged["norm.weight"].dtype == asked
    assert float(report.sites["up"]["error"]) <= torch.finfo(asked).eps


def test_what_is_not_adapted_is_shared_and_the_base_stays_as_it_was():
    model, params = functional(torch.bfloat16)
    kept = {k: t.clone() for k, t in params.items()}
    net = adapt(model, LoRA(r=2, target_modules=["up"]))
    merged, _ = net.merge(params, moved(net.init(params, 0)))
    assert all(torch.equal(params[k], t) for k, t in kept.items())
    assert merged["down.weight"] is params["down.weight"]
    assert merged["up.weight"].data_ptr() != params["up.weight"].data_ptr()
    assert merged.keys() == params.keys()


# -- the report --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by", [0.3, 1e-2])
@pytest.mark.parametrize("method", [LoRA(r=2), DoRA(r=2), IA3(), LoHa(r=2)], ids=lambda m: type(m).__name__)
def test_the_columns_are_what_they_say(method, by, dtype):
    model, params = functional(dtype)
    net = adapt(model, method_at(method))
    adapter = moved(net.init(params, 0), by)
    merged, report = net.merge(params, adapter)
    precise = exact(net, model, params, adapter)
    for path, row in report.sites.items():
        w, want, got = (t[f"{path}.weight"].double() for t in (params, precise, merged))
        update, error = want - w, (got - want).abs()
        norm = math.sqrt(float((w * w).sum()))
        assert float(row["update"]) == pytest.approx(math.sqrt(float((update * update).sum())) / norm, rel=1e-9)
        assert float(row["error"]) == pytest.approx(float(error.max()), rel=1e-6, abs=1e-15)
        assert float(row["bound"]) == pytest.approx(float(error.sum(1).max()), rel=1e-6, abs=1e-13)
        assert float(row["realised"]) == pytest.approx(float(((got - w) * update).sum() / (update * update).sum()), rel=1e-9)
        changed = update != 0
        assert float(row["swallowed"]) == pytest.approx(float(((got == w) & changed).sum() / changed.sum()), abs=1e-12)


def test_a_tiny_update_is_swallowed_in_half_precision_and_the_report_says_so():
    model, params = functional(torch.bfloat16)
    net = adapt(model, LoRA(r=2, target_modules=["up"]))
    adapter = moved(net.init(params, 0))
    tiny = adapter.replace(params={"up": {**adapter.params["up"], "B": adapter.params["up"]["B"] * 1e-6}})
    merged, report = net.merge(params, tiny)
    assert torch.equal(merged["up.weight"], params["up.weight"])
    assert float(report.sites["up"]["swallowed"]) == 1
    assert float(report.sites["up"]["realised"]) == 0
    assert report.worst("realised") == ("up", 0.0)
    kept, full = net.merge(params, tiny, dtype=torch.float32)
    assert float(full.sites["up"]["realised"]) == pytest.approx(1, abs=1e-3)
    assert not torch.equal(kept["up.weight"], params["up.weight"].float())


def test_a_fresh_adapter_merges_to_the_base_itself():
    model, params = functional(torch.bfloat16)
    net = adapt(model, LoRA(r=2, target_modules=["up"]))
    merged, report = net.merge(params, net.init(params, 0))
    row = {k: float(v) for k, v in report.sites["up"].items()}
    assert torch.equal(merged["up.weight"], params["up.weight"])
    assert row == {"update": 0, "error": 0, "bound": 0, "realised": 1, "swallowed": 0}


LAYERS = {
    "linear": (lambda: nn.Linear(12, 7, bias=False), (9, 12)),
    "conv": (lambda: nn.Conv2d(3, 5, 3, padding=1, bias=False), (2, 3, 6, 6)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_bound_bounds_apply_minus_merge(kind, dtype):
    make, shape = LAYERS[kind]
    torch.manual_seed(1)
    layer = nn.ModuleDict({"site": make().to(dtype)})
    model, params = functionalize(layer)
    net = adapt(model, LoRA(r=2, target_modules=["site"]))
    adapter = moved(net.init(params, 0))
    merged, report = net.merge(params, adapter)
    precise = exact(net, model, params, adapter)
    bound, largest = float(report.sites["site"]["bound"]), 0.0
    product = model.site("site.weight").kind.product
    for seed in range(40):
        x = 10 ** (seed % 5 - 2) * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x = x.sign() * x.abs().max() if seed % 2 else x
        apart = (product(x, merged["site.weight"].double(), None) - product(x, precise["site.weight"], None)).abs().max()
        assert float(apart) <= bound * float(x.abs().max()) * (1 + 1e-9)
        largest = max(largest, float(apart / x.abs().max()))
    worst_row = (merged["site.weight"].double() - precise["site.weight"]).flatten(1)
    x = worst_row[worst_row.abs().sum(1).argmax()].sign()
    assert float((worst_row @ x).abs().max()) == pytest.approx(bound, rel=1e-6)
    assert 0 < largest <= bound


def test_a_report_prints_as_a_table_with_its_columns_explained():
    model, params = functional()
    net = adapt(model, LoRA(r=2, target_modules=["up", "down"]))
    _, report = net.merge(params, moved(net.init(params, 0)))
    text = str(report)
    for word in ("site", "up", "down", "update", "error", "bound", "realised", "swallowed", "largest row sum"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 130
    with pytest.raises(
        KeyError,
        match=r"column must be one of 'update', .* 'swallowed', 'rel_error', 'changed_codes', 'clipped', got 'size'",
    ):
        report.worst("size")


def test_a_merge_under_vmap_gives_a_row_per_member():
    model, params = functional(torch.float32)
    net = adapt(model, LoRA(r=2, target_modules=["up", "down"]))
    members = [moved(net.init(params, s), seed=s) for s in range(3)]
    merged, report = torch.func.vmap(lambda a: net.merge(params, a), out_dims=(0, 0))(stack(members))
    assert isinstance(report, MergeReport)
    for i, one in enumerate(members):
        want, row = net.merge(params, one)
        for path in ("up", "down"):
            torch.testing.assert_close(merged[f"{path}.weight"][i], want[f"{path}.weight"])
            for column, value in row.sites[path].items():
                torch.testing.assert_close(report.sites[path][column][i], value, rtol=1e-3, atol=1e-9)
    assert " to " in str(report)


# -- undoing -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", [LoRA(r=2), IA3(), OFT(oft_block_size=2), LoHa(r=2)], ids=lambda m: type(m).__name__)
def test_unmerge_restores_the_base_within_its_bound(method, dtype):
    model, params = functional(dtype)
    net = adapt(model, method_at(method))
    adapter = moved(net.init(params, 0), 0.1)
    merged, _ = net.merge(params, adapter)
    back = net.unmerge(merged, adapter)
    for path, base in net.bases(net.entries[0], params).items():
        gain = float(method_at(method).unmerge_gain(adapter.leaves(path), base))
        w = params[f"{path}.weight"]
        size = float(max(w.abs().max(), merged[f"{path}.weight"].abs().max()))
        # the merged entry is off by half an ulp, which the inverse spreads over a row, and is rounded again
        bound = (1 + gain) * torch.finfo(dtype).eps * size * (w.shape[1] + 4)
        assert float((back[f"{path}.weight"] - w).abs().max()) <= bound
    assert back["up.bias"].dtype == dtype
    torch.testing.assert_close(back["up.bias"], params["up.bias"], rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)


def test_unmerge_is_refused_where_nothing_inverts():
    model, params = functional()
    net = adapt(model, LoRA(r=2, target_modules=["up"], modules_to_save=["norm"]))
    adapter = net.init(params, 0)
    with pytest.raises(NoMergedFormError, match=r"full at 'norm.*': merging does not invert.*; keep the base params instead"):
        net.unmerge(net.merge(params, adapter)[0], adapter)


def test_a_method_of_the_call_has_no_merged_form():
    import zoo

    model, params = functionalize(zoo.model("llama"))
    net = adapt(model, PrefixTuning(num_virtual_tokens=2))
    with pytest.raises(NoMergedFormError, match="prefixtuning: the method acts on the call and has no merged form"):
        net.merge(params, net.init(params, 0))


def test_a_merge_that_overflows_is_refused_by_site():
    model, params = functional()
    net = adapt(model, LoRA(r=2, target_modules=["up"]))
    adapter = moved(net.init(params, 0))
    large = adapter.replace(params=tree_map(lambda t: t * 1e200, adapter.params))
    with pytest.raises(ValueError, match="merge at 'up': the merged weight must be finite, got NaN or infinity"):
        net.merge(params, large)


def test_a_bias_that_is_both_replaced_and_scaled_is_merged_once_and_in_order():
    module = nn.Sequential(nn.Linear(4, 3)).double()
    model, params = functionalize(module)
    bias = Full(target_modules=(), target_parameters=("0.bias",))
    net = adapt(model, [bias, IA3(target_modules=["0"], feedforward_modules=())])
    replaced, scaled = net.init(params, seed=0)
    replaced = replaced.replace(params={"0.bias": {"value": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)}})
    scaled = scaled.replace(params={"0": {"l": torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)}})
    x = torch.randn(5, 4, dtype=torch.float64)
    merged, _ = net.merge(params, (replaced, scaled))
    torch.testing.assert_close(merged["0.bias"], torch.tensor([2.0, 6.0, 12.0], dtype=torch.float64))
    torch.testing.assert_close(model(merged, x), net(params, (replaced, scaled), x))

"""BOFT, HRA, HiRA, PSOFT, DEFT, DeLoRA and OFT: formulas spelled out, gradients, draws in training, and refusals."""

import dataclasses
import re

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from funcpeft.adapt import adapt
from funcpeft.context import Context
from funcpeft.functional import functionalize
from funcpeft.methods import BOFT, DEFT, HRA, OFT, PSOFT, DeLoRA, HiRA
from funcpeft.methods import hira as hiras
from funcpeft.methods.boft import butterfly
from funcpeft.tree import tree_map


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.site = layer

    def forward(self, x):
        return self.site(x)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(adapter, seed=7):
    gen = torch.Generator().manual_seed(seed)
    return adapter.replace(
        params=tree_map(lambda t: t + 0.3 * torch.randn(t.shape, generator=gen, dtype=t.dtype), adapter.params)
    )


def linear():
    return nn.Linear(8, 6)


def made(method, layer=linear):
    """Returns the net of a layer named ``site``, its params, and an adapter away from init."""
    torch.manual_seed(4)
    model, params = functionalize(One(layer()).double())
    net = adapt(model, dataclasses.replace(method, target_modules=["site"]))
    return net, params, moved(net.init(params, 0))


def merged(net, params, adapter):
    return net.merge(params, adapter)[0]["site.weight"]


def doubles(adapter):
    return {n: t.double() for n, t in adapter.leaves("site").items()}


def training(seed):
    return Context(training=True, seed=seed)


# -- BOFT --------------------------------------------------------------------------------------------------------------------


def test_a_butterfly_joins_features_that_are_further_apart_from_factor_to_factor():
    order = [butterfly(torch.arange(16), 2, f).view(-1, 2) for f in range(4)]
    assert all((pairs[:, 1] - pairs[:, 0] == 2**f).all() for f, pairs in enumerate(order))
    for f in range(4):
        assert torch.equal(butterfly(butterfly(torch.arange(16), 2, f), 2, f, back=True), torch.arange(16))
    assert torch.equal(butterfly(torch.arange(9), 3, 0), torch.arange(9))  # one factor takes blocks of odd size


def test_all_factors_make_every_output_depend_on_every_input():
    net, params, adapter = made(BOFT(boft_block_size=2, boft_n_butterfly_factor=3), lambda: nn.Linear(8, 8))
    turned = torch.linalg.solve(params["site.weight"], merged(net, params, adapter) / doubles(adapter)["s"][:, None])
    torch.testing.assert_close(turned @ turned.T, torch.eye(8, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert (turned.abs() > 1e-6).all()


@pytest.mark.parametrize("factors", [1, 3])
def test_boft_drops_a_fixed_number_of_blocks_of_one_factor(factors):
    method = BOFT(boft_block_size=2, boft_n_butterfly_factor=factors, boft_dropout=0.3)
    net, params, adapter = made(method, lambda: nn.Linear(16, 4))
    base = net.bases(net.entries[0], params)["site"]
    seen = set()
    for seed in range(20):
        q = method.rotations(adapter.leaves("site"), training(seed).at(base.site.salt, 0))
        kept = (q != torch.eye(2)).any(-1).any(-1)
        dropped = (~kept).sum(-1)
        assert sorted(dropped.tolist()) == [0] * (factors - 1) + [2]  # int(0.3 * 8)
        seen.add((int(dropped.argmax()), *(~kept)[dropped.argmax()].nonzero().flatten().tolist()))
    assert len(seen) > 10
    assert {first for first, *_ in seen} == set(range(factors))
    x = randn(3, 16)
    assert not torch.equal(net(params, adapter, x, context=training(0)), net(params, adapter, x, context=training(1)))


# -- HRA ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [1, 4, 20])
def test_one_product_is_the_chain_of_reflections(r):
    net, params, adapter = made(HRA(r=r))
    u, w = doubles(adapter)["U"], params["site.weight"]
    for column in u.T:
        w = w - 2 * torch.outer(w @ column, column) / column.dot(column)
    torch.testing.assert_close(merged(net, params, adapter), w)
    torch.testing.assert_close(net(params, adapter, randn(3, 8)), F.linear(randn(3, 8), w, params["site.bias"]))


def test_reflections_of_an_odd_number_are_not_neutral():
    net, params, _ = made(HRA(r=3))
    fresh, x = net.init(params, 0), randn(3, 8)
    assert not torch.allclose(net(params, fresh, x), net.model(params, x))
    again = merged(net, {**params, "site.weight": merged(net, params, fresh)}, fresh)
    assert not torch.allclose(again, params["site.weight"])


@pytest.mark.parametrize("apply_GS", [False, True])
def test_gradients_of_reflections_are_pefts(apply_GS):
    torch.manual_seed(4)
    wrapped = peft.get_peft_model(
        One(nn.Linear(8, 6)).double(), peft.HRAConfig(r=4, init_weights=False, apply_GS=apply_GS, target_modules=["site"])
    )
    x = randn(3, 8)
    net, params, adapter = made(HRA(r=4, init_weights=False, apply_GS=apply_GS))
    u = wrapped.base_model.model.site.hra_u["default"]
    u.data.copy_(adapter.params["site"]["U"])
    wrapped(x).square().sum().backward()
    got = torch.func.grad(lambda p: net(params, adapter.replace(params=p), x).square().sum())(adapter.params)
    torch.testing.assert_close(got["site"]["U"].double(), u.grad, rtol=1e-5, atol=1e-5)


# -- HiRA --------------------------------------------------------------------------------------------------------------------


def test_hira_computes_the_same_by_calls_and_by_the_product(monkeypatch):
    net, params, adapter = made(HiRA(r=3))
    x = randn(2, 5, 8)

    def run(p):
        return net(params, adapter.replace(params=p), x)

    found = []
    for few in (0, 10**9):
        monkeypatch.setattr(hiras, "_FEW", few)
        found.append((run(adapter.params), torch.func.grad(lambda p: run(p).square().sum())(adapter.params)["site"]))
    for a, b in zip(*(([out, *grads.values()]) for out, grads in found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_relative_change_has_full_rank():
    net, params, adapter = made(HiRA(r=2))
    change = merged(net, params, adapter) - params["site.weight"]
    assert torch.linalg.matrix_rank(change) == 6
    assert torch.linalg.matrix_rank(change / params["site.weight"], rtol=1e-5) == 2


# -- PSOFT -------------------------------------------------------------------------------------------------------------------


def test_psoft_rotates_the_principal_components_alone():
    net, params, adapter = made(PSOFT(r=3, psoft_mag_a=False, psoft_mag_b=False))
    w, new = params["site.weight"], merged(net, params, adapter)
    s = torch.linalg.svd(w)[1]
    assert torch.linalg.matrix_rank(new - w, rtol=1e-5) <= 3
    u, vh = torch.linalg.svd(w)[0], torch.linalg.svd(w)[2]
    torch.testing.assert_close(u[:, 3:].T @ (new - w), torch.zeros(3, 8).double(), rtol=0, atol=1e-5)
    core = (u[:, :3] / s[:3]).T @ new @ vh[:3].T
    torch.testing.assert_close(core @ core.T, torch.eye(3).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", ["psoft_init", "pissa_init"])
def test_psofts_alpha_divides_out(start):
    outs = []
    for alpha in (1, 12):
        net, params, adapter = made(PSOFT(r=3, psoft_alpha=alpha, ab_svd_init=start))
        outs.append(net(params, adapter, randn(3, 8)))
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


def test_the_series_is_scaled_into_its_radius():
    method = PSOFT(r=3, use_cayley_neumann=True, num_cayley_neumann_terms=12, cayley_neumann_eps=0.1, psoft_mag_a=False)
    leaves = {"Q": 5 * randn(3), "A": randn(3, 8)}
    small = {**leaves, "Q": leaves["Q"] * 0.1 / (2 * leaves["Q"].square().sum()).sqrt()}
    torch.testing.assert_close(method.rotation(leaves), method.rotation(small))
    assert torch.func.grad(lambda q: method.rotation({**leaves, "Q": q}).sum())(torch.zeros(3).double()).isfinite().all()


# -- DEFT and DeLoRA ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["relu", "qr"])
def test_para_removes_a_subspace_of_outputs(how):
    net, params, adapter = made(DEFT(r=2, para=True, decomposition_method=how))
    assert adapter.params["site"].keys() == {"P"}
    p, w, x = doubles(adapter)["P"], params["site.weight"], randn(3, 8)
    q, t = (p, p.relu()) if how == "relu" else (torch.linalg.qr(p)[0],) * 2
    torch.testing.assert_close(merged(net, params, adapter), w - q @ t.T @ w, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(net(params, net.init(params, 0), x), net.model(params, x))
    if how == "qr":
        assert torch.linalg.matrix_rank(merged(net, params, adapter), rtol=1e-5) == 4


def test_deft_drops_elements_of_the_injection_alone():
    net, params, adapter = made(DEFT(r=2, deft_dropout=0.9))
    p, r = doubles(adapter)["P"], doubles(adapter)["R"]
    x = randn(40, 8)
    got = net(params, adapter, x, context=training(3)) - net(params, adapter, x)
    torch.testing.assert_close(got @ torch.linalg.pinv(p.T) @ p.T, got, rtol=1e-5, atol=1e-5)
    low = got @ torch.linalg.pinv(p.T)  # what dropping changed of x R^T
    bare = F.linear(x, params["site.weight"], params["site.bias"]) - params["site.bias"]
    zeroed = net(params, adapter, x) + low @ p.T
    assert not torch.allclose(low, -(x @ r.T))  # some element is kept somewhere
    silent = (low + x @ r.T).abs().sum(-1) < 1e-5  # rows of which every element was dropped
    assert silent.any()
    want = (bare - bare @ p.relu() @ p.T + params["site.bias"])[silent]
    torch.testing.assert_close(zeroed[silent], want, rtol=1e-5, atol=1e-5)


def test_delora_bounds_every_term_by_lambda():
    net, params, adapter = made(DeLoRA(r=2, delora_lambda=3))
    p = doubles(adapter)
    torch.testing.assert_close(p["w"], params["site.weight"].norm(dim=0))
    change = (merged(net, params, adapter) - params["site.weight"]) / p["w"]
    terms = [torch.outer(p["B"][:, k], p["A"][k]) for k in range(2)]
    want = sum(p["lambda"] / 2 * t / t.norm() for t in terms)
    torch.testing.assert_close(change, want, rtol=1e-5, atol=1e-5)
    assert change.norm() <= p["lambda"] * (1 + 1e-6)


def test_deloras_start_has_finite_gradients():
    net, params, _ = made(DeLoRA(r=2))
    fresh = net.init(params, 0)
    grads = torch.func.grad(lambda p: net(params, fresh.replace(params=p), randn(3, 8)).square().sum())(fresh.params)["site"]
    assert all(g.isfinite().all() for g in grads.values())
    assert grads["B"].abs().max() > 0


@pytest.mark.parametrize("method", [PSOFT(r=3), DEFT(r=3), DeLoRA(r=3)], ids=lambda m: m.label)
def test_factors_meet_a_convolution_of_any_padding(method):
    def conv():
        return nn.Conv2d(3, 4, (3, 2), padding=1, padding_mode="circular", dilation=(1, 2))

    (net, params, adapter), other = made(method, conv), conv().double()
    with torch.no_grad():
        other.weight.copy_(merged(net, params, adapter))
        other.bias.copy_(params["site.bias"])
        torch.testing.assert_close(net(params, adapter, randn(2, 3, 6, 7)), other(randn(2, 3, 6, 7)), rtol=1e-5, atol=1e-5)


# -- OFT ---------------------------------------------------------------------------------------------------------------------


def test_the_series_and_the_exact_form_turn_in_opposite_directions():
    nets = [made(OFT(oft_block_size=4, use_cayley_neumann=series, num_cayley_neumann_terms=60)) for series in (True, False)]
    (one, params, adapter), (two, _, _) = nets
    small = adapter.replace(params=tree_map(lambda t: 0.2 * t, adapter.params))
    there = merged(one, params, small)
    torch.testing.assert_close(
        merged(two, {**params, "site.weight": there}, small), params["site.weight"], rtol=1e-5, atol=1e-5
    )
    three, four = (merged(made(OFT(oft_block_size=4, num_cayley_neumann_terms=t))[0], params, adapter).float() for t in (3, 4))
    assert torch.equal(three, four)


# -- refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: BOFT(boft_block_size=-1), "boft: boft_block_size must be a non-negative integer, got -1"),
        (lambda: BOFT(boft_block_size=0, boft_block_num=1.5), "boft_block_num must be an integer, got 1.5"),
        (lambda: BOFT(boft_block_num=2), "such that exactly one of boft_block_size and boft_block_num is not 0, got (4, 2)"),
        (lambda: BOFT(boft_block_size=0), "such that exactly one of boft_block_size and boft_block_num is not 0, got (0, 0)"),
        (lambda: BOFT(boft_n_butterfly_factor=0), "boft_n_butterfly_factor must be a positive integer, got 0"),
        (lambda: BOFT(boft_dropout=1.0), "boft_dropout must be in [0, 1), got 1.0"),
        (lambda: BOFT(bias="some"), "bias must be 'none', 'all' or 'boft_only', got 'some'"),
        (lambda: HRA(r=0), "hra: r must be a positive integer, got 0"),
        (lambda: HRA(bias="x"), "bias must be 'none', 'all' or 'hra_only', got 'x'"),
        (lambda: HiRA(r=0), "hira: r must be a positive integer, got 0"),
        (lambda: HiRA(rank_pattern={"a": 0}), "rank_pattern must be positive ranks, got (0,)"),
        (lambda: HiRA(hira_dropout=-0.1), "hira_dropout must be in [0, 1), got -0.1"),
        (lambda: HiRA(init_weights="zeros"), "init_weights must be one of True, False, 'gaussian', got 'zeros'"),
        (lambda: PSOFT(r=0), "psoft: r must be a positive integer, got 0"),
        (lambda: PSOFT(num_cayley_neumann_terms=0), "num_cayley_neumann_terms must be from 1 to 1000, got 0"),
        (lambda: PSOFT(psoft_svd_lowrank_niter=0), "psoft_svd_lowrank_niter must be a positive integer, got 0"),
        (lambda: PSOFT(psoft_alpha=0), "psoft_alpha must be positive, got 0"),
        (lambda: PSOFT(psoft_dropout=2), "psoft_dropout must be in [0, 1), got 2"),
        (lambda: PSOFT(cayley_neumann_eps=1.0), "cayley_neumann_eps must be in (0, 1) or None, got 1.0"),
        (lambda: PSOFT(ab_svd_init="pissa"), "ab_svd_init must be one of 'psoft_init', 'pissa_init', got 'pissa'"),
        (lambda: PSOFT(psoft_svd="half"), "psoft_svd must be one of 'full', 'lowrank', got 'half'"),
        (lambda: DEFT(r=-1), "deft: r must be a positive integer, got -1"),
        (lambda: DEFT(decomposition_method="lu"), "decomposition_method must be one of 'relu', 'qr', got 'lu'"),
        (lambda: DEFT(deft_dropout=1), "deft_dropout must be in [0, 1), got 1"),
        (lambda: DEFT(bias="x"), "bias must be 'none', 'all' or 'deft_only', got 'x'"),
        (lambda: DeLoRA(r=0), "delora: r must be a positive integer, got 0"),
        (lambda: DeLoRA(rank_pattern={"a": -2}), "rank_pattern must be positive ranks, got (-2,)"),
        (lambda: DeLoRA(module_dropout=1), "module_dropout must be in [0, 1), got 1"),
        (lambda: DeLoRA(bias="x"), "bias must be 'none', 'all' or 'delora_only', got 'x'"),
    ],
)
def test_a_field_is_refused(make, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        make()


def grouped():
    return nn.Conv2d(4, 4, 1, groups=2)


@pytest.mark.parametrize(
    ("method", "layer", "text"),
    [
        (BOFT(boft_block_size=3), linear, "boft at 'site': boft_block_size must divide in 8, got 3; use one of [1, 2, 4, 8]"),
        (BOFT(boft_block_size=0, boft_block_num=3), linear, "boft_block_num must divide in 8, got 3"),
        (
            BOFT(boft_n_butterfly_factor=3),
            linear,
            "3 factors need blocks of even size and a number of them that 2^2 divides",
        ),
        (BOFT(boft_block_size=2), grouped, "a rotation mixes features: groups must be 1, got 2; leave the site out"),
        (HRA(), grouped, "reflections need a convolution of one group, got 2; leave the site out"),
        (HRA(), lambda: nn.Linear(1, 3), "a reflection needs at least 2 features, got 1; leave the site out"),
        (HRA(r=9, apply_GS=True), linear, "with apply_GS r must be at most in = 8, got 9"),
        (HiRA(), grouped, "a convolution must have one group, got 2; leave the site out"),
        (HiRA(hira_dropout=0.1), lambda: nn.Embedding(5, 3), "hira_dropout must be 0 where inputs are ids, got 0.1"),
        (PSOFT(r=7), linear, "psoft at 'site': r must be at most min(in, out) = 6, got 7"),
        (PSOFT(r=2), grouped, "a convolution must have one group, got 2; leave the site out"),
        (DEFT(), grouped, "a convolution must have one group, got 2; leave the site out"),
        (DeLoRA(), grouped, "a convolution must have one group, got 2; leave the site out"),
        (OFT(oft_block_size=1), linear, "a block must have at least 2 features to rotate, got 1"),
    ],
)
def test_a_site_is_refused(method, layer, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        made(method, layer)

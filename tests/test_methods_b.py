"""OFT, LoHa, LoKr, SHiRA, MiSS and RoAd: closed forms, gradients and refusals that no general law can state."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from funcpeft import errors
from funcpeft.adapt import adapt
from funcpeft.context import EVAL, Context
from funcpeft.functional import functionalize
from funcpeft.methods import OFT, LoHa, LoKr, MiSS, RoAd, SHiRA, loha, lokr, miss, oft, road, shira
from funcpeft.stacking import stack, unstack
from funcpeft.weights import Base

TRAINING = Context(training=True, seed=5)


def seen(layer, name="site"):
    """Views one layer as methods do, in float64."""
    model, params = functionalize(nn.ModuleDict({name: layer.double()}))
    return Base(model.site(f"{name}.weight"), params[f"{name}.weight"], params.get(f"{name}.bias"))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(method, base, seed=1, scale=0.3):
    """Returns a site's leaves in float64, the trained ones moved away from init."""
    params, consts = method.init_site(base, torch.Generator().manual_seed(seed))
    drawn = {n: t.double() + scale * randn(*t.shape, seed=seed + i) for i, (n, t) in enumerate(params.items())}
    return {**drawn, **{n: t.double() if t.is_floating_point() else t for n, t in consts.items()}}


def refused(method, layer):
    """Returns the message with which a method refuses a layer."""
    model, _ = functionalize(nn.ModuleDict({"site": layer}))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 # the text is what the caller looks at
        adapt(model, method)
    return str(caught.value)


def trained(leaves):
    """Splits leaves into those with gradients, as positional arguments, and the names to put them back."""
    names = [n for n, t in leaves.items() if t.is_floating_point() and n != "scaling"]
    return names, tuple(leaves[n].clone().requires_grad_() for n in names)


def gradcheck(method, base, leaves, x):
    names, values = trained(leaves)
    return torch.autograd.gradcheck(
        lambda *v: method.apply({**leaves, **dict(zip(names, v, strict=True))}, base, x, EVAL), values
    )


# -- OFT -------------------------------------------------------------------------------------------------------------


def dense_skew(vector, size):
    q = torch.zeros(size, size, dtype=vector.dtype)
    q[tuple(torch.triu_indices(size, size, 1))] = vector
    return q - q.T


@pytest.mark.parametrize("size", [1, 2, 5])
def test_skew_fills_the_upper_triangle_row_by_row(size):
    v = randn(3, size * (size - 1) // 2)
    torch.testing.assert_close(oft.skew(v, size), torch.stack([dense_skew(row, size) for row in v]), rtol=0, atol=0)


def test_exact_cayley_is_a_rotation_for_any_leaf():
    r = oft.cayley(oft.skew(10 * randn(4, 15), 6))
    torch.testing.assert_close(r @ r.mT, torch.eye(6).double().expand_as(r))
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(4).double())


def test_exact_oft_keeps_the_angles_between_inputs_and_every_singular_value():
    base = seen(nn.Linear(6, 4))
    method = OFT(oft_block_size=3, use_cayley_neumann=False)
    leaves = moved(method, base, scale=2.0)
    before, after = (torch.linalg.svdvals(w) for w in (base.weight, method.merge(leaves, base).weight))
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize("terms", range(1, 9))
def test_series_has_these_weights(terms):
    q = oft.skew(randn(2, 6), 4)
    weights = {1: [1], 2: [1, 2], 3: [1, 2, 2, 1]}.get(terms, [1, *[2] * (terms - 2), 1])
    want = sum(c * torch.linalg.matrix_power(q, k) for k, c in enumerate(weights))
    torch.testing.assert_close(oft.cayley_series(q, terms), want)


def test_series_approaches_the_inverse_of_the_exact_form():
    q = oft.skew(0.1 * randn(2, 6), 4)
    errs = [float((oft.cayley_series(q, t) @ oft.cayley(q) - torch.eye(4)).abs().max()) for t in (4, 8, 30)]
    assert errs[0] > errs[1] > errs[2]
    assert errs[2] < 1e-14


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_oft_rotates_pieces_of_the_input(exact, share):
    base, x = seen(nn.Linear(6, 4)), randn(5, 6, seed=7)
    method = OFT(r=3, oft_block_size=0, use_cayley_neumann=not exact, block_share=share)
    leaves = moved(method, base)
    assert leaves["Q"].shape == (1 if share else 3, 1)
    blocks = method.rotation(leaves, base).expand(3, 2, 2)
    want = F.linear(x @ torch.block_diag(*blocks), base.weight, base.bias)
    torch.testing.assert_close(method.apply(leaves, base, x, EVAL), want)


def test_oft_turns_the_kernel_of_a_convolution_whole():
    layer = nn.Conv2d(2, 3, (3, 2), dilation=(1, 2), padding=1, padding_mode="reflect")
    base, x = seen(layer), randn(1, 2, 6, 7)
    method = OFT(oft_block_size=4)
    leaves = moved(method, base)
    merged = (base.weight @ torch.block_diag(*method.rotation(leaves, base)).T).reshape(layer.weight.shape)
    want = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), merged, base.bias, dilation=(1, 2))
    torch.testing.assert_close(method.apply(leaves, base, x, EVAL), want)


@pytest.mark.parametrize("coft", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_oft_gradients_match_differences(coft, exact):
    base, x = seen(nn.Linear(4, 2)), randn(2, 4)
    method = OFT(oft_block_size=2, coft=coft, eps=0.2, use_cayley_neumann=not exact)
    assert gradcheck(method, base, moved(method, base), x)


def test_coft_keeps_every_rotation_in_its_ball_and_changes_no_argument():
    base, method = seen(nn.Linear(6, 4)), OFT(oft_block_size=3, coft=True, eps=0.1)
    leaves = {"Q": torch.stack([randn(3), 1e-4 * randn(3, seed=1)])}
    held = leaves["Q"].clone()
    inside = method.project(leaves, base)["Q"]
    norms = torch.linalg.matrix_norm(oft.skew(inside, 3))
    torch.testing.assert_close(norms[0], torch.tensor(0.1 / math.sqrt(2)).double())
    torch.testing.assert_close(inside[1], leaves["Q"][1], rtol=0, atol=0)
    torch.testing.assert_close(method.project({"Q": inside}, base)["Q"], inside)
    method.apply(leaves, base, randn(2, 6), EVAL)
    assert torch.equal(leaves["Q"], held)


def test_coft_has_a_gradient_at_zero():
    base, method = seen(nn.Linear(4, 2)), OFT(oft_block_size=2, coft=True)
    grad = torch.func.grad(lambda q: method.apply({"Q": q}, base, randn(3, 4), EVAL).sum())(torch.zeros(2, 1).double())
    assert bool(torch.isfinite(grad).all())
    assert bool((grad != 0).any())


def test_oft_module_dropout_leaves_whole_blocks_alone():
    base, x = seen(nn.Linear(40, 40, bias=False)), randn(40)
    method = OFT(oft_block_size=2, module_dropout=0.5)
    leaves = moved(method, base)
    turned = torch.linalg.solve(base.weight, method.apply(leaves, base, x, TRAINING))
    kept = torch.isclose(turned, x).reshape(20, 2)
    whole = torch.isclose(turned, oft.rotate(x, method.rotation(leaves, base))).reshape(20, 2)
    assert bool((kept.all(1) | whole.all(1)).all())
    assert 0 < int(kept.all(1).sum()) < 20


@pytest.mark.parametrize(("dim", "size", "want"), [(32, 5, 4), (32, 7, 8), (32, 12, 8), (32, 24, 16), (48, 14, 12), (6, 99, 6)])
def test_nearest_divisor_is_peft_s(dim, size, want):
    assert oft.nearest_divisor(size, dim) == want
    base = seen(nn.Linear(dim, 2))
    assert OFT(oft_block_size=size, nearest_divisor=True).block_size(base) == want
    assert OFT(r=size, oft_block_size=0, nearest_divisor=True).block_size(base) == dim // want


def test_oft_unmerges_a_series_that_is_far_from_orthogonal():
    base, method = seen(nn.Linear(6, 4)), OFT(oft_block_size=3)
    leaves = moved(method, base, scale=1.5)
    merged = method.merge(leaves, base)
    torch.testing.assert_close(method.unmerge(leaves, merged).weight, base.weight)
    assert float(method.unmerge_gain(leaves, base)) > 0


def test_oft_gain_bounds_the_error():
    base, method = seen(nn.Linear(6, 4)), OFT(oft_block_size=3)
    leaves = moved(method, base)
    merged = method.merge(leaves, base)
    noise = 1e-3 * randn(4, 6, seed=4).sign()
    wrong = method.unmerge(leaves, merged.replace(weight=merged.weight + noise)).weight
    assert float((wrong - base.weight).abs().max()) <= 1e-3 * float(method.unmerge_gain(leaves, base)) + 1e-12


def test_oft_refusals():
    text = refused(OFT(oft_block_size=32, target_modules=["site"]), nn.Linear(100, 4))
    assert "oft at 'site': oft_block_size must divide the 100 features that are rotated, got 32" in text
    assert "(1, 2, 4, 5, 10, 20, 25, 50, 100)" in text
    assert "r must divide the 9 features" in refused(OFT(r=2, oft_block_size=0, target_modules=["site"]), nn.Linear(9, 4))
    text = refused(OFT(oft_block_size=3, target_modules=["site"]), nn.Embedding(7, 4))
    assert "must divide the 4 features" in text
    assert "groups must be 1, got 2" in refused(OFT(oft_block_size=2, target_modules=["site"]), nn.Conv1d(4, 4, 1, groups=2))
    assert "at least 2 features" in refused(OFT(oft_block_size=1, target_modules=["site"]), nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"r": 4}, "exactly one of r and oft_block_size must be nonzero, got r=4, oft_block_size=32; set the other to 0"),
        ({"oft_block_size": 0}, "exactly one of r and oft_block_size must be nonzero, got r=0, oft_block_size=0"),
        ({"r": -1}, "r must be a non-negative integer, got -1"),
        ({"oft_block_size": 2.0}, "oft_block_size must be an integer, got 2.0"),
        ({"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms must be from 1 to 1000, got 0"),
        ({"module_dropout": 1.0}, r"module_dropout must be in \[0, 1\), got 1.0"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"init_weights": "zero"}, "init_weights must be True or False, got 'zero'"),
        ({"bias": "lora_only"}, "bias must be 'none', 'all' or 'oft_only', got 'lora_only'"),
    ],
)
def test_oft_fields(fields, text):
    with pytest.raises(ValueError, match=f"oft: {text}"):
        OFT(**fields)


# -- LoHa ------------------------------------------------------------------------------------------------------------


def test_loha_is_the_product_of_two_updates_entry_by_entry():
    base, method = seen(nn.Linear(5, 4)), LoHa(r=2, alpha=3)
    leaves = moved(method, base)
    w1, w2 = (leaves[f"w{i}a"] @ leaves[f"w{i}b"] for i in "12")
    torch.testing.assert_close(method.delta(leaves, base), 1.5 * w1 * w2)
    khatri_rao = {
        s: torch.stack([torch.outer(u, v).flatten() for u, v in zip(*pair, strict=True)])
        for s, pair in {"a": (leaves["w1a"], leaves["w2a"]), "b": (leaves["w1b"].T, leaves["w2b"].T)}.items()
    }
    torch.testing.assert_close(method.delta(leaves, base), 1.5 * khatri_rao["a"] @ khatri_rao["b"].T)


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 6, 3, groups=2), nn.Conv2d(4, 6, (3, 2), groups=2), nn.Conv3d(2, 4, 2)])
def test_loha_effective_convolution_is_a_tucker_product(layer):
    base, method = seen(layer), LoHa(r=3, use_effective_conv2d=True)
    leaves = moved(method, base)
    out, in_, kernel = layer.out_channels, layer.weight.shape[1], layer.weight.shape[2:].numel()
    want = torch.zeros(2, out, in_, kernel, dtype=torch.float64)
    for n, i in enumerate("12"):
        core = leaves[f"t{i}"].reshape(3, 3, kernel)
        for x in range(3):
            for y in range(3):
                outer = torch.outer(leaves[f"w{i}a"][:, x], leaves[f"w{i}b"][y])
                want[n] += outer[..., None] * core[x, y]
    torch.testing.assert_close(method.delta(leaves, base), leaves["scaling"] * want.prod(0).flatten(1))


@pytest.mark.parametrize("name", ["w1a", "w1b", "w2a", "w2b", "t1", "t2"])
def test_loha_effective_gradients_match_differences(name):
    base, method, x = seen(nn.Conv2d(2, 3, 2)), LoHa(r=2, use_effective_conv2d=True), randn(1, 2, 3, 3)
    leaves = moved(method, base)

    def loss(t):
        return method.apply({**leaves, name: t}, base, x, EVAL).sin().sum()

    direction = randn(*leaves[name].shape, seed=9)
    along = (torch.func.grad(loss)(leaves[name]) * direction).sum()
    differences = (loss(leaves[name] + 1e-6 * direction) - loss(leaves[name] - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(along, differences, rtol=1e-6, atol=1e-8)


def test_effective_is_for_kernels_larger_than_one():
    names = LoHa(r=2, use_effective_conv2d=True).init_site(seen(nn.Conv2d(2, 3, 1)), torch.Generator())[0]
    assert "t1" not in names
    names = LoKr(r=1, use_effective_conv2d=True).init_site(seen(nn.Conv1d(9, 9, 1)), torch.Generator())[0]
    assert "t2" not in names


@pytest.mark.parametrize("layer", [nn.Conv1d(16, 25, 3), nn.Conv2d(16, 25, 3)], ids=["conv1d", "conv2d"])
@pytest.mark.parametrize("method", [LoHa(r=2, use_effective_conv2d=True), LoKr(r=1, use_effective_conv2d=True)])
def test_files_hold_outer_factors_transposed(method, layer):
    base = seen(layer)
    leaves = moved(method, base)
    tensors = method.to_peft(base, leaves)
    key = {"LoHa": "hada_w2_a", "LoKr": "lokr_w2_a"}[type(method).__name__]
    assert torch.equal(tensors[key], leaves["w2a"].T)
    assert tensors[key].is_contiguous()
    back = method.from_peft(base, tensors)
    assert all(torch.equal(back[n], leaves[n]) for n in back)
    assert back.keys() == leaves.keys() - {"scaling", "rank"}


def test_members_of_unequal_rank_stack_exactly():
    model, params = functionalize(nn.ModuleDict({"site": nn.Linear(36, 36)}))
    nets = [adapt(model, LoHa(r=r, alpha=3, init_weights=False, target_modules=["site"])) for r in (2, 5)]
    adapters = [n.init(params, 3) for n in nets]
    many = stack(adapters)
    merged = torch.func.vmap(lambda a: nets[0].merge(params, a)[0]["site.weight"])(many)
    for i, (net, adapter) in enumerate(zip(nets, adapters, strict=True)):
        torch.testing.assert_close(merged[i], net.merge(params, adapter)[0]["site.weight"])
        assert unstack(many)[i].params["site"]["w1a"].shape == (36, (2, 5)[i])


@pytest.mark.parametrize("method", [LoHa(r=2, rank_dropout=0.5), LoKr(r=8, rank_dropout=0.5, rank_dropout_scale=True)])
def test_rank_dropout_drops_outputs_and_divides_by_the_fraction_kept(method):
    base, x = seen(nn.Linear(8, 40)), randn(3, 8)
    leaves = moved(method, base)
    full, dropped = (method.apply(leaves, base, x, c) - base(x) for c in (EVAL, TRAINING))
    ratio = dropped / full
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    kept = ratio[0] != 0
    assert 0 < int(kept.sum()) < 40
    torch.testing.assert_close(ratio[0][kept], (40 / kept.sum()).expand(int(kept.sum())).double())


def test_lokr_rank_dropout_does_not_rescale_by_itself():
    base, x, method = seen(nn.Linear(8, 40)), randn(8), LoKr(r=8, rank_dropout=0.5)
    leaves = moved(method, base)
    ratio = (method.apply(leaves, base, x, TRAINING) - base(x)) / (method.apply(leaves, base, x, EVAL) - base(x))
    torch.testing.assert_close(ratio, (ratio > 0.5).double())
    assert 0 < int(ratio.sum()) < 40


@pytest.mark.parametrize("method", [LoHa(r=2, module_dropout=0.5), LoKr(r=2, module_dropout=0.5)])
def test_module_dropout_is_all_or_nothing(method):
    base, x = seen(nn.Linear(6, 4)), randn(3, 6)
    leaves, seeds = moved(method, base), range(40)
    whole = method.apply(leaves, base, x, EVAL)
    outs = [method.apply(leaves, base, x, Context(training=True, seed=s)) for s in seeds]
    off = [torch.allclose(y, base(x)) for y in outs]
    assert all(o or torch.allclose(y, whole) for o, y in zip(off, outs, strict=True))
    assert 5 < sum(off) < 35


def test_an_update_of_which_every_row_is_dropped_is_zero():
    base, x, method = seen(nn.Linear(4, 1)), randn(2, 4), LoHa(r=2, rank_dropout=0.9)
    leaves = moved(method, base)
    outs = torch.stack([method.apply(leaves, base, x, Context(training=True, seed=s)) for s in range(20)])
    assert bool(torch.isfinite(outs).all())
    assert any(torch.equal(y, base(x)) for y in outs)


@pytest.mark.parametrize("cls", [LoHa, LoKr])
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern must be positive ranks, got \{'q': 0\}"),
        ({"rank_dropout": 1.0}, r"rank_dropout must be in \[0, 1\), got 1.0"),
        ({"module_dropout": 1.5}, r"module_dropout must be in \[0, 1\], got 1.5"),
        ({"init_weights": "zero"}, "init_weights must be .*'zero'"),
    ],
)
def test_loha_and_lokr_fields(cls, fields, text):
    with pytest.raises(ValueError, match=f"{cls.__name__.lower()}: {text}"):
        cls(**fields)


# -- LoKr ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"r": 8}, {"w1", "w2"}),
        ({"r": 1}, {"w1", "w2a", "w2b"}),
        ({"r": 1, "decompose_both": True}, {"w1a", "w1b", "w2a", "w2b"}),
    ],
)
def test_lokr_is_the_kronecker_product(fields, names):
    base, x = seen(nn.Linear(15, 16)), randn(2, 7, 15)
    method = LoKr(alpha=3, **fields)
    leaves = moved(method, base)
    assert leaves.keys() == names | {"scaling", "rank"}
    w1 = leaves.get("w1", leaves["w1a"] @ leaves["w1b"] if "w1a" in leaves else None)
    w2 = leaves.get("w2", leaves["w2a"] @ leaves["w2b"] if "w2a" in leaves else None)
    want = 3 / fields["r"] * torch.kron(w1, w2)
    torch.testing.assert_close(method.delta(leaves, base), want)
    torch.testing.assert_close(method.apply(leaves, base, x, EVAL), F.linear(x, base.weight + want, base.bias))


def test_lokr_convolution_is_the_kronecker_product_at_every_tap():
    base = seen(nn.Conv2d(6, 8, (3, 2)))
    for fields in ({"r": 8}, {"r": 1, "use_effective_conv2d": True}):
        method = LoKr(**fields)
        leaves = moved(method, base)
        w2 = leaves["w2"] if "w2" in leaves else loha.tucker(leaves["t2"], leaves["w2a"], leaves["w2b"])
        taps = [torch.kron(leaves["w1"], w2[..., i, j]) for i in range(3) for j in range(2)]
        torch.testing.assert_close(method.delta(leaves, base), leaves["scaling"] * torch.stack(taps, -1).flatten(1))


def test_lokr_full_factor_in_one_dimension_is_ordered_as_torch_kron_does():
    w1, w2 = randn(2, 3), randn(4, 5, 3, seed=1)
    torch.testing.assert_close(lokr.kronecker(w1, w2), torch.kron(w1, w2).reshape(8, 45))


@pytest.mark.parametrize("dim", [1, 2, 7, 12, 36, 97, 120])
@pytest.mark.parametrize("factor", [-1, 1, 3, 5, 8, 200])
def test_factorization_splits(dim, factor):
    small, large = lokr.factorization(dim, factor)
    assert small * large == dim
    if factor == -1:
        assert small == max(d for d in range(1, math.isqrt(dim) + 1) if dim % d == 0)
    elif dim % factor:
        assert small <= min(factor, large)
    else:
        assert small == factor


def test_lokr_init_says_which_factor_is_zero():
    base = seen(nn.Linear(16, 16))
    for init, zero in ((True, "w1a"), ("lycoris", "w2b")):
        params, _ = LoKr(r=1, decompose_both=True, init_weights=init).init_site(base, torch.Generator().manual_seed(0))
        assert [n for n, t in params.items() if not t.any()] == [zero]
    with pytest.raises(ValueError, match="lokr: decompose_factor must be -1 or positive, got 0"):
        LoKr(decompose_factor=0)


@pytest.mark.parametrize("fields", [{"r": 2}, {"r": 1, "decompose_both": True}])
def test_lokr_gradients_match_differences(fields):
    base, method = seen(nn.Linear(9, 8)), LoKr(**fields)
    assert gradcheck(method, base, moved(method, base), randn(2, 9))


def test_ranks_and_alphas_of_a_file_are_those_of_the_leaves():
    model, params = functionalize(nn.ModuleDict({n: nn.Linear(16, 16) for n in ("q", "k", "v")}))
    method = LoHa(r=4, alpha=6, rank_pattern={"k": 2}, alpha_pattern={"v": 0.7}, target_modules=["q", "k", "v"])
    adapter = adapt(model, method).init(params, 0)
    config = method.to_peft_config({p: adapter.leaves(p) for p in ("q", "k", "v")})
    assert (config["r"], config["alpha"]) == (4, 6)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"k": 2}, {"v": 0.7})


# -- SHiRA -----------------------------------------------------------------------------------------------------------


def test_shira_positions_are_distinct_sorted_and_the_seed_s():
    one, again, other = (shira.random_positions(6, 5, 11, s) for s in (1, 1, 2))
    flat = one[0] * 5 + one[1]
    assert torch.equal(flat, flat.unique())
    assert flat.min() >= 0
    assert flat.max() < 30
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    unseeded = torch.randperm(30, generator=torch.Generator())[:11].sort().values
    assert torch.equal(shira.random_positions(6, 5, 11, shira.TORCH_SEED), torch.stack([unseeded // 5, unseeded % 5]).int())


@pytest.mark.parametrize("tokens", [1, 300], ids=["gathered", "dense"])
def test_shira_changes_the_chosen_entries_only(tokens):
    base, method, x = seen(nn.Linear(64, 48)), SHiRA(r=1), randn(tokens, 64)
    leaves = moved(method, base)
    rows, cols = leaves["indices"].long()
    want = torch.zeros(48, 64).double()
    want[rows, cols] = leaves["w"]
    assert torch.equal(method.delta(leaves, base), want)
    torch.testing.assert_close(method.apply(leaves, base, x, EVAL), F.linear(x, base.weight + want, base.bias))
    assert int((method.merge(leaves, base).weight != base.weight).sum()) == 64 + 48


def test_shira_vmaps_over_positions_too():
    base, method, x = seen(nn.Linear(32, 32)), SHiRA(r=1), randn(32)
    members = [{**moved(method, base, seed=s), "indices": shira.random_positions(32, 32, 64, s)} for s in range(3)]
    many = {n: torch.stack([m[n] for m in members]) for n in members[0]}
    got = torch.func.vmap(lambda m: method.apply(m, base, x, EVAL))(many)
    torch.testing.assert_close(got, torch.stack([method.apply(m, base, x, EVAL) for m in members]))


def test_shira_gradients_match_differences():
    base, method = seen(nn.Linear(6, 6)), SHiRA(r=1)
    leaves = moved(method, base)
    assert gradcheck(method, base, leaves, randn(4, 6))
    wide = seen(nn.Linear(16, 16))
    assert gradcheck(method, wide, moved(method, wide), randn(1, 16))


def test_shira_takes_masks():
    model, params = functionalize(nn.ModuleDict({"site": nn.Linear(5, 6)}))
    net = adapt(model, SHiRA(r=1, mask_type="mine", target_modules=["site"]))
    mask = torch.zeros(6, 5, dtype=torch.bool)
    mask[:2] = mask[2, :1] = True
    adapter = net.init(params, 0, masks={"site": mask})
    assert torch.equal(adapter.consts["site"]["indices"], mask.nonzero().T.int())
    with pytest.raises(ValueError, match="a mask must have 11 ones, got 10"):
        net.init(params, 0, masks={"site": mask & (torch.arange(6) < 2)[:, None]})
    with pytest.raises(ValueError, match=r"a mask must have shape \(6, 5\), got \(5, 6\)"):
        net.init(params, 0, masks={"site": mask.T})
    with pytest.raises(ValueError, match=r"shira at .site.: a mask must be boolean, got torch\.float32"):
        net.init(params, 0, masks={"site": mask.float()})
    with pytest.raises(errors.NameMissingError, match="masks must be of sites, got 'sight'"):
        net.init(params, 0, masks={"sight": mask})
    with pytest.raises(TypeError, match="shira: masks must be a dict from paths to masks, got Tensor"):
        net.init(params, 0, masks=mask)


def test_shira_without_its_own_positions_fails_loudly():
    base, method = seen(nn.Linear(5, 6)), SHiRA(r=1, mask_type="mine")
    leaves = moved(method, base)
    with pytest.raises((IndexError, RuntimeError)):
        method.apply(leaves, base, randn(3, 5), EVAL)
    with pytest.raises((IndexError, RuntimeError)):
        method.merge(leaves, base)


def test_shira_reads_positions_written_as_floats():
    base, method = seen(nn.Linear(5, 6)), SHiRA(r=1)
    leaves = moved(method, base)
    tensors = method.to_peft(base, leaves)
    back = method.from_peft(base, {k: t.float() for k, t in tensors.items()})
    assert back["indices"].dtype == torch.int32
    assert torch.equal(back["indices"], leaves["indices"])


def test_shira_refusals():
    text = refused(SHiRA(r=3, target_modules=["site"]), nn.Linear(5, 6))
    assert "r (in + out) entries must fit in a weight of shape (6, 5), r must be at most 2, got 3" in text
    with pytest.raises(ValueError, match="shira: r must be a positive integer, got 0"):
        SHiRA(r=0)
    with pytest.raises(ValueError, match="shira: random_seed must be an integer or None, got 'a'"):
        SHiRA(random_seed="a")


# -- MiSS ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [2, 4, 5])
@pytest.mark.parametrize("variant", [True, "mini"])
def test_miss_shares_one_block(r, variant):
    base, x = seen(nn.Linear(10, 6)), randn(3, 4, 10)
    method = MiSS(r=r, init_weights=variant, mini_r=3)
    leaves = moved(method, base)
    want = torch.stack([torch.stack([leaves["D"][j % r, o % leaves["D"].shape[1]] for j in range(10)]) for o in range(6)])
    assert torch.equal(method.update(leaves, base), want)
    torch.testing.assert_close(method.apply(leaves, base, x, EVAL), F.linear(x, base.weight + want, base.bias))


def test_miss_bat_multiplies_every_block():
    base, x = seen(nn.Linear(6, 4)), randn(3, 6)
    method = MiSS(r=2, init_weights="bat")
    leaves = moved(method, base)
    want = base.weight.clone()
    for a in range(2):
        for c in range(3):
            w, d = base.weight[2 * a : 2 * a + 2, 2 * c : 2 * c + 2], leaves["D"][a]
            want[2 * a : 2 * a + 2, 2 * c : 2 * c + 2] = w @ (torch.eye(2) + d) + d
    torch.testing.assert_close(method.merge(leaves, base).weight, want)
    torch.testing.assert_close(method.apply(leaves, base, x, EVAL), F.linear(x, want, base.bias))
    torch.testing.assert_close(method.unmerge(leaves, method.merge(leaves, base)).weight, base.weight)


@pytest.mark.parametrize("variant", [True, "mini", "bat"])
def test_miss_drops_the_update_s_input_in_every_variant(variant):
    base, x = seen(nn.Linear(6, 4)), randn(5, 6)
    method = MiSS(r=2, init_weights=variant, miss_dropout=0.5)
    leaves = moved(method, base)
    dropped = TRAINING.dropout(x, 0.5)
    want = base(x) + dropped @ method.update(leaves, base).T
    torch.testing.assert_close(method.apply(leaves, base, x, TRAINING), want)


@pytest.mark.parametrize("variant", [True, "mini", "bat"])
def test_miss_gradients_match_differences(variant):
    base, method = seen(nn.Linear(6, 4)), MiSS(r=2, init_weights=variant)
    assert gradcheck(method, base, moved(method, base), randn(2, 6))


def test_shard_sum_pads():
    torch.testing.assert_close(miss.shard_sum(torch.tensor([1.0, 2, 3, 4, 5]), 2), torch.tensor([9.0, 6]))


def test_miss_refusals():
    assert "r must be at most the 5 input features, got 6" in refused(MiSS(r=6, target_modules=["site"]), nn.Linear(5, 8))
    text = refused(MiSS(r=2, mini_r=3, init_weights="mini", target_modules=["site"]), nn.Linear(5, 8))
    assert "mini_r must divide the 8 output features, got 3; use a divisor (1, 2, 4, 8)" in text
    text = refused(MiSS(r=3, init_weights="bat", target_modules=["site"]), nn.Linear(6, 8))
    assert "r must divide both sides of a weight of shape (8, 6), got 3; use a common divisor (1, 2)" in text
    for fields, message in (
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"mini_r": 0}, "mini_r must be a positive integer, got 0"),
        ({"miss_dropout": 1.0}, r"miss_dropout must be in \[0, 1\), got 1.0"),
        ({"bias": "miss"}, "bias must be 'none', 'all' or 'MiSS_only', got 'miss'"),
        ({"init_weights": "bone"}, "init_weights must be one of .*'mini', got 'bone'"),
    ):
        with pytest.raises(ValueError, match=f"miss: {message}"):
            MiSS(**fields)


# -- RoAd ------------------------------------------------------------------------------------------------------------


def test_turn_is_a_rotation_of_pairs():
    angle = torch.tensor([[0.3, -1.0]]).double()
    cos, sin = (f(angle)[:, None].expand(1, 2, 2) for f in (torch.cos, torch.sin))
    z = randn(3, 4)
    complex_ = torch.complex(z[:, :2], z[:, 2:]) * torch.polar(torch.ones(1, 2).double(), angle)
    torch.testing.assert_close(road.turn(z, cos, sin), torch.cat([complex_.real, complex_.imag], -1))


def dense_road(method, leaves, out):
    """Writes R out, entry by entry."""
    g, h = method.group_size, method.group_size // 2
    theta, alpha = leaves["theta"], leaves["alpha"]
    r = torch.zeros(out, out, dtype=torch.float64)
    for o in range(out):
        group, j = divmod(o, g)
        if method.variant == "road_1":
            k = ks = group * h + j % h
        elif method.variant == "road_2":
            k = ks = o
        else:
            k, ks = group * 2 * g + j, group * 2 * g + g + j
        r[o, o] = alpha[k] * theta[k].cos()
        r[o, group * g + (j + h) % g] = (-1 if j < h else 1) * alpha[ks] * theta[ks].sin()
    return r


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize("group", [2, 4, 8])
def test_road_is_this_matrix(variant, group):
    base, x = seen(nn.Linear(5, 8)), randn(2, 3, 5)
    method = RoAd(variant=variant, group_size=group)
    leaves = moved(method, base)
    r = dense_road(method, leaves, 8)
    torch.testing.assert_close(method.apply(leaves, base, x, EVAL), base(x) @ r.T)
    merged = method.merge(leaves, base)
    torch.testing.assert_close(merged.weight, r @ base.weight)
    torch.testing.assert_close(merged.bias, r @ base.bias)
    back = method.unmerge(leaves, merged)
    torch.testing.assert_close(back.weight, base.weight)
    torch.testing.assert_close(back.bias, base.bias)
    gain = torch.linalg.inv(r).abs().sum(1).max()
    torch.testing.assert_close(method.unmerge_gain(leaves, base), gain)


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_road_gradients_match_differences(variant):
    base, method = seen(nn.Linear(3, 4)), RoAd(variant=variant, group_size=4)
    assert gradcheck(method, base, moved(method, base), randn(2, 3))


def test_road_refusals():
    text = refused(RoAd(target_modules=["site"]), nn.Linear(4, 24))
    assert "road at 'site': group_size must divide the 24 output features, got 64" in text
    assert "use an even divisor (2, 4, 6, 8, 12, 24)" in text
    assert "leave the site out" in refused(RoAd(target_modules=["site"]), nn.Linear(4, 9))
    for fields, message in (
        ({"variant": "road_3"}, "variant must be one of 'road_1', 'road_2', 'road_4', got 'road_3'"),
        ({"group_size": 3}, "group_size must be a positive even integer, got 3"),
        ({"group_size": 0}, "group_size must be a positive even integer, got 0"),
        ({"init_weights": "x"}, "init_weights must be True or False, got 'x'"),
    ):
        with pytest.raises(ValueError, match=f"road: {message}"):
            RoAd(**fields)

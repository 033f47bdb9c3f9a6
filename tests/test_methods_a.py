"""DoRA, IA3, VeRA, FourierFT and LNTuning: closed forms, gradients and refusals that no general law can state."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from funcpeft import errors
from funcpeft.adapt import adapt
from funcpeft.context import EVAL, Context
from funcpeft.functional import functionalize
from funcpeft.methods import IA3, DoRA, FourierFT, LNTuning, VeRA, fourierft
from funcpeft.stacking import stack, unstack
from funcpeft.weights import Base


def seen(layer, name="site"):
    """Views one layer as methods do, in float64."""
    model, params = functionalize(nn.ModuleDict({name: layer.double()}))
    return Base(model.site(f"{name}.weight"), params[f"{name}.weight"], params.get(f"{name}.bias"))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(method, base, seed=1):
    """Returns a site's leaves in float64, the trained ones moved away from init."""
    params, consts = method.init_site(base, torch.Generator().manual_seed(seed))
    drawn = {n: t.double() + 0.3 * randn(*t.shape, seed=seed + i) for i, (n, t) in enumerate(params.items())}
    return drawn, {n: t.double() if t.is_floating_point() else t for n, t in consts.items()}


# -- DoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [nn.Linear(6, 4), nn.Conv2d(3, 4, 2), nn.Embedding(7, 4)], ids=lambda m: type(m).__name__)
def test_dora_merged_rows_have_length_m(layer):
    base, method = seen(layer), DoRA(r=2, lora_alpha=3)
    params, consts = moved(method, base)
    rows = method.merge({**params, **consts}, base).weight
    torch.testing.assert_close(rows.square().sum(1).sqrt(), params["m"].abs())


def dora_dense(m, a, b, norm, base, x):
    """Adapts a linear layer densely, the norm of its rows a given constant; alpha / r = 3 / 2."""
    return F.linear(x, (m / norm)[:, None] * (base.weight + 1.5 * b @ a), base.bias)


def test_dora_differentiates_with_the_norm_held_constant():
    base, method, x = seen(nn.Linear(6, 4)), DoRA(r=2, lora_alpha=3), randn(5, 6, seed=9)
    params, consts = moved(method, base)
    norm = torch.stack([row.dot(row).sqrt() for row in base.weight + 1.5 * params["B"] @ params["A"]])

    def out(p):
        return method.apply({**p, **consts}, base, x, EVAL)

    def dense(p, through=False):
        n = (base.weight + 1.5 * p["B"] @ p["A"]).norm(dim=1) if through else norm
        return dora_dense(p["m"], p["A"], p["B"], n, base, x)

    torch.testing.assert_close(out(params), dense(params))
    got = torch.func.grad(lambda p: out(p).sin().sum())(params)
    want = torch.func.grad(lambda p: dense(p).sin().sum())(params)
    through = torch.func.grad(lambda p: dense(p, through=True).sin().sum())(params)
    for name in ("m", "A", "B"):
        torch.testing.assert_close(got[name], want[name])
    assert not torch.allclose(got["A"], through["A"], rtol=1e-3)
    merged = torch.func.grad(lambda p: method.merge({**p, **consts}, base).meet(x).sin().sum())(params)
    for name in ("m", "A", "B"):
        torch.testing.assert_close(merged[name], want[name])
    tangent = {n: randn(*t.shape, seed=3) for n, t in params.items()}
    forward = torch.func.jvp(out, (params,), (tangent,))[1]
    torch.testing.assert_close(forward, torch.func.jvp(dense, (params,), (tangent,))[1])


def test_dora_frozen_norm_gradients_match_differences():
    base, x = seen(nn.Linear(4, 3)), randn(2, 4)
    method = DoRA(r=2, lora_alpha=3)
    params, _ = moved(method, base)
    norm = (base.weight + 1.5 * params["B"] @ params["A"]).norm(dim=1)
    leaves = tuple(params[n].clone().requires_grad_() for n in ("m", "A", "B"))
    assert torch.autograd.gradcheck(lambda m, a, b: dora_dense(m, a, b, norm, base, x), leaves)


def test_dora_corrects_the_dropped_input_in_training():
    base, method, x = seen(nn.Linear(6, 4)), DoRA(r=2, lora_alpha=3, lora_dropout=0.5), randn(5, 6)
    params, consts = moved(method, base)
    context = Context(training=True, seed=3)
    dropped, v = context.dropout(x, 0.5), base.weight + 1.5 * params["B"] @ params["A"]
    assert bool((dropped == 0).any())
    g = params["m"] / v.norm(dim=1)
    want = F.linear(x, base.weight, base.bias) + (g - 1) * F.linear(dropped, base.weight)
    want = want + g * 1.5 * (dropped @ params["A"].T @ params["B"].T)
    torch.testing.assert_close(method.apply({**params, **consts}, base, x, context), want)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "pissa", "olora"])
def test_dora_starts_from_the_lengths_of_the_base_rows(init):
    base, method = seen(nn.Linear(6, 4)), DoRA(r=2, init_lora_weights=init)
    params, _ = method.init_site(base, torch.Generator().manual_seed(0))
    torch.testing.assert_close(params["m"], base.weight.norm(dim=1), rtol=1e-6, atol=1e-6)


def test_dora_is_bitwise_neutral_at_init_in_half_precision():
    model, params = functionalize(nn.Sequential(nn.Linear(16, 8)).to(torch.bfloat16))
    net = adapt(model, DoRA(r=2, target_modules=["0"]))
    x = torch.randn(3, 16).to(torch.bfloat16)
    assert torch.equal(net(params, net.init(params, 0), x), model(params, x))


def test_dora_leaves_a_zero_row_zero():
    layer = nn.Linear(6, 4)
    nn.init.zeros_(layer.weight[1:2])
    base, method, x = seen(layer), DoRA(r=2), randn(5, 6)
    params, consts = method.init_site(base, torch.Generator().manual_seed(0))
    leaves = {n: t.double() for n, t in params.items()}
    torch.testing.assert_close(method.apply({**leaves, **consts}, base, x, EVAL), base(x))
    grads = torch.func.grad(lambda p: method.apply({**p, **consts}, base, x, EVAL).sum())(leaves)
    assert all(bool(torch.isfinite(t).all()) for t in grads.values())


def test_dora_magnitude_has_the_shape_of_a_convolution_in_files():
    base, method = seen(nn.Conv2d(3, 4, 2)), DoRA(r=2)
    params, _ = moved(method, base)
    tensors = method.to_peft(base, params)
    assert tensors["lora_magnitude_vector"].shape == (1, 4, 1, 1)
    assert torch.equal(method.from_peft(base, tensors)["m"], params["m"])


def test_dora_refusals():
    with pytest.raises(ValueError, match=r"dora: lora_bias must be False, got True; use LoRA"):
        DoRA(lora_bias=True)
    model, _ = functionalize(nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2)}))
    with pytest.raises(TypeError, match=r"dora at 'attn\.in_proj_weight': a target must be one of the kinds .*, got raw"):
        adapt(model, DoRA(target_modules=(), target_parameters=["attn.in_proj_weight"]))
    base = seen(nn.Linear(3, 2))
    assert not DoRA().unmerges
    with pytest.raises(errors.NoMergedFormError, match=r"dora at 'site': merging does not invert; keep the base params"):
        DoRA().unmerge(moved(DoRA(), base)[0], base)


# -- IA3 ---------------------------------------------------------------------------------------------------------------


def test_ia3_scales_outputs_with_the_bias_or_inputs_without():
    base, x = seen(nn.Linear(6, 4)), randn(5, 6)
    out, in_ = randn(4), randn(6)
    y = IA3().apply({"l": out}, base, x, EVAL)
    torch.testing.assert_close(y, out * (x @ base.weight.T + base.bias))
    y = IA3(feedforward_modules=["site"]).apply({"l": in_}, base, x, EVAL)
    torch.testing.assert_close(y, (in_ * x) @ base.weight.T + base.bias)


def test_ia3_scales_a_grouped_convolution_group_by_group():
    base, method, factors = seen(nn.Conv2d(6, 4, (2, 3), groups=2)), IA3(feedforward_modules=["site"]), randn(6)
    merged = method.merge({"l": factors}, base)
    kernel = base.weight.reshape(4, 3, 2, 3)
    want = torch.stack([kernel[o] * factors[3 * (o // 2) : 3 * (o // 2) + 3, None, None] for o in range(4)])
    torch.testing.assert_close(merged.weight.reshape(4, 3, 2, 3), want)
    assert torch.equal(merged.bias, base.bias)


def test_ia3_gradients():
    base, x = seen(nn.Linear(4, 3)), randn(2, 4)
    for method, size in ((IA3(), 3), (IA3(feedforward_modules=["site"]), 4)):
        factors = randn(size).requires_grad_()
        assert torch.autograd.gradcheck(lambda f, m=method: m.apply({"l": f}, base, x, EVAL), (factors,))


def test_ia3_unmerges_by_dividing_and_refuses_a_zero():
    base = seen(nn.Linear(6, 4))
    leaves = {"l": torch.tensor([1e-6, -2.0, 0.5, 3.0], dtype=torch.float64)}
    back = IA3().unmerge(leaves, IA3().merge(leaves, base))
    torch.testing.assert_close(back.weight, base.weight, rtol=1e-14, atol=0)
    torch.testing.assert_close(back.bias, base.bias, rtol=1e-14, atol=0)
    assert float(IA3().unmerge_gain(leaves, base)) == pytest.approx(1e6)
    assert float(IA3().unmerge_gain({"l": torch.full((4,), 5.0)}, base)) == 1.0
    with pytest.raises(errors.NoMergedFormError, match=r"ia3 at 'site': unmerging divides by l, got an l with a zero"):
        IA3().unmerge({"l": torch.zeros(4, dtype=torch.float64)}, base)


def test_ia3_feedforward_entries_are_endings_or_a_whole_pattern():
    method = IA3(feedforward_modules=["mlp.down", "fc2"])
    assert method.scales_input("layers.0.mlp.down")
    assert method.scales_input("layers.0.myfc2")  # peft's endings need no dot
    assert not method.scales_input("layers.0.attn.down")
    assert IA3(feedforward_modules=r".*\.down").scales_input("mlp.down")
    assert not IA3(feedforward_modules="down").scales_input("mlp.down")
    assert not IA3().scales_input("mlp.down")


def test_ia3_resolves_its_feedforward_modules():
    def default(table, field):
        assert (table, field) == ("IA3_FEEDFORWARD", "feedforward_modules")
        return ("down_proj",)

    assert IA3().resolve(default).feedforward_modules == ("down_proj",)
    assert IA3(target_modules=["q", "down_proj"]).resolve(default).feedforward_modules == ("down_proj",)
    assert IA3(target_modules=["q"]).resolve(default).feedforward_modules == ()
    assert IA3(target_modules=["q"]).resolve(lambda table, field: None).feedforward_modules == ()
    given = IA3(feedforward_modules=[])
    assert given.resolve(default) is given


def test_ia3_writes_feedforward_modules_that_peft_reads():
    literal = IA3(target_modules=["k", "down"], feedforward_modules=["down"])
    assert literal.to_peft_config({})["feedforward_modules"] == ["down"]
    wider = IA3(target_modules=["proj"], feedforward_modules=["mlp.proj"])
    assert wider.to_peft_config({})["feedforward_modules"] == r".*(?:mlp\.proj)"
    assert IA3(target_modules=["k"], feedforward_modules=[]).to_peft_config({})["feedforward_modules"] == []


def test_ia3_refusals():
    with pytest.raises(ValueError, match=r"ia3: feedforward_modules must be among target_modules \['q'\], got \['down'\]"):
        IA3(target_modules=["q"], feedforward_modules=["down"])
    with pytest.raises(ValueError, match=r"ia3: feedforward_modules must be a valid regular expression or a list, got '\('"):
        IA3(feedforward_modules="(")


# -- VeRA --------------------------------------------------------------------------------------------------------------


def vera_net(*shapes, **fields):
    layers = {f"l{i}": nn.Linear(in_, out) for i, (out, in_) in enumerate(shapes)}
    model, params = functionalize(nn.ModuleDict(layers))
    return adapt(model, VeRA(target_modules=sorted(layers), **fields)), params


def test_vera_projections_cover_the_largest_sizes_and_ignore_the_seed():
    net, params = vera_net((4, 9), (7, 3), r=5, projection_prng_key=11)
    one, two = net.init(params, 0), net.init(params, 1)
    a, b = one.consts[""]["A"], one.consts[""]["B"]
    assert (a.shape, b.shape) == ((5, 9), (7, 5))
    assert torch.equal(a, two.consts[""]["A"])
    assert torch.equal(b, two.consts[""]["B"])
    assert float(a.abs().max()) <= math.sqrt(6 / 9)
    assert float(b.abs().max()) <= math.sqrt(6 / 5)
    other = vera_net((4, 9), (7, 3), r=5, projection_prng_key=12)[0].init(params, 0)
    assert not torch.equal(a, other.consts[""]["A"])


def test_vera_is_two_diagonals_around_leading_slices():
    base, method = seen(nn.Linear(6, 4)), VeRA(r=3)
    leaves = {"b": randn(4), "d": randn(3, seed=1), "A": randn(3, 9, seed=2), "B": randn(8, 3, seed=3)}
    want = torch.diag(leaves["b"]) @ leaves["B"][:4] @ torch.diag(leaves["d"]) @ leaves["A"][:, :6]
    torch.testing.assert_close(method.delta(leaves, base), want)
    x = randn(5, 6)
    torch.testing.assert_close(method.apply(leaves, base, x, EVAL), base(x) + x @ want.T)
    vectors = tuple(leaves[n].clone().requires_grad_() for n in ("b", "d"))
    assert torch.autograd.gradcheck(lambda b, d: method.apply({**leaves, "b": b, "d": d}, base, x, EVAL), vectors)


def test_vera_members_of_different_rank_stack():
    nets = [vera_net((4, 9), (7, 3), r=r) for r in (2, 5)]
    params = nets[0][1]
    members = [net.init(params, 0) for net, _ in nets]
    for member, back in zip(members, unstack(stack(members)), strict=True):
        assert torch.equal(member.consts[""]["A"], back.consts[""]["A"])
        assert torch.equal(member.consts[""]["B"], back.consts[""]["B"])
        assert torch.equal(member.params["l0"]["d"], back.params["l0"]["d"])


def test_vera_starts_neutral_unless_asked():
    base = seen(nn.Linear(6, 4))
    gen = torch.Generator().manual_seed(0)
    fresh, _ = VeRA(r=3, d_initial=0.25).init_site(base, gen)
    assert torch.equal(fresh["b"], torch.zeros(4))
    assert torch.equal(fresh["d"], torch.full((3,), 0.25))
    drawn, _ = VeRA(r=3, init_weights=False).init_site(base, gen)
    assert torch.equal(drawn["b"], torch.ones(4))
    assert len(set(drawn["d"].tolist())) == 3


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"r": 0}, r"vera: r must be a positive integer, got 0"),
        ({"vera_dropout": 1.0}, r"vera: vera_dropout must be in \[0, 1\), got 1\.0"),
        ({"projection_prng_key": None}, r"vera: projection_prng_key must be an integer, got None"),
        ({"bias": "lora_only"}, r"vera: bias must be 'none', 'all' or 'vera_only', got 'lora_only'"),
    ],
)
def test_vera_refusals(fields, text):
    with pytest.raises(ValueError, match=text):
        VeRA(**fields)


# -- FourierFT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 6), (5, 3), (1, 7), (8, 8)])
def test_fourierft_is_a_sum_of_cosines(shape):
    out, in_ = shape
    n = out * in_ // 2
    c, index = randn(n), fourierft.frequencies(out, in_, n, 777)
    assert len(set(index.tolist())) == n
    p, q = torch.arange(out, dtype=torch.float64)[:, None], torch.arange(in_, dtype=torch.float64)
    waves = [torch.cos(2 * math.pi * (p * (k // in_) / out + q * (k % in_) / in_)) for k in index.tolist()]
    want = (c[:, None, None] * torch.stack(waves)).sum(0) / (out * in_)
    torch.testing.assert_close(fourierft.transform(c, index, out, in_), want)
    x = randn(2, 3, in_, seed=1)
    torch.testing.assert_close(fourierft.product(x, c, index, out), x @ want.T)
    assert torch.autograd.gradcheck(lambda c, x: fourierft.product(x, c, index, out), (c.requires_grad_(), x.requires_grad_()))


def test_fourierft_large_layers_take_the_product_without_the_matrix(monkeypatch):
    model, params = functionalize(nn.Sequential(nn.Linear(8, 6)).double())
    net, x = adapt(model, FourierFT(n_frequency=5, target_modules=["0"])), randn(3, 8)
    members = [net.init(params, s) for s in range(3)]
    want = [net(params, m, x) for m in members]
    monkeypatch.setattr(fourierft, "_LARGE", 0)
    monkeypatch.setattr(fourierft, "transform", None)
    for member, y in zip(members, want, strict=True):
        torch.testing.assert_close(net(params, member, x), y)
    torch.testing.assert_close(torch.func.vmap(lambda a: net(params, a, x))(stack(members)), torch.stack(want))
    run = torch.compile(lambda a: net(params, a, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(members[0]), want[0])


def test_fourierft_leaves_in_half_precision_are_widened():
    model, params = functionalize(nn.Sequential(nn.Linear(8, 6)).to(torch.bfloat16))
    net = adapt(model, FourierFT(n_frequency=5, target_modules=["0"]))
    adapter = net.init(params, 0, dtype=torch.bfloat16)
    assert adapter.params["0"]["c"].dtype == torch.bfloat16
    assert net(params, adapter, torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"n_frequency": 0}, r"fourierft: n_frequency must be a positive integer, got 0"),
        ({"n_frequency_pattern": {"q": -1}}, r"fourierft: n_frequency must be a positive integer, got -1"),
        ({"random_loc_seed": None}, r"fourierft: random_loc_seed must be an integer, got None"),
        ({"bias": "some"}, r"fourierft: bias must be 'none', 'all' or 'fourier_only', got 'some'"),
    ],
)
def test_fourierft_refusals(fields, text):
    with pytest.raises(ValueError, match=text):
        FourierFT(**fields)


def test_fourierft_needs_no_more_frequencies_than_entries():
    model, _ = functionalize(nn.Sequential(nn.Linear(8, 6)))
    text = r"fourierft at '0': n_frequency must be at most out \* in = 48, got 1000; see n_frequency_pattern"
    with pytest.raises(ValueError, match=text):
        adapt(model, FourierFT(target_modules=["0"]))
    assert FourierFT(n_frequency_pattern={"q": 3}).count("a.q") == 3


# -- LNTuning ----------------------------------------------------------------------------------------------------------


def test_lntuning_trains_the_norms_of_an_architecture():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=16
    )
    model, params = functionalize(LlamaForCausalLM(config))
    net = adapt(model, LNTuning())
    adapter = net.init(params, 0)
    norms = ["model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight", "model.norm.weight"]
    assert sorted(adapter.params) == norms
    ids = torch.arange(6)[None]
    torch.testing.assert_close(net(params, adapter, ids).logits, model(params, ids).logits)
    doubled = adapter.replace(params={p: {"value": 2 * t["value"]} for p, t in adapter.params.items()})
    by_hand = model({**params, **{p: 2 * params[p] for p in norms}}, ids).logits
    torch.testing.assert_close(net(params, doubled, ids).logits, by_hand)


def test_lntuning_takes_scale_and_shift():
    model, params = functionalize(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    net = adapt(model, LNTuning(target_modules=["1"]))
    assert set(net.init(params, 0).params) == {"1.weight", "1.bias"}

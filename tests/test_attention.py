"""Fused attention under transforms: the kernel against torch's plain one, and transformers' models against a loop over members.

Wherever members are mapped, torch's warning that it falls back to a loop is an error.
"""

import warnings

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
import zoo
from torch import nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import BertConfig, BertModel, FalconConfig, FalconForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig
from transformers.models.falcon.modeling_falcon import FalconAttention

from funcpeft import attention as tested
from funcpeft.adapt import adapt
from funcpeft.attention import NAME, attention, choose_attention
from funcpeft.functional import functionalize
from funcpeft.methods.lora import LoRA
from funcpeft.stacking import stack


@pytest.fixture(autouse=True)
def no_fallback():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="There is a performance drop")
        yield


@pytest.fixture(params=["fused", "plain"])
def way(request, monkeypatch):
    """Sends every shape through the kernel, or through plain operations."""
    monkeypatch.setattr(tested, "PLAIN_UP_TO", 0 if request.param == "fused" else 2**30)


def near(got, want, rtol=1e-9, atol=1e-11):
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# -- the function ----------------------------------------------------------------------------------------------------------


def by_torch(*args, **kwargs):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def double(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(case):
    """Returns three members of ``(query, key, value[, mask])`` with grouped heads, and the other arguments."""
    tokens, length = (4, 4) if case == "causal" else (3, 5)
    qkv = double(3, 2, 4, tokens, 6), double(3, 2, 2, length, 6, seed=1), double(3, 2, 2, length, 6, seed=2)
    mask = {"bias": double(3, 1, 4, tokens, length, seed=3), "rows": double(3, 2, 1, 1, length, seed=4)}
    return (*qkv, *([mask[case]] if case in mask else [])), {"enable_gqa": True, "is_causal": case == "causal", "scale": 0.3}


def sines(tree):
    return sum(t.sin().sum() for t in pytree.tree_leaves(tree))


def every(args):
    return tuple(range(len(args)))


def gradient(f):
    return lambda *a: grad(lambda *b: f(*b).square().sum(), every(a))(*a)


def second(f):
    return lambda *a: grad(lambda *b: sines(gradient(f)(*b)), every(a))(*a)


def tangent(f):
    return lambda *a: jvp(f, a, tuple(t.cos() for t in a))[1]


def partly(f):
    """Differentiates by the query inside, by everything else outside."""
    return lambda *a: grad(lambda *b: grad(lambda q: f(q, *b).square().sum())(a[0]).sin().sum(), every(a[1:]))(*a[1:])


def pulled_back(f):
    def run(*a):
        out, back = vjp(f, *a)
        return vmap(back)(torch.stack([out.sin(), out.cos()]))

    return run


def by_autograd(f):
    def run(*a):
        leaves = [t.detach().clone().requires_grad_() for t in a]
        first = torch.autograd.grad(vmap(f)(*leaves).square().sum(), leaves, create_graph=True)
        return first, torch.autograd.grad(sines(first), leaves)

    return run


ONE = {  # of one member
    "gradient": gradient,
    "second": second,
    "third": lambda f: gradient(lambda *a: sines(second(f)(*a))),
    "partly": partly,
    "jacrev": lambda f: jacrev(f, (0, 1, 2)),
    "jacrev-jacrev": lambda f: jacrev(jacrev(lambda *a: f(*a).square().sum())),
    "jacfwd": jacfwd,
    "hessian": lambda f: hessian(lambda *a: f(*a).square().sum()),
    "jvp": tangent,
    "jvp-jvp": lambda f: tangent(tangent(f)),
    "jvp-gradient": lambda f: tangent(gradient(f)),
    "jvp-second": lambda f: tangent(second(f)),
    "gradient-jvp": lambda f: gradient(tangent(f)),
    "jvp-jvp-gradient": lambda f: tangent(tangent(gradient(f))),
    "vmap-vjp": pulled_back,
}
MANY = {  # of three
    "vmap": vmap,
    "vmap-last": lambda f: lambda *a: vmap(f, -1, -1)(*(t.movedim(0, -1).contiguous() for t in a)),
    "vmap-query": lambda f: lambda *a: vmap(f, (0, *(None,) * (len(a) - 1)))(a[0], *(t[0] for t in a[1:])),
    "vmap-key": lambda f: lambda *a: vmap(f, (None, 0, *(None,) * (len(a) - 2)))(a[0][0], a[1], *(t[0] for t in a[2:])),
    "vmap-vmap": lambda f: lambda *a: vmap(vmap(f))(*(torch.stack([t, t.sin()], 1) for t in a)),
    "vmap-gradient": lambda f: vmap(gradient(f)),
    "vmap-vmap-gradient": lambda f: lambda *a: vmap(vmap(gradient(f)))(*(torch.stack([t, t.sin()], 1) for t in a)),
    "gradient-vmap": lambda f: gradient(vmap(f)),
    "vmap-second": lambda f: vmap(second(f)),
    "vmap-jacrev": lambda f: vmap(jacrev(f)),
    "vmap-jvp": lambda f: vmap(tangent(f)),
    "jvp-vmap": lambda f: tangent(vmap(f)),
    "vmap-jvp-gradient": lambda f: vmap(tangent(gradient(f))),
    "autograd": by_autograd,
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("case", ["all", "causal", "bias", "rows"])
@pytest.mark.parametrize("name", [*ONE, *MANY])
def test_every_transform_is_that_of_the_plain_kernel(name, case):
    args, kwargs = drawn(case)
    transform = MANY.get(name) or ONE[name]
    if name in ONE:
        args = tuple(t[0] for t in args)
    got = transform(lambda *a: attention(*a, **kwargs))(*args)
    near(got, transform(lambda *a: by_torch(*a, **kwargs))(*args))


def test_forward_mode_over_a_pullback_made_outside_of_it_is_refused(monkeypatch):
    monkeypatch.setattr(tested, "PLAIN_UP_TO", 0)
    args = tuple(t[0] for t in drawn("all")[0])
    out, back = vjp(lambda *a: attention(*a, enable_gqa=True), *args)
    with pytest.raises(NotImplementedError, match=r"You must implement the jvp function for custom autograd.Function"):
        jvp(back, (out,), (out,))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (1, 3, 5), (3, 2, 4, 3, 5)])
def test_a_boolean_mask_hides_and_a_token_that_sees_nothing_gets_zero(shape, dtype):
    qkv, kwargs = drawn("all")
    qkv = tuple(t.to(dtype) for t in qkv)
    mask = double(*shape, seed=7) > 0
    mask[..., 0, :] = False
    if len(shape) == 3:
        mask, dims = mask[0], (0, 0, 0, None)
    else:
        dims = (0, 0, 0, 0 if len(shape) == 5 else None)
    mapped = vmap(lambda q, k, v, m: attention(q, k, v, m, **kwargs), dims)(*qkv, mask)
    assert not mapped[..., 0, :].any()
    assert mapped.dtype == dtype
    members = [mask[i] if dims[3] == 0 else mask for i in range(3)]
    want = [F.scaled_dot_product_attention(*(t[i] for t in qkv), m, **kwargs) for i, m in enumerate(members)]
    tolerance = 8 * torch.finfo(dtype).eps
    near(mapped, torch.stack(want), tolerance, tolerance)
    first = vmap(lambda q, k, v, m: gradient(lambda *a: attention(*a, m, **kwargs))(q, k, v), dims)(*qkv, mask)
    assert all(t.isfinite().all() for t in first)


def test_where_torch_takes_another_kernel_it_is_called():
    args, kwargs = drawn("all")
    q, k, v = (t[0].float() for t in args)
    same = {"enable_gqa": True}
    cases = {
        "value's head": ((q, k, torch.cat([v, v], -1)), same),
        "no batch": ((q[0, :2], k[0], v[0]), {}),
        "a mask per head alone": ((q, k, v, torch.zeros(4, 3, 5)), same),
        "no tokens": ((q[:, :, :0], k, v), same),
        "other batches": ((q, k[:1], v[:1]), same),
    }
    for name, (given, more) in cases.items():
        assert torch.equal(attention(*given, **more), F.scaled_dot_product_attention(*given, **more)), name
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.equal(attention(q, k, v, **kwargs), by_torch(q, k, v, **kwargs))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(q, k, v, **same), F.scaled_dot_product_attention(q, k, v, **same))
    assert attention(q.to("meta"), k.to("meta"), v.to("meta"), **same).shape == q.shape
    torch.manual_seed(0)
    got = attention(q, k, v, dropout_p=0.5, **same)
    torch.manual_seed(0)
    assert torch.equal(got, F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, **same))


@pytest.mark.usefixtures("way")
def test_a_mask_and_causal_together_hide_what_either_hides():
    q, k, v = (t[0] for t in drawn("causal")[0])
    bias = double(4, 4, seed=5)
    want = by_torch(q, k, v, bias.masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf), enable_gqa=True)
    got = vmap(lambda q: attention(q, k, v, bias, 0.0, True, enable_gqa=True))(q[None])[0]
    near(got, want)
    near(F.scaled_dot_product_attention(q, k, v, bias, 0.0, True, enable_gqa=True), want)


@pytest.mark.parametrize("over", [lambda f: f, gradient])
def test_the_kernel_is_given_rows_that_it_can_read(over, monkeypatch):
    monkeypatch.setattr(tested, "PLAIN_UP_TO", 0)
    args = tuple(double(1, 2, 5, 6, 3, seed=i) for i in range(3))  # one row of three members, mapped over the last axis

    def member_last(f):
        return vmap(over(lambda q, k, v: f(q, k, v).mT.contiguous().mT), -1, -1)(*args)

    near(member_last(attention), member_last(by_torch))


def test_torch_itself_falls_back_to_a_loop():
    q, k, v = drawn("all")[0]
    with pytest.raises(UserWarning, match="batching rule for aten::_scaled_dot_product_flash_attention_for_cpu"):
        vmap(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True))(q, k, v)


# -- transformers' models --------------------------------------------------------------------------------------------------

MODELS = ("llama", "qwen3", "gemma3", "gpt2", "opt", "t5", "bert", "vit", "clip", "whisper")
LENGTH = 36  # tokens, so that scores are more than go the plain way; the image models have few


def population(name, dtype=torch.float64, count=3, layers=2, **targets):
    """Returns ``(model, params, net, members)``, the members away from their init."""
    model, params = functionalize(zoo.model(name, layers))
    params = {k: t.to(dtype) if t.is_floating_point() else t for k, t in params.items()}
    net = adapt(model, LoRA(r=2, **(targets or {"target_modules": zoo.targets(name)})))
    members = []
    for seed in range(count):
        one, g = net.init(params, seed=seed, dtype=dtype), torch.Generator().manual_seed(seed)
        leaves = {
            p: {n: t + 0.1 * torch.randn(t.shape, generator=g).to(dtype) for n, t in own.items()}
            for p, own in one.params.items()
        }
        members.append(one.replace(params=leaves))
    return model, params, net, members


def batches(name, dtype, count=3):
    """Returns inputs of each member, with a mask where a model reads text: one row padded left, one right, one member not."""
    made, length = [], 24 if name in ("clip", "whisper") else LENGTH  # these two have no more positions
    for i in range(count):
        x = {k: t.to(dtype) if t.is_floating_point() else t for k, t in zoo.inputs(name, 2, length, seed=i).items()}
        if "input_ids" in x:
            x["attention_mask"] = torch.ones(2, length, dtype=torch.long)
            if i:
                x["attention_mask"][0, : 2 * i] = 0
                x["attention_mask"][1, -3 * i :] = 0
        made.append(x)
    return made


def stacked(trees):
    return pytree.tree_map(lambda *t: torch.stack(t), *trees)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, torch.float64) for n in MODELS]
    + [(n, d) for n in ("llama", "gpt2", "bert", "t5", "vit") for d in (torch.float32, torch.bfloat16)],
)
def test_members_with_inputs_and_masks_of_their_own_are_a_loop(name, dtype):
    inputs = batches(name, dtype)
    _, params, net, members = population(name, dtype)

    def call(adapter, x):
        return zoo.leading(net(params, adapter, **x))

    def loss(trained, adapter, x):
        return call(adapter.replace(params=trained), x).float().square().mean()

    many = stack(members)
    scale = 200 if dtype == torch.bfloat16 else 1e4
    tolerance = scale * torch.finfo(dtype).eps

    def close(got, want):
        for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))

    close(vmap(call)(many, stacked(inputs)), stacked([call(a, x) for a, x in zip(members, inputs, strict=True)]))
    wants = stacked([grad(loss)(a.params, a, x) for a, x in zip(members, inputs, strict=True)])
    close(vmap(grad(loss))(many.params, many, stacked(inputs)), wants)


def text(net, params):
    return lambda adapter, ids, **more: net(params, adapter, input_ids=ids, use_cache=False, **more).logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_gradient_of_a_gradient_is_that_of_the_plain_kernel(name):
    _, params, net, members = population(name)

    def meta(adapter, x):
        def loss(trained):
            return zoo.leading(net(params, adapter.replace(params=trained), **x)).square().mean()

        return grad(lambda trained: sines(grad(loss)(trained)))(adapter.params)

    x = batches(name, torch.float64)
    mapped = vmap(meta)(stack(members), stacked(x))
    with sdpa_kernel(SDPBackend.MATH):
        near(mapped, stacked([meta(a, y) for a, y in zip(members, x, strict=True)]))


def test_an_adapted_position_bias_has_its_gradient():
    _, params, net, members = population("t5", target_modules=["relative_attention_bias", "q"])
    x = {k: t[:, :LENGTH] for k, t in batches("t5", torch.float64, 1)[0].items()}

    def loss(trained, adapter):
        return net(params, adapter.replace(params=trained), **x).logits.square().mean()

    got = vmap(grad(loss))(stack(members).params, stack(members))
    for i, one in enumerate(members):
        leaves = pytree.tree_map(lambda t: t.clone().requires_grad_(), one.params)
        flat, spec = pytree.tree_flatten(leaves)
        want = pytree.tree_unflatten(torch.autograd.grad(loss(leaves, one), flat), spec)
        near(pytree.tree_map(lambda t, i=i: t[i], got), want, 1e-8, 1e-10)
        assert all(t.abs().sum() > 0 for path, own in want.items() if "bias" in path for t in own.values())


def test_a_cache_and_a_mask_of_each_members_own_decode_as_alone():
    for name in ("llama", "gemma3"):
        _, params, net, members = population(name)
        prefix, following, mask = zoo.ids(2, 40), zoo.ids(2, 1, seed=4), torch.ones(3, 2, 41, dtype=torch.long)
        mask[1, 0, :5] = mask[2, 1, :9] = 0

        def prefill(a, m, net=net, params=params, ids=prefix):
            return net(params, a, input_ids=ids, attention_mask=m[:, :-1]).past_key_values

        def decode(a, m, cache, net=net, params=params, ids=following):
            return net(params, a, input_ids=ids, attention_mask=m, past_key_values=cache).logits

        got = vmap(lambda a, m: decode(a, m, prefill(a, m)))(stack(members), mask)
        near(got, stacked([decode(a, m, prefill(a, m)) for a, m in zip(members, mask, strict=True)]))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "t5", "whisper"])
def test_generate_is_the_modules(name):
    module, (model, params) = zoo.model(name), zoo.functional(name)
    x = zoo.inputs(name, length=8)
    x.pop("decoder_input_ids", None)
    if "input_ids" in x:
        x["attention_mask"] = torch.ones(2, 8, dtype=torch.long)
        x["attention_mask"][0, :3] = 0
    for more in ({}, {"num_beams": 2}):
        chosen = {"max_new_tokens": 6, "do_sample": False, **more}
        assert torch.equal(model.call("generate", params, **x, **chosen), module.generate(**x, **chosen))


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_models_compile_whole_with_and_without_transforms(name):
    _, params, net, members = population(name, torch.float32, layers=1)
    x, call = zoo.ids(1, 6), text(net, params)
    mask = torch.ones(3, 1, 6, dtype=torch.long)
    mask[1, :, :2] = 0

    def loss(trained, adapter, mask):
        return call(adapter.replace(params=trained), x, attention_mask=mask).square().mean()

    def compiled(f):
        torch._dynamo.reset()
        return torch.compile(f, fullgraph=True, backend="aot_eager")

    assert torch.equal(compiled(lambda a: call(a, x))(members[0]), call(members[0], x))
    mapped = vmap(grad(loss))
    args = stack(members).params, stack(members), mask
    near(compiled(mapped)(*args), mapped(*args), 1e-4, 1e-6)


# -- who takes it ----------------------------------------------------------------------------------------------------------


def chosen(model):
    return {
        m.config._attn_implementation
        for m in model.root.modules()
        if hasattr(getattr(m, "config", None), "_attn_implementation")
    }


@pytest.mark.parametrize("name", MODELS)
def test_outside_of_a_transform_transformers_own_function_is_called(name, monkeypatch):
    module = zoo.model(name)
    model, params = functionalize(module)
    assert chosen(model) == {NAME}
    assert model.config is not module.config
    assert {m.config._attn_implementation for m in module.modules() if hasattr(m, "config")} == {"sdpa"}
    monkeypatch.setattr(tested, "attention", None)
    x = zoo.inputs(name)
    for a, b in zip(pytree.tree_leaves(model(params, **x)), pytree.tree_leaves(module(**x)), strict=True):
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


def test_another_choice_is_kept():
    config = BertConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8)
    for choice in ("eager", "flex_attention"):
        model, _ = functionalize(BertModel._from_config(config, attn_implementation=choice))
        assert chosen(model) == {choice}
    clip = zoo.MAKERS["clip"](1)
    clip.text_model.config._attn_implementation = "eager"
    model, _ = functionalize(clip)
    assert model.config._attn_implementation == NAME
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == NAME


def reads_the_name():
    sizes = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    gemma = {"num_key_value_heads": 1, "head_dim": 8, "global_head_dim": 8, "intermediate_size": 16}
    layered = {"vocab_size_per_layer_input": 20, "hidden_size_per_layer_input": 4}
    return {
        "falcon": FalconForCausalLM(FalconConfig(**sizes)),  # eager attention for every name but "sdpa", of its own
        "gemma4": Gemma4ForCausalLM(Gemma4TextConfig(**sizes, **gemma, **layered)),  # drops tokens unless it is "sdpa"
    }


def test_a_forward_from_another_file_counts():
    class Derived(FalconAttention):
        def __init__(self, config):
            nn.Module.__init__(self)
            self.config = config

    Derived.__module__ = "zoo"  # this file compares the name too
    layer = Derived(FalconConfig(attn_implementation="sdpa"))
    choose_attention(layer)
    assert layer.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["falcon", "gemma4"])
def test_a_model_that_reads_the_name_keeps_it(name):
    module = reads_the_name()[name].eval()
    model, params = functionalize(module)
    assert chosen(model) == {"sdpa"}
    ids = torch.arange(6)[None]
    assert torch.equal(model(params, input_ids=ids).logits, module(input_ids=ids).logits)


def test_a_class_without_source_and_a_config_of_another_library_are_left_alone():
    class Told(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config = config

    for name in ("", "none.such"):
        Told.__module__ = name
        config = BertConfig()
        config._attn_implementation = "sdpa"
        choose_attention(Told(config))
        assert config._attn_implementation == "sdpa"
    choose_attention(Told({"_attn_implementation": "sdpa"}))

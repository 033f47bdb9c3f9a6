"""Recomputed blocks: the same values and gradients as without, under every transform; nothing is kept, nothing leaks."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
import zoo
from herds import agree, leaves
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import funcpeft as fp
from funcpeft.testing.cases import perturbed

LORA = {"r": 2, "lora_dropout": 0.3}


@functools.cache
def module(name):
    m = copy.deepcopy(zoo.model(name))
    return m if name == "mixtral" else m.double()  # its grouped products take no float64


@functools.cache
def both(name, method=None, quantized=False):
    """Returns a net on the model as it is, one on the model with recomputed blocks, params and members."""
    plain, params = fp.functionalize(module(name))
    remat, _ = fp.functionalize(module(name), remat=True)
    if quantized:
        params = fp.quantize(plain, params, fp.NF4(), target_modules="all-linear")
    method = method or fp.LoRA(target_modules=zoo.targets(name), **LORA)
    nets = [fp.adapt(m, method) for m in (plain, remat)]
    ads = [perturbed(nets[0].init(params, seed=s), s, 0.3) for s in range(3)]
    for n in nets:
        n.init(params, seed=0)
    kw = {k: v.double() if v.is_floating_point() and name != "mixtral" else v for k, v in zoo.inputs(name).items()}
    return SimpleNamespace(nets=nets, models=(plain, remat), params=params, ads=ads, many=fp.stack(ads), kw=kw)


def loss(net, p, adapter, context=fp.Context(), **kw):  # noqa: B008  # immutable
    return zoo.leading(net(p.params, adapter, **p.kw, **kw, context=context)).square().mean()


TRAINING = fp.Context(training=True, seed=5)
ARCHITECTURES = [n for n in zoo.ARCHITECTURES if n != "mamba"]


# -- values and gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ARCHITECTURES, "mamba"])
def test_values_and_gradients_are_those_without(name):
    p, tolerance = both(name), 1e-5 if name == "mixtral" else 1e-10
    assert p.models[1].remat
    found = []
    for net in p.nets:
        with torch.no_grad():
            held = zoo.leading(net(p.params, p.ads[0], **p.kw))
        out = zoo.leading(net(p.params, p.ads[0], **p.kw))
        assert torch.equal(out, held)
        value, grads = fp.value_and_grad(lambda a, net=net: loss(net, p, a, TRAINING))(p.ads[0])
        under = torch.func.grad(lambda t, net=net: loss(net, p, p.ads[0].replace(params=t), TRAINING))(p.ads[0].params)
        found.append((out, value, grads, under))
    assert torch.equal(found[0][0], found[1][0])
    agree(found[1], found[0], tolerance)


@pytest.mark.parametrize("name", ["gpt2", "bert"])  # in float64 throughout, where a Llama takes its norms in float32
def test_gradients_under_vmap_and_of_gradients(name):
    p, seeds = both(name), torch.tensor([5, 6, 7])
    extra = {"use_cache": False} if name == "gpt2" else {}

    def grads(net):
        def one(params, consts, seed):
            context = fp.Context(training=True, seed=seed)
            f = lambda t: loss(net, p, fp.Adapter(t, consts, p.many.rank_axes), context, **extra)  # noqa: E731
            return torch.func.grad(f)(params)

        return torch.func.vmap(one)(p.many.params, p.many.consts, seeds)

    agree(grads(p.nets[1]), grads(p.nets[0]))

    def product(net):
        f = lambda t: loss(net, p, p.ads[0].replace(params=t), TRAINING, **extra)  # noqa: E731
        inner = lambda t: sum(g.sum() for g in leaves(torch.func.grad(f)(t)))  # noqa: E731
        return torch.func.grad(inner)(p.ads[0].params)

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        agree(product(p.nets[1]), product(p.nets[0]))


@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_populations(name, quantized):
    p = both(name, None, quantized)
    context = fp.Context(training=True, seed=torch.tensor([3, 4, 5]))

    def f(net, strategy="fold"):
        def g(many):
            out = fp.apply_many(net, p.params, many, in_dims=None, context=context, strategy=strategy, **p.kw)
            return zoo.leading(out).square().mean((1, 2, 3)).sum()

        return g

    agree(fp.value_and_grad(f(p.nets[1]))(p.many), fp.value_and_grad(f(p.nets[0]))(p.many))
    agree(fp.value_and_grad(f(p.nets[1]))(p.many), fp.value_and_grad(f(p.nets[0], "loop"))(p.many))
    under = [torch.func.grad(lambda t, n=n: f(n)(p.many.replace(params=t)))(p.many.params) for n in p.nets]
    agree(*under)


def test_units_in_blocks():
    p = both("llama", fp.LNTuning(target_modules=["input_layernorm", "norm"]))

    def f(net):
        return lambda a: fp.apply_many(net, p.params, a, in_dims=None, use_cache=False, **p.kw).logits.square().mean()

    agree(fp.value_and_grad(f(p.nets[1]))(p.many), fp.value_and_grad(f(p.nets[0]))(p.many))


@functools.cache
def albert():
    from transformers import AlbertConfig, AlbertModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "embedding_size": 16, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 96}
    return AlbertModel(AlbertConfig(num_hidden_layers=3, **shape)).eval().requires_grad_(False).double()


def test_a_block_that_several_layers_share():
    found, ids = [], zoo.ids(2, 5)
    for which in (False, ["albert_layers.0"]):
        model, params = fp.functionalize(albert(), remat=which)
        net = fp.adapt(model, fp.LoRA(target_modules=["query", "ffn"], **LORA))
        ad = perturbed(net.init(params, seed=0), 0, 0.3)

        def f(a, net=net, params=params):
            return net(params, a, input_ids=ids, context=TRAINING).last_hidden_state.square().mean()

        found.append((fp.value_and_grad(f)(ad), torch.func.grad(lambda t, ad=ad, f=f: f(ad.replace(params=t)))(ad.params)))
    agree(found[1], found[0])


# -- caches ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_is_untouched(name):
    p = both(name)
    kw = {"input_ids": zoo.ids(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    kw |= {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    texts = [n.call("generate", p.params, p.ads[0], **kw) for n in p.nets]
    assert torch.equal(*texts)
    many = [fp.apply_many(n, p.params, p.many, in_dims=None, call="generate", **kw) for n in p.nets]
    assert torch.equal(*many)
    assert torch.equal(many[1][0], texts[0])


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_cache_is_filled_and_read(name, grad):
    p, ids = both(name), zoo.ids(2, 6)
    found = []
    with torch.set_grad_enabled(grad):
        for net in p.nets:
            first = net(p.params, p.ads[0], input_ids=ids[:, :4], use_cache=True)
            second = net(p.params, p.ads[0], input_ids=ids[:, 4:], past_key_values=copy.deepcopy(first.past_key_values))
            found.append((first.logits, second.logits))
    agree(found[1], found[0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_no_cache_is_returned_where_gradients_are_recorded_unless_asked_for(name):
    p, ids = both(name), zoo.ids(2, 6)
    assert p.nets[1](p.params, p.ads[0], input_ids=ids).past_key_values is None
    with torch.no_grad():
        assert p.nets[1](p.params, p.ads[0], input_ids=ids).past_key_values.get_seq_length() == 6


# -- which modules, and what a block may write -------------------------------------------------------------------------------


class Counts(nn.Module):
    """Writes attributes of its own."""

    def __init__(self):
        super().__init__()
        self.lin, self.count, self.last = nn.Linear(6, 6), 0, None

    def forward(self, x):
        self.count, self.last = self.count + 1, x
        return torch.tanh(self.lin(x)) * self.count


class Net(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block, self.out = block, nn.Linear(6, 4)

    def forward(self, x):
        return self.out(self.block(x))


def test_what_a_block_writes_is_not_kept():
    torch.manual_seed(0)
    made, x = Net(Counts()).double(), zoo.noise(3, 6).double()
    model, params = fp.functionalize(made, remat=["block"])
    trained = {k: v.clone().requires_grad_() for k, v in params.items()}
    with torch.no_grad():
        want = model(params, x)
    for _ in range(3):
        out = model(trained, x)
        assert torch.equal(out, want)
        out.sum().backward()
    for skeleton in (s for pool in model._pools.values() for s in pool):
        assert (skeleton.module.block.count, skeleton.module.block.last) == (0, None)


def test_an_error_in_a_block_leaves_nothing():
    class Fussy(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 6)

        def forward(self, x):
            if x.shape[0] == 2:
                raise ArithmeticError("two rows")
            return self.lin(x)

    model, params = fp.functionalize(Net(Fussy()).double(), remat=["block"])
    trained = {k: v.clone().requires_grad_() for k, v in params.items()}
    with pytest.raises(ArithmeticError, match="two rows"):
        model(trained, zoo.noise(2, 6).double())
    for skeleton in (s for pool in model._pools.values() for s in pool):
        assert all(holder[name].is_meta for holder, name, _ in skeleton.slots)
    with torch.no_grad():
        want = model(params, zoo.noise(3, 6).double())
    assert torch.equal(model(trained, zoo.noise(3, 6).double()), want)


@pytest.mark.parametrize(
    "which", [["layers.0"], "layers.1", ["layers.0", r"layers\.1"], True, ["layers"], ["layers.0.mlp", "layers.0"]]
)
def test_blocks_by_name(which):
    model, params = fp.functionalize(module("llama"))
    other = model.replace(remat=which)
    assert model.remat == ()
    assert set(other.remat) <= {"model.layers", "model.layers.0", "model.layers.1"}
    kw = {"input_ids": zoo.ids(2, 5), "use_cache": False}
    trained = {k: v if k in model.buffers else v.clone().requires_grad_() for k, v in params.items()}
    results = []
    for m in (model, other):
        out = m(trained, **kw).logits
        results.append((out, torch.autograd.grad(out.square().mean(), [t for t in trained.values() if t.requires_grad])))
    agree(results[1], results[0])
    assert other.replace(remat=False).remat == ()


@pytest.mark.parametrize(
    ("which", "text"),
    [
        (["layers.0", "layer.7"], "LlamaForCausalLM: remat must name modules of the model, got 'layer.7'"),
        ("block", "remat must name modules of the model, got 'block'"),
        ([], "LlamaForCausalLM: remat"),
    ],
)
def test_unknown_names_are_refused(which, text):
    with pytest.raises(ValueError, match=text):
        fp.functionalize(module("llama"), remat=which)
    model, _ = fp.functionalize(module("llama"))
    with pytest.raises(ValueError, match=text):
        model.replace(remat=which)


def test_a_module_without_layers_of_transformers_must_name_them():
    with pytest.raises(
        ValueError, match=r"Net: remat=True needs transformers' layers, got 'none'; name the modules to recompute"
    ):
        fp.functionalize(Net(nn.Linear(6, 6)), remat=True)

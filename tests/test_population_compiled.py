"""Populations under ``torch.compile(fullgraph=True)`` equal the eager call, also where an index is known at run time only."""

import copy
import functools

import pytest
import torch
import zoo
from herds import agree, population
from torch import nn

import funcpeft as fp


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def compiled(f):
    return torch.compile(f, fullgraph=True, backend="aot_eager")


@functools.cache
def double(name):
    return copy.deepcopy(zoo.model(name, 1)).double()


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
CASES = {
    "llama": (fp.LoRA(r=2, target_modules=["q_proj", "down_proj"]), {}),
    "llama-unit": (fp.LNTuning(target_modules=["input_layernorm", "norm"]), {"use_cache": False}),
    "llama-prompt": (fp.PromptTuning(num_virtual_tokens=2, task_type="CAUSAL_LM"), {}),
    "bert-mask": (fp.LoRA(r=2, target_modules=["query"]), {"attention_mask": MASK}),
    "gpt2-ia3": (fp.IA3(target_modules=["c_attn"], feedforward_modules=[]), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_many(name):
    method, kw = CASES[name]
    p, ids = population(double(name.split("-")[0]), method), zoo.ids(2, 5)

    def f(many, ids):
        return zoo.leading(fp.apply_many(p.net, p.params, many, in_dims=None, input_ids=ids, **kw))

    want = f(p.many, ids)
    agree(compiled(f)(p.many, ids), want)
    agree(list(want), [zoo.leading(p.net(p.params, a, input_ids=ids, **kw)) for a in p.ads])


def test_gradients_and_seeds():
    p, ids = population(double("llama"), fp.LoRA(r=2, lora_dropout=0.5, target_modules=["q_proj"])), zoo.ids(2, 5)

    def f(params, ids, seed):
        context = fp.Context(training=True, seed=seed)
        stack = p.many.replace(params=params)
        return fp.apply_many(p.net, p.params, stack, in_dims=None, input_ids=ids, context=context).logits.square().mean()

    g = torch.func.grad(f)
    g(p.many.params, ids, torch.tensor([1, 2, 3]))
    c = compiled(g)
    for seed in (torch.tensor([1, 2, 3]), torch.tensor([7, 8, 9])):
        agree(c(p.many.params, ids, seed), g(p.many.params, ids, seed))


@pytest.mark.parametrize("name", ["llama", pytest.param("llama-unit", marks=pytest.mark.slow)])
def test_routed(name):
    method, kw = CASES[name]
    p, ids = population(double("llama"), method), zoo.ids(4, 5)

    def f(index, many, ids):
        return fp.apply_routed(p.net, p.params, many, index, input_ids=ids, **kw).logits

    indices = [torch.tensor(i) for i in ([2, 0, 2, 1], [1, 1, 1, 0], [-1, 2, -1, 0], [-1, -1, -1, -1])]
    f(indices[0], p.many, ids)
    c = compiled(f)
    for index in indices:
        agree(c(index, p.many, ids), f(index, p.many, ids))


def test_routed_prompts_are_refused_where_the_index_is_not_known():
    method, kw = CASES["llama-prompt"]
    p, ids = population(double("llama"), method), zoo.ids(2, 5)

    def f(index, ids):
        return fp.apply_routed(p.net, p.params, p.many, index, input_ids=ids, **kw).logits

    f(torch.tensor([0, 1]), ids)
    with pytest.raises(Exception, match="the values of index must be known"):
        compiled(f)(torch.tensor([0, 1]), ids)


def test_routed_dropout_draws_as_single_rows():
    p, x = (
        population(nn.Sequential(nn.Linear(6, 4)).double(), fp.LoRA(r=2, lora_dropout=0.5, target_modules=["0"])),
        zoo.noise(5, 6).double(),
    )
    context, index = fp.Context(training=True, seed=torch.tensor([4, 5, 6])), torch.tensor([2, 0, 2, -1, 0])

    def f(index, x):
        return fp.apply_routed(p.net, p.params, p.many, index, x, context=context)

    f(index, x)
    want = [f(index[i : i + 1], x[i : i + 1]) for i in range(5)]
    agree(compiled(f)(index, x), torch.cat(want))


class Elsewhere(nn.Module):
    """Rows on the second axis."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 4)

    def forward(self, x):
        return self.lin(x).cumsum(0)


class Twice(Elsewhere):
    """Two entries for every row."""

    def forward(self, x):
        return self.lin(x).repeat_interleave(2, 0)


class Number(Elsewhere):
    """A number that all rows share."""

    def forward(self, x):
        return self.lin(x), torch.tensor(7)


@pytest.mark.parametrize("make", [Elsewhere, Twice, Number])
def test_routed_outputs_keep_their_form(make):
    torch.manual_seed(0)
    p, index = population(make().double(), fp.LoRA(r=2, target_modules=["lin"])), torch.tensor([0, -1, 2, 0])
    axis = 1 if make is Elsewhere else 0
    x = zoo.noise(4, 4, 6).double() if axis else zoo.noise(4, 6).double()

    def f(index, x):
        return fp.apply_routed(p.net, p.params, p.many, index, x, batch_dims=axis)

    want = f(index, x)
    agree(compiled(f)(index, x), want)


def test_without_an_eager_call_before():
    p, ids = population(double("llama"), CASES["llama"][0]), zoo.ids(2, 5)

    def f(many, ids):
        return fp.apply_many(p.net, p.params, many, in_dims=None, input_ids=ids).logits

    got = compiled(f)(p.many, ids)
    agree(got, f(p.many, ids))


class Reads(nn.Module):
    """Meets a layer, and reads its weight beside it."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 6)

    def forward(self, x):
        return self.lin(x) @ self.lin.weight


def test_a_weight_that_is_read_beside_its_layer():
    p = population(nn.Sequential(Reads(), nn.Tanh()).double(), fp.LoRA(r=2, target_modules=["0.lin"]))
    x = zoo.noise(3, 2, 6).double()

    def f(many, x):
        return fp.apply_many(p.net, p.params, many, x, strategy="fold")

    want = torch.stack([p.net(p.params, a, x[i]) for i, a in enumerate(p.ads)])
    agree(f(p.many, x), want)
    agree(compiled(f)(p.many, x), want)

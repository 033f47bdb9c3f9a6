"""Populations equal a loop over their members: values and gradients, folded or not, in float64; and refusals."""

import copy
import functools
import threading
import warnings
from types import SimpleNamespace

import hypothesis
import pytest
import torch
import torch.utils._pytree as pytree
import zoo
from hypothesis import strategies as st
from torch import Tensor, nn

import funcpeft as fp
from funcpeft import methods
from funcpeft.stacking import select
from funcpeft.testing.cases import Case, perturbed, same_bits
from funcpeft.tree import as_tuple

TIGHT = 1e-10


def own(outs):
    return [t for t in pytree.tree_leaves(outs) if isinstance(t, Tensor)]


def agree(got, want, tolerance=TIGHT):
    got, want = own(got), own(want)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        assert not w.numel() or (g.double() - w.double()).abs().max() <= tolerance * (1 + w.double().abs().max())


def at(tree, i):
    return pytree.tree_map(lambda t: t[i] if isinstance(t, Tensor) else t, tree)


def of(adapters, params):
    made = tuple(a.replace(params=p) for a, p in zip(as_tuple(adapters), params, strict=True))
    return made if isinstance(adapters, tuple) else made[0]


def loss(out):
    """Weighs every float of an output differently, members and rows too where they are not the first axis's."""
    return sum(
        ((t * torch.linspace(0.5, 1.5, t.shape[-1] if t.ndim else 1, dtype=t.dtype)) ** 2).sum()
        for t in own(out)
        if t.is_floating_point()
    )


def population(module, method, members=3, formats=None):
    """Makes a net on a module, and members; one method per member makes one net each, the first with the widest rank."""
    model, params = fp.functionalize(module)
    if formats is not None:
        params = fp.quantize(model, params, formats, target_modules="all-linear")
    several = method if isinstance(method, tuple) else (method,) * members
    made = {id(m): fp.adapt(model, m) for m in several}
    nets = [made[id(m)] for m in several]
    ads = [perturbed(n.init(params, seed=i), i, 0.3) for i, n in enumerate(nets)]
    return SimpleNamespace(model=model, params=params, net=nets[0], nets=nets, ads=ads, many=fp.stack(ads))


@functools.cache
def wide(name):
    module = copy.deepcopy(zoo.model(name))
    return module if name == "mixtral" else module.double()  # its grouped products take no float64


def lm(name, method, members=3, **kw):
    return population(wide(name), method, members, **kw)


def inputs(name, batch=2, seed=0):
    return {k: v.double() if v.is_floating_point() else v for k, v in zoo.inputs(name, batch, seed=seed).items()}


def tolerance(name):
    return 1e-5 if name == "mixtral" else TIGHT


def stacked_inputs(name, members=3):
    each = [inputs(name, seed=i) for i in range(members)]
    return {k: torch.stack([e[k] for e in each]) for k in each[0]}, each


QV = fp.LoRA(r=2, target_modules=["q_proj", "v_proj"])
TINY = fp.LoRA(r=2, target_modules=["0"])


def tiny(members=3, method=TINY):
    torch.manual_seed(0)
    return population(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4)).double(), method, members)


# -- every method at every layer kind ----------------------------------------------------------------------------------------

SIZES = ((4, 6), (6, 6), (8, 8), (4, 8), (12, 12))  # the first that a method's fields fit
EXAMPLES = [
    pytest.param(case, id=f"{name}{i}-{kind}")
    for name in methods.__all__
    for i, m in enumerate(getattr(methods, name).examples())
    for kind in (["call"] if m.wraps else sorted(m.kinds))
    if "many" not in m.waived
    if (case := next((c for size in SIZES if (c := Case(m, kind, *size)).fits()), None))
]


@pytest.mark.parametrize("case", EXAMPLES)
def test_methods_fold_at_every_kind(case):
    b = case.built()
    ads = [b.adapter(i) for i in range(3)]
    many = fp.stack(ads)
    x = torch.stack([b.x, b.x.flip(-1), b.x.roll(1, -1)])
    values = b.case.method.sample_values(b.x.shape[0])
    opts, context = b.options(), fp.Context(values={k: v.expand(3, *v.shape) for k, v in values.items()})

    def f(stack, strategy="fold"):
        return fp.apply_many(b.net, b.params, stack, x, strategy=strategy, context=context, **opts)

    for i, (a, one) in enumerate(zip(ads, x, strict=True)):
        agree(at(f(many), i), b.net(b.params, a, one, context=b.context(), **opts))
    params = tuple(a.params for a in as_tuple(many))
    grads = torch.func.grad(lambda p: loss(f(of(many, p))))(params)
    looped = torch.func.grad(lambda p: loss(f(of(many, p), "loop")))(params)
    agree(grads, looped, 1e-8)
    _, plain = fp.value_and_grad(lambda a: loss(f(a)))(many)
    agree(plain, looped, 1e-8)


# -- whole models ------------------------------------------------------------------------------------------------------------

MASK = {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])}
MODELS = {
    "llama": (QV, {}),
    "llama-masked": (QV, MASK),
    "llama-norms": (fp.LNTuning(target_modules=["input_layernorm", "norm"]), {"use_cache": False}),
    "llama-nested": ([QV, fp.IA3(target_modules=["v_proj"], feedforward_modules=[])], {}),
    "llama-saved": (fp.LoRA(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"]), {}),
    "llama-tokens": (fp.LoRA(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5]), {}),
    "llama_tied-tokens": (fp.TrainableTokens(token_indices=[3, 5, 7]), {}),
    "gemma3": (QV, {}),
    "gpt2-bias": (fp.LoRA(r=2, target_modules=["c_attn"], bias="all"), {"use_cache": False}),
    "gpt2-prefix": (fp.PrefixTuning(num_virtual_tokens=3, task_type="CAUSAL_LM"), {}),
    "llama-prompt": (fp.PromptTuning(num_virtual_tokens=3, task_type="CAUSAL_LM"), {}),
    "llama-ranks": (
        tuple(fp.LoRA(r=r, lora_alpha=a, target_modules=["q_proj", "v_proj"]) for r, a in ((4, 1), (1, 7), (2, 2))),
        {},
    ),
    "opt-masked": (fp.LoRA(r=2, target_modules=["q_proj", "fc2"]), MASK),
    "bert-masked": (fp.LoRA(r=2, target_modules=["query", "output.dense"]), MASK),
    "t5": (fp.LoRA(r=2, target_modules=["q", "wo"]), {}),
    "t5-masked": (fp.LoRA(r=2, target_modules=["q", "wo"]), MASK),
    "whisper": (fp.LoRA(r=2, target_modules=["q_proj", "fc2"]), {}),
    "vit": (fp.LoRA(r=2, target_modules=["q_proj", "projection"]), {}),
    "mixtral": (QV, {}),
    "mamba": (fp.LoRA(r=2, target_modules=["in_proj"]), {}),
    "mamba-plain": (fp.LoRA(r=2, target_modules=["in_proj", "dt_proj"]), {"use_cache": False}),
}


STORED = [
    (n, f) for n in ("llama", "llama-ranks", "llama-nested", "t5", "bert-masked") for f in (fp.NF4(), fp.Int8(), fp.AffineInt())
]


@pytest.mark.parametrize(("name", "formats"), [*((n, None) for n in MODELS), *STORED], ids=lambda v: getattr(v, "label", v))
def test_models_fold(name, formats):
    check_model(name, formats)


def check_model(name, formats):
    method, shared = MODELS[name]
    arch = name.split("-")[0]
    p = lm(arch, method, formats=formats)
    given, each = stacked_inputs(arch)
    dims = ((), dict.fromkeys(shared))
    with torch.no_grad():
        wants = [n(p.params, a, **e, **shared) for n, a, e in zip(p.nets, p.ads, each, strict=True)]
        out = fp.apply_many(p.net, p.params, p.many, **given, **shared, in_dims=dims, strategy="fold")
        for i, want in enumerate(wants):
            agree(at(out, i), want, tolerance(name))
    big = {k: v.flatten(0, 1)[[0, 3, 1, 5, 2]] for k, v in given.items()}
    masks = {k: v[[0, 1, 1, 0, 1]] if isinstance(v, Tensor) else v for k, v in shared.items()}
    index = torch.tensor([2, 0, 2, 1, 2])
    with torch.no_grad():
        out = fp.apply_routed(p.net, p.params, p.many, index, **big, **masks)
        for r, m in enumerate(index.tolist()):
            one = {k: v[r : r + 1] if isinstance(v, Tensor) else v for k, v in (big | masks).items()}
            want = zoo.leading(p.nets[m](p.params, p.ads[m], **one))
            agree(zoo.leading(out)[r : r + 1], want, tolerance(name))


@pytest.mark.parametrize("name", ["llama", "t5", "mixtral", "bert-masked", "llama-norms", "llama-prompt"])
def test_gradients_of_models(name):
    method, shared = MODELS[name]
    arch = name.split("-")[0]
    p = lm(arch, method)
    given, each = stacked_inputs(arch)
    dims = ((), dict.fromkeys(shared))

    def f(a):
        return loss(zoo.leading(fp.apply_many(p.net, p.params, a, **given, **shared, in_dims=dims, strategy="fold")))

    wants = [
        fp.value_and_grad(lambda a, e=e: loss(zoo.leading(p.net(p.params, a, **e, **shared))))(a)
        for a, e in zip(p.ads, each, strict=True)
    ]
    value, grads = fp.value_and_grad(f)(p.many)
    assert torch.isclose(value, sum(v for v, _ in wants), rtol=tolerance(name))
    under = torch.func.grad(lambda t: f(p.many.replace(params=t)))(p.many.params)
    for i, (_, want) in enumerate(wants):
        agree(at(grads, i), want, 100 * tolerance(name))
        agree(at(under, i), want, 100 * tolerance(name))


@pytest.mark.parametrize("strategy", ["fold", "vmap", "loop"])
@pytest.mark.parametrize(
    "method", [fp.LoRA(r=2, modules_to_save=["embed_tokens"]), fp.LoRA(r=2, target_modules=["embed_tokens"])]
)
def test_padding_gets_no_gradient_of_any_member(method, strategy):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    p = population(LlamaForCausalLM(LlamaConfig(**sizes, pad_token_id=0)).double().eval(), method)
    ids = torch.cat([torch.zeros(3, 2, 2, dtype=torch.long), torch.randint(1, 32, (3, 2, 4))], 2)

    def together(many):
        out = fp.apply_many(p.net, p.params, many, input_ids=ids, strategy=strategy, use_cache=False)
        return out.logits.square().flatten(1).sum(1).sum()

    def alone(a, ids):
        return p.net(p.params, a, input_ids=ids, use_cache=False).logits.square().sum()

    grads = fp.value_and_grad(together)(p.many)[1]
    for i, a in enumerate(p.ads):
        want = fp.value_and_grad(alone)(a, ids[i])[1]
        for g, w in zip(pytree.tree_leaves(grads), pytree.tree_leaves(want), strict=True):
            torch.testing.assert_close(g[i], w)


def test_vmap_outside():
    p = lm("llama", QV)
    x = torch.stack([zoo.ids(2, 5, s) for s in range(2)])

    def f(ids):
        return fp.apply_many(p.net, p.params, p.many, in_dims=None, input_ids=ids, use_cache=False).logits

    want = torch.stack([f(x[0]), f(x[1])])  # which probes where values are seen
    agree(torch.func.vmap(f)(x), want)


# -- routed ------------------------------------------------------------------------------------------------------------------


def looped(p, index, x, contexts=None, **kw):
    """Calls each member with all of its rows, and puts the rows back."""
    out = None
    for m in sorted(set(index.tolist())):
        rows = (index == m).nonzero()[:, 0]
        extra = {} if contexts is None else {"context": contexts[m]}
        got = p.model(p.params, x[rows], **kw) if m < 0 else p.net(p.params, p.ads[m], x[rows], **extra, **kw)
        got = getattr(got, "logits", got)
        out = torch.zeros(len(index), *got.shape[1:], dtype=got.dtype) if out is None else out
        out = out.index_put((rows,), got)
    return out


RANKS = tuple(fp.LoRA(r=r, lora_alpha=a, lora_dropout=0.4, target_modules=["0", "2"]) for r, a in ((4, 1), (1, 7), (2, 2)))
ROUTED = tiny(method=RANKS)
INDEX = st.lists(st.integers(-1, 2), min_size=1, max_size=12)


@hypothesis.given(INDEX, st.booleans(), st.sampled_from(["fold", "loop"]))
@hypothesis.example([-1, -1], False, "fold")
@hypothesis.example([1, 0, 2, 1, -1, 0], True, "fold")
def test_routed_equals_the_loop(index, training, strategy):
    p, index = ROUTED, torch.tensor(index)
    x = zoo.noise(len(index), 3, 6).double()
    seeds = torch.tensor([5, 6, 7])
    context = fp.Context(training=training, seed=seeds)
    each = [fp.Context(training=training, seed=int(s)) for s in seeds]
    got = fp.apply_routed(p.net, p.params, p.many, index, x, context=context, strategy=strategy)
    agree(got, looped(p, index, x, each))


@hypothesis.given(INDEX, st.integers(-(2**40), 2**40))
def test_routed_gradients_equal_the_loop(index, seed):
    p, index = ROUTED, torch.tensor(index)
    x = zoo.noise(len(index), 6).double()
    context = fp.Context(training=True, seed=seed)

    def f(strategy):
        def g(t):
            stack = p.many.replace(params=t)
            return loss(fp.apply_routed(p.net, p.params, stack, index, x, context=context, strategy=strategy))

        return torch.func.grad(g)(p.many.params)

    agree(f("fold"), f("loop"))


@pytest.mark.parametrize("index", [[0, 1, -1], (2, 2, 2), torch.tensor([1, 0, 1], dtype=torch.uint8)])
def test_forms_of_an_index(index):
    p, x = ROUTED, zoo.noise(3, 6).double()
    agree(fp.apply_routed(p.net, p.params, p.many, index, x), looped(p, torch.tensor([int(i) for i in index]), x))


# -- dropout, chunks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fold", "vmap", "loop"])
@pytest.mark.parametrize("chunk", [1, 2, 5, None, "auto"])
@pytest.mark.parametrize("seed", [3, torch.tensor(4), torch.tensor([4, 9, 2])], ids=["int", "0-d", "each"])
def test_context_and_chunks(strategy, chunk, seed):
    p, x = ROUTED, zoo.noise(3, 2, 6).double()
    context = fp.Context(training=True, seed=seed)
    out = fp.apply_many(p.net, p.params, p.many, x, context=context, strategy=strategy, chunk_size=chunk)
    for i, a in enumerate(p.ads):
        one = int(seed[i]) if isinstance(seed, Tensor) and seed.ndim else int(seed)
        agree(out[i], p.net(p.params, a, x[i], context=fp.Context(training=True, seed=one)))


def test_auto_chunks_are_cut_by_tokens():
    p, x = tiny(5), zoo.noise(5, 3000, 6).double()
    agree(fp.apply_many(p.net, p.params, p.many, x), fp.apply_many(p.net, p.params, p.many, x, chunk_size=None))


# -- generation --------------------------------------------------------------------------------------------------------------

SOME = list(range(3, 50))  # texts of members end at different lengths
GENERATE = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
GENERATED = {
    "llama": QV,
    "gpt2": fp.LoRA(r=2, target_modules=["c_attn"]),
    "t5": fp.LoRA(r=2, target_modules=["q", "v"]),
    "llama-prompt": MODELS["llama-prompt"][0],
    "gpt2-prefix": MODELS["gpt2-prefix"][0],
}


def same_text(got, want, pad=1):
    n = min(got.shape[-1], want.shape[-1])
    assert torch.equal(got[..., :n], want[..., :n])
    assert bool((got[..., n:] == pad).all())
    assert bool((want[..., n:] == pad).all())


@pytest.mark.filterwarnings("ignore:.*attention mask")
@pytest.mark.parametrize(
    "more", [{}, {"eos_token_id": SOME}, {"eos_token_id": SOME, "num_beams": 2}], ids=["all", "eos", "beams"]
)
@pytest.mark.parametrize("name", GENERATED)
def test_generation_equals_the_loop(name, more):
    p = lm(name.split("-")[0], GENERATED[name], 4)
    kw = {"input_ids": zoo.ids(3, 5), "attention_mask": torch.ones(3, 5, dtype=torch.long), **GENERATE, **more}
    out = fp.apply_many(p.net, p.params, p.many, in_dims=None, call="generate", strategy="fold", **kw)
    for i, a in enumerate(p.ads):
        same_text(out[i], p.net.call("generate", p.params, a, **kw))
    index = [2, 0, 3]
    out = fp.apply_routed(p.net, p.params, p.many, index, call="generate", **kw)
    for r, m in enumerate(index):
        one = {k: v[r : r + 1] if isinstance(v, Tensor) else v for k, v in kw.items()}
        same_text(out[r : r + 1], p.net.call("generate", p.params, p.ads[m], **one))


@pytest.mark.parametrize("how", [{"chunk_size": 1}, {"chunk_size": 3}, {"strategy": "loop"}], ids=str)
def test_texts_of_chunks_end_at_different_lengths(how):
    p = lm("llama", QV, 4)
    kw = {"input_ids": zoo.ids(3, 5), **GENERATE, "eos_token_id": SOME}
    want = fp.apply_many(p.net, p.params, p.many, in_dims=None, call="generate", chunk_size=None, **kw)
    same_text(fp.apply_many(p.net, p.params, p.many, in_dims=None, call="generate", **how, **kw), want)


def test_texts_of_a_loop_are_padded_as_generate_pads():
    from transformers import GenerationConfig

    p, config = lm("llama", QV, 4), GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=95, eos_token_id=SOME)
    kw = {"input_ids": zoo.ids(3, 5), "call": "generate", "generation_config": config, "in_dims": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers on a config beside keywords
        texts = [fp.apply_many(p.net, p.params, p.many, strategy=s, **kw) for s in ("fold", "loop")]
    assert torch.equal(*texts)


# -- purity, threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fold", "vmap", "loop"])
def test_no_argument_changes(strategy):
    p = lm("llama", fp.LoRA(r=2, target_modules=["q_proj"], modules_to_save=["norm"]))
    given = {"input_ids": torch.stack([zoo.ids(2, 5, s) for s in range(3)])}
    held = [p.params, [(a.params, a.consts) for a in p.many], given]
    before = pytree.tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, held)
    out = fp.apply_many(p.net, p.params, p.many, strategy=strategy, use_cache=False, **given)
    out.logits.zero_()
    assert same_bits(own(before), own(held))


def test_two_threads_at_once():
    p = lm("llama", MODELS["llama-norms"][0])
    ids = [zoo.ids(2, 5, s) for s in range(2)]
    call = lambda i: fp.apply_many(p.net, p.params, p.many, in_dims=None, input_ids=i, use_cache=False).logits  # noqa: E731
    want, wrong = [call(i) for i in ids], []

    def work(k):
        wrong.extend(k for _ in range(8) if not torch.equal(call(ids[k]), want[k]))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_select_takes_members_in_any_order():
    p = tiny()
    assert same_bits(select(p.many, [2, 0, 2]).params, fp.stack([p.ads[i] for i in (2, 0, 2)]).params)
    for index in ([3], [-1], []):
        with pytest.raises(ValueError, match=r"select: positions must be in \[0, 3\), got"):
            select(p.many, index)

"""Nets: the site table, nesting, fresh adapters, tied weights, and adapters of another net."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from funcpeft import methods, stacking
from funcpeft.adapt import adapt, peft_init
from funcpeft.context import Context
from funcpeft.errors import NoMergedFormError
from funcpeft.functional import functionalize
from funcpeft.interop.peft import save_peft
from funcpeft.method import Method
from funcpeft.methods import (
    IA3,
    OFT,
    BDLoRA,
    DoRA,
    FourierFT,
    Full,
    LNTuning,
    LoHa,
    LoKr,
    LoRA,
    MiSS,
    RoAd,
    SHiRA,
    TrainableTokens,
    VeRA,
)
from funcpeft.tree import Adapter, as_tuple, tree_leaves, tree_map
from funcpeft.weights import Adapted


class Mlp(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, width, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.norm(self.up(x))))


class Tied(nn.Module):
    """An embedding and a head that are one tensor."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(10, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.inner(self.embed(ids))))


def functional(module=None, dtype=torch.float64):
    torch.manual_seed(3)
    return functionalize((module or Mlp()).to(dtype))


def moved(adapter, seed=7, by=0.3):
    """Returns an adapter with its trained leaves moved away from init."""
    gen = torch.Generator().manual_seed(seed)

    def move(t):
        return t + by * torch.randn(t.shape, generator=gen, dtype=torch.float64).to(t.dtype)

    made = tuple(a.replace(params=tree_map(move, a.params)) for a in as_tuple(adapter))
    return made if isinstance(adapter, tuple) else made[0]


def same(a, b):
    left, right = tree_leaves(a), tree_leaves(b)
    return len(left) == len(right) and all(torch.equal(s, t) for s, t in zip(left, right, strict=True))


def x_of(width=8):
    return torch.randn(5, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# -- the table ---------------------------------------------------------------------------------------------------------------


def test_the_table_lists_sites_entries_and_counts():
    model, _ = functional(dtype=torch.bfloat16)
    net = adapt(model, LoRA(r=2, target_modules=["up"], modules_to_save=["norm"]))
    rows = [line.replace("│", " ").split() for line in str(net).splitlines() if "│" in line]
    assert rows == [
        ["up", "linear", "8", "x", "8", "bfloat16", "LoRA", "32", "met"],
        ["norm.weight", "vector", "8", "bfloat16", "Full", "8", "replaced"],
        ["norm.bias", "vector", "8", "bfloat16", "Full", "8", "replaced"],
    ]
    assert str(net).startswith("Net(Mlp: LoRA at 1 sites, Full at 2 sites)")
    assert str(net).endswith("48 trained numbers, 31.6% of the base's 152")


def test_the_table_says_what_is_shared_and_what_a_module_reads():
    model, _ = functionalize(nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}))
    assert str(adapt(model, LoRA(target_modules=["attn"]))).count("read by its module") == 2
    shared = str(adapt(functional()[0], VeRA(r=4, target_modules=["up", "down"])))
    assert "24 trained numbers" in shared


SITED = [n for n in methods.__all__ if getattr(methods, n).kinds and not hasattr(getattr(methods, n), "wrap")]


@pytest.mark.parametrize("name", SITED)
def test_counts_are_those_of_a_real_init(name):
    cls = getattr(methods, name)
    example = cls.examples()[0]
    fields = {"target_modules": ["embed"] if cls is TrainableTokens else ["up", "down"] if cls is not LNTuning else ["norm"]}
    patterns = {f.name: {} for f in dataclasses.fields(cls) if f.name.endswith("_pattern") and f.name != "layers_pattern"}
    if cls is BDLoRA:
        patterns["use_bdlora"] = {"target_modules_bd_a": ["up"], "target_modules_bd_b": ["down"], "nblocks": 2}
    extra = {"feedforward_modules": None} if cls is IA3 else {"target_parameters": None} if cls is Full else {}
    method = dataclasses.replace(example, **fields, **patterns, **extra)
    model, params = functional(Tied() if cls is TrainableTokens else Mlp(64))
    net = adapt(model, method)
    needs = method.sample_needs(net.bases(net.entries[0], params), 0)
    made = sum(t.numel() for leaves in net.init(params, 0, **needs).params.values() for t in leaves.values())
    assert f"{made:,} trained numbers" in str(net)


PATTERNS = ("rank_pattern", "alpha_pattern", "n_frequency_pattern", "lambda_pattern", "block_size_pattern")
_ARITHMETIC = {"min": min, "max": max, "ceil": math.ceil, "floor": math.floor, "round": round, "sqrt": math.sqrt}


@pytest.mark.parametrize("name", [n for n in methods.__all__ if getattr(methods, n).size])
def test_a_methods_formula_counts_what_init_makes(name):
    """``size`` and ``size_shared``, which the docs show, at two layers of different shapes."""
    method = dataclasses.replace(getattr(methods, name).examples()[0], target_modules=["0", "1"])
    method = dataclasses.replace(method, **{f.name: {} for f in dataclasses.fields(method) if f.name in PATTERNS})
    model, params = functionalize(nn.Sequential(nn.Linear(24, 12), nn.Linear(12, 36)))
    net = adapt(model, method)
    made = net.init(params, 0, **method.sample_needs(net.bases(net.entries[0], params), 0)).params
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    for path, (in_, out) in {"0": (24, 12), "1": (12, 36)}.items():
        want = eval(method.size, {"__builtins__": {}}, {**_ARITHMETIC, **fields, "in_": in_, "out": out})
        assert sum(t.numel() for t in made.get(path, {}).values()) == want, path
    if not method.size_shared:
        return
    shared = sum(t.numel() for path, leaves in made.items() if path not in ("0", "1") for t in leaves.values())
    assert shared == eval(method.size_shared, {"__builtins__": {}}, {**_ARITHMETIC, **fields})


# -- nesting -----------------------------------------------------------------------------------------------------------------


def test_methods_at_different_sites_equal_one_after_the_other():
    model, params = functional()
    up, down = LoRA(r=2, target_modules=["up"]), IA3(target_modules=["down"])
    net = adapt(model, [up, down])
    adapter = moved(net.init(params, 0))
    assert isinstance(adapter, tuple)
    assert [type(e.method) for e in net.entries] == [LoRA, IA3]
    one, _ = adapt(model, up).merge(params, adapter[0])
    want = adapt(model, down)(one, adapter[1], x_of())
    torch.testing.assert_close(net(params, adapter, x_of()), want)


@pytest.mark.parametrize("outer", [LoRA(r=3), DoRA(r=2), IA3(), OFT(oft_block_size=4), LoHa(r=2), RoAd(group_size=4)], ids=repr)
@pytest.mark.parametrize("inner", [LoRA(r=2, lora_bias=True), IA3()], ids=repr)
def test_methods_at_one_site_equal_one_after_the_other(inner, outer):
    model, params = functional()
    inner, outer = (dataclasses.replace(m, target_modules=["up"]) for m in (inner, outer))
    net, alone = adapt(model, [inner, outer]), adapt(model, inner)
    first = moved(alone.init(params, 0))
    between, _ = alone.merge(params, first)
    then = adapt(model, outer)
    second = moved(then.init(between, 1), seed=8)
    # consts such as DoRA's or OFT's come from the base that the second method sees
    got = net(params, (first, second), x_of())
    torch.testing.assert_close(got, then(between, second, x_of()))
    torch.testing.assert_close(model(net.merge(params, (first, second))[0], x_of()), got)


def test_nested_methods_unmerge_in_reverse():
    model, params = functional()
    net = adapt(model, [LoRA(r=2, target_modules=["up", "down"]), IA3(target_modules=["up"])])
    adapter = moved(net.init(params, 0))
    back = net.unmerge(net.merge(params, adapter)[0], adapter)
    for key, t in params.items():
        torch.testing.assert_close(back[key], t)


def test_fields_become_entries_in_order():
    model, params = functional(Tied())
    method = LoRA(
        target_modules=["inner"], modules_to_save=["head"], bias="lora_only", trainable_token_indices={"embed": [4, 2]}
    )
    net = adapt(model, [method, IA3(target_modules=["inner"])])
    assert [e.role for e in net.entries] == ["method", "modules_to_save", "bias", "trainable_token_indices", "method"]
    adapter = net.init(params, 0)
    assert [list(a.params) for a in adapter] == [["inner"], ["head.weight"], ["inner.bias"], ["embed"], ["inner"]]
    assert net.methods == (method, IA3(target_modules=["inner"]))


def test_a_saved_module_and_a_bias_are_what_the_call_uses():
    model, params = functional()
    net = adapt(model, LoRA(r=2, target_modules=["up"], lora_bias=True, bias="lora_only", modules_to_save=["norm"]))
    adapter = moved(net.init(params, 0))
    lora, saved, bias = (a.params for a in adapter)
    s = adapter[0].consts["up"]["scaling"]
    w = params["up.weight"] + s * lora["up"]["B"] @ lora["up"]["A"]
    h = x_of() @ w.T + bias["up.bias"]["value"] + s * lora["up"]["bias"]
    h = nn.functional.layer_norm(h, (8,), saved["norm.weight"]["value"], saved["norm.bias"]["value"])
    torch.testing.assert_close(net(params, adapter, x_of()), torch.tanh(h) @ params["down.weight"].T)


# -- init --------------------------------------------------------------------------------------------------------------------


def test_a_site_draws_the_same_whatever_else_there_is():
    model, params = functional()
    alone = adapt(model, LoRA(target_modules=["down"])).init(params, 5)
    both = adapt(model, LoRA(target_modules=["up", "down"])).init(params, 5)
    beside = adapt(model, LoRA(target_modules=["down"], bias="all", modules_to_save=["norm"])).init(params, 5)[0]
    assert same(alone.params["down"], both.params["down"])
    assert same(alone.params["down"], beside.params["down"])
    assert not torch.equal(both.params["up"]["A"], both.params["down"]["A"])


def test_the_first_of_several_methods_draws_as_if_alone_and_others_differ():
    model, params = functional()
    one = LoRA(target_modules=["up"])
    first, second = adapt(model, [one, one]).init(params, 5)
    assert same(first, adapt(model, one).init(params, 5))
    assert not torch.equal(first.params["up"]["A"], second.params["up"]["A"])


def test_seeds_determine_and_differ():
    model, params = functional()
    net = adapt(model, LoRA(target_modules=["up", "down"]))
    made = [net.init(params, s) for s in (0, 0, 1, -1, 2**62, 2**80)]
    assert same(made[0], made[1])
    firsts = {float(a.params["up"]["A"][0, 0]) for a in made}
    assert len(firsts) == 5
    torch.manual_seed(99)
    assert same(net.init(params, 0), made[0])
    torch.manual_seed(99)
    before = torch.get_rng_state()
    net.init(params, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("base", "asked", "want"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_leaves_are_single_precision_or_wider_unless_asked(base, asked, want):
    model, params = functional(dtype=base)
    net = adapt(model, LoRA(target_modules=["up"], modules_to_save=["norm"]))
    made = net.init(params, 0, dtype=asked)
    assert {t.dtype for a in made for leaves in a.params.values() for t in leaves.values()} == {want}
    assert made[0].consts["up"]["scaling"].dtype == want
    assert made[0].consts["up"]["rank"].dtype == torch.int64
    assert net(params, made, x_of().to(base)).dtype == base


def test_the_base_is_neither_changed_nor_aliased():
    model, params = functional()
    kept = {k: t.clone() for k, t in params.items()}
    net = adapt(model, LoRA(target_modules=["up"], init_lora_weights="pissa", modules_to_save=["norm"], bias="all"))
    made = moved(net.init(params, 0))
    net(params, made, x_of())
    net.merge(params, made)
    assert same(params, kept)
    held = {t.untyped_storage().data_ptr() for t in params.values()}
    assert not held & {t.untyped_storage().data_ptr() for t in tree_leaves(net.init(params, 0))}


def test_peft_init_depends_on_order_and_rounds_on_a_half_precision_base():
    model, params = functional(dtype=torch.bfloat16)
    net = adapt(model, LoRA(target_modules=["up", "down"]))
    made = peft_init(net, params, 3)
    alone = peft_init(adapt(model, LoRA(target_modules=["down"])), params, 3)
    assert not torch.equal(made.params["down"]["A"], alone.params["down"]["A"])
    a = made.params["up"]["A"]
    assert a.dtype == torch.float32
    assert torch.equal(a, a.bfloat16().float())


# -- tied weights ------------------------------------------------------------------------------------------------------------


def test_adapting_an_embedding_leaves_a_tied_head_alone():
    model, params = functional(Tied())
    net = adapt(model, LoRA(r=2, target_modules=["embed"]))
    adapter, ids = moved(net.init(params, 0)), torch.arange(10)[None]
    leaves = adapter.leaves("embed")
    table = params["embed.weight"] + leaves["scaling"] * (leaves["B"] @ leaves["A"]).T
    want = torch.tanh(table[ids] @ params["inner.weight"].T + params["inner.bias"]) @ params["embed.weight"].T
    torch.testing.assert_close(net(params, adapter, ids), want)
    merged, report = net.merge(params, adapter)
    torch.testing.assert_close(merged["embed.weight"], table)
    assert torch.equal(merged["head.weight"], params["embed.weight"])
    torch.testing.assert_close(model(merged, ids), want)
    assert report.notes == ("'head.weight' was tied and now has a tensor of its own",)
    assert list(report.sites) == ["embed"]


def test_adapting_a_tied_head_leaves_the_embedding_alone():
    model, params = functional(Tied())
    for method in (LoRA(r=2, target_modules=["head"]), LoRA(target_modules=["inner"], modules_to_save=["head"])):
        net = adapt(model, method)
        adapter, ids = moved(net.init(params, 0)), torch.arange(10)[None]
        merged, report = net.merge(params, adapter)
        assert torch.equal(merged["embed.weight"], params["embed.weight"])
        assert not torch.equal(merged["head.weight"], params["embed.weight"])
        torch.testing.assert_close(model(merged, ids), net(params, adapter, ids))
        assert report.notes


def test_trained_rows_are_of_both_ends_of_a_tie():
    model, params = functional(Tied())
    net = adapt(model, TrainableTokens(target_modules=["embed"], token_indices=[7, 2]))
    adapter, ids = moved(net.init(params, 0)), torch.arange(10)[None]
    table = params["embed.weight"].clone()
    table[[7, 2]] = adapter.params["embed"]["D"]
    want = torch.tanh(table[ids] @ params["inner.weight"].T + params["inner.bias"]) @ table.T
    torch.testing.assert_close(net(params, adapter, ids), want)
    merged, report = net.merge(params, adapter)
    torch.testing.assert_close(merged["embed.weight"], table)
    assert "head.weight" not in merged  # one tensor still
    torch.testing.assert_close(model(merged, ids), want)
    assert sorted(report.sites) == ["embed"]


def test_merged_params_share_nothing_with_the_adapter():
    model, params = functional(Tied())
    net = adapt(model, LoRA(target_modules=["inner"], modules_to_save=["head"]))
    adapter = net.init(params, 0)
    merged, _ = net.merge(params, adapter)
    held = {t.untyped_storage().data_ptr() for t in tree_leaves(adapter)}
    assert not held & {t.untyped_storage().data_ptr() for t in merged.values()}
    half, _ = net.merge(params, adapter, dtype=torch.bfloat16)
    assert half["head.weight"].dtype == half["inner.weight"].dtype == torch.bfloat16


def test_params_may_carry_an_alias_which_unties():
    model, params = functional(Tied())
    untied = {**params, "head.weight": params["embed.weight"] * 2}
    net = adapt(model, LoRA(r=2, target_modules=["embed", "head"]))
    adapter, ids = moved(net.init(untied, 0)), torch.arange(10)[None]
    merged, report = net.merge(untied, adapter)
    torch.testing.assert_close(model(merged, ids), net(untied, adapter, ids))
    assert report.notes == ()


# -- adapters of another net -------------------------------------------------------------------------------------------------

SMALL = [
    LoRA(r=2), DoRA(r=2), IA3(), VeRA(r=2), OFT(oft_block_size=2),
    MiSS(r=2), RoAd(group_size=2), SHiRA(r=2), LoHa(r=2), LoKr(r=2),
]  # fmt: skip


@pytest.mark.parametrize("method", SMALL, ids=lambda m: type(m).__name__)
def test_an_adapter_of_another_width_is_refused_by_site(method):
    method = dataclasses.replace(method, target_modules=["up", "down"])
    (model, params), (wider, more) = functional(), functional(Mlp(12))
    net, adapter = adapt(model, method), adapt(wider, method).init(more, 0)
    with pytest.raises(TypeError, match=rf"adapter at '.*': leaf '\w+' of {method.label} must have shape \(.*\), got \("):
        net(params, adapter, x_of())
    with pytest.raises(TypeError, match="adapter at '"):
        net.merge(params, adapter)


@pytest.mark.parametrize("theirs", SMALL, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("ours", SMALL, ids=lambda m: type(m).__name__)
def test_an_adapter_of_another_method_is_refused_by_site(ours, theirs):
    if type(ours) is type(theirs):
        return
    model, params = functional()
    net = adapt(model, dataclasses.replace(ours, target_modules=["up"]))
    adapter = adapt(model, dataclasses.replace(theirs, target_modules=["up"])).init(params, 0)
    with pytest.raises(TypeError, match=r"adapter (at '|for \w+: paths)"):
        net(params, adapter, x_of())


def test_wrong_paths_and_counts_are_refused():
    model, params = functional()
    one, two = (adapt(model, LoRA(target_modules=t)) for t in (["up"], ["up", "down"]))
    a, b = one.init(params, 0), two.init(params, 0)
    with pytest.raises(TypeError, match="paths must be the net's sites, got extra 'down'"):
        one(params, b, x_of())
    with pytest.raises(TypeError, match="paths must be the net's sites, got nothing at 'down'"):
        two(params, a, x_of())
    with pytest.raises(TypeError, match=r"one Adapter for each of \(LoRA\) is required, got 2"):
        one(params, (a, a), x_of())
    both = adapt(model, [LoRA(target_modules=["up"]), IA3(target_modules=["up"])])
    with pytest.raises(TypeError, match=r"one Adapter for each of \(LoRA, IA3\) is required, got 1"):
        both.merge(params, a)
    with pytest.raises(TypeError, match="an Adapter or a tuple of them is required, got dict"):
        one(params, a.params, x_of())
    with pytest.raises(TypeError, match="leaf 'B' of lora must have shape"):
        one(params, Adapter({"up": {"A": a.params["up"]["A"]}}, a.consts), x_of())


def test_an_error_of_the_model_is_not_blamed_on_the_adapter():
    model, params = functional()
    net = adapt(model, LoRA(target_modules=["up"]))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        net(params, net.init(params, 0), torch.ones(2, 3))


@pytest.mark.parametrize("leaf", ["A", "scaling"])
def test_a_leaf_that_is_not_finite_is_neither_merged_nor_saved(leaf, tmp_path):
    model, params = functional()
    net = adapt(model, LoRA(target_modules=["up"]))
    adapter = net.init(params, 0)
    broken = tree_map(lambda t: t, adapter)
    (broken.params if leaf == "A" else broken.consts)["up"][leaf] = adapter.leaves("up")[leaf] * float("nan")
    with pytest.raises(ValueError, match=f"adapter at 'up': leaf '{leaf}' must be finite"):
        net.merge(params, broken)
    with pytest.raises(ValueError, match=f"adapter at 'up': leaf '{leaf}' must be finite"):
        save_peft(net, broken, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_base_of_integers_is_refused():
    class Ints(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 4, bias=False)
            self.up.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return x

    model, _ = functionalize(Ints())
    with pytest.raises(TypeError, match=r"lora at 'up': a base weight must be floating point or Quantized, got torch\.int8"):
        adapt(model, LoRA(target_modules=["up"]))


# -- the call ----------------------------------------------------------------------------------------------------------------


class Names(nn.Module):
    """A forward whose arguments have the names of the net's own."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, params, adapter=1.0, index=0, net=None, self_=None):
        return self.up(params) * adapter + index


def test_a_models_own_argument_names_do_not_collide():
    model, params = functional(Names())
    net = adapt(model, LoRA(target_modules=["up"]))
    adapter, x = moved(net.init(params, 0)), torch.ones(2, 4, dtype=torch.float64)
    want = net(params, adapter, x) * 3 + 1
    torch.testing.assert_close(net(params, adapter, params=x, adapter=3, index=1, net=None), want)
    torch.testing.assert_close(net(params, adapter, x, 3, index=1, context=Context()), want)
    torch.testing.assert_close(net.call("forward", params, adapter, params=x, adapter=3, index=1), want)


def test_a_net_is_static_and_hashable():
    import copy

    model, _ = functional()
    net = adapt(model, LoRA(target_modules=["up"]))
    assert copy.deepcopy(net) is net
    assert {net: 1}[net] == 1
    assert net != adapt(model, LoRA(target_modules=["up"]))


def test_an_attached_tree_holds_expressions_at_sites_only():
    model, params = functional()
    net = adapt(model, LoRA(target_modules=["up"]))
    attached = net.attach(params, net.init(params, 0))
    assert [k for k, v in attached.items() if isinstance(v, Adapted)] == ["up.weight"]
    assert all(attached[k] is params[k] for k in params if k != "up.weight")


def test_training_needs_a_seed_only_where_it_is_on():
    model, params = functional()
    net = adapt(model, LoRA(target_modules=["up"], lora_dropout=0.5))
    adapter = moved(net.init(params, 0))
    plain = net(params, adapter, x_of())
    trained = net(params, adapter, x_of(), context=Context(training=True, seed=1))
    assert not torch.equal(plain, trained)
    assert torch.equal(trained, net(params, adapter, x_of(), context=Context(training=True, seed=1)))


def test_only_method_objects_and_models_are_taken():
    model, _ = functional()
    with pytest.raises(TypeError, match=r"adapt: a Model is required, got Mlp; call functionalize\(module\) first"):
        adapt(Mlp(), LoRA())
    with pytest.raises(TypeError, match="a method is required, got type; pass an instance"):
        adapt(model, LoRA)
    with pytest.raises(ValueError, match="a method is required, got an empty list"):
        adapt(model, [])


def test_a_stack_of_adapters_made_for_several_methods_vmaps():
    model, params = functional()
    net = adapt(model, LoRA(r=2, target_modules=["up"], modules_to_save=["norm"]))
    members = [moved(net.init(params, s), seed=s) for s in range(3)]
    x = x_of()
    many = torch.func.vmap(lambda a: net(params, a, x))(stacking.stack(members))
    for got, one in zip(many, members, strict=True):
        torch.testing.assert_close(got, net(params, one, x))


def test_a_method_of_someone_else_is_a_method():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Double(Method):
        def init_site(self, base, gen):
            return {"g": torch.tensor(2.0)}, {}

        def merge(self, leaves, base):
            return base.replace(weight=base.weight * leaves["g"])

    model, params = functional()
    net = adapt(model, Double(target_modules=["down"]))
    torch.testing.assert_close(net(params, net.init(params, 0), x_of()), 2 * model(params, x_of()))


def test_a_fourier_adapter_of_a_wider_model_is_refused_where_it_shows():
    (model, params), (wider, more) = functional(), functional(Mlp(12))
    method = FourierFT(target_modules=["up"], n_frequency=60)
    with pytest.raises((TypeError, RuntimeError)):
        adapt(model, method)(params, adapt(wider, method).init(more, 0), x_of())


@pytest.mark.parametrize("method", SMALL, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("count", [1, 3])
def test_a_stack_is_refused_outside_vmap(method, count):
    model, params = functional()
    net = adapt(model, dataclasses.replace(method, target_modules=["up"]))
    many = stacking.stack([net.init(params, seed) for seed in range(count)])
    for use in (lambda: net(params, many, x_of()), lambda: net.merge(params, many), lambda: net.unmerge(params, many)):
        with pytest.raises((TypeError, NoMergedFormError), match=r"must have shape|does not invert"):
            use()


def test_a_leaf_that_would_broadcast_is_refused():
    model, params = functional()
    net = adapt(model, LoRA(r=2, target_modules=["up"]))
    adapter = net.init(params, 0)
    short = adapter.replace(params={"up": {**adapter.params["up"], "B": adapter.params["up"]["B"][:1]}})
    with pytest.raises(TypeError, match="adapter at 'up': leaf 'B' of lora must have shape"):
        net(params, short, x_of())


def test_a_method_may_not_be_replaced_by_a_later_one():
    model, _ = functional()
    with pytest.raises(ValueError, match=r"full at 'up.weight': must not replace the weight that lora adapts before it"):
        adapt(model, [LoRA(target_modules=["up"]), Full(target_modules=["up"])])
    adapt(model, [Full(target_modules=["up"]), LoRA(target_modules=["up"])])


class Casting(nn.Module):
    """A model that moves a layer in the call, as routers of Switch Transformers do."""

    def __init__(self, dtype):
        super().__init__()
        self.lin, self.dtype = nn.Linear(3, 2), dtype

    def forward(self, x):
        self.lin = self.lin.to(self.dtype)
        return self.lin(x)


def test_a_layer_that_is_moved_in_the_call_to_where_it_is_stays():
    model, params = functionalize(Casting(torch.float32))
    net = adapt(model, LoRA(r=1, target_modules=["lin"], init_lora_weights=False))
    adapter, x = net.init(params, 0), torch.ones(4, 3)
    merged, _ = net.merge(params, adapter)
    torch.testing.assert_close(net(params, adapter, x), model(merged, x))


def test_a_layer_that_is_cast_in_the_call_is_refused():
    model, params = functionalize(Casting(torch.float64))
    net = adapt(model, LoRA(r=1, target_modules=["lin"]))
    with pytest.raises(TypeError, match=r"lin: an adapted layer that its model casts.*not torch.float64; cast the base"):
        net(params, net.init(params, 0), torch.ones(4, 3).double())


WIDER = [
    (methods.MiSS(r=2, init_weights="bat"), nn.Linear(4, 4), (3, 4)),
    (methods.HRA(r=2), nn.Conv2d(2, 3, 3), (1, 2, 5, 5)),
    (methods.OFT(oft_block_size=3), nn.Conv2d(2, 3, 3), (1, 2, 5, 5)),
    (methods.BOFT(boft_block_size=2), nn.Conv2d(2, 3, 3), (1, 2, 5, 5)),
]


@pytest.mark.parametrize(("method", "layer", "shape"), WIDER, ids=lambda v: type(v).__name__)
def test_a_method_of_the_merged_weight_takes_inputs_of_another_dtype(method, layer, shape):
    model, params = functionalize(nn.Sequential(layer.bfloat16()))
    net = adapt(model, dataclasses.replace(method, target_modules=("0",)))
    adapter, x = net.init(params, 0), torch.ones(shape)
    assert torch.equal(net(params, adapter, x), net(params, adapter, x.bfloat16()))

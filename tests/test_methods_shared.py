"""Methods whose factors come from shared or frozen leaves: what the laws and the parity rows do not say of them."""

import dataclasses
import json
import math
import warnings
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import funcpeft as fp
from funcpeft import rng
from funcpeft.adapt import peft_init
from funcpeft.errors import CheckpointError
from funcpeft.families import Factored
from funcpeft.methods.unilora import assignment
from funcpeft.tree import tree_map

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not save")

SITES = ["wide", "tall"]


class Two(nn.Module):
    """A layer with fewer outputs than inputs, and one with more."""

    def __init__(self):
        super().__init__()
        self.wide, self.tall = nn.Linear(12, 8), nn.Linear(8, 16)

    def forward(self, x):
        return self.tall(torch.tanh(self.wide(x)))


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 6)

    def forward(self, ids):
        return self.table(ids)


def base(make=Two, dtype=torch.float64):
    torch.manual_seed(4)
    return make().to(dtype).eval()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(adapter, scale=0.3):
    gen = torch.Generator().manual_seed(7)
    return adapter.replace(
        params=tree_map(lambda t: t + scale * torch.randn(t.shape, generator=gen, dtype=t.dtype), adapter.params)
    )


def ours(method, make=Two, dtype=torch.float64):
    model, params = fp.functionalize(base(make, dtype))
    net = fp.adapt(model, method)
    return model, params, net, moved(net.init(params, 0))


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def theirs(config, make=Two, dtype=torch.float64):
    module = base(make, dtype)
    torch.manual_seed(5)
    return quietly(peft.get_peft_model, module, config).eval()


def shift(wrapped, scale=0.3):
    torch.manual_seed(9)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn_like(p))
    return wrapped


def configs():
    return {
        "RandLoRA": peft.RandLoraConfig(r=3, randlora_alpha=5, target_modules=SITES),
        "RandLoRA, drawn again": peft.RandLoraConfig(r=4, sparse=True, save_projection=False, target_modules=SITES),
        "PVeRA": peft.PveraConfig(r=3, save_projection=False, target_modules=SITES),
        "TinyLoRA": peft.TinyLoraConfig(r=2, u=3, save_projection=False, target_modules=SITES),
        "UniLoRA": peft.UniLoraConfig(r=2, theta_d_length=11, target_modules=SITES),
        "VBLoRA": peft.VBLoRAConfig(r=2, num_vectors=7, vector_length=4, target_modules=SITES),
    }


CONFIGS = quietly(configs)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_pefts(name, tmp_path):
    wrapped, x = shift(theirs(CONFIGS[name])), randn(5, 12)
    quietly(wrapped.save_pretrained, tmp_path)
    _, params = fp.functionalize(base())
    net, adapter = fp.load_peft(fp.functionalize(base())[0], params, tmp_path)
    grads = torch.func.grad(lambda p: net(params, adapter.replace(params=p), x).square().sum())(adapter.params)
    fp.save_peft(net, adapter.replace(params=grads), tmp_path / "grads")
    wrapped(x).square().sum().backward()
    got = load_file(tmp_path / "grads" / "adapter_model.safetensors")
    named = wrapped.named_parameters(remove_duplicate=False)
    trained = {k: p for k, p in ((n.replace(".default", ""), p) for n, p in named if p.requires_grad) if k in got}
    assert {p.data_ptr() for p in trained.values()} == {p.data_ptr() for p in wrapped.parameters() if p.requires_grad}
    for key, p in trained.items():
        torch.testing.assert_close(got[key], p.grad, rtol=1e-10, atol=1e-10)


def buffers(wrapped):
    """Returns what peft keeps beside the trained tensors, by the key it would have in a file; shared ones under every site."""
    return {n.replace(".default", ""): t for n, t in wrapped.named_buffers(remove_duplicate=False)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_files_leave_out_is_made_again_bit_for_bit(dtype, tmp_path):
    leaves = {
        "RandLoRA, drawn again": {"A": "randlora_A", "B": "randlora_B"},
        "PVeRA": {"A": "pvera_A", "B": "pvera_B"},
        "TinyLoRA": {"P": "tinylora_P"},
        "UniLoRA": {"iA": "unilora_indices_A", "sA": "unilora_scales_A", "iB": "unilora_indices_B", "sB": "unilora_scales_B"},
    }
    leaves["RandLoRA"] = leaves["RandLoRA, drawn again"]
    for name, keys in leaves.items():
        wrapped = theirs(CONFIGS[name], dtype=dtype)
        quietly(wrapped.save_pretrained, tmp_path / name)
        wanted = buffers(wrapped)
        model, params = fp.functionalize(base(dtype=dtype))
        _, adapter = quietly(fp.load_peft, model, params, tmp_path / name)
        for site in SITES:
            held = {**adapter.consts.get("", {}), **adapter.consts.get(site, {})}
            for leaf, key in keys.items():
                want = wanted[f"base_model.model.{site}.{key}"]
                assert torch.equal(held[leaf], want.to(held[leaf].dtype)), (name, leaf)
                assert held[leaf].dtype == (torch.float32 if want.is_floating_point() else torch.int64)


@pytest.mark.parametrize("name", ["VBLoRA", "UniLoRA", "TinyLoRA"])
def test_shared_trained_leaves_start_as_pefts_on_a_half_precision_base(name, tmp_path):
    wrapped = theirs(CONFIGS[name], dtype=torch.bfloat16)
    quietly(wrapped.save_pretrained, tmp_path / "theirs")
    model, params = fp.functionalize(base(dtype=torch.bfloat16))
    net, _ = quietly(fp.load_peft, model, params, tmp_path / "theirs")
    fp.save_peft(net, peft_init(net, params, seed=5), tmp_path / "ours")
    got, want = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs"))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k]) for k in want)


# -- RandLoRA ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
def test_randlora_pairs_rows_and_columns_of_two_orders(site):
    _, params, net, adapter = ours(fp.RandLoRA(r=3, randlora_alpha=5, target_modules=SITES))
    shared, own = adapter.consts[""], adapter.params[site]
    out, in_ = params[f"{site}.weight"].shape
    small, large, count = min(out, in_), max(out, in_), own["gamma"].shape[0]
    update = torch.zeros(large, small, dtype=torch.float64)
    rows = [(k, b) for k in range(3) for b in range(count)]
    columns = [(k, b) for b in range(count) for k in range(3)]
    for (k, b), (j, c) in zip(rows, columns, strict=True):
        row = own["lambda"][k, b] * own["gamma"][b] * shared["A"][k, 0, :small].double()
        update += torch.outer(shared["B"][:large, c, j].double(), row)
    update = 5 / 3 * (update if in_ <= out else update.T)
    merged, _ = net.merge(params, adapter)
    torch.testing.assert_close(merged[f"{site}.weight"] - params[f"{site}.weight"], update)
    assert count == math.ceil(small / 3)


def test_randlora_spans_every_rank():
    _, params, net, adapter = ours(fp.RandLoRA(r=2, target_modules=["wide"]))
    merged, _ = net.merge(params, adapter)
    assert torch.linalg.matrix_rank(merged["wide.weight"] - params["wide.weight"]) == 8


def test_randlora_needs_no_copies_under_the_layers(tmp_path):
    _, params, net, adapter = ours(fp.RandLoRA(r=3, target_modules=SITES))
    fp.save_peft(net, adapter, tmp_path)
    path, x = tmp_path / "adapter_model.safetensors", randn(3, 12)
    tensors = load_file(path)
    copies = {k for k in tensors if ".model." in k and k.endswith(("randlora_A", "randlora_B"))}
    assert len(copies) == 4
    save_file({k: t for k, t in tensors.items() if k not in copies}, path)
    again, read = fp.load_peft(net.model, params, tmp_path)
    assert torch.equal(again(params, read, x), net(params, adapter, x))
    save_file({k: t + (k == min(copies)) for k, t in tensors.items()}, path)
    with pytest.raises(CheckpointError, match="every site's copy of 'A', which sites share, must be the same"):
        fp.load_peft(net.model, params, tmp_path)


# -- PVeRA -------------------------------------------------------------------------------------------------------------------


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(12, 8)

    def forward(self, x):
        return self.wide(x)


def test_pvera_draws_around_what_it_merges():
    model, params, net, adapter = ours(fp.PVeRA(r=3, target_modules=["wide"]), One)
    x = randn(2, 12)
    mean = net(params, adapter, x)
    torch.testing.assert_close(mean, model(net.merge(params, adapter)[0], x))
    many = [net(params, adapter, x, context=fp.Context(training=True, seed=s)) for s in range(400)]
    drawn = torch.stack(many) - mean
    leaves, shared = adapter.params["wide"], adapter.consts[""]
    deviation = torch.exp(0.5 * (leaves["d"] * (x @ shared["A"].T))[:, 3:])
    factor = leaves["b"][:, None] * shared["B"][:8]
    want = torch.einsum("or,nr->no", factor**2, deviation**2).sqrt()
    assert float((drawn.std(0) / want - 1).abs().max()) < 0.2
    assert float((drawn.mean(0) / want).abs().max()) < 4 / 400**0.5


def test_pvera_draws_by_the_seed_of_the_call_alone():
    _, params, net, adapter = ours(fp.PVeRA(r=3, target_modules=SITES))
    x = randn(2, 12)
    outs = [net(params, adapter, x, context=fp.Context(training=True, seed=s)) for s in (0, 0, 1)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_pvera_draws_in_evaluation_too_if_asked():
    x = randn(2, 12)
    _, params, net, adapter = ours(fp.PVeRA(r=3, sample_at_inference=True, target_modules=["wide"]), One)
    with pytest.raises(ValueError, match=r"pvera at 'wide': sample_at_inference needs a seed.*Context\(seed=step\)"):
        net(params, adapter, x)
    outs = [net(params, adapter, x, context=fp.Context(seed=s)) for s in (0, 0, 1)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    torch.testing.assert_close(outs[2], net(params, adapter, x, context=fp.Context(training=True, seed=1)))
    seeded = fp.adapt(net.model, dataclasses.replace(net.methods[0], generator_seed=3))
    assert torch.equal(seeded(params, adapter, x), seeded(params, adapter, x))
    assert torch.equal(seeded(params, adapter, x, context=fp.Context(seed=1)), outs[2])
    other = fp.adapt(net.model, dataclasses.replace(net.methods[0], generator_seed=4))
    assert not torch.equal(seeded(params, adapter, x), other(params, adapter, x))


# -- TinyLoRA ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tying", [0.0, 0.2, 0.3, 0.5, 0.75, 0.9, 1.0])
def test_tinylora_groups_sites_as_peft_does(tying):
    def make():
        return nn.Sequential(*[nn.Linear(4, 4) for _ in range(7)])

    names = [str(i) for i in range(7)]
    _, _, net, adapter = ours(fp.TinyLoRA(r=1, u=2, weight_tying=tying, target_modules=names), make)
    wrapped = theirs(peft.TinyLoraConfig(r=1, u=2, weight_tying=tying, target_modules=names), make)
    want = [wrapped.base_model.model[i]._tinylora_v_key["default"] for i in range(7)]
    scopes = net.entries[0].scopes
    assert [scopes[n] for n in names] == [(f"group {w}",) for w in want]
    assert adapter.params.keys() == {f"group {w}" for w in want}


def test_tinylora_drops_what_an_embedding_looks_up():
    method, ids = fp.TinyLoRA(r=2, u=3, tinylora_dropout=0.5, target_modules=["table"]), torch.arange(9)[None]
    _, params, net, adapter = ours(method, Table)
    leaves = {**adapter.consts["table"], **adapter.params["group 0"]}
    mixed = torch.einsum("u,urs->rs", leaves["v"], leaves["P"]) @ leaves["A"]
    for seed in range(4):
        got = net(params, adapter, ids, context=fp.Context(training=True, seed=seed)) - params["table.weight"]
        low = torch.linalg.lstsq(mixed.T, got[0].T).solution.T / leaves["B"]
        torch.testing.assert_close(low, torch.where(low > 1, 2.0, 0.0).double(), atol=1e-6, rtol=0)
        assert 0 < float(low.mean()) < 2


def test_tinylora_reads_a_file_without_its_projection_or_with_a_start_that_is_none(tmp_path):
    config = peft.TinyLoraConfig(r=2, u=3, init_weights=False, target_modules=SITES)
    wrapped, x = theirs(config), randn(3, 12)
    with torch.no_grad():
        for v in wrapped.base_model.tinylora_v["default"].values():
            v.copy_(randn(3))
        want = wrapped(x)
    quietly(wrapped.save_pretrained, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(path).items() if not k.endswith("tinylora_P")}, path)
    model, params = fp.functionalize(base())
    net, adapter = fp.load_peft(model, params, tmp_path)
    torch.testing.assert_close(net(params, adapter, x), want)
    with pytest.raises(ValueError, match="init_weights must be True or 'uniform' where v is not read from a file, got False"):
        net.init(params, 0)


# -- UniLoRA -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "length"), [(0, 3), (5, 7), (21, 7), (100, 7), (1001, 256)])
def test_unilora_assigns_as_peft_does_and_evenly(count, length):
    from peft.tuners.unilora.model import UniLoraModel

    got = assignment(count, length, 42)
    assert torch.equal(got, UniLoraModel.generate_index(count, length, 42))
    taken = torch.bincount(got, minlength=length)
    assert int(taken.max() - taken.min()) <= 1


def test_unilora_keeps_the_length_of_theta():
    """The assignment is a matrix with orthonormal columns, if every entry of theta is taken."""
    _, _, _, adapter = ours(fp.UniLoRA(r=2, theta_d_length=11, target_modules=SITES))
    theta = adapter.params[""]["theta"]
    parts = [theta[c[f"i{n}"]] * c[f"s{n}"] for c in (adapter.consts[s] for s in SITES) for n in "AB"]
    torch.testing.assert_close(torch.cat([p.flatten() for p in parts]).norm(), theta.norm(), rtol=1e-6, atol=0)
    assert theta.numel() == 11


# -- VB-LoRA -----------------------------------------------------------------------------------------------------------------


def topk_config(k, **fields):
    return peft.VBLoRAConfig(
        r=2, num_vectors=7, vector_length=4, topk=k, save_only_topk_weights=True, target_modules=SITES, **fields
    )


@pytest.mark.parametrize("k", [1, 2, 3])
def test_vblora_files_of_the_top_vectors_alone(k, tmp_path):
    wrapped, x = shift(theirs(topk_config(k), dtype=torch.float32), 1.0), randn(3, 12).float()
    quietly(wrapped.save_pretrained, tmp_path / "theirs")
    model, params = fp.functionalize(base(dtype=torch.float32))
    net, adapter = fp.load_peft(model, params, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(net(params, adapter, x), wrapped(x))
    fp.save_peft(net, adapter, tmp_path / "ours")
    got, want = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs"))
    assert got.keys() == want.keys()
    for key, t in want.items():
        assert got[key].dtype == t.dtype
        torch.testing.assert_close(got[key], t)
    back = quietly(peft.PeftModel.from_pretrained, base(dtype=torch.float32), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(back(x), net(params, adapter, x))


def test_vblora_from_such_a_file_has_finite_gradients_where_it_chose(tmp_path):
    wrapped, x = shift(theirs(topk_config(2)), 1.0), randn(3, 12)
    quietly(wrapped.save_pretrained, tmp_path)
    model, params = fp.functionalize(base())
    net, adapter = fp.load_peft(model, params, tmp_path)
    context = fp.Context(training=True, seed=0)
    grads = torch.func.grad(lambda p: net(params, adapter.replace(params=p), x, context=context).square().sum())(adapter.params)
    for site in SITES:
        for name in ("LA", "LB"):
            chosen = adapter.params[site][name] > -1e3
            assert bool((chosen.sum(-1) == 2).all())
            assert bool(torch.isfinite(grads[site][name]).all())
            assert bool(((grads[site][name] != 0) <= chosen).all())
    assert bool(torch.isfinite(grads[""]["V"]).all())


@pytest.mark.parametrize(
    ("count", "dtype"), [(255, torch.uint8), (256, torch.int16), (2**15 - 1, torch.int16), (2**15, torch.int32)]
)
def test_vblora_keeps_indices_in_the_integers_of_peft(count, dtype, tmp_path):
    method = fp.VBLoRA(r=1, num_vectors=count, vector_length=4, topk=1, save_only_topk_weights=True, target_modules=["wide"])
    _, params, net, adapter = ours(method, dtype=torch.float32)
    fp.save_peft(net, adapter, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    held = {t.dtype for k, t in tensors.items() if k.endswith("_topk_indices")}
    assert held == {dtype}
    x = randn(2, 12).float()
    again, read = fp.load_peft(net.model, params, tmp_path)
    torch.testing.assert_close(again(params, read, x), net(params, adapter, x))


def test_vblora_indices_of_a_bank_beyond_32_bits():
    from funcpeft.methods.vblora import _smallest

    assert _smallest(2**31 - 1) is torch.int32
    assert _smallest(2**31) is torch.int64


# -- Super-Tuning ------------------------------------------------------------------------------------------------------------


def test_supertuning_trains_the_largest_or_smallest_entries_in_order():
    _, params, _, adapter = ours(fp.SuperTuning(sparsity=0.75, target_modules=["wide"]))
    held = params["wide.weight"].abs().flatten()[adapter.consts["wide"]["i"].long()]
    assert torch.equal(held, params["wide.weight"].abs().flatten().sort(descending=True).values[:24])
    _, params, _, adapter = ours(fp.SuperTuning(sparsity=0.75, select_top=False, target_modules=["wide"]))
    held = params["wide.weight"].abs().flatten()[adapter.consts["wide"]["i"].long()]
    assert torch.equal(held, params["wide.weight"].abs().flatten().sort().values[:24])


@pytest.mark.parametrize("r", [None, 2])
def test_supertuning_gathers_for_few_tokens_and_multiplies_for_many(r):
    model, params, net, adapter = ours(fp.SuperTuning(sparsity=0.95, r=r, target_modules=["wide"]), One)
    merged, _ = net.merge(params, adapter)
    for tokens in (1, 40):
        x = randn(tokens, 12)
        torch.testing.assert_close(net(params, adapter, x), model(merged, x))
    assert adapter.params["wide"]["v"].numel() == 4


def test_supertuning_drops_only_in_the_low_rank_part():
    context, x = fp.Context(training=True, seed=0), randn(3, 12)
    for r, same in ((None, True), (2, False)):
        _, params, net, adapter = ours(fp.SuperTuning(sparsity=0.9, r=r, lora_dropout=0.5, target_modules=["wide"]), One)
        assert torch.equal(net(params, adapter, x, context=context), net(params, adapter, x)) is same


def test_supertuning_writes_its_scaling_out(tmp_path):
    for given, written in ((None, 6), (5, 5)):
        method = fp.SuperTuning(sparsity=0.9, r=3, lora_alpha=given, target_modules=SITES)
        _, _, net, adapter = ours(method)
        assert float(adapter.consts["wide"]["scaling"]) == written / 3
        fp.save_peft(net, adapter, tmp_path)
        assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == written


# -- what is refused ---------------------------------------------------------------------------------------------------------

BIAS = "bias must be 'none', 'all' or '{}_only', got 'some'"
REFUSED = [
    (fp.RandLoRA, {"r": 0}, "randlora: r must be a positive integer, got 0"),
    (fp.RandLoRA, {"projection_prng_key": None}, "projection_prng_key must be an integer, got None"),
    (fp.RandLoRA, {"randlora_dropout": 1.0}, r"randlora_dropout must be in \[0, 1\), got 1.0"),
    (fp.RandLoRA, {"bias": "some"}, BIAS.format("randlora")),
    (fp.PVeRA, {"r": -1}, "pvera: r must be a positive integer, got -1"),
    (fp.PVeRA, {"projection_prng_key": 1.5}, "projection_prng_key must be an integer, got 1.5"),
    (fp.PVeRA, {"pvera_dropout": -0.1}, r"pvera_dropout must be in \[0, 1\), got -0.1"),
    (fp.PVeRA, {"bias": "some"}, BIAS.format("pvera")),
    (fp.TinyLoRA, {"r": True}, "tinylora: r must be an integer, got True"),
    (fp.TinyLoRA, {"u": 0}, "u must be a positive integer, got 0"),
    (fp.TinyLoRA, {"weight_tying": 1.5}, r"weight_tying must be in \[0, 1\], got 1.5"),
    (fp.TinyLoRA, {"tinylora_dropout": 2}, r"tinylora_dropout must be in \[0, 1\), got 2"),
    (fp.TinyLoRA, {"init_weights": "normal"}, "init_weights must be one of .*'uniform'.*got 'normal'"),
    (fp.TinyLoRA, {"bias": "some"}, BIAS.format("tinylora")),
    (fp.UniLoRA, {"r": 0}, "unilora: r must be a positive integer, got 0"),
    (fp.UniLoRA, {"theta_d_length": 0}, "theta_d_length must be a positive integer, got 0"),
    (fp.UniLoRA, {"proj_seed": -1}, "proj_seed must be a non-negative integer, got -1"),
    (fp.UniLoRA, {"init_theta_d_bound": 0.0}, "init_theta_d_bound must be positive, got 0.0"),
    (fp.UniLoRA, {"unilora_dropout": 1.0}, r"unilora_dropout must be in \[0, 1\), got 1.0"),
    (fp.UniLoRA, {"bias": "some"}, BIAS.format("unilora")),
    (fp.VBLoRA, {"vector_length": 0}, "vblora: vector_length must be a positive integer, got 0"),
    (fp.VBLoRA, {"num_vectors": 3, "topk": 4}, "topk must be at most num_vectors = 3, got 4"),
    (fp.VBLoRA, {"init_logits_std": -1.0}, "init_logits_std must be non-negative, got -1.0"),
    (fp.VBLoRA, {"init_vector_bank_bound": -1.0}, "init_vector_bank_bound must be non-negative, got -1.0"),
    (fp.VBLoRA, {"vblora_dropout": 1.0}, r"vblora_dropout must be in \[0, 1\), got 1.0"),
    (fp.VBLoRA, {"bias": "some"}, BIAS.format("vblora")),
    (fp.SuperTuning, {"sparsity": 1.0}, r"supertuning: sparsity must be in \[0, 1\), got 1.0"),
    (fp.SuperTuning, {"r": 0}, "r must be a positive integer, got 0"),
    (fp.SuperTuning, {"lora_alpha": 3}, "lora_alpha must be None without r, got 3; set r too"),
    (fp.SuperTuning, {"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
]


@pytest.mark.parametrize(("method", "fields", "message"), REFUSED, ids=lambda v: v.__name__ if isinstance(v, type) else str(v))
def test_fields_that_make_no_sense_are_refused(method, fields, message):
    with pytest.raises(ValueError, match=message):
        method(**fields)


def test_sites_that_do_not_fit_are_refused():
    model, _ = fp.functionalize(base())
    with pytest.raises(
        ValueError, match=r"vblora at 'wide': vector_length must divide in 12 and out 8, got 3; use one of \[1, 2, 4\]"
    ):
        fp.adapt(model, fp.VBLoRA(vector_length=3, target_modules=SITES))
    with pytest.raises(ValueError, match="'wide': sparsity must leave one of 96 entries to train, got"):
        fp.adapt(model, fp.SuperTuning(target_modules=["wide"]))


@pytest.mark.parametrize(
    ("method", "field"),
    [
        (fp.RandLoRA, "randlora_dropout"),
        (fp.PVeRA, "pvera_dropout"),
        (fp.TinyLoRA, "tinylora_dropout"),
        (fp.UniLoRA, "unilora_dropout"),
        (fp.VBLoRA, "vblora_dropout"),
        (fp.SuperTuning, "lora_dropout"),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_dropout_is_refused_where_no_input_meets_the_weight(method, field):
    """The projection behind ``nn.MultiheadAttention`` is read by its module."""
    model, _ = fp.functionalize(nn.MultiheadAttention(8, 2).eval())
    fields: dict[str, Any] = {field: 0.1}
    fields |= {"vector_length": 8} if method is fp.VBLoRA else {"sparsity": 0.5} if method is fp.SuperTuning else {}
    with pytest.raises(ValueError, match=rf"{method.__name__.lower()} at 'out_proj': {field} must be 0 where no input meets"):
        fp.adapt(model, method(target_modules=["out_proj"], **fields))


def test_randlora_bases_of_equal_entries_are_refused():
    model, params = fp.functionalize(base(lambda: nn.Sequential(nn.Linear(1, 1)), torch.float32))
    net = fp.adapt(model, fp.RandLoRA(r=1, target_modules=["0"]))
    with pytest.raises(ValueError, match="entries of the bases must not all be equal, got those of key 0; change r or"):
        net.init(params, 0)


def test_draws_of_a_seed_are_the_same_on_every_dtype():
    fresh = [
        ours(fp.TinyLoRA(init_weights="uniform", u=3, target_modules=SITES), dtype=d) for d in (torch.float32, torch.float64)
    ]
    a, b = (net.init(params, 3).params["group 0"]["v"] for _, params, net, _ in fresh)
    assert torch.equal(a.double(), b)
    assert torch.equal(a, rng.uniform((3,), rng.generator(3, "group 0"), 0.02))
    assert F.mse_loss(a, torch.zeros(3)) > 0


def test_a_factored_method_must_give_its_factors():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Empty(Factored):
        def init_site(self, base, gen):
            return {"A": torch.zeros(1)}, {}

    _, params, net, adapter = ours(Empty(target_modules=["wide"]), One)
    with pytest.raises(TypeError, match="Empty: a factored method must define pair"):
        net(params, adapter, randn(2, 12))

"""LoRA's inits: parity with peft in float32, formulas, files, ranks that EVA shares out, and every refusal."""

import dataclasses
import json
import warnings

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from rows.row import GPT, LINEARS, Embedded, Gpt, Mlp
from safetensors.torch import load_file
from torch import nn

from funcpeft import lorainits, rng
from funcpeft.adapt import adapt, peft_init
from funcpeft.errors import CheckpointError
from funcpeft.functional import functionalize
from funcpeft.gradients import value_and_grad
from funcpeft.interop.peft import load_peft, save_peft
from funcpeft.methods import DoRA, KaSA, LoRA, MonteCLoRA, VeLoRA
from funcpeft.optim import adamw
from funcpeft.population import apply_many
from funcpeft.stacking import stack, unstack
from funcpeft.statistics import calibrate, weight_gradients
from funcpeft.testing import check_law
from funcpeft.tree import tree_map

pytestmark = [  # of peft, about what it decides by itself
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA"),
]

MODELS = {"mlp": (Mlp, LINEARS, 12), "gpt": (Gpt, GPT, 8)}
EPS = torch.finfo(torch.float32).eps


def made(cls, seed=1):
    torch.manual_seed(seed)
    return cls().eval()


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ours(cls, method):
    model, params = functionalize(made(cls))
    return model, params, adapt(model, method)


def theirs(module, seed=5, **fields):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(module, peft.LoraConfig(**fields)).eval()


def factors(wrapped, path):
    layer = wrapped.base_model.model.get_submodule(path)
    if "default" in layer.lora_embedding_A:
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def moved(adapter, seed=7):
    gen = torch.Generator().manual_seed(seed)
    return adapter.replace(params=tree_map(lambda t: t + 0.3 * torch.randn(t.shape, generator=gen), adapter.params))


def inputs(width, count=4, rows=30):
    return [drawn(1, rows, width, seed=i) @ torch.linspace(2, 0.1, width).diag() for i in range(count)]


def near(got, want, ulps=500):
    size = float(want.detach().abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got, want, rtol=0, atol=ulps * EPS * (1 + size))


# -- from the weight ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_0", "pissa_niter_4", "mica"])
def test_inits_from_the_weight_are_bit_for_bit_peft(init, name):
    cls, names, width = MODELS[name]
    fields = {"r": 4, "lora_alpha": 6, "target_modules": names, "init_lora_weights": init}
    wrapped = theirs(made(cls), **fields)
    model, params, net = ours(cls, LoRA(**fields))
    adapter, x = peft_init(net, params, 5), drawn(3, width)
    for path in names:
        leaves = adapter.leaves(path)
        for got, want in zip((leaves["A"], leaves["B"]), factors(wrapped, path), strict=True):
            assert torch.equal(got, want)
    assert torch.equal(net(params, adapter, x), model(params, x))
    near(wrapped(x), model(params, x))


def test_a_randomised_decomposition_is_that_of_torch():
    for shape in ((9, 6), (6, 9), (7, 7)):
        matrix = drawn(*shape)
        torch.manual_seed(3)
        want = torch.svd_lowrank(matrix, q=4, niter=2)
        got = lorainits.svd_lowrank(matrix, 4, 2, rng.stream(3).generator)
        assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize(("cls", "names", "shapes"), [(Gpt, GPT, (24, 8)), (Embedded, ["emb"], (8, 20))])
def test_mica_trains_a_alone_on_the_least_singular_directions(cls, names, shapes, tmp_path):
    fields = {"r": 3, "lora_alpha": 6, "target_modules": names, "init_lora_weights": "mica"}
    wrapped = theirs(made(cls), **fields)
    model, params, net = ours(cls, LoRA(**fields))
    adapter = net.init(params, 0)
    assert all(leaves.keys() == {"A"} for leaves in adapter.params.values())
    stored = params[f"{names[0]}.weight"].double().T
    b = adapter.consts[names[0]]["B"]
    least = torch.linalg.eigh(stored @ stored.T)[1][:, : max(3, shapes[0] - min(shapes) + 3)]  # of a matrix that is no SVD
    near(least @ least.T @ b.double(), b.double(), 5000)
    assert not any(p.requires_grad for n, p in wrapped.named_parameters() if "lora_B" in n or "embedding_B" in n)
    adapter = moved(adapter)
    save_peft(net, adapter, tmp_path)
    again, read = load_peft(model, params, tmp_path)
    assert read.params.keys() == adapter.params.keys()
    assert all(torch.equal(read.leaves(p)[n], adapter.leaves(p)[n]) for p in names for n in "AB")
    back = peft.PeftModel.from_pretrained(made(cls), tmp_path).eval()
    x = torch.arange(20).reshape(4, 5) if cls is Embedded else drawn(3, 8)
    near(back(x), again(params, read, x))
    merged, _ = net.merge(params, adapter)
    near(model(merged, x), again(params, read, x))


@pytest.mark.parametrize("cls", [DoRA, KaSA, MonteCLoRA, VeLoRA])
def test_mica_is_a_variant_and_goes_with_no_other(cls):
    with pytest.raises(ValueError, match=f"{cls.__name__.lower()}: init_lora_weights must be .*, got 'mica'"):
        cls(init_lora_weights="mica")


def test_names_that_peft_takes_in_any_case_are_taken():
    assert [LoRA(init_lora_weights=n).init_lora_weights for n in ("OLoRA", "Gaussian", "MICA")] == ["olora", "gaussian", "mica"]


# -- from data ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how", ["ipm", "kpm"])
def test_corda_is_pefts(how, name):
    cls, names, width = MODELS[name]
    batches, module = inputs(width), made(cls)
    fields = {"r": 3, "lora_alpha": 6, "target_modules": names, "init_lora_weights": "corda", "rank_pattern": {names[0]: 2}}
    config = peft.LoraConfig(**fields, corda_config=CordaConfig(corda_method=how))
    preprocess_corda(module, config, run_model=lambda: [module(x) for x in batches])
    wrapped = peft.get_peft_model(module, config)
    model, params, net = ours(cls, LoRA(**fields, corda_config={"corda_method": how}))
    adapter = net.init(params, 0, statistics=calibrate(net, params, batches, progress=False))
    for path in names:
        leaves = adapter.leaves(path)
        for got, want in zip((leaves["A"], leaves["B"]), factors(wrapped, path), strict=True):
            sign = torch.where((got * want).sum() < 0, -1, 1)
            near(sign * got, want, 5000)
    near(net(params, adapter, batches[0]), model(params, batches[0]), 50)
    near(wrapped(batches[0]), model(params, batches[0]))
    near(net(params, moved(adapter), batches[0]), _with(wrapped, moved(adapter), names)(batches[0]), 5000)


def _with(wrapped, adapter, names):
    with torch.no_grad():
        for path in names:
            for leaf, name in zip(factors(wrapped, path), "AB", strict=True):
                leaf.copy_(adapter.params[path][name])
    return wrapped


def test_corda_keeps_the_parts_that_matter_for_the_inputs():
    weight, x = (
        drawn(6, 5, seed=3).double(),
        drawn(50, 5, seed=4).double() @ torch.tensor([9.0, 4, 1, 0.3, 0.1]).double().diag(),
    )
    covariance = x.T @ x / 50
    damped, inverse = lorainits.damped(covariance)
    near((damped @ inverse).float(), torch.eye(5), 50)
    torch.testing.assert_close(damped - covariance, 0.01 * covariance.diagonal().mean() * torch.eye(5).double())
    model, params = functionalize(nn.Sequential(nn.Linear(5, 6)).double())
    params = {**params, "0.weight": weight}
    updates = {}
    for how in ("ipm", "kpm"):
        method = LoRA(r=2, target_modules=["0"], init_lora_weights="corda", corda_config={"corda_method": how})
        leaves = adapt(model, method).init(params, 0, statistics={"0": {"covariance": covariance}}).leaves("0")
        updates[how] = leaves["scaling"] * leaves["B"] @ leaves["A"]
    kept = updates["ipm"] @ damped  # the best approximation of rank 2 of W C
    best = torch.linalg.svd(weight @ damped, full_matrices=False)
    torch.testing.assert_close(kept, best.U[:, :2] * best.S[:2] @ best.Vh[:2])
    assert (updates["kpm"] @ damped).norm() < kept.norm() / 10
    singular = lorainits.damped(torch.ones(3, 3))[0]
    assert torch.linalg.matrix_rank(singular) == 3


@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArBr", "A2rBr", "ArB2r", "random"])
def test_lora_ga_is_pefts(direction, scale):
    batches, options = inputs(12, rows=3), {"direction": direction, "scale": scale, "stable_gamma": 4}
    fields = {"r": 2, "lora_alpha": 6, "use_rslora": True, "target_modules": LINEARS, "init_lora_weights": "lora_ga"}
    module, config = made(Mlp), peft.LoraConfig(**fields, lora_ga_config=LoraGAConfig(**options))
    preprocess_loraga(module, config, lambda: [module(x).square().mean().backward() for x in batches])
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(module, config)
    method = LoRA(**fields, lora_ga_config=options)
    model, params, net = ours(Mlp, method)
    found = weight_gradients(net, params, lambda out, batch: out.square().mean(), batches, progress=False)
    adapter = method.init(net.bases(net.entries[0], params), seed=rng.stream(5), gradients=found)
    for path in LINEARS:
        for got, want in zip((adapter.params[path]["A"], adapter.params[path]["B"]), factors(wrapped, path), strict=True):
            assert torch.equal(got, want)
    assert torch.equal(net(params, adapter, batches[0]), model(params, batches[0]))
    near(wrapped(batches[0]), model(params, batches[0]))


def test_the_first_gradient_of_lora_ga_lies_in_that_of_the_weight():
    batches = inputs(12, rows=3)
    _, params, net = ours(Mlp, LoRA(r=2, target_modules=["lin0"], init_lora_weights="lora_ga"))
    found = weight_gradients(net, params, lambda out, batch: out.square().mean(), batches, progress=False)
    leaves = net.init(params, 0, gradients=found).leaves("lin0")
    u, _, vh = torch.linalg.svd(found["lin0"], full_matrices=False)
    near(leaves["A"] @ vh[:2].T @ vh[:2], leaves["A"], 50000)  # rows are the leading right singular directions
    near(u[:, 2:4] @ u[:, 2:4].T @ leaves["B"], leaves["B"], 50000)


def subspace(a, b):
    """Returns the least cosine between the spans of two sets of rows."""
    q, p = (torch.linalg.qr(t.double().T).Q for t in (a, b))
    return float(torch.linalg.svdvals(q.T @ p).min())


class Shared(nn.Module):
    """Two layers on the input itself, one behind them."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(10, 6), nn.Linear(10, 6), nn.Linear(6, 6)

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return self.o(torch.tanh(0.02 * (self.q(input_ids) + self.k(input_ids))))


def loader(count=3, rows=6, tokens=20, seed=0):
    scale = torch.tensor([6, 5.4, 4.8, 4.3, 3.8, 0.2, 0.2, 0.1, 0.1, 0.1])
    made = []
    for i in range(count):
        mask, labels = torch.ones(rows, tokens, dtype=torch.long), torch.ones(rows, tokens, dtype=torch.long)
        mask[0, :5], labels[1, :7] = 0, -100
        x = torch.where((mask == 0)[..., None], 50.0, drawn(rows, tokens, 10, seed=seed + i) * scale)
        made.append({"input_ids": x, "attention_mask": mask, "labels": labels})
    return made


@pytest.mark.parametrize("adjust", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_eva_shares_out_ranks_and_alphas_as_peft(rslora, adjust, tmp_path):
    names = ["q", "k", "o"]
    fields = {"r": 3, "lora_alpha": 6, "target_modules": names, "init_lora_weights": "eva", "use_rslora": rslora}
    options = {"rho": 2.0, "tau": 0.99, "adjust_scaling_factors": adjust}
    config = peft.LoraConfig(**fields, eva_config=EvaConfig(**options))
    wrapped = peft.get_peft_model(made(Shared), config)
    data = loader()
    peft.initialize_lora_eva_weights(wrapped, data, show_progress_bar=False)
    model, params, net = ours(Shared, LoRA(**fields, eva_config=options))
    adapter = net.init(params, 0, statistics=calibrate(net, params, data, progress=False))
    ranks = {path: len(leaves["A"]) for path, leaves in adapter.params.items()}
    layers = {n: m for n, m in wrapped.base_model.model.named_modules() if n in names and hasattr(m, "lora_A")}
    assert {n: len(m.lora_A["default"].weight) for n, m in layers.items()} == {n: r for n, r in ranks.items() if r}
    assert sum(ranks.values()) == 9
    assert len(set(ranks.values())) > 1
    for name, layer in layers.items():
        assert float(adapter.consts[name]["scaling"]) == pytest.approx(layer.scaling["default"], rel=1e-6)
        assert subspace(adapter.params[name]["A"], layer.lora_A["default"].weight.detach()) > 0.98
        assert not adapter.params[name]["B"].any()
    x = data[0]["input_ids"]
    assert torch.equal(net(params, adapter, x), model(params, x))
    wrapped.save_pretrained(tmp_path)
    again, read = load_peft(model, params, tmp_path)
    near(again(params, moved(read), x), _with(wrapped, moved(read), layers)(x), 5000)


def ranked(ranks=(4, 4, 1), **fields):
    """Returns a net whose sites EVA gives these ranks, with its adapter."""
    model, params, net = ours(
        Shared, LoRA(r=3, lora_alpha=6, target_modules=["q", "k", "o"], init_lora_weights="eva", **fields)
    )
    statistics = {}
    for path, r, width in zip(("q", "k", "o"), ranks, (10, 10, 6), strict=True):
        explained = torch.cat([torch.full((r,), 0.1), torch.full((6 - r,), 0.01)])
        components = torch.linalg.qr(drawn(width, width))[0][:6]
        statistics[path] = {"components": components, "singular": torch.arange(6, 0, -1.0), "explained": explained}
    return model, params, net, net.init(params, 0, statistics=statistics), statistics


def test_eva_of_no_rank_keeps_a_site_as_it_is(tmp_path):
    model, params, net, adapter, _ = ranked((6, 3, 0))
    assert [tuple(adapter.params[p]["A"].shape) for p in "qko"] == [(6, 10), (3, 10), (0, 6)]
    assert int(adapter.consts["o"]["rank"]) == 0
    x = drawn(2, 5, 10)
    fresh = adapter
    adapter = moved(adapter)
    _, grads = value_and_grad(lambda a: net(params, a, x).square().mean())(adapter)
    optimizer = adamw(lr=1e-2)
    adapter, _ = optimizer.update(grads, optimizer.init(adapter), adapter)
    want = net(params, adapter, x)
    merged, _ = net.merge(params, adapter)
    near(model(merged, x), want)
    assert torch.equal(merged["o.weight"], params["o.weight"])
    both = stack([adapter, fresh])
    got = apply_many(net, params, both, x, in_dims=None)
    near(got[0], want)
    assert tuple(unstack(both)[0].params["o"]["B"].shape) == (6, 0)
    save_peft(net, adapter, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert not tensors["base_model.model.o.lora_A.weight"].any()
    assert tensors["base_model.model.o.lora_B.weight"].shape == (6, 1)
    again, read = load_peft(model, params, tmp_path)
    near(again(params, read, x), want)
    near(peft.PeftModel.from_pretrained(made(Shared), tmp_path).eval()(x), want)
    _, grads = value_and_grad(lambda a: again(params, a, x).square().mean())(read)
    assert not any(t.any() for t in grads["o"].values())  # and so it stays


def test_ranks_go_to_what_explains_most():
    explained = {
        "a": torch.tensor([0.5, 0.4, 0.3, 0.2]),
        "b": torch.tensor([0.45, 0.1, 0.1, 0.1]),
        "c": torch.tensor([0.01] * 4),
    }
    assert lorainits.shared_ranks(explained, dict.fromkeys("abc", 2), 2.0) == {"a": 4, "b": 2, "c": 0}
    assert lorainits.shared_ranks(explained, dict.fromkeys("abc", 2), 1.0) == {"a": 2, "b": 2, "c": 2}
    assert lorainits.shared_ranks(explained, {"a": 1, "b": 2, "c": 1}, 1.5) == {"a": 2, "b": 2, "c": 0}


def test_eva_divides_by_the_root_of_the_singular_values_once():
    *_, plain, statistics = ranked()
    *_, white, _ = ranked(eva_config={"whiten": True})
    for path in "qko":
        a, singular = plain.params[path]["A"], statistics[path]["singular"]
        assert torch.equal(a, statistics[path]["components"][: len(a)])
        torch.testing.assert_close(white.params[path]["A"], a / singular[: len(a), None].sqrt())


def test_eva_starts_layers_that_are_not_linear_as_usual():
    model, params, net = ours(Embedded, LoRA(r=2, target_modules=["emb", "lin0"], init_lora_weights="eva"))
    statistics = calibrate(net, params, [torch.arange(20).reshape(4, 5)], settle=False, progress=False)
    assert statistics.keys() == {"lin0"}
    adapter = net.init(params, 0, statistics=statistics)
    assert not adapter.params["emb"]["A"].any()
    assert adapter.params["emb"]["B"].any()
    ids = torch.arange(6)[None]
    assert torch.equal(net(params, adapter, ids), model(params, ids))


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga", "pissa_niter_2"])
def test_dora_starts_from_the_same_factors(init):
    model, params, net = ours(Shared, DoRA(r=2, target_modules=["q", "k", "o"], init_lora_weights=init))
    x = drawn(2, 5, 10)
    needs = net.entries[0].method.sample_needs(net.bases(net.entries[0], params), 0)
    adapter = net.init(params, 0, **needs)
    near(net(params, adapter, x), model(params, x), 50)
    near(adapter.params["q"]["m"], params["q.weight"].norm(dim=1), 50)


def test_dora_on_loftq_starts_from_the_lengths_of_what_it_computes():
    _, params, net = ours(Shared, DoRA(r=2, target_modules=["q"], init_lora_weights="loftq"))
    dense = {**params, "q.weight": params["q.weight"] + drawn(6, 10)}
    leaves = net.init(params, 0, weights=dense).leaves("q")
    near(leaves["m"], (params["q.weight"] + leaves["scaling"] * leaves["B"] @ leaves["A"]).norm(dim=1), 50)


# -- laws and files ----------------------------------------------------------------------------------------------------------

MEASURED = [
    LoRA(r=1, lora_alpha=3, init_lora_weights="corda"),
    LoRA(r=1, use_rslora=True, init_lora_weights="lora_ga"),
    LoRA(r=2, lora_alpha=3, init_lora_weights="pissa_niter_2"),
]


@pytest.mark.parametrize("law", ["identity", "purity", "seed", "grad"])  # they add what PiSSA's formula does not say
@pytest.mark.parametrize("method", MEASURED, ids=lambda m: m.init_lora_weights)
def test_law(method, law):
    check_law(method, law, max_examples=2)


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("init", ["corda", "lora_ga", "pissa_niter_2"])
@pytest.mark.parametrize("cls", [LoRA, DoRA])
def test_first_factors_that_do_not_follow_from_the_base_are_in_the_file(cls, init, rslora, tmp_path):
    patterns = {"rank_pattern": {"q": 1}, "alpha_pattern": {"k": 5}}
    model, params, net = ours(Shared, cls(r=2, target_modules="q|k|o", init_lora_weights=init, use_rslora=rslora, **patterns))
    adapter, x = (
        net.init(params, 3, **net.entries[0].method.sample_needs(net.bases(net.entries[0], params), 1)),
        drawn(2, 5, 10),
    )
    adapter = moved(adapter)
    want = net(params, adapter, x)
    save_peft(net, adapter, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert {config[f"{n}_config"] for n in ("eva", "corda", "lora_ga")} == {None}
    again, read = load_peft(model, params, tmp_path)
    assert {p: len(leaves["A"]) for p, leaves in read.params.items()} == {"q": 2, "k": 4, "o": 4}
    near(again(params, read, x), want, 5000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near(peft.PeftModel.from_pretrained(made(Shared), tmp_path).eval()(x), want, 5000)


def test_a_member_is_written_with_first_factors_that_its_net_does_not_make(tmp_path):
    model, params, net = ours(Shared, LoRA(r=2, target_modules=["q"]))
    adapter = moved(adapt(model, LoRA(r=2, target_modules=["q"], init_lora_weights="pissa")).init(params, 0))
    save_peft(net, adapter, tmp_path)
    again, read = load_peft(model, params, tmp_path)
    x = drawn(2, 5, 10)
    near(again(params, read, x), net(params, adapter, x), 5000)


@pytest.mark.parametrize("init", ["lora_ga", "pissa_niter_2", "corda"])
def test_a_file_that_lacks_the_first_factors_is_refused(init, tmp_path):
    wrapped = theirs(made(Shared), r=2, target_modules=["q"])
    wrapped.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": init}))
    model, params = functionalize(made(Shared))
    rule = (
        f"lora: init '{init}' measures the update from first factors, which its file does not hold; let peft write it with path"
    )
    with pytest.raises(CheckpointError, match=rule):
        load_peft(model, params, tmp_path)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_factors_that_peft_cuts_short_are_read(init, rslora, tmp_path):
    wrapped = theirs(made(Shared), r=9, target_modules=["q"], init_lora_weights=init, use_rslora=rslora)
    with torch.no_grad():
        for p in (p for p in wrapped.parameters() if p.requires_grad):
            p.add_(0.3 * drawn(*p.shape))
    wrapped.save_pretrained(tmp_path)
    model, params = functionalize(made(Shared))
    net, adapter = load_peft(model, params, tmp_path)
    x = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    assert adapter.params["q"]["A"].shape == (6, 10)
    torch.testing.assert_close(net(params, adapter, x), wrapped(x), rtol=1e-4, atol=1e-5)


def test_a_file_that_peft_converted_is_read(tmp_path):
    wrapped = theirs(made(Shared), r=2, target_modules=["q"], init_lora_weights="pissa_niter_2")
    start = tmp_path / "start"
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(start)
    with torch.no_grad():
        for leaf in factors(wrapped, "q"):
            leaf.add_(0.3 * drawn(*leaf.shape))
    wrapped.peft_config["default"].init_lora_weights = "pissa_niter_2"
    wrapped.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=start)
    model, params = functionalize(made(Shared))
    net, adapter = load_peft(model, params, tmp_path / "end")
    x = drawn(2, 5, 10)
    near(net(params, adapter, x), wrapped(x), 5000)


# -- options and refusals ----------------------------------------------------------------------------------------------------


def test_options_are_frozen_filled_and_pefts():
    for name, cls in (("eva", EvaConfig), ("corda", CordaConfig), ("lora_ga", LoraGAConfig)):
        method = LoRA(init_lora_weights=name)
        assert dict(getattr(method, f"{name}_config")) == dataclasses.asdict(cls())
        assert LoRA.from_dict(json.loads(json.dumps(method.to_dict()))) == method
        assert hash(method) == hash(dataclasses.replace(method))
        assert getattr(LoRA(), f"{name}_config") is None
    assert LoRA(eva_config={"rho": 1}).eva_config["tau"] == 0.99


REFUSED = [
    ({"init_lora_weights": "pissa_niter"}, "lora: init_lora_weights must be one of True, False.*'pissa_niter_N'"),
    ({"init_lora_weights": "pissa_niter_N"}, "lora: init_lora_weights must be one of"),
    ({"init_lora_weights": "pissa_niter_x"}, "lora: init_lora_weights must be one of"),
    ({"init_lora_weights": "eva", "lora_bias": True}, "lora: lora_bias must be False with this init_lora_weights, got 'eva'"),
    ({"eva_config": {"rhoo": 2}}, "lora: eva_config: keys must be known, got 'rhoo'; did you mean 'rho'"),
    ({"eva_config": {"rho": 0.5}}, "lora: eva_config: rho must be at least 1, got 0.5"),
    ({"eva_config": {"tau": 2}}, r"lora: eva_config: tau must be in \[0, 1\], got 2"),
    ({"eva_config": {"whiten": 1}}, "lora: eva_config: whiten must be True or False, got 1"),
    ({"eva_config": {"label_mask_value": 0.5}}, "lora: eva_config: label_mask_value must be an int, got 0.5"),
    ({"corda_config": {"corda_method": "x"}}, "lora: corda_config: corda_method must be one of 'ipm', 'kpm', got 'x'"),
    ({"corda_config": {"cache_file": 3}}, "lora: corda_config: cache_file must be a path or None, got 3"),
    (
        {"init_lora_weights": "corda", "corda_config": {"cache_file": "x.pt"}},
        r"lora: corda_config must be without files, got \['x.pt'\]; save the tree that calibrate returns",
    ),
    ({"lora_ga_config": {"direction": "x"}}, "lora: lora_ga_config: direction must be one of 'ArBr'"),
    ({"lora_ga_config": {"scale": None}}, "lora: lora_ga_config: scale must be one of 'stable'"),
    ({"lora_ga_config": {"stable_gamma": 0}}, "lora: lora_ga_config: stable_gamma must be positive, got 0"),
]


@pytest.mark.parametrize(("fields", "match"), REFUSED)
def test_fields_are_checked(fields, match):
    with pytest.raises(ValueError, match=match):
        LoRA(**fields)


def test_options_must_be_a_mapping():
    with pytest.raises(ValueError, match="lora: eva_config must be a dict or None, got 'rho'"):
        LoRA(eva_config="rho")


@pytest.mark.parametrize(
    ("init", "r", "match"),
    [
        ("lora_ga", 4, r"lora at 'q': rank must be at most min\(out, in\) / 2 = 3, got 4"),
        ("corda", 7, r"lora at 'q': rank must be at most min\(out, in\) = 6, got 7"),
        ("mica", 7, r"lora at 'q': rank must be at most min\(out, in\) = 6, got 7"),
    ],
)
def test_ranks_are_checked(init, r, match):
    with pytest.raises(ValueError, match=match):
        ours(Shared, LoRA(r=r, target_modules=["q"], init_lora_weights=init))


def test_kinds_are_checked():
    model, _ = functionalize(nn.ModuleDict({"c": nn.Conv1d(3, 4, 2), "m": nn.MultiheadAttention(4, 2)}))
    with pytest.raises(ValueError, match="lora at 'c': init 'mica' takes linear layers and embeddings, got conv"):
        adapt(model, LoRA(r=1, target_modules=["c"], init_lora_weights="mica"))
    with pytest.raises(ValueError, match="lora at 'c': init 'corda' takes linear layers, got conv"):
        adapt(model, LoRA(r=1, target_modules=["c"], init_lora_weights="corda"))
    only = {"target_modules": (), "target_parameters": ["m.out_proj.weight"]}
    with pytest.raises(ValueError, match=r"lora at 'm\.out_proj': init 'corda' takes layers that meet their inputs"):
        adapt(model, LoRA(r=1, init_lora_weights="corda", **only))


MISSING = [
    ("eva", {}, "lora at 'q': init 'eva' needs statistics of the inputs; call net.init\\(params, seed, statistics=calibrate"),
    ("corda", {"statistics": {}}, "lora at 'q': init 'corda' needs statistics of the inputs; call"),
    ("corda", {"statistics": {"q": {}}}, "lora at 'q': init 'corda' needs statistics of the inputs, its covariance; call"),
    (
        "corda",
        {"statistics": {"q": {"covariance": torch.ones(3, 3)}}},
        r"lora at 'q': statistics of the inputs must have shape \(10, 10\), got \(3, 3\); call",
    ),
    (
        "eva",
        {"statistics": {"q": {"components": torch.ones(4, 3)}}},
        r"lora at 'q': statistics of the inputs must have shape \(4, 10\), got \(4, 3\); call",
    ),
    ("lora_ga", {}, "lora at 'q': init 'lora_ga' needs the gradient of the weight; call net.init.*gradients=weight_gradients"),
    (
        "lora_ga",
        {"gradients": {"q": torch.ones(10, 6)}},
        r"lora at 'q': the gradient of the weight must have shape \(6, 10\), got \(10, 6\)",
    ),
    (
        "loftq",
        {"weights": {"q.weight": torch.ones(10, 6)}},
        r"lora at 'q': the dense weight that was quantized must have shape \(6, 10\), got \(10, 6\)",
    ),
]


@pytest.mark.parametrize(("init", "needs", "match"), MISSING)
def test_data_is_checked(init, needs, match):
    _, params, net = ours(Shared, LoRA(r=2, target_modules=["q"], init_lora_weights=init))
    with pytest.raises(ValueError, match=match):
        net.init(params, 0, **needs)


def one_site(init):
    model, params = functionalize(nn.Sequential(nn.Linear(4, 4)))
    return model, params, adapt(model, LoRA(r=1, target_modules=["0"], init_lora_weights=init))


def test_a_covariance_that_cannot_invert_is_refused_and_no_loop():
    _, params, net = one_site("corda")
    with pytest.raises(ValueError, match="a covariance must be finite, with a diagonal whose mean is above 0"):
        net.init(params, 0, statistics={"0": {"covariance": torch.zeros(4, 4)}})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_is_not_finite_or_empty_is_refused_by_site(value):
    bad = torch.full((4, 4), value)
    found = {"components": bad, "singular": torch.ones(4), "explained": torch.ones(4) / 4}
    for init, needs in (
        ("corda", {"statistics": {"0": {"covariance": bad}}}),
        ("eva", {"statistics": {"0": found}}),
        ("eva", {"statistics": {"0": {k: t[:0] for k, t in found.items()}}}),
        ("lora_ga", {"gradients": {"0": bad}}),
    ):
        _, params, net = one_site(init)
        with pytest.raises(ValueError, match=r"lora at .0.: .* must be finite and not empty"):
            net.init(params, 0, **needs)
    model, params, _ = one_site(True)
    batches = [torch.full((2, 4), value)]
    with pytest.raises(ValueError, match="weight_gradients at '0': gradients must be finite"):
        weight_gradients(model, params, lambda out, batch: out.sum(), batches, target_modules=["0"], progress=False)


@pytest.mark.parametrize("alpha", [{"lora_alpha": 0}, {"lora_alpha": -1.0}, {"alpha_pattern": {"0": 0}}])
def test_factors_of_the_weight_need_a_positive_alpha(alpha):
    with pytest.raises(ValueError, match="lora: lora_alpha must be positive with init 'pissa', got"):
        LoRA(init_lora_weights="pissa", **alpha)


@pytest.mark.parametrize("field", [{"lora_alpha": float("nan")}, {"alpha_pattern": {"0": float("inf")}}])
def test_a_field_that_is_not_finite_is_refused(field):
    with pytest.raises(ValueError, match=f"lora: {next(iter(field))} must be finite and of at most 64 bits, got"):
        LoRA(**field)

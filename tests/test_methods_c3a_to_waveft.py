"""C3A, GraLoRA, GLoRA, FRoD, BEFT and WaveFT: formulas spelled out, what sites share, and refusals."""

import math
import re

import numpy as np
import pytest
import torch
import zoo
from safetensors.torch import load_file
from torch import nn

from funcpeft.adapt import adapt
from funcpeft.context import Context
from funcpeft.errors import CheckpointError, NoMergedFormError
from funcpeft.functional import functionalize
from funcpeft.interop.peft import load_peft, save_peft
from funcpeft.methods import BEFT, C3A, FRoD, GLoRA, GraLoRA, WaveFT
from funcpeft.methods import frod as frods
from funcpeft.methods import waveft as waves
from funcpeft.tree import tree_map


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.site = layer

    def forward(self, x):
        return self.site(x)


class Layers(nn.Module):
    """Two blocks with the same two roles, and a head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for _ in range(2)])
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        for block in self.layers:
            x = block["down"](torch.tanh(block["up"](x)))
        return self.head(x)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(adapter, seed=7):
    gen = torch.Generator().manual_seed(seed)

    def move(t):
        return t + 0.3 * torch.randn(t.shape, generator=gen, dtype=t.dtype)

    return adapter.replace(params=tree_map(move, adapter.params))


def made(method, module):
    torch.manual_seed(0)
    model, params = functionalize(module.double())
    net = adapt(model, method)
    return params, net, moved(net.init(params, 0))


def one(method, out=6, in_=8, bias=True):
    torch.manual_seed(3)
    params, net, adapter = made(method, One(nn.Linear(in_, out, bias=bias)))
    return params, net, adapter, adapter.leaves("site")


def agree(got, want):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-12 * (1 + want.abs().max())


# -- C3A ---------------------------------------------------------------------------------------------------------------------


def test_c3a_is_a_circular_correlation_of_each_block():
    params, net, adapter, leaves = one(C3A(target_modules=["site"], block_size=2), 6, 8)
    x, k = randn(3, 8), leaves["K"]
    want = net.model(params, x)
    for p in range(3):
        for q in range(4):
            for j in range(2):
                for i in range(2):
                    want[:, 2 * p + j] += x[:, 2 * q + i] * k[p, q, (i - j) % 2] / 8
    agree(net(params, adapter, x), want)


def test_c3a_takes_half_precision_which_has_no_fourier_transform():
    torch.manual_seed(3)
    model, params = functionalize(One(nn.Linear(8, 6)).bfloat16())
    net = adapt(model, C3A(target_modules=["site"], block_size=2))
    adapter = net.init(params, 0)
    assert adapter.params["site"]["K"].dtype == torch.float32
    x = randn(3, 8).bfloat16()
    got, want = net(params, adapter, x), model(net.merge(params, adapter)[0], x)
    assert got.dtype == torch.bfloat16
    assert (got.float() - want.float()).abs().max() < 0.05


@pytest.mark.parametrize(("start", "bound"), [("xavier_uniform", 0.65), (False, 0.65), ("kaiming_uniform", 0.36), (True, 0.0)])
def test_c3a_starts_within_its_bound(start, bound):
    params, net, *_ = one(C3A(target_modules=["site"], block_size=1, init_weights=start))
    k = net.init(params, 0).params["site"]["K"].abs().max()
    assert bound / 2 <= k <= bound


# -- GraLoRA -----------------------------------------------------------------------------------------------------------------


def test_gralora_is_a_grid_of_low_rank_blocks():
    method = GraLoRA(target_modules=["site"], r=4, gralora_k=2, hybrid_r=3, alpha=5)
    params, net, adapter, leaves = one(method, 6, 8)
    a, b = leaves["A"], leaves["B"]
    delta = leaves["Bg"] @ leaves["Ag"]
    for j in range(2):
        for q in range(2):
            block = a[q][:, 2 * j : 2 * j + 2] @ b[j][2 * q : 2 * q + 2]
            delta[3 * j : 3 * j + 3, 4 * q : 4 * q + 4] += block.mT
    merged, _ = net.merge(params, adapter)
    agree(merged["site.weight"] - params["site.weight"], 5 / 7 * delta)


@pytest.mark.parametrize("shape", [(8,), (2, 8), (2, 3, 8), (2, 3, 2, 8)])
def test_gralora_takes_inputs_of_any_number_of_axes(shape):
    params, net, adapter, _ = one(GraLoRA(target_modules=["site"], r=4, hybrid_r=1))
    x = randn(*shape)
    agree(net(params, adapter, x), net.model(net.merge(params, adapter)[0], x))


def test_gralora_drops_different_inputs_of_grid_and_rest():
    method = GraLoRA(target_modules=["site"], r=2, gralora_k=1, hybrid_r=2, alpha=4, gralora_dropout=0.5)
    params, net, adapter, _ = one(method, 8, 8)
    eye = torch.eye(8, dtype=torch.float64)

    def kept(**only):  # which inputs reach the output, through one of the two terms
        leaves = {n: t if n in only else torch.zeros_like(t) for n, t in adapter.params["site"].items()}
        one_term = adapter.replace(params={"site": leaves})
        x = torch.ones(1, 8, dtype=torch.float64)
        grads = torch.func.jacrev(lambda x: net(params, one_term, x, context=Context(training=True, seed=3)))(x)[0, :, 0]
        return (grads - params["site.weight"]).abs().amax(0) > 1e-9

    grid, rest = kept(A=1, B=1), kept(Ag=1, Bg=1)
    assert not torch.equal(grid, rest)
    assert 0 < int(grid.sum()) < len(eye)
    assert 0 < int(rest.sum()) < len(eye)


# -- GLoRA -------------------------------------------------------------------------------------------------------------------

FORMS = [
    ("lora", "lora", "constant"),
    ("lora", "none", "none"),
    ("vector", "vector", "vector"),
    ("constant", "lora", "none"),
    ("none", "vector", "constant"),
    ("none", "none", "none"),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("forms", FORMS)
def test_glora_scales_and_shifts_weight_and_bias(forms, bias):
    a_b, c, d_e = forms
    method = GLoRA(target_modules=["site"], r=2, config_A_B=a_b, config_C=c, config_D_E=d_e)
    params, net, adapter, leaves = one(method, bias=bias)
    x, w = randn(2, 3, 8), params["site.weight"]

    def value(term, shape):
        if f"{term}d" in leaves:
            return (leaves[f"{term}d"] @ leaves[f"{term}u"]).view(shape)
        t = leaves.get(term, torch.zeros(1, dtype=torch.float64))
        return t[:, None].expand(shape) if len(shape) == 2 and len(t) == shape[0] else t.expand(shape)

    weight = w + w * value("A", (6, 8)) + value("B", (6, 8))
    want = x @ weight.mT
    if bias:
        b = params["site.bias"]
        want = want + b + b * value("D", (6,)) + value("E", (6,)) + w @ value("C", (8,))
    assert bias or not {"Cd", "C", "D", "E"} & leaves.keys()
    agree(net(params, adapter, x), want)
    merged, _ = net.merge(params, adapter)
    agree(net.model(merged, x), want)
    assert all((t - params[k]).abs().max() < 1e-9 for k, t in net.unmerge(merged, adapter).items())


# -- FRoD --------------------------------------------------------------------------------------------------------------------


def layered(**fields):
    return made(FRoD(target_modules=["up", "down"], **fields), Layers())


def test_frod_shares_a_basis_by_role():
    params, net, adapter = layered(sparse_rate=0.1)
    scopes = {path: net.entries[0].scopes[path] for path in net.entries[0].sites}
    assert {p.rpartition(".")[2]: s for p, s in scopes.items()} == {"up": ("category up",), "down": ("category down",)}
    shapes = {s: tuple(adapter.consts[s]["V"].shape) for v in scopes.values() for s in v}
    assert shapes == {"category up": (6, 6), "category down": (8, 8)}
    assert {n: set(v) for n, v in adapter.params.items()} == {path: {"lambda", "s"} for path in scopes}
    fresh = net.init(params, 0)
    for path in scopes:
        leaves, v = fresh.leaves(path), fresh.consts[scopes[path][0]]["V"]
        assert ((leaves["U"] * leaves["lambda"]) @ v.mT - params[f"{path}.weight"]).abs().max() < 1e-5


def test_frod_turns_the_basis_by_a_sparse_matrix():
    params, net, adapter = layered(sparse_rate=0.2)
    scope = adapter.consts["category up"]
    leaves = adapter.leaves("layers.1.up")
    core = torch.diag(leaves["lambda"])
    assert scope["places"].shape == (2, 7)
    assert (scope["places"][0] != scope["places"][1]).all()
    for s, (row, column) in zip(leaves["s"], scope["places"].T.tolist(), strict=True):
        core[row, column] += s
    merged, _ = net.merge(params, adapter)
    agree(merged["layers.1.up.weight"], leaves["U"] @ core @ scope["V"].mT)


def test_frod_drops_what_the_change_is_met_by():
    method = FRoD(target_modules=["site"], sparse_rate=0.2, frod_dropout=0.5)
    params, net, adapter, _ = one(method)
    x, context = randn(4, 8), Context(training=True, seed=1)
    merged, _ = net.merge(params, adapter)
    change = merged["site.weight"] - params["site.weight"]
    extra = net(params, adapter, x, context=context) - net.model(params, x)
    h = torch.linalg.lstsq(change, extra.mT).solution.mT  # the dropped input, where the change has full row rank
    agree(h @ change.mT, extra)
    assert (extra - x @ change.mT).abs().max() > 1e-3
    seen = [net(params, adapter, x, context=Context(training=True, seed=s)) for s in range(400)]
    mean = torch.stack(seen).mean(0) - net.model(params, x)
    assert (mean - x @ change.mT).abs().max() < 0.3 * (x @ change.mT).abs().max()


def test_frod_without_a_sparse_part():
    params, net, adapter = layered(sparse_rate=0)
    assert adapter.params["layers.0.up"]["s"].shape == (0,)
    x = randn(3, 6)
    agree(net(params, adapter, x), net.model(net.merge(params, adapter)[0], x))


def test_frod_reads_what_a_file_leaves_out(tmp_path):
    params, net, adapter = layered(sparse_rate=0.1, save_projection=False)
    save_peft(net, adapter, tmp_path)
    assert not [k for k in load_file(tmp_path / "adapter_model.safetensors") if "frod_V" in k or "s_indices" in k]
    _, back = load_peft(net.model, params, tmp_path)
    assert all(torch.equal(back.consts[s]["V"], adapter.consts[s]["V"]) for s in ("category up", "category down"))


def test_frod_refuses_a_file_without_its_basis(tmp_path):
    params, net, adapter = layered(sparse_rate=0.1, save_projection=False)
    save_peft(net, adapter, tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"save_projection": false', '"save_projection": true'))
    with pytest.raises(CheckpointError, match=re.escape("missing 'base_model.frod_V.")):
        load_peft(net.model, params, tmp_path)


@pytest.mark.parametrize(
    ("path", "category", "layer"),
    [
        ("lin0", "lin0", 9),
        ("model.layers.3.self_attn.q_proj", "self_attn_q_proj", 3),
        ("encoder.layer.11.attention.output.dense", "attention_output", 11),
        ("encoder.layer.11.output.dense", "output_dense", 11),
        ("output.dense", "output_dense", 9),
        ("blocks.2.up", "up", 2),
        ("layers.up.5.x", "x", 5),
        ("layers", "layers", 9),
    ],
)
def test_frod_reads_roles_and_layers_from_paths(path, category, layer):
    assert (frods.category_of(path), frods.layer_of(path, 9)) == (category, layer)


def test_frod_takes_weights_that_do_not_span_the_input():
    torch.manual_seed(3)
    module = One(nn.Linear(4, 8)).double()
    with torch.no_grad():
        module.site.weight[:, 2] = 0
    model, params = functionalize(module)
    net = adapt(model, FRoD(target_modules=["site"], sparse_rate=0.1, regularization_alpha=1.0))
    adapter, x = net.init(params, 0), randn(3, 4)
    assert int(torch.linalg.matrix_rank(adapter.consts["category site"]["V"])) == 3
    assert (net(params, adapter, x) - model(params, x)).abs().max() < 1e-5


# -- BEFT --------------------------------------------------------------------------------------------------------------------


def test_beft_adapts_value_projections_that_have_no_bias():
    model, params = zoo.functional("llama")
    net = adapt(model, BEFT())
    assert {p.rpartition(".")[2] for p in net.entries[0].sites} == {"v_proj"}
    adapter = moved(net.init(params, 0))
    x = zoo.inputs("llama")
    assert (zoo.leading(net(params, adapter, **x)) - zoo.leading(model(params, **x))).abs().max() > 1e-3
    path = next(iter(net.entries[0].sites))
    with pytest.raises(NoMergedFormError, match=re.escape(f"beft at '{path}': merging needs a layer with a bias; keep it")):
        net.merge(params, adapter)
    with pytest.raises(NoMergedFormError, match="merging needs a layer with a bias"):
        net.unmerge(params, adapter)


def test_beft_adds_at_the_channels_of_a_convolution():
    params, net, adapter = made(BEFT(target_modules=["site"]), One(nn.Conv2d(3, 4, 3)))
    x = randn(2, 3, 6, 6)
    agree(net(params, adapter, x), net.model(params, x) + adapter.params["site"]["v"][:, None, None])


# -- WaveFT ------------------------------------------------------------------------------------------------------------------


def moments(taps, count):
    """Returns sums of n^k h_n around the taps' centre, scaled so that rounding counts the same for every k."""
    n = (np.arange(len(taps)) - (len(taps) - 1) / 2) / len(taps)
    return [abs(float(np.sum(n**k * taps))) for k in range(count)]


@pytest.mark.parametrize("family", waves.FAMILIES)
def test_filters_are_those_of_an_orthogonal_wavelet(family):
    h = np.array(waves.synthesis(family))
    name, order = re.fullmatch("([a-z]+)([0-9]+)", family).groups()
    assert len(h) == int(order) * (6 if name == "coif" else 2)
    assert abs(h.sum() - math.sqrt(2)) < 1e-12
    shifts = [float(h[2 * k :] @ h[: len(h) - 2 * k]) for k in range(len(h) // 2)]
    assert np.allclose(shifts, [1] + [0] * (len(shifts) - 1), atol=1e-10)
    high = h[::-1] * (-1.0) ** np.arange(len(h))
    assert max(moments(high, int(order) * (2 if name == "coif" else 1))) < 1e-9


@pytest.mark.parametrize("order", range(1, 6))
def test_coiflets_scaling_functions_have_moments_that_vanish_too(order):
    h = np.array(waves.synthesis(f"coif{order}"))
    centre = float(np.arange(len(h)) @ h) / math.sqrt(2)
    assert abs(centre - round(centre)) < 1e-9
    scaled = [float(np.sum(((np.arange(len(h)) - centre) / len(h)) ** k * h)) for k in range(1, 2 * order)]
    assert max(map(abs, scaled)) < 1e-9


def test_symlets_are_less_lopsided_than_daubechies_filters():
    for order in range(4, 11):
        sym, db = (np.array(waves.synthesis(f"{name}{order}")) for name in ("sym", "db"))
        lopsided = [float(np.abs(h - h[::-1]).sum()) for h in (sym, db)]
        assert lopsided[0] < lopsided[1]


@pytest.mark.parametrize("family", ["db1", "db3", "sym4", "coif1"])
@pytest.mark.parametrize(("out", "in_"), [(6, 8), (5, 7), (1, 3)])
def test_waveft_is_a_sparse_matrix_through_the_inverse_transform(family, out, in_):
    method = WaveFT(target_modules=["site"], n_frequency=3, wavelet_family=family, scaling=2.0)
    params, net, adapter, leaves = one(method, out, in_)
    low = waves.synthesis(family)
    length = len(low)
    high = [(-1) ** n * low[length - 1 - n] for n in range(length)]

    def inverse(size):  # (size - length + 2, size): averages, then details, of one level along one axis
        m = torch.zeros(2 * (size // 2) + length - 2, size, dtype=torch.float64)
        for k in range(size // 2):
            for n in range(length):
                m[2 * k + n, k] += low[n]
                m[2 * k + n, size // 2 + k] += high[n]
        return m[length - 2 : len(m) - length + 2]

    rows, columns = (n + length - 2 + (n + length) % 2 for n in (out, in_))
    c = torch.zeros(rows, columns, dtype=torch.float64)
    for value, i in zip(leaves["c"], leaves["index"].tolist(), strict=True):
        c[i // in_ + (rows - out) // 2, i % in_ + (columns - in_) // 2] = value
    h, w = rows // 2, columns // 2  # the right upper quarter has the details down the columns
    c = torch.cat([torch.cat([c[:h, :w], c[h:, :w]], 1), torch.cat([c[:h, w:], c[h:, w:]], 1)])
    whole = inverse(rows) @ c @ inverse(columns).mT
    top, left = (len(whole) - out) // 2, (whole.shape[1] - in_) // 2
    merged, _ = net.merge(params, adapter)
    agree(merged["site.weight"] - params["site.weight"], 2 * whole[top : top + out, left : left + in_])


def test_waveft_places_follow_from_the_seed_alone(tmp_path):
    _, net, adapter = made(WaveFT(target_modules=["up"], n_frequency=5), Layers())
    index = [adapter.consts[f"layers.{i}.up"]["index"] for i in range(2)]
    assert torch.equal(*index)
    want = torch.randperm(48, generator=torch.Generator().manual_seed(777))[:5]
    assert torch.equal(index[0], want)
    assert not torch.equal(
        made(WaveFT(target_modules=["up"], n_frequency=5, random_loc_seed=1), Layers())[2].consts["layers.0.up"]["index"], want
    )
    save_peft(net, adapter, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert keys == {f"base_model.model.layers.{i}.up.waveft_spectrum" for i in range(2)}


def test_waveft_shares_numbers_by_size():
    method = WaveFT(target_modules=["up", "head"], n_frequency=6, proportional_parameters=True)
    _, _, adapter = made(method, Layers())
    counts = {p: len(v["c"]) for p, v in adapter.params.items()}
    assert counts == {"layers.0.up": round(18 * 48 / 120), "layers.1.up": round(18 * 48 / 120), "head": round(18 * 24 / 120)}


# -- refusals ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: C3A(block_size=0), "c3a: block_size must be a positive integer, got 0"),
        (lambda: C3A(block_size_pattern={"up": 0}), "c3a: block_size_pattern must be positive sizes, got (0,)"),
        (lambda: C3A(init_weights="zeros"), "c3a: init_weights must be one of 'xavier_uniform', 'gaussian'"),
        (lambda: C3A(bias="some"), "c3a: bias must be 'none', 'all' or 'c3a_only', got 'some'"),
        (lambda: GraLoRA(r=0), "gralora: r must be a positive integer, got 0"),
        (lambda: GraLoRA(gralora_k=0), "gralora: gralora_k must be a positive integer, got 0"),
        (lambda: GraLoRA(hybrid_r=-1), "gralora: hybrid_r must be a non-negative integer, got -1"),
        (lambda: GraLoRA(r=3), "gralora: r must be a multiple of gralora_k = 2, got 3"),
        (lambda: GraLoRA(gralora_dropout=1.0), "gralora: gralora_dropout must be in [0, 1), got 1.0"),
        (lambda: GraLoRA(bias="lora_only"), "gralora: bias must be 'none', 'all' or 'gralora_only', got 'lora_only'"),
        (lambda: GLoRA(r=0), "glora: r must be a positive integer, got 0"),
        (lambda: GLoRA(config_A_B="full"), "glora: config_A_B must be one of 'lora', 'vector', 'constant', 'none', got 'full'"),
        (lambda: GLoRA(config_C="constant"), "glora: config_C must be one of 'lora', 'vector', 'none', got 'constant'"),
        (lambda: GLoRA(config_D_E="lora"), "glora: config_D_E must be one of 'constant', 'vector', 'none', got 'lora'"),
        (lambda: GLoRA(bias="some"), "glora: bias must be 'none', 'all' or 'glora_only', got 'some'"),
        (lambda: FRoD(projection_prng_key=None), "frod: projection_prng_key must be an integer, got None"),
        (lambda: FRoD(sparse_rate=1.5), "frod: sparse_rate must be in [0, 1], got 1.5"),
        (lambda: FRoD(regularization_alpha=-1), "frod: regularization_alpha must be non-negative, got -1"),
        (lambda: FRoD(frod_dropout=-0.1), "frod: frod_dropout must be in [0, 1), got -0.1"),
        (lambda: FRoD(bias="some"), "frod: bias must be 'none', 'all' or 'frod_only', got 'some'"),
        (lambda: WaveFT(n_frequency=0), "waveft: n_frequency must be a positive integer, got 0"),
        (lambda: WaveFT(n_frequency_pattern={"up": -2}), "waveft: n_frequency must be a positive integer, got -2"),
        (lambda: WaveFT(wavelet_family="haar"), "waveft: wavelet_family must be one of 'db1', 'db2'"),
        (lambda: WaveFT(random_loc_seed=0.5), "waveft: random_loc_seed must be an integer, got 0.5"),
        (lambda: WaveFT(bias="some"), "waveft: bias must be 'none', 'all' or 'waveft_only', got 'some'"),
    ],
)
def test_a_field_is_checked(make, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        make()


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (
            C3A(target_modules=["site"], block_size=4),
            "c3a at 'site': block_size must divide in 8 and out 6, got 4; use one of [1, 2]",
        ),
        (GraLoRA(target_modules=["site"], r=4, gralora_k=4), "gralora at 'site': gralora_k must divide in 8 and out 6, got 4"),
        (WaveFT(target_modules=["site"]), "waveft at 'site': n_frequency must be at most out * in = 48, got 2592; see"),
        (
            WaveFT(target_modules=["site"], n_frequency=49, proportional_parameters=True),
            "waveft at 'site': n_frequency must be at most out * in = 48, got 49; its share",
        ),
    ],
)
def test_a_site_is_checked(method, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        one(method)


def test_glora_does_not_divide_by_zero():
    params, net, adapter, _ = one(GLoRA(target_modules=["site"], config_A_B="constant"))
    for term in ("A", "D"):
        leaves = {**adapter.params["site"], term: torch.full((1,), -1.0, dtype=torch.float64)}
        zeroed = adapter.replace(params={"site": leaves})
        merged, _ = net.merge(params, zeroed)
        with pytest.raises(
            NoMergedFormError, match="glora at 'site': an entry was scaled by 0, so merging does not invert; keep"
        ):
            net.unmerge(merged, zeroed)

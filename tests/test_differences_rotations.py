"""Where peft 0.21 is wrong about BOFT, HRA, HiRA, PSOFT, DEFT and OFT, each against a computation of its own."""

from __future__ import annotations

import copy
import warnings

import bitsandbytes as bnb
import bitsandbytes.functional as kernels
import peft
import peft.tuners.boft.layer as boft_layer
import pytest
import torch
import torch.nn.functional as F
from differences import differs
from safetensors.torch import load_file
from torch import nn

import funcpeft as fp
from funcpeft import checkpoint
from funcpeft.tree import tree_map


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch):
    """Keeps peft from trying to compile its kernel, which takes seconds and fails."""
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: None)


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.site = layer

    def forward(self, x):
        return self.site(x)


def one(make, dtype=torch.float64):
    torch.manual_seed(4)
    return One(make()).to(dtype).eval()


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def moved(adapter, scale=0.3):
    gen = torch.Generator().manual_seed(7)
    return adapter.replace(
        params=tree_map(lambda t: t + scale * torch.randn(t.shape, generator=gen, dtype=t.dtype), adapter.params)
    )


def theirs(module, config):
    torch.manual_seed(5)
    return quietly(peft.get_peft_model, module, config).eval()


def shifted(wrapped):
    """Moves peft's adapter away from init."""
    torch.manual_seed(9)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return wrapped


def ours(module, method):
    model, params = fp.functionalize(module)
    net = fp.adapt(model, method)
    return model, params, net, moved(net.init(params, 0))


def far(a, b):
    return a.shape != b.shape or not float((a - b).detach().abs().max()) < 1e-3


def loaded(make, folder, dtype=torch.float64):
    model, params = fp.functionalize(one(make, dtype))
    return params, *fp.load_peft(model, params, folder)


def chain(u):
    """Returns H_1 ... H_r, one reflection after the other."""
    total = torch.eye(u.shape[0], dtype=u.dtype)
    for column in u.T:
        total = total @ (torch.eye(u.shape[0], dtype=u.dtype) - 2 * torch.outer(column, column) / column.dot(column))
    return total


# -- kernels -----------------------------------------------------------------------------------------------------------------

GEOMETRIES = [
    {"kernel_size": 3, "dilation": 2, "padding": 2},
    {"kernel_size": 3, "padding": (0, 1)},
    {"kernel_size": 3, "stride": (1, 2)},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": (3, 2)},
]


def convolved(layer, weight, x):
    """Computes a convolution with another weight, as the layer does."""
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.copy_(weight.view_as(layer.weight))
        return layer(x)


def wrong(wrapped, x, want):
    with torch.no_grad():
        try:
            return far(wrapped(x), want)
        except RuntimeError:
            return True


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@differs(
    "HRA and BOFT",
    "a convolution's forward ignores `dilation` and `padding_mode`, and takes the first of kernel, stride and padding for all: "
    "another result than merging gives, or an error",
    "the layer's own geometry, of any kernel",
)
def test_a_convolution_keeps_its_geometry(geometry):
    def make():
        return nn.Conv2d(3, 4, **geometry)

    x, module = drawn(2, 3, 6, 7), one(make)
    _, params, net, adapter = ours(module, fp.HRA(r=2, target_modules=["site"]))
    w, u = params["site.weight"].flatten(1), adapter.params["site"]["U"].double()
    want = convolved(module.site, w @ chain(u), x)
    torch.testing.assert_close(net(params, adapter, x), want)
    assert wrong(theirs(one(make), peft.HRAConfig(r=2, init_weights=False, target_modules=["site"])), x, want)

    _, params, net, adapter = ours(module, fp.BOFT(boft_block_size=3, target_modules=["site"]))
    r, s = (adapter.params["site"][n].double() for n in ("R", "s"))
    skew, eye = (r[0] - r[0].mT) / 2, torch.eye(3, dtype=torch.float64)
    turned = torch.block_diag(*((eye - q) @ torch.linalg.inv(eye + q) for q in skew))
    want = convolved(module.site, s[:, None] * (w @ turned.T), x)
    torch.testing.assert_close(net(params, adapter, x), want)
    config = peft.BOFTConfig(boft_block_size=3, init_weights=False, target_modules=["site"])
    assert wrong(theirs(one(make, torch.float32), config), x.float(), want)


# -- HRA ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [2, 4, 8])
@differs(
    "HRA",
    "`apply_GS` starts of equal pairs, from which Gram and Schmidt's rule makes rounding errors of any length, or NaN",
    "vectors start apart: an orthogonal map, with a gradient",
)
def test_orthogonalised_reflections_start_apart(r):
    _, params, net, _ = ours(one(lambda: nn.Linear(12, 6)), fp.HRA(r=r, apply_GS=True, target_modules=["site"]))
    fresh = net.init(params, 0)
    w, merged = params["site.weight"], net.merge(params, fresh)[0]["site.weight"]
    torch.testing.assert_close(merged @ merged.T, w @ w.T, rtol=1e-6, atol=1e-6)
    u = fresh.params["site"]["U"].double()
    span = u @ torch.linalg.inv(u.T @ u) @ u.T  # the projection on the vectors
    torch.testing.assert_close(merged, w @ (torch.eye(12, dtype=torch.float64) - 2 * span), rtol=1e-5, atol=1e-6)
    wrapped = theirs(one(lambda: nn.Linear(12, 6)), peft.HRAConfig(r=r, apply_GS=True, target_modules=["site"]))
    turned = wrapped.base_model.model.site.get_delta_weight("default").detach()
    assert far(turned @ turned.T, torch.eye(12, dtype=torch.float64))


class Eight(nn.Module):
    """A layer whose weight bitsandbytes keeps in eight bits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        layer = nn.Linear(64, 48)
        self.site = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False, threshold=6.0)
        self.site.load_state_dict(layer.state_dict())
        self.site.to("cpu")

    def forward(self, x):
        return self.site(x)


def decoded():
    layer = Eight().site
    return kernels.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).double(), layer.bias.double()


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@differs("HRA", "on a bitsandbytes 8-bit layer the integer codes are reflected as if they were the weight", "the weight")
def test_the_weight_is_reflected_and_not_its_codes(tmp_path):
    wrapped = theirs(Eight(), peft.HRAConfig(r=4, init_weights=False, target_modules=["site"]))
    wrapped.save_pretrained(tmp_path)
    w, b = decoded()
    u = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.site.hra_u"].double()
    x = drawn(3, 64)
    want = F.linear(x, w @ chain(u), b).float()
    model, params = fp.functionalize(Eight())
    net, adapter = fp.load_peft(model, params, tmp_path)
    torch.testing.assert_close(net(params, adapter, x.float()), want, rtol=1e-4, atol=1e-4)
    assert far(wrapped(x.float()), want)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@differs(
    "DEFT", "on a bitsandbytes 8-bit layer the start is computed from the integer codes, and not neutral", "from the weight"
)
def test_a_start_is_of_the_weight_and_not_of_its_codes():
    x = drawn(3, 64).float()
    model, params = fp.functionalize(Eight())
    net = fp.adapt(model, fp.DEFT(r=4, target_modules=["site"]))
    w, _ = decoded()
    fresh = net.init(params, 0)
    torch.testing.assert_close(net(params, fresh, x), model(params, x), rtol=1e-4, atol=1e-4)
    start = F.relu(fresh.params["site"]["P"].double()).T @ w
    torch.testing.assert_close(fresh.params["site"]["R"].double(), start, rtol=1e-4, atol=1e-4)
    wrapped = theirs(Eight(), peft.DeftConfig(r=4, target_modules=["site"]))
    assert far(wrapped(x), Eight()(x))


# -- BOFT --------------------------------------------------------------------------------------------------------------------


class PlainKernel:
    """What peft's GPU kernel computes."""

    @staticmethod
    def apply(blocks):
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


def boft(factors, size=2):
    fields = {"boft_block_size": size, "boft_n_butterfly_factor": factors, "target_modules": ["site"]}
    return peft.BOFTConfig(**fields, init_weights=False)


def wide_linear():
    return nn.Linear(32, 6)


@pytest.mark.parametrize(("factors", "size"), [(2, 2), (3, 2), (4, 2), (3, 4)])
@differs(
    "BOFT",
    "`boft_n_butterfly_factor` over 1 is replaced by 1 where no CUDA extension compiles; the config keeps it, so that files do "
    "not load where one does",
    "every factor on every device; a file's tensors say how many it has",
)
def test_every_factor_turns(factors, size, tmp_path, monkeypatch):
    narrow = theirs(one(wide_linear, torch.float32), boft(factors, size))
    narrow.save_pretrained(tmp_path / "one")
    assert narrow.base_model.model.site.boft_R["default"].shape[0] == 1
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: PlainKernel)
    monkeypatch.setattr(boft_layer, "FastBlockDiag", PlainKernel)
    wrapped = theirs(one(wide_linear, torch.float32), boft(factors, size))
    wrapped.save_pretrained(tmp_path / "all")
    x = drawn(3, 32).float()
    params, net, adapter = loaded(wide_linear, tmp_path / "all", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(net(params, adapter, x), wrapped(x), rtol=1e-5, atol=1e-5)
    merged, _ = net.merge(params, adapter)
    torch.testing.assert_close(merged["site.weight"], wrapped.merge_and_unload().site.weight.data, rtol=1e-5, atol=1e-5)

    with pytest.raises(RuntimeError, match="size mismatch"):
        quietly(peft.PeftModel.from_pretrained, one(wide_linear, torch.float32), tmp_path / "one")
    params, net, adapter = loaded(wide_linear, tmp_path / "one", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(net(params, adapter, x), narrow(x), rtol=1e-5, atol=1e-5)
    assert net.methods[0].boft_n_butterfly_factor == 1


# -- HiRA --------------------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.b(self.a(x))


def two():
    torch.manual_seed(4)
    return Two().double().eval()


@differs(
    "HiRA",
    "`rank_pattern` is ignored when a layer is made, and saved all the same",
    "a rank per site; of a file, what the tensors say",
)
def test_ranks_by_pattern(tmp_path):
    ranks = {"r": 4, "rank_pattern": {"b": 2}, "target_modules": ["a", "b"]}
    _, params, net, adapter = ours(two(), fp.HiRA(**ranks))
    assert [adapter.params[p]["A"].shape[0] for p in ("a", "b")] == [4, 2]
    factors = {p: (adapter.params[p]["B"] @ adapter.params[p]["A"]).double() for p in ("a", "b")}
    x = drawn(3, 6)
    h = F.linear(x, params["a.weight"] * (1 + factors["a"]), params["a.bias"])
    want = F.linear(h, params["b.weight"] * (1 + factors["b"]), params["b.bias"])
    torch.testing.assert_close(net(params, adapter, x), want)

    wrapped = shifted(theirs(two(), peft.HiraConfig(**ranks)))
    assert wrapped.base_model.model.b.hira_A["default"].shape[0] == 4
    wrapped.save_pretrained(tmp_path)
    model, params = fp.functionalize(two())
    net, adapter = fp.load_peft(model, params, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(net(params, adapter, x), wrapped(x))


class Scaled(nn.Embedding):
    """An embedding that scales what it looks up, as Gemma 3 has."""

    def __init__(self):
        super().__init__(9, 4)
        self.embed_scale = torch.tensor(5.0, dtype=torch.float64)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


@differs(
    "HiRA",
    "on an embedding that scales what it looks up the forward leaves the update unscaled, and merging scales it",
    "both scale it",
)
def test_a_scaled_embedding_scales_the_update(tmp_path):
    ids = torch.arange(9)
    wrapped = shifted(theirs(one(Scaled), peft.HiraConfig(r=2, target_modules=["site"])))
    wrapped.save_pretrained(tmp_path)
    params, net, adapter = loaded(Scaled, tmp_path)
    table = params["site.weight"]
    change = table * (adapter.params["site"]["B"] @ adapter.params["site"]["A"]).T
    with torch.no_grad():
        torch.testing.assert_close(net(params, adapter, ids), 5 * (table + change))
        torch.testing.assert_close(net.merge(params, adapter)[0]["site.weight"], table + change)
        torch.testing.assert_close(wrapped(ids), 5 * table + change)
        torch.testing.assert_close(wrapped.merge_and_unload()(ids), 5 * (table + change))


# -- PSOFT -------------------------------------------------------------------------------------------------------------------


def linear():
    return nn.Linear(8, 6)


@differs(
    "PSOFT",
    "files do not hold the factors of the weight: where a library gives singular vectors other signs, a file is another model",
    "factors are leaves, which `funcpeft.checkpoint` keeps; a file of peft takes this machine's",
)
def test_an_adapter_keeps_the_signs_of_its_factors(tmp_path, monkeypatch):
    x, config = drawn(3, 8).float(), peft.PsoftConfig(r=2, target_modules=["site"])
    wrapped = shifted(theirs(one(linear, torch.float32), config))
    wrapped.save_pretrained(tmp_path)
    params, net, adapter = loaded(linear, tmp_path, torch.float32)
    checkpoint.save(tmp_path / "kept", adapter)
    with torch.no_grad():
        want = wrapped(x)
        torch.testing.assert_close(net(params, adapter, x), want, rtol=1e-5, atol=1e-5)
        plain = torch.linalg.svd

        def flipped(*args, **kwargs):
            u, s, vh = plain(*args, **kwargs)
            signs = torch.tensor([1.0, -1.0, 1.0, 1.0, 1.0, 1.0])
            return u * signs, s, signs[:, None] * vh

        monkeypatch.setattr(torch.linalg, "svd", flipped)
        back = quietly(peft.PeftModel.from_pretrained, one(linear, torch.float32), tmp_path).eval()
        assert far(back(x), want)
        torch.testing.assert_close(net(params, checkpoint.load(tmp_path / "kept"), x), want, rtol=1e-5, atol=1e-5)


@differs("PSOFT", "a float64 base is refused", "works; the factors are those of the weight in float32")
def test_factors_of_a_wide_weight():
    _, params, net, adapter = ours(one(linear), fp.PSOFT(r=2, target_modules=["site"]))
    p, q = adapter.params["site"], torch.zeros(2, 2, dtype=torch.float64)
    q[0, 1], q[1, 0] = p["Q"][0], -p["Q"][0]
    eye = torch.eye(2, dtype=torch.float64)
    turned = torch.diag(p["b"]) @ (eye + q) @ torch.linalg.inv(eye - q) @ torch.diag(p["a"])
    w, x = params["site.weight"], drawn(3, 8)
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    want = F.linear(x, w + u[:, :2] @ torch.diag(s[:2]) @ (turned - eye) @ vh[:2], params["site.bias"])
    torch.testing.assert_close(net(params, adapter, x), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="float32/float16/bfloat16"):
        theirs(one(linear), peft.PsoftConfig(r=2, target_modules=["site"]))


# -- DEFT and OFT ------------------------------------------------------------------------------------------------------------


@differs(
    "DEFT",
    "two adapters that are merged one after the other give another model than the two active together",
    "nested methods merge as they apply",
)
def test_nested_removals_merge_as_they_apply():
    method = fp.DEFT(r=2, init_weights=False, target_modules=["site"])
    model, params = fp.functionalize(one(linear))
    net, x = fp.adapt(model, [method, method]), drawn(3, 8)
    adapter = tuple(moved(a) for a in net.init(params, 0))
    w = params["site.weight"]
    for a in adapter:
        p, r = (a.params["site"][n].double() for n in ("P", "R"))
        w = w - p @ F.relu(p).T @ w + p @ r
    want = F.linear(x, w, params["site.bias"])
    torch.testing.assert_close(net(params, adapter, x), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(net.merge(params, adapter)[0], x), want, rtol=1e-5, atol=1e-5)

    config = peft.DeftConfig(r=2, init_weights=False, target_modules=["site"])
    wrapped = theirs(one(linear), config)
    wrapped.add_adapter("second", config)
    wrapped.base_model.set_adapter(["default", "second"])
    shifted(wrapped)
    with torch.no_grad():
        together = wrapped(x)
        for name in ("default", "second"):
            quietly(wrapped.merge_adapter, [name])
        assert far(wrapped(x), together)


@pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`")
@differs(
    "OFT",
    "a block size that does not divide is replaced by the nearest divisor, and the config keeps the one that was asked for",
    "an error that names the divisors; `nearest_divisor=True`, which files of peft imply, replaces it",
)
def test_a_size_that_does_not_divide_is_an_error():
    model, _ = fp.functionalize(one(linear))
    with pytest.raises(ValueError, match=r"oft at 'site'.*oft_block_size must divide.*got 3; use a divisor"):
        fp.adapt(model, fp.OFT(oft_block_size=3, target_modules=["site"]))
    net = fp.adapt(model, fp.OFT(oft_block_size=3, target_modules=["site"], nearest_divisor=True))
    _, params = fp.functionalize(one(linear))
    assert net.init(params, 0).params["site"]["Q"].shape == (4, 1)
    wrapped = theirs(one(linear), peft.OFTConfig(oft_block_size=3, target_modules=["site"]))
    assert wrapped.base_model.model.site.oft_R["default"].weight.shape == (4, 1)
    assert wrapped.peft_config["default"].oft_block_size == 3

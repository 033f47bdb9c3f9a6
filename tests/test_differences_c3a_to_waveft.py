"""Where peft 0.21 is wrong about C3A, GraLoRA, GLoRA, FRoD and WaveFT, each against its own computation."""

from __future__ import annotations

import warnings

import bitsandbytes as bnb
import bitsandbytes.functional as kernels
import peft
import pytest
import torch
import torch.nn.functional as F
from differences import differs
from safetensors.torch import load_file, save_file
from torch import nn

import funcpeft as fp
from funcpeft.errors import NoMergedFormError
from funcpeft.tree import tree_map


class One(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.site = layer

    def forward(self, x):
        return self.site(x)


def single(in_=8, out=8, dtype=torch.float64):
    torch.manual_seed(4)
    return One(nn.Linear(in_, out)).to(dtype).eval()


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def theirs(module, config, scale=0.3):
    """Returns peft's model, its adapter moved away from init."""
    torch.manual_seed(5)
    return shifted(quietly(peft.get_peft_model, module, config).eval(), scale)


def shifted(wrapped, scale=0.3):
    torch.manual_seed(9)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn_like(p))
    return wrapped


def ours(module, folder):
    model, params = fp.functionalize(module)
    return params, *fp.load_peft(model, params, folder)


def far(a, b, by=1e-3):
    return float((a - b).detach().abs().max()) > by


# -- C3A ---------------------------------------------------------------------------------------------------------------------


def circulant(k, in_):
    """Spells out the update that a kernel ``(p, q, b)`` stands for."""
    p, q, b = k.shape
    delta = torch.zeros(p * b, q * b, dtype=torch.float64)
    for row in range(p * b):
        for column in range(q * b):
            delta[row, column] = k[row // b, column // b, (column - row) % b] / in_
    return delta


@differs("C3A", "the gradient by the input is that of another kernel, so layers below are trained wrongly", "the derivative")
def test_the_gradient_by_the_input_is_that_of_the_output(tmp_path):
    wrapped = theirs(single(8, 8), peft.C3AConfig(block_size=4, target_modules=["site"]))
    quietly(wrapped.save_pretrained, tmp_path)
    params, net, adapter = ours(single(8, 8), tmp_path)
    x, weights = drawn(3, 8), drawn(3, 8, seed=1)

    def gradient(f):
        given = x.clone().requires_grad_()
        return torch.autograd.grad((f(given) * weights).sum(), given)[0]

    slopes = torch.zeros_like(x)
    for i in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=x.dtype).index_fill(0, torch.tensor(i), 1e-4).view_as(x)
        rise = net(params, adapter, x + step) - net(params, adapter, x - step)
        slopes.view(-1)[i] = (rise * weights).sum() / 2e-4
    torch.testing.assert_close(gradient(lambda x: net(params, adapter, x)), slopes, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(wrapped(x), net(params, adapter, x), rtol=1e-5, atol=1e-5)
    assert far(gradient(wrapped), slopes, 1e-2)


@differs("C3A", "of two active adapters the second gets the first one's output as its input", "both get the layer's input")
def test_two_adapters_meet_the_same_input():
    config = peft.C3AConfig(block_size=4, target_modules=["site"])
    wrapped = theirs(single(), config)
    wrapped.add_adapter("two", config)
    wrapped.base_model.set_adapter(["default", "two"])
    kernels = [t.detach().double() for t in shifted(wrapped).base_model.model.site.c3a_kernel.values()]
    plain, x = single().site, drawn(3, 8)
    deltas = [circulant(k, 8) for k in kernels]
    want = F.linear(x, plain.weight + sum(deltas), plain.bias)
    model, params = fp.functionalize(single())
    net = fp.adapt(model, [fp.C3A(block_size=4, target_modules=["site"])] * 2)
    adapters = tuple(a.replace(params={"site": {"K": k}}) for a, k in zip(net.init(params, 0), kernels, strict=True))
    torch.testing.assert_close(net(params, adapters, x), want)
    assert far(wrapped(x), want)
    torch.testing.assert_close(wrapped(x), F.linear(x, plain.weight, plain.bias) + chain(x, *deltas), rtol=1e-4, atol=1e-4)


def chain(x, first, second):
    """What peft adds: the second update of what the first one made of the input."""
    return x @ first.mT + (x @ first.mT) @ second.mT


@differs("C3A", "has no derivative and no vmap under torch.func (an old autograd.Function)", "plain operations, all transforms")
def test_the_convolution_is_differentiable_under_torch_func():
    wrapped = theirs(single(dtype=torch.float32), peft.C3AConfig(block_size=4, target_modules=["site"]))
    x = drawn(3, 8)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.jvp(wrapped, (x.float(),), (x.float(),))
    model, params = fp.functionalize(single())
    net = fp.adapt(model, fp.C3A(block_size=4, target_modules=["site"]))
    adapter = net.init(params, 0)
    plain = single().site
    weight = plain.weight.detach() + circulant(adapter.params["site"]["K"], 8)
    out, slope = torch.func.jvp(lambda x: net(params, adapter, x), (x,), (2 * x,))
    torch.testing.assert_close(out, F.linear(x, weight, plain.bias.detach()))
    torch.testing.assert_close(slope, 2 * x @ weight.mT)


class Eight(nn.Module):
    """A layer whose weight bitsandbytes keeps in eight bits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        layer = nn.Linear(64, 64)
        self.site = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=6.0)
        self.site.load_state_dict(layer.state_dict())
        self.site.to("cpu")

    def forward(self, x):
        return self.site(x)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@differs(
    "C3A", "a merge into a bitsandbytes 8-bit layer adds the update to the integer codes", "the update is added to the weight"
)
def test_merging_adds_to_the_weight_and_not_to_its_codes(tmp_path):
    wrapped = theirs(Eight(), peft.C3AConfig(block_size=16, target_modules=["site"]), scale=5.0)
    quietly(wrapped.save_pretrained, tmp_path)
    layer = Eight().site
    w = kernels.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).double()
    k = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.site.c3a_kernel"].double()
    x = drawn(3, 64).float()
    want = F.linear(x.double(), w + circulant(k, 64), layer.bias.double()).float()
    params, net, adapter = ours(Eight(), tmp_path)
    merged, _ = net.merge(params, adapter)
    torch.testing.assert_close(net.model(merged, x), want, rtol=1e-4, atol=1e-4)
    spoilt = quietly(wrapped.merge_and_unload)
    assert far(
        spoilt(x).detach(), want, 0.1 * float((want - F.linear(x.double(), w, layer.bias.double())).detach().abs().max())
    )


# -- GraLoRA -----------------------------------------------------------------------------------------------------------------


@differs("GraLoRA", "inputs must have two or three axes", "any number, as of the layer itself")
def test_inputs_may_have_any_number_of_axes(tmp_path):
    wrapped = theirs(single(), peft.GraloraConfig(r=4, target_modules=["site"]))
    quietly(wrapped.save_pretrained, tmp_path)
    params, net, adapter = ours(single(), tmp_path)
    x = drawn(2, 3, 2, 8)
    with pytest.raises(ValueError, match="too many values to unpack"):
        wrapped(x)
    torch.testing.assert_close(net(params, adapter, x), wrapped(x.flatten(0, 1)).view(2, 3, 2, 8))


# -- GLoRA -------------------------------------------------------------------------------------------------------------------


@differs("GLoRA", "unmerging where an entry was scaled by 0 leaves NaN and infinity in the model", "refused")
def test_unmerging_never_divides_by_zero(tmp_path):
    wrapped = theirs(single(), peft.GloraConfig(config_A_B="constant", config_C="none", target_modules=["site"]))
    with torch.no_grad():
        wrapped.base_model.model.site.glora_A["default"].X.fill_(-1)
    quietly(wrapped.save_pretrained, tmp_path)
    wrapped.merge_adapter(safe_merge=True)
    wrapped.unmerge_adapter()
    assert not torch.isfinite(wrapped.base_model.model.site.weight).any()
    params, net, adapter = ours(single(), tmp_path)
    merged, _ = net.merge(params, adapter)
    shift = adapter.params["site"]["B"]
    torch.testing.assert_close(merged["site.weight"], shift.expand(8, 8))
    with pytest.raises(NoMergedFormError, match="an entry was scaled by 0"):
        net.unmerge(merged, adapter)


# -- FRoD --------------------------------------------------------------------------------------------------------------------


def frod(**fields):
    return peft.FrodConfig(target_modules=["site"], progressbar=False, **{"sparse_rate": 0.2, **fields})


@differs(
    "FRoD",
    "U is made of the V that is computed again at load, and used with the V of the file, which may be another",
    "U is made of the V of the file",
)
def test_both_bases_belong_to_the_file(tmp_path):
    wrapped = theirs(single(), frod(), scale=0)
    quietly(wrapped.save_pretrained, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.frod_V.site"][:, 3] *= -1  # as good a basis, that another LAPACK may find
    save_file(tensors, path)
    x = drawn(3, 8)
    want = single()(x)  # the diagonal is as at init, and the rest is zero
    params, net, adapter = ours(single(), tmp_path)
    assert not far(net(params, adapter, x), want, 1e-5)
    back = quietly(peft.PeftModel.from_pretrained, single(), tmp_path)
    assert far(quietly(back, x), want, 0.1)


@differs(
    "FRoD",
    "a float32 adapter on its base in bfloat16 moves outputs by far more than the rounding of the base does",
    "by no more than that rounding",
)
def test_a_base_in_half_precision_keeps_what_an_adapter_does(tmp_path):
    def wide(dtype):
        return single(32, 32, dtype)

    wrapped = theirs(wide(torch.float32), frod(), scale=0)
    quietly(wrapped.save_pretrained, tmp_path)
    x = drawn(64, 32)
    half = wide(torch.bfloat16)
    want = F.linear(x.bfloat16().double(), half.site.weight.double(), half.site.bias.double())
    model, params = fp.functionalize(half)
    net, adapter = fp.load_peft(model, params, tmp_path)
    rounding = float((model(params, x.bfloat16()) - want).detach().abs().max())
    assert not far(net(params, adapter, x.bfloat16()).double(), want, 4 * rounding)
    back = quietly(peft.PeftModel.from_pretrained, wide(torch.bfloat16), tmp_path)
    assert far(quietly(back, x.bfloat16()).double(), want, 40 * rounding)


@differs("FRoD", "a second adapter's `sparse_rate` is ignored: it gets the places of the first", "every adapter has its own")
def test_every_adapter_has_its_own_places():
    wrapped = theirs(single(), frod(sparse_rate=0.1))
    quietly(wrapped.add_adapter, "two", frod(sparse_rate=0.3))
    found = {n: len(v) for n, v in wrapped.base_model.model.site.frod_lambda_s_values.items()}
    assert found == {"default": 6, "two": 6}
    model, params = fp.functionalize(single())
    net = fp.adapt(model, [fp.FRoD(target_modules=["site"], sparse_rate=rate) for rate in (0.1, 0.3)])
    assert [len(a.params["site"]["s"]) for a in net.init(params, 0)] == [int(64 * 0.1), int(64 * 0.3)]


@differs("FRoD", "has no derivative in forward mode (sparse tensors)", "plain operations, all transforms")
def test_the_rotation_is_differentiable_in_forward_mode():
    wrapped, x = theirs(single(dtype=torch.float32), frod()), drawn(3, 8)
    with pytest.raises(NotImplementedError, match="forward AD"):
        quietly(torch.func.jvp, wrapped, (x.float(),), (x.float(),))
    model, params = fp.functionalize(single())
    net = fp.adapt(model, fp.FRoD(target_modules=["site"], sparse_rate=0.2))
    adapter = net.init(params, 0)
    adapter = adapter.replace(params=tree_map(lambda t: t + 0.1, adapter.params))
    leaves = adapter.leaves("site")
    core = torch.diag(leaves["lambda"]).index_put(tuple(adapter.consts["category site"]["places"]), leaves["s"])
    weight = leaves["U"] @ core @ adapter.consts["category site"]["V"].mT
    _, slope = torch.func.jvp(lambda x: net(params, adapter, x), (x,), (2 * x,))
    torch.testing.assert_close(slope, 2 * x @ weight.mT)


# -- WaveFT ------------------------------------------------------------------------------------------------------------------


def waveft(family, **fields):
    return peft.WaveFTConfig(n_frequency=9, wavelet_family=family, target_modules=["site"], **fields)


def flat(family):
    """Says what becomes of an update whose averages are all 1: an orthogonal wavelet makes it constant, 1/2."""
    method = fp.WaveFT(target_modules=["site"], n_frequency=64 * 64, wavelet_family=family, scaling=1.0)
    model, params = fp.functionalize(single(64, 64))
    net = fp.adapt(model, method)
    index = net.init(params, 0).consts["site"]["index"]
    return net, params, ((index // 64 < 16) & (index % 64 < 16)).double()


@differs("WaveFT", 'the filter of `"coif4"` is not that of a wavelet (its shifts are not orthogonal)', "computed, to 1e-10")
def test_the_fourth_coiflet_is_orthogonal(tmp_path):
    config = waveft("coif4")
    wrapped = theirs(single(), config)
    quietly(wrapped.save_pretrained, tmp_path)
    params, net, adapter = ours(single(), tmp_path)
    x, low = drawn(3, 8), adapter.consts["site"]["low"]
    assert far(wrapped(x), net(params, adapter, x), 1e-2)
    table = torch.tensor(peft.tuners.waveft.wavelet.Wavelet("coif4").rec_lo, dtype=torch.float64)
    wrong, right = (max(abs(float(t[2 * k :] @ t[: 24 - 2 * k]) - (k == 0)) for k in range(12)) for t in (table, low))
    assert right < 1e-10
    assert wrong > 1e-2
    assert abs(float(table.sum()) - 2**0.5) > 1e-2


@differs("WaveFT", 'the filter of `"coif5"` has 48 numbers instead of 30, and the first call fails', "computed, to 1e-10")
def test_the_fifth_coiflet_can_be_met():
    x = drawn(3, 8)
    with pytest.raises(RuntimeError):
        theirs(single(), waveft("coif5"))(x)
    model, params = fp.functionalize(single())
    net = fp.adapt(model, fp.WaveFT(n_frequency=9, wavelet_family="coif5", target_modules=["site"], init_weights=False))
    adapter = net.init(params, 0)
    low = adapter.consts["site"]["low"]
    assert low.shape == (30,)
    assert max(abs(float(low[2 * k :] @ low[: 30 - 2 * k]) - (k == 0)) for k in range(15)) < 1e-10
    assert far(net(params, adapter, x), model(params, x))


@differs("WaveFT", "takes families that it has no filters for, up to the first call", "refused when the method is made")
def test_a_family_is_one_that_there_are_filters_for():
    with pytest.raises(ValueError, match="Unknown wavelet"):
        theirs(single(), waveft("db11"))(drawn(3, 8))
    with pytest.raises(ValueError, match="wavelet_family must be one of 'db1'"):
        fp.WaveFT(wavelet_family="db11")


def test_the_other_filters_are_pefts():
    from funcpeft.methods.waveft import FAMILIES, synthesis

    for family in set(FAMILIES) - {"coif4", "coif5"}:
        table = torch.tensor(peft.tuners.waveft.wavelet.Wavelet(family).rec_lo, dtype=torch.float64)
        assert (torch.tensor(synthesis(family), dtype=torch.float64) - table).abs().max() < 1e-10, family
    assert {*FAMILIES, "haar"} == set(peft.tuners.waveft.wavelet.wavelist())  # peft's config does not take "haar"

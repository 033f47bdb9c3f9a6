"""peft as the oracle on quantized bases: forward, gradients, and merging where peft stores the result as codes again.

Every row builds peft's model on layers of bitsandbytes or torchao, moves its adapter away from init, saves it, and reads the
file here on the leaves that were taken from an identical model. peft's models run in training mode: there both libraries
multiply by the decoded weight, while in eval mode bitsandbytes rounds inputs to eight bits, or rewrites the weight for the CPU.
Where peft or the library is wrong, or refuses, the reference is the decoded weight in a plain module. A test fails as well
when peft begins to agree: the difference then leaves this file and the docs.
"""

import dataclasses
import math
import types
import warnings

import bitsandbytes as bnb
import bitsandbytes.functional as kernels
import peft
import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from funcpeft.adapt import adapt
from funcpeft.interop.modules import functionalize
from funcpeft.interop.peft import load_peft
from funcpeft.methods import IA3, LoHa, LoKr, LoRA
from funcpeft.quant import NF4, AffineInt, Int8
from funcpeft.tree import tree_map
from funcpeft.weights import Quantized

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore:_check_is_size"),
]

WIDTH = 64
SITES = ("lin0", "lin1")


class Mlp(nn.Module):
    """Two layers that are quantized and a head that is not."""

    def __init__(self, width=WIDTH, wide=WIDTH):
        super().__init__()
        self.lin0, self.lin1, self.head = nn.Linear(width, wide), nn.Linear(wide, width), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.lin1(torch.tanh(self.lin0(x)))))


def four_bit(layer, **options):
    made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, **options)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


def eight_bit(layer):
    made = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False, threshold=6.0)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")


FOUR_BITS = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "nf4 double": {"quant_type": "nf4", "compress_statistics": True},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
}
KINDS = (*FOUR_BITS, "int8", "torchao")


def base(kind, width=WIDTH, wide=WIDTH):
    """Returns the same quantized model at every call, with the attributes by which peft tells how it was loaded."""
    torch.manual_seed(1)
    module = Mlp(width, wide)
    if kind == "torchao":
        config = Int8WeightOnlyConfig()
        quantize_(module, config, lambda m, path: path in SITES)
        module.hf_quantizer = types.SimpleNamespace(quantization_config=TorchAoConfig(config))
        return module
    for name in SITES:
        layer = module.get_submodule(name)
        module.set_submodule(name, eight_bit(layer) if kind == "int8" else four_bit(layer, **FOUR_BITS[kind]))
    module.is_loaded_in_8bit, module.is_loaded_in_4bit = kind == "int8", kind in FOUR_BITS
    return module


def decoded(layer):
    """Returns the weight that the library itself decodes, float64."""
    w = layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        return kernels.dequantize_4bit(w.data, w.quant_state).double()
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scale = w.SCB if w.SCB is not None else layer.state.SCB
        return kernels.int8_vectorwise_dequant(w.data, scale).double()
    return w.dequantize().double()


def plain(quantized):
    """Returns a plain module in float64 with the weights that a quantized one decodes to."""
    lin0 = quantized.lin0
    module = Mlp(lin0.in_features, lin0.out_features).double()
    with torch.no_grad():
        for name in SITES:
            layer, found = module.get_submodule(name), quantized.get_submodule(name)
            layer.weight.copy_(decoded(found))
            layer.bias.copy_(found.bias)
        module.head.load_state_dict(quantized.head.state_dict())
    return module


@dataclasses.dataclass(frozen=True)
class Row:
    config: str
    kwargs: dict
    fails: tuple = ()  # kinds on which peft 0.21 cannot inject or run it
    unmerged: tuple = ()  # kinds on which peft 0.21 cannot merge it

    def __str__(self):
        return "-".join([self.config.removesuffix("Config"), *(f"{k}={v}" for k, v in self.kwargs.items())])


FOUR, ONLY_EIGHT = tuple(FOUR_BITS), ("int8", "torchao")
ROWS = [
    Row("LoraConfig", {"r": 4, "lora_alpha": 6}),
    Row("LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    Row("LoraConfig", {"r": 4, "lora_alpha": 6, "use_dora": True}, unmerged=("torchao",)),
    Row("VeraConfig", {"r": 4, "d_initial": 0.2}),
    Row("OFTConfig", {"oft_block_size": 16}),
    Row("OFTConfig", {"oft_block_size": 16, "use_cayley_neumann": False}),
    Row("MissConfig", {"r": 4}),
    Row("MissConfig", {"r": 4, "init_weights": "bat"}),
    Row("ShiraConfig", {"r": 2}),
    Row("RoadConfig", {"group_size": 8}, unmerged=("torchao",)),
    Row("IA3Config", {"feedforward_modules": ["lin1"]}, unmerged=KINDS),
    Row("LoHaConfig", {"r": 3, "alpha": 5}, fails=FOUR, unmerged=ONLY_EIGHT),
    Row("LoKrConfig", {"r": 3, "alpha": 5}, fails=FOUR, unmerged=ONLY_EIGHT),
    Row("FourierFTConfig", {"n_frequency": 9, "scaling": 30.0}, unmerged=KINDS),
]


def crossed(kinds):
    """Crosses rows with kinds; the further four-bit ones differ from nf4 in decoding alone, so that one method is enough."""
    pairs = [(row, kind) for row in ROWS for kind in kinds if kind not in row.fails]
    return [(row, kind) for row, kind in pairs if kind in ("nf4", *ONLY_EIGHT) or row is ROWS[0]]


def named(pairs):
    return pytest.mark.parametrize(("row", "kind"), [pytest.param(*p, id=f"{p[0]}-{p[1]}") for p in pairs])


def wrapped(module, row):
    config = getattr(peft, row.config)(target_modules=list(SITES), **row.kwargs)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(module, config).train()
    torch.manual_seed(9)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def save(model, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


@dataclasses.dataclass(frozen=True)
class Pair:
    """peft's model, and the same adapter on the leaves of an identical base."""

    theirs: peft.PeftModel
    model: object
    params: dict
    net: object
    adapter: object
    folder: object


def pair(row, kind, folder):
    model, params = functionalize(base(kind))
    theirs = wrapped(base(kind), row)
    net, adapter = load_peft(model, params, save(theirs, folder / "adapter"))
    return Pair(theirs, model, params, net, adapter, folder)


def merged_by_peft(theirs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return theirs.merge_and_unload()


def merged_plain(row, kind, adapter_folder):
    """Merges the adapter of a folder with peft into the decoded weights in a plain float64 module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(plain(base(kind)), adapter_folder).merge_and_unload()


def within(got, want, fan_in=WIDTH):
    """Whether two float32 computations agree: a few roundings of sums over ``fan_in``, relative to the largest entry."""
    got, want = got.detach().double(), want.detach().double()
    bound = 8 * torch.finfo(torch.float32).eps * math.sqrt(fan_in) * want.abs().max()
    return bool((got - want).abs().max() <= bound)


def inputs(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- forward and gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@named(crossed(KINDS))
def test_forward_and_gradients_are_pefts(row, kind, tmp_path):
    p = pair(row, kind, tmp_path)
    assert all(isinstance(p.params[f"{s}.weight"], Quantized) for s in SITES)
    x, same = inputs(5, WIDTH).requires_grad_(), inputs(5, WIDTH).requires_grad_()
    want = p.theirs(x)
    leaves = tree_map(lambda t: t.clone().requires_grad_(), p.adapter.params)
    got = p.net(p.params, p.adapter.replace(params=leaves), same)
    assert within(got, want)
    assert (p.model(p.params, x) - want).abs().max() > 1e-3  # the adapter does something
    want.square().sum().backward()
    got.square().sum().backward()
    assert within(same.grad, x.grad)
    with torch.no_grad():  # gradients take the way that values take: through a file
        for t in p.theirs.parameters():
            if t.requires_grad:
                t.copy_(t.grad)
    _, grads = load_peft(p.model, p.params, save(p.theirs, tmp_path / "grads"))
    for path, found in grads.params.items():
        for name, grad in found.items():
            assert float(grad.abs().max()) > 0, f"{path} {name}"
            assert within(leaves[path][name].grad, grad), f"{path} {name}"


@pytest.mark.parametrize("kind", ["int8", *FOUR])
def test_a_bias_of_the_update_is_met_as_peft_meets_it(kind, tmp_path):
    p = pair(Row("LoraConfig", {"r": 4, "lora_alpha": 6, "lora_bias": True}), kind, tmp_path)
    x = inputs(5, WIDTH)
    assert within(p.net(p.params, p.adapter, x), p.theirs(x))


def test_in_eval_mode_eight_bits_round_inputs_and_outputs_here_do_not(tmp_path):
    """LLM.int8() multiplies codes by codes in eval mode, good for three digits, by design; here inputs stay as they are."""
    p = pair(ROWS[0], "int8", tmp_path)
    x = inputs(5, WIDTH)
    with torch.no_grad():
        got, train, rounded = p.net(p.params, p.adapter, x), p.theirs(x), p.theirs.eval()(x)
    assert within(got, train)
    assert 1e-4 < (rounded - got).abs().max() / got.abs().max() < 3e-2


@pytest.mark.parametrize("four", [True, False])
def test_a_llama_that_transformers_quantizes(four, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=zoo.VOCAB, **sizes)).save_pretrained(tmp_path / "dense")
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if four else {"load_in_8bit": True}

    def loaded():
        config = BitsAndBytesConfig(**options)
        return AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)

    model, params = functionalize(loaded())
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    theirs = peft.get_peft_model(loaded(), config).train()
    net, adapter = load_peft(model, params, save(theirs, tmp_path / "adapter"))
    assert len(net.entries[0].sites) == 14
    ids = zoo.ids(2, 7)
    with torch.no_grad():
        want, got = theirs(input_ids=ids).logits, net(params, adapter, input_ids=ids).logits
        assert within(got, want, fan_in=128)
        assert (model(params, input_ids=ids).logits - want).abs().max() > 1e-3
    again = functionalize(merged_by_peft(theirs))[1]
    merged, report = net.merge(params, adapter, target="refit")
    for path in net.entries[0].sites:
        found, expected = (leaves[f"{path}.weight"] for leaves in (merged, again))
        assert type(found.format) is type(expected.format)
        apart = (found.format.dequant(found) - expected.format.dequant(expected)).abs()
        step = found.format.step(found)
        near = 1e-3 if four else 127 * 2**-10  # of the 127 steps of a row's largest entry, float16 rounds each by 2^-11
        assert float((apart > near * step).double().mean()) < (1e-3 if four else 0.05), path
        assert float((apart / step).max()) < 2.2
    assert report.worst("realised")[1] > 0.9


# -- merging -------------------------------------------------------------------------------------------------------------------


def assert_equally_near(ours, theirs, exact):
    """Asserts that two stored weights differ only in roundings of float32, by which an entry between two codes takes either."""
    bound = 32 * torch.finfo(torch.float32).eps * float(exact.abs().max())
    off, other = (ours.double() - exact).abs(), (theirs.double() - exact).abs()
    assert float((off - other).abs().max()) <= bound
    assert float(((ours - theirs).abs() > bound).double().mean()) < 0.005


def merging(kinds):
    return [(row, kind) for row, kind in crossed(kinds) if kind not in row.unmerged]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@named(merging(KINDS))
def test_a_dense_merge_is_that_of_the_decoded_base(row, kind, tmp_path):
    p = pair(row, kind, tmp_path)
    merged, _ = p.net.merge(p.params, p.adapter)
    exact = merged_plain(row, kind, tmp_path / "adapter")
    for site in SITES:
        assert merged[f"{site}.weight"].dtype == torch.float32
        assert within(merged[f"{site}.weight"], exact.get_submodule(site).weight)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@named(merging(("nf4", "fp4", "torchao")))
def test_refitting_stores_what_peft_stores(row, kind, tmp_path):
    """peft requantizes the float32 sum of the decoded weight and the update; so does ``refit``, from the sum in float64."""
    p = pair(row, kind, tmp_path)
    merged, _ = p.net.merge(p.params, p.adapter, target="refit", min_realised=None)
    exact, theirs = merged_plain(row, kind, tmp_path / "adapter"), merged_by_peft(p.theirs)
    again = functionalize(theirs)[1]
    for site in SITES:
        ours, found, layer = merged[f"{site}.weight"], again[f"{site}.weight"], exact.get_submodule(site)
        assert (ours.format, ours.shape, ours.dtype) == (found.format, found.shape, found.dtype)
        torch.testing.assert_close(ours.data["scale"], found.data["scale"], rtol=1e-6, atol=0)
        assert_equally_near(ours.format.dequant(ours), decoded(theirs.get_submodule(site)), layer.weight)
        bias = merged[f"{site}.bias"]
        assert within(bias, layer.bias)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "torchao"])
def test_the_same_sum_gets_the_same_bits(kind, tmp_path):
    """Given peft's own float32 sum, what is stored is peft's bit for bit: what differs above is the sum alone."""
    p = pair(ROWS[0], kind, tmp_path)
    layers = {s: p.theirs.base_model.model.get_submodule(s) for s in SITES}
    with torch.no_grad():
        sums = {s: decoded(m.get_base_layer()).float() + m.get_delta_weight("default") for s, m in layers.items()}
    again = functionalize(merged_by_peft(p.theirs))[1]
    for site in SITES:
        found = again[f"{site}.weight"]
        ours = found.format.requant(sums[site])
        assert torch.equal(ours.data["scale"], found.data["scale"])
        assert torch.equal(ours.format.dequant(ours), found.format.dequant(found))
        if kind != "fp4":  # it has two codes for zero
            assert torch.equal(ours.data["qdata"], found.data["qdata"])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("row", [row for row, _ in merging(("int8",))], ids=str)
def test_eight_bits_are_refitted_from_the_weight_and_not_from_its_float16_form(row, tmp_path):
    """bitsandbytes rounds a weight to float16 before it looks for codes; that is left out here."""
    p = pair(row, "int8", tmp_path)
    merged, _ = p.net.merge(p.params, p.adapter, target="refit")
    exact, again = merged_plain(row, "int8", tmp_path / "adapter"), functionalize(merged_by_peft(p.theirs))[1]
    for site in SITES:
        ours, found, want = merged[f"{site}.weight"], again[f"{site}.weight"], exact.get_submodule(site).weight
        assert int((ours.data["qdata"].int() - found.data["qdata"].int()).abs().max()) <= 1
        torch.testing.assert_close(ours.data["scale"], found.data["scale"], rtol=2**-11, atol=0)
        assert 0 < float((ours.data["qdata"] != found.data["qdata"]).double().mean()) < 0.03
        through = Int8().requant(want.half())  # the library's own way
        assert float((through.data["qdata"] != found.data["qdata"]).double().mean()) < 0.002  # float16 ties of the sums


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("row", [row for row in ROWS if not {*row.fails, *row.unmerged} & {"nf4 double"}][::3], ids=str)
def test_with_scales_in_eight_bits_codes_are_nearest_for_the_scale_that_is_stored(row, tmp_path):
    """bitsandbytes looks for codes by the scale before it rounds that; here by the rounded one, which errs less."""
    p = pair(row, "nf4 double", tmp_path)
    merged, _ = p.net.merge(p.params, p.adapter, target="refit", min_realised=None)
    exact, again = merged_plain(row, "nf4 double", tmp_path / "adapter"), functionalize(merged_by_peft(p.theirs))[1]
    ours_sum = theirs_sum = 0.0
    for site in SITES:
        ours, found, want = merged[f"{site}.weight"], again[f"{site}.weight"], exact.get_submodule(site).weight
        torch.testing.assert_close(ours.data["nested_scale"], found.data["nested_scale"], rtol=1e-5, atol=0)
        torch.testing.assert_close(ours.data["offset"], found.data["offset"], rtol=1e-6, atol=0)
        assert int((ours.data["scale"].int() - found.data["scale"].int()).abs().max()) <= 1
        ours_sum += float((ours.format.dequant(ours) - want).square().sum())
        theirs_sum += float((found.format.dequant(found) - want).square().sum())
        assert float((ours.data["qdata"] != found.data["qdata"]).double().mean()) < 0.03
    assert ours_sum <= theirs_sum


# -- where peft refuses or fails -----------------------------------------------------------------------------------------------


def drawn(model, params, method, seed=7):
    """Returns a net and an adapter of it away from init."""
    net = adapt(model, method)
    gen = torch.Generator().manual_seed(seed)

    def move(t):
        return t + 0.1 * torch.randn(t.shape, generator=gen)

    made = net.init(params, 0)
    return net, made.replace(params=tree_map(move, made.params))


def loha_update(leaves):
    one, two = leaves["w1a"] @ leaves["w1b"], leaves["w2a"] @ leaves["w2b"]
    return leaves["scaling"] * one * two


def reference(kind, change):
    """Returns a plain module whose decoded weights and biases are ``change(path, weight, bias)``."""
    module = plain(base(kind))
    with torch.no_grad():
        for path in SITES:
            layer = module.get_submodule(path)
            weight, bias = change(path, layer.weight.clone(), layer.bias.clone())
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    return module


def assert_computes(net, params, adapter, module):
    """Asserts that applying, merging densely and refitting are those of a plain module, the last within its steps."""
    x = inputs(5, WIDTH)
    with torch.no_grad():
        want = module(x.double())
        assert within(net(params, adapter, x), want)
        assert (net.model(params, x) - want).abs().max() > 1e-3
    merged, _ = net.merge(params, adapter)
    refitted, _ = net.merge(params, adapter, target="refit", min_realised=None)
    for path in SITES:
        layer, q = module.get_submodule(path), refitted[f"{path}.weight"]
        assert within(merged[f"{path}.weight"], layer.weight)
        assert within(merged[f"{path}.bias"], layer.bias)
        step = q.format.step(q)
        slack = 8 * torch.finfo(torch.float32).eps * layer.weight.abs().max()
        beyond = (q.format.dequant(q) - layer.weight).abs() > step + slack
        assert float(beyond.double().mean()) <= q.format.clips
        assert torch.equal(refitted[f"{path}.bias"], merged[f"{path}.bias"])


def fails_in_peft(kind):
    """Expects what adding a dense update to stored codes raises: of packed shape, of integers, or of a tensor subclass."""
    if kind == "torchao":
        return pytest.raises(NotImplementedError, match="Int8Tensor dispatch: attempting to run unimplemented operator")
    shapes = r"is invalid for input of size 4096|must match the size of tensor b \(64\)"
    return pytest.raises(RuntimeError, match=shapes if kind in FOUR else "can't be cast to the desired output type Char")


@pytest.mark.parametrize("kind", KINDS)
def test_loha(kind):
    """peft 0.21 gives four-bit bases factors of the packed shape, and cannot merge into eight-bit ones."""
    model, params = functionalize(base(kind))
    net, adapter = drawn(model, params, LoHa(r=3, alpha=5, target_modules=SITES))
    leaves = {path: tree_map(torch.Tensor.double, adapter.leaves(path)) for path in SITES}
    assert_computes(net, params, adapter, reference(kind, lambda p, w, b: (w + loha_update(leaves[p]), b)))
    theirs = wrapped(base(kind), Row("LoHaConfig", {"r": 3, "alpha": 5}))
    if kind in FOUR:
        assert theirs.base_model.model.lin0.hada_w1_a["default"].shape[0] == WIDTH * WIDTH // 2
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            theirs(inputs(5, WIDTH))
    else:
        with fails_in_peft(kind):
            merged_by_peft(theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_lokr(kind):
    """peft 0.21 fails at the packed shape of four-bit bases, and cannot merge into eight-bit ones."""
    model, params = functionalize(base(kind))
    net, adapter = drawn(model, params, LoKr(r=2, alpha=5, target_modules=SITES))
    leaves = {path: tree_map(torch.Tensor.double, adapter.leaves(path)) for path in SITES}

    def change(path, weight, bias):
        found = leaves[path]
        return weight + found["scaling"] * torch.kron(found["w1"], found["w2a"] @ found["w2b"]), bias

    assert_computes(net, params, adapter, reference(kind, change))
    with fails_in_peft(kind):
        merged_by_peft(wrapped(base(kind), Row("LoKrConfig", {"r": 2, "alpha": 5})))


@pytest.mark.parametrize("kind", KINDS)
def test_ia3_merges(kind):
    """peft 0.21 merges (IA)^3 into no quantized base."""
    model, params = functionalize(base(kind))
    net, adapter = drawn(model, params, IA3(target_modules=SITES, feedforward_modules=("lin1",)))
    factor = {path: adapter.params[path]["l"].double() for path in SITES}

    def change(path, weight, bias):
        by = factor[path]
        return (weight * by[None, :], bias) if path == "lin1" else (weight * by[:, None], bias * by)

    assert_computes(net, params, adapter, reference(kind, change))
    theirs = wrapped(base(kind), Row("IA3Config", {"feedforward_modules": ["lin1"]}))
    refused = pytest.raises(ValueError, match="Cannot merge ia3 layers when the model is loaded in")
    with fails_in_peft(kind) if kind == "torchao" else refused:
        merged_by_peft(theirs)


UNMERGED = [("FourierFTConfig", {"n_frequency": 9, "scaling": 30.0}, KINDS), ("RoadConfig", {"group_size": 8}, ("torchao",))]


@pytest.mark.parametrize(
    ("config", "kwargs", "kind"),
    [pytest.param(c, kw, kind, id=f"{c}-{kind}") for c, kw, kinds in UNMERGED for kind in kinds],
)
def test_what_peft_merges_into_dense_bases_alone(config, kwargs, kind, tmp_path):
    """The reference is peft itself on the decoded weights; on the quantized base its merge raises."""
    row = Row(config, kwargs)
    p = pair(row, kind, tmp_path)
    assert_computes(p.net, p.params, p.adapter, merged_plain(row, kind, tmp_path / "adapter"))
    with fails_in_peft(kind):
        merged_by_peft(p.theirs)


# -- where peft or the library is wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["int8", *FOUR])
def test_the_bias_of_an_update_is_merged_scaled_as_it_is_applied(kind, tmp_path):
    """peft 0.21 applies scaling * (B A x + b) on bitsandbytes' layers and merges b unscaled; its safe merge fails."""
    row = Row("LoraConfig", {"r": 4, "lora_alpha": 6, "lora_bias": True})
    p = pair(row, kind, tmp_path)
    leaves = {path: tree_map(torch.Tensor.double, p.adapter.leaves(path)) for path in SITES}

    def change(path, weight, bias):
        found = leaves[path]
        return weight + 1.5 * found["B"] @ found["A"], bias + 1.5 * found["bias"]

    assert_computes(p.net, p.params, p.adapter, reference(kind, change))
    before = {path: p.params[f"{path}.bias"].clone() for path in SITES}
    theirs = merged_by_peft(p.theirs)
    for path in SITES:
        torch.testing.assert_close(theirs.get_submodule(path).bias.double(), before[path] + leaves[path]["bias"])  # no 1.5
    safely = wrapped(base(kind), row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="ambiguous"):
            safely.merge_adapter(safe_merge=True)


def decoded_by_rows_of_blocks(layer):
    """Decodes a four-bit weight with the library as if every block were a row, which is what its codes mean."""
    state = layer.weight.quant_state
    rows = kernels.QuantState(
        state.absmax,
        shape=torch.Size((layer.in_features * layer.out_features // state.blocksize, state.blocksize)),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    flat = kernels.dequantize_4bit(layer.weight.data, rows)
    return flat.reshape(layer.out_features, layer.in_features).double()


def test_rows_that_are_no_multiple_of_a_block():
    """bitsandbytes 0.50 packs flat blocks and, on some CPUs, decodes such a weight as if each row began a block.

    peft merges and runs with that; here a weight of 96 x 80 is what its codes say, on every CPU.
    """
    quantized = base("nf4", 80, 96)
    module = Mlp(80, 96).double()
    model, params = functionalize(quantized)
    net, adapter = drawn(model, params, LoRA(r=2, lora_alpha=4, target_modules=SITES))
    with torch.no_grad():
        module.head.load_state_dict(quantized.head.state_dict())
        for path in SITES:
            layer, found = module.get_submodule(path), quantized.get_submodule(path)
            leaves = tree_map(torch.Tensor.double, adapter.leaves(path))
            weight = decoded_by_rows_of_blocks(found)
            torch.manual_seed(1)
            assert (weight - Mlp(80, 96).get_submodule(path).weight).abs().max() < 0.02  # near the weight that was stored
            layer.weight.copy_(weight + 2 * leaves["B"] @ leaves["A"])
            layer.bias.copy_(found.bias)
        x = inputs(5, 80)
        assert within(net(params, adapter, x), module(x.double()), fan_in=96)
    merged, _ = net.merge(params, adapter)
    refitted, _ = net.merge(params, adapter, target="refit")
    for path in SITES:
        want = module.get_submodule(path).weight
        assert within(merged[f"{path}.weight"], want, fan_in=96)
        q = refitted[f"{path}.weight"]
        assert bool(((NF4().dequant(q) - want).abs() <= NF4().step(q) + 1e-6).all())


@pytest.mark.parametrize("kind", ["nf4", "nf4 double"])
def test_merging_after_an_eval_forward_of_the_library(kind):
    """On a CPU with AVX512-BF16 an eval forward repacks a layer's weight in place, and peft then merges garbage.

    Leaves that were taken before are copies, so they merge as ever; a layer that was repacked is refused.
    """
    quantized = base(kind)
    model, params = functionalize(quantized)
    net, adapter = drawn(model, params, LoRA(r=2, lora_alpha=4, target_modules=SITES))
    leaves = {path: tree_map(torch.Tensor.double, adapter.leaves(path)) for path in SITES}
    module = reference(kind, lambda p, w, b: (w + 2 * leaves[p]["B"] @ leaves[p]["A"], b))
    with torch.no_grad():
        quantized.eval()(inputs(5, WIDTH))
    for name in SITES:
        quantized.get_submodule(name).weight.data.zero_()  # as foreign to what was taken as any packing
    assert_computes(net, params, adapter, module)
    repacked = base(kind)
    repacked.lin1.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match=r"bitsandbytes at 'lin1': .* got an eval forward has repacked its weight; take it"):
        functionalize(repacked)


def test_without_the_config_that_quantized_it_torchao_still_merges():
    """peft 0.21 needs the quantizer's config to merge (VeRA even to inject); a format is part of the leaf."""
    bare = base("torchao")
    del bare.hf_quantizer
    model, params = functionalize(bare)
    net, adapter = drawn(model, params, LoRA(r=2, lora_alpha=4, target_modules=SITES))
    leaves = {path: tree_map(torch.Tensor.double, adapter.leaves(path)) for path in SITES}
    assert_computes(net, params, adapter, reference("torchao", lambda p, w, b: (w + 2 * leaves[p]["B"] @ leaves[p]["A"], b)))
    with pytest.raises(ValueError, match="get_apply_tensor_subclass"):
        merged_by_peft(wrapped(bare, ROWS[0]))
    with pytest.raises(ValueError, match="get_apply_tensor_subclass"):
        wrapped(base_without_quantizer(), Row("VeraConfig", {"r": 4}))


def base_without_quantizer():
    module = base("torchao")
    del module.hf_quantizer
    return module


def test_unmerging_is_keeping_the_base(tmp_path):
    """peft unmerges by requantizing the difference, which is another base; here the argument of merge is still there."""
    p = pair(ROWS[0], "nf4", tmp_path)
    kept = {n: t.clone() for s in SITES for n, t in p.params[f"{s}.weight"].data.items()}
    x = inputs(5, WIDTH)
    p.net.merge(p.params, p.adapter, target="refit")
    assert all(torch.equal(p.params["lin1.weight"].data[n], kept[n]) for n in kept)
    before = decoded(p.theirs.base_model.model.lin0.get_base_layer())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        p.theirs.merge_adapter()
        p.theirs.unmerge_adapter()
    after = decoded(p.theirs.base_model.model.lin0.get_base_layer())
    assert (after - before).norm() / before.norm() > 0.01
    layer = p.params["lin0.weight"]
    assert torch.equal(F.linear(x, layer.format.dequant(layer)), F.linear(x, before.float()))


def test_dora_merges_its_magnitudes_on_torchao_too(tmp_path):
    """peft 0.21 merges W + s B A there and forgets DoRA's magnitudes, in silence."""
    row = Row("LoraConfig", {"r": 4, "lora_alpha": 6, "use_dora": True})
    p = pair(row, "torchao", tmp_path)
    x, exact = inputs(5, WIDTH), merged_plain(row, "torchao", tmp_path / "adapter")
    assert_computes(p.net, p.params, p.adapter, exact)
    with torch.no_grad():
        want = p.theirs(x)
        assert within(exact(x.double()), want)
        found = merged_by_peft(p.theirs)
        assert (found(x) - want).norm() / want.norm() > 0.05
    leaves = {path: tree_map(torch.Tensor.double, p.adapter.leaves(path)) for path in SITES}
    for path in SITES:
        layer = p.params[f"{path}.weight"]
        undone = layer.format.dequant(layer) + 1.5 * leaves[path]["B"] @ leaves[path]["A"]
        step = undone.abs().amax(1, keepdim=True) / 255
        assert bool(((decoded(found.get_submodule(path)) - undone).abs() <= 1.001 * step).all())


def test_the_formats_that_were_taken():
    found = {kind: functionalize(base(kind))[1]["lin0.weight"].format for kind in ("nf4", "nf4 double", "int8", "torchao")}
    assert found == {
        "nf4": NF4(),
        "nf4 double": NF4(double_quant=True),
        "int8": Int8(),
        "torchao": AffineInt(bits=8, block_size="row", packing="int8"),
    }

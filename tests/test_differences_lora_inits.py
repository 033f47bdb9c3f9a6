"""Where peft 0.21 starts LoRA wrongly, or cannot read what it wrote, each against a dense computation."""

import warnings

import peft
import pytest
import torch
from differences import differs
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn
from transformers.pytorch_utils import Conv1D

from funcpeft.adapt import adapt, peft_init
from funcpeft.functional import functionalize
from funcpeft.interop.peft import load_peft, save_peft
from funcpeft.methods import LoRA
from funcpeft.quant import NF4
from funcpeft.quantization import dequantize, quantize
from funcpeft.statistics import calibrate, weight_gradients
from funcpeft.tree import tree_map

pytestmark = [  # of peft, about what it decides by itself
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
    pytest.mark.filterwarnings("ignore:lora with eva initialization"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]


class Pair(nn.Module):
    """Two layers on the input itself."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, input_ids=None):
        return self.q(input_ids) + self.k(input_ids)


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = Conv1D(6, 10)

    def forward(self, x):
        return self.q(x)


def made(cls=Pair):
    torch.manual_seed(4)
    return cls().eval()


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(adapter):
    gen = torch.Generator().manual_seed(7)
    return adapter.replace(params=tree_map(lambda t: t + 0.3 * torch.randn(t.shape, generator=gen), adapter.params))


def near(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def far(a, b, by=1e-3):
    return float((a - b).detach().abs().max()) > by


def loader(count=3, rows=40):
    scale = torch.tensor([6, 4.5, 3, 2, 1, 0.5, 0.3, 0.1])
    return [{"input_ids": drawn(rows, 8, seed=i) * scale} for i in range(count)]


def peft_eva(data, forward=lambda model, inputs: model(**inputs), **options):
    config = peft.LoraConfig(r=2, target_modules=["q", "k"], init_lora_weights="eva", eva_config=EvaConfig(rho=1.0, **options))
    wrapped = peft.get_peft_model(made(), config)
    plain = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": lambda x, inputs, name: x[0], "forward_fn": forward}
    peft.initialize_lora_eva_weights(wrapped, data, show_progress_bar=False, **plain)
    return wrapped


def eva(**options):
    return LoRA(r=2, target_modules=["q", "k"], init_lora_weights="eva", eva_config={"rho": 1.0, **options})


@differs(
    "LoRA",
    "EVA with whiten divides the directions once more for every further layer with the same input",
    "A is divided by the root of the singular values once",
)
def test_eva_whitens_once():
    data = loader()
    model, params = functionalize(made())
    net = adapt(model, eva(whiten=True))
    found = calibrate(net, params, data, progress=False)
    adapter = net.init(params, 0, statistics=found)
    x = torch.cat([b["input_ids"] for b in data])
    s = torch.linalg.svdvals(x - x.mean(0))[:2]
    for path in "qk":
        lengths = adapter.params[path]["A"].norm(dim=1)
        near(lengths, found[path]["singular"][:2] ** -0.5)
        assert torch.allclose(lengths, s**-0.5, rtol=0.3)
    layers = peft_eva(data, whiten=True).base_model.model
    for path in "qk":  # once for q, once for k
        lengths = layers.get_submodule(path).lora_A["default"].weight.detach().norm(dim=1)
        assert torch.allclose(lengths, 1 / s, rtol=0.3)
        assert not torch.allclose(lengths, s**-0.5, rtol=0.3)


class Stop(Exception):
    """Raised by a model that is called too often."""


def until(most):
    """Returns how EVA of peft is to call a model, so many times at most."""
    calls = iter(range(most))

    def forward(model, inputs):
        if next(calls, None) is None:
            raise Stop
        return model(**inputs)

    return forward


@differs(
    "LoRA",
    "EVA reads batches without end where directions do not settle",
    "an error after `limit` batches names the sites",
)
def test_eva_has_a_limit():
    spun = [{"input_ids": drawn(3, 8, seed=i)} for i in range(8)]  # every direction as good as another
    model, params = functionalize(made())
    with pytest.raises(ValueError, match=r"directions must settle to cosine 0\.999999 within 20 batches, got others at 'q'"):
        calibrate(model, params, spun, eva(tau=0.999999), limit=20, progress=False)
    with pytest.raises(Stop):
        peft_eva(spun, until(60), tau=0.999999)


@differs(
    "LoRA",
    "EVA skips every batch that has fewer rows than directions, without end if all have",
    "rows wait until there are as many as directions",
)
def test_eva_takes_small_batches(capsys):
    rows = torch.cat([b["input_ids"] for b in loader()])
    small = [{"input_ids": x} for x in rows.split(1)]
    model, params = functionalize(made())
    found = calibrate(model, params, small, eva(), settle=False, progress=False)
    vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][:2]
    assert float(torch.linalg.svdvals(found["q"]["components"] @ vh.T).min()) > 0.99
    with pytest.raises(Stop):
        peft_eva(small, until(3 * len(small)))
    assert capsys.readouterr().out.count("skipping SVD for") >= 3 * len(small) - 1


@differs(
    "LoRA",
    "CorDA's preprocessing fails on a batch of several sequences",
    "rows of all sequences count",
)
def test_corda_takes_batches_of_sequences():
    x = drawn(3, 20, 8)
    model, params = functionalize(made())
    net = adapt(model, LoRA(r=2, target_modules=["q"], init_lora_weights="corda"))
    found = calibrate(net, params, [x], progress=False)
    rows = x.flatten(0, 1) / x.max()
    near(found["q"]["covariance"], rows.T @ rows)
    module = made()
    config = peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights="corda", corda_config=CordaConfig())
    with pytest.raises(RuntimeError, match=r"expects a tensor with <= 2 dimensions"):
        preprocess_corda(module, config, run_model=lambda: module(x))


@differs(
    "LoRA",
    "LoRA-GA's `stable` scale of a Conv1D takes the number of its inputs for that of its outputs",
    "B is scaled by the fourth root of the number of outputs",
)
def test_lora_ga_scales_by_outputs():
    module, x = made(Transposed), drawn(5, 10)
    options = {"scale": "stable", "stable_gamma": 4}
    method = LoRA(r=2, target_modules=["q"], init_lora_weights="lora_ga", lora_ga_config=options)
    model, params = functionalize(made(Transposed))
    net = adapt(model, method)
    found = weight_gradients(net, params, lambda out, batch: out.square().sum(), [x], progress=False)
    s = torch.linalg.svdvals(found["q"])
    b = net.init(params, 0, gradients=found).params["q"]["B"]
    near(b.norm(dim=0), s[2:4] * 6**0.25 / 2)
    config = peft.LoraConfig(
        r=2, target_modules=["q"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(**options), fan_in_fan_out=True
    )
    preprocess_loraga(module, config, lambda: module(x).square().sum().backward())
    wrapped = peft.get_peft_model(module, config)
    assert far(wrapped.base_model.model.q.lora_B["default"].weight.norm(dim=0), s[2:4] * 6**0.25 / 2)


def both_ways(tmp_path, method, wrapped, start, x):
    """Checks that a file written here gives the same here and in peft, and returns what peft makes of its own file."""
    model, params = functionalize(made())
    net = adapt(model, method)
    adapter = moved(start(net, params))
    save_peft(net, adapter, tmp_path / "ours")
    want = net(params, adapter, x)
    again, read = load_peft(model, params, tmp_path / "ours")
    near(again(params, read, x), want)
    with torch.no_grad():
        near(peft.PeftModel.from_pretrained(made(), tmp_path / "ours").eval()(x), want)
        before = wrapped(x)
        wrapped.save_pretrained(tmp_path / "theirs")
        torch.manual_seed(11)
        return before, lambda: peft.PeftModel.from_pretrained(made(), tmp_path / "theirs").eval()(x).detach()


@differs(
    "LoRA",
    "a file of PiSSA by a randomised decomposition is read onto a base from which other factors are taken",
    "the file is plain LoRA of twice the rank, on the base as it is",
)
def test_randomised_pissa_survives_a_file(tmp_path):
    fields = {"r": 2, "target_modules": ["q"], "init_lora_weights": "pissa_niter_0"}
    module = made()
    torch.manual_seed(5)
    wrapped, x = peft.get_peft_model(module, peft.LoraConfig(**fields)).eval(), drawn(4, 8)
    before, after = both_ways(tmp_path, LoRA(**fields), wrapped, lambda net, params: peft_init(net, params, 5), x)
    assert far(before, after())


@differs(
    "LoRA",
    "a file of LoRA-GA is read onto the base as it is, from which the first factors were taken when it was trained",
    "the file is plain LoRA of twice the rank, on the base as it is",
)
def test_lora_ga_survives_a_file(tmp_path):
    fields, x = {"r": 2, "target_modules": ["q"], "init_lora_weights": "lora_ga"}, drawn(4, 8)
    module, config = made(), peft.LoraConfig(**fields, lora_ga_config=LoraGAConfig())
    preprocess_loraga(module, config, lambda: module(x).square().sum().backward())
    wrapped = peft.get_peft_model(module, config).eval()

    def start(net, params):
        found = weight_gradients(net, params, lambda out, batch: out.square().sum(), [x], progress=False)
        return net.init(params, 0, gradients=found)

    before, after = both_ways(tmp_path, LoRA(**fields), wrapped, start, x)
    assert far(before, after())


@differs(
    "LoRA",
    "a file of CorDA cannot be read unless its covariances are collected again",
    "the file is plain LoRA of twice the rank, on the base as it is",
)
def test_corda_survives_a_file(tmp_path):
    fields, x = {"r": 2, "target_modules": ["q"], "init_lora_weights": "corda"}, drawn(40, 8)
    module, config = made(), peft.LoraConfig(**fields, corda_config=CordaConfig())
    preprocess_corda(module, config, run_model=lambda: module(x))
    wrapped = peft.get_peft_model(module, config).eval()

    def start(net, params):
        return net.init(params, 0, statistics=calibrate(net, params, [x], progress=False))

    _, after = both_ways(tmp_path, LoRA(**fields), wrapped, start, x)
    with pytest.raises(ValueError, match="`eigens` attribute not found"):
        after()


@differs(
    "LoRA",
    "converting to plain LoRA is refused with rsLoRA and patterns of ranks or alphas",
    "every site is written with its own rank and alpha",
)
def test_conversion_with_patterns_and_rslora(tmp_path):
    fields = {"r": 2, "target_modules": ["q", "k"], "use_rslora": True, "rank_pattern": {"k": 3}}
    fields["init_lora_weights"] = "pissa_niter_1"
    wrapped, x = peft.get_peft_model(made(), peft.LoraConfig(**fields)).eval(), drawn(4, 8)
    both_ways(tmp_path, LoRA(**fields), wrapped, lambda net, params: net.init(params, 0), x)
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(tmp_path / "start")
    wrapped.peft_config["default"].init_lora_weights = "pissa_niter_1"
    with pytest.raises(ValueError, match="Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not supp"):
        wrapped.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=tmp_path / "start")


@differs(
    "LoRA",
    "PiSSA on a half-precision base rounds A and B after the base has lost their product, so that the start differs from it",
    "the start is the base, bit for bit",
)
def test_pissa_in_half_precision_starts_at_the_base():
    def base():
        return made().to(torch.bfloat16)

    x, fields = drawn(64, 8).to(torch.bfloat16), {"r": 4, "target_modules": ["q"], "init_lora_weights": "pissa"}
    model, params = functionalize(base())
    net = adapt(model, LoRA(**fields))
    assert torch.equal(net(params, net.init(params, 0), x), model(params, x))
    layer = peft.get_peft_model(base(), peft.LoraConfig(**fields)).base_model.model.q
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    whole = layer.base_layer.weight.double() + update.double()
    assert far(whole, params["q.weight"].double(), 1e-4)


@differs("LoRA", "LoftQ leaves the scaling out of its factors", "Q + s B A is the best of its rank for any scaling")
def test_loftq_counts_the_scaling():
    from peft.utils import loftq_utils

    torch.manual_seed(4)
    model, params = functionalize(nn.Sequential(nn.Linear(32, 32)))
    stored = quantize(model, params, NF4())
    net = adapt(model, LoRA(r=4, lora_alpha=16, target_modules=["0"], init_lora_weights="loftq"))
    leaves = net.init(stored, 0, weights=params).leaves("0")
    q, w = dequantize(stored)["0.weight"], params["0.weight"]
    u, s, vh = torch.linalg.svd(w - q)
    near(4.0 * leaves["B"] @ leaves["A"], u[:, :4] * s[:4] @ vh[:4])
    theirs = loftq_utils._low_rank_decomposition(w - q, reduced_rank=4)  # what its factors are made of, whatever the scaling
    assert far(4.0 * theirs["L"] @ theirs["R"], u[:, :4] * s[:4] @ vh[:4])
    near(theirs["L"] @ theirs["R"], u[:, :4] * s[:4] @ vh[:4])


@differs(
    "LoRA",
    "an embedding takes any name of an init, misspelt ones too, and draws the usual one",
    "inits that an embedding cannot have, and unknown ones, are refused",
)
@pytest.mark.parametrize(
    ("init", "match"), [("nonsense", "init_lora_weights must be one of"), ("pissa", "takes linear layers")]
)
def test_inits_of_an_embedding_are_checked(init, match):
    module = nn.Sequential(nn.Embedding(10, 6))
    with pytest.raises(ValueError, match=match):
        adapt(functionalize(module)[0], LoRA(r=2, target_modules=["0"], init_lora_weights=init))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(module, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=init))
    layer = wrapped.base_model.model[0]
    assert not layer.lora_embedding_A["default"].any()
    assert layer.lora_embedding_B["default"].any()

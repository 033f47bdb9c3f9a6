"""Statistics of inputs and gradients of weights, against sums and decompositions of the inputs taken with hooks."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from funcpeft.adapt import adapt
from funcpeft.functional import functionalize
from funcpeft.methods import IA3, LoRA
from funcpeft.quant import NF4
from funcpeft.quantization import dequantize, quantize
from funcpeft.statistics import calibrate, weight_gradients

SCALE = torch.tensor([6, 4.5, 3, 2, 1.2, 0.5, 0.3, 0.1])


class Model(nn.Module):
    """Two layers on the input itself, one behind them."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x, attention_mask=None):
        return self.o(torch.tanh(0.1 * (self.q(x) + self.k(x))))


def module(cls=Model, seed=3):
    torch.manual_seed(seed)
    return cls().eval()


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def data(count=4, rows=5, tokens=12):
    return [drawn(rows, tokens, 8, seed=i) * SCALE for i in range(count)]


def seen(model, batches):
    """Returns the inputs of every linear layer, call by call."""
    found = {}
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear):
            m.register_forward_hook(lambda m, x, y, name=name: found.setdefault(name, []).append(x[0].detach().flatten(0, -2)))
    for batch in batches:
        model(batch)
    return found


def eva(r=2, names=("q", "k", "o"), **options):
    return LoRA(r=r, target_modules=list(names), init_lora_weights="eva", eva_config=options)


def collect(method, batches, cls=Model, **options):
    model, params = functionalize(module(cls))
    return calibrate(model, params, batches, method, progress=False, **options)


# -- covariances -------------------------------------------------------------------------------------------------------------


def test_covariances_are_means_over_meetings_of_inputs_over_their_largest_entry():
    batches = data()
    model, params = functionalize(module())
    before = {k: t.clone() for k, t in params.items()}
    found = calibrate(model, params, batches, progress=False)
    assert found.keys() == {"q", "k", "o"}
    for path, xs in seen(module(), batches).items():
        want = sum((x / x.max()).T @ (x / x.max()) for x in xs) / len(xs)
        torch.testing.assert_close(found[path]["covariance"], want)
    assert all(torch.equal(params[k], t) for k, t in before.items())
    assert torch.equal(model(params, batches[0]), module()(batches[0]))
    again = calibrate(model, params, iter(batches), target_modules=["k"], progress=False)
    assert torch.equal(again["k"]["covariance"], found["k"]["covariance"])


def test_a_layer_that_is_met_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            return self.a(torch.tanh(self.a(x)))

    xs = seen(module(Twice), data(1))["a"]
    assert len(xs) == 2
    want = sum((x / x.max()).T @ (x / x.max()) for x in xs) / 2
    torch.testing.assert_close(collect(None, data(1), Twice)["a"]["covariance"], want)


def test_half_precision_inputs_are_summed_wide_unless_the_option_says_otherwise():
    method = LoRA(r=1, target_modules=["q"], init_lora_weights="corda")
    narrow = LoRA(r=1, target_modules=["q"], init_lora_weights="corda", corda_config={"use_float16_for_covariance": True})
    model, params = functionalize(module().bfloat16())
    x = data(1)[0].bfloat16()
    wide = calibrate(model, params, [x], method, progress=False)["q"]["covariance"]
    rows = x.float().flatten(0, 1) / x.float().max()
    torch.testing.assert_close(wide, rows.T @ rows)
    assert calibrate(model, params, [x], narrow, progress=False)["q"]["covariance"].dtype == torch.bfloat16


def test_stored_weights_show_the_same_inputs():
    torch.manual_seed(0)
    model, params = functionalize(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)))
    stored, x = quantize(model, params, NF4()), drawn(3, 32)
    got = calibrate(model, stored, [x], progress=False)
    want = calibrate(model, dequantize(stored), [x], progress=False)
    for path in ("0", "1"):
        torch.testing.assert_close(got[path]["covariance"], want[path]["covariance"])


def test_other_readers_of_a_tied_tensor_are_not_watched():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    xs = seen(module(Tied), data(1))
    for names in (["a"], ["b"], ["a", "b"]):
        method = LoRA(r=1, target_modules=names, init_lora_weights="corda")
        found = collect(method, data(1), Tied)
        assert sorted(found) == names
        for path in names:
            x = xs[path][0] / xs[path][0].max()
            torch.testing.assert_close(found[path]["covariance"], x.T @ x)


# -- principal directions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settle", [True, False])
def test_directions_are_those_of_all_rows_together(settle):
    batches = data(6, 8, 20)
    found = collect(eva(rho=1.5), batches, settle=settle)
    for path, xs in seen(module(), batches).items():
        x = torch.cat(xs).double()
        _, s, vh = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        entries = found[path]
        assert {n: tuple(t.shape) for n, t in entries.items()} == {
            "components": (3, x.shape[1]),
            "singular": (3,),
            "explained": (3,),
        }
        cosines = torch.linalg.svdvals(entries["components"].double() @ vh[:3].T)
        assert float(cosines.min()) > (0.95 if settle else 0.999)  # settled ones are of the batches until then
        torch.testing.assert_close(entries["components"] @ entries["components"].T, torch.eye(3), rtol=0, atol=1e-4)
        torch.testing.assert_close(entries["explained"].double(), (s**2 / (s**2).sum())[:3], rtol=0.2, atol=0.02)
        assert bool((entries["singular"].diff() <= 0).all())


def test_one_pass_is_scikit_learns():
    from sklearn.decomposition import IncrementalPCA

    batches = data()
    found = collect(eva(), batches, settle=False)
    for path, xs in seen(module(), batches).items():
        pca = IncrementalPCA(n_components=4)
        for x in xs:
            pca.partial_fit(x.numpy())
        assert torch.equal(found[path]["components"], torch.tensor(pca.components_, dtype=torch.float32))


def test_equal_inputs_share_one_analysis_of_the_larger_rank():
    method = LoRA(r=2, target_modules=["q", "k", "o"], rank_pattern={"k": 3}, init_lora_weights="eva")
    found = collect(method, data(), settle=False)
    assert {path: len(t["components"]) for path, t in found.items()} == {"q": 6, "k": 6, "o": 4}
    assert torch.equal(found["q"]["components"], found["k"]["components"])
    assert found["q"]["components"].data_ptr() != found["k"]["components"].data_ptr()


def test_batches_of_few_rows_are_put_together():
    batches = data(1, 1, 24)[0][0]
    small = collect(eva(), list(batches.split(3)), settle=False)
    large = collect(eva(), list(batches.split(6)), settle=False)
    for path in large:
        torch.testing.assert_close(small[path]["components"], large[path]["components"], rtol=0, atol=1e-4)


def test_batches_are_read_again_until_directions_have_settled():
    class Counted(list):
        reads = 0

        def __iter__(self):
            Counted.reads += 1
            return super().__iter__()

    collect(eva(tau=0.9999), Counted(data(2)))
    assert Counted.reads > 2
    found = collect(eva(tau=0.9999), iter(data(2)))
    want = collect(eva(tau=0.9999), data(2))
    assert all(torch.equal(found[p]["components"], want[p]["components"]) for p in want)


def masked(count=3):
    made = []
    for x in data(count):
        mask, labels = torch.ones(5, 12, dtype=torch.long), torch.ones(5, 12, dtype=torch.long)
        mask[0, :4], labels[1, 5:] = 0, -100
        made.append({"x": x, "attention_mask": mask, "labels": labels})
    return made


@pytest.mark.parametrize("labels", [True, False])
def test_rows_of_padding_and_without_a_label_are_left_out(labels):
    def keep(batch):
        kept = batch["attention_mask"] == 1
        return kept & (batch["labels"] != -100) if labels else kept

    spoiled = [{**b, "x": torch.where(keep(b)[..., None], b["x"], 1e3)} for b in masked()]
    plain = [b["x"].flatten(0, 1)[keep(b).flatten()] for b in masked()]
    for method, counts in ((eva(use_label_mask=labels), True), (LoRA(r=1, init_lora_weights="corda"), not labels)):
        if counts:
            got = collect(method if method.target_modules else None, spoiled, settle=False)
            want = collect(method if method.target_modules else None, plain, settle=False)
            for path, entries in want.items():
                for name, t in entries.items():
                    torch.testing.assert_close(got[path][name], t, rtol=1e-4, atol=1e-5)


def test_a_mask_may_be_a_function_or_none():
    batches = masked()
    kept = collect(None, batches, mask=lambda batch: torch.ones(5, 12, dtype=torch.bool))
    every = collect(None, batches, mask=None)
    some = collect(None, batches)
    assert torch.equal(kept["o"]["covariance"], every["o"]["covariance"])
    assert not torch.equal(some["o"]["covariance"], every["o"]["covariance"])


def test_a_net_collects_for_all_its_methods():
    model, params = functionalize(module())
    methods = [eva(names=("q",)), LoRA(r=2, target_modules=["q", "o"], init_lora_weights="corda"), IA3(target_modules=["k"])]
    methods[2] = IA3(target_modules=["k"], feedforward_modules=[])
    net = adapt(model, methods)
    found = calibrate(net, params, iter(data()), progress=False)
    assert {p: sorted(t) for p, t in found.items()} == {
        "q": ["components", "covariance", "explained", "singular"],
        "o": ["covariance"],
    }
    adapters = net.init(params, 0, statistics=found)
    torch.testing.assert_close(net(params, adapters, data()[0]), model(params, data()[0]))


def test_inputs_without_variance_have_directions_of_nothing():
    found = collect(eva(), [torch.ones(3, 9, 8)], settle=False)
    assert not found["q"]["explained"].any()
    assert bool(torch.isfinite(found["q"]["components"]).all())


# -- gradients ---------------------------------------------------------------------------------------------------------------


def squares(output, batch):
    return output.square().mean()


def test_gradients_are_means_over_batches():
    batches, mine = data(3), module()
    model, params = functionalize(module())
    found = weight_gradients(model, params, squares, batches, target_modules=["q", "o"], progress=False)
    for x in batches:
        (squares(mine(x), None) / 3).backward()
    assert found.keys() == {"q", "o"}
    for path, t in found.items():
        torch.testing.assert_close(t, mine.get_submodule(path).weight.grad)
    net = adapt(model, LoRA(r=2, target_modules=["q", "o"], init_lora_weights="lora_ga"))
    again = weight_gradients(net, params, squares, iter(batches), progress=False)
    assert all(torch.equal(again[p], t) for p, t in found.items())
    assert not any(t.requires_grad for t in (*params.values(), *found.values()))


def test_gradients_of_transposed_layers_are_matrices():
    from transformers.pytorch_utils import Conv1D

    class Stored(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = Conv1D(6, 8)

        def forward(self, x):
            return self.c(x)

    model, params = functionalize(module(Stored))
    x = data(1)[0]
    found = weight_gradients(model, params, lambda out, batch: out.sum(), [x], target_modules=["c"], progress=False)
    torch.testing.assert_close(found["c"], x.sum((0, 1)).expand(6, 8))


def test_gradients_take_labels_and_named_inputs():
    model, params = functionalize(module())
    batch = {"x": data(1)[0], "labels": torch.zeros(5, 12, 5), "other": torch.ones(1)}
    options = {"target_modules": ["o"], "inputs": ["x"], "progress": False}
    found = weight_gradients(model, params, lambda out, b: F.mse_loss(out, b["labels"]), [batch], **options)
    torch.testing.assert_close(found, weight_gradients(model, params, squares, [(batch["x"], 1 + batch["other"])], **options))


def test_the_gradient_of_a_tied_head_is_its_own():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.head = nn.Embedding(8, 6), nn.Linear(6, 8, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, ids):
            return self.head(torch.tanh(self.emb(ids)))

    model, params = functionalize(module(Tied))
    ids = torch.arange(8)[None]
    found = weight_gradients(model, params, lambda out, batch: out.sum(), [ids], target_modules=["head"], progress=False)
    torch.testing.assert_close(found["head"], torch.tanh(params["emb.weight"]).sum(0).expand(8, 6))


# -- refusals ----------------------------------------------------------------------------------------------------------------


def gradients(batches, model=None, params=None, **options):
    made = functionalize(module())
    return weight_gradients(model or made[0], params or made[1], squares, batches, progress=False, **options)


WRONG = [
    (lambda: collect(None, data(), limit=0), ValueError, "calibrate: limit must be a positive int, got 0"),
    (
        lambda: collect(None, data(), mask="all"),
        TypeError,
        "calibrate: mask must be a function of a batch, 'auto' or None, got 'all'",
    ),
    (lambda: collect(None, []), ValueError, "calibrate: at least one batch is required, got none"),
    (lambda: collect(eva(), []), ValueError, "calibrate: at least one batch is required, got none"),
    (lambda: collect(None, None), TypeError, "calibrate: batches must be a list or an iterator of them, got NoneType"),
    (
        lambda: collect(None, torch.ones(3, 8)),
        TypeError,
        "batches must be .*, got Tensor; put a single batch in a list",
    ),
    (lambda: gradients(3), TypeError, "weight_gradients: batches must be a list or an iterator of them, got int"),
    (lambda: collect(None, data(), mask=lambda b: [True]), TypeError, "mask must return a boolean tensor or None, got list"),
    (
        lambda: collect(eva(), [data()[0], data()[1] * torch.nan]),
        ValueError,
        "calibrate at 'q': an input must be finite, got NaN or infinity",
    ),
    (lambda: gradients([]), ValueError, "weight_gradients: at least one batch is required, got none"),
    (
        lambda: collect(LoRA(r=1, target_modules=["q"]), data()),
        ValueError,
        "calibrate: a method whose init needs statistics is required, got lora with True",
    ),
    (
        lambda: calibrate(module(), {}, data()),
        TypeError,
        "calibrate: a Model or a Net is required, got Model; call functionalize",
    ),
    (
        lambda: collect(None, [{"x": data()[0], "attention_mask": torch.ones(5, 11)}]),
        ValueError,
        r"calibrate at 'q': a mask of shape \(5, 11\) must have one entry per row of the input, got shape \(5, 12, 8\)",
    ),
    (
        lambda: collect(None, [torch.zeros(2, 8)]),
        ValueError,
        "calibrate at 'q': an input must be finite, and its largest entry not zero, got NaN or infinity",
    ),
    (
        lambda: collect(None, [{"x": data()[0], "attention_mask": torch.zeros(5, 12)}]),
        ValueError,
        "calibrate: every layer must be met by an input, got none at 'k', 'o', 'q'; add batches, or leave these layers out",
    ),
    (
        lambda: collect(None, [{"y": data()[0]}], inputs=["x"]),
        KeyError,
        "calibrate: inputs must be names of a batch's tensors, got 'x'",
    ),
    (
        lambda: collect(eva(), [torch.ones(2, 8)], settle=False),
        ValueError,
        "calibrate: a layer needs as many rows of inputs as directions, got fewer at 'q', 'o'; add batches, or lower r",
    ),
    (
        lambda: collect(eva(tau=1.0), data(), limit=5),
        ValueError,
        r"calibrate: directions must settle to cosine 1.0 within 5 batches, got others at .*; raise limit, lower",
    ),
]


@pytest.mark.parametrize(("call", "kind", "match"), WRONG)
def test_a_mistake_is_explained(call, kind, match):
    with pytest.raises(kind, match=match):
        call()


def test_a_net_brings_its_methods():
    model, params = functionalize(module())
    net = adapt(model, eva())
    with pytest.raises(ValueError, match=r"calibrate: a net has its methods, got lora; pass net\.model, or leave"):
        calibrate(net, params, data(), eva())


def test_gradients_are_of_dense_weights():
    torch.manual_seed(0)
    model, params = functionalize(nn.Sequential(nn.Linear(32, 32)))
    stored = quantize(model, params, NF4())
    with pytest.raises(TypeError, match="weight_gradients at '0': gradients are those of dense weights, got Quantized"):
        gradients([drawn(2, 32)], model, stored, target_modules=["0"])


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.decomposition", None)
    with pytest.raises(ImportError, match=r"calibrate: EVA's directions need scikit-learn; pip install 'funcpeft\[eva\]'"):
        collect(eva(), data())

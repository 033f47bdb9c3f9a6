"""Where peft 0.21 is wrong and results here differ on purpose, each against a dense computation or finite differences.

A test fails as well when peft begins to agree: the difference then leaves this file and the docs.
"""

import json
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from differences import differs
from torch import nn
from transformers.pytorch_utils import Conv1D

from funcpeft.adapt import adapt
from funcpeft.errors import NoMatchError
from funcpeft.functional import functionalize
from funcpeft.interop.peft import load_peft, save_peft
from funcpeft.methods import IA3, OFT, LoHa, LoRA, MiSS, TrainableTokens
from funcpeft.tree import tree_map


class Site(nn.Module):
    """One layer under a name."""

    def __init__(self, layer):
        super().__init__()
        self.site = layer

    def forward(self, x):
        return self.site(x)


def single(make, seed=4):
    """Returns a module with one layer in float64, made anew at every call."""
    torch.manual_seed(seed)
    return Site(make()).double().eval()


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(adapter, seed=7):
    gen = torch.Generator().manual_seed(seed)

    def move(t):
        return t + 0.3 * torch.randn(t.shape, generator=gen, dtype=t.dtype)

    return adapter.replace(params=tree_map(move, adapter.params))


def ours(module, method):
    """Returns model, params, net and an adapter moved away from init."""
    model, params = functionalize(module)
    net = adapt(model, method)
    return model, params, net, moved(net.init(params, 0))


def theirs(module, config, perturb=True):
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(module, config).eval()
    torch.manual_seed(9)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad and perturb:
                p.add_(0.3 * torch.randn_like(p))
    return wrapped


def far(a, b):
    return float((a - b).abs().max()) > 1e-3


# -- LoRA --------------------------------------------------------------------------------------------------------------------


class Attending(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True).double()

    def forward(self, x):
        return self.attn(x, x, x, need_weights=False)[0]


@differs(
    "LoRA", "on `nn.MultiheadAttention` the update of `out_proj` is applied twice, in the forward and in the merge", "once"
)
def test_attention_adds_the_update_of_out_proj_once(tmp_path):
    def base():
        torch.manual_seed(4)
        return Attending(8).eval()

    wrapped = theirs(base(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["attn"]))
    wrapped.save_pretrained(tmp_path)
    model, params = functionalize(base())
    net, adapter = load_peft(model, params, tmp_path)
    x, dense = drawn(3, 5, 8), base()
    with torch.no_grad():
        for path, key in (("attn.in_proj_weight", "in_proj_weight"), ("attn.out_proj", "out_proj.weight")):
            leaves = adapter.leaves(path)
            dense.attn.get_parameter(key).add_(2 * leaves["B"] @ leaves["A"])
        want = dense(x)
        torch.testing.assert_close(net(params, adapter, x), want)
        torch.testing.assert_close(model(net.merge(params, adapter)[0], x), want)
        update = 2 * adapter.params["attn.out_proj"]["B"] @ adapter.params["attn.out_proj"]["A"]
        assert far(wrapped(x), want)
        merged = wrapped.merge_and_unload().attn.out_proj.weight
        torch.testing.assert_close(merged, params["attn.out_proj.weight"] + 2 * update)  # twice


@differs(
    "LoRA",
    "on `nn.MultiheadAttention` gradients see one of the two updates of `out_proj`",
    "gradients are those of what is computed",
)
def test_attention_has_the_gradient_of_what_it_computes():
    torch.manual_seed(4)
    model, params = functionalize(Attending(4))
    net = adapt(model, LoRA(r=1, target_modules=["attn"]))
    adapter, x = moved(net.init(params, 0)), drawn(3, 1, 4)

    def loss(a, b):
        site = {"A": a, "B": b}
        return net(params, adapter.replace(params={**adapter.params, "attn.out_proj": site}), x).square().sum()

    leaves = adapter.params["attn.out_proj"]
    assert torch.autograd.gradcheck(loss, (leaves["A"].requires_grad_(), leaves["B"].requires_grad_()))


CONVS = {
    "dilated": (lambda: nn.Conv2d(3, 4, 3, dilation=2), (2, 3, 9, 9)),
    "reflecting": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (2, 3, 6, 6)),
    "circular, one axis": (lambda: nn.Conv1d(3, 4, 3, padding=2, padding_mode="circular"), (2, 3, 7)),
    "flat kernel": (lambda: nn.Conv3d(3, 4, (1, 1, 3)), (2, 3, 4, 4, 5)),
}


@pytest.mark.parametrize("name", CONVS)
@differs(
    "LoRA",
    "dilation and padding mode of a convolution are not copied, and a kernel `(1, 1, k)` has no update: errors",
    "both are the layer's; any kernel",
)
def test_a_low_rank_update_of_a_convolution_has_its_geometry(name):
    make, shape = CONVS[name]
    module, x = single(make), drawn(*shape)
    model, params, net, adapter = ours(module, LoRA(r=2, lora_alpha=4, target_modules=["site"]))
    leaves = adapter.leaves("site")
    dense = single(make)
    with torch.no_grad():
        dense.site.weight.add_((2 * leaves["B"] @ leaves["A"]).reshape(dense.site.weight.shape))
        want = dense(x)
        torch.testing.assert_close(net(params, adapter, x), want)
        torch.testing.assert_close(model(net.merge(params, adapter)[0], x), want)
        wrapped = theirs(single(make), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["site"]))
        try:
            found = wrapped(x)
            merged = wrapped.merge_and_unload()(x)
        except RuntimeError:
            return  # peft's forward or merge fails on shapes
        assert far(found, merged)


@differs(
    "LoRA",
    'init `"olora"` on transformers\' `Conv1D`: the transpose is missing, an error, or for square weights a changed start',
    "works on the matrix (out, in)",
)
def test_olora_takes_a_transposed_layer():
    def make(out=6):
        return single(lambda: Conv1D(out, 6)).float()

    x, method = drawn(5, 6).float(), LoRA(r=2, target_modules=["site"], init_lora_weights="olora")
    for out in (6, 9):
        model, params = functionalize(make(out))
        net = adapt(model, method)
        adapter = net.init(params, 0)
        torch.testing.assert_close(net(params, adapter, x), model(params, x))
        q, upper = torch.linalg.qr(params["site.weight"].T)
        torch.testing.assert_close(adapter.params["site"]["B"] @ adapter.params["site"]["A"], q[:, :2] @ upper[:2])
        wrapped = theirs(make(out), peft.LoraConfig(r=2, target_modules=["site"], init_lora_weights="olora"), perturb=False)
        with torch.no_grad():
            if out == 6:
                assert far(wrapped(x), model(params, x))
            else:
                with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                    wrapped(x)


def test_olora_of_an_embedding_is_refused():
    def make():
        return nn.Embedding(10, 6)

    with pytest.raises(
        ValueError, match="lora at 'site': init 'olora' takes linear layers, got embedding; use init_lora_weights=True"
    ):
        adapt(functionalize(single(make))[0], LoRA(r=2, target_modules=["site"], init_lora_weights="olora"))
    wrapped = theirs(single(make), peft.LoraConfig(r=2, target_modules=["site"], init_lora_weights="olora"), perturb=False)
    assert wrapped.peft_config["default"].init_lora_weights == "olora"  # accepted; it draws the usual init


@differs(
    "LoRA",
    "keys of `rank_pattern` and `alpha_pattern` are written sorted but matched in order, so a reload may take another",
    "written as whole paths, so that order has no meaning",
)
def test_which_pattern_wins_survives_a_file(tmp_path):
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(6, 6)}) for _ in range(2)])

        def forward(self, x):
            for layer in self.layers:
                x = layer["q_proj"](x)
            return x

    def base():
        torch.manual_seed(4)
        return Layers().double().eval()

    patterns = {"q_proj": 2, "layers.0.q_proj": 4}  # the first wins; a file sorts its keys
    model, params, net, adapter = ours(base(), LoRA(r=3, target_modules=["q_proj"], rank_pattern=patterns))
    assert {p: len(leaves["A"]) for p, leaves in adapter.params.items()} == {"layers.0.q_proj": 2, "layers.1.q_proj": 2}
    save_peft(net, adapter, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (2, {})
    again, read = load_peft(model, params, tmp_path / "ours")
    x = drawn(3, 6)
    with torch.no_grad():
        torch.testing.assert_close(again(params, read, x), net(params, adapter, x))
        torch.testing.assert_close(peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()(x), net(params, adapter, x))
    wrapped = theirs(base(), peft.LoraConfig(r=3, target_modules=["q_proj"], rank_pattern=patterns))
    wrapped.save_pretrained(tmp_path / "theirs")
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(base(), tmp_path / "theirs")


@differs(
    "LoRA",
    "`target_parameters` with one expert that is stored transposed: the update is laid out the wrong way",
    "follows the stored layout",
)
def test_one_fused_matrix_that_is_stored_transposed():
    class One(nn.Module):
        is_transposed = True

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(1, 5, 5))

        def forward(self, x):
            return x @ self.w[0]

    def base():
        torch.manual_seed(4)
        return Site(One()).double().eval()

    model, params, net, adapter = ours(base(), LoRA(r=2, lora_alpha=4, target_parameters=["site.w"], target_modules=[]))
    leaves, x = adapter.leaves("site.w"), drawn(3, 5)
    want = x @ (params["site.w"][0] + 2 * (leaves["B"][0] @ leaves["A"][0]).T)
    torch.testing.assert_close(net(params, adapter, x), want)
    torch.testing.assert_close(model(net.merge(params, adapter)[0], x), want)


# -- other methods -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3])
@differs(
    "OFT",
    "on a convolution with a kernel larger than 1 the forward is not neutral at the start nor merged; oblong kernels fail",
    "both are the merged weight, of any kernel and dilation",
)
def test_oft_rotates_what_a_kernel_covers(kernel):
    def make():
        return nn.Conv2d(4, 6, kernel, padding=1)

    x = drawn(2, 4, 7, 7)
    module = single(make)
    model, params = functionalize(module)
    net = adapt(model, OFT(oft_block_size=4, use_cayley_neumann=False, target_modules=["site"]))
    fresh, adapter = net.init(params, 0), moved(net.init(params, 0))
    torch.testing.assert_close(net(params, fresh, x), model(params, x))
    merged, _ = net.merge(params, adapter)
    with torch.no_grad():
        want = F.conv2d(x, merged["site.weight"], params["site.bias"], padding=1)
        torch.testing.assert_close(net(params, adapter, x), want)
    w, v = (t["site.weight"].flatten(1) for t in (params, merged))
    torch.testing.assert_close(v @ v.T, w @ w.T)
    wrapped = theirs(single(make), peft.OFTConfig(oft_block_size=4, target_modules=["site"]), perturb=False)
    with torch.no_grad():
        try:
            apart = far(wrapped(x), model(params, x))
        except RuntimeError:
            apart = True
    assert apart == (kernel > 1)


@differs(
    "IA3", "unmerging divides by `l + 1e-8`: inexact, and the weight is lost where l is 0", "divides by l; a zero is refused"
)
def test_ia3_unmerges_by_dividing_by_the_factor_itself():
    def make():
        return nn.Linear(6, 5)

    _, params, net, adapter = ours(single(make), IA3(target_modules=["site"]))
    small = adapter.replace(params={"site": {"l": 1e-5 * adapter.params["site"]["l"]}})
    merged, _ = net.merge(params, small)
    back = net.unmerge(merged, small)
    for key in params:
        torch.testing.assert_close(back[key], params[key], rtol=1e-14, atol=0)
    wrapped = theirs(single(make), peft.IA3Config(target_modules=["site"], feedforward_modules=[]), perturb=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for p in wrapped.parameters():
            if p.requires_grad:
                p.copy_(small.params["site"]["l"].reshape(p.shape))
        wrapped.merge_adapter()
        wrapped.unmerge_adapter()
        apart = (wrapped.base_model.model.site.base_layer.weight - params["site.weight"]).abs() / params["site.weight"].abs()
    assert float(apart.max()) > 1e-5


@differs("LoHa", "`use_effective_conv2d`: gradients of two factors come of the wrong branch", "those of the formula")
def test_loha_with_cores_has_the_gradient_of_what_it_computes():
    def make():
        return nn.Conv2d(3, 4, 3)

    method = LoHa(r=2, alpha=2, use_effective_conv2d=True, target_modules=["site"])
    _, params, net, adapter = ours(single(make), method)
    names, x = sorted(adapter.params["site"]), drawn(1, 3, 4, 4)

    def loss(*leaves):
        return net(params, adapter.replace(params={"site": dict(zip(names, leaves, strict=True))}), x)

    assert torch.autograd.gradcheck(loss, tuple(adapter.params["site"][n].requires_grad_() for n in names))
    config = peft.LoHaConfig(r=2, alpha=2, use_effective_conv2d=True, target_modules=["site"])
    wrapped = theirs(single(make), config)
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    wrong = []
    for name, p in trained.items():
        wrapped.zero_grad()
        wrapped(x).sum().backward()
        grad, step = p.grad.clone(), torch.zeros_like(p)
        step.view(-1)[0] = 1e-6
        with torch.no_grad():
            p.add_(step)
            up = wrapped(x).sum()
            p.sub_(2 * step)
            down = wrapped(x).sum()
            p.add_(step)
        if abs(float((up - down) / 2e-6 - grad.view(-1)[0])) > 1e-4 * (1 + abs(float(grad.view(-1)[0]))):
            wrong.append(name.rsplit("hada_", 1)[1].split(".")[0])
    assert sorted(wrong) == ["w1_a", "w2_a"]


@differs(
    "MiSS",
    '`"mini"` in half precision on the CPU: merging overwrites the parameter, and unmerging then fails',
    "no argument is written",
)
def test_miss_mini_merges_in_half_precision_without_touching_the_adapter():
    model, params = functionalize(single(lambda: nn.Linear(8, 6)).to(torch.float16))
    net = adapt(model, MiSS(r=4, mini_r=2, init_weights="mini", target_modules=["site"]))
    adapter = moved(net.init(params, 0))
    kept = tree_map(torch.clone, adapter)
    merged, report = net.merge(params, adapter)
    assert torch.equal(kept.params["site"]["D"], adapter.params["site"]["D"])
    x = drawn(4, 8).half()
    torch.testing.assert_close(model(merged, x), net(params, adapter, x), rtol=1e-2, atol=1e-2)
    assert float(report.sites["site"]["realised"]) > 0.99


@differs("TrainableTokens", "a wrapped head loses its bias", "keeps it")
def test_trained_rows_keep_the_bias_of_a_tied_head():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.head = nn.Embedding(10, 6), nn.Linear(6, 10)
            self.head.weight = self.emb.weight

        def forward(self, ids):
            return self.head(self.emb(ids))

    torch.manual_seed(4)
    model, params, net, adapter = ours(Tied().double(), TrainableTokens(target_modules=["emb"], token_indices=[2, 7]))
    table = params["emb.weight"].clone()
    table[[2, 7]] = adapter.params["emb"]["D"]
    ids = torch.arange(10)[None]
    want = table[ids] @ table.T + params["head.bias"]
    torch.testing.assert_close(net(params, adapter, ids), want)
    torch.testing.assert_close(model(net.merge(params, adapter)[0], ids), want)


# -- choosing ----------------------------------------------------------------------------------------------------------------


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.norm, self.post_norm = nn.Linear(6, 6), nn.LayerNorm(6), nn.LayerNorm(6)

    def forward(self, x):
        return self.post_norm(self.norm(self.lin(x)))


def test_saved_modules_are_matched_at_dots():
    net = adapt(functionalize(Named())[0], LoRA(r=2, target_modules=["lin"], modules_to_save=["norm"]))
    assert list(net.entries[1].sites) == ["norm.weight", "norm.bias"]
    wrapped = theirs(Named(), peft.LoraConfig(r=2, target_modules=["lin"], modules_to_save=["norm"]))
    assert type(wrapped.base_model.model.post_norm).__name__ == "ModulesToSaveWrapper"


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["lin", "linn"]},
        {"target_modules": ["lin"], "exclude_modules": ["linn"]},
        {"target_modules": ["lin"], "rank_pattern": {"linn": 4}},
    ],
)
def test_an_entry_that_matches_nothing_is_an_error(fields):
    theirs(Named(), peft.LoraConfig(r=2, **fields))
    with pytest.raises(NoMatchError, match="'linn'; did you mean 'lin'"):
        adapt(functionalize(Named())[0], LoRA(r=2, **fields))


@differs(
    "LoRA",
    "a weight that the model reads past its layer (DeBERTa's `rel_embeddings`, Mamba's `dt_proj`, the fast path of "
    "`nn.TransformerEncoderLayer`) gets no update in the call, and gets it in the merge",
    "every read meets the adapted weight",
)
def test_a_weight_that_the_model_reads_itself_is_adapted():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(10, 6)

        def forward(self, x):
            return x @ self.emb.weight.T

    def base():
        torch.manual_seed(4)
        return Reads().double().eval()

    x = torch.ones(2, 6).double()
    model, params, net, adapter = ours(base(), LoRA(r=2, target_modules=["emb"]))
    torch.testing.assert_close(model(net.merge(params, adapter)[0], x), net(params, adapter, x))
    wrapped = theirs(base(), peft.LoraConfig(r=2, target_modules=["emb"]))
    with torch.no_grad():
        torch.testing.assert_close(wrapped(x), base()(x))
        assert far(wrapped(x), wrapped.merge_and_unload()(x))


@differs(
    "LoRA",
    "on a tied embedding without `ensure_weight_tying` the forward changes the embedding, the merge both",
    "the embedding in both; the report says that the two are untied",
)
def test_merging_an_embedding_leaves_the_tied_head_as_the_forward_does():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
            self.head.weight = self.emb.weight

        def forward(self, ids):
            return self.head(self.emb(ids))

    def base():
        torch.manual_seed(4)
        return Tied().double().eval()

    model, params, net, adapter = ours(base(), LoRA(r=2, target_modules=["emb"]))
    ids = torch.arange(10)[None]
    merged, report = net.merge(params, adapter)
    torch.testing.assert_close(model(merged, ids), net(params, adapter, ids))
    assert report.notes == ("'head.weight' was tied and now has a tensor of its own",)
    wrapped = theirs(base(), peft.LoraConfig(r=2, target_modules=["emb"]))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = wrapped(ids)
        assert far(before, wrapped.merge_and_unload()(ids))

"""Where peft 0.21.2 differs in AdaLoRA, OSF, AdaMSS and the optimizers of low-rank factors, each with an independent check."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import peft
import pytest
import torch
from differences import differs
from peft.optimizers import create_lorafa_optimizer, create_riemannian_optimizer
from torch import nn

import funcpeft as fp
from funcpeft import optim


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(12, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.lin1(torch.tanh(self.lin0(x)))


class Scored(Mlp):
    def forward(self, x):
        return SimpleNamespace(loss=super().forward(x).square().mean())


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.lin = nn.Embedding(5, 4), nn.Linear(4, 6)

    def forward(self, ids):
        return self.lin(self.emb(ids))


class Picture(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x)


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


def make(cls, dtype=torch.float32):
    torch.manual_seed(0)
    return cls().to(dtype)


def wrap(module, config):
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(module, config)


def save_and_load(wrapped, module, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder)
        return peft.PeftModel.from_pretrained(module, folder).eval()


def here(module, method):
    model, params = fp.functionalize(module)
    net = fp.adapt(model, method)
    return model, params, net, fp.peft_init(net, params, 5)


def stepped(net, params, adapter, opt, x, steps=1):
    state = opt.init(adapter)
    for _ in range(steps):
        _, grads = fp.value_and_grad(lambda a: net(params, a, x).square().mean())(adapter)
        adapter, state = opt.update(grads, state, adapter)
    return adapter


# -- AdaLoRA -----------------------------------------------------------------------------------------------------------------

ADALORA = {"init_r": 4, "target_r": 2, "total_step": 11, "lora_alpha": 3, "target_modules": ["lin0", "lin1"]}


@differs("AdaLoRA", "`target_r` equal to `init_r`: an error in the first allocation", "nothing is dropped")
def test_peft_cannot_keep_every_rank():
    fields = {**ADALORA, "target_r": 4}
    wrapped = wrap(make(Mlp), peft.AdaLoraConfig(**fields))
    wrapped.base_model.model(X).square().mean().backward()
    wrapped.base_model.update_and_allocate(0)
    with pytest.raises(RuntimeError, match="k"):
        wrapped.base_model.update_and_allocate(1)
    _, params, net, adapter = here(make(Mlp), fp.AdaLoRA(**fields))
    method, state = net.methods[0], net.methods[0].allocate_init(adapter)
    for _ in range(12):
        _, grads = fp.value_and_grad(lambda a: net(params, a, X).square().mean())(adapter)
        adapter, state = method.allocate_update(grads, state, adapter)
    assert all(bool(kept.all()) for kept in state["kept"].values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@differs(
    "AdaLoRA",
    "on a base that is not float32 the divisor `ranknum` is trained too, but no file holds it: what is loaded differs",
    "it is a constant, `init_r`",
)
def test_peft_trains_the_number_of_ranks(tmp_path, dtype):
    wrapped = wrap(make(Mlp, dtype), peft.AdaLoraConfig(**ADALORA, init_lora_weights=False))
    ranknum = wrapped.base_model.model.lin0.ranknum["default"]
    x = X.to(dtype)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
    wrapped.base_model.model(x).square().mean().backward()
    optimizer.step()
    assert abs(float(ranknum.detach()) - 4) > 1e-3
    back = save_and_load(wrapped, make(Mlp, dtype), tmp_path)
    apart = back.base_model.model(x) - wrapped.base_model.model(x)
    assert float(apart.detach().abs().max()) > 1e-3
    _, params, net, adapter = here(make(Mlp, dtype), fp.AdaLoRA(**ADALORA, init_lora_weights=False))
    moved = stepped(net, params, adapter, optim.sgd(0.5), x)
    fp.save_peft(net, moved, tmp_path / "ours")
    again, loaded = fp.load_peft(net.model, params, tmp_path / "ours")
    assert torch.equal(again(params, loaded, x), net(params, moved, x))


@differs(
    "AdaLoRA",
    "the regulariser is added to the `loss` in the model's output, in evaluation too",
    "the output is the model's; `net.penalty` returns the regulariser",
)
def test_peft_adds_the_regulariser_to_the_loss():
    wrapped = wrap(make(Scored), peft.AdaLoraConfig(**ADALORA)).eval()
    _, params, net, adapter = here(make(Scored), fp.AdaLoRA(**ADALORA))
    plain = make(Scored)(X).loss.detach()
    torch.testing.assert_close(net(params, adapter, X).loss, plain)
    with torch.no_grad():
        torch.testing.assert_close(wrapped.base_model(X).loss, plain + net.penalty(adapter))
    assert float(net.penalty(adapter)) > 0.1


# -- OSF ---------------------------------------------------------------------------------------------------------------------

OSF = {"target_modules": ["lin0"], "effective_rank": 3, "init_weights": False}


@differs("OSF", "unmerging is refused for a model, and a layer only warns and stays merged", "subtracts the update")
def test_unmerging_is_a_subtraction():
    _, params, net, adapter = here(make(Mlp), fp.OSF(**OSF))
    merged, _ = net.merge(params, adapter)
    assert not torch.allclose(merged["lin0.weight"], params["lin0.weight"])
    torch.testing.assert_close(net.unmerge(merged, adapter)["lin0.weight"], params["lin0.weight"], rtol=1e-4, atol=1e-5)
    wrapped = wrap(make(Mlp), peft.OSFConfig(**OSF))
    layer = wrapped.base_model.model.lin0
    with pytest.raises(NotImplementedError):
        wrapped.base_model.unmerge_adapter()
    layer.merge()
    with pytest.warns(UserWarning, match="does not support unmerging"):
        layer.unmerge()
    assert not torch.allclose(layer.base_layer.weight, params["lin0.weight"])


@differs("OSF", "merging twice adds the update twice", "params are values: a second merge is asked for")
def test_peft_merges_again():
    _, params, net, adapter = here(make(Mlp), fp.OSF(**OSF))
    layer = wrap(make(Mlp), peft.OSFConfig(**OSF)).base_model.model.lin0
    before = layer.base_layer.weight.detach().clone()
    layer.merge()
    once = layer.base_layer.weight.detach() - before
    layer.merge()
    torch.testing.assert_close(layer.base_layer.weight.detach() - before, 2 * once)
    assert torch.equal(net.merge(params, adapter)[0]["lin0.weight"], net.merge(params, adapter)[0]["lin0.weight"])


@differs(
    "OSF", "targets that are not linear are left as they are without a word", "embeddings and convolutions are adapted too"
)
def test_a_target_that_is_not_linear():
    fields = {"target_modules": ["lin", "emb"], "effective_rank": 2}
    wrapped = wrap(make(Words), peft.OSFConfig(**fields))
    assert type(wrapped.base_model.model.emb) is nn.Embedding
    _, params, net, adapter = here(make(Words), fp.OSF(**fields, init_weights=False))
    leaves, ids = adapter.leaves("emb"), torch.arange(5)
    update = leaves["U"] @ torch.diag(leaves["S"]) @ leaves["V"] - leaves["U0"] @ torch.diag(leaves["S0"]) @ leaves["V0"]
    merged = {**net.merge(params, adapter)[0], "emb.weight": params["emb.weight"] + update.T}
    torch.testing.assert_close(net(params, adapter, ids), net.model(merged, ids), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="osf at 'norm': a target must be one of the kinds"):
        fp.adapt(fp.functionalize(nn.ModuleDict({"norm": nn.LayerNorm(4)}))[0], fp.OSF(target_modules=["norm"]))


# -- AdaMSS ------------------------------------------------------------------------------------------------------------------

ADAMSS = {"r": 6, "num_subspaces": 4, "subspace_rank": 2, "target_modules": ["lin0", "lin1"], "random_seed": 0}
ASA = {"use_asa": True, "asa_target_subspaces": 3, "init_warmup": 1, "final_warmup": 9, "mask_interval": 2}


@differs(
    "AdaMSS",
    "the schedule that freezes subspaces keeps one fewer than asked for",
    "as many as the schedule says",
)
def test_the_first_choice_is_pefts_and_one_more():
    fields = {**ADAMSS, **ASA, "asa_schedule_exponent": 1.0}
    _, params, net, adapter = here(make(Mlp), fp.AdaMSS(**fields))
    wrapped = wrap(make(Mlp), peft.AdamssConfig(**fields))
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.5)
    opt, method = optim.sgd(0.5), net.methods[0]
    state, moments = method.asa_init(adapter), opt.init(adapter)
    for step in range(3):  # step 2 chooses
        optimizer.zero_grad()
        wrapped(X).square().mean().backward()
        optimizer.step()
        wrapped.base_model.update_and_allocate(step)
        _, grads = fp.value_and_grad(lambda a: net(params, a, X).square().mean())(adapter)
        adapter, moments = opt.update(grads, moments, adapter)
        state = method.asa_update(grads, state, adapter)
    inner = wrapped.base_model.model
    theirs = {p: [a.requires_grad for a in inner.get_submodule(p).adamss_A["default"]] for p in state["kept"]}
    ours = {p: kept.tolist() for p, kept in state["kept"].items()}
    scheduled = int(3 + (8 - 3) * (1 - (2 - 1) / 8))
    assert sum(map(sum, ours.values())) == scheduled
    assert sum(map(sum, theirs.values())) == scheduled - 1
    assert all(mine or not other for p in ours for mine, other in zip(ours[p], theirs[p], strict=True))


@differs(
    "AdaMSS",
    "a file of another partition (an edited seed, another base) loads without an error and writes to wrong rows",
    "refused where clusters have other sizes",
)
def test_a_file_of_another_partition(tmp_path):
    _, params, net, adapter = here(make(Mlp), fp.AdaMSS(**ADAMSS, init_weights=None))
    fp.save_peft(net, adapter, tmp_path)
    other = {**params, "lin0.weight": params["lin0.weight"].flip(0) * torch.linspace(0.1, 3, 16)[:, None]}
    with pytest.raises(fp.CheckpointError, match="misshapen"):
        fp.load_peft(net.model, other, tmp_path)
    module = make(Mlp)
    module.load_state_dict(other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = peft.PeftModel.from_pretrained(module, tmp_path).base_model.model.lin0
    for k, (rows, b) in enumerate(zip(layer.seg_result["default"].values(), layer.adamss_B["default"], strict=True)):
        torch.testing.assert_close(b.detach(), net.methods[0].to_peft(None, adapter.leaves("lin0"))[f"adamss_B.{k}"])
        if len(rows) != len(b):
            return  # the file's rows of this cluster are not the rows they are added to
    pytest.fail("peft's clusters are those of the file")


# -- optimizers --------------------------------------------------------------------------------------------------------------

LORA = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}


@differs(
    "optim.lora_fa",
    "the gradient is multiplied in bfloat16 wherever the processor has it, however precise the parameters are below float64",
    "in the precision of the leaves",
)
def test_lora_fa_multiplies_in_the_precision_of_the_leaves():
    fields = {**LORA, "target_modules": ["lin0", "lin1"]}
    wrapped = wrap(make(Mlp), peft.LoraConfig(**fields))
    optimizer = create_lorafa_optimizer(wrapped, r=4, lora_alpha=6, lr=1e-2)
    wrapped.base_model.model(X).square().mean().backward()
    optimizer.step()
    _, params, net, adapter = here(make(Mlp), fp.LoRA(**fields))
    first = optim.chain(*[t for name, t in optim.lora_fa(1e-2).transforms.items() if name == "lora_fa"])
    _, grads = fp.value_and_grad(lambda a: net(params, a, X).square().mean())(adapter)
    turned, _ = first(grads, first.init(adapter), adapter)
    errors = []
    for path, leaves in adapter.params.items():
        a, g = leaves["A"].double(), grads[path]["B"].double()
        want = g @ torch.linalg.inv(a @ a.T + 1e-8 * torch.eye(4)) / 1.5**2
        scale = float(want.abs().max())
        assert float((turned[path]["B"] - want).abs().max()) < 1e-4 * scale
        state = optimizer.state[f"base_model.model.{path}.lora"]
        errors.append(float((state["exp_avg_B"] / 0.1 - want).abs().max()) / scale)
    assert max(errors) > 1e-3


@differs("optim.lora_fa", "an adapted convolution is an error", "its A is a matrix too")
def test_lora_fa_takes_convolutions():
    fields, x = {**LORA, "target_modules": ["conv"]}, torch.randn(2, 3, 5, 5)
    wrapped = wrap(make(Picture), peft.LoraConfig(**fields))
    optimizer = create_lorafa_optimizer(wrapped, r=4, lora_alpha=6, lr=1e-2)
    wrapped(x).square().mean().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the transpose of four axes
        with pytest.raises(RuntimeError, match="must match"):
            optimizer.step()
    _, params, net, adapter = here(make(Picture), fp.LoRA(**fields))
    moved = stepped(net, params, adapter, optim.lora_fa(1e-2), x)
    assert torch.equal(moved.params["conv"]["A"], adapter.params["conv"]["A"])
    assert float((moved.params["conv"]["B"] - adapter.params["conv"]["B"]).abs().max()) > 1e-3


@differs("optim.riemannian", "factors of embeddings are stepped as they are", "every trained pair A, B is preconditioned")
def test_embeddings_are_preconditioned():
    fields, ids = {**LORA, "r": 2, "target_modules": ["emb", "lin"]}, torch.arange(5)
    wrapped = wrap(make(Words), peft.LoraConfig(**fields))
    optimizer = create_riemannian_optimizer(wrapped, torch.optim.SGD, lr=0.1, reg=0.02)
    layer = wrapped.base_model.model.emb
    before = layer.lora_embedding_B["default"].detach().clone()
    wrapped(ids).square().mean().backward()
    gradient = layer.lora_embedding_B["default"].grad.clone()
    optimizer.step()
    torch.testing.assert_close(before - layer.lora_embedding_B["default"].detach(), 0.1 * gradient)
    _, params, net, adapter = here(make(Words), fp.LoRA(**fields))
    moved = stepped(net, params, adapter, optim.chain(optim.riemannian(0.02), optim.sgd(0.1)), ids)
    a, b = adapter.params["emb"]["A"], adapter.params["emb"]["B"]
    torch.testing.assert_close(b, before)
    want = 0.1 * gradient @ torch.linalg.inv(a @ a.T + 0.02 * torch.eye(2))
    torch.testing.assert_close(b - moved.params["emb"]["B"], want, rtol=1e-4, atol=1e-6)

"""Arrow against peft's arrow models, its prototypes, and what it refuses."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import zoo
from safetensors.torch import load_file
from torch import nn

import funcpeft as fp
from funcpeft.methods.arrow import prototypes

IDS = zoo.ids(2, 7)
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def double(name):
    return copy.deepcopy(zoo.model(name)).double()


def experts(name, folder, count):
    """Writes LoRA adapters whose largest singular value stands out, so that peft's power iteration ends near its vector."""
    model, params = fp.functionalize(double(name))
    paths = []
    for i in range(count):
        net = fp.adapt(model, fp.LoRA(r=2, lora_alpha=3 + i, target_modules=TARGETS[name], init_lora_weights=False))
        made = net.init(params, i, dtype=torch.float32)
        sizes = torch.tensor([[2.0], [0.2]])
        apart = {path: {"A": sizes * leaves["A"], "B": 2 * leaves["B"]} for path, leaves in made.params.items()}
        paths.append(str(folder / f"expert{i}"))
        fp.save_peft(net, made.replace(params=apart), paths[-1])
    return paths


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns the paths of experts by model."""
    return {name: experts(name, tmp_path_factory.mktemp(name), 5) for name in TARGETS}


def read(name, paths):
    model, params = fp.functionalize(double(name))
    return model, params, [fp.load_peft(model, params, p)[1] for p in paths]


def arrow(model, params, name, given, general=None, **options):
    net = fp.adapt(model, fp.Arrow(r=2, target_modules=TARGETS[name], arrow_config=options))
    return net, net.init(params, 0, experts=given, **({"general": general} if general else {}))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_k": 1}, {"top_k": 3, "router_temperature": 0.3}], ids=str)
def test_forward_is_pefts(name, options, saved):
    paths = saved[name][:3]
    theirs = quietly(peft.create_arrow_model, double(name), paths, peft.ArrowConfig(rng_seed=0, **options)).eval()
    model, params, given = read(name, paths)
    net, adapter = arrow(model, params, name, given, **options)
    want, got = theirs(input_ids=IDS).logits, net(params, adapter, input_ids=IDS).logits
    assert (got - want).abs().max() < 1e-5 * (1 + want.abs().max())
    assert (got - model(params, input_ids=IDS).logits).abs().max() > 1e-2
    layer = theirs.base_model.model.get_submodule(next(iter(net.entries[0].sites)))
    own = adapter.consts[next(iter(net.entries[0].sites))]["P"]
    assert ((layer.lora_arrow["arrow_router"].prototypes * own).sum(-1).abs() - 1).abs().max() < 1e-5


def test_general_knowledge_is_subtracted_as_in_peft_and_experts_stay(saved):
    paths, general = saved["llama"][:3], saved["llama"][3:]
    config = peft.ArrowConfig(top_k=2, use_gks=True, rng_seed=0)
    theirs = quietly(peft.create_arrow_model, double("llama"), paths, config, general_adapter_paths=general).eval()
    model, params, given = read("llama", [*paths, *general])
    before = [{p: {n: t.clone() for n, t in v.items()} for p, v in a.params.items()} for a in given]
    net, adapter = arrow(model, params, "llama", given[:3], given[3:], top_k=2, use_gks=True)
    want, got = theirs(input_ids=IDS).logits, net(params, adapter, input_ids=IDS).logits
    assert (got - want).abs().max() < 1e-5 * (1 + want.abs().max())
    plain = arrow(model, params, "llama", given[:3], top_k=2)
    assert (got - plain[0](params, plain[1], input_ids=IDS).logits).abs().max() > 1e-2
    assert all(torch.equal(t, a.params[p][n]) for b, a in zip(before, given, strict=True) for p in b for n, t in b[p].items())


def test_generate_is_pefts(saved):
    paths = saved["llama"][:3]
    theirs = quietly(peft.create_arrow_model, double("llama"), paths, peft.ArrowConfig(top_k=2, rng_seed=0)).eval()
    model, params, given = read("llama", paths)
    net, adapter = arrow(model, params, "llama", given, top_k=2)
    options = {"max_new_tokens": 5, "do_sample": False}
    got = net.call("generate", params, adapter, input_ids=IDS, **options)
    assert torch.equal(got, theirs.generate(input_ids=IDS, **options))


def test_a_router_of_peft_is_read_with_the_experts(saved, tmp_path):
    paths = saved["llama"][:3]
    config = peft.ArrowConfig(top_k=2, router_temperature=0.5, rng_seed=0)
    theirs = quietly(peft.create_arrow_model, double("llama"), paths, config).eval()
    quietly(theirs.save_pretrained, tmp_path / "whole")
    model, params, given = read("llama", [tmp_path / "whole" / f"task_{i}" for i in range(3)])
    with pytest.raises(ValueError, match=r"arrow: the router's file does not hold the experts; pass load_peft\(..., experts="):
        fp.load_peft(model, params, tmp_path / "whole" / "arrow_router")
    net, adapter = fp.load_peft(model, params, tmp_path / "whole" / "arrow_router", experts=given)
    assert type(net.methods[0]) is fp.Arrow
    want = theirs(input_ids=IDS).logits
    assert (net(params, adapter, input_ids=IDS).logits - want).abs().max() < 1e-5 * (1 + want.abs().max())
    fp.save_peft(net, adapter, tmp_path / "ours")
    wrote, there = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "ours", tmp_path / "whole/arrow_router"))
    assert {k: (t.shape, t.dtype) for k, t in wrote.items()} == {k: (t.shape, t.dtype) for k, t in there.items()}
    again, back = fp.load_peft(model, params, tmp_path / "ours", experts=given)
    assert again.methods[0].arrow_config == net.methods[0].arrow_config
    assert torch.equal(again(params, back, input_ids=IDS).logits, net(params, adapter, input_ids=IDS).logits)


def test_prototypes_are_the_main_right_singular_vectors():
    a, b = zoo.noise(4, 3, 9).double(), zoo.noise(4, 5, 3, seed=1).double()
    want = torch.linalg.svd(b @ a).Vh[:, 0]
    assert ((prototypes(a, b) * want).sum(-1).abs() - 1).abs().max() < 1e-12
    wide = prototypes(a[:, :, :2], b)  # more ranks than inputs
    assert ((wide * torch.linalg.svd(b @ a[:, :, :2]).Vh[:, 0]).sum(-1).abs() - 1).abs().max() < 1e-12
    assert torch.equal(prototypes(a, torch.zeros_like(b)), torch.zeros(4, 9, dtype=torch.float64))


def linear(count=3, ranks=(2, 2, 2), **options):
    """Returns params, net, adapter and experts of one layer."""
    model, params = fp.functionalize(nn.Sequential(nn.Linear(6, 4)).double())
    given = []
    for i in range(count):
        plain = fp.adapt(model, fp.LoRA(r=ranks[i], lora_alpha=2 + i, target_modules=["0"], init_lora_weights=False))
        given.append(plain.init(params, i))
    net = fp.adapt(model, fp.Arrow(target_modules=["0"], arrow_config=options))
    return params, net, net.init(params, 0, experts=given), given


def test_output_is_that_of_the_nearest_experts():
    params, net, adapter, given = linear(ranks=(1, 2, 3), top_k=2, router_temperature=0.7)
    x = zoo.noise(2, 5, 6).double()
    got = net(params, adapter, x)
    near = [torch.linalg.svd(a.params["0"]["B"] @ a.params["0"]["A"]).Vh[0] for a in given]
    for row in range(2):
        for t in range(5):
            token = x[row, t]
            similarity = torch.stack([(token @ p).abs() for p in near])
            best = similarity.argsort(descending=True)[:2]
            c = torch.softmax(similarity[best] / 0.7, 0)
            want = params["0.weight"] @ token + params["0.bias"]
            for weight, e in zip(c, best.tolist(), strict=True):
                leaves = given[e].leaves("0")
                want = want + weight * leaves["scaling"] * (leaves["B"] @ (leaves["A"] @ token))
            assert (got[row, t] - want).abs().max() < 1e-12


def test_training_drops_elements_of_the_output():
    params, net, _, given = linear(top_k=2)
    dropping = fp.adapt(net.model, fp.Arrow(target_modules=["0"], lora_dropout=0.5, arrow_config={"top_k": 2}))
    adapter, x = dropping.init(params, 0, experts=given), zoo.noise(50, 6).double()
    base, whole = net.model(params, x), net(params, adapter, x) - net.model(params, x)
    got = dropping(params, adapter, x, context=fp.Context(training=True, seed=2)) - base
    dropped = got.abs() < 1e-12
    assert 0.3 < dropped.double().mean() < 0.7
    assert torch.allclose(got[~dropped], 2 * whole[~dropped])


def test_an_expert_may_leave_a_site_alone():
    model, params = fp.functionalize(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).double())
    one, both = (
        fp.adapt(model, fp.LoRA(r=2, target_modules=t, init_lora_weights=False)).init(params, 1) for t in (["0"], ["0", "1"])
    )
    net = fp.adapt(model, fp.Arrow(target_modules=["0", "1"], arrow_config={"top_k": 1}))
    adapter, h = net.init(params, 0, experts=[one, both]), zoo.noise(3, 4).double()
    c = net.methods[0].weights(adapter.consts["1"], h)
    assert torch.equal(c, torch.tensor([[0.0, 1.0]] * 3).double())
    assert adapter.params == {}
    assert net.methods[0].completed({"experts": [one]}) is net.methods[0]


def test_what_does_not_fit_is_refused():
    params, net, adapter, given = linear(top_k=2)
    with pytest.raises(TypeError, match=r"arrow: experts must be a list of LoRA adapters, one Adapter each, got NoneType"):
        net.init(params, 0)
    with pytest.raises(ValueError, match="arrow: experts must adapt sites of the net, got no adapter"):
        net.init(params, 0, experts=[])
    elsewhere = given[0].replace(params={"1": given[0].params["0"]})
    with pytest.raises(ValueError, match=r"arrow: experts must adapt sites of the net, got .*1.*; widen target_modules"):
        net.init(params, 0, experts=[*given, elsewhere])
    with pytest.raises(ValueError, match="arrow: top_k must be at most the number of experts, 1, got 2"):
        net.init(params, 0, experts=given[:1])
    with pytest.raises(ValueError, match="arrow: use_gks must be set in arrow_config for general adapters to count"):
        net.init(params, 0, experts=given, general=given)
    dora = fp.adapt(net.model, fp.DoRA(r=2, target_modules=["0"])).init(params, 0)
    with pytest.raises(ValueError, match=r"arrow at '0': expert 1 must be a plain LoRA adapter, got leaves \['m'\]"):
        net.init(params, 0, experts=[given[0], dora])
    odd = given[0].replace(params={"0": {**given[0].params["0"], "A": torch.ones(2, 5)}})
    with pytest.raises(ValueError, match=r"arrow at '0': expert 0 must have A \(r, 6\) and B \(4, r\), got \(2, 5\)"):
        net.init(params, 0, experts=[odd, given[0]])
    subtracting = fp.adapt(net.model, fp.Arrow(target_modules=["0"], arrow_config={"top_k": 2, "use_gks": True}))
    with pytest.raises(TypeError, match="arrow: general must be a list of LoRA adapters"):
        subtracting.init(params, 0, experts=given)
    *_, mixed = linear(ranks=(1, 2, 3), top_k=2)
    with pytest.raises(ValueError, match="arrow at '0': with use_gks all adapters must have one rank"):
        subtracting.init(params, 0, experts=mixed, general=given)
    with pytest.raises(fp.errors.NoMergedFormError, match="arrow"):
        net.merge(params, adapter)
    with pytest.raises(ValueError, match=r"arrow at '0': prototypes of experts are required.*; make it with net.init\(params"):
        net(params, given[0], torch.ones(2, 6))


def test_fields_that_do_not_fit():
    with pytest.raises(ValueError, match=r"arrow: a name in arrow_config must be one of .*, got 'topk'"):
        fp.Arrow(arrow_config={"topk": 2})
    with pytest.raises(ValueError, match="arrow: top_k must be a positive integer, got 0"):
        fp.Arrow(arrow_config={"top_k": 0})
    with pytest.raises(ValueError, match=r"arrow: router_temperature must be positive, got 0"):
        fp.Arrow(arrow_config={"router_temperature": 0})
    with pytest.raises(ValueError, match="arrow: r must be a positive integer"):
        fp.Arrow(r=0)
    with pytest.raises(ValueError, match="arrow: lora_dropout must be in"):
        fp.Arrow(lora_dropout=1.0)

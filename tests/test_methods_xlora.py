"""X-LoRA against peft on whole models, its files, its two passes, and what it refuses."""

from __future__ import annotations

import copy
import json
import warnings

import peft
import pytest
import torch
import zoo
from safetensors.torch import load_file
from torch import nn

import funcpeft as fp
from funcpeft import rng
from funcpeft.facts import ModelFacts
from funcpeft.methods.xlora import kept
from funcpeft.tree import tree_map

IDS = zoo.ids(2, 5)
#: Ranks and targets of the experts: one of them leaves a site alone.
EXPERTS = ((2, ["q_proj", "down_proj"]), (3, ["q_proj"]), (2, ["q_proj", "down_proj"]))
OPTIONS = (
    {},
    {"layerwise_scalings": True, "softmax_temperature": 0.5, "global_scaling_weight": 1.5},
    {"xlora_depth": 3, "xlora_size": 7, "top_k_lora": 2, "scaling_pass_value": 0.4},
    {"xlora_depth": 2, "xlora_size": 6, "xlora_dropout_p": 0.0, "enable_softmax": False},
    {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True, "scaling_pass_value": 0.3},
)


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def double():
    module = copy.deepcopy(zoo.model("llama")).double()
    module.config.use_cache = False  # peft asks for it
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Returns model, params, the experts and the folders where they are, as peft names them."""
    folder = tmp_path_factory.mktemp("experts")
    model, params = fp.functionalize(double())
    given, paths = [], {}
    for i, (r, targets) in enumerate(EXPERTS):
        net = fp.adapt(model, fp.LoRA(r=r, lora_alpha=3, target_modules=targets, init_lora_weights=False))
        given.append(net.init(params, i, dtype=torch.float32))
        paths[str(i)] = str(folder / str(i))
        fp.save_peft(net, given[-1], paths[str(i)])
    return model, params, given, paths


def ours(made, **options):
    """Returns params, net and an adapter whose classifier is drawn wider than at the start."""
    model, params, given, paths = made
    net = fp.adapt(model, fp.XLoRA(target_modules=["q_proj", "down_proj"], adapters=paths, **options))
    adapter = net.init(params, 0, experts=given)
    classifier = {n: t + 0.3 * zoo.noise(*t.shape, seed=i).double() for i, (n, t) in enumerate(adapter.params[""].items())}
    return params, net, adapter.replace(params={**adapter.params, "": classifier})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_peft_reads_the_file_and_computes_the_same(options, made, tmp_path):
    params, net, adapter = ours(made, **options)
    fp.save_peft(net, adapter, tmp_path, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(fan_in_fan_out|is_gradient_checkpointing).*")
        theirs = peft.PeftModel.from_pretrained(double(), tmp_path).eval()
    want, got = theirs(input_ids=IDS).logits, net(params, adapter, input_ids=IDS).logits
    assert (got - want).abs().max() < 1e-5 * (1 + want.abs().max())
    assert (got - net.model(params, input_ids=IDS).logits).abs().max() > 1e-2
    back, read = fp.load_peft(net.model, params, tmp_path, experts=made[2])
    assert (back(params, read, input_ids=IDS).logits - got).abs().max() == 0
    assert all(torch.equal(t, read.params[""][n]) for n, t in adapter.params[""].items())


@pytest.mark.parametrize("options", [OPTIONS[1], {**OPTIONS[2], "xlora_dropout_p": 0.0}], ids=str)
def test_gradient_of_the_classifier_is_pefts(options, made, tmp_path):
    params, net, adapter = ours(made, **options)
    fp.save_peft(net, adapter, tmp_path, task_type="CAUSAL_LM")
    theirs = quietly(peft.PeftModel.from_pretrained, double(), tmp_path, is_trainable=True).eval()
    theirs(input_ids=IDS).logits.square().sum().backward()

    def loss(p):
        return net(params, adapter.replace(params=p), input_ids=IDS).logits.square().sum()

    grads = net.methods[0].to_peft(None, torch.func.grad(loss)(adapter.params)[""])
    for key, g in grads.items():
        want = theirs.get_parameter(key).grad
        assert (g - want).abs().max() < 1e-4 * (1 + want.abs().max())


def test_generate_is_pefts_and_takes_beams(made, tmp_path):
    params, net, adapter = ours(made, **OPTIONS[2])
    fp.save_peft(net, adapter, tmp_path, task_type="CAUSAL_LM")
    theirs = quietly(peft.PeftModel.from_pretrained, double(), tmp_path).eval()
    options = {"max_new_tokens": 4, "do_sample": False}
    got = net.call("generate", params, adapter, input_ids=IDS, **options)
    assert torch.equal(got, theirs.generate(input_ids=IDS, **options))
    step = net(params, adapter, input_ids=got[:, :-1]).logits[:, -1].argmax(-1)
    assert torch.equal(step, got[:, -1])
    beams = net.call("generate", params, adapter, input_ids=IDS, num_beams=2, **options)
    many = fp.stack([adapter, adapter.replace(params=tree_map(lambda t: 1.5 * t, adapter.params))])
    folded = fp.apply_many(net, params, many, input_ids=IDS, in_dims=None, call="generate", num_beams=2, **options)
    assert torch.equal(folded[0], beams)


def test_init_draws_the_classifier_as_peft_does(made):
    model, params, _, paths = made
    for options in OPTIONS[:3]:
        torch.manual_seed(5)
        config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=paths, **options)
        theirs = quietly(peft.get_peft_model, double(), config)
        stream = rng.stream(5)
        given = []
        for r, targets in EXPERTS:  # peft draws the experts before it reads them
            plain = fp.adapt(model, fp.LoRA(r=r, lora_alpha=3, target_modules=targets, init_lora_weights=False))
            given.append(plain.entries[0].method.init(plain.bases(plain.entries[0], params), seed=stream))
        net = fp.adapt(model, fp.XLoRA(target_modules=["q_proj", "down_proj"], **options))
        entry = net.entries[0]
        drawn = entry.method.init(net.bases(entry, params), seed=stream, experts=given, facts=ModelFacts(model, params))
        for key, t in entry.method.to_peft(None, drawn.params[""]).items():
            assert torch.equal(t, theirs.get_parameter(key).float()), key


def test_given_weights_make_one_pass(made):
    params, net, adapter = ours(made)
    plain = fp.adapt(net.model, fp.LoRA(r=2, target_modules=["q_proj", "down_proj"]))
    for shape in ((2, 5, 1, 3), (2, 5, len(net.entries[0].sites), 3)):
        w = torch.zeros(shape, dtype=torch.float64)
        w[..., 2] = 1
        got = net(params, adapter, input_ids=IDS, context=fp.Context(values={"xlora_scalings": w})).logits
        assert (got - plain(params, made[2][2], input_ids=IDS).logits).abs().max() < 1e-6
    with pytest.raises(ValueError, match=r"xlora at .*: xlora_scalings must be \(rows, T, L or 1, K = 3\) for the rows"):
        net(params, adapter, input_ids=IDS[:, :4], context=fp.Context(values={"xlora_scalings": w}))
    with pytest.raises(ValueError, match="xlora: generate computes xlora_scalings for all tokens at every step"):
        net.call("generate", params, adapter, input_ids=IDS, context=fp.Context(values={"xlora_scalings": w}))


def test_embeds_do_as_well_as_ids(made):
    params, net, adapter = ours(made)
    embeds = params["model.embed_tokens.weight"][IDS]
    want = net(params, adapter, input_ids=IDS).logits
    assert torch.equal(net(params, adapter, inputs_embeds=embeds).logits, want)


def test_embeddings_and_transposed_layers_take_experts():
    model, params = fp.functionalize(copy.deepcopy(zoo.model("gpt2")).double())
    targets = ["wte", "c_attn"]
    plain = fp.adapt(model, fp.LoRA(r=2, target_modules=targets, init_lora_weights=False))
    given = [plain.init(params, i) for i in range(2)]
    net = fp.adapt(model, fp.XLoRA(target_modules=targets))
    adapter = net.init(params, 0, experts=given)
    w = torch.tensor([0.0, 1.0]).double().expand(2, 5, 1, 2)
    got = net(params, adapter, input_ids=IDS, context=fp.Context(values={"xlora_scalings": w})).logits
    assert (got - plain(params, given[1], input_ids=IDS).logits).abs().max() < 1e-10


def test_layouts_of_a_layers_input():
    model, params = zoo.functional("gpt2")
    net = fp.adapt(model, fp.XLoRA(target_modules=["c_attn"]))
    (base, *_) = net.bases(net.entries[0], params).values()
    w = torch.softmax(zoo.noise(2, 3, 1, 4), -1)
    context, method = fp.Context(values={"xlora_scalings": w}), net.methods[0]
    assert torch.equal(method.weights(base, torch.zeros(2, 3, 5), context, 4), w[:, :, 0])
    assert torch.equal(method.weights(base, torch.zeros(6, 5), context, 4), w[:, :, 0].flatten(0, 1))
    assert torch.equal(method.weights(base, torch.zeros(2, 7, 3, 5), context, 4), w[:, None, :, 0])


def test_weights_that_a_site_keeps():
    w = torch.tensor([[0.5, 0.2, 0.3], [0.0, 0.0, 0.0]])
    assert torch.equal(kept(w, None, softmax=False), w)
    assert torch.equal(kept(w, 2, softmax=False)[0], torch.tensor([0.5, 0.0, 0.3]))
    soft = kept(w, 2, softmax=True)
    assert torch.allclose(soft[0, [0, 2]], torch.softmax(torch.tensor([0.5, 0.3]), 0))
    assert torch.equal(soft[1], torch.zeros(3))
    assert soft[0, 1] == 0
    given = w.clone().requires_grad_()
    kept(given, 2, softmax=True).square().sum().backward()
    assert torch.isfinite(given.grad).all()


def test_trained_experts_are_in_the_file_and_can_be_taken_out(made, tmp_path):
    params, net, adapter = ours(made, use_trainable_adapters=True)
    adapter = adapter.replace(params=tree_map(lambda t: 1.1 * t, adapter.params))
    grads = torch.func.grad(lambda p: net(params, adapter.replace(params=p), input_ids=IDS).logits.square().sum())(
        adapter.params
    )
    assert all((t != 0).any() for leaves in grads.values() for t in leaves.values())
    fp.save_peft(net, adapter, tmp_path / "whole", task_type="CAUSAL_LM")
    back, read = fp.load_peft(net.model, params, tmp_path / "whole", experts=made[2])
    want = net(params, adapter, input_ids=IDS).logits
    assert torch.equal(back(params, read, input_ids=IDS).logits, want)
    paths = {}
    for i, (r, targets) in enumerate(EXPERTS):
        plain = fp.adapt(net.model, fp.LoRA(r=r, lora_alpha=3, target_modules=targets))
        one = net.methods[0].expert(adapter, i)
        assert one.params.keys() == plain.entries[0].sites.keys()
        fp.save_peft(plain, one, tmp_path / str(i))
        paths[str(i)] = str(tmp_path / str(i))
    text = json.loads((tmp_path / "whole" / "adapter_config.json").read_text())
    (tmp_path / "whole" / "adapter_config.json").write_text(json.dumps({**text, "adapters": paths}))
    theirs = quietly(peft.PeftModel.from_pretrained, double(), tmp_path / "whole").eval()
    assert (theirs(input_ids=IDS).logits - want).abs().max() < 1e-5 * (1 + want.abs().max())


def test_gradients_of_trained_experts_are_those_of_fixed_weights(made):
    """The first pass is of the base where its weight is zero, so weights of the classifier are constants of the experts."""
    params, net, adapter = ours(made, use_trainable_adapters=True, top_k_lora=2)
    path = next(iter(net.entries[0].sites))

    def out(a):
        leaves = {**adapter.params, path: {**adapter.params[path], "A": a}}
        return net(params, adapter.replace(params=leaves), input_ids=IDS[:1, :3]).logits[..., :4]

    assert torch.autograd.gradcheck(out, adapter.params[path]["A"].clone().requires_grad_(), fast_mode=True, atol=1e-4)


def test_training_draws_by_the_seed(made):
    for options in ({"xlora_depth": 2, "xlora_size": 6, "xlora_dropout_p": 0.5}, {"lora_dropout": 0.5}):
        params, net, adapter = ours(made, **options)
        one, again, other = (
            net(params, adapter, input_ids=IDS, context=fp.Context(training=True, seed=s)).logits for s in (1, 1, 2)
        )
        assert torch.equal(one, again)
        assert (one - other).abs().max() > 1e-4
    params, net, adapter = ours(made, xlora_depth=2, xlora_size=6)
    many, context = fp.stack([adapter, adapter]), fp.Context(training=True, seed=1)
    call = {"in_dims": None, "context": context, "input_ids": IDS, "use_cache": False}
    with pytest.raises(ValueError, match="xlora: in training the classifier's dropout draws for one member"):
        fp.apply_many(net, params, many, strategy="fold", **call)
    looped = fp.apply_many(net, params, many, strategy="loop", **call).logits
    assert (looped[0] - net(params, adapter, input_ids=IDS, context=context).logits).abs().max() == 0


def test_a_call_takes_no_cache(made):
    params, net, adapter = ours(made)
    with pytest.raises(ValueError, match="xlora: both passes need all tokens, so a call takes no cache"):
        net(params, adapter, input_ids=IDS, use_cache=True)
    assert net(params, adapter, input_ids=IDS).past_key_values is None
    with pytest.raises(ValueError, match="xlora: input_ids or inputs_embeds must be given, got neither"):
        net(params, adapter, attention_mask=torch.ones(2, 5))


def test_what_does_not_fit_is_refused(made, tmp_path):
    model, params, given, paths = made
    targets = {"target_modules": ["q_proj", "down_proj"]}
    net = fp.adapt(model, fp.XLoRA(adapters=paths, **targets))
    with pytest.raises(TypeError, match="xlora: experts must be a list of LoRA adapters"):
        net.init(params, 0)
    with pytest.raises(ValueError, match="xlora: experts must be the 3 that adapters names, got 2"):
        net.init(params, 0, experts=given[:2])
    with pytest.raises(ValueError, match="xlora: top_k_lora must be at most the number of experts, 3, got 4"):
        fp.adapt(model, fp.XLoRA(top_k_lora=4, **targets)).init(params, 0, experts=given)
    with pytest.raises(ValueError, match="xlora: experts must adapt sites of the net"):
        fp.adapt(model, fp.XLoRA(target_modules=["q_proj"])).init(params, 0, experts=given)
    bare = fp.adapt(model, fp.XLoRA(**targets))
    adapter = bare.init(params, 0, experts=given)
    with pytest.raises(ValueError, match="xlora: adapters must be given for a file: where peft finds the experts, got None"):
        fp.save_peft(bare, adapter, tmp_path)
    fp.save_peft(net, adapter, tmp_path)
    for odd in (3, ["a"]):
        with pytest.raises(TypeError, match=r"xlora: experts must be a list of LoRA adapters.*; pass experts=\[...\]"):
            fp.XLoRA().completed({"experts": odd})
    with pytest.raises(ValueError, match=r"xlora: the file does not hold the experts, got \['0', '1', '2'\]; pass load_peft"):
        fp.load_peft(model, params, tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.internal_xlora_classifier.layers.0.{kind}" for kind in ("weight", "bias")
    }
    with pytest.raises(fp.errors.NoMergedFormError, match="xlora"):
        net.merge(params, adapter)
    with pytest.raises(ValueError, match="xlora: hidden_size must be None or the model's, 32, got 16"):
        fp.adapt(model, fp.XLoRA(hidden_size=16, **targets))
    with pytest.raises(ValueError, match="xlora: the classifier reads the hidden states of one stack"):
        fp.adapt(zoo.functional("t5")[0], fp.XLoRA(target_modules=["q"]))
    with pytest.raises(ValueError, match="the config must say the width of its hidden states"):
        fp.adapt(fp.functionalize(nn.Sequential(nn.Linear(4, 3)))[0], fp.XLoRA(target_modules=["0"]))


def test_fields_that_do_not_fit():
    with pytest.raises(ValueError, match="xlora: xlora_depth must be from 1 to 1000, got 0"):
        fp.XLoRA(xlora_depth=0)
    for field in ("xlora_size", "top_k_lora", "hidden_size"):
        with pytest.raises(ValueError, match=f"xlora: {field} must be a positive integer, got 0"):
            fp.XLoRA(**{field: 0})
    for field in ("xlora_dropout_p", "lora_dropout"):
        with pytest.raises(ValueError, match=rf"xlora: {field} must be in \[0, 1\)"):
            fp.XLoRA(**{field: 1.0})
    with pytest.raises(ValueError, match="xlora: softmax_temperature must be positive, got 0"):
        fp.XLoRA(softmax_temperature=0)
    with pytest.raises(ValueError, match="xlora: modules_to_save must be None"):
        fp.XLoRA(modules_to_save=["lm_head"])

"""Where peft 0.21 is wrong about methods whose values come through the call, each against a computation of its own."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import zoo
from differences import differs
from safetensors.torch import load_file
from torch import nn

import funcpeft as fp

SEQUENCE = [7, 9]
IDS = torch.tensor([[5, 7, 9, 11, 12, 13], [7, 9, 3, 7, 9, 20]])
TARGETS = ["q_proj", "down_proj"]


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def llama():
    return copy.deepcopy(zoo.model("llama")).double()


def both(config, folder, module=llama):
    """Returns peft's model, and model, params, net and adapter read from its file."""
    torch.manual_seed(3)
    theirs = quietly(peft.get_peft_model, module(), config).eval()
    quietly(theirs.save_pretrained, folder)
    model, params = fp.functionalize(module())
    return theirs, model, params, *fp.load_peft(model, params, folder)


def poly(**options):
    fields = {"r": 2, "n_tasks": 2, "target_modules": TARGETS, "init_weights": False, **options}
    return peft.PolyConfig(**fields)


def tasks(*ids):
    return fp.Context(values={"task_ids": torch.tensor(ids)})


@differs("Poly", "passes `task_ids` on only if the config has a `task_type`", "they are a value of the call, of any model")
def test_poly_of_a_model_without_a_task(tmp_path):
    theirs, _, params, net, adapter = both(poly(), tmp_path)
    with pytest.raises((TypeError, ValueError), match="task_ids"):
        theirs(input_ids=IDS, task_ids=torch.tensor([0, 1]))
    got = net(params, adapter, input_ids=IDS, context=tasks(0, 1)).logits
    for row in range(2):
        one = net(params, adapter, input_ids=IDS[row : row + 1], context=tasks(row)).logits
        assert (got[row] - one[0]).abs().max() < 1e-5


@differs("Poly", "takes three-dimensional inputs of a layer only", "takes any number of axes, rows first")
def test_poly_of_a_matrix(tmp_path):
    def module():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 4)).double()

    theirs, _, params, net, adapter = both(poly(target_modules=["0"]), tmp_path, module)
    x = zoo.noise(2, 6).double()
    with pytest.raises(RuntimeError, match="3D tensor"):
        theirs.base_model(x, task_ids=torch.tensor([0, 1]))
    want = theirs.base_model(x[:, None], task_ids=torch.tensor([0, 1]))[:, 0]
    assert (net(params, adapter, x, context=tasks(0, 1)) - want).abs().max() < 1e-12


@differs("Poly", "a negative task counts from the last one", "it is refused")
def test_poly_of_a_negative_task(tmp_path):
    theirs, _, params, net, adapter = both(poly(task_type="CAUSAL_LM"), tmp_path)
    odd = theirs(input_ids=IDS, task_ids=torch.tensor([0, -1])).logits
    assert torch.equal(odd, theirs(input_ids=IDS, task_ids=torch.tensor([0, 1])).logits)
    with pytest.raises(ValueError, match=r"task_ids must be in \[0, 2\)"):
        net(params, adapter, input_ids=IDS, context=tasks(0, -1))


@differs("Poly", "beams of `generate` fail, as there are more rows than tasks", "every beam takes its row's task")
def test_poly_with_beams(tmp_path):
    theirs, _, params, net, adapter = both(poly(task_type="CAUSAL_LM"), tmp_path)
    options = {"input_ids": IDS, "num_beams": 2, "max_new_tokens": 3, "do_sample": False}
    with pytest.raises(RuntimeError, match="Expected size for first two dimensions"):
        theirs.generate(task_ids=torch.tensor([0, 1]), **options)
    got = net.call("generate", params, adapter, context=tasks(0, 1), **options)
    repeated = theirs.base_model.model.generate  # the same search, with a task per beam
    with theirs.base_model._manage_pre_hooks(torch.tensor([0, 0, 1, 1])):
        assert torch.equal(got, repeated(**options))


@differs("Poly", "`n_splits` that do not divide a layer fail at the first call", "they are refused when the net is made")
def test_poly_of_splits_that_do_not_divide():
    theirs = quietly(peft.get_peft_model, llama(), poly(task_type="CAUSAL_LM", n_splits=5))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        theirs(input_ids=IDS, task_ids=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="n_splits must divide the 32 inputs"):
        fp.adapt(zoo.functional("llama")[0], fp.Poly(n_splits=5, target_modules=TARGETS))


def alora(**options):
    fields = {"r": 2, "target_modules": TARGETS, "alora_invocation_tokens": SEQUENCE, "init_lora_weights": False, **options}
    return peft.LoraConfig(task_type="CAUSAL_LM", **fields)


@differs(
    "aLoRA",
    "`generate` without a cache counts the offset from the end of the growing text, so that the adapter starts ever later",
    "it starts where it started, with a cache and without",
)
def test_alora_generates_the_same_without_a_cache(tmp_path):
    theirs, _, params, net, adapter = both(alora(), tmp_path)
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    first = theirs.generate(input_ids=IDS, use_cache=True, **options).logits
    second = theirs.generate(input_ids=IDS, use_cache=False, **options).logits
    assert (first[1] - second[1]).abs().max() > 1e-2
    ours = [net.call("generate", params, adapter, input_ids=IDS, use_cache=c, **options) for c in (True, False)]
    assert torch.equal(ours[0].sequences, ours[1].sequences)
    # one forward over the whole text, of which the adapter acts on what comes after the sequence's start
    whole = ours[1].sequences
    start = torch.tensor([1, 3])
    context = fp.Context(values={"alora_offsets": whole.shape[1] - start})
    logits = net(params, adapter, input_ids=whole, context=context).logits[:, 5:-1]
    assert (torch.stack(ours[1].logits, 1) - logits).abs().max() < 1e-4


@differs("aLoRA", "beam search is refused", "every beam takes its row's offset")
def test_alora_with_beams(tmp_path):
    theirs, _, params, net, adapter = both(alora(), tmp_path)
    options = {"num_beams": 2, "max_new_tokens": 4, "do_sample": False}
    with pytest.raises(ValueError, match="Beam search not yet supported"):
        theirs.generate(input_ids=IDS, **options)
    got = net.call("generate", params, adapter, input_ids=IDS, **options)
    for row in range(2):
        one = net.call("generate", params, adapter, input_ids=IDS[row : row + 1], use_cache=False, **options)
        assert torch.equal(got[row, : one.shape[1]], one[0])


@differs("aLoRA", "a call on `inputs_embeds` alone warns and runs the base", "it is an error that asks for the offsets")
def test_alora_of_embeddings(tmp_path):
    theirs, model, params, net, adapter = both(alora(), tmp_path)
    embeds = params["model.embed_tokens.weight"][IDS]
    with pytest.warns(UserWarning, match="Disabling aLoRA"):
        silent = theirs(inputs_embeds=embeds).logits
    assert (silent - model(params, input_ids=IDS).logits).abs().max() < 1e-5
    with pytest.raises(ValueError, match="a call needs input_ids; pass context"):
        net(params, adapter, inputs_embeds=embeds)


@differs(
    "aLoRA",
    "with init 'pissa' or 'olora' tokens before the sequence meet the residual weight, so the base's cache does not serve them",
    "they meet the base's weight",
)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_alora_of_an_init_from_the_weight(init, tmp_path):
    def single():
        return llama().float()

    theirs, model, params, net, adapter = both(alora(init_lora_weights=init), tmp_path, single)
    base = model(params, input_ids=IDS[:1]).logits
    assert (theirs(input_ids=IDS[:1]).logits[0, 0] - base[0, 0]).abs().max() > 1e-2
    assert torch.equal(net(params, adapter, input_ids=IDS[:1]).logits[0, 0], base[0, 0])


def experts(folder, count, scale=None, **options):
    """Writes LoRA adapters; ``scale`` multiplies the rows of A."""
    model, params = fp.functionalize(llama())
    paths = []
    for i in range(count):
        net = fp.adapt(model, fp.LoRA(r=2, target_modules=TARGETS, init_lora_weights=False, **options))
        made = net.init(params, i, dtype=torch.float32)
        if scale is not None:
            rows = torch.tensor(scale)[:, None]
            made = made.replace(params={p: {**v, "A": rows * v["A"]} for p, v in made.params.items()})
        paths.append(str(folder / str(i)))
        fp.save_peft(net, made, paths[-1])
    return model, params, [fp.load_peft(model, params, p)[1] for p in paths], paths


def arrow(model, params, given, **options):
    net = fp.adapt(model, fp.Arrow(target_modules=TARGETS, arrow_config=options))
    return net, net.init(params, 0, experts=given)


@differs("Arrow", "cannot read the router's file that it wrote", "reads and writes it, beside the experts'")
def test_arrow_file_of_the_router(tmp_path):
    model, params, given, paths = experts(tmp_path, 2, [2.0, 0.1])
    theirs = quietly(peft.create_arrow_model, llama(), paths, peft.ArrowConfig(top_k=1, rng_seed=0)).eval()
    want = theirs(input_ids=IDS).logits
    quietly(theirs.save_pretrained, tmp_path / "whole")
    back = quietly(peft.PeftModel.from_pretrained, llama(), paths[0], adapter_name="task_0")
    quietly(back.load_adapter, paths[1], adapter_name="task_1")
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'copy'"):
        quietly(back.load_adapter, tmp_path / "whole" / "arrow_router", adapter_name="arrow_router")
    net, adapter = fp.load_peft(model, params, tmp_path / "whole" / "arrow_router", experts=given)
    assert (net(params, adapter, input_ids=IDS).logits - want).abs().max() < 1e-5


@differs(
    "Arrow",
    "a prototype is what 15 power iterations from a random start give, another direction where singular values are close",
    "the main right singular vector of the update, by a decomposition",
)
def test_arrow_prototypes_of_close_singular_values(tmp_path):
    model, params, given, paths = experts(tmp_path, 2)
    path = "model.layers.0.self_attn.q_proj"
    for one in given:  # singular values 1 and 0.99
        a, b = (torch.linalg.qr(one.params[path][n] if n == "B" else one.params[path][n].mT)[0] for n in "AB")
        one.params[path].update(A=torch.tensor([[1.0], [0.99]]) * a.mT, B=b)
    theirs = quietly(peft.create_arrow_model, llama(), paths, peft.ArrowConfig(top_k=1, rng_seed=0)).eval()
    layer = theirs.base_model.model.get_submodule(path)
    with torch.no_grad():
        for i, one in enumerate(given):
            layer.lora_A[f"task_{i}"].weight.copy_(one.params[path]["A"])
            layer.lora_B[f"task_{i}"].weight.copy_(one.params[path]["B"])
        theirs(input_ids=IDS)
    _, adapter = arrow(model, params, given, top_k=1)
    ours = adapter.consts[path]["P"]
    for i, one in enumerate(given):
        main = torch.linalg.svd(one.params[path]["B"] @ one.params[path]["A"]).Vh[0]
        assert (layer.lora_arrow["arrow_router"].prototypes[i] @ main).abs() < 0.999
        assert ((ours[i] @ main).abs() - 1).abs() < 1e-6


@differs("Arrow", "GenKnowSub overwrites the experts at the first call", "experts stay as they are")
def test_arrow_general_knowledge(tmp_path):
    model, params, given, paths = experts(tmp_path, 3)
    config = peft.ArrowConfig(top_k=1, use_gks=True, rng_seed=0)
    theirs = quietly(peft.create_arrow_model, llama(), paths[:2], config, general_adapter_paths=paths[2:]).eval()
    path = "model.layers.0.self_attn.q_proj"
    layer = theirs.base_model.model.get_submodule(path)
    before = layer.lora_A["task_0"].weight.detach().clone()
    theirs(input_ids=IDS)
    assert (layer.lora_A["task_0"].weight - before).abs().max() > 1e-3
    net = fp.adapt(model, fp.Arrow(target_modules=TARGETS, arrow_config={"top_k": 1, "use_gks": True}))
    kept = given[0].params[path]["A"].clone()
    adapter = net.init(params, 0, experts=given[:2], general=given[2:])
    net(params, adapter, input_ids=IDS)
    assert torch.equal(given[0].params[path]["A"], kept)
    assert torch.equal(adapter.consts[path]["A"][0], kept - given[2].params[path]["A"])


@differs("Arrow", "the bias of an expert's B (`lora_bias`) is left out in silence", "such an expert is refused")
def test_arrow_of_experts_with_a_bias():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 4)).double()
    config = peft.LoraConfig(r=2, target_modules=["0"], lora_bias=True, init_lora_weights=False)
    theirs = quietly(peft.get_peft_model, copy.deepcopy(module), config, adapter_name="task_0")
    options = peft.ArrowConfig(top_k=1, rng_seed=0)
    options.task_adapter_names, options.gks_adapter_names = ["task_0"], []
    theirs.add_adapter("arrow_router", peft.LoraConfig(r=2, target_modules=["0"], arrow_config=options))
    x = zoo.noise(3, 6).double()
    theirs.set_adapter("task_0")
    alone = theirs(x)
    theirs.set_adapter("arrow_router")
    layer = theirs.base_model.model[0]
    bias = layer.scaling["task_0"] * layer.lora_B["task_0"].bias
    assert (alone - theirs(x) - bias).abs().max() < 1e-6  # one expert of one is that expert, but for its bias
    model, params = fp.functionalize(module)
    plain = fp.adapt(model, fp.LoRA(r=2, target_modules=["0"], lora_bias=True))
    net = fp.adapt(model, fp.Arrow(target_modules=["0"], arrow_config={"top_k": 1}))
    with pytest.raises(ValueError, match=r"expert 0 must be a plain LoRA adapter, got leaves \['bias'\]"):
        net.init(params, 0, experts=[plain.init(params, 0)])


def xlora(paths, **options):
    return peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=paths, **options)


def uncached(name="llama"):
    module = copy.deepcopy(zoo.model(name)).double()
    module.config.use_cache = False
    return module


@differs(
    "XLoRA",
    "its files lack every layer of the classifier whose number is an expert's name, at depth 1 all of it",
    "files are whole, and peft reads them",
)
@pytest.mark.parametrize(("depth", "left"), [(1, set()), (2, {3})])
def test_xlora_files(depth, left, tmp_path):
    model, params, given, paths = experts(tmp_path, 2)
    named = {str(i): p for i, p in enumerate(paths)}
    theirs = quietly(peft.get_peft_model, uncached(), xlora(named, xlora_depth=depth, xlora_size=5)).eval()
    quietly(theirs.save_pretrained, tmp_path / "theirs")
    prefix = "base_model.internal_xlora_classifier.layers."
    wrote = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert {int(k.removeprefix(prefix).split(".")[0]) for k in wrote} == left
    net = fp.adapt(model, fp.XLoRA(target_modules=TARGETS, adapters=named, xlora_depth=depth, xlora_size=5))
    adapter = net.init(params, 0, experts=given)
    fp.save_peft(net, adapter, tmp_path / "ours", task_type="CAUSAL_LM")
    there = {k for k, _ in theirs.named_parameters() if "classifier" in k}
    assert load_file(tmp_path / "ours" / "adapter_model.safetensors").keys() == there
    back = quietly(peft.PeftModel.from_pretrained, uncached(), tmp_path / "ours").eval()
    assert (back(input_ids=IDS).logits - net(params, adapter, input_ids=IDS).logits).abs().max() < 1e-5


@differs("XLoRA", "experts under names other than 0, 1, ... fail at the first call", "names are free, and files number them")
def test_xlora_names_of_experts(tmp_path):
    model, params, given, paths = experts(tmp_path, 2)
    named = dict(zip(("maths", "code"), paths, strict=True))
    with pytest.raises((KeyError, ValueError)):
        quietly(peft.get_peft_model, uncached(), xlora(named))(input_ids=IDS)
    net = fp.adapt(model, fp.XLoRA(target_modules=TARGETS, adapters=named))
    adapter = net.init(params, 0, experts=given)
    fp.save_peft(net, adapter, tmp_path / "ours", task_type="CAUSAL_LM")
    back = quietly(peft.PeftModel.from_pretrained, uncached(), tmp_path / "ours").eval()
    assert (back(input_ids=IDS).logits - net(params, adapter, input_ids=IDS).logits).abs().max() < 1e-5


@differs(
    "XLoRA",
    "`merge_and_unload` adds every expert in full, whatever the classifier says",
    "there is no merged form, and `net.merge` says so",
)
def test_xlora_merged(tmp_path):
    model, params, given, paths = experts(tmp_path, 2)
    theirs = quietly(peft.get_peft_model, uncached(), xlora({str(i): p for i, p in enumerate(paths)})).eval()
    before = theirs(input_ids=IDS).logits
    merged = quietly(theirs.merge_and_unload)
    assert (merged(input_ids=IDS).logits - before).abs().max() > 1e-2
    net = fp.adapt(model, fp.XLoRA(target_modules=TARGETS))
    with pytest.raises(fp.errors.NoMergedFormError, match="xlora"):
        net.merge(params, net.init(params, 0, experts=given))


@differs("XLoRA", "reads experts only into models whose backbone is called `model`, not into GPT-2", "takes any decoder")
def test_xlora_of_gpt2(tmp_path):
    model, params = fp.functionalize(uncached("gpt2"))
    plain = fp.adapt(model, fp.LoRA(r=2, target_modules=["c_attn"], init_lora_weights=False))
    given = [plain.init(params, i, dtype=torch.float32) for i in range(2)]
    named = {str(i): str(tmp_path / str(i)) for i in range(2)}
    for one, path in zip(given, named.values(), strict=True):
        fp.save_peft(plain, one, path)
    with pytest.raises(ValueError, match="unexpected keys"):
        quietly(peft.get_peft_model, uncached("gpt2"), xlora(named))
    net = fp.adapt(model, fp.XLoRA(target_modules=["c_attn"]))
    adapter = net.init(params, 0, experts=given)
    hidden = model(params, input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    w = torch.softmax(hidden @ adapter.params[""]["W"][0].mT + adapter.params[""]["b"][0], -1)
    merged = []
    for k in range(2):  # constant weights of one expert are that expert
        one = torch.zeros(2, 6, 1, 2).double()
        one[..., k] = 1
        merged.append(net(params, adapter, input_ids=IDS, context=fp.Context(values={"xlora_scalings": one})).logits)
        assert (merged[k] - plain(params, given[k], input_ids=IDS).logits).abs().max() < 1e-6
    context = fp.Context(values={"xlora_scalings": w[:, :, None]})
    got = net(params, adapter, input_ids=IDS).logits
    assert (got - net(params, adapter, input_ids=IDS, context=context).logits).abs().max() < 1e-10

"""Preparing a quantized base: what becomes float32, what stays, and peft's prepare_model_for_kbit_training as the oracle."""

import types

import bitsandbytes as bnb
import peft
import pytest
import torch
import zoo
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from funcpeft.adapt import adapt
from funcpeft.functional import functionalize
from funcpeft.gradients import value_and_grad
from funcpeft.interop.modules import functionalize as functionalize_library
from funcpeft.interop.peft import load_peft
from funcpeft.kbit import prepare_kbit
from funcpeft.methods import OFT, DoRA, LoRA
from funcpeft.population import apply_many
from funcpeft.quant import NF4, AffineInt, Codebook, Int8, TorchAONF4
from funcpeft.quantization import quantize, to
from funcpeft.stacking import stack
from funcpeft.storage import Quantized
from funcpeft.tree import tree_leaves, tree_map
from funcpeft.weights import dense

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:_check_is_size"),
]

IDS = zoo.ids(2, 9)


def half(name="llama", dtype=torch.bfloat16):
    """Returns a model of the zoo and its params in half precision."""
    model, params = zoo.functional(name)
    return model, to(params, dtype=dtype, model=model)


def stored(name="llama", fmt=None, dtype=torch.bfloat16, **options):
    model, params = half(name, dtype)
    return model, quantize(model, params, fmt or NF4(block_size=16), misfits="dense", progress=False, **options)


def ready(name="llama", fmt=None, dtype=torch.bfloat16, **options):
    model, params = stored(name, fmt, dtype)
    return prepare_kbit(model, params, **{"remat": False, **options})


# -- what becomes of each leaf -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32_and_codes_are_shared(dtype):
    model, before = stored(dtype=dtype)
    copy = {k: v if isinstance(v, Quantized) else v.clone() for k, v in before.items()}
    _, after = prepare_kbit(model, before, remat=False)
    assert list(after) == list(before)
    assert any(isinstance(v, Quantized) for v in after.values())
    for key, leaf in before.items():
        if isinstance(leaf, Quantized) or key in model.buffers:
            assert after[key] is leaf, key
        else:
            assert leaf.dtype == dtype, "the argument is not changed"
            assert torch.equal(leaf, copy[key])
            assert after[key].dtype == torch.float32, key
            assert torch.equal(after[key], leaf.float())


def test_float32_and_wider_are_shared():
    model, params = zoo.functional("llama")
    wide = {**params, "model.norm.weight": params["model.norm.weight"].double()}
    _, after = prepare_kbit(model, wide, remat=False)
    assert all(after[k] is v for k, v in wide.items())


def test_a_base_without_codes_is_cast_as_by_peft():
    module = LlamaForCausalLM(zoo.model("llama").config).bfloat16()
    model, params = functionalize(module)
    _, after = prepare_kbit(model, params, remat=False)
    reference = peft.prepare_model_for_kbit_training(module)
    assert {k: p.dtype for k, p in reference.named_parameters()} == {
        k: v.dtype for k, v in after.items() if k not in model.buffers
    }
    assert all(torch.equal(after[k], p) for k, p in reference.named_parameters())
    assert {k: b.dtype for k, b in reference.named_buffers()} == {k: after[k].dtype for k in model.buffers}


def test_half_buffers_keep_their_dtype():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).bfloat16().eval()
    model, params = functionalize(module)
    _, after = prepare_kbit(model, params, remat=False)
    assert after["1.running_mean"].dtype == torch.bfloat16
    assert after["1.weight"].dtype == torch.float32


def test_ties_stay_ties():
    model, params = stored("llama_tied")
    assert model.ties
    key = "model.embed_tokens.weight"
    _, after = prepare_kbit(model, params, remat=False)
    assert after.keys() == params.keys()
    _, both = prepare_kbit(model, {**params, "lm_head.weight": params[key]}, remat=False)
    assert both["lm_head.weight"] is both[key], "one tensor under two keys stays one"
    apart = {**params, "lm_head.weight": params[key] + 1}
    _, untied = prepare_kbit(model, apart, remat=False)
    assert torch.equal(untied["lm_head.weight"], apart["lm_head.weight"].float())


def test_a_quantized_embedding_decodes_to_float32():
    model, params = half()
    params = quantize(model, params, NF4(block_size=16), target_modules=["embed_tokens", "q_proj"], progress=False)
    model, after = prepare_kbit(model, params, remat=False, compute_dtype=torch.float16)
    embedding, query = after["model.embed_tokens.weight"], after["model.layers.0.self_attn.q_proj.weight"]
    assert embedding.dtype == torch.float32
    assert query.dtype == torch.float16
    for leaf, old in (
        (embedding, params["model.embed_tokens.weight"]),
        (query, params["model.layers.0.self_attn.q_proj.weight"]),
    ):
        assert all(leaf.data[n] is t for n, t in old.data.items()), "codes and scales are the very tensors"
    assert model(after, input_ids=IDS).logits.dtype == torch.float32


def test_a_weight_that_its_module_reads_decodes_to_float32():
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 2, batch_first=True).bfloat16().eval()
    model, params = functionalize(module)
    params = {**params, "in_proj_weight": NF4(block_size=16).requant(params["in_proj_weight"])}
    model, after = prepare_kbit(model, params, remat=False)
    assert after["in_proj_weight"].dtype == torch.float32
    x = zoo.noise(2, 3, 16)
    assert model(after, x, x, x)[0].dtype == torch.float32


@pytest.mark.parametrize("method", ["gptq", "aqlm", "eetq", "hqq", "torchao", "awq", "bitsandbytes"])
@pytest.mark.parametrize("form", ["dict", "object"])
def test_libraries_that_peft_leaves_alone(method, form):
    module = LlamaForCausalLM(LlamaConfig(**{**zoo.model("llama").config.to_dict(), "num_hidden_layers": 1})).bfloat16()
    config = {"quant_method": method} if form == "dict" else types.SimpleNamespace(quant_method=method)
    module.config.quantization_config = config
    module.quantization_method = method
    model, params = functionalize(module)
    _, after = prepare_kbit(model, params, remat=False)
    reference = peft.prepare_model_for_kbit_training(module, use_gradient_checkpointing=False)
    assert {k: p.dtype for k, p in reference.named_parameters()} == {
        k: v.dtype for k, v in after.items() if k not in model.buffers
    }


@pytest.mark.parametrize(
    ("fmt", "left"),
    [
        (AffineInt(block_size=8, packing="gptq"), True),
        (AffineInt(block_size=8, symmetric=False, packing="hqq", layout="flat"), True),
        (TorchAONF4(block_size=16), True),
        (AffineInt(block_size=8), False),
        (Int8(), False),
        (NF4(block_size=16), False),
    ],
)
def test_layouts_of_one_library_say_which_it_was(fmt, left):
    model, params = stored(fmt=fmt, target_modules=["q_proj"])
    assert any(isinstance(v, Quantized) for v in params.values())
    _, after = prepare_kbit(model, params, remat=False)
    assert after["model.norm.weight"].dtype == (torch.bfloat16 if left else torch.float32)
    if left:
        assert all(after[k] is v for k, v in params.items())


def test_additive_codebooks_are_left_alone():
    model, params = half()
    key, codebook = "model.layers.0.self_attn.q_proj.weight", Codebook.examples()[0]
    leaf = Quantized({"qdata": torch.zeros(1)}, codebook, params[key].shape, torch.bfloat16)
    _, after = prepare_kbit(model, {**params, key: leaf}, remat=False)
    assert after["model.norm.weight"].dtype == torch.bfloat16


# -- the arithmetic is peft's and bitsandbytes' --------------------------------------------------------------------------------


def llama_four_bit(compute_dtype, double=False):
    """Returns the same Llama at every call: bfloat16, its linear layers but the head bitsandbytes' NF4."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    module = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.05 * torch.randn_like(p))
    module = module.bfloat16()
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            made = bnb.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                quant_type="nf4",
                compress_statistics=double,
                compute_dtype=compute_dtype,
            )
            made.load_state_dict(layer.state_dict())
            module.set_submodule(name, made.to("cpu"))
    module.is_loaded_in_4bit = True
    return module


@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("remat", [False, True])
def test_peft_on_bitsandbytes_layers_gives_the_same_bits(compute, remat, tmp_path):
    model, params = functionalize_library(llama_four_bit(compute))
    model, params = prepare_kbit(model, params, remat=remat, compute_dtype=compute or torch.float32)
    module = peft.prepare_model_for_kbit_training(
        llama_four_bit(compute), use_gradient_checkpointing=remat, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    targets = ["q_proj", "v_proj", "down_proj"]
    oracle = peft.get_peft_model(module, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in oracle.named_parameters():
            if "lora_" in name:
                p.copy_(0.05 * torch.randn_like(p))
    oracle.save_pretrained(tmp_path)
    net, adapter = load_peft(model, params, tmp_path)
    oracle.train()  # in eval mode the library's layers rewrite their weight
    expected = oracle(input_ids=IDS, labels=IDS)
    expected.loss.backward()

    out = net(params, adapter, input_ids=IDS)
    loss, grads = value_and_grad(lambda a: net(params, a, input_ids=IDS, labels=IDS).loss)(adapter)
    assert out.logits.dtype == expected.logits.dtype == torch.float32
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(loss, expected.loss)
    theirs = {n: p.grad for n, p in oracle.named_parameters() if p.grad is not None}
    assert len(theirs) == 2 * len(grads) == 12
    for path, leaves in grads.items():
        for leaf, g in leaves.items():
            want = theirs[f"base_model.model.{path}.lora_{leaf}.default.weight"]
            assert want.abs().max() > 0
            assert torch.equal(g, want), path
    with oracle.disable_adapter():
        assert torch.equal(model(params, input_ids=IDS).logits, oracle(input_ids=IDS).logits)


# -- every linear layer in NF4 -------------------------------------------------------------------------------------------------


CASES = [*((name, torch.bfloat16) for name in zoo.ARCHITECTURES), ("llama", torch.float16), ("t5", torch.float16)]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_forward_and_gradient_of_a_prepared_model(name, dtype):
    compute = dtype
    if name == "mamba":  # reads the weight of dt_proj by itself
        model, params = ready(name)
        with pytest.raises(RuntimeError, match="expected scalar type"):
            model(params, **zoo.inputs(name))
        compute = torch.float32
    model, params = ready(name, dtype=dtype, compute_dtype=compute)
    quantized = [k for k, v in params.items() if isinstance(v, Quantized)]
    assert quantized
    assert all(params[k].dtype == compute for k in quantized), "products are in this dtype"
    net = adapt(model, LoRA(r=4, target_modules=zoo.targets(name)))
    adapter = net.init(params, seed=0)
    assert all(t.dtype == torch.float32 for t in tree_leaves(adapter.params))
    inputs = zoo.inputs(name)
    bare, out = (zoo.leading(o) for o in (model(params, **inputs), net(params, adapter, **inputs)))
    assert torch.equal(bare, out), "a fresh adapter changes nothing"
    assert out.dtype == torch.float32

    loss, grads = value_and_grad(lambda a: zoo.leading(net(params, a, **inputs)).square().mean())(adapter)
    assert torch.isfinite(loss)
    leaves = tree_leaves(grads)
    assert all(torch.isfinite(g).all() for g in leaves)
    assert any(g.abs().max() > 0 for g in leaves)


@pytest.mark.parametrize("method", [LoRA(r=4), DoRA(r=4), OFT(oft_block_size=8)], ids=lambda m: m.label)
def test_methods_agree_with_the_decoded_base(method):
    model, params = ready()
    plain = {k: dense(v).float() if isinstance(v, Quantized) else v for k, v in params.items()}
    method = type(method)(**{**vars(method), "target_modules": ("q_proj", "down_proj")})
    net = adapt(model, method)
    adapter = net.init(params, seed=0)
    adapter = adapter.replace(params=tree_map(lambda t: t + 0.02 * torch.ones_like(t), adapter.params))
    found, expected = net(params, adapter, input_ids=IDS).logits, net(plain, adapter, input_ids=IDS).logits
    error = (found - expected).abs().max() / expected.abs().max()
    assert 0 < error < 8 * torch.finfo(torch.bfloat16).eps, "products are in bfloat16, sums in float32"


def test_transforms_and_a_second_method_take_mixed_inputs():
    model, params = ready()
    net = adapt(model, [LoRA(r=2, target_modules=["q_proj"]), LoRA(r=3, target_modules=["q_proj"])])
    adapter = net.init(params, seed=0)
    assert net(params, adapter, input_ids=IDS).logits.dtype == torch.float32

    single = adapt(model, LoRA(r=2, target_modules=["v_proj"]))
    members = [single.init(params, seed=s) for s in range(2)]
    many = tree_map(lambda *t: torch.stack(t), *members)

    def loss(p, rest):
        return single(params, rest.replace(params=p), input_ids=IDS, labels=IDS).loss

    mapped = torch.func.vmap(lambda a: torch.func.grad(loss)(a.params, a))(many)
    for i, one in enumerate(members):
        alone = torch.func.grad(loss)(one.params, one)
        for g, h in zip(tree_leaves(tree_map(lambda t, i=i: t[i], mapped)), tree_leaves(alone), strict=True):
            scale = h.abs().max()
            assert ((g - h).abs().max() <= 16 * torch.finfo(torch.bfloat16).eps * scale).item()


@pytest.mark.parametrize("strategy", ["fold", "vmap"])
def test_a_population_on_a_prepared_base_equals_its_members(strategy):
    model, params = ready()
    net = adapt(model, LoRA(r=2, target_modules=["q_proj", "v_proj"]))  # and not k_proj: attention takes one dtype
    members = [net.init(params, seed=s) for s in range(3)]
    members = [m.replace(params=tree_map(lambda t: t + 0.02 * torch.ones_like(t), m.params)) for m in members]
    found = apply_many(net, params, stack(members), input_ids=IDS, in_dims=None, strategy=strategy).logits
    assert found.dtype == torch.float32
    for one, logits in zip(members, found, strict=True):
        expected = net(params, one, input_ids=IDS).logits
        assert (logits - expected).abs().max() <= 16 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


def test_a_linear_layer_with_a_bias_multiplies_in_its_own_dtype():
    torch.manual_seed(0)
    model, params = functionalize(nn.Sequential(nn.Linear(64, 256)).bfloat16())
    params = quantize(model, params, NF4(), target_modules=["0"], progress=False)
    _, after = prepare_kbit(model, params, remat=False)
    x = zoo.noise(3, 64)
    w, b = dense(after["0.weight"]), after["0.bias"]
    assert (w.dtype, b.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(model(after, x), nn.functional.linear(x.bfloat16(), w, b.bfloat16()).float())


# -- remat and arguments -------------------------------------------------------------------------------------------------------


def test_remat_is_the_model_returned():
    model, params = stored()
    same, _ = prepare_kbit(model, params, remat=False)
    assert same is model
    other, after = prepare_kbit(model, params)
    assert other is not model
    assert torch.equal(other(after, input_ids=IDS).logits, model(after, input_ids=IDS).logits)


def test_what_is_no_model_or_params_is_refused():
    model, params = zoo.functional("llama")
    with pytest.raises(TypeError, match=r"prepare_kbit: a Model is required, got dict; the model comes first"):
        prepare_kbit(params, model)
    with pytest.raises(TypeError, match=r"prepare_kbit: params must be a dict of leaves, got list"):
        prepare_kbit(model, list(params))
    with pytest.raises(KeyError, match="params must hold every leaf"):
        prepare_kbit(model, {})
    for wrong in (torch.int8, "bfloat16"):
        with pytest.raises(ValueError, match="prepare_kbit: compute_dtype must be a floating dtype, got"):
            prepare_kbit(model, params, compute_dtype=wrong)

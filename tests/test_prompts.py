"""Prompt tuning and prefix tuning: parity with peft on tiny models, generation, gradients, transforms, errors."""

from __future__ import annotations

import copy
import functools
import re
import warnings

import peft
import pytest
import torch
import transformers as tf

from funcpeft.adapt import adapt, peft_init
from funcpeft.facts import ModelFacts
from funcpeft.functional import functionalize
from funcpeft.methods.lora import LoRA
from funcpeft.methods.prefixtuning import PrefixTuning, pairs
from funcpeft.methods.prompttuning import PromptTuning, cycled
from funcpeft.stacking import stack
from funcpeft.tree import Adapter

torch.set_num_threads(1)
NV = 3
SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(attention="sdpa", **changes):
    config = tf.LlamaConfig(**{**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0, **changes})
    return tf.LlamaForCausalLM._from_config(config, attn_implementation=attention)


def bert(cls=tf.BertForSequenceClassification, **changes):
    return cls(tf.BertConfig(**{**SMALL, "intermediate_size": 48, "max_position_embeddings": 64, "num_labels": 3, **changes}))


def t5(layers=2, **changes):
    size = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48, "num_layers": layers}
    return tf.T5ForConditionalGeneration(tf.T5Config(**size, decoder_start_token_id=0, pad_token_id=0, **changes))


def bart():
    size = {f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}
    config = tf.BartConfig(vocab_size=61, d_model=32, max_position_embeddings=64, forced_eos_token_id=None, **size)
    return tf.BartForConditionalGeneration(config)


MODELS = {
    "llama": llama,
    "llama-head-dim": lambda: llama(head_dim=16),
    "mistral": lambda: tf.MistralForCausalLM(
        tf.MistralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, sliding_window=6, pad_token_id=0)
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(**SMALL, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32, pad_token_id=1)
    ),
    "bert-cls": bert,
    "bert": lambda: bert(tf.BertModel),
    "t5": t5,
    "t5-3": lambda: t5(3),
    "bart": bart,
}
CAUSAL = ["llama", "llama-head-dim", "mistral", "gpt2", "opt"]
SEQ2SEQ = ["t5", "t5-3", "bart"]
METHODS = {
    "prompt": (PromptTuning, peft.PromptTuningConfig, {}),
    "prefix": (PrefixTuning, peft.PrefixTuningConfig, {}),
    "projected": (PrefixTuning, peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 7}),
}


@functools.cache
def model_of(name):
    torch.manual_seed(0)
    module = MODELS[name]().eval()
    for p in module.parameters():
        p.data.normal_(0, 0.2)
    if module.can_generate():
        module.generation_config.eos_token_id = None
        module.generation_config.pad_token_id = 0
    return module


def task_of(name):
    if name in CAUSAL:
        return "CAUSAL_LM"
    return {"bert-cls": "SEQ_CLS", "bert": "FEATURE_EXTRACTION"}.get(name, "SEQ_2_SEQ_LM")


@functools.cache
def both(name, method):
    """Makes a net with an adapter, and peft's model with the same one."""
    module, (ours, theirs, extra) = model_of(name), METHODS[method]
    model, params = functionalize(module)
    net = adapt(model, ours(num_virtual_tokens=NV, **extra))
    adapter = peft_init(net, params, 5)
    config = theirs(task_type=task_of(name), num_virtual_tokens=NV, **extra)
    copied = copy.deepcopy(module)
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(copied, config).eval()
    encoder = dict(wrapped.prompt_encoder["default"].named_parameters())
    names = {"P": "embedding.weight", "T": "embedding.weight", "e": "embedding.weight"}
    names |= {f"{a}{i}": f"transform.{2 * i - 2}.{b}" for i in (1, 2) for a, b in (("W", "weight"), ("b", "bias"))}
    leaves = adapter.params[""]
    assert len(encoder) == len(leaves)
    assert all(torch.equal(t, encoder[names[leaf]]) for leaf, t in leaves.items())
    with torch.no_grad():  # away from the start, the same in both
        for i, (leaf, value) in enumerate(sorted(leaves.items())):
            noise = 0.3 * torch.randn(value.shape, generator=torch.Generator().manual_seed(i))
            leaves[leaf] = value + noise
            encoder[names[leaf]].copy_(leaves[leaf])
    return net, params, adapter, wrapped, {leaf: encoder[names[leaf]] for leaf in leaves}


def batch_of(name, masked=None):
    """Makes inputs of two rows and seven positions; ``masked`` pads the second row on that side."""
    gen = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (2, 7), generator=gen)
    out = {"input_ids": ids}
    if masked:
        mask = torch.ones_like(ids)
        mask[1, slice(0, 3) if masked == "left" else slice(4, 7)] = 0
        ids[mask == 0] = 1 if name == "opt" else 0
        out["attention_mask"] = mask
    if name in CAUSAL:
        out["labels"] = ids.clone()
    if name in SEQ2SEQ:
        out["labels"] = torch.randint(3, 61, (2, 5), generator=gen)
    if name == "bert-cls":
        out["labels"] = torch.tensor([0, 2])
    return out


def quiet(f, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f(*args, **kwargs)


@pytest.mark.parametrize("masked", [None, "left", "right"])
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", list(MODELS))
def test_forward_is_pefts(name, method, masked):
    net, params, adapter, wrapped, _ = both(name, method)
    batch = batch_of(name, masked)
    with torch.no_grad():
        ours, theirs = net(params, adapter, **batch), quiet(wrapped, **batch)
    key = "last_hidden_state" if name == "bert" else "logits"
    assert ours[key].shape == theirs[key].shape
    torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=2e-5)
    if "labels" in batch:
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=0, atol=2e-5)


SAMPLED, BEAMS = {"do_sample": True, "top_k": 9}, {"num_beams": 3, "repetition_penalty": 1.4}


@pytest.mark.parametrize(("masked", "options"), [(None, {}), ("left", {}), ("left", SAMPLED), (None, BEAMS)])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("name", CAUSAL + SEQ2SEQ)
def test_generate_is_pefts(name, method, masked, options):
    net, params, adapter, wrapped, _ = both(name, method)
    batch = {k: v for k, v in batch_of(name, masked).items() if k != "labels"}
    options = {"max_new_tokens": 6, "min_new_tokens": 4, "do_sample": False, **options}
    made = []
    for generate in (functools.partial(net.call, "generate", params, adapter), functools.partial(quiet, wrapped.generate)):
        torch.manual_seed(3)
        made.append(generate(**batch, **options))
    assert torch.equal(*made)
    start = batch["input_ids"].shape[1] if name in CAUSAL else 1
    assert made[0].shape[1] == start + 6
    if name in CAUSAL:
        assert torch.equal(made[0][:, :start], batch["input_ids"])


def made(module, method, seed=0, **needs):
    model, params = functionalize(module)
    net = adapt(model, method)
    return net, params, net.init(params, seed=seed, **needs)


def spread(adapter, count=3):
    """Makes a population: the adapter times 1, 2, ..."""
    return stack([Adapter({"": {k: t * (i + 1) for k, t in adapter.params[""].items()}}) for i in range(count)])


# -- gradients and transforms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-cls", "t5-3"])
def test_gradient_is_pefts(name, method):
    net, params, adapter, wrapped, theirs = both(name, method)
    batch = batch_of(name, "right")
    grads = torch.func.grad(lambda p: net(params, adapter.replace(params=p), **batch).loss)(adapter.params)[""]
    expected = torch.autograd.grad(quiet(wrapped, **batch).loss, list(theirs.values()))
    for leaf, want in zip(theirs, expected, strict=True):
        torch.testing.assert_close(grads[leaf], want, rtol=1e-4, atol=1e-6)
    if (name, method) == ("t5-3", "prompt"):
        assert not grads["P"][NV:].any()


@pytest.mark.parametrize("method", list(METHODS))
def test_gradient_is_the_derivative(method):
    ours, _, extra = METHODS[method]
    net, params, adapter = made(copy.deepcopy(model_of("gpt2")).double(), ours(num_virtual_tokens=2, **extra))
    names, leaves = zip(*adapter.params[""].items(), strict=True)
    ids = batch_of("gpt2")["input_ids"][:1, :3]

    def loss(*leaves):
        return net(params, Adapter({"": dict(zip(names, leaves, strict=True))}), input_ids=ids).logits.logsumexp(-1).sum()

    assert torch.autograd.gradcheck(loss, tuple(t.requires_grad_() for t in leaves))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("method", list(METHODS))
def test_many_adapters_train_in_one_call(method, attention):
    ours, _, extra = METHODS[method]
    net, params, adapter = made(llama(attention).eval(), ours(num_virtual_tokens=NV, **extra))
    many, batch = spread(adapter), batch_of("llama", "left")

    def loss(p):
        return net(params, Adapter(p), **batch).loss

    grads, values = quiet(torch.func.vmap(torch.func.grad_and_value(loss)), many.params)
    for i in range(3):
        one, value = torch.func.grad_and_value(loss)({"": {k: t[i] for k, t in many.params[""].items()}})
        torch.testing.assert_close(values[i], value, rtol=1e-5, atol=1e-6)
        for leaf, t in one[""].items():
            torch.testing.assert_close(grads[""][leaf][i], t, rtol=1e-4, atol=1e-6)
            assert t.abs().max() > 0


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama", "prompt"), ("llama", "prefix"), *(pytest.param("t5", m, marks=SLOW) for m in METHODS)],
)
def test_compiled_is_eager(name, method):
    ours, _, extra = METHODS[method]
    torch.manual_seed(0)
    module = llama(num_hidden_layers=1) if name == "llama" else t5(1)
    net, params, adapter = made(module.eval(), ours(num_virtual_tokens=NV, **extra))
    batch = {k: v for k, v in batch_of(name, "right").items() if name == "t5" or k != "labels"}
    torch._dynamo.reset()
    compiled = quiet(torch.compile, lambda a, b: net(params, a, **b).logits, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(quiet(compiled, adapter, batch), net(params, adapter, **batch).logits, rtol=0, atol=1e-5)


# -- init and files ----------------------------------------------------------------------------------------------------


def test_init_from_vocabulary_is_pefts():
    module = model_of("llama")
    model, params = functionalize(module)
    net = adapt(model, PromptTuning(num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB"))
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB")
    torch.manual_seed(9)
    wrapped = peft.get_peft_model(copy.deepcopy(module), config)
    assert torch.equal(peft_init(net, params, 9).params[""]["P"], wrapped.prompt_encoder["default"].embedding.weight)


@pytest.mark.parametrize(("nv", "ids"), [(7, [1, 5, 6, 7, 1, 5, 6]), (2, [1, 5]), (4, [1, 5, 6, 7])])
def test_init_from_text_repeats_or_cuts_it(nv, ids):
    module = model_of("llama")
    method = PromptTuning(num_virtual_tokens=nv, prompt_tuning_init="TEXT", prompt_tuning_init_text="say so")
    _, _, adapter = made(module, method, tokenizer=lambda text: {"input_ids": [1, 5, 6, 7]} if text == "say so" else {})
    assert cycled([1, 5, 6, 7], nv) == ids
    assert torch.equal(adapter.params[""]["P"], module.get_input_embeddings().weight[torch.tensor(ids)])


def test_init_loads_a_named_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"say": 5, "so": 6, "?": 0}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    method = PromptTuning(
        num_virtual_tokens=3,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="say so",
        tokenizer_name_or_path=str(tmp_path),
        tokenizer_kwargs={"trust_remote_code": True},
    )
    _, _, adapter = made(model_of("llama"), method)
    assert torch.equal(adapter.params[""]["P"], model_of("llama").get_input_embeddings().weight[torch.tensor([5, 6, 5])])


def test_zero_init_and_seeds():
    for extra in ({}, {"prefix_projection": True}):
        method = PrefixTuning(num_virtual_tokens=NV, init_weights="zero", **extra)
        _, _, adapter = made(model_of("llama"), method)
        assert not method.table(adapter.params[""]).any()
    a, b, c = (made(model_of("llama"), PromptTuning(num_virtual_tokens=NV), seed=s)[2].params[""]["P"] for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", ["llama-head-dim", "t5-3"])
def test_file_tensors_are_pefts(name, method):
    net, params, adapter, wrapped, _ = both(name, method)
    saved = peft.get_peft_model_state_dict(wrapped)
    ours = net.methods[0].to_peft(None, adapter.params[""])
    assert saved.keys() == ours.keys()
    torch.testing.assert_close(ours["prompt_embeddings"], saved["prompt_embeddings"], rtol=0, atol=1e-6)
    read = Adapter({"": net.methods[0].from_peft(None, saved)})
    with torch.no_grad():
        out, want = (net(params, a, **batch_of(name)).logits for a in (read, adapter))
    torch.testing.assert_close(out, want, rtol=0, atol=1e-5)
    config = wrapped.peft_config["default"]
    facts = ModelFacts(net.model, params)
    assert all(getattr(config, k) == v for k, v in net.methods[0].peft_resolved(facts).items())


# -- what counts positions -----------------------------------------------------------------------------------------------


def test_given_positions_are_shifted():
    ids = batch_of("llama")["input_ids"]
    for method in METHODS:
        net, params, adapter, _, _ = both("llama", method)
        with torch.no_grad():
            out = net(params, adapter, input_ids=ids).logits
            same = net(params, adapter, input_ids=ids, position_ids=torch.arange(7)[None]).logits
        torch.testing.assert_close(same, out, rtol=0, atol=1e-6)


def test_labels_and_types_get_virtual_positions():
    ids = batch_of("bert-cls")["input_ids"]
    torch.manual_seed(0)
    net, params, adapter = made(bert(tf.BertForTokenClassification).eval(), PromptTuning(num_virtual_tokens=NV))
    labels = torch.ones_like(ids)
    out = net(params, adapter, input_ids=ids, token_type_ids=torch.zeros_like(ids), labels=labels)
    want = torch.nn.functional.cross_entropy(out.logits[:, NV:].reshape(-1, 3), labels.reshape(-1))
    torch.testing.assert_close(out.loss, want)
    plain = net(params, adapter, input_ids=ids)
    assert torch.equal(out.logits, plain.logits)
    net, params, adapter = made(bert(tf.BertForQuestionAnswering, num_labels=2).eval(), PromptTuning(num_virtual_tokens=NV))
    start, end = torch.tensor([0, 2]), torch.tensor([3, 6])
    out = net(params, adapter, input_ids=ids, start_positions=start, end_positions=end)
    pairs_ = ((out.start_logits, start), (out.end_logits, end))
    torch.testing.assert_close(out.loss, sum(torch.nn.functional.cross_entropy(x, y + NV) for x, y in pairs_) / 2)


def test_embeddings_may_be_given_instead_of_ids():
    ids = batch_of("llama")["input_ids"]
    embeds = model_of("llama").get_input_embeddings()(ids)
    for method in METHODS:
        net, params, adapter, _, _ = both("llama", method)
        with torch.no_grad():
            assert torch.equal(net(params, adapter, inputs_embeds=embeds).logits, net(params, adapter, input_ids=ids).logits)
        given = net.call("generate", params, adapter, inputs_embeds=embeds, max_new_tokens=4, do_sample=False)
        full = net.call("generate", params, adapter, ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(given, full[:, 7:])


def test_half_precision_base():
    module = model_of("llama")
    half = copy.deepcopy(module).to(torch.bfloat16)
    for method in (PromptTuning(num_virtual_tokens=NV), PrefixTuning(num_virtual_tokens=NV)):
        net, params, adapter = made(half, method)
        assert all(t.dtype == torch.float32 for t in adapter.params[""].values())
        assert net(params, adapter, **batch_of("llama", "left")).logits.dtype == torch.bfloat16


def test_peft_order_of_decoder_layers():
    table = torch.arange(2.0 * 4 * 2 * 3).reshape(1, -1)
    for layers, want in ((2, [0, 0]), (3, [0, 2, 1]), (4, [0, 2, 0, 2])):
        one = table[:, : layers * 12]
        straight, twisted = pairs(one, layers, 2, 1), pairs(one, layers, 2, 2)
        assert [k.shape for k, _ in twisted] == [(2, 1, 3)] * layers
        assert all(torch.equal(twisted[i][0], straight[j][0]) for i, j in enumerate(want))
        assert all(torch.equal(twisted[i][1], straight[j][1]) for i, j in enumerate(want))
    net, params, adapter = made(model_of("t5"), PrefixTuning(num_virtual_tokens=NV, num_transformer_submodules=1))
    grad = torch.func.grad(lambda p: net(params, Adapter(p), **batch_of("t5")).loss)(adapter.params)[""]["T"]
    assert grad.reshape(NV, 4, -1).abs().sum((0, 2)).min() > 0


# -- generation ------------------------------------------------------------------------------------------------------------


def prepared(name, masked="left"):
    batch = {k: v for k, v in batch_of(name, masked).items() if k != "labels"}
    return batch, {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", ["llama", "opt", "t5-3"])
def test_generate_without_a_cache(name, method):
    net, params, adapter, _, _ = both(name, method)
    batch, options = prepared(name)
    a, b = (net.call("generate", params, adapter, **batch, **options, use_cache=c) for c in (True, False))
    assert torch.equal(a, b)


@pytest.mark.parametrize("method", list(METHODS))
def test_generate_is_greedy_by_forward(method):
    net, params, adapter, _, _ = both("llama", method)
    ids = batch_of("llama")["input_ids"]
    out = net.call("generate", params, adapter, ids, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        for _ in range(4):
            ids = torch.cat([ids, net(params, adapter, input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids)


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_cache_that_holds_tokens_is_continued(name, method):
    net, params, adapter, _, _ = both(name, method)
    batch, options = prepared(name)
    full = net.call("generate", params, adapter, **batch, **options)
    first = net.call(
        "generate",
        params,
        adapter,
        **batch,
        **{**options, "max_new_tokens": 2, "min_new_tokens": 2},
        return_dict_in_generate=True,
    )
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 2, dtype=torch.int64)], 1)
    rest = {**options, "max_new_tokens": 3, "min_new_tokens": 3, "past_key_values": first.past_key_values}
    again = net.call("generate", params, adapter, input_ids=first.sequences, attention_mask=mask, **rest)
    assert torch.equal(again, full)
    ids = batch_of(name)["input_ids"]
    with torch.no_grad():
        whole = net(params, adapter, input_ids=ids).logits[:, -2:]
        part = net(params, adapter, input_ids=ids[:, :5], use_cache=True)
        last = net(params, adapter, input_ids=ids[:, 5:], past_key_values=part.past_key_values, use_cache=True).logits
    torch.testing.assert_close(last, whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", list(METHODS))
def test_a_cache_of_fixed_size_is_replaced(method):
    net, params, adapter, _, _ = both("llama", method)
    batch, options = prepared("llama")
    out = quiet(net.call, "generate", params, adapter, **batch, **options, cache_implementation="static")
    assert torch.equal(out, net.call("generate", params, adapter, **batch, **options))


def test_recurrent_models_take_prompts():
    torch.manual_seed(0)
    config = tf.MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, pad_token_id=0, eos_token_id=None)
    net, params, adapter = made(tf.MambaForCausalLM(config).eval(), PromptTuning(num_virtual_tokens=NV))
    ids = batch_of("llama")["input_ids"]
    out = net.call("generate", params, adapter, ids, max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        for _ in range(3):
            ids = torch.cat([ids, net(params, adapter, input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, ids)


@pytest.mark.parametrize("method", list(METHODS))
def test_nothing_is_left_on_the_model(method):
    net, params, adapter, _, _ = both("llama", method)
    batch, options = prepared("llama")
    base = net.model.call("generate", params, **batch, **options)
    kept = {k: t.clone() for k, t in params.items()}
    net.call("generate", params, adapter, **batch, **options)
    with pytest.raises(ValueError, match="nonsense"):
        net.call("generate", params, adapter, **batch, **options, nonsense=1)
    assert torch.equal(net.model.call("generate", params, **batch, **options), base)
    assert all(torch.equal(params[k], t) for k, t in kept.items())
    with torch.no_grad():
        assert torch.equal(net.model(params, **batch).logits, model_of("llama")(**batch).logits)


# -- nets of several methods -------------------------------------------------------------------------------------------------


def test_prompts_nest_with_weights_and_each_other():
    module, (batch, options) = model_of("llama"), prepared("llama")
    model, params = functionalize(module)
    prompt, prefix = PromptTuning(num_virtual_tokens=2), PrefixTuning(num_virtual_tokens=3)
    fixed = {m: adapt(model, m).init(params, seed=3) for m in (prompt, prefix)}
    outs = []
    for methods in ([prompt, prefix], [prefix, prompt]):
        net, adapters = adapt(model, methods), tuple(fixed[m] for m in methods)
        with torch.no_grad():
            outs.append((net(params, adapters, **batch).logits, net.call("generate", params, adapters, **batch, **options)))
    torch.testing.assert_close(outs[0][0], outs[1][0], rtol=0, atol=1e-6)
    assert torch.equal(outs[0][1], outs[1][1])
    assert outs[0][0].shape[1] == 2 + 7
    net = adapt(model, [LoRA(r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False), prompt])
    lora, p = net.init(params, seed=1)
    merged, _ = adapt(model, net.methods[0]).merge(params, lora)
    merged = {k: v for k, v in merged.items() if k in params}
    with torch.no_grad():
        out = net(params, (lora, p), **batch).logits
        want = adapt(model, prompt)(merged, p, **batch).logits
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)


# -- errors ------------------------------------------------------------------------------------------------------------------


def config_error(text, cls=PromptTuning, **fields):
    fields.setdefault("num_virtual_tokens", 1)
    return pytest.param(lambda: cls(**fields), text, id=text[:40])


def model_error(text, module, method):
    return pytest.param(lambda: adapt(functionalize(module())[0], method), text, id=text[:40])


def call_error(text, name, method, call="forward", **inputs):
    def run():
        net, params, adapter, _, _ = both(name, method)
        return net.call(call, params, adapter, **{k: f() for k, f in inputs.items()})

    return pytest.param(run, text, id=text[:40])


def _ids():
    return batch_of("llama")["input_ids"]


PROMPT, PREFIX = PromptTuning(num_virtual_tokens=1), PrefixTuning(num_virtual_tokens=1)


@pytest.mark.parametrize(
    ("act", "text"),
    [
        config_error("prompttuning: num_virtual_tokens must be a positive integer, got None.", num_virtual_tokens=None),
        config_error("prefixtuning: num_virtual_tokens must be a positive integer, got 0.", PrefixTuning, num_virtual_tokens=0),
        config_error("prompttuning: num_transformer_submodules must be None, 1 or 2, got 3.", num_transformer_submodules=3),
        config_error("prompttuning: task_type must be one of 'CAUSAL_LM', ", task_type="LM"),
        config_error("prompttuning: target_modules must be None: the method acts on the call", target_modules="q"),
        config_error("prompttuning: prompt_tuning_init must be one of 'RANDOM', ", prompt_tuning_init="text"),
        config_error("prompttuning: prompt_tuning_init_text must be given with init 'TEXT'", prompt_tuning_init="TEXT"),
        config_error("prompttuning: tokenizer_kwargs must be None without init 'TEXT'", tokenizer_kwargs={}),
        config_error(
            "prefixtuning: encoder_hidden_size must be a positive integer, got 0.", PrefixTuning, encoder_hidden_size=0
        ),
        config_error("prefixtuning: init_weights must be None or 'zero', got 'ones'.", PrefixTuning, init_weights="ones"),
        model_error(
            "task_type must be another than SEQ_2_SEQ_LM for LlamaForCausalLM",
            llama,
            PromptTuning(num_virtual_tokens=1, task_type="SEQ_2_SEQ_LM"),
        ),
        model_error(
            "task_type must be SEQ_2_SEQ_LM or FEATURE_EXTRACTION for T5",
            t5,
            PrefixTuning(num_virtual_tokens=1, task_type="CAUSAL_LM"),
        ),
        model_error(
            "prompttuning: token_dim must be None or the model's, 32, got 16",
            llama,
            PromptTuning(num_virtual_tokens=1, token_dim=16),
        ),
        model_error(
            "prefixtuning: num_attention_heads must be None or the model's, 2, got 4",
            llama,
            PrefixTuning(num_virtual_tokens=1, num_attention_heads=4),
        ),
        model_error("the forward of Linear must take inputs_embeds", lambda: torch.nn.Linear(2, 2), PROMPT),
        model_error("the decoder may have at most the encoder's 2 layers, got 3", lambda: t5(num_decoder_layers=3), PREFIX),
        model_error(
            "DistilBertModel: key-value prefixes need a forward that takes past_key_values; use PromptTuning",
            lambda: tf.DistilBertModel(tf.DistilBertConfig(vocab_size=61, dim=32, n_layers=1, n_heads=2, hidden_dim=16)),
            PREFIX,
        ),
        call_error(
            "prompttuning: attention_mask must be a tensor (batch, length), got (2, 1, 7, 7)",
            "llama",
            "prompt",
            input_ids=_ids,
            attention_mask=lambda: torch.ones(2, 1, 7, 7),
        ),
        call_error(
            "prefixtuning: attention_mask must be a tensor (batch, length), got dict",
            "llama",
            "prefix",
            input_ids=_ids,
            attention_mask=dict,
        ),
        call_error("prompttuning: input_ids or inputs_embeds must be given, got neither", "llama", "prompt"),
        call_error("prefixtuning: one of input_ids, inputs_embeds must be given, got none", "llama", "prefix"),
        call_error(
            "prompttuning: encoder_outputs must not be given",
            "t5",
            "prompt",
            input_ids=_ids,
            encoder_outputs=lambda: (torch.ones(2, 7, 32),),
        ),
        call_error("net.call: method must be one of 'forward', 'generate', got 'resize'", "llama", "prompt", "resize"),
    ],
)
def test_errors(act, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        act()


def test_errors_that_need_state():
    text = PromptTuning(num_virtual_tokens=1, prompt_tuning_init="TEXT", prompt_tuning_init_text="x")
    with pytest.raises(ValueError, match="tokenizer_name_or_path must be given with init 'TEXT', got None; or pass tokenizer="):
        made(model_of("llama"), text)
    with pytest.raises(ValueError, match="prompt_tuning_init_text must be a text of at least one token, got 'x'"):
        made(model_of("llama"), text, tokenizer=lambda t: {"input_ids": []})
    assert made(model_of("llama"), text, inference_mode=True)[2].params[""]["P"].shape == (1, 32)
    projected = PrefixTuning(num_virtual_tokens=2, prefix_projection=True)
    assert made(model_of("llama"), projected, inference_mode=True)[2].params[""].keys() == {"T"}
    assert "32" in str(adapt(functionalize(model_of("llama"))[0], text))  # shapes need no tokenizer
    net, params, adapter = made(model_of("llama"), [PREFIX, PrefixTuning(num_virtual_tokens=2)])
    with pytest.raises(ValueError, match="prefixtuning: a call takes one prefix, got a second"):
        net(params, adapter, input_ids=_ids())
    config = tf.Qwen3NextConfig(
        **SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8, layer_types=["linear_attention", "full_attention"]
    )
    with pytest.raises(ValueError, match="need plain attention in every layer, got 'linear_attention'; use PromptTuning"):
        ModelFacts(functionalize(tf.Qwen3NextForCausalLM(config))[0], {}).check_cache()
    with pytest.raises(ValueError, match=r"Linear: the config must say the number of layers \(one of .*, got NoneType"):
        _ = ModelFacts(functionalize(torch.nn.Linear(2, 2))[0], {}).num_layers

"""Prompt tuning and prefix tuning: parity with peft on tiny models, generation, gradients, transforms, errors."""

from __future__ import annotations

import copy
import functools
import warnings

import peft
import pytest
import torch
import transformers as tf

from funcpeft import adapt as adapting
from funcpeft.functional import functionalize
from funcpeft.methods.prefixtuning import PrefixTuning, pairs
from funcpeft.methods.prompttuning import PromptTuning, cycled
from funcpeft.population import stack
from funcpeft.tree import Adapter

torch.set_num_threads(1)
NV = 3
SMALL = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(attention="sdpa", **changes):
    config = tf.LlamaConfig(**{**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0, **changes})
    return tf.LlamaForCausalLM._from_config(config, attn_implementation=attention)


def bert(cls=tf.BertForSequenceClassification, **changes):
    return cls(tf.BertConfig(**SMALL, intermediate_size=48, max_position_embeddings=64, num_labels=3, **changes))


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
    net = adapting.adapt(model, ours(num_virtual_tokens=NV, **extra))
    adapter = adapting.peft_init(net, params, 5)
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


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 9}, {"num_beams": 3, "repetition_penalty": 1.4}])
@pytest.mark.parametrize("masked", [None, "left"])
@pytest.mark.parametrize("method", list(METHODS))
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

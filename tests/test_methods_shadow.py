"""Shadow: parity with peft on tiny decoders in float64, the shadow alone, decoding, many adapters, blocks, and refusals."""

from __future__ import annotations

import functools
import warnings

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import funcpeft as fp
from funcpeft.adapt import adapt, peft_init
from funcpeft.errors import NoMatchError
from funcpeft.tree import tree_map

torch.set_num_threads(1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:.*generation flags are not valid"),
]
SMALL = {"vocab_size": 37, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0}
LLAMA = {**SMALL, "intermediate_size": 24, "num_key_value_heads": 2}


def llama(cls=tf.LlamaForCausalLM, **changes):
    torch.manual_seed(0)
    return cls(tf.LlamaConfig(**LLAMA, **changes)).double().eval()


def gpt2():
    torch.manual_seed(0)
    size = {"vocab_size": 37, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**size, bos_token_id=1, eos_token_id=1, pad_token_id=0)).double().eval()


def opt():
    torch.manual_seed(0)
    config = tf.OPTConfig(**{**SMALL, "pad_token_id": 1}, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16)
    return tf.OPTForCausalLM(config).double().eval()


def classifier():
    return llama(tf.LlamaForSequenceClassification, num_labels=3)


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def theirs(make, moved=True, task="CAUSAL_LM", **fields):
    """Returns peft's model in float64, which keeps some of its parameters in float32 otherwise."""
    base = make()
    torch.manual_seed(5)
    wrapped = quietly(peft.get_peft_model, base, peft.ShadowConfig(task_type=task, **fields)).eval().double()
    torch.manual_seed(9)
    with torch.no_grad():
        for _, p in wrapped.named_parameters() if moved else ():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    return wrapped


@functools.cache
def ours(make, **fields):
    model, params = fp.functionalize(make())
    net = adapt(model, fp.Shadow(**fields))
    return model, params, net


def shifted(net, params, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def move(t):
        return t + 0.2 * torch.randn(t.shape, generator=gen, dtype=t.dtype)

    made = net.init(params, seed)
    return made.replace(params=tree_map(move, made.params))


def batch(rows=2, length=6, seed=3):
    ids = torch.randint(2, 37, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


CASES = [
    (llama, {}),
    (llama, {"shadow_hidden_size": 8, "shadow_num_attention_heads": 2, "shadow_intermediate_size": 12}),
    (llama, {"shadow_num_hidden_layers": 2, "share_embeddings": False, "init_weights": False}),
    (llama, {"target_modules": ["layers.1", "layers.2"], "r": 3, "update_hidden_size": 5, "shadow_alpha": 0.7}),
    (gpt2, {}),
    (gpt2, {"shadow_hidden_size": 8, "target_modules": r".*\.h\.[01]"}),
    (gpt2, {"modules_to_save": ["lm_head"], "exclude_modules": ["h.2"]}),
    (opt, {"r": 4}),
]


@pytest.mark.parametrize(("make", "fields"), CASES)
def test_files_outputs_and_the_start_are_pefts(make, fields, tmp_path):
    wrapped = theirs(make, **fields)
    wrapped.save_pretrained(tmp_path / "theirs")
    model, params = fp.functionalize(make())
    net, adapter = fp.load_peft(model, params, tmp_path / "theirs")
    given = batch()
    with torch.no_grad():
        want = wrapped(**given, labels=given["input_ids"])
        got = net(params, adapter, **given, labels=given["input_ids"])
        logits = net.call("shadow", params, adapter, **given)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-12, atol=1e-12)
    assert float((want.logits - model(params, **given).logits).abs().max()) > 1e-3
    term = fp.Shadow.auxiliary_loss(logits, given["input_ids"])
    torch.testing.assert_close(got.loss + 0.05 * term, want.loss)

    fp.save_peft(net, adapter, tmp_path / "ours", task_type="CAUSAL_LM")
    wrote, read = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs"))
    assert wrote.keys() <= read.keys()
    assert all(k in wrote for k in read if "shadow_" in k)
    assert all(torch.equal(wrote[k], read[k]) for k in wrote)
    back = quietly(peft.PeftModel.from_pretrained, make(), tmp_path / "ours").eval().double()
    with torch.no_grad():
        torch.testing.assert_close(back(**given).logits, want.logits, rtol=1e-5, atol=1e-5)  # peft reads into float32

    fresh = dict(theirs(make, False, **fields).named_parameters())
    entry = net.entries[0]
    made = peft_init(net, params, seed=5)
    for key, t in entry.method.to_peft(None, (made if len(net.entries) == 1 else made[0]).leaves("")).items():
        assert torch.equal(t, fresh[key]), key


def test_a_classifier_has_a_head_of_its_own_beside(tmp_path):
    wrapped = theirs(classifier, task="SEQ_CLS")
    wrapped.save_pretrained(tmp_path / "theirs")
    model, params = fp.functionalize(classifier())
    net, adapter = fp.load_peft(model, params, tmp_path / "theirs")
    given, labels = batch(), torch.tensor([0, 2])
    with torch.no_grad():
        want, got = wrapped(**given, labels=labels), net(params, adapter, **given, labels=labels)
        term = fp.Shadow.auxiliary_loss(net.call("shadow", params, adapter, **given), labels)
        plain = net.call("shadow", params, adapter, input_ids=given["input_ids"])
    torch.testing.assert_close(got.logits, want.logits)
    torch.testing.assert_close(got.loss + 0.05 * term, want.loss)
    assert plain.shape == (2, 3)
    fp.save_peft(net, adapter, tmp_path / "ours")
    wrote, read = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs"))
    assert wrote.keys() == read.keys()
    assert all(torch.equal(wrote[k], read[k]) for k in read)
    made = fp.adapt(model, fp.Shadow(task_type="SEQ_CLS")).init(params, 0)
    assert torch.equal(made.params[""]["head.weight"], params["score.weight"])


def test_losses_of_a_classifier_are_those_of_its_labels():
    loss, gen = fp.Shadow.auxiliary_loss, torch.Generator().manual_seed(0)
    one, several = torch.randn(4, 1, generator=gen), torch.randn(4, 3, generator=gen)
    torch.testing.assert_close(loss(one, torch.arange(4)), ((one[:, 0] - torch.arange(4.0)) ** 2).mean())
    kinds = torch.tensor([0.0, 1, 0]).expand(4, 3)
    want = -(kinds * several.sigmoid().log() + (1 - kinds) * (1 - several.sigmoid()).log()).mean()
    torch.testing.assert_close(loss(several, kinds), want)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}])
def test_decoding_with_both_caches_is_decoding_without(make, how):
    _, params, net = ours(make, r=2, shadow_alpha=2.0)
    adapter, given = shifted(net, params), batch()
    run = functools.partial(net.call, "generate", params, adapter, **given, max_new_tokens=6, do_sample=False, **how)
    cached, plain = run(), run(use_cache=False)
    assert torch.equal(cached, plain)


def test_decoding_is_pefts(tmp_path):
    wrapped = theirs(llama, shadow_alpha=2.0)
    wrapped.save_pretrained(tmp_path)
    model, params = fp.functionalize(llama())
    net, adapter = fp.load_peft(model, params, tmp_path)
    given, how = batch(), {"max_new_tokens": 6, "do_sample": False}
    want = wrapped.generate(**given, **how)
    assert torch.equal(net.call("generate", params, adapter, **given, **how), want)
    assert not torch.equal(model.call("generate", params, **given, **how), want)


def test_a_cache_of_an_earlier_call_holds_the_shadow():
    _, params, net = ours(llama)
    adapter, ids = shifted(net, params), batch()["input_ids"]
    whole = net(params, adapter, input_ids=ids).logits
    first = net(params, adapter, input_ids=ids[:, :4], use_cache=True)
    again = net(params, adapter, input_ids=ids[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(again.logits, whole[:, 4:])
    base = net.model(params, input_ids=ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"shadow: a cache must hold the shadow's layers too, got the base's alone"):
        net(params, adapter, input_ids=ids[:, 4:], past_key_values=base)


def test_embeddings_are_inputs_too():
    model, params, net = ours(llama)
    adapter, given = shifted(net, params), batch()
    embeds = model.embed(params, given["input_ids"])
    want = net(params, adapter, **given).logits
    torch.testing.assert_close(net(params, adapter, inputs_embeds=embeds, attention_mask=given["attention_mask"]).logits, want)


def test_gradients_are_pefts(tmp_path):
    wrapped = theirs(gpt2, shadow_dropout=0.0)  # a Llama takes norms in float32
    wrapped.save_pretrained(tmp_path)
    model, params = fp.functionalize(gpt2())
    net, adapter = fp.load_peft(model, params, tmp_path)
    given = batch()
    wrapped(**given, labels=given["input_ids"]).loss.backward()
    want = {n: p.grad for n, p in wrapped.named_parameters() if p.grad is not None}

    def loss(p):
        one = adapter.replace(params=p)
        term = fp.Shadow.auxiliary_loss(net.call("shadow", params, one, **given), given["input_ids"])
        return net(params, one, **given, labels=given["input_ids"]).loss + 0.05 * term

    grads = torch.func.grad(loss)(adapter.params)[""]
    found = net.entries[0].method.to_peft(None, grads)
    for key, g in found.items():
        torch.testing.assert_close(g, want.get(key, torch.zeros_like(g)), rtol=1e-8, atol=1e-10)
    assert len(want) > len(found) - 9  # the last update of the state is not read


def test_members_fold_and_route_and_decode():
    _, params, net = ours(gpt2, r=2, shadow_hidden_size=8, shadow_alpha=2.0)
    members, ids = [shifted(net, params, s) for s in range(3)], batch()["input_ids"]
    many = fp.stack(members)
    got = fp.apply_many(net, params, many, input_ids=ids, in_dims=None, use_cache=False, strategy="fold").logits
    for i, one in enumerate(members):
        torch.testing.assert_close(got[i], net(params, one, input_ids=ids).logits)
    routed = fp.apply_routed(net, params, many, [2, 0], input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(routed[0], net(params, members[2], input_ids=ids).logits[0])
    how = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2, "use_cache": False}
    texts = fp.apply_many(net, params, many, input_ids=ids, in_dims=None, call="generate", strategy="fold", **how)
    for i, one in enumerate(members):
        assert torch.equal(texts[i], net.call("generate", params, one, input_ids=ids, **how))
    with pytest.raises(ValueError, match="shadow: the shadow of many members folded decodes without a cache, got one"):
        fp.apply_many(net, params, many, input_ids=ids, in_dims=None, call="generate", strategy="fold", max_new_tokens=3)
    dropping = fp.Context(training=True, seed=1)
    with pytest.raises(ValueError, match="shadow: members folded cannot draw dropout each by itself"):
        fp.apply_many(net, params, many, input_ids=ids, in_dims=None, use_cache=False, strategy="fold", context=dropping)


def test_recomputed_blocks_give_the_same_gradient():
    module = llama()
    (model, params), (slim, _) = fp.functionalize(module), fp.functionalize(module, remat=True)
    nets = [adapt(m, fp.Shadow(r=2)) for m in (model, slim)]
    adapter, given = shifted(nets[0], params), batch()

    def grad(net):
        return torch.func.grad(lambda p: net(params, adapter.replace(params=p), **given).logits.square().sum())(adapter.params)

    tree_map(torch.testing.assert_close, grad(nets[0]), grad(nets[1]))


def test_blocks_are_chosen_by_rules_and_positions():
    model, _, _ = ours(llama)

    def chosen(**fields):
        return adapt(model, fp.Shadow(**fields)).entries[0].method.blocks

    assert chosen() == ("model.layers.0", "model.layers.1", "model.layers.2")
    assert chosen(layers_to_transform=[0, 1]) == ("model.layers.0", "model.layers.1")
    assert chosen(layers_to_transform=2) == ("model.layers.2",)
    assert chosen(target_modules=r".*\.[12]", exclude_modules=["layers.1"]) == ("model.layers.2",)
    with pytest.raises(ValueError, match=r"shadow: target_modules must be blocks next to each other, got \['model.layers.0'"):
        chosen(layers_to_transform=[0, 2])
    with pytest.raises(NoMatchError, match=r"target_modules must leave a block to adapt, of 'model.layers.0'"):
        chosen(target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"shadow_dropout": 1.0}, r"shadow_dropout must be in \[0, 1\), got 1.0"),
        ({"shadow_hidden_size": 0}, "shadow_hidden_size must be a positive integer, got 0"),
        ({"update_hidden_size": -1}, "update_hidden_size must be a positive integer, got -1"),
        ({"shadow_model": "some/model"}, "shadow_model must be 'mirror', got 'some/model'; train a mirror"),
    ],
)
def test_refused_fields(fields, text):
    with pytest.raises(ValueError, match=text):
        fp.Shadow(**fields)


def test_refused_models():
    plain = fp.functionalize(torch.nn.Sequential(torch.nn.Linear(2, 2)))[0]
    with pytest.raises(ValueError, match=r"shadow: the model must be one of transformers"):
        adapt(plain, fp.Shadow())
    bert = fp.functionalize(tf.BertModel(tf.BertConfig(**SMALL, intermediate_size=8)))[0]
    with pytest.raises(ValueError, match="BertModel: the model must have a decoder with a list of blocks"):
        adapt(bert, fp.Shadow())
    model, params, net = ours(llama)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: the model must have a linear head 'score' or 'classifier'"):
        adapt(model, fp.Shadow(task_type="SEQ_CLS")).init(params, 0)
    with pytest.raises(fp.NoMergedFormError, match="shadow"):
        net.merge(params, net.init(params, 0))
    bloom, leaves = fp.functionalize(tf.BloomForCausalLM(tf.BloomConfig(vocab_size=37, hidden_size=16, n_layer=2, n_head=2)))
    with pytest.raises(ValueError, match="BloomForCausalLM: the config must have one of intermediate_size, ffn_dim, n_inner"):
        adapt(bloom, fp.Shadow(shadow_intermediate_size=8)).init(leaves, 0)
    headless, leaves = fp.functionalize(llama(tf.LlamaModel))
    bare = adapt(headless, fp.Shadow())
    with pytest.raises(ValueError, match="LlamaModel: the model must have a language model's head"):
        bare.call("shadow", leaves, bare.init(leaves, 0), input_ids=torch.tensor([[1]]))
    with pytest.raises(ValueError, match=r"net.call: method must be one of 'forward', 'generate', 'shadow', got 'train'"):
        net.call("train", params, net.init(params, 0), input_ids=torch.tensor([[1]]))


@pytest.mark.parametrize("stored", [False, True])
def test_half_precision_and_stored_bases_are_met(stored):
    model, params = fp.functionalize(llama().bfloat16())
    if stored:
        params = fp.quantize(model, params, fp.NF4(), target_modules="all-linear")
    net = adapt(model, fp.Shadow(r=2))
    adapter, given = shifted(net, params), batch()
    assert {t.dtype for t in adapter.params[""].values()} == {torch.float32}
    out, base = net(params, adapter, **given).logits, model(params, **given).logits
    assert out.dtype == torch.bfloat16
    assert float((out - base).float().abs().max()) > 1e-2
    wide, leaves = fp.functionalize(llama())
    leaves = {k: t.double() if t.is_floating_point() else t for k, t in fp.dequantize(params).items()}
    want = adapt(wide, fp.Shadow(r=2))(leaves, tree_map(lambda t: t.double() if t.is_floating_point() else t, adapter), **given)
    torch.testing.assert_close(out.double(), want.logits, rtol=0.05, atol=0.05)

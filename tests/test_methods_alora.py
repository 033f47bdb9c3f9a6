"""aLoRA against peft on whole models, its offsets, and calls that the laws do not make."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import zoo
from torch import nn

import funcpeft as fp
from funcpeft.methods.alora import active, last_offsets

SEQUENCE = (7, 9)
#: The sequence in the middle, not at all, twice, at the end, and cut off by the end.
IDS = torch.tensor([[5, 7, 9, 11, 12, 13], [5, 6, 8, 9, 10, 11], [7, 9, 3, 7, 9, 20], [11, 3, 4, 6, 7, 9], [11, 3, 4, 6, 9, 7]])
OFFSETS = torch.tensor([5, 0, 3, 2, 0])
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def double(name):
    return copy.deepcopy(zoo.model(name)).double()


def oracle(name, **options):
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        target_modules=TARGETS[name],
        alora_invocation_tokens=list(SEQUENCE),
        init_lora_weights=False,
        **options,
    )
    torch.manual_seed(3)
    return quietly(peft.get_peft_model, double(name), config).eval()


def both(name, folder, **options):
    """Returns peft's model, and model, params, net and adapter read from its file."""
    theirs = oracle(name, **options)
    quietly(theirs.save_pretrained, folder)
    model, params = fp.functionalize(double(name))
    return theirs, model, params, *fp.load_peft(model, params, folder)


def test_offsets_are_counted_to_the_last_occurrence():
    assert torch.equal(last_offsets(IDS, SEQUENCE), OFFSETS)
    assert torch.equal(last_offsets(IDS, (9,)), torch.tensor([4, 3, 2, 1, 2]))
    assert torch.equal(last_offsets(IDS[:, :1], SEQUENCE), torch.zeros(5, dtype=torch.int64))
    assert torch.equal(torch.func.vmap(lambda i: last_offsets(i, SEQUENCE))(IDS[:, None])[:, 0], OFFSETS)
    found = torch.compile(lambda i: last_offsets(i, SEQUENCE), fullgraph=True, backend="aot_eager")(IDS)
    assert torch.equal(found, OFFSETS)


def test_positions_of_any_layout_of_rows():
    offsets = torch.tensor([2, 0, 9])
    want = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert torch.equal(active(offsets, torch.zeros(3, 4, 5))[..., 0], want)
    assert torch.equal(active(offsets, torch.zeros(12, 5))[..., 0], want.flatten())
    assert torch.equal(active(offsets, torch.zeros(6, 4, 5))[..., 0], want.repeat_interleave(2, 0))
    assert torch.equal(active(offsets, torch.zeros(3, 2, 4, 5))[..., 0], want[:, None])
    assert torch.equal(active(offsets, torch.zeros(3, 5))[..., 0], torch.tensor([True, False, True]))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 5}], ids=str)
def test_forward_and_gradient_are_pefts(name, options, tmp_path):
    theirs, model, params, net, adapter = both(name, tmp_path, **options)
    assert type(net.methods[0]) is fp.aLoRA
    want = theirs(input_ids=IDS).logits
    got = net(params, adapter, input_ids=IDS).logits
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    base = model(params, input_ids=IDS).logits
    assert torch.equal(got[1], base[1])
    assert torch.equal(got[0, :1], base[0, :1])
    assert (got[0, 1:] - base[0, 1:]).abs().max() > 1e-3
    grads = torch.func.grad(lambda p: net(params, adapter.replace(params=p), input_ids=IDS).logits.square().sum())(
        adapter.params
    )
    want.square().sum().backward()
    for path, leaves in grads.items():
        layer = theirs.base_model.model.get_submodule(path)
        for leaf, given in (("A", layer.lora_A), ("B", layer.lora_B)):
            reference = given["default"].weight.grad
            assert (leaves[leaf] - reference).abs().max() < 1e-4 * (1 + reference.abs().max())


def test_file_written_here_is_pefts(tmp_path):
    theirs, _, _, net, adapter = both("llama", tmp_path / "theirs")
    fp.save_peft(net, adapter, tmp_path / "ours", task_type="CAUSAL_LM")
    back = quietly(peft.PeftModel.from_pretrained, double("llama"), tmp_path / "ours").eval()
    assert torch.equal(back(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


def test_a_plain_file_is_read_as_plain(tmp_path):
    model, params = zoo.functional("llama")
    net = fp.adapt(model, fp.LoRA(r=2, target_modules=["q_proj"]))
    fp.save_peft(net, net.init(params, 0), tmp_path)
    assert type(fp.load_peft(model, params, tmp_path)[0].methods[0]) is fp.LoRA


def test_generate_with_a_cache_is_pefts(tmp_path):
    theirs, _, params, net, adapter = both("llama", tmp_path)
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    want = theirs.generate(input_ids=IDS, **options)
    got = net.call("generate", params, adapter, input_ids=IDS, **options)
    assert torch.equal(got.sequences, want.sequences)
    assert all((g - w).abs().max() < 1e-4 for g, w in zip(got.logits, want.logits, strict=True))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_beams_take_the_offset_of_their_row(options, tmp_path):
    _, _, params, net, adapter = both("llama", tmp_path)
    whole = net.call("generate", params, adapter, input_ids=IDS, max_new_tokens=5, do_sample=False, **options)
    count = options.get("num_return_sequences", 1)
    for row in range(len(IDS)):
        one = net.call("generate", params, adapter, input_ids=IDS[row : row + 1], max_new_tokens=5, do_sample=False, **options)
        got = whole[row * count : (row + 1) * count]
        assert torch.equal(got[:, : one.shape[1]], one)


def test_given_offsets_win_over_those_of_the_ids(tmp_path):
    _, model, params, net, adapter = both("llama", tmp_path)
    none = fp.Context(values={"alora_offsets": torch.zeros(5, dtype=torch.int64)})
    assert torch.equal(net(params, adapter, input_ids=IDS, context=none).logits, model(params, input_ids=IDS).logits)
    every = fp.Context(values={"alora_offsets": torch.full((5,), 6)})
    plain = fp.adapt(model, fp.LoRA(r=2, target_modules=TARGETS["llama"]))
    got = net(params, adapter, input_ids=IDS, context=every).logits
    assert (got - plain(params, adapter, input_ids=IDS).logits).abs().max() < 1e-5
    long = net.call("generate", params, adapter, input_ids=IDS, context=every, max_new_tokens=4, do_sample=False)
    assert torch.equal(long, plain.call("generate", params, adapter, input_ids=IDS, max_new_tokens=4, do_sample=False))


def test_embeds_need_offsets(tmp_path):
    _, _, params, net, adapter = both("llama", tmp_path)
    embeds = params["model.embed_tokens.weight"][IDS]
    with pytest.raises(ValueError, match=r"alora: a call needs input_ids; pass context=Context\(values="):
        net(params, adapter, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="alora: a call needs input_ids"):
        net.call("generate", params, adapter, inputs_embeds=embeds, max_new_tokens=2)
    context = fp.Context(values={"alora_offsets": OFFSETS})
    got = net(params, adapter, inputs_embeds=embeds, context=context).logits
    assert torch.equal(got, net(params, adapter, input_ids=IDS).logits)
    options = {"max_new_tokens": 4, "do_sample": False}
    got = net.call("generate", params, adapter, inputs_embeds=embeds, context=context, **options)
    assert torch.equal(got, net.call("generate", params, adapter, input_ids=IDS, **options)[:, 6:])


def test_members_of_a_population_find_their_own_offsets(tmp_path):
    _, _, params, net, adapter = both("llama", tmp_path)
    other = fp.Adapter({p: {n: t * 1.5 for n, t in v.items()} for p, v in adapter.params.items()}, adapter.consts)
    many = fp.stack([adapter, other.replace(rank_axes=adapter.rank_axes)])
    ids = torch.stack([IDS, IDS.flip(0)])
    got = fp.apply_many(net, params, many, input_ids=ids, use_cache=False, strategy="fold").logits
    for i, one in enumerate((adapter, other)):
        assert (got[i] - net(params, one, input_ids=ids[i], use_cache=False).logits).abs().max() < 1e-5
    index = [1, -1, 0, 1, 0]
    routed = fp.apply_routed(net, params, many, index, input_ids=IDS, use_cache=False).logits
    for row, member in enumerate(index):
        whole = net.model(params, input_ids=IDS) if member < 0 else net(params, (adapter, other)[member], input_ids=IDS)
        assert (routed[row] - whole.logits[row]).abs().max() < 1e-5


def test_gradient_checkpointing_keeps_the_offsets():
    module = copy.deepcopy(zoo.model("llama"))
    grads = []
    for remat in (False, True):
        model, params = fp.functionalize(module, remat=remat)
        net = fp.adapt(model, fp.aLoRA(r=2, target_modules=["q_proj"], alora_invocation_tokens=SEQUENCE))
        adapter = net.init(params, 0)

        def loss(adapter, net=net, params=params):
            return net(params, adapter, input_ids=IDS, use_cache=False).logits.square().sum()

        grads.append(fp.value_and_grad(loss)(adapter)[1])
    for path, leaves in grads[0].items():
        for name, t in leaves.items():
            assert (t - grads[1][path][name]).abs().max() < 1e-4 * (1 + t.abs().max())


def test_there_is_no_merged_form(tmp_path):
    _, _, params, net, adapter = both("llama", tmp_path)
    with pytest.raises(fp.errors.NoMergedFormError, match="alora: the method acts on the call and has no merged form"):
        net.merge(params, adapter)


def test_fields_and_models_that_do_not_fit():
    with pytest.raises(ValueError, match="alora: alora_invocation_tokens must be at least one token id, got None"):
        fp.aLoRA(r=2)
    for odd in ([], [1.5], [-1], "text"):
        rule = "at least one" if odd in ([], [-1]) else "a list of integers"
        with pytest.raises(ValueError, match=f"alora_invocation_tokens must be {rule}"):
            fp.aLoRA(r=2, alora_invocation_tokens=odd)
    with pytest.raises(ValueError, match="offsets are counted in the one sequence of a decoder"):
        fp.adapt(zoo.functional("t5")[0], fp.aLoRA(alora_invocation_tokens=SEQUENCE, target_modules=["q"]))
    model, params = fp.functionalize(nn.Sequential(nn.Linear(4, 3)))
    net = fp.adapt(model, fp.aLoRA(r=2, alora_invocation_tokens=SEQUENCE, target_modules=["0"]))
    adapter = net.init(params, 0)
    with pytest.raises(ValueError, match="alora: a call needs input_ids"):
        net(params, adapter, torch.ones(2, 5, 4))
    integers = [torch.zeros(shape, dtype=torch.int64) for shape in ((2, 1), (3,), (0,))]
    for odd in (torch.zeros(2), torch.ones(2) > 0, torch.zeros(2, dtype=torch.complex64), *integers):
        with pytest.raises(ValueError, match=r"alora_offsets must be integers \(rows,\), one for each row of the input"):
            net(params, adapter, torch.ones(2, 5, 4), context=fp.Context(values={"alora_offsets": odd}))

"""Where peft 0.21 is wrong about Lily, PEANuT, Shadow, and LoHa's and LoKr's convolutions, each against its own computation."""

from __future__ import annotations

import warnings

import bitsandbytes as bnb
import bitsandbytes.functional as kernels
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from differences import differs
from rows.lily import Tower
from safetensors.torch import load_file, save_file
from torch import nn

import funcpeft as fp
from funcpeft.errors import CheckpointError
from funcpeft.tree import tree_map


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def moved(adapter, scale=0.3):
    gen = torch.Generator().manual_seed(7)
    return adapter.replace(
        params=tree_map(lambda t: t + scale * torch.randn(t.shape, generator=gen, dtype=t.dtype), adapter.params)
    )


def theirs(module, config):
    """Returns peft's model, its adapter moved away from init."""
    torch.manual_seed(5)
    wrapped = quietly(peft.get_peft_model, module, config).eval()
    torch.manual_seed(9)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return wrapped


def far(a, b):
    return float((a - b).detach().abs().max()) > 1e-3


# -- convolutions ------------------------------------------------------------------------------------------------------------


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.site = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")

    def forward(self, x):
        return self.site(x)


def padded():
    torch.manual_seed(4)
    return Padded().double().eval()


@pytest.mark.parametrize(("name", "config"), [("LoHa", peft.LoHaConfig), ("LoKr", peft.LoKrConfig)])
@differs(
    "LoHa and LoKr",
    "the update of a convolution pads with zeros whatever its `padding_mode`, so the forward is not that of the merged weight",
    "the layer's own padding",
)
def test_an_update_is_padded_as_its_layer_is(name, config, tmp_path):
    wrapped = theirs(padded(), config(r=2, target_modules=["site"]))
    wrapped.save_pretrained(tmp_path)
    model, params = fp.functionalize(padded())
    net, adapter = fp.load_peft(model, params, tmp_path)
    merged, _ = net.merge(params, adapter)
    x = drawn(2, 3, 5, 5)
    want = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), merged["site.weight"], params["site.bias"])
    torch.testing.assert_close(net(params, adapter, x), want, rtol=1e-5, atol=1e-5)  # peft keeps alpha / r in float32
    with torch.no_grad():
        assert far(wrapped(x), want)
        torch.testing.assert_close(wrapped.merge_and_unload()(x), want, rtol=1e-5, atol=1e-5)


# -- Lily --------------------------------------------------------------------------------------------------------------------


def tower():
    torch.manual_seed(4)
    return Tower().double().eval()


def shared(wrapped):
    """Counts the layers by the B that they share."""
    owners = [id(m.lily_B["default"]) for m in wrapped.modules() if hasattr(m, "lily_B")]
    return sorted(owners.count(o) for o in set(owners))


@differs(
    "Lily",
    "which layers share depends on the order of a set where two entries of `target_modules` end a path",
    "the longest entry that names the layer",
)
def test_which_layers_share_does_not_depend_on_an_order():
    found = []
    for order in (["up", "blocks.0.up"], ["blocks.0.up", "up"]):
        config = peft.LilyConfig(r=2, target_modules=order)
        config.target_modules = order  # in place of the set that peft makes of it
        found.append(shared(theirs(tower(), config)))
        model, _ = fp.functionalize(tower())
        net = fp.adapt(model, fp.Lily(r=2, target_modules=order))
        scopes = [v[0] for v in net.entries[0].scopes.values()]
        assert sorted(scopes.count(s) for s in set(scopes)) == [1, 3]
    assert found == [[1, 3], [4]]


@differs("Lily", "of shared factors that differ in a file, the last layer's copy is taken in silence", "refused by name")
def test_copies_that_differ_are_refused(tmp_path):
    wrapped = theirs(tower(), peft.LilyConfig(r=2, target_modules=["up"]))
    wrapped.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.blocks.3.up.lily_B.weight"] += 1
    save_file(tensors, file)
    back = quietly(peft.PeftModel.from_pretrained, tower(), tmp_path)
    first = back.base_model.model.blocks[0]["up"].lily_B["default"].weight
    assert torch.equal(first, tensors["base_model.model.blocks.3.up.lily_B.weight"])
    model, params = fp.functionalize(tower())
    with pytest.raises(CheckpointError, match="every site's copy of 'B', which sites share, must be the same"):
        fp.load_peft(model, params, tmp_path)


# -- PEANuT ------------------------------------------------------------------------------------------------------------------


class Eight(nn.Module):
    """A layer whose weight bitsandbytes keeps in eight bits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        layer = nn.Linear(64, 48)
        self.site = bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False, threshold=6.0)
        self.site.load_state_dict(layer.state_dict())
        self.site.to("cpu")

    def forward(self, x):
        return self.site(x)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@differs("PEANuT", "on a bitsandbytes 8-bit layer the network reads the integer codes as if they were the weight", "the weight")
def test_the_network_reads_the_weight_and_not_its_codes(tmp_path):
    wrapped = theirs(Eight(), peft.PeanutConfig(r=4, target_modules=["site"])).train()
    wrapped.save_pretrained(tmp_path)
    layer = Eight().site
    w = kernels.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).double()
    p = {k.split("peanut_")[1][0]: t.double() for k, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    x = drawn(3, 64).float()
    update = p["B"] @ F.relu(p["A"] @ w)
    want = F.linear(x.double(), w + update, layer.bias.double()).float()
    model, params = fp.functionalize(Eight())
    net, adapter = fp.load_peft(model, params, tmp_path)
    torch.testing.assert_close(net(params, adapter, x), want, rtol=1e-4, atol=1e-4)
    assert far(wrapped(x), want)
    codes = p["B"] @ F.relu(p["A"] @ layer.weight.data.double())
    torch.testing.assert_close(wrapped(x), F.linear(x.double(), w + codes, layer.bias.double()).float(), rtol=1e-2, atol=1.0)


# -- Shadow ------------------------------------------------------------------------------------------------------------------


def decoder():
    torch.manual_seed(4)
    size = {"vocab_size": 31, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**size, bos_token_id=1, eos_token_id=1, pad_token_id=0)).double().eval()


@differs("Shadow", "`layers_to_transform` is ignored with the default targets: all blocks are adapted", "those blocks")
def test_positions_choose_among_the_default_blocks():
    wrapped = theirs(decoder(), peft.ShadowConfig(r=2, layers_to_transform=[0], task_type="CAUSAL_LM"))
    assert sum(n.endswith("shadow_down.default.weight") for n, _ in wrapped.named_parameters()) == 3
    model, params = fp.functionalize(decoder())
    net = fp.adapt(model, fp.Shadow(r=2, layers_to_transform=[0]))
    names = net.init(params, 0).params[""]
    assert [n for n in names if n.endswith(":D")] == ["transformer.h.0:D"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@differs("Shadow", "a refused `merge_and_unload` leaves the adapter inactive in silence", "refuses and changes nothing")
def test_a_refused_merge_changes_nothing(tmp_path):
    wrapped = theirs(decoder(), peft.ShadowConfig(task_type="CAUSAL_LM")).double()
    wrapped.save_pretrained(tmp_path)
    model, params = fp.functionalize(decoder())
    net, adapter = fp.load_peft(model, params, tmp_path)
    ids = torch.tensor([[3, 5, 7, 2]])
    with torch.no_grad():
        want = wrapped(input_ids=ids).logits
        with pytest.raises(NotImplementedError):
            quietly(wrapped.merge_and_unload)
        torch.testing.assert_close(wrapped(input_ids=ids).logits, model(params, input_ids=ids).logits)  # the base's
        with pytest.raises(fp.NoMergedFormError):
            net.merge(params, adapter)
        torch.testing.assert_close(net(params, adapter, input_ids=ids).logits, want)
    assert far(want, model(params, input_ids=ids).logits)

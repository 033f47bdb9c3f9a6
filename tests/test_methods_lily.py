"""Lily: groups, what they share, many adapters at once, and refusals."""

from collections import Counter

import pytest
import torch
from rows.lily import Tower
from safetensors.torch import load_file, save_file
from torch import nn

from funcpeft.adapt import adapt
from funcpeft.errors import CheckpointError
from funcpeft.functional import functionalize
from funcpeft.interop.peft import load_peft, save_peft
from funcpeft.methods import Lily
from funcpeft.population import apply_many, plan_many
from funcpeft.routing import apply_routed
from funcpeft.stacking import stack
from funcpeft.tree import tree_map


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved(adapter, seed=7):
    gen = torch.Generator().manual_seed(seed)

    def move(t):
        return t + 0.3 * torch.randn(t.shape, generator=gen, dtype=t.dtype)

    return adapter.replace(params=tree_map(move, adapter.params))


def tower(**fields):
    torch.manual_seed(0)
    model, params = functionalize(Tower().double())
    net = adapt(model, Lily(r=2, **fields))
    return model, params, net


def test_layers_share_by_entry_and_by_runs():
    _, params, net = tower(target_modules=["up", "down"], stride_A=3)
    adapter, scopes = net.init(params, 0), net.entries[0].scopes
    names = {kind: [scopes[f"blocks.{i}.{kind}"] for i in range(4)] for kind in ("up", "down")}
    for found in names.values():
        assert len({b for b, _ in found}) == 1
        assert [a == found[0][1] for _, a in found] == [True, True, True, False]
    assert not {s for v in names["up"] for s in v} & {s for v in names["down"] for s in v}
    assert set(adapter.params["blocks.3.up"]) == {"R"}
    assert sum(t.numel() for v in adapter.params.values() for t in v.values()) == 24 + 32 + 32 + 24 + 8 * 4


def outer(net):
    """Counts the layers that share B, by group."""
    return sorted(Counter(s[0] for s in net.entries[0].scopes.values()).values())


def test_the_longest_entry_names_the_group_and_of_all_linear_every_layer():
    assert outer(tower(target_modules=["up", "blocks.0.up"])[2]) == [1, 3]
    assert outer(tower(target_modules="all-linear")[2]) == [1] * 8
    assert outer(tower(target_modules=r".*(up|down)")[2]) == [4, 4]


def test_a_model_of_a_known_architecture_has_groups_of_its_default_targets():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, vocab_size=16)
    net = adapt(functionalize(LlamaForCausalLM(config))[0], Lily(r=2))
    assert outer(net) == [2, 2]


def test_the_output_by_hand():
    _, params, net = tower(target_modules=["blocks.0.up"], scaling=0.5, num_B=3)
    adapter, x = moved(net.init(params, 0)), randn(2, 5, 6)
    p = {k: v for leaves in adapter.params.values() for k, v in leaves.items()}
    h = x @ p["A"].T
    mean = torch.softmax(h @ p["R"].T, -1).mean((0, 1))
    low = sum(mean[e] * (h @ p["B"][e]) for e in range(3))
    y = x @ params["blocks.0.up.weight"].T + params["blocks.0.up.bias"] + 0.5 * low
    want = x + torch.tanh(y) @ params["blocks.0.down.weight"].T + params["blocks.0.down.bias"]
    rest = {k: v for k, v in params.items() if not k.startswith("blocks.0")}
    for i in range(1, 4):
        up, down = (torch.nn.Linear(*s) for s in ((6, 8), (8, 6)))
        for layer, name in ((up, "up"), (down, "down")):
            layer.weight.data, layer.bias.data = rest[f"blocks.{i}.{name}.weight"], rest[f"blocks.{i}.{name}.bias"]
        want = want + down(torch.tanh(up(want)))
    torch.testing.assert_close(net(params, adapter, x), want.detach())


def test_members_mix_over_their_own_rows_and_rows_are_not_routed():
    _, params, net = tower(target_modules=["up", "down"], stride_A=2)
    members = [moved(net.init(params, s), s) for s in range(3)]
    many, x = stack(members), randn(3, 4, 5, 6)
    assert plan_many(net, params, many, x).strategy == "fold"
    got = apply_many(net, params, many, x)
    for i, one in enumerate(members):
        torch.testing.assert_close(got[i], net(params, one, x[i]))
        assert float((net(params, one, x[i])[:2] - net(params, one, x[i][:2])).abs().max()) > 1e-6  # rows mix
    with pytest.raises(ValueError, match="apply_routed: rows can be routed where a method computes each by itself, got Lily"):
        apply_routed(net, params, many, [0, 1, 2, 0], x[0])


def test_ranks_of_members_may_differ():
    model, params, net = tower(target_modules=["up"])
    wide = adapt(model, Lily(r=4, target_modules=["up"]))
    members, x = [moved(net.init(params, 0)), moved(wide.init(params, 1))], randn(4, 5, 6)
    got = apply_many(net, params, stack(members), x, in_dims=None)
    torch.testing.assert_close(got[0], net(params, members[0], x))
    torch.testing.assert_close(got[1], wide(params, members[1], x))


def test_copies_in_a_file_must_agree(tmp_path):
    model, params, net = tower(target_modules=["up"])
    save_peft(net, moved(net.init(params, 0)), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.blocks.2.up.lily_B.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"lily at 'blocks.2.up': every site's copy of 'B', which sites share"):
        load_peft(model, params, tmp_path)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"stride_A": 0}, "stride_A must be a positive integer, got 0"),
        ({"num_B": 1}, "num_B must be an integer of at least 2, got 1"),
    ],
)
def test_refusals(fields, text):
    with pytest.raises(ValueError, match=text):
        Lily(**fields)


def test_a_layer_meets_a_single_vector():
    model, params = functionalize(nn.Sequential(nn.Linear(6, 4).double()))
    net = adapt(model, Lily(r=2, target_modules=["0"]))
    adapter, x = moved(net.init(params, 0)), randn(6)
    torch.testing.assert_close(net(params, adapter, x), net(params, adapter, x[None])[0])

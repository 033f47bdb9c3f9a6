"""AdaMSS: its clusters, the schedule that freezes them, and where peft differs."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
from differences import differs
from safetensors.torch import load_file, save_file
from torch import nn

import funcpeft as fp
from funcpeft.methods.adamss import clusters
from funcpeft.tree import tree_map


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(12, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.lin1(torch.tanh(self.lin0(x)))


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
FIELDS = {"r": 6, "num_subspaces": 4, "subspace_rank": 2, "target_modules": ["lin0", "lin1"]}
ASA = {
    "use_asa": True,
    "asa_target_subspaces": 3,
    "init_warmup": 1,
    "final_warmup": 9,
    "mask_interval": 2,
    "asa_schedule_exponent": 1.0,
}


def base():
    torch.manual_seed(0)
    return Mlp()


def theirs(**fields):
    module = base()
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(module, peft.AdamssConfig(**{**FIELDS, **fields}))


def ours(**fields):
    model, params = fp.functionalize(base())
    net = fp.adapt(model, fp.AdaMSS(**{**FIELDS, **fields}))
    return params, net, fp.peft_init(net, params, 5)


def test_the_update_is_of_rows_by_cluster():
    params, net, adapter = ours()
    gen = torch.Generator().manual_seed(3)
    adapter = adapter.replace(params=tree_map(lambda t: t + 0.3 * torch.randn(t.shape, generator=gen), adapter.params))
    merged, _ = net.merge(params, adapter)
    leaves = adapter.leaves("lin0")
    for position, row in enumerate(leaves["rows"].tolist()):
        k = int(leaves["cluster"][position])
        rank = int(leaves["ranks"][k])
        want = leaves["B"][position, :rank] @ leaves["A"][k, :rank] @ leaves["N"]
        bias = merged["lin0.bias"] - params["lin0.bias"]
        got = torch.cat([merged["lin0.weight"][row] - params["lin0.weight"][row], bias[row, None]])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_every_output_row_is_in_one_cluster():
    _, _, adapter = ours()
    for leaves in adapter.consts.values():
        assert sorted(leaves["rows"].tolist()) == list(range(len(leaves["rows"])))
        assert leaves["cluster"].tolist() == sorted(leaves["cluster"].tolist())


def steps(params, net, adapter, count):
    method = net.methods[0]
    state = method.asa_init(adapter)
    for _ in range(count):
        _, grads = fp.value_and_grad(lambda a: net(params, a, X).square().mean())(adapter)
        grads = method.asa_freeze(grads, state, adapter)
        adapter = adapter.replace(params=tree_map(lambda p, g: p - 0.5 * g, adapter.params, grads))
        state = method.asa_update(grads, state, adapter)
        yield adapter, state


@differs(
    "AdaMSS",
    "the schedule that freezes subspaces keeps one fewer than asked for",
    "as many as the schedule says",
)
def test_the_first_choice_is_pefts_and_one_more():
    params, net, adapter = ours(**ASA)
    *_, (_, state) = steps(params, net, adapter, 3)  # step 2 chooses
    kept = {p: k.tolist() for p, k in state["kept"].items()}
    wrapped = theirs(**ASA)
    for step in range(3):
        wrapped.zero_grad()
        wrapped(X).square().mean().backward()
        with torch.no_grad():
            for p in wrapped.parameters():
                if p.requires_grad:
                    p.sub_(0.5 * p.grad)
        wrapped.base_model.update_and_allocate(step)
    theirs_kept = {
        path: [a.requires_grad for a in wrapped.base_model.model.get_submodule(path).adamss_A["default"]] for path in kept
    }
    total = sum(len(k) for k in kept.values())
    budget = int(3 + (total - 3) * (1 - (2 - 1) / 8))
    assert sum(sum(k) for k in kept.values()) == budget
    assert sum(sum(k) for k in theirs_kept.values()) == budget - 1
    for path in kept:
        assert all(mine or not other for mine, other in zip(kept[path], theirs_kept[path], strict=True))


def test_the_schedule_freezes_for_good_down_to_the_target():
    params, net, adapter = ours(**ASA)
    before, counts = None, []
    for _, state in steps(params, net, adapter, 12):
        kept = {p: k.clone() for p, k in state["kept"].items()}
        if before is not None:
            assert all(bool((before[p] | ~kept[p]).all()) for p in kept)
        counts.append(sum(int(k.sum()) for k in kept.values()))
        before = kept
    assert counts[0] == 8
    assert counts[-1] == 3  # at step 8, the last choice: the whole part of 3 + 5 / 8


def test_frozen_clusters_do_not_move():
    params, net, adapter = ours(**ASA)
    history = list(steps(params, net, adapter, 6))
    (one, state), (two, _) = history[4], history[5]
    for path, kept in state["kept"].items():
        for k, stays in enumerate(kept.tolist()):
            rows = one.consts[path]["cluster"] == k
            same = torch.equal(one.params[path]["A"][k], two.params[path]["A"][k])
            same &= torch.equal(one.params[path]["B"][rows], two.params[path]["B"][rows])
            assert same != stays


def test_the_schedule_vmaps_over_members():
    params, net, _ = ours(**ASA)
    method = net.methods[0]
    ads = [net.init(params, s) for s in range(3)]

    def run(adapter):
        state = method.asa_init(adapter)
        for _ in range(3):
            grads = torch.func.grad(lambda p: net(params, adapter.replace(params=p), X).square().mean())(adapter.params)  # noqa: B023
            grads = method.asa_freeze(grads, state, adapter)
            adapter = adapter.replace(params=tree_map(lambda p, g: p - 0.5 * g, adapter.params, grads))
            state = method.asa_update(grads, state, adapter)
        return state["kept"]

    together = torch.func.vmap(run)(fp.stack(ads))
    for i, one in enumerate(ads):
        for path, kept in run(one).items():
            assert torch.equal(together[path][i], kept)


@differs(
    "AdaMSS",
    "a file of another partition (an edited seed, another base) loads without an error and writes to wrong rows",
    "refused where clusters have other sizes",
)
def test_a_file_of_another_partition(tmp_path):
    params, net, adapter = ours()
    fp.save_peft(net, adapter, tmp_path)
    other = {**params, "lin0.weight": params["lin0.weight"].flip(0) * torch.linspace(0.1, 3, 16)[:, None]}
    with pytest.raises(fp.CheckpointError, match="misshapen"):
        fp.load_peft(net.model, other, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = base()
        module.load_state_dict({k: v for k, v in other.items()})
        back = peft.PeftModel.from_pretrained(module, tmp_path)
    assert back(X).shape == (5, 8)


def test_a_broken_file_is_refused(tmp_path):
    params, net, adapter = ours()
    fp.save_peft(net, adapter, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: t for k, t in tensors.items() if "adamss_A.1" not in k}, path, metadata={"format": "pt"})
    with pytest.raises(fp.CheckpointError, match=r"missing 'base_model.model.lin0.adamss_A.1'"):
        fp.load_peft(net.model, params, tmp_path)


def test_scikit_learn_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r"adamss: its start needs scikit-learn; pip install 'funcpeft\[adamss\]'"):
        clusters(torch.randn(4, 2), 2)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"num_subspaces": 0}, "num_subspaces must be a positive integer"),
        ({"init_weights": "uniform"}, "init_weights must be 'orthogonal' or None"),
        ({"init_warmup": 1000}, "init_warmup must be before final_warmup"),
        ({"asa_schedule_exponent": 0}, "asa_schedule_exponent must be positive"),
    ],
)
def test_fields_are_checked(fields, text):
    with pytest.raises(ValueError, match=text):
        fp.AdaMSS(**fields)


def test_false_stands_for_none():
    assert fp.AdaMSS(init_weights=False).init_weights is None

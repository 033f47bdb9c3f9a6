"""AdaMSS: its clusters, and the schedule that freezes them against peft's."""

from __future__ import annotations

import warnings

import peft
import pytest
import torch
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


@pytest.mark.parametrize("exponent", [1.0, 2.5, 3.0])
@pytest.mark.parametrize(
    ("target", "first", "last", "count"), [(50, 50, 1000, 360), (3, 1, 9, 8), (5, 0, 81, 24), (9, 1, 9, 8)]
)
def test_the_budget_is_pefts_at_every_step(exponent, target, first, last, count):
    fields = {"asa_target_subspaces": target, "init_warmup": first, "final_warmup": last, "asa_schedule_exponent": exponent}
    method, wrapped = fp.AdaMSS(**fields), theirs(**{**ASA, **fields}).base_model
    wrapped._asa_total_subspaces = {"default": count}
    wanted = [min(wrapped._schedule_threshold(step, wrapped.peft_config["default"]), count) for step in range(first, last + 1)]
    assert method.budget(torch.arange(first, last + 1), count).tolist() == wanted


def test_under_an_optimizer_with_momentum_the_schedule_is_pefts(monkeypatch):
    """peft keeps what exceeds the k-th largest score, one cluster fewer than k; here what exceeds the next one."""
    params, net, adapter = ours(**ASA, init_weights=None)
    wrapped = theirs(**ASA, init_weights=None)
    kthvalue = torch.kthvalue
    monkeypatch.setattr(torch, "kthvalue", lambda t, k: kthvalue(t, k + 1))
    options = {"lr": 0.05, "weight_decay": 0.1}
    theirs_opt = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], **options)
    method, opt = net.methods[0], fp.optim.adamw(**options)
    state, moments, counts = method.asa_init(adapter), opt.init(adapter), []
    for step in range(12):
        theirs_opt.zero_grad()
        wrapped(X).square().mean().backward()
        theirs_opt.step()
        wrapped.base_model.update_and_allocate(step)
        _, grads = fp.value_and_grad(lambda a: net(params, a, X).square().mean())(adapter)
        moved, moments = opt.update(method.asa_freeze(grads, state, adapter), moments, adapter)
        adapter = method.asa_hold(moved, state, adapter)
        state = method.asa_update(grads, state, adapter)
        for path, kept in state["kept"].items():
            layer = wrapped.base_model.model.get_submodule(path)
            assert kept.tolist() == [a.requires_grad for a in layer.adamss_A["default"]]
            written = method.to_peft(None, adapter.leaves(path))
            for k in range(len(kept)):
                torch.testing.assert_close(written[f"adamss_A.{k}"], layer.adamss_A["default"][k].detach())
                torch.testing.assert_close(written[f"adamss_B.{k}"], layer.adamss_B["default"][k].detach())
        counts.append(sum(int(k.sum()) for k in state["kept"].values()))
    assert counts[0] == 8
    assert counts[-1] == 3


def test_half_precision_rounds_as_peft_does():
    model, params = fp.functionalize(base().bfloat16())
    net = fp.adapt(model, fp.AdaMSS(**FIELDS))
    adapter = fp.peft_init(net, params, 5)
    module = base().bfloat16()
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(module, peft.AdamssConfig(**FIELDS))
    for path in ("lin0", "lin1"):
        layer, written = wrapped.base_model.model.get_submodule(path), net.methods[0].to_peft(None, adapter.leaves(path))
        assert torch.equal(written["adamss_newB"], layer.adamss_newB["default"].float())
        assert torch.equal(written["adamss_A.0"], layer.adamss_A["default"][0].detach())


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

"""Training a population: every member as if alone, whatever the others do, and bit for bit after an interruption."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
import torch.utils._pytree as pytree
import zoo
from torch import nn
from torch.utils.data import TensorDataset

from funcpeft import checkpoint, optim, rng, train
from funcpeft.adapt import adapt
from funcpeft.batches import Batches
from funcpeft.context import Context
from funcpeft.errors import CheckpointError
from funcpeft.functional import functionalize
from funcpeft.methods import IA3, LoRA, VeRA
from funcpeft.stacking import select, stack, unstack
from funcpeft.tree import Adapter, tree_leaves, tree_map

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
X = zoo.noise(12, 6, seed=3).double()
DATA = (X, torch.tanh(X @ zoo.noise(6, 3, seed=4).double()))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def made():
    torch.manual_seed(0)
    return functionalize(Mlp().double())


MODEL, PARAMS = made()


def net_of(r=2, alpha=4.0, dropout=0.25):
    return adapt(MODEL, LoRA(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=["up", "down"]))


NET = net_of()


def members(count=3):
    """Members of mixed ranks and alphas."""
    return [net_of(r=1 + i % 3, alpha=2.0 + i).init(PARAMS, seed=i) for i in range(count)]


def mse(output, batch):
    return (output - batch[1]).square().mean()


def run(adapters=None, net=NET, data=DATA, loss_fn=mse, params=PARAMS, **given):
    settings = {"optimizer": optim.adamw(lr=0.02), "steps": 6, "batch_size": 4, "seed": 0, "progress": False, **given}
    return train.population(net, params, members() if adapters is None else adapters, data, loss_fn, **settings)


def assert_bits(a, b):
    flat, other = pytree.tree_flatten_with_path(a)[0], pytree.tree_flatten_with_path(b)[0]
    assert [p for p, _ in flat] == [p for p, _ in other]
    for (path, s), (_, t) in zip(flat, other, strict=True):
        assert s.dtype == t.dtype, path
        assert s.shape == t.shape, path
        torch.testing.assert_close(s, t, rtol=0, atol=0, equal_nan=True, msg=pytree.keystr(path))


def storages(tree):
    return {t.untyped_storage().data_ptr() for t in pytree.tree_leaves(tree) if t.numel()}


def member(tree, i):
    return tree_map(lambda t: t[i], tree)


# -- the loop ----------------------------------------------------------------------------------------------------------------


def alone(adapter, lr, weight_decay, own, steps, size):
    """Trains one member in torch's own way: AdamW over the leaves, and batches as the docstring says."""
    leaves = tree_map(lambda t: t.clone().requires_grad_(), adapter.params)
    optimizer = torch.optim.AdamW(tree_leaves(leaves), lr=lr, weight_decay=weight_decay)
    losses, per_epoch = [], len(X) // size
    for t in range(steps):
        epoch, place = divmod(t, per_epoch)
        order = torch.randperm(len(X), generator=rng.generator(rng.fold_in(own, "order"), f"epoch {epoch}"))
        rows = order[place * size : (place + 1) * size]
        context = Context(training=True, seed=rng.fold_in(own, "dropout", t))
        loss = mse(NET(PARAMS, adapter.replace(params=leaves), X[rows], context=context), (None, DATA[1][rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return tree_map(torch.detach, leaves), torch.stack(losses)


@pytest.mark.parametrize("strategy", ["fold", "vmap", "loop"])
def test_every_member_is_trained_as_if_alone(strategy):
    lrs, decays, seeds = [0.01, 0.05, 0.1], [0.0, 0.1, 0.01], [7, 11, -5]
    optimizer = optim.adamw(lr=torch.tensor(lrs), weight_decay=torch.tensor(decays))
    result = run(optimizer=optimizer, seed=seeds, steps=7, strategy=strategy, chunk_size=2)
    for i, (one, after) in enumerate(zip(members(), unstack(result.adapters), strict=True)):
        params, losses = alone(one, torch.tensor(lrs)[i].item(), torch.tensor(decays)[i].item(), seeds[i], 7, 4)
        tree_map(lambda s, t: torch.testing.assert_close(s, t, rtol=1e-9, atol=1e-12), after.params, params)
        torch.testing.assert_close(result.history["loss"][:, i], losses, rtol=1e-10, atol=0)
        assert_bits(after.consts, one.consts)
    assert result.outcomes == ["running"] * 3
    assert result.state.step.tolist() == [7] * 3
    assert (result.step, result.members) == (7, 3)
    torch.testing.assert_close(result.history["lr"], torch.tensor(lrs).double().expand(7, 3), rtol=0, atol=0)


def test_equal_members_with_equal_seeds_are_equal():
    same = [members()[0]] * 3
    result = run(same, seed=[1, 1, 2])
    assert_bits(member(result.adapters.params, 0), member(result.adapters.params, 1))
    assert not torch.equal(*result.history["loss"][:, [0, 2]].T)
    shared = run(same, seed=[1, 1, 2], order=5, training=False)
    assert_bits(shared.history["loss"][:, 0], shared.history["loss"][:, 2])
    other = run(same, seed=[1, 1, 2], order=torch.tensor([5, 6, 5]), training=False)
    torch.testing.assert_close(other.history["loss"][:, [0, 2]], shared.history["loss"][:, [0, 2]])
    assert not torch.equal(other.history["loss"][:, 1], shared.history["loss"][:, 1])


def test_the_same_call_gives_the_same_bits_and_changes_nothing():
    many, data = stack(members()), tuple(t.clone() for t in DATA)
    before = tree_map(torch.clone, (many, PARAMS, data))
    first = run(many, data=data)
    assert_bits((many, PARAMS, data), before)
    assert_bits(run(many, data=data), first)
    assert not storages((many, PARAMS, data)) & storages(first)
    assert not any(t.requires_grad for t in pytree.tree_leaves(first))
    again = run(first, steps=6, seed=None)
    assert_bits(again, first)
    assert not storages(first) & storages(again)


def test_a_tuple_of_adapters_and_a_schedule():
    net = adapt(MODEL, [LoRA(r=2, target_modules=["up"], init_lora_weights=False), IA3(target_modules=["down"])])
    adapters = [net.init(PARAMS, seed=s) for s in range(2)]
    schedule = optim.warmup_cosine(peak=torch.tensor([0.1, 0.2]), warmup=2, steps=8)
    optimizer = optim.chain(optim.clip_by_global_norm(0.5), optim.sgd(lr=schedule))
    result = run(adapters, net, optimizer=optimizer, evaluate=DATA, evaluate_every=3)
    assert isinstance(result.adapters, tuple)
    expected = torch.stack([schedule(torch.tensor([t] * 2)) for t in range(6)])
    torch.testing.assert_close(result.history["lr"], expected.double())
    assert (result.history["evaluation"][1] < result.history["evaluation"][0]).all()


def test_an_optimizer_without_a_learning_rate():
    steps = optim.Transform(
        name="fixed", hyper={}, rule=lambda g, m, a, now: (tree_map(lambda t: -0.1 * t, g), m), descends=True
    )
    assert "lr" not in run(optimizer=optim.chain(steps)).history


def test_a_language_model():
    model, params = zoo.functional("llama", 1)
    net = adapt(model, LoRA(r=2, target_modules=zoo.targets("llama")))
    ids = zoo.ids(6, 5)
    data = {"input_ids": ids, "labels": ids, "weight": torch.ones(6)}

    def loss_fn(output, batch):
        each = nn.functional.cross_entropy(output.logits[:, :-1].mT, batch["labels"][:, 1:], reduction="none")
        return (each.mean(1) * batch["weight"]).mean()

    adapters = [net.init(params, seed=s) for s in range(2)]
    extra = {"inputs": ["input_ids"], "model_kwargs": {"use_cache": False}}
    result = run(adapters, net, data, loss_fn, params, batch_size=3, evaluate=data, evaluate_every=3, **extra)
    assert (result.history["loss"][-1] < result.history["loss"][0]).all()
    for i, one in enumerate(unstack(result.adapters)):
        loss = loss_fn(net(params, one, input_ids=ids), data)
        torch.testing.assert_close(result.history["evaluation"][-1, i], loss.double(), rtol=1e-5, atol=0)
    examples = [{k: t[i] for k, t in data.items()} for i in range(6)]
    assert_bits(run(adapters, net, examples, loss_fn, params, batch_size=3, **extra).history["loss"], result.history["loss"])


# -- leaving -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def computed(monkeypatch):
    """Counts the members of every stack that is computed."""
    counts, plain = [], train.apply_many

    def counting(net, params, stacked, *args, **kwargs):
        counts.append(len(tree_leaves(stacked)[0]))
        return plain(net, params, stacked, *args, **kwargs)

    monkeypatch.setattr(train, "apply_many", counting)
    return counts


def test_a_stopped_member_is_frozen_and_not_computed(computed):
    at = {1: 2, 3: 4}  # member: step at which it stops

    def stop(step, losses):
        assert losses.shape == (5,)
        assert losses.isnan().tolist() == [at.get(i, 9) < step for i in range(5)]
        return torch.tensor([at.get(i) == step for i in range(5)])

    result = run(members(5), evaluate=lambda stacked: torch.ones(len(tree_leaves(stacked)[0])), evaluate_every=2, stop=stop)
    assert computed == [5, 5, 4, 4, 3, 3]
    assert result.outcomes == ["running", "stopped", "running", "stopped", "running"]
    assert result.history["active"].sum(0).tolist() == [6, 2, 6, 4, 6]
    assert result.history["evaluated"].tolist() == [2, 4, 6]
    assert result.history["evaluation"].isnan().sum(0).tolist() == [0, 2, 0, 1, 0]
    for name in ("loss", "lr"):
        assert torch.equal(result.history[name].isnan(), ~result.history["active"])
    assert result.state.step.tolist() == [6, 2, 6, 4, 6]
    short = run(members(5), steps=2)
    assert_bits(member(result.adapters, 1), member(short.adapters, 1))
    assert_bits(member(result.state, 1), member(short.state, 1))
    full = run(members(5))
    for i in (0, 2, 4):
        tree_map(lambda s, t: torch.testing.assert_close(s, t), member(result.adapters, i), member(full.adapters, i))


def test_patience():
    table = iter([[5.0, 5.0, 5.0], [4.0, 4.95, 6.0], [3.0, 4.9, 4.0], [2.0, 4.8]])  # after every step
    result = run(evaluate=lambda stacked: torch.tensor(next(table)), evaluate_every=1, patience=2, min_delta=0.1, steps=4)
    assert result.outcomes == ["running", "stopped", "running"]
    assert result.history["active"].sum(0).tolist() == [4, 3, 4]
    assert result.stopping["best"].tolist() == [2.0, 5.0, 4.0]
    assert result.stopping["waited"].tolist() == [0, 2, 1]


def test_the_run_ends_when_no_member_is_left(computed):
    result = run(evaluate=DATA, evaluate_every=2, stop=lambda step, losses: losses > 0, steps=50)
    assert result.step == 2
    assert result.outcomes == ["stopped"] * 3
    assert_bits(run(result, seed=None, steps=50), result)
    given = [one.replace(params=tree_map(lambda t: t * torch.nan, one.params)) for one in members()]
    lost = run(given, evaluate=DATA, evaluate_every=1)
    assert (lost.step, lost.outcomes, len(lost.history["evaluated"])) == (1, ["diverged"] * 3, 0)
    computed.pop()
    assert computed == [3] * 5  # two steps and an evaluation of three batches


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 1e300])
def test_a_member_that_diverges_harms_no_other(broken):
    given = members(3)
    bad = tree_map(lambda t: torch.full_like(t, broken), given[1].params)
    given[1] = given[1].replace(params=bad)
    result = run(given, evaluate=DATA, evaluate_every=3)
    assert result.outcomes == ["running", "diverged", "running"]
    assert result.history["active"][:, 1].tolist() == [True] + [False] * 5
    assert not result.history["loss"][0, 1].isfinite()
    assert result.losses[1] == torch.inf
    assert_bits(unstack(result.adapters)[1].params, bad)
    others = run([given[0], given[2]], seed=[rng.fold_in(0, "member", i) for i in (0, 2)])
    for i, j in ((0, 0), (2, 1)):
        tree_map(lambda s, t: torch.testing.assert_close(s, t), unstack(result.adapters)[i], unstack(others.adapters)[j])


def test_a_gradient_that_is_not_finite_stops_a_member_before_the_update():
    model, params = functionalize(nn.Sequential(nn.Linear(6, 3, bias=False).double()))
    net, params = adapt(model, LoRA(r=1, target_modules=["0"])), tree_map(torch.zeros_like, params)
    fresh, moved = net.init(params, seed=0), net.init(params, seed=1)
    moved = moved.replace(params=tree_map(torch.ones_like, moved.params))
    result = run([fresh, moved], net, X, lambda out, batch: out.square().sum().sqrt(), params)  # no derivative at 0
    assert result.outcomes == ["diverged", "running"]
    assert result.history["loss"][0, 0] == 0
    assert_bits(member(result.adapters.params, 0), fresh.params)


# -- going on ----------------------------------------------------------------------------------------------------------------

SCHEDULE = """
    import torch
    from funcpeft import optim, train
    import test_train

    def ramp(step):
        return 0.01 * (1 + step) ** 0.5

    def go(adapters, steps, **given):
        rate = optim.warmup_cosine(torch.tensor([0.02, 0.05, 0.05, 1e200], dtype=torch.float64), warmup=2, steps=9)
        optimizer = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(lr=rate, weight_decay=ramp))
        stop = lambda step, losses: torch.tensor([False, step == 3, False, False])
        return test_train.run(
            adapters, optimizer=optimizer, steps=steps, evaluate=test_train.DATA, evaluate_every=3, stop=stop, patience=2,
            **{"save_every": 2, **given},
        )
"""
RECIPE = {}
exec(textwrap.dedent(SCHEDULE).replace("import test_train", f"import {__name__} as test_train"), RECIPE)


def test_a_run_goes_on_bit_for_bit(tmp_path):
    go = RECIPE["go"]
    whole = go(members(4), 10)
    assert whole.outcomes == ["running", "stopped", "running", "diverged"]
    file = tmp_path / "deep" / "run.safetensors"
    for k in (1, 3, 4, 7, 10):
        part = go(members(4), k, checkpoint=file, resume=False)
        assert_bits(train.load(file), part)
        assert_bits(go(part, 10, seed=None), whole)
        assert_bits(go(part, 10), whole)
        assert_bits(go(train.load(file), 10, seed=None), whole)
        assert_bits(go(members(4), 10, checkpoint=file, resume=True), whole)
        assert_bits(train.load(file), whole)
    assert os.listdir(file.parent) == [file.name]


def test_a_run_goes_on_in_another_process(tmp_path):
    file = tmp_path / "run.safetensors"
    RECIPE["go"](members(4), 5, checkpoint=file)
    code = textwrap.dedent(SCHEDULE) + f"torch.set_num_threads({torch.get_num_threads()})\n"
    code += f"go(test_train.members(4), 10, checkpoint={str(file)!r}, resume=True)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    assert_bits(train.load(file), RECIPE["go"](members(4), 10))


def test_a_killed_run_leaves_its_last_checkpoint(tmp_path):
    file, calls = tmp_path / "run.safetensors", []

    def evaluate(stacked):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return torch.zeros(len(tree_leaves(stacked)[0]))

    with pytest.raises(KeyboardInterrupt):
        run(evaluate=evaluate, evaluate_every=1, save_every=2, checkpoint=file)
    assert train.load(file).step == 4
    assert_bits(
        run(evaluate=evaluate, evaluate_every=1, checkpoint=file, resume=True), run(evaluate=evaluate, evaluate_every=1)
    )


def test_members_that_are_selected_go_on():
    rung = run(members(4), optimizer=optim.adamw(lr=torch.tensor([0.01, 0.02, 0.03, 0.04])), steps=4, evaluate=DATA)
    keep = [3, 1]
    chosen = rung.select(keep)
    assert_bits(chosen.adapters, select(rung.adapters, keep))
    assert_bits(chosen, rung.select(torch.tensor(keep)))
    assert_bits(rung.select(torch.tensor([False, True, False, True])), rung.select([1, 3]))
    final = run(chosen, optimizer=optim.adamw(lr=torch.tensor([0.04, 0.02])), seed=None)
    full = run(members(4), optimizer=optim.adamw(lr=torch.tensor([0.01, 0.02, 0.03, 0.04])))
    tree_map(lambda s, t: torch.testing.assert_close(s, t), final.adapters, select(full.adapters, keep))
    torch.testing.assert_close(final.history["loss"], full.history["loss"][:, keep])
    with pytest.raises(ValueError, match=r"Result.select: at least one member is required, of 0 to 3, got \[4\]"):
        rung.select([4])
    with pytest.raises(ValueError, match=r"members must be numbers \(n,\) or a mask \(4,\), got torch.bool of shape \(2,\)"):
        rung.select(torch.tensor([True, False]))


# -- results -----------------------------------------------------------------------------------------------------------------


def test_a_result_prints_draws_and_ranks():
    result = run(members(4), evaluate=DATA, evaluate_every=2, stop=lambda step, losses: losses == losses.nan_to_num(-1).max())
    assert repr(result) == "Result(4 members after 6 steps: 1 running, 3 stopped)"
    last = [column[~column.isnan()][-1] for column in result.history["evaluation"].T]
    assert torch.equal(result.losses, torch.stack(last))
    figure = result.plot()
    assert [axes.get_title() for axes in figure.axes] == ["loss", "evaluation"]
    assert len(figure.legends[0].get_texts()) == 4
    bare = run(steps=2)
    assert torch.equal(bare.losses, bare.history["loss"][-1])
    assert [axes.get_title() for axes in bare.plot().axes] == ["loss"]
    assert result.replace(status=torch.zeros(4, dtype=torch.int64)).outcomes == ["running"] * 4


def test_the_bar_is_shown_if_asked_for(capsys):
    run(progress=True)
    shown = capsys.readouterr().err
    assert "3 x LoRA" in shown
    assert "6/6" in shown
    assert re.search(r"lowest loss \d\.\d{4}, 3 running", shown)
    run(progress=False)
    run()
    assert capsys.readouterr().err == ""


# -- batches -----------------------------------------------------------------------------------------------------------------


def test_an_epoch_holds_every_example_once():
    batches = Batches("data", torch.arange(10), 3, CPU)
    for seed in (0, 1):
        for epoch in range(3):
            drawn = torch.cat([batches.at(3 * epoch + i, [seed])[0] for i in range(3)])
            assert len(set(drawn.tolist())) == 9
    late, early = batches.at(7, [0])[0], batches.at(1, [0])[0]
    assert not torch.equal(late, early)
    assert torch.equal(Batches("data", torch.arange(10), 3, CPU).at(7, [0])[0], late)  # no matter what was drawn before
    stacked, axis = batches.at(2, [0, 1, 0])
    assert axis == 0
    assert torch.equal(stacked, torch.stack([batches.at(2, [s])[0] for s in (0, 1, 0)]))
    assert batches.at(2, [4, 4])[1] is None
    assert [(t.tolist(), n) for t, n in Batches("data", torch.arange(5), 2, CPU).all()] == [([0, 1], 2), ([2, 3], 2), ([4], 1)]


def test_forms_of_data():
    x, y = torch.arange(8.0), torch.arange(8)
    (a, b), _ = Batches("data", (x, y), 3, CPU).at(1, [0])
    for other in (TensorDataset(x, y), list(zip(x, y, strict=True))):
        assert_bits(Batches("data", other, 3, CPU).at(1, [0])[0], (a, b))
    named, _ = Batches("data", {"x": x, "y": y}, 3, CPU).at(1, [0])
    assert_bits(named, {"x": a, "y": b})
    drawn, axis = Batches("data", lambda step, seed: {"x": torch.tensor([step, seed])}, None, CPU).at(3, [5, 6])
    assert (drawn["x"].tolist(), axis) == ([[3, 5], [3, 6]], 0)
    streamed = run(data=lambda step, seed: tuple(t[(step + seed) % 4 :][:4] for t in DATA), batch_size=None, seed=[0, 1, 2])
    assert streamed.history["loss"].isfinite().all()


# -- files -------------------------------------------------------------------------------------------------------------------


def everything():
    vera = adapt(MODEL, VeRA(r=4, target_modules=["up"]))
    many = stack([vera.init(PARAMS, seed=0) for _ in range(50)])
    dtypes = sorted(checkpoint._DTYPES, key=str)
    return {
        "adapters": (stack(members()), many),
        "state": optim.adamw(lr=optim.cosine(torch.tensor([0.1, 0.2, 0.3]), 5)).init(stack(members())),
        "dtypes": [torch.tensor([1, 0, 1]).to(d) for d in dtypes],
        "odd": {"": torch.tensor(2.5), "empty": torch.empty(0, 3), "strided": torch.arange(6).reshape(2, 3).mT},
        "nan": torch.tensor([torch.nan, -0.0, torch.inf]),
        "nothing": {"tuple": (), "dict": {}, "adapter": Adapter()},
        "grad": nn.Parameter(torch.ones(2)),
    }


def test_what_is_saved_is_read_back_bit_for_bit(tmp_path):
    tree, file = everything(), tmp_path / "a"
    same = tree["nan"]
    tree["twice"] = [same, same[:2]]
    train.save(file, tree)
    back = train.load(str(file))
    assert back["adapters"][0].rank_axes == tree["adapters"][0].rank_axes
    assert isinstance(back["state"], optim.State)
    plain = lambda t: {**t, "state": (t["state"].step, t["state"].memory, dict(t["state"].hyper["adamw"]["lr"].values))}  # noqa: E731
    as_bytes = lambda t: t.detach().contiguous().reshape(-1).view(torch.uint8)  # noqa: E731
    flat, other = pytree.tree_flatten(plain(tree)), pytree.tree_flatten(plain(back))
    assert flat[1] == other[1]
    for s, t in zip(flat[0], other[0], strict=True):
        assert (s.dtype, s.shape) == (t.dtype, t.shape)
        assert torch.equal(as_bytes(s), as_bytes(t))
    assert file.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    train.save(tmp_path / "b", tree)
    assert (tmp_path / "b").read_bytes() == file.read_bytes()


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_members_share_is_stored_once(tmp_path):
    model, params = functionalize(nn.Sequential(nn.Linear(64, 64)))
    one = adapt(model, VeRA(r=32, target_modules=["0"])).init(params, seed=0)
    for name, count in (("one", 1), ("many", 200)):
        train.save(tmp_path / name, stack([one] * count))
    bytes_of_params = 199 * sum(t.nbytes for t in tree_leaves(one.params))
    assert (tmp_path / "many").stat().st_size - (tmp_path / "one").stat().st_size < bytes_of_params + 2000
    back = train.load(tmp_path / "many")
    assert_bits(back, stack([one] * 200))
    assert all(t.stride(0) == 0 for leaves in back.consts.values() for t in leaves.values())


def test_a_loaded_state_goes_on_with_the_optimizer(tmp_path):
    adapter = members(1)[0]
    grads = tree_map(torch.ones_like, adapter.params)
    opt = optim.adamw(lr=optim.linear_warmup(0.1, 4))
    after, state = opt.update(grads, opt.init(adapter), adapter)
    train.save(tmp_path / "a", {"adapter": after, "state": (state, [state])})
    back = train.load(tmp_path / "a", optimizer=opt)
    assert_bits(opt.update(grads, back["state"][0], back["adapter"]), opt.update(grads, state, after))
    unbound = train.load(tmp_path / "a")
    with pytest.raises(ValueError, match=r"the formula '_line' is a function and not in the checkpoint"):
        opt.update(grads, unbound["state"][0], after)
    train.save(tmp_path / "b", unbound)
    assert_bits(train.load(tmp_path / "b", optimizer=opt), back)
    with pytest.raises(ValueError, match=r"the optimizer must be that of the state, \['adamw'\].* got Optimizer\(sgd\)"):
        train.load(tmp_path / "a", optimizer=optim.sgd(lr=0.1))
    with pytest.raises(ValueError, match=r"adamw: lr: the optimizer's schedule must be that of the state, _line, got no sched"):
        train.load(tmp_path / "a", optimizer=optim.adamw(lr=0.1))
    train.save(tmp_path / "r", run(steps=1))
    assert_bits(train.load(tmp_path / "r", optimizer=optim.adamw(lr=0.02)), run(steps=1))


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a"
    train.save(file, {"x": torch.zeros(2)})

    def broken(handle):
        raise OSError("disk full")

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="disk full"):
            train.save(file, {"x": torch.ones(2)})
    assert os.listdir(tmp_path) == ["a"]
    assert torch.equal(train.load(file)["x"], torch.zeros(2))
    with monkeypatch.context() as m:
        m.setattr(os, "name", "nt")  # where directories cannot be opened
        m.setattr(os, "open", None)
        checkpoint._sync_directory(tmp_path)


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        (
            {"a": 1.0},
            r"train.save: tree\['a'\]: a tensor, dict, tuple, list, Adapter, optim.State or Result is required, got float",
        ),
        ({"a": [None]}, r"tree\['a'\]\[0\].* got NoneType"),
        ({1: torch.ones(1)}, "tree: keys must be strings, got 1"),
        (Adapter({"s": {"A": "x"}}), r"tree.params\['s'\]\['A'\].* got str"),
        ((torch.ones(1, device="meta"),), r"tree\[0\]: a dense tensor with values is required, got torch.float32, .* on meta"),
        ([torch.ones(1, dtype=torch.complex128)], "a dense tensor with values is required, got torch.complex128"),
        ([torch.eye(2).to_sparse()], "a dense tensor with values is required, got torch.float32, torch.sparse_coo"),
        ([torch.ones(2).as_subclass(type("Odd", (torch.Tensor,), {}))], "a plain tensor is required, got Odd"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path, tree, text):
    with pytest.raises(TypeError, match=text):
        train.save(tmp_path / "a", tree)
    assert not os.listdir(tmp_path)


def damaged(file):
    """Yields damaged forms of a checkpoint with what the message says."""
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for cut in (0, 5, header - 3, header + 1, len(data) - 1):
        yield data[:cut], "a whole safetensors file is required"
    yield data + b"more", "a whole safetensors file is required"
    yield b"\0" * len(data), "a whole safetensors file is required"
    yield b"PK\x03\x04 a pickle, say", "a whole safetensors file is required"
    for at in range(header, len(data), 97):
        yield data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], "content must have the digest that was written with it"
    yield data.replace(b"rank_axes", b"rank_oxes"), "content must have the digest"
    yield data.replace(b'"F64"', b'"I64"', 1), "content must have the digest"
    yield safetensors.torch.save({"A": torch.ones(2)}), "a checkpoint of funcpeft is required, got metadata"
    yield safetensors.torch.save({"A": torch.ones(2)}, {"format": "pt"}), r"got metadata \['format'\]; give a file that"
    for text, says in (
        ("{", "must be JSON"),
        ("[1]", "version 1 is required"),
        ('{"version": 2}', "version 1 is required, got 2"),
    ):
        yield safetensors.torch.save({}, {checkpoint._KEY: text}), says
    for odd in (
        {"odd": 1},
        {"tensor": "7"},
        {"tensor": "0", "times": -3},
        {"dict": [1]},
        {"Adapter": {"params": {"dict": {}}}, "rank_axes": []},
        {"Adapter": {"params": {"dict": {}}, "consts": {"dict": {}}}, "rank_axes": 3},
        {"State": {}},
        {"Result": {"adapters": {"tensor": "0"}}},
        {"tuple": 4},
        None,
    ):
        about, tensors = {"version": 1, "tree": odd}, {"0": torch.ones(2)}
        metadata = json.dumps({**about, "digest": checkpoint._digest(about, tensors)})
        yield safetensors.torch.save(tensors, {checkpoint._KEY: metadata}), "its structure must be one that train.save writes"
    about, tensors = {"version": 1}, {}
    metadata = json.dumps({**about, "digest": checkpoint._digest(about, tensors)})
    yield safetensors.torch.save(tensors, {checkpoint._KEY: metadata}), "its structure must be one that train.save writes"


def test_a_damaged_or_foreign_file_is_refused(tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad file"
    train.save(good, run(members(2), steps=1))
    count = 0
    for data, text in damaged(good):
        bad.write_bytes(data)
        with pytest.raises(CheckpointError, match=text) as e:
            train.load(bad)
        assert str(bad) in str(e.value)
        count += 1
    assert count > 50
    with pytest.raises(FileNotFoundError, match="a checkpoint must be there, got no file"):
        train.load(tmp_path / "absent")
    with pytest.raises(ValueError, match="a file is required, got a directory"):
        train.save(tmp_path, {})


# -- mistakes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ({"steps": 0}, ValueError, "steps must be an int of at least 1, got 0"),
        ({"steps": 2.0}, ValueError, "steps must be an int of at least 1, got 2.0"),
        ({"save_every": 0}, ValueError, "save_every must be an int of at least 1"),
        ({"evaluate_every": True}, ValueError, "evaluate_every must be an int of at least 1, got True"),
        ({"evaluate": DATA, "patience": 0}, ValueError, "patience must be an int of at least 1, got 0"),
        ({"patience": 2}, ValueError, "patience and stop judge evaluations, got evaluate=None; pass held-out data"),
        ({"stop": lambda step, losses: losses > 0}, ValueError, "patience and stop judge evaluations"),
        ({"min_delta": float("nan")}, ValueError, r"min_delta must be a number in \[0, inf\), got nan"),
        ({"min_delta": -1}, ValueError, "min_delta must be a number"),
        ({"optimizer": torch.optim.SGD}, TypeError, "optimizer must be an Optimizer of fp.optim, got type"),
        ({"loss_fn": None}, TypeError, r"loss_fn must be a function of \(output, batch\), got NoneType"),
        ({"net": MODEL}, TypeError, "a Net is required, got Model; make it with adapt"),
        ({"adapters": members()[0]}, ValueError, "adapters must be a list of them or a stack"),
        ({"adapters": []}, ValueError, "a list of at least one adapter is required"),
        ({"adapters": [adapt(MODEL, IA3(target_modules=["up"])).init(PARAMS, seed=0)]}, TypeError, "nothing at 'down'"),
        ({"optimizer": optim.adamw(lr=torch.ones(2))}, ValueError, "every leaf must have a leading axis of 2|must agree on N"),
        ({"seed": None}, ValueError, "seed must be an int, or one int for each member; pass seed=0"),
        ({"seed": [1, 2]}, ValueError, r"seed must be an int of 63 bits, or 3 of them, one for each member, got \[1, 2\]"),
        ({"seed": 2**63}, ValueError, "seed must be an int of 63 bits"),
        ({"seed": True}, ValueError, "seed must be an int of 63 bits"),
        ({"order": [0.5, 1, 2]}, ValueError, "order must be an int of 63 bits"),
        ({"batch_size": 13}, ValueError, "data: batch_size must be an int in 1 to 12, the examples, got 13"),
        ({"batch_size": 0}, ValueError, "batch_size must be an int in 1 to 12"),
        ({"batch_size": None}, ValueError, "batch_size must be an int in 1 to 12, the examples, got None"),
        ({"data": (X[:0], X[:0])}, ValueError, "data: at least one example is required, got 0"),
        ({"data": []}, ValueError, "data: at least one example is required, got 0"),
        ({"data": (X, X[:3])}, ValueError, r"every tensor of data must have as many examples, got \(\(12, 6\), \(3, 6\)\)"),
        ({"data": 3}, TypeError, r"data must be tensors, a sequence of examples or a function of \(step, seed\), got int"),
        ({"data": {}}, TypeError, "a batch must be a tensor, or a mapping or tuple of tensors, got an empty one"),
        ({"data": {"x": 1}}, TypeError, "entry 'x' of a batch must be a tensor of examples, got int"),
        ({"data": (X, torch.ones(()))}, TypeError, r"entry 1 of a batch must be a tensor of examples, got shape \(\)"),
        ({"data": lambda step, seed: DATA}, ValueError, "batch_size must be None where data is a function, got 4"),
        ({"data": lambda step, seed: 1, "batch_size": None}, TypeError, "a batch must be a tensor, .* got int"),
        (
            {"data": lambda step, seed: (X[: 1 + seed],), "batch_size": None, "seed": [0, 1, 2], "order": [0, 1, 2]},
            ValueError,
            r"the batches of step 0 must have one form and shape, got \(\(1, 6\),\) and \(\(2, 6\),\); pad them",
        ),
        ({"data": {"x": X}, "inputs": ["y"]}, KeyError, "inputs must be names of a batch's tensors, got y; known are 'x'"),
        ({"evaluate": DATA[0][:0]}, ValueError, "evaluate: at least one example is required"),
        ({"evaluate": lambda stacked: torch.ones(2), "evaluate_every": 1}, ValueError, "one loss for each of 3 members"),
        (
            {"evaluate": DATA, "evaluate_every": 1, "stop": lambda step, losses: losses},
            ValueError,
            r"stop must return a mask \(3,\) of booleans, got torch.float64 of shape \(3,\)",
        ),
        ({"loss_fn": lambda out, batch: out.mean(0)}, ValueError, r"return the 0-d loss of one member, got .*64 \(3,\)"),
        ({"loss_fn": lambda out, batch: {"loss": out.mean()}}, ValueError, "0-d loss of one member, got dict; reduce it"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be positive"),
        ({"strategy": "fast"}, ValueError, "strategy must be one of"),
    ],
)
def test_mistakes_are_named(given, kind, text):
    with pytest.raises(kind, match=text):
        run(**given)


def test_a_rate_that_is_not_finite_is_refused():
    for bad in (torch.nan, torch.inf, -1.0):
        with pytest.raises(ValueError, match=r"adamw: lr: must be in \[0, inf\)"):
            run(optimizer=optim.adamw(lr=torch.tensor([0.1, bad, 0.1])))


def test_another_run_than_that_of_the_checkpoint_is_refused(tmp_path):
    file = tmp_path / "run"
    result = run(checkpoint=file)
    go = lambda **given: run(**{"checkpoint": file, "resume": True, "steps": 8, **given})  # noqa: E731
    wide = [net_of(r=4).init(PARAMS, seed=s) for s in range(3)]
    other_alpha = [net_of(r=1 + i % 3, alpha=9.0).init(PARAMS, seed=i) for i in range(3)]
    for given, text in (
        ({"resume": None}, "there is a file already, got '.*run'; pass resume=True to go on from it, or resume=False"),
        ({"adapters": members(4)}, r"checkpoint '.*run': adapters must be 3 members, as in the file, got 4"),
        ({"adapters": wide}, r"params\[0\]\['\w+'\]\['[AB]'\] must be as in the run to continue, torch.float64 \(3, .*\), got"),
        ({"adapters": other_alpha}, r"consts.*\['scaling'\] is frozen and must equal that of the run to continue"),
        ({"optimizer": optim.sgd(lr=0.02)}, r"the optimizer must be that of the state, \['adamw'\]"),
        ({"optimizer": optim.adamw(lr=0.03)}, r"adamw: lr must be that of the run to continue, \[0.02, 0.02, 0.02\], got"),
        ({"optimizer": optim.adamw(lr=optim.cosine(0.02, 9))}, "the optimizer's schedule must be that of the state"),
        ({"seed": 1}, "seed must be that of the run to continue, got another"),
        ({"order": 1}, "order must be that of the run to continue, got another"),
        ({"steps": 5}, "steps must be at least the 6 that the run has made, got 5"),
    ):
        with pytest.raises(ValueError, match=text):
            go(**given)
    assert_bits(train.load(file), result)
    for given, text in (
        ({"optimizer": optim.adamw(lr=0.03)}, "optimizer: adamw: lr must be that of the run to continue"),
        ({"seed": 1}, "seed must be that of the run to continue"),
        ({"order": 3}, "order must be that of the run to continue"),
        ({"steps": 5, "seed": None}, "steps must be at least the 6"),
    ):
        with pytest.raises(ValueError, match=text):
            run(**{"adapters": result, **given})
    assert_bits(run(result, seed=None), run(result, seed=None, order=None))
    scheduled = run(optimizer=optim.adamw(lr=optim.cosine(0.02, 9)))
    with pytest.raises(ValueError, match="adamw: lr: steps must be that of the run to continue"):
        run(scheduled, optimizer=optim.adamw(lr=optim.cosine(0.02, 8)), seed=None)
    with pytest.raises(ValueError, match="the file must hold at least the 8 steps of the Result, got 6; give another file"):
        go(adapters=run(result, steps=8, seed=None), seed=None)
    train.save(file, members())
    with pytest.raises(CheckpointError, match=r"a Result of train\.population is required, got list"):
        go()
    file.write_text("no checkpoint")
    with pytest.raises(CheckpointError, match="a whole safetensors file is required"):
        go()


# -- recipes -----------------------------------------------------------------------------------------------------------------


def blocks_of(section):
    text = (ROOT / "docs/populations.md").read_text(encoding="utf-8").split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def recipe(name):
    """Returns a function that a page defines, alone."""
    namespace = {"torch": torch, "fp": __import__("funcpeft")}
    source = next(b for b in blocks_of("Evolution strategies") if f"def {name}" in b).split("\n\n\n")[0]
    exec(compile(source, name, "exec"), namespace)
    return namespace[name]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_evolution_strategies_descend(architecture):
    import funcpeft as fp

    model, params = zoo.functional(architecture, 1)
    net = adapt(model, LoRA(r=2, target_modules=zoo.targets(architecture)))
    ids, evolve = zoo.ids(4, 6), recipe("evolve")

    def loss_fn(logits):
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def go(order):
        weights = params
        for step in range(25):

            def losses_of(stacked, weights=weights, step=step):
                out = fp.apply_many(net, weights, stacked, input_ids=ids, use_cache=False, in_dims=None)
                losses = torch.func.vmap(loss_fn)(out.logits)
                return losses if order is None else order(losses, step)

            weights, _ = evolve(net, weights, losses_of, sigma=0.02, lr=0.01, pairs=16, seed=step)
        return float(loss_fn(model(weights, input_ids=ids).logits))

    before = float(loss_fn(model(params, input_ids=ids).logits))
    shuffled = lambda losses, step: losses[torch.randperm(32, generator=torch.Generator().manual_seed(step))]  # noqa: E731
    chance = abs(go(shuffled) - before)
    assert before - go(None) > max(0.2, 3 * chance)


def test_one_step_of_evolution_strategies_is_the_formula():
    net = adapt(MODEL, LoRA(r=2, target_modules=["up", "down"]))
    seen = {}

    def losses_of(stacked):
        seen["many"] = stacked
        return torch.tensor([0.3, 0.1, 0.4, 0.2, 0.6, 0.5], dtype=torch.float64)  # ranks 2 0 3 1 5 4

    merged, _ = recipe("evolve")(net, PARAMS, losses_of, sigma=0.1, lr=0.5, pairs=3, seed=0)
    fitness = [0.5 - rank / 5 for rank in (2, 0, 3, 1, 5, 4)]
    for path in ("up", "down"):
        leaves = seen["many"].leaves(path)
        perturbations = leaves["scaling"][:, None, None] * (leaves["B"] @ leaves["A"]) / 0.1  # E, then -E
        assert torch.equal(perturbations[:3], -perturbations[3:])
        step = sum(f * e for f, e in zip(fitness, perturbations, strict=True)) * 0.5 / (6 * 0.1)
        torch.testing.assert_close(merged[f"{path}.weight"].double() - PARAMS[f"{path}.weight"], step, rtol=1e-10, atol=1e-13)


def test_successive_halving():
    rates = torch.logspace(-6, -1, 8)
    half = lambda step, losses: losses > losses.nanmedian()  # noqa: E731
    result = run(
        [members(1)[0]] * 8, optimizer=optim.adamw(lr=rates), evaluate=DATA, evaluate_every=4, stop=half, steps=12, order=0
    )
    assert result.history["active"].sum(1).tolist() == [8] * 4 + [4] * 4 + [2] * 4
    assert int(result.losses.argmin()) in result.status.eq(0).nonzero()
    full = run([members(1)[0]] * 8, optimizer=optim.adamw(lr=rates), evaluate=DATA, evaluate_every=12, steps=12, order=0)
    assert result.losses.argmin() == full.losses.argmin()

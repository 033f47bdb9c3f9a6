"""Poly against peft on whole models, its gates, and calls that the laws do not make; rows/poly.py has the files."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
import zoo
from torch import nn

import funcpeft as fp
from funcpeft.methods.poly import EPS

IDS = zoo.ids(4, 5)
TASKS = torch.tensor([2, 0, 1, 2])


def given(tasks, **fields):
    return fp.Context(values={"task_ids": torch.as_tensor(tasks)}, **fields)


def small(**fields):
    """Returns params, net and an adapter of one layer whose leaves are all drawn."""
    model, params = fp.functionalize(nn.Sequential(nn.Linear(6, 4)).double())
    net = fp.adapt(model, fp.Poly(r=2, n_tasks=3, target_modules=["0"], init_weights=False, **fields))
    adapter = net.init(params, 1)
    z = 2 * zoo.noise(*adapter.params["0"]["Z"].shape).double()
    return params, net, adapter.replace(params={"0": {**adapter.params["0"], "Z": z}})


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Returns peft's model with drawn weights, and params, net and adapter read from its file."""
    folder = tmp_path_factory.mktemp("poly")
    config = peft.PolyConfig(
        task_type="CAUSAL_LM",
        r=3,
        n_tasks=3,
        n_splits=2,
        n_skills=3,
        init_weights=False,
        target_modules=["q_proj", "down_proj"],
    )
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(zoo.model("llama")).double(), config).eval()
        with torch.no_grad():
            for name, p in theirs.named_parameters():
                if "poly" in name:
                    p.add_(0.3 * torch.randn_like(p))
        theirs.save_pretrained(folder)
    model, params = fp.functionalize(copy.deepcopy(zoo.model("llama")).double())
    net, adapter = fp.load_peft(model, params, folder)
    return theirs, params, net, adapter


def test_forward_and_gradient_are_pefts(llama):
    theirs, params, net, adapter = llama
    want = theirs(input_ids=IDS, task_ids=TASKS).logits
    got = net(params, adapter, input_ids=IDS, context=given(TASKS)).logits
    assert (got - want).abs().max() < 1e-5
    assert (got - net(params, adapter, input_ids=IDS, context=given([0] * 4)).logits).abs().max() > 1e-3

    def loss(p):
        return net(params, adapter.replace(params=p), input_ids=IDS, context=given(TASKS)).logits.square().sum()

    grads = torch.func.grad(loss)(adapter.params)
    theirs.zero_grad()
    want.square().sum().backward()
    for path, leaves in grads.items():
        layer = theirs.base_model.model.get_submodule(path)
        references = {"A": layer.poly_lora_A["default"], "B": layer.poly_lora_B["default"]}
        references["Z"] = layer.poly_router["default"].module_logits
        for name, p in references.items():
            assert (leaves[name] - p.grad).abs().max() < 1e-4 * (1 + p.grad.abs().max())


def test_generate_is_pefts_and_takes_beams(llama):
    theirs, params, net, adapter = llama
    options = {"max_new_tokens": 4, "do_sample": False}
    got = net.call("generate", params, adapter, input_ids=IDS, context=given(TASKS), **options)
    assert torch.equal(got, theirs.generate(input_ids=IDS, task_ids=TASKS, **options))
    beams = net.call("generate", params, adapter, input_ids=IDS, context=given(TASKS), num_beams=2, **options)
    for row in range(4):
        ids, context = IDS[row : row + 1], given(TASKS[row : row + 1])
        one = net.call("generate", params, adapter, input_ids=ids, context=context, num_beams=2, **options)
        assert torch.equal(beams[row : row + 1, : one.shape[1]], one)


def test_output_is_that_of_one_mixture_per_row():
    params, net, adapter = small(n_splits=2)
    leaves, x = adapter.params["0"], zoo.noise(4, 3, 6).double()
    want = []
    for row, task in enumerate(TASKS):
        w = torch.sigmoid(leaves["Z"][task].view(2, 4))
        w = w / w.sum(-1, keepdim=True)
        a = torch.cat([sum(w[q, k] * leaves["A"][q, k] for k in range(4)) for q in range(2)], 0)
        b = torch.cat([sum(w[q, k] * leaves["B"][q, k] for k in range(4)) for q in range(2)], 1)
        want.append(x[row] @ (params["0.weight"].mT + a @ b / 2) + params["0.bias"])
    got = net(params, adapter, x, context=given(TASKS))
    assert (got - torch.stack(want)).abs().max() < 1e-12
    flat = net(params, adapter, x.flatten(0, 1), context=given(TASKS))
    assert (flat.view_as(got) - got).abs().max() < 1e-12
    assert (net(params, adapter, x[:, 0], context=given(TASKS)) - got[:, 0]).abs().max() < 1e-12
    assert (net(params, adapter, x[:, None], context=given(TASKS))[:, 0] - got).abs().max() < 1e-12


def test_training_gates_are_draws_of_a_relaxed_bernoulli_by_row():
    _, net, adapter = small()
    method, leaves = net.methods[0], adapter.params["0"]
    rows = 20000
    context = given(torch.zeros(rows, dtype=torch.int64), training=True, seed=3).at(7)
    w = method.gates(leaves, context.value("task_ids"), context)
    assert w.shape == (rows, 1, 4)
    assert (w.sum(-1) - 1).abs().max() < 1e-9
    assert torch.equal(w, method.gates(leaves, context.value("task_ids"), context))
    assert not torch.equal(w, method.gates(leaves, context.value("task_ids"), context.at(8)))
    torch.manual_seed(0)
    draws = torch.distributions.RelaxedBernoulli(1.0, logits=leaves["Z"][0].expand(rows, 4)).sample()
    draws = draws / (draws.sum(-1, keepdim=True) + EPS)
    for q in (0.1, 0.5, 0.9):
        assert (w[:, 0].quantile(q, 0) - draws.quantile(q, 0)).abs().max() < 0.02


def test_a_router_alone_can_be_trained():
    params, net, adapter = small()
    x, context = zoo.noise(4, 3, 6).double(), given(TASKS, training=True, seed=1)

    def out(z):
        leaves = {**adapter.params["0"], "Z": z}
        return net(params, adapter.replace(params={"0": leaves}), x, context=context)

    assert torch.autograd.gradcheck(out, adapter.params["0"]["Z"].clone().requires_grad_())


def test_tasks_must_be_those_of_the_rows():
    params, net, adapter = small()
    x = torch.ones(4, 3, 6, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"context: the call needs the value 'task_ids', got none; pass context=Context\(values"
    ):
        net(params, adapter, x)
    for odd in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match=r"poly at '0': task_ids must be in \[0, 3\), got"):
            net(params, adapter, x, context=given(odd))
    for narrow in (torch.uint8, torch.int8, torch.int16):
        ids = torch.tensor([1, 1, 0, 2], dtype=narrow)
        values = fp.Context(values={"task_ids": ids})
        assert torch.equal(net(params, adapter, x, context=values), net(params, adapter, x, context=given([1, 1, 0, 2])))
    for odd in ([True] * 4, [1j] * 4, [0.0], [[0, 1]], [0, 1, 2], []):
        with pytest.raises(
            ValueError, match=r"poly at '0': task_ids must be integers \(rows,\), one for each row of the input"
        ):
            net(params, adapter, x, context=given(odd))
    with pytest.raises(ValueError, match="task_ids must be integers"):
        net(params, adapter, x[0, 0], context=given([0]))
    with pytest.raises(fp.errors.NoMergedFormError, match="poly"):
        net.merge(params, adapter)


def test_values_that_a_transform_hides_are_not_checked():
    params, net, adapter = small()
    x, tasks = zoo.noise(3, 2, 5, 6).double(), torch.tensor([[0, 1], [2, 2], [1, 0]])
    got = torch.func.vmap(lambda x, t: net(params, adapter, x, context=fp.Context(values={"task_ids": t})))(x, tasks)
    for i in range(3):
        assert (got[i] - net(params, adapter, x[i], context=given(tasks[i]))).abs().max() < 1e-12
    run = torch.compile(
        lambda x, t: net(params, adapter, x, context=fp.Context(values={"task_ids": t})), fullgraph=True, backend="aot_eager"
    )
    assert (run(x[0], tasks[0]) - got[0]).abs().max() < 1e-12


def test_members_may_differ_in_rank():
    params, net, adapter = small()
    wide = fp.adapt(net.model, fp.Poly(r=5, n_tasks=3, target_modules=["0"], init_weights=False)).init(params, 4)
    many, x = fp.stack([adapter, wide]), zoo.noise(4, 3, 6).double()
    got = fp.apply_many(net, params, many, x, in_dims=None, context=given(TASKS))
    assert (got[0] - net(params, adapter, x, context=given(TASKS))).abs().max() < 1e-12
    assert (got[1] - net(params, wide, x, context=given(TASKS))).abs().max() < 1e-12


def test_a_file_holds_the_rank_of_the_adapter(tmp_path):
    params, net, _ = small()
    wide = fp.adapt(net.model, fp.Poly(r=5, n_tasks=3, target_modules=["0"])).init(params, 4)
    fp.save_peft(net, wide, tmp_path)
    back, read = fp.load_peft(net.model, params, tmp_path)
    assert back.methods[0].r == 5
    assert torch.equal(read.params["0"]["A"], wide.params["0"]["A"])


def test_fields_that_do_not_fit():
    for field in ("r", "n_tasks", "n_skills", "n_splits"):
        with pytest.raises(ValueError, match=f"poly: {field} must be a positive integer, got 0"):
            fp.Poly(**{field: 0})
    with pytest.raises(ValueError, match="poly: poly_type must be 'poly', got 'mhr'"):
        fp.Poly(poly_type="mhr")
    model, _ = fp.functionalize(nn.Sequential(nn.Linear(6, 4)))
    with pytest.raises(ValueError, match="poly at '0': n_splits must divide the 6 inputs and the 4 outputs, got 3"):
        fp.adapt(model, fp.Poly(n_splits=3, target_modules=["0"]))

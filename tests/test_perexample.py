"""Gradients of single examples against a loop over batches of one row, by plain autograd."""

import dataclasses
import math

import pytest
import torch
import zoo
from torch import Tensor, nn

import funcpeft as fp
from funcpeft import factors
from funcpeft.context import Context
from funcpeft.functional import functionalize
from funcpeft.perexample import clipped_grads, per_example_grads, per_example_norms
from funcpeft.testing.cases import Case, perturbed
from funcpeft.tree import as_tuple, tree_leaves, tree_map

METHODS = [cls for name in sorted(fp.__all__) if isinstance(cls := getattr(fp, name), type) and issubclass(cls, fp.Method)]
EXAMPLES = [m for cls in METHODS if cls not in (fp.Method, fp.Additive) for m in cls.examples()]
FACTORED = [m for m in EXAMPLES if m.factored]


def by_loop(net, params, adapter, loss_fn, args=(), kwargs=None, targets=None):
    """The oracle: every row by itself, forward and backward of torch.autograd."""
    kwargs = kwargs or {}
    tensors = [*args, *(v for v in kwargs.values() if isinstance(v, Tensor))]
    losses, grads = [], []
    cut = lambda t, i: t[i : i + 1] if isinstance(t, Tensor) else t  # noqa: E731
    for i in range(tensors[0].shape[0]):
        tracked = tree_map(lambda t: t.detach().clone().requires_grad_(), tuple(a.params for a in as_tuple(adapter)))
        made = tuple(a.replace(params=p) for a, p in zip(as_tuple(adapter), tracked, strict=True))
        made = made if isinstance(adapter, tuple) else made[0]
        out = net(params, made, *(cut(t, i) for t in args), **{k: cut(v, i) for k, v in kwargs.items()})
        loss = (loss_fn(out) if targets is None else loss_fn(out, cut(targets, i))).squeeze(0)
        found = torch.autograd.grad(loss, tree_leaves(tracked), allow_unused=True, materialize_grads=True)
        losses.append(loss.detach())
        grads.append(found)
    return torch.stack(losses), [torch.stack(g) for g in zip(*grads, strict=True)]


def norms_of(grads: list[Tensor]) -> Tensor:
    return torch.stack([g.double().reshape(g.shape[0], -1).square().sum(1) for g in grads]).sum(0).sqrt()


def assert_law(net, params, adapter, loss_fn, args=(), kwargs=None, targets=None, *, methods=("closed",), eps=None, **options):
    """Losses, gradients and norms by each method equal the loop's, within rounding."""
    losses, grads = by_loop(net, params, adapter, loss_fn, args, kwargs, targets)
    norms = norms_of(grads)
    eps = 1e-11 if eps is None else eps
    for method in methods:
        given = {"targets": targets, "method": method, **options, **(kwargs or {})}
        got_losses, got = per_example_grads(net, params, adapter, loss_fn, *args, **given)
        torch.testing.assert_close(got_losses, losses, rtol=eps, atol=eps)
        for g, want in zip(tree_leaves(got), grads, strict=True):
            assert g.dtype == want.dtype
            assert not g.requires_grad
            torch.testing.assert_close(g, want, rtol=0, atol=eps * max(1e-3, float(norms.max())))
        again, found = per_example_norms(net, params, adapter, loss_fn, *args, **given)
        torch.testing.assert_close(again, got_losses, rtol=eps, atol=eps)
        torch.testing.assert_close(found.double(), norms, rtol=2 * eps, atol=2 * eps * float(norms.max()))
    assert norms.min() > 0


def weighted(outs) -> Tensor:
    """One loss per example of all outputs of a case's pair of layers."""
    flat = torch.cat([o.flatten(1) for o in outs], 1)
    return (flat - torch.linspace(0.5, 1.5, flat.shape[1], dtype=flat.dtype)).square().sum(1)


# -- every method that has a closed form, on every kind of layer -------------------------------------------------------------


#: Kind, out, in, bias and geometry (dims, kernel, stride, padding, dilation, groups) of the layers.
LAYERS = (
    *(
        ("linear", 4, 6, True, None),
        ("linear", 6, 4, False, None),
        ("transposed", 8, 4, True, None),
        ("embedding", 4, 6, True, None),
    ),
    *(
        ("conv", 4, 2, True, (2, 3, 2, 1, 1, 1)),
        ("conv", 2, 4, False, (1, 2, 1, 1, 2, 1)),
        ("conv", 4, 4, True, (2, 2, 1, 0, 1, 2)),
    ),
)


def label(method):
    changed = [f"{f.name}={v!r}" for f in dataclasses.fields(method) if (v := getattr(method, f.name)) != f.default]
    return f"{type(method).__name__}({', '.join(changed)})"


@pytest.mark.parametrize("method", FACTORED, ids=label)
def test_closed_forms_are_exact(method):
    for kind, out, in_, bias, geometry in LAYERS:
        case = Case(method, kind, out, in_, bias, geometry=geometry or Case.geometry)
        if kind not in method.kinds or not case.fits():
            continue
        built = case.built()
        x = built.x
        if kind == "embedding":
            x = torch.stack([x[0], x[0].flip(0), x[0] // 2])
        elif kind != "conv":
            x = torch.stack([x, x.cos(), 2 * x], 1)
        assert_law(built.net, built.params, built.adapter(), weighted, (x,), methods=("closed", "vmap"))


def test_some_methods_have_closed_forms():
    assert {type(m) for m in FACTORED} >= {fp.LoRA, fp.DoRA, fp.IA3, fp.VeRA, fp.TrainableTokens}


def test_a_class_that_changes_the_formula_must_restate_its_factors():
    class Scaled(fp.LoRA):
        def apply(self, leaves, base, x, context):
            return 2 * super().apply(leaves, base, x, context)

    class Named(fp.LoRA):
        pass

    assert Named().factored
    assert not Scaled().factored
    assert not fp.Full().factored


# -- models ------------------------------------------------------------------------------------------------------------------


def zoo_net(name, *methods, dtype=torch.float64):
    model, params = zoo.functional(name)
    params = {k: v.to(dtype) if v.is_floating_point() else v for k, v in params.items()}
    methods = methods or (fp.LoRA(r=3, use_rslora=True, target_modules=zoo.targets(name), rank_pattern={"1.*": 2}),)
    net = fp.adapt(model, list(methods))
    return net, params, perturbed(net.init(params, seed=0), 1, 0.1)


def wave(out, targets: Tensor) -> Tensor:
    return (zoo.leading(out).flatten(1).sin() * targets[:, :1]).mean(1)


TARGETS = zoo.noise(3, 4).double()


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("llama", ("closed", "vmap", "auto")),
        ("gpt2", ("closed", "loop", "auto")),
        ("bert", ("closed", "vmap", "loop")),
        ("opt", ("closed",)),
        ("t5", ("closed", "vmap")),
        ("vit", ("closed", "vmap")),
        ("whisper", ("closed",)),
        ("mamba", ("auto",)),  # its kernel reads a weight, and runs under no vmap
    ],
)
def test_models(name, methods):
    net, params, adapter = zoo_net(name)
    kwargs = {k: v.double() if v.is_floating_point() else v for k, v in zoo.inputs(name, 3).items()}
    assert_law(net, params, adapter, wave, (), kwargs, TARGETS, methods=methods)


def next_token(out, labels: Tensor) -> Tensor:
    """The mean cross-entropy of every row over its own tokens, those labelled -100 left out."""
    logits, goal = out.logits[:, :-1], labels[:, 1:]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), goal, reduction="none", ignore_index=-100)
    return each.sum(1) / (goal >= 0).sum(1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padded_rows(name):
    net, params, adapter = zoo_net(name)
    ids = zoo.ids(3, 6)
    mask = torch.arange(6) < torch.tensor([[6], [4], [2]])
    labels = torch.where(mask, ids, -100)
    kwargs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    assert_law(net, params, adapter, next_token, (), kwargs, labels)
    torch.testing.assert_close(
        per_example_norms(net, params, adapter, next_token, targets=labels, **kwargs)[1],
        per_example_norms(net, params, adapter, next_token, targets=labels, method="loop", **kwargs)[1],
    )


def test_a_layer_met_several_times():
    from transformers import AlbertConfig, AlbertModel

    sizes = {"vocab_size": 96, "embedding_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    module = AlbertModel(AlbertConfig(**sizes, num_hidden_layers=3)).double()
    model, params = functionalize(module)
    net = fp.adapt(
        model,
        [
            fp.LoRA(r=2, target_modules=["query", "word_embeddings"]),
            fp.IA3(target_modules=["ffn"], feedforward_modules=["ffn"]),
        ],
    )
    adapter = perturbed(net.init(params, 0), 1, 0.1)
    assert_law(net, params, adapter, wave, (), {"input_ids": zoo.ids(3)}, TARGETS, methods=("closed", "vmap"))


def test_several_methods_at_one_site():
    llama = zoo_net("llama")[0].model
    quarter = fp.LoRA(r=2, target_modules=["q_proj"])
    for methods in (
        (
            quarter,
            fp.IA3(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
            fp.LoRA(r=1, target_modules=["q_proj"]),
        ),
        (fp.IA3(target_modules=["q_proj"], feedforward_modules=["q_proj"]), quarter),
        (quarter, quarter),
    ):
        net, params, adapter = zoo_net("llama", *methods)
        assert net.model is llama
        assert_law(net, params, adapter, wave, (), zoo.inputs("llama", 3), TARGETS)
    net, params, adapter = zoo_net("llama", quarter, fp.DoRA(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"lora at 'model.layers.0.self_attn.q_proj': .*something else than its layer reads"):
        per_example_grads(net, params, adapter, wave, targets=TARGETS, method="closed", **zoo.inputs("llama", 3))
    assert_law(net, params, adapter, wave, (), zoo.inputs("llama", 3), TARGETS, methods=("auto",))


def test_layers_trained_in_full():
    gpt2 = fp.LoRA(r=2, target_modules=["c_attn"], bias="lora_only", modules_to_save=["mlp.c_proj"])
    net, params, adapter = zoo_net("gpt2", gpt2)
    assert len(adapter) == 3
    assert_law(net, params, adapter, wave, (), zoo.inputs("gpt2", 3), TARGETS)
    net, params, adapter = zoo_net("bert", fp.IA3(target_modules=["query"], modules_to_save=["output.dense"]))
    assert_law(net, params, adapter, wave, (), zoo.inputs("bert", 3), TARGETS, methods=("closed", "vmap"))
    net, params, adapter = zoo_net("bert", fp.LNTuning(target_modules=["LayerNorm"]))
    with pytest.raises(ValueError, match=r"lntuning at 'embeddings.LayerNorm.weight': .* no closed form, the method gives no"):
        per_example_norms(net, params, adapter, wave, targets=TARGETS, method="closed", **zoo.inputs("bert", 3))
    assert_law(net, params, adapter, wave, (), zoo.inputs("bert", 3), TARGETS, methods=("auto",))


@pytest.mark.parametrize("fmt", [fp.NF4(block_size=32), fp.Int8()], ids=str)
def test_quantized_bases(fmt):
    model, params = zoo.functional("llama")
    stored = fp.quantize(model, params, fmt, target_modules="all-linear")
    stored = {
        k: v.to(dtype=torch.float64) if not isinstance(v, Tensor) or v.is_floating_point() else v for k, v in stored.items()
    }
    net = fp.adapt(
        model,
        [fp.LoRA(r=2, target_modules="all-linear"), fp.IA3(target_modules=["down_proj"], feedforward_modules=["down_proj"])],
    )
    adapter = perturbed(net.init(stored, 0), 1, 0.1)
    assert_law(net, stored, adapter, wave, (), zoo.inputs("llama", 3), TARGETS, methods=("closed", "vmap"))


def test_half_precision_bases():
    net, params, adapter = zoo_net("llama", dtype=torch.bfloat16)
    assert {t.dtype for t in tree_leaves(adapter.params)} == {torch.float32}
    loss = lambda out: zoo.leading(out).float().square().flatten(1).mean(1)  # noqa: E731
    eps = 4 * torch.finfo(torch.bfloat16).eps * math.sqrt(32)  # an entry is a sum over 32 features, rounded in bfloat16
    assert_law(net, params, adapter, loss, (), zoo.inputs("llama", 3), methods=("closed", "vmap"), eps=eps)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in params.items()}
    exact = per_example_grads(
        net, wide, tree_map(lambda t: t.double() if t.is_floating_point() else t, adapter), loss, **zoo.inputs("llama", 3)
    )
    for g, want in zip(
        tree_leaves(per_example_grads(net, params, adapter, loss, **zoo.inputs("llama", 3))[1]),
        tree_leaves(exact[1]),
        strict=True,
    ):
        assert (g - want).norm() <= eps * 8 * want.norm()


# -- inputs ------------------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """Takes features, a scale that all examples share, and a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.spare = nn.Linear(5, 7), nn.Linear(7, 4), nn.Linear(7, 4)

    def forward(self, x: Tensor, scale: Tensor | None = None, *, double: bool = False) -> Tensor:
        hidden = torch.tanh(self.up(x))
        self.spare(hidden)
        out = self.down(hidden) * (1 if scale is None else scale)
        return 2 * out if double else out


def made(module: nn.Module | None = None, *methods, targets=("up", "down", "spare")):
    torch.manual_seed(0)
    model, params = functionalize((module or Mlp()).double())
    net = fp.adapt(model, list(methods) or fp.LoRA(r=2, target_modules=list(targets), lora_bias=True))
    return net, params, perturbed(net.init(params, seed=0), 1, 0.3)


def squares(out: Tensor) -> Tensor:
    return out.square().flatten(1).sum(1)


X = torch.linspace(-2, 2, 40, dtype=torch.float64).reshape(4, 2, 5).sin()
ROUTES = ("closed", "vmap", "loop")


def test_inputs_with_and_without_examples():
    net, params, adapter = made()
    scale = torch.linspace(1, 2, 4, dtype=torch.float64)
    expected = by_loop(net, params, adapter, lambda out: squares(2 * scale * out), (X,))
    moved = X.movedim(0, 1)

    class Moved(Mlp):
        def forward(self, x, scale=None, *, double=False):
            return super().forward(x.movedim(1, 0), scale, double=double)

    other = made(Moved())[0]
    for method in ROUTES:
        dims = {"method": method, "batch_dims": ((0, None), 0)}
        losses, grads = per_example_grads(net, params, adapter, squares, X, scale, double=True, **dims)
        torch.testing.assert_close([losses, *tree_leaves(grads)], [expected[0], *expected[1]])
        dims["batch_dims"] = ((1, None), {})
        losses, grads = per_example_grads(other, params, adapter, squares, moved, scale, double=True, **dims)
        torch.testing.assert_close([losses, *tree_leaves(grads)], [expected[0], *expected[1]])
    assert tree_leaves(grads)[0].shape[0] == 4
    assert not torch.stack([t.abs().max() for t in grads["spare"].values()]).any()


def test_an_input_with_one_row_is_shared():
    net, params, adapter = made()
    scale = torch.linspace(1, 2, 4, dtype=torch.float64)
    wanted = by_loop(net, params, adapter, lambda out: squares(out * scale), (X,))
    for method in ROUTES:
        losses, grads = per_example_grads(net, params, adapter, squares, X, scale[None, None], method=method)
        torch.testing.assert_close([losses, *tree_leaves(grads)], [wanted[0], *wanted[1]])


def test_one_example_and_one_position():
    net, params, adapter = made()
    for x in (X[:1], X[:, 0], X[:1, 0]):
        assert_law(net, params, adapter, squares, (x,), methods=ROUTES)


def test_a_tree_of_targets():
    net, params, adapter = made()
    loss = lambda out, t: ((out - t["y"]) ** 2).sum((1, 2)) * t["w"][0]  # noqa: E731
    y, w = X[..., :4].cos(), torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=torch.float64)
    wanted = by_loop(
        net,
        params,
        adapter,
        lambda out, t: ((out - t[:, :, :4]) ** 2).sum((1, 2)) * t[:, 0, 4],
        (X,),
        None,
        torch.cat([y, w[:, None, None].expand(4, 2, 1)], 2),
    )
    for method in ROUTES:
        found = per_example_grads(net, params, adapter, loss, X, targets={"y": y, "w": [w]}, method=method)
        torch.testing.assert_close([found[0], *tree_leaves(found[1])], [wanted[0], *wanted[1]])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_nothing_given_is_touched(mode):
    net, params, adapter = made()
    before = tree_map(torch.clone, adapter)
    adapter.params["up"]["A"].requires_grad_()
    x, weight = X.clone().requires_grad_(), params["up.weight"].requires_grad_()
    for method in ROUTES:
        with mode():
            found = per_example_grads(net, params, adapter, squares, x, method=method)
            norms = per_example_norms(net, params, adapter, squares, x, method=method)
            clipped = clipped_grads(net, params, adapter, squares, x, max_norm=0.1, method=method)
        assert not any(t.requires_grad for t in tree_leaves((found, norms, clipped)))
    assert x.grad is None
    assert weight.grad is None
    assert adapter.params["up"]["A"].grad is None
    tree_map(lambda a, b: torch.testing.assert_close(a.detach(), b, rtol=0, atol=0), adapter, before)


def test_inside_transforms():
    net, params, adapter = made()
    members = [perturbed(adapter, s, 0.2) for s in range(2)]
    f = lambda a, x: per_example_norms(net, params, a, squares, x)  # noqa: E731
    many = torch.func.vmap(f, in_dims=(0, None))(fp.stack(members), X)
    for i, one in enumerate(members):
        torch.testing.assert_close([t[i] for t in many], list(f(one, X)))
    with pytest.raises(ValueError, match=r"the closed form is for calls outside of torch.func and torch.compile"):
        torch.func.vmap(lambda a: per_example_norms(net, params, a, squares, X, method="closed"))(fp.stack(members))


def test_models_that_compile():
    net, params, adapter = made()
    torch._dynamo.reset()
    f = torch.compile(lambda a, x: per_example_norms(net, params, a, squares, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(f(adapter, X), per_example_norms(net, params, adapter, squares, X))


# -- training ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [
        fp.LoRA(r=2, lora_dropout=0.4, target_modules=["up", "down"]),
        fp.DoRA(r=2, lora_dropout=0.4, target_modules=["up", "down"]),
        fp.VeRA(r=3, vera_dropout=0.4, target_modules=["up", "down"]),
    ],
    ids=label,
)
def test_draws_are_those_of_the_batch(method):
    net, params, adapter = made(None, method)
    context = Context(training=True, seed=5)
    whole = fp.value_and_grad(lambda a: squares(net(params, a, X, context=context)).sum())(adapter)
    losses, grads = per_example_grads(net, params, adapter, squares, X, context=context)
    torch.testing.assert_close(losses.sum(), whole[0])
    tree_map(lambda g, w: torch.testing.assert_close(g.sum(0), w), grads, whole[1])
    norms = per_example_norms(net, params, adapter, squares, X, context=context)[1]
    torch.testing.assert_close(norms, norms_of(tree_leaves(grads)))
    clipped = clipped_grads(net, params, adapter, squares, X, max_norm=1e9, context=context)
    tree_map(torch.testing.assert_close, clipped[2], whole[1])
    with pytest.raises(ValueError, match=r"draws of a training context .* closed form can follow, got method 'vmap'; pass no"):
        per_example_grads(net, params, adapter, squares, X, context=context, method="vmap")


def test_clipping():
    net, params, adapter = made()
    losses, grads = per_example_grads(net, params, adapter, squares, X)
    norms = norms_of(tree_leaves(grads))
    for limit in (float(norms.sort().values[2]), 1e-3, float("inf")):
        for method in ROUTES:
            found = clipped_grads(net, params, adapter, squares, X, max_norm=limit, method=method)
            torch.testing.assert_close(found[:2], (losses, norms))
            share = [min(1.0, limit / float(n)) for n in norms]
            wanted = tree_map(lambda g, share=share: sum(s * g[i] for i, s in enumerate(share)), grads)
            tree_map(torch.testing.assert_close, found[2], wanted)
    zeros = clipped_grads(net, params, adapter, lambda out: 0 * squares(out), X, max_norm=1.0)
    assert not torch.stack([t.abs().max() for t in tree_leaves(zeros)]).any()


# -- the algebra of factors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [1, 3, 40])
def test_norms_by_both_forms(positions):
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    left, right = draw(3, positions, 6), draw(3, positions, 8)
    ids = torch.randint(0, 8, (3, positions))
    one_hot = torch.nn.functional.one_hot(ids, 8).double()
    shape = torch.Size((6, 8))
    for factor, dense in (((left, right), (left, right)), ((left, ids), (left, one_hot))):
        wanted = torch.einsum("bti,btj->bij", *dense)
        torch.testing.assert_close(factors.product(factor, shape), wanted)
        torch.testing.assert_close(factors.squared_norms(factor, shape), wanted.square().sum((1, 2)))
    torch.testing.assert_close(factors.squared_norms(left, torch.Size((6,))), left.sum(1).square().sum(1))


def test_meetings_add_up_before_the_norm():
    leaf, left, right = torch.zeros(6, 8), torch.randn(3, 4, 6), torch.randn(3, 4, 8)
    ids = torch.randint(0, 8, (3, 4))
    for given in ([(left, right), (left.cos(), right.sin())], [(left, right), (left, ids)], [(left, ids), (left, ids)]):
        norms = factors.Norms(3)
        for f in given:
            norms.add(leaf, f, 2)
        wanted = sum(factors.product(f, leaf.shape) for f in given).flatten(1).norm(dim=1)
        torch.testing.assert_close(norms.result(({"a": {"b": leaf}},)), wanted)
    bias = torch.zeros(6)
    norms = factors.Norms(3)
    norms.add(bias, left, 3)
    norms.add(bias, left, 3)
    torch.testing.assert_close(norms.result(({"a": {"b": bias}},)), 2 * left.sum(1).norm(dim=1))
    assert factors.joined([left, (left, right)]) is None


# -- where there is no closed form -------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """One layer, called or read in some way that the closed form must notice."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.one = how, nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "read":
                return torch.tanh(self.one(x)) @ self.one.weight
            case "positions first":
                return self.one(x.transpose(0, 1)).transpose(0, 1)
            case "flat":
                return self.one(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            case "flat, positions first":
                return self.one(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)
            case "overwritten":
                h = x + 1
                y = self.one(h)
                h.mul_(2)
                return y + h
            case "shared":
                return x + self.one(torch.eye(5, dtype=x.dtype)[: x.shape[1]])
            case "sometimes":
                return self.one(x) if len(x) > 1 else x
            case "frozen":
                with torch.no_grad():
                    y = self.one(x)
                return self.one(torch.tanh(y) + x)
            case "in place":
                return self.one(x).mul_(2).add_(x)
            case _:
                return self.one(x) + x.mean(0)


SQUARE = torch.linspace(-1, 1, 4 * 4 * 5, dtype=torch.float64).reshape(4, 4, 5).cos()


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("read", "since something else than its layer reads the weight"),
        ("positions first", r"since the first axis of its input, of shape \(4, 4, 5\), is not that of the 4 examples"),
        ("flat, positions first", r"of shape \(16, 5\), is not that of the 4 examples"),
        ("overwritten", "since the model overwrites the layer's input"),
        ("shared", r"of shape \(4, 5\), is not that of the 4 examples"),
    ],
)
def test_sites_without_a_closed_form(how, text):
    net, params, adapter = made(Odd(how), targets=("one",))
    with pytest.raises(ValueError, match=f"per_example_grads: lora at 'one': .*{text}; use method='vmap'"):
        per_example_grads(net, params, adapter, squares, SQUARE, method="closed")
    with pytest.raises(
        ValueError, match=f"closed form can follow, got method 'auto' .per_example_norms: lora at 'one': .*{text}"
    ):
        per_example_norms(net, params, adapter, squares, SQUARE, context=Context(training=True, seed=0))
    if how != "overwritten":  # which autograd does not differentiate either
        assert_law(net, params, adapter, squares, (SQUARE,), methods=("auto",))


@pytest.mark.parametrize("how", ["flat", "in place", "frozen"])
def test_odd_models_with_a_closed_form(how):
    net, params, adapter = made(Odd(how), targets=("one",))
    assert_law(net, params, adapter, squares, (SQUARE,), methods=("closed", "loop"))


def test_a_single_example_owns_every_position():
    for how in ("positions first", "flat, positions first", "shared"):
        net, params, adapter = made(Odd(how), targets=("one",))
        assert_law(net, params, adapter, squares, (SQUARE[:1],), methods=("closed", "loop"))


def test_examples_that_influence_one_another():
    net, params, adapter = made(Odd("mixed"), targets=("one",))
    for method in ("auto", "closed"):
        with pytest.raises(ValueError, match=r"the first one's loss must not depend on the others, got .* in the batch and"):
            per_example_grads(net, params, adapter, squares, SQUARE, method=method)
    assert_law(net, params, adapter, squares, (SQUARE,), methods=("loop",))
    net, params, adapter = made(Odd("sometimes"), targets=("one",))
    with pytest.raises(ValueError, match="keep examples apart"):
        per_example_grads(net, params, adapter, squares, SQUARE, method="auto")


def test_methods_without_a_closed_form():
    net, params, adapter = made(None, fp.LoHa(r=2, target_modules=["up"]))
    with pytest.raises(
        ValueError, match="loha at 'up': the gradients of examples have no closed form, the method gives no fact"
    ):
        per_example_norms(net, params, adapter, squares, X, method="closed")
    assert_law(net, params, adapter, squares, (X,), methods=("auto", "loop"))
    scaling = made()
    moved = dataclasses.replace(
        scaling[2],
        params={**scaling[2].params, "up": scaling[2].leaves("up")},
        consts={p: v for p, v in scaling[2].consts.items() if p != "up"},
    )
    moved = moved.replace(
        params={**moved.params, "up": {n: t for n, t in moved.params["up"].items() if n != "rank"}},
        consts={**moved.consts, "up": {"rank": torch.tensor(2)}},
    )
    with pytest.raises(ValueError, match=r"lora at 'up': .* the method gives none of 'scaling'"):
        per_example_grads(scaling[0], scaling[1], moved, squares, X, method="closed")
    assert_law(scaling[0], scaling[1], moved, squares, (X,), methods=("auto",))
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    model, params = functionalize(attention)
    net = fp.adapt(model, fp.LoRA(r=2, target_parameters=["in_proj_weight"], target_modules=[]))
    with pytest.raises(ValueError, match=r"lora at 'in_proj_weight': .* since its module reads the weight by itself"):
        per_example_grads(
            net, params, net.init(params, 0), lambda out: squares(out[0]), *[zoo.noise(2, 3, 8).double()] * 3, method="closed"
        )
    counted = functionalize(nn.Sequential(nn.Embedding(7, 4, scale_grad_by_freq=True)))
    net = fp.adapt(counted[0], fp.LoRA(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"lora at '0': .* none of 'A'"):
        per_example_grads(net, counted[1], net.init(counted[1], 0), squares, torch.tensor([[1, 1], [2, 1]]), method="closed")


def test_padding_ids_get_no_gradient():
    model, params = functionalize(nn.Sequential(nn.Embedding(7, 4, padding_idx=1)).double())
    net = fp.adapt(model, fp.LoRA(r=2, target_modules=["0"]))
    adapter = perturbed(net.init(params, 0), 1, 0.3)
    assert_law(net, params, adapter, squares, (torch.tensor([[1, 1, 3], [2, 1, 0], [4, 4, 4]]),))


# -- errors ------------------------------------------------------------------------------------------------------------------


def test_errors():
    net, params, adapter = made()
    with pytest.raises(
        ValueError, match="per_example_grads: method must be one of 'auto', 'closed', 'vmap', 'loop', got 'ghost'"
    ):
        per_example_grads(net, params, adapter, squares, X, method="ghost")
    with pytest.raises(ValueError, match="clipped_grads: max_norm must be positive, got 0"):
        clipped_grads(net, params, adapter, squares, X, max_norm=0)
    with pytest.raises(TypeError, match="per_example_grads: batch_dims must be a value for all or a tree prefix"):
        per_example_grads(net, params, adapter, squares, X, batch_dims=(0, 0, 0))
    with pytest.raises(ValueError, match=r"batch_dims of 0: must be in \[-3, 3\), got 3"):
        per_example_grads(net, params, adapter, squares, X, batch_dims=3)
    with pytest.raises(ValueError, match=r"targets must have the 4 examples on their first axis, got shape \(2, 2, 5\)"):
        per_example_grads(net, params, adapter, squares, X, targets=X[:2])
    with pytest.raises(ValueError, match="an input must have rows"):
        per_example_grads(net, params, adapter, squares, X, batch_dims=None)
    for method in ROUTES:
        with pytest.raises(ValueError, match=r"one loss per example, shape \([14],\), got shape \(\); reduce"):
            per_example_grads(net, params, adapter, lambda out: out.sum(), X, method=method)
        with pytest.raises(TypeError, match=r"loss_fn must return a floating tensor, got torch.int64"):
            per_example_grads(net, params, adapter, lambda out: out.argmax(-1), X, method=method)
        with pytest.raises(TypeError, match="loss_fn must return a floating tensor, got list"):
            per_example_grads(net, params, adapter, list, X, method=method)
        with pytest.raises(TypeError, match=r"one Adapter for each of \(LoRA\) is required, got 2"):
            per_example_grads(net, params, (adapter, adapter), squares, X, method=method)
    with pytest.raises(RuntimeError, match="vmap"):
        per_example_grads(net, params, adapter, lambda out: squares(out) * float(out.sum()), X, method="vmap")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        per_example_grads(net, params, adapter, squares, X[..., :4], method="auto")

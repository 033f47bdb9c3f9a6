"""Rematerialization: the plain function's values and derivatives under every transform, and less memory."""

import functools
import sys

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
import zoo
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from funcpeft.caches import register_caches
from funcpeft.context import Context
from funcpeft.quant import NF4
from funcpeft.remat import remat
from funcpeft.storage import Quantized
from funcpeft.tree import Adapter

WIDTH, RANK, ROWS, MEMBERS, BLOCKS = 6, 2, 3, 4, 3


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def block(leaves, x, weight):
    hidden = torch.tanh(F.linear(x, weight) + F.linear(F.linear(x, leaves["A"]), leaves["B"]))
    return x + torch.softmax(F.gelu(hidden), -1) * hidden


def low_rank(width=WIDTH, rank=RANK, lead=(), dtype=torch.float64, blocks=BLOCKS):
    return [
        {
            "A": drawn(*lead, rank, width, seed=2 * i, dtype=dtype) / 2,
            "B": drawn(*lead, width, rank, seed=2 * i + 1, dtype=dtype) / 2,
        }
        for i in range(blocks)
    ]


WEIGHTS = [drawn(WIDTH, WIDTH, seed=20 + i) / 2 for i in range(BLOCKS)]
ONE, MANY = low_rank(), low_rank(lead=(MEMBERS,))
X, XS = drawn(ROWS, WIDTH, seed=30), drawn(MEMBERS, ROWS, WIDTH, seed=31)


def loss(f, leaves, x, weights=WEIGHTS):
    for own, weight in zip(leaves, weights, strict=True):
        x = f(own, x, weight)
    return x.pow(2).mean()


def total(tree):
    """Sums the cubes of all numbers, so that a gradient depends on the value."""
    return sum(t.pow(3).sum() for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor) and t.is_floating_point())


def tracked(tree):
    return pytree.tree_map(lambda t: t.clone().requires_grad_(), tree)


def gradient(of, wrt, **options):
    return torch.autograd.grad(of, pytree.tree_leaves(wrt), **options)


def backward(f):
    given = tracked((ONE, X))
    loss(f, *given).backward()
    return [t.grad for t in pytree.tree_leaves(given)]


def twice_by_autograd(f):
    given = tracked((ONE, X, WEIGHTS))
    return gradient(total(gradient(loss(f, *given), given, create_graph=True)), given)


def batched_cotangents(f):
    x = tracked(X)
    return gradient(f(ONE[0], x, WEIGHTS[0])[0], x, grad_outputs=torch.eye(WIDTH, dtype=x.dtype), is_grads_batched=True)


def inside_then_outside(f):
    """Differentiates by autograd what torch.func.grad returned."""
    given = tracked(ONE)
    return gradient(total(grad(lambda x: loss(f, given, x))(X)), given)


def pulled_later(f):
    """Pulls back a tensor that requires a gradient, when the transform is over."""
    cotangent = tracked(torch.tensor(1.5, dtype=X.dtype))
    pull = vjp(lambda x: loss(f, ONE, x), X)[1]
    return pull(cotangent)


def nested(f):
    whole = (lambda leaves, x: loss(f, leaves, x)) if f is block else remat(functools.partial(loss, f))
    return grad(whole, argnums=(0, 1))(ONE, X)


def first(f, argnums=(0, 1)):
    return grad(functools.partial(loss, f), argnums=argnums)


def second(f):
    return grad(lambda *given: total(first(f)(*given)), argnums=(0, 1))


def rows_of(f):
    """A function whose Jacobian is asked for."""
    return lambda leaves, x: f(leaves, x, WEIGHTS[0]).sum(0)


CASES = {
    "autograd, backward": backward,
    "autograd, second": twice_by_autograd,
    "autograd, batched cotangents": batched_cotangents,
    "autograd of vmap": lambda f: (lambda g: gradient(vmap(lambda a: loss(f, a, X))(g).sum(), g))(tracked(MANY)),
    "autograd of grad": inside_then_outside,
    "grad": lambda f: first(f)(ONE, X),
    "grad, frozen tensors differentiated": lambda f: first(f, (0, 1, 2))(ONE, X, WEIGHTS),
    "vmap": lambda f: vmap(lambda a: loss(f, a, X))(MANY),
    "vmap, another axis": lambda f: vmap(lambda x: loss(f, ONE, x), in_dims=1)(XS.movedim(0, 1)),
    "vmap of vmap": lambda f: vmap(lambda a: vmap(lambda x: loss(f, a, x))(XS))(MANY),
    "vmap of grad": lambda f: vmap(first(f, 0), in_dims=(0, None))(MANY, X),
    "vmap of grad, mapped and unmapped": lambda f: vmap(first(f, (0, 1, 2)), in_dims=(0, None, None))(MANY, X, WEIGHTS),
    "vmap of grad, inputs mapped": lambda f: vmap(first(f, (0, 1, 2)), in_dims=(None, 0, None))(ONE, XS, WEIGHTS),
    "vmap of vmap of grad": lambda f: vmap(lambda a: vmap(lambda x: first(f)(a, x))(XS))(MANY),
    "grad of vmap": lambda f: grad(lambda a, x: vmap(lambda x: loss(f, a, x))(x).sum(), argnums=(0, 1))(ONE, XS),
    "vmap of grad of vmap": lambda f: vmap(grad(lambda a, x: vmap(lambda x: loss(f, a, x))(x).sum()), (0, None))(MANY, XS),
    "vjp": pulled_later,
    "jacrev": lambda f: jacrev(rows_of(f), argnums=(0, 1))(ONE[0], X),
    "vmap of jacrev": lambda f: vmap(jacrev(rows_of(f), argnums=(0, 1)), in_dims=(0, None))(MANY[0], X),
    "jacfwd": lambda f: jacfwd(rows_of(f), argnums=(0, 1))(ONE[0], X),
    "jvp": lambda f: jvp(lambda x: loss(f, ONE, x), (X,), (X,)),
    "jvp of grad": lambda f: jvp(lambda x: first(f, 1)(ONE, x), (X,), (X,)),
    "hessian": lambda f: hessian(lambda x: loss(f, ONE, x))(X),
    "jacrev of jacrev": lambda f: jacrev(jacrev(lambda x: loss(f, ONE, x)))(X),
    "grad of grad": lambda f: second(f)(ONE, X),
    "grad of grad of grad": lambda f: grad(lambda x: total(second(f)(ONE, x)))(X),
    "vmap of grad of grad": lambda f: vmap(second(f), in_dims=(0, None))(MANY, X),
    "grad of vmap of grad": lambda f: grad(lambda a, x: total(vmap(first(f), (None, 0))(a, x)), argnums=(0, 1))(ONE, XS),
    "inside of itself": nested,
}


def assert_same(found, expected):
    found, expected = ([t.detach() for t in pytree.tree_leaves(tree)] for tree in (found, expected))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * float(b.abs().max()))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_derivative_is_that_of_the_plain_function(case):
    assert_same(case(remat(block)), case(block))


def test_finite_differences():
    given = tracked((ONE[0]["A"], ONE[0]["B"], X))

    def f(a, b, x):
        return remat(block)({"A": a, "B": b}, x, WEIGHTS[0])

    assert gradcheck(f, given)
    assert gradgradcheck(f, given)


def test_values_and_gradients_are_bit_for_bit():
    single = pytree.tree_map(torch.Tensor.float, (ONE[0], X, WEIGHTS[0]))
    kept, recomputed = tracked(single), tracked(single)
    expected, found = block(*kept), remat(block)(*recomputed)
    assert torch.equal(found, expected)
    for a, b in zip(gradient(total(found), recomputed), gradient(total(expected), kept), strict=True):
        assert torch.equal(a, b)


# -- when it recomputes ------------------------------------------------------------------------------------------------------


class Counted:
    """A function that counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, leaves, x, weight=WEIGHTS[0]):
        self.calls += 1
        return block(leaves, x, weight)


def test_the_backward_pass_computes_it_once_more():
    f = Counted()
    out = remat(f)(ONE[0], tracked(X)).sum()
    assert f.calls == 1
    out.backward(retain_graph=True)
    assert f.calls == 2
    out.backward()
    assert f.calls == 3
    f = Counted()
    vmap(grad(lambda a: remat(f)(a, X).sum()))(MANY[0])
    assert f.calls == 2


def without_grad(f):
    with torch.no_grad():
        return f(ONE[0], tracked(X))


def inference(f):
    with torch.inference_mode():
        return f(ONE[0], tracked(X))


ASIDE = {
    "no_grad": without_grad,
    "inference": inference,
    "nothing requires a gradient": lambda f: f(ONE[0], X),
    "nothing does in a transform": lambda f: vmap(lambda y: y * f(ONE[0], X))(XS),
    "jvp": lambda f: jvp(lambda x: f(ONE[0], x), (X,), (X,))[1],
}


@pytest.mark.parametrize("case", ASIDE.values(), ids=ASIDE)
def test_it_stands_aside_where_there_is_nothing_to_keep(case, monkeypatch):
    monkeypatch.setattr(sys.modules["funcpeft.remat"], "_apply", None)
    f = Counted()
    assert torch.equal(case(remat(f)), case(block_of_two))
    assert f.calls == 1


def block_of_two(leaves, x):
    return block(leaves, x, WEIGHTS[0])


def test_compiled_whole():
    def step(f, leaves):
        return grad(lambda leaves: loss(f, leaves, X))(leaves)

    compiled = torch.compile(functools.partial(step, remat(block)), fullgraph=True, backend="aot_eager")
    assert_same(compiled(ONE), step(block, ONE))


# -- trees -------------------------------------------------------------------------------------------------------------------


def test_arguments_are_trees_of_anything():
    def f(adapter, quantized, context, *, x, power, nothing, rows):
        assert nothing is None
        leaves = adapter.leaves("q")
        hidden = context.dropout(F.linear(x, leaves["A"]), 0.5)
        y = (leaves["scaling"] * F.linear(hidden, leaves["B"]) + F.linear(x, quantized.format.dequant(quantized))) ** power
        return {"y": y[rows], "kept": [hidden.detach(), "text", None, 3], "rows": rows}

    weight = NF4(block_size=32).requant(drawn(WIDTH, WIDTH, dtype=torch.float32))
    assert isinstance(weight, Quantized)
    context = Context(training=True, seed=torch.tensor(5))
    rows = torch.tensor([2, 0])

    def run(f, params, x, context=context):
        adapter = Adapter({"q": params}, {"q": {"scaling": torch.tensor(2.0)}})
        return f(adapter, weight, context, x=x, power=2, nothing=None, rows=rows)

    one, x, many = pytree.tree_map(torch.Tensor.float, (ONE[0], X, MANY[0]))
    expected, found = run(f, one, x), run(remat(f), tracked(one), x)
    assert found["kept"][1:] == ["text", None, 3]
    assert found["rows"] is rows
    assert torch.equal(found["y"], expected["y"])

    def both(f):
        seeds = Context(training=True, seed=torch.arange(MEMBERS))
        given = tracked((one, x))
        yield gradient(total(run(f, *given)["y"]), given)
        yield vmap(grad(lambda p, x, c: total(run(f, p, x, c)["y"]), argnums=(0, 1)), (0, None, 0))(many, x, seeds)

    for a, b in zip(both(remat(f)), both(f), strict=True):
        assert_same([t.double() for t in pytree.tree_leaves(a)], [t.double() for t in pytree.tree_leaves(b)])


def test_a_cache_goes_in_and_another_comes_out():
    from transformers import DynamicCache

    register_caches()

    def f(x, cache):
        keys, values = cache.update(x[None, None], 2 * x[None, None], 0)
        return (keys * values).sum(), cache

    def run(f, x):
        cache = DynamicCache()
        cache.update(X[None, None], X[None, None], 0)
        out, new = f(x, cache)
        return total((out, new)), cache

    expected, found = tracked(X), tracked(X)
    values = [run(f, expected)[0], run(remat(f), found)[0]]
    assert values[0].equal(values[1])
    assert_same(gradient(values[1], found), gradient(values[0], expected))
    assert run(remat(f), tracked(X))[1].get_seq_length() == ROWS  # the caller's is as it was


def test_the_caller_gets_back_arguments_that_are_handed_through():
    x, frozen, ids = tracked(X), drawn(3), torch.arange(3)
    out = remat(lambda x, frozen, ids: (x, frozen, ids, x * 2))(x, frozen, ids)
    assert out[0] is x
    assert out[1] is frozen
    assert out[2] is ids


def repeated(x, y):
    product = x * y
    return product, product


RESULTS = {
    "sum": lambda x, y: x + y,  # both gradients are the one given
    "an argument": lambda x, y: x,
    "arguments": lambda x, y: (y, x),
    "a view": lambda x, y: x.reshape(-1),
    "views": lambda x, y: (x.T, y[0], x.split(2)),
    "one twice": repeated,
    "one and a copy": lambda x, y: (x * y, x - 2 * y),
    "integers and values": lambda x, y: [x * y, x > 0, x.argmax(), None, "text", 2.5],
    "unused argument": lambda x, y: x.exp(),
    "no dependence": lambda x, y: (x * y, torch.ones(3)),
}


@pytest.mark.parametrize("f", RESULTS.values(), ids=RESULTS)
def test_results_of_every_form(f):
    x, y, xs = drawn(4, 3, seed=1), drawn(4, 3, seed=2), drawn(2, 4, 3, seed=3)

    def derivative(f, *given):
        return grad(lambda *given: total(f(*given)), argnums=(0, 1))(*given)

    def all_of(f):
        given = tracked((x, y))
        out = f(*given)
        yield out
        found = gradient(total(out), given, create_graph=True, allow_unused=True, materialize_grads=True)
        yield found
        yield gradient(total(found), given, allow_unused=True, materialize_grads=True)
        yield derivative(lambda *given: derivative(f, *given), x, y)
        yield vmap(functools.partial(derivative, f), (0, None))(xs, y)
        yield derivative(lambda x, y: vmap(f, (0, None))(x, y), xs, y) if f_is_all_tensors else ()
        yield vmap(lambda x, y: derivative(lambda *given: derivative(f, *given), x, y), (1, None))(xs.movedim(0, 1), y)

    f_is_all_tensors = all(isinstance(t, torch.Tensor) for t in pytree.tree_leaves(f(x, y)))
    for a, b in zip(all_of(remat(f)), all_of(f), strict=True):
        assert pytree.tree_structure(a) == pytree.tree_structure(b)
        a, b = pytree.tree_leaves(a), pytree.tree_leaves(b)
        assert [t for t in a if not isinstance(t, torch.Tensor)] == [t for t in b if not isinstance(t, torch.Tensor)]
        a, b = [t for t in a if isinstance(t, torch.Tensor)], [t for t in b if isinstance(t, torch.Tensor)]
        assert [t.dtype for t in a] == [t.dtype for t in b]
        assert_same([t.double() for t in a], [t.double() for t in b])


def test_what_needs_no_gradient_gets_none():
    leaves, x = tracked(ONE[0]), tracked(X)
    out = remat(block)(leaves, x, WEIGHTS[0]).sum()
    (only,) = gradient(out, x, retain_graph=True)
    out.backward()
    assert torch.equal(only, x.grad)
    assert WEIGHTS[0].grad is None
    assert gradient(remat(lambda a, b: a * 2)(x, leaves["A"]).sum(), leaves["A"], allow_unused=True) == (None,)
    found = remat(lambda x: (x * 2, x.detach() * 3))(x)
    assert gradient(found[1].sum(), x, allow_unused=True, retain_graph=True) == (None,)
    assert gradient(found[1].sum(), x, allow_unused=True, create_graph=True)[0].eq(0).all()


def test_a_transformer_layer_as_a_function_of_its_tensors():
    layer = zoo.model("llama").model.layers[0]
    rotary = zoo.model("llama").model.rotary_emb
    x = zoo.noise(2, 5, 32)
    positions = rotary(x, torch.arange(5)[None])
    params = {n: p.detach() for n, p in layer.named_parameters()}

    def f(params, x, positions):
        return torch.func.functional_call(layer, params, (x,), {"position_embeddings": positions}, strict=True)

    for derivative in (first_of_layer, first_of_many_layers):
        assert_same(derivative(remat(f), params, x, positions), derivative(f, params, x, positions))


def first_of_layer(f, params, x, positions):
    given = tracked((params, x))
    return [t.double() for t in gradient(total(f(*given, positions)), given)]


def first_of_many_layers(f, params, x, positions):
    """Differentiates with respect to two matrices of their own and to the shared input."""
    many = {n: torch.stack([p, 2 * p]) for n, p in params.items() if n.startswith("self_attn.q") or n.startswith("mlp.up")}

    def one(own, x):
        return total(f({**params, **own}, x, positions))

    return pytree.tree_map(torch.Tensor.double, vmap(grad(one, argnums=(0, 1)), (0, None))(many, x))


# -- memory ------------------------------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """Counts the bytes that are alive of all that operations made; ``made`` are their names with the shapes."""

    def __init__(self, given):
        super().__init__()
        self.given = {t.untyped_storage()._cdata for t in pytree.tree_leaves(given)}
        self.alive, self.bytes, self.made = {}, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.given:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                self.made.append((func.__name__, tuple(t.shape)))
        self.alive = {k: v for k, v in self.alive.items() if not v[0].expired()}
        self.bytes = max(self.bytes, sum(n for _, n in self.alive.values()))
        return out


WIDE, TALL = 32, 64
UNIT = WIDE * TALL * 8
WIDE_X = drawn(TALL, WIDE)


def deep(leaves, x, weight):
    return block(leaves, block(leaves, x, weight), weight)


def peak(derivative, f, blocks=8, members=1):
    """Returns the peak of what is made, in units of one activation of all members."""
    leaves = tracked(low_rank(WIDE, blocks=blocks))
    many = pytree.tree_map(lambda t: torch.stack([t.detach()] * members), leaves)
    given = (many if derivative is by_mapped_grad else leaves, WIDE_X, [drawn(WIDE, WIDE, seed=i) for i in range(blocks)])
    with Peak(given) as counted:
        derivative(f, *given)
    return counted.bytes / UNIT / members


def by_autograd(f, leaves, x, weights):
    return gradient(loss(f, leaves, x, weights), leaves)


def by_grad(f, leaves, x, weights):
    return grad(lambda leaves: loss(f, leaves, x, weights))(pytree.tree_map(torch.Tensor.detach, leaves))


def by_mapped_grad(f, leaves, x, weights):
    return vmap(grad(lambda leaves: loss(f, leaves, x, weights)))(leaves)


@pytest.mark.parametrize(("derivative", "members"), [(by_autograd, 1), (by_grad, 1), (by_mapped_grad, 3)])
def test_peak_memory(derivative, members):
    kept, recomputed = ([peak(derivative, f, n, members) for n in (8, 16)] for f in (deep, remat(deep)))
    assert recomputed[0] < 0.4 * kept[0]
    # a block more costs its input, its gradients and, where torch.func allows for a second derivative, a gradient of its output
    inputs, gradients = 1 if derivative is by_autograd else 2, 2 * RANK / TALL
    assert (recomputed[1] - recomputed[0]) / 8 <= inputs + gradients
    assert (kept[1] - kept[0]) / 8 > 6


def test_peak_memory_of_a_second_derivative():
    def twice(f, leaves, x, weights):
        return grad(lambda leaves: total(grad(lambda leaves: loss(f, leaves, x, weights))(leaves)))(leaves)

    assert peak(twice, remat(deep)) < 0.4 * peak(twice, deep)


def test_peak_memory_is_that_of_torch_checkpoint():
    def theirs(*args):
        return checkpoint(deep, *args, use_reentrant=False)

    assert peak(by_autograd, remat(deep)) <= 1.1 * peak(by_autograd, theirs)


@pytest.mark.parametrize("derivative", [by_autograd, by_grad])
def test_frozen_tensors_are_neither_copied_nor_differentiated(derivative):
    weight, seen = drawn(WIDE, WIDE), []

    def f(leaves, x, weight):
        seen.append(weight.data_ptr())
        return block(leaves, x, weight)

    given = (tracked(low_rank(WIDE, blocks=1)), WIDE_X, [weight])
    with Peak(given) as counted:
        derivative(remat(f), *given)
    assert seen == [weight.data_ptr()] * 2
    views = {"t.default", "transpose.int", "permute.default", "detach.default", "view.default"}
    assert not [name for name, shape in counted.made if shape == (WIDE, WIDE) and name not in views]


def test_nothing_is_kept_when_the_graph_is_gone():
    x, leaves = tracked(X), ONE[0]
    out = remat(block)(leaves, x * 1, WEIGHTS[0])
    held = StorageWeakRef(next(t for t in out.grad_fn.saved_tensors if t.shape == X.shape).untyped_storage())
    out.sum().backward()
    assert held.expired()


# -- autocast ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [False, True], ids=["off", "on"])
@pytest.mark.parametrize("after", [False, True], ids=["off after", "on after"])
def test_autocast_is_that_of_the_first_call(before, after):
    dtypes = []

    def f(w, x):
        y = torch.tanh(x @ w)
        dtypes.append(y.dtype)
        return y

    w, x = drawn(WIDTH, WIDTH, dtype=torch.float32), X.float()

    def found(f):
        given = tracked(w)
        with torch.autocast("cpu", torch.bfloat16, enabled=before):
            inside = f(given, x).float()
            outside = x @ given  # a cast of the weight without a graph must not be in the cache
        with torch.autocast("cpu", torch.bfloat16, enabled=after):
            grads = [*gradient(inside.sum(), given), *gradient(outside.float().sum(), given)]
        with torch.autocast("cpu", torch.bfloat16, enabled=before):
            return [*grads, grad(lambda w: f(w, x).float().sum())(w)]

    for a, b in zip(found(remat(f)), found(f), strict=True):
        assert torch.equal(a, b)
    assert set(dtypes) == {torch.bfloat16 if before else torch.float32}


# -- errors ------------------------------------------------------------------------------------------------------------------


def test_what_is_no_function():
    with pytest.raises(TypeError, match="remat: fn must be callable, got int"):
        remat(3)


class Layer(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self._parameters["weight"] = weight

    def forward(self, x):
        return x * self.weight


def bound_forms(w):
    def in_cell(x):
        return x * w

    def in_default(x, scale=w):
        return x * scale

    def in_keyword(x, *, scale=w):
        return x * scale

    pair = [w]
    yield in_cell
    yield in_default
    yield in_keyword
    yield lambda x: in_cell(x)
    yield lambda x: x * pair[0]
    yield functools.partial(lambda scale, x: x * scale, w)
    yield functools.partial(lambda x, scale: x * scale, scale=w)
    yield Layer(w)
    yield Layer(w).forward


FORMS = range(len(list(bound_forms(X))))


@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_of_a_transform_that_is_no_argument(form):
    def f(w, x):
        return remat(list(bound_forms(w))[form])(x * w).sum()

    text = "must be an argument of fn, got one that a transform wraps and that is bound to fn; pass it as an argument"
    with pytest.raises(ValueError, match=text):
        grad(f)(X, X)
    with pytest.raises(ValueError, match=text):
        vmap(grad(f), (None, 0))(X, XS)


@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_that_requires_a_gradient_and_is_no_argument(form):
    w, x = tracked(X), tracked(X)
    text = (
        "must be an argument of fn, got one that requires a gradient and that fn reads from elsewhere; pass it as an argument"
    )
    with pytest.raises(ValueError, match=text):
        remat(list(bound_forms(w))[form])(x)
    with pytest.raises(ValueError, match=text):
        grad(lambda x: remat(list(bound_forms(w))[form])(x).sum())(X)
    for f in bound_forms(X):  # a constant may be bound
        assert_same(gradient(total(remat(f)(x)), x), gradient(total(f(x)), x))


def test_a_name_that_is_not_assigned_yet():
    def outer(x):
        def f(x):
            return x * 2 if x.dim() else later

        out = grad(lambda x: remat(f)(x).sum())(x)
        later = x
        return out, later

    assert torch.equal(outer(X)[0], torch.full_like(X, 2))


@pytest.mark.parametrize(
    ("second_result", "found"),
    [(lambda x: (x * 2, x * 3), "1 and then 2 tensors"), (lambda x: x[0] * 2, "other shapes the second time")],
)
def test_a_function_that_is_not_pure(second_result, found):
    results = [lambda x: x * 2, second_result]
    out = remat(lambda x: results.pop(0)(x))(tracked(X))
    with pytest.raises(ValueError, match=f"remat: fn must return the same for the same arguments, got {found}; pass what"):
        out.sum().backward()


@pytest.mark.parametrize("written", ["x", "w"])
def test_an_argument_that_is_written_before_the_backward_pass(written):
    x, w = tracked(X) * 1, X.clone()
    out = remat(lambda x, w: x * w)(x, w)
    with torch.no_grad():
        {"x": x, "w": w}[written].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_integers_of_inference_mode_may_be_arguments():
    with torch.inference_mode():
        index = torch.tensor([2, 0])
    x = tracked(X)
    out = remat(lambda x, index: x[index.clone()])(x, index)
    assert_same(gradient(total(out), x), gradient(total(x[[2, 0]]), x))


def test_the_wrapper_has_the_name_of_the_function():
    assert remat(block).__name__ == "block"
    assert remat(block).__wrapped__ is block

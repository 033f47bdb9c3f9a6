"""The product with a stored weight: the dense product's bits, every transform, codes alone kept for backward."""

import functools

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from funcpeft import storage
from funcpeft.layers import Linear, Transposed
from funcpeft.quant import NF4, AffineInt, Int8, Ternary
from funcpeft.storage import RECOMPUTE_FROM, RECOMPUTE_FROM_INSIDE, Quantized, product
from funcpeft.tree import tree_leaves, tree_map

IN, OUT, BATCH = 24, 16, 3
FORMATS = [NF4(block_size=32), NF4(block_size=32, double_quant=True), Int8(), AffineInt.examples()[0], Ternary()]

over_kinds = pytest.mark.parametrize("kind", [Linear(), Transposed()], ids=lambda k: k.name)
over_formats = pytest.mark.parametrize("fmt", FORMATS, ids=repr)
over_routes = pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
over_biases = pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def stored(kind, fmt, seed=1, dtype=torch.float32, rows=OUT, columns=IN):
    """Returns a stored weight and what it decodes to."""
    shape = (rows, columns) if isinstance(kind, Linear) else (columns, rows)
    q = fmt.requant(drawn(*shape, seed=seed, dtype=dtype))
    return q, fmt.dequant(q)


def replaced(q, name, leaf):
    return Quantized({**q.data, name: leaf}, q.format, q.shape, q.dtype)


def close(got, want):
    got, want = tree_leaves(got), tree_leaves(want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=2e-5, atol=2e-5)


# -- values --------------------------------------------------------------------------------------------------------------------


@over_kinds
@over_formats
@over_routes
@over_biases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_bits_are_those_of_the_dense_product(kind, fmt, recompute, has_bias, dtype):
    q, w = stored(kind, fmt, dtype=dtype)
    bias = drawn(OUT, seed=2, dtype=dtype) if has_bias else None
    for lead in ((), (5,), (2, 3), (0,), (2, 1, 3)):
        x = drawn(*lead, IN, seed=3, dtype=dtype)
        want = kind.product(x, w, bias)
        assert torch.equal(product(kind, x, q, bias, recompute=recompute), want)
        assert torch.equal(product(kind, x.clone().requires_grad_(), q, bias, recompute=recompute), want)
        with torch.no_grad():
            assert torch.equal(product(kind, x, q, bias, recompute=recompute), want)


@over_kinds
def test_large_weights_are_recomputed_by_default(kind):
    rows = columns = int(RECOMPUTE_FROM**0.5)
    for r, c, recomputes in ((rows, columns, True), (rows, columns - 1, False)):
        q, _ = stored(kind, Int8(), rows=r, columns=c)
        y = product(kind, drawn(2, c).requires_grad_(), q, None)
        assert ("_Product" in type(y.grad_fn).__name__) == recomputes


@over_kinds
def test_inside_a_transform_only_larger_ones_are(kind, monkeypatch):
    met = []
    right = storage._Product.apply
    monkeypatch.setattr(storage._Product, "apply", lambda *args: met.append(args[0].shape) or right(*args))
    side = int(RECOMPUTE_FROM_INSIDE**0.5)
    for rows, columns, recomputes in ((side, side, True), (side, side - 1, False)):
        met.clear()
        q, _ = stored(kind, Int8(), rows=rows, columns=columns)
        grad(lambda x, q=q: product(kind, x, q, None).sum())(drawn(2, columns))
        assert bool(met) == recomputes


# -- derivatives ---------------------------------------------------------------------------------------------------------------


def rivals(kind, fmt, has_bias=True):
    """Returns the product recomputed and the dense one, as functions of the input, and the bias."""
    q, w = stored(kind, fmt)
    bias = drawn(OUT, seed=2) if has_bias else None
    ours = functools.partial(product, kind, quantized=q, recompute=True)
    return (lambda x, b=bias: ours(x, bias=b)), (lambda x, b=bias: kind.product(x, w, b))


def loss(f):
    return lambda x, *more: torch.sin(f(x, *more)).square().sum()


TRANSFORMS = {
    "vjp": lambda f, x, v: vjp(f, x)[1](torch.cos(f(x))),
    "grad": lambda f, x, v: grad(loss(f))(x),
    "vmap": lambda f, x, v: vmap(f)(x),
    "vmap-columns": lambda f, x, v: vmap(f, in_dims=1, out_dims=1)(x),
    "vmap-vmap": lambda f, x, v: vmap(vmap(f))(x),
    "vmap-grad": lambda f, x, v: vmap(grad(loss(f)))(x),
    "grad-vmap": lambda f, x, v: grad(loss(vmap(f)))(x),
    "jacrev": lambda f, x, v: jacrev(f)(x[0]),
    "jacfwd": lambda f, x, v: jacfwd(f)(x[0]),
    "hessian": lambda f, x, v: hessian(loss(f))(x[0, 0]),
    "jvp": lambda f, x, v: jvp(f, (x,), (v,)),
    "jvp-jvp": lambda f, x, v: jvp(lambda y: jvp(loss(f), (y,), (v,))[1], (x,), (v,)),
    "hvp": lambda f, x, v: jvp(grad(loss(f)), (x,), (v,)),
    "vmap-jvp": lambda f, x, v: vmap(lambda y, u: jvp(f, (y,), (u,)))(x, v),
    "vmap-hvp": lambda f, x, v: vmap(lambda y, u: jvp(grad(loss(f)), (y,), (u,)))(x, v),
    "grad-jvp": lambda f, x, v: grad(lambda y: jvp(loss(f), (y,), (v,))[1])(x),
    "grad-grad": lambda f, x, v: grad(lambda y: (grad(loss(f))(y) * v).sum())(x),
    "grad-grad-grad": lambda f, x, v: grad(lambda z: (grad(lambda y: (grad(loss(f))(y) * v).sum())(z) * v).sum())(x),
    "vmap-jacrev": lambda f, x, v: vmap(jacrev(f))(x[0]),
}


@over_kinds
@pytest.mark.parametrize("fmt", [NF4(block_size=32), Int8()], ids=repr)
@over_biases
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_transform_gives_what_it_gives_on_the_dense_product(kind, fmt, has_bias, transform):
    ours, dense = rivals(kind, fmt, has_bias)
    x, v = drawn(2, BATCH, IN, seed=4), drawn(2, BATCH, IN, seed=5)
    want = transform(dense, x, v)
    assert all(t.any() for t in tree_leaves(want))
    close(transform(ours, x, v), want)


@over_kinds
def test_a_bias_is_differentiated(kind):
    ours, dense = rivals(kind, NF4(block_size=32))
    b, db = drawn(OUT, seed=6), drawn(OUT, seed=7)
    for lead in ((), (5,), (2, 3)):
        x = drawn(*lead, IN, seed=8)
        for run in (
            lambda f, x=x: grad(lambda b: loss(f)(x, b))(b),
            lambda f, x=x: jvp(lambda b: f(x, b), (b,), (db,)),
            lambda f, x=x: jvp(f, (x, b), (x, db)),
            lambda f, x=x: jacrev(lambda b: f(x, b))(b),
            lambda f, x=x: grad(lambda b: (grad(lambda y: loss(f)(y, b))(x) * x).sum())(b),
            lambda f, x=x: vmap(lambda b: f(x, b))(torch.stack([b, db])),
            lambda f, x=x: vmap(grad(lambda b, x=x: loss(f)(x, b)))(torch.stack([b, db])),
            lambda f, x=x: vmap(grad(loss(f), argnums=(0, 1)))(torch.stack([x, -x]), torch.stack([b, db])),
        ):
            close(run(ours), run(dense))


@over_kinds
def test_plain_autograd_too_twice(kind):
    ours, dense = rivals(kind, NF4(block_size=32))
    found = []
    for f in (ours, dense):
        x, b = drawn(BATCH, IN, seed=4).requires_grad_(), drawn(OUT, seed=6).requires_grad_()
        dx, db = torch.autograd.grad(loss(f)(x, b), (x, b), create_graph=True)
        second = torch.autograd.grad(dx.square().sum() + db.square().sum(), (x, b))
        found.append((dx.detach(), db.detach(), *second))
        loss(f)(x, b).backward()
        close((x.grad, b.grad), (dx.detach(), db.detach()))
    close(*found)


@over_kinds
def test_autocast_differentiates_as_it_does_the_dense_product(kind):
    ours, dense = rivals(kind, NF4(block_size=32))
    found = []
    for f in (ours, dense):
        x = drawn(BATCH, IN, seed=4).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = f(x)
        y.float().square().sum().backward()  # outside, where nothing casts
        found.append((y.detach(), x.grad))
    assert found[0][0].dtype == torch.bfloat16
    close(*found)


def test_finite_differences_agree():
    q, _ = stored(Linear(), NF4(block_size=32), dtype=torch.float64)
    x, b = drawn(2, IN, dtype=torch.float64).requires_grad_(), drawn(OUT, dtype=torch.float64).requires_grad_()
    f = functools.partial(product, Linear(), quantized=q, recompute=True)

    def run(x, b):
        return torch.sin(f(x, bias=b))

    assert torch.autograd.gradcheck(run, (x, b), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, (x, b), check_fwd_over_rev=True)


# -- stacked weights -----------------------------------------------------------------------------------------------------------


@over_kinds
@over_formats
@pytest.mark.parametrize("x_dim", [None, 0])
def test_stacked_weights_map(kind, fmt, x_dim):
    each, dense = zip(*(stored(kind, fmt, seed=s) for s in range(3)), strict=True)
    stacked, ws = tree_map(lambda *t: torch.stack(t), *each), torch.stack(dense)
    x = drawn(BATCH, IN) if x_dim is None else drawn(3, BATCH, IN)

    def ours(x, q):
        return product(kind, x, q, None, recompute=True)

    def theirs(x, w):
        return kind.product(x, w, None)

    dims = (x_dim, 0)
    close(vmap(ours, dims)(x, stacked), vmap(theirs, dims)(x, ws))
    close(vmap(grad(loss(ours)), dims)(x, stacked), vmap(grad(loss(theirs)), dims)(x, ws))
    close(grad(loss(vmap(ours, dims)))(x, stacked), grad(loss(vmap(theirs, dims)))(x, ws))
    close(vmap(jacrev(ours), dims)(x, stacked), vmap(jacrev(theirs), dims)(x, ws))

    def tangent(f, x, w):
        return jvp(lambda y: f(y, w), (x,), (x,))

    close(tangent(vmap(ours, dims), x, stacked), tangent(vmap(theirs, dims), x, ws))
    close(tangent(grad(loss(vmap(ours, dims))), x, stacked), tangent(grad(loss(vmap(theirs, dims))), x, ws))
    close(vmap(functools.partial(tangent, ours), dims)(x, stacked), vmap(functools.partial(tangent, theirs), dims)(x, ws))


# -- scales --------------------------------------------------------------------------------------------------------------------

#: Runs ``f(x, scale)`` so that the scale is differentiated at some level, with other transforms around or inside it.
OVER_SCALES = {
    "grad": lambda f, x, s, ds: grad(lambda s: loss(f)(x, s))(s),
    "jvp": lambda f, x, s, ds: jvp(lambda s: f(x, s), (s,), (ds,)),
    "both": lambda f, x, s, ds: grad(loss(f), argnums=(0, 1))(x, s),
    "jvp-both": lambda f, x, s, ds: jvp(f, (x, s), (x, ds)),
    "grad-of-grad-x": lambda f, x, s, ds: grad(lambda s: grad(loss(f))(x, s).square().sum())(s),
    "grad-x-of-grad": lambda f, x, s, ds: grad(lambda x: grad(lambda s: loss(f)(x, s))(s).square().sum())(x),
    "jvp-of-grad-x": lambda f, x, s, ds: jvp(lambda s: grad(loss(f))(x, s), (s,), (ds,)),
    "jvp-of-jvp-x": lambda f, x, s, ds: jvp(lambda s: jvp(lambda x: f(x, s), (x,), (x,))[1], (s,), (ds,)),
    "jvp-x-of-jvp": lambda f, x, s, ds: jvp(lambda x: jvp(lambda s: f(x, s), (s,), (ds,))[1], (x,), (x,)),
    "grad-of-jvp-x": lambda f, x, s, ds: grad(lambda s: jvp(lambda x: loss(f)(x, s), (x,), (x,))[1])(s),
    "grad-of-vmap": lambda f, x, s, ds: grad(lambda s: vmap(lambda x: loss(f)(x, s))(x).sum())(s),
    "jvp-of-vmap": lambda f, x, s, ds: jvp(lambda s: vmap(lambda x: f(x, s))(x), (s,), (ds,)),
    "vmap-of-grad": lambda f, x, s, ds: vmap(lambda x: grad(lambda s: loss(f)(x, s))(s))(x),
    "grad-of-vmap-grad-x": lambda f, x, s, ds: grad(lambda s: vmap(lambda x: grad(loss(f))(x, s))(x).square().sum())(s),
    "jvp-of-vmap-grad-x": lambda f, x, s, ds: jvp(lambda s: vmap(lambda x: grad(loss(f))(x, s))(x), (s,), (ds,)),
    "grad-of-vmap-scales": lambda f, x, s, ds: grad(lambda s: vmap(loss(f), (None, 0))(x, s).sum())(torch.stack([s, ds])),
    "jvp-of-vmap-scales": lambda f, x, s, ds: jvp(
        lambda s: vmap(f, (None, 0))(x, s), (torch.stack([s, ds]),), (torch.stack([ds, s]),)
    ),
    "grad-of-vmap-scales-grad-x": lambda f, x, s, ds: grad(lambda s: vmap(lambda s: grad(loss(f))(x, s))(s).square().sum())(
        torch.stack([s, ds])
    ),
    "jvp-of-vmap-scales-jvp-x": lambda f, x, s, ds: jvp(
        lambda s: vmap(lambda s: jvp(lambda x: f(x, s), (x,), (x,))[1])(s), (torch.stack([s, ds]),), (torch.stack([ds, s]),)
    ),
    "jacfwd": lambda f, x, s, ds: jacfwd(lambda s: f(x, s))(s),
    "jacrev": lambda f, x, s, ds: jacrev(lambda s: f(x, s))(s),
    "hessian": lambda f, x, s, ds: hessian(lambda s: loss(f)(x, s))(s),
    "jacfwd-of-grad-x": lambda f, x, s, ds: jacfwd(lambda s: grad(loss(f))(x, s))(s),
}


@over_kinds
@pytest.mark.parametrize("fmt", [NF4(block_size=32), Int8(), Ternary()], ids=repr)
@pytest.mark.parametrize("run", OVER_SCALES.values(), ids=OVER_SCALES)
def test_a_scale_is_differentiated_at_every_level(kind, fmt, run):
    q, _ = stored(kind, fmt)
    name = "inverse_scale" if isinstance(fmt, Ternary) else "scale"
    s = q.data[name]
    ds = s * (1.5 + drawn(*s.shape, seed=9).tanh())
    x = 0.3 * drawn(BATCH, IN, seed=10)

    def ours(x, s):
        return product(kind, x, replaced(q, name, s), None, recompute=True)

    def dense(x, s):
        return kind.product(x, fmt.dequant(replaced(q, name, s)), None)

    want = run(dense, x, s, ds)
    assert all(t.any() for t in tree_leaves(want))
    close(run(ours, x, s, ds), want)


def test_a_scale_that_requires_a_gradient_gets_it():
    q, _ = stored(Linear(), Int8())
    s = q.data["scale"].clone().requires_grad_()
    x = drawn(BATCH, IN).requires_grad_()
    product(Linear(), x, replaced(q, "scale", s), None, recompute=True).square().sum().backward()
    assert s.grad is not None
    assert s.grad.all()
    assert x.grad is not None


# -- compiled ------------------------------------------------------------------------------------------------------------------


@over_kinds
@over_routes
@pytest.mark.parametrize("name", ["forward", "grad", "vmap", "vmap-grad"])
def test_products_compile_whole(kind, recompute, name):
    q, w = stored(kind, NF4(block_size=32))
    bias, x = drawn(OUT, seed=2), drawn(2, BATCH, IN, seed=4)
    transform = {"forward": lambda f, x, v: f(x), **TRANSFORMS}[name]

    def run(x, q, bias):
        return transform(lambda y: product(kind, y, q, bias, recompute=recompute), x, x)

    torch._dynamo.reset()
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(x, q, bias)
    close(got, transform(lambda y: kind.product(y, w, bias), x, x))
    x.requires_grad_()
    y = torch.compile(lambda x, q: product(kind, x, q, bias, recompute=recompute), fullgraph=True, backend="aot_eager")(x, q)
    close(torch.autograd.grad(y.sum(), x), torch.autograd.grad(kind.product(x, w, bias).sum(), x))


# -- what is kept --------------------------------------------------------------------------------------------------------------


def kept_weights(run, sides):
    """Lists the floating tensors with the weight's sides that autograd saves while ``run`` runs."""
    found = []

    def pack(t):
        if t.is_floating_point() and sorted(t.shape[-2:]) == sorted(sides):
            found.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run().sum().backward()
    return found


@over_kinds
@over_formats
def test_no_decoded_weight_is_kept_for_backward(kind, fmt):
    side = 40
    layers = [stored(kind, fmt, seed=s, rows=side, columns=side)[0] for s in range(4)]

    def chain(recompute, count):
        def run():
            y = drawn(count, side).requires_grad_()
            for q in layers:
                y = torch.tanh(product(kind, y, q, drawn(side), recompute=recompute))
            return y

        return run

    assert len(kept_weights(chain(False, 3), (side, side))) == 4  # the probe sees them where they are kept
    assert kept_weights(chain(True, 3), (side, side)) == []


@over_kinds
def test_a_vmapped_chain_keeps_no_decoded_weight_either(kind):
    side = 40
    layers = [stored(kind, NF4(block_size=32), seed=s, rows=side, columns=side)[0] for s in range(3)]

    def run():
        def chain(y):
            for q in layers:
                y = torch.tanh(product(kind, y, q, None, recompute=True))
            return y

        return vmap(chain)(drawn(5, 3, side).requires_grad_())

    assert kept_weights(run, (side, side)) == []

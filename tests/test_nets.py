"""Networks: what they promise to denoisers, to training and to checkpoints."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from numpyro_diffprior.nets import NETWORKS, convolutions, dit
from numpyro_diffprior.nets.dit import DiT
from numpyro_diffprior.nets.mlp import MLP
from numpyro_diffprior.nets.options import PADDINGS, check_event
from numpyro_diffprior.nets.unet import UNet

CASES = {
    "MLP": (MLP, {"event_shape": (5,), "features": (16, 16, 24), "embedding": 8}),
    "MLP one layer": (MLP, {"event_shape": (2, 3), "features": (16,), "embedding": 8}),
    "MLP scalar-sized": (MLP, {"event_shape": (1,), "features": (8, 8), "embedding": 4}),
    "UNet": (UNet, {"event_shape": (8, 8), "channels": (8, 12), "num_blocks": 1}),
    "UNet attention": (
        UNet,
        {
            "event_shape": (8, 8),
            "channels": (4, 4),
            "num_blocks": 1,
            "attention": (0, 1),
            "num_heads": 2,
        },
    ),
    "UNet odd": (UNet, {"event_shape": (10, 6), "channels": (4, 4, 8, 8), "num_blocks": 1}),
    "UNet colors": (
        UNet,
        {"event_shape": (16, 16, 3), "spatial_dims": 2, "channels": (4, 8), "num_blocks": 1},
    ),
    "UNet series": (
        UNet,
        {"event_shape": (13,), "channels": (4, 8), "num_blocks": 1, "strides": (3,)},
    ),
    "UNet volume": (
        UNet,
        {
            "event_shape": (3, 6, 5, 2),
            "channels": (4, 8),
            "num_blocks": 1,
            "strides": (1, 2, 2),
            "padding": ("zeros", "periodic", "reflect"),
            "attention": (1,),
        },
    ),
    "UNet digits": (
        UNet,
        {"event_shape": (28, 28), "channels": (4, 4, 8), "num_blocks": 1, "attention": (2,)},
    ),
    "DiT": (DiT, {"event_shape": (8, 8), "width": 16, "depth": 2, "num_heads": 2}),
    "DiT trajectory": (
        DiT,
        {"event_shape": (7, 3), "spatial_dims": 1, "patch_size": (2,), "width": 8, "depth": 1},
    ),
    "DiT volume": (
        DiT,
        {
            "event_shape": (3, 4, 5),
            "spatial_dims": 3,
            "patch_size": (1, 2, 2),
            "width": 8,
            "depth": 1,
        },
    ),
}

cases = pytest.mark.parametrize(("make", "kwargs"), CASES.values(), ids=CASES)
few_cases = pytest.mark.parametrize(
    ("make", "kwargs"),
    [CASES["MLP"], CASES["UNet attention"], CASES["DiT"]],
    ids=["MLP", "UNet", "DiT"],
)


@pytest.fixture(autouse=True)
def _full_precision():
    """Networks are compared to more digits than accelerators give them by default."""
    with jax.default_matmul_precision("highest"):
        yield


def perturbed(net, scale=0.3):
    """The same network with noise added to every weight, zeros included."""
    # By NumPy: JAX would compile a draw for every shape.
    generator = np.random.default_rng(7)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(scale * generator.normal(size=leaf.shape), leaf.dtype), net
    )


def inputs(net, batch=3):
    x = jax.random.normal(jax.random.key(1), (batch, *net.event_shape), net.param_dtype)
    return x, jnp.linspace(-2, 1, batch, dtype=net.param_dtype)


# One compiled function per call form: eager convolutions would compile one by one.
apply = jax.jit(lambda net, x, noise: net(x, noise))
apply_dropout = jax.jit(lambda net, x, noise, key: net(x, noise, rngs=nnx.Rngs(dropout=key)))


@cases
def test_output_is_zero_when_new_and_of_the_events_shape(make, kwargs):
    net = make(**kwargs, rngs=nnx.Rngs(0))
    x, noise = inputs(net)
    out = apply(net, x, noise)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    np.testing.assert_array_equal(out, 0)


@cases
def test_rows_of_a_batch_are_separate_and_noise_matters(make, kwargs):
    net = perturbed(make(**kwargs, rngs=nnx.Rngs(0)))
    x, noise = inputs(net)
    out = np.asarray(apply(net, x, noise))
    assert np.all(np.std(out.reshape(3, -1), axis=1) > 0) or np.prod(net.event_shape) == 1
    tolerance = 1e-4 * np.abs(out).max()
    np.testing.assert_allclose(apply(net, x[::-1], noise[::-1]), out[::-1], atol=tolerance)
    # With other neighbors in the batch a row stays as it is.
    others = apply(net, x.at[1:].add(1.0), noise.at[1:].add(1.0))
    np.testing.assert_allclose(others[0], out[0], atol=tolerance)
    assert np.abs(others[1:] - out[1:]).max() > 100 * tolerance
    # The same event at three noise levels.
    same = np.asarray(apply(net, jnp.broadcast_to(x[:1], x.shape), noise))
    np.testing.assert_allclose(same[0], out[0], atol=tolerance)
    assert np.abs(same[1] - same[0]).max() > 100 * tolerance
    assert np.abs(same[2] - same[1]).max() > 100 * tolerance


@few_cases
def test_lone_event_equals_its_row(make, kwargs):
    net = perturbed(make(**kwargs, rngs=nnx.Rngs(0)))
    x, noise = inputs(net)
    out = np.asarray(apply(net, x, noise))
    np.testing.assert_allclose(
        apply(net, x[1:2], noise[1:2]), out[1:2], atol=1e-4 * np.abs(out).max()
    )


@few_cases
def test_every_output_depends_on_every_input(make, kwargs):
    net = perturbed(make(**kwargs, rngs=nnx.Rngs(0)))
    x, noise = inputs(net, batch=1)
    jacobian = jax.jit(jax.jacobian(lambda x: net(x, noise)))(x)
    assert np.mean(np.asarray(jacobian) != 0) > 0.99


@few_cases
def test_dropout(make, kwargs):
    net = perturbed(make(**kwargs, dropout=0.3, rngs=nnx.Rngs(0)))
    x, noise = inputs(net)
    plain = apply(net, x, noise)
    np.testing.assert_array_equal(plain, apply(net, x, noise))
    first = apply_dropout(net, x, noise, jax.random.key(0))
    second = apply_dropout(net, x, noise, jax.random.key(1))
    assert not np.allclose(first, second)
    assert not np.allclose(first, plain)
    np.testing.assert_array_equal(first, apply_dropout(net, x, noise, jax.random.key(0)))
    # Without a rate, training mode changes nothing.
    net = perturbed(make(**kwargs, rngs=nnx.Rngs(0)))
    np.testing.assert_allclose(
        apply_dropout(net, x, noise, jax.random.key(0)), apply(net, x, noise), rtol=1e-5, atol=1e-5
    )


@few_cases
def test_networks_of_one_architecture_share_compiled_functions(make, kwargs):
    traces = []

    @jax.jit
    def evaluate(net, x, noise):
        traces.append(None)
        return net(x, noise)

    first, second = make(**kwargs, rngs=nnx.Rngs(0)), make(**kwargs, rngs=nnx.Rngs(1))
    x, noise = inputs(first)
    evaluate(first, x, noise)
    evaluate(second, x, noise)
    evaluate(perturbed(second), x, noise)
    assert len(traces) == 1
    assert jax.tree.structure(first) == jax.tree.structure(second)
    hash(jax.tree.structure(first))


@few_cases
def test_networks_are_pytrees_of_their_weights(make, kwargs):
    net = make(**kwargs, rngs=nnx.Rngs(0))
    leaves = jax.tree.leaves(net)
    assert all(leaf.dtype == net.param_dtype for leaf in leaves)
    x, noise = inputs(net)
    optimizer = optax.adam(1e-2)

    def step(carry, _):
        net, opt_state = carry
        loss, gradient = jax.value_and_grad(lambda net: jnp.mean((net(x, noise) - x) ** 2))(net)
        update, opt_state = optimizer.update(gradient, opt_state, net)
        return (optax.apply_updates(net, update), opt_state), loss

    (net, _), losses = jax.jit(
        lambda net: jax.lax.scan(step, (net, optimizer.init(net)), length=30)
    )(net)
    assert isinstance(net, make)
    assert losses[-1] < 0.5 * losses[0]


@cases
def test_config_builds_the_same_network(make, kwargs):
    net = make(**kwargs, dropout=0.1, rngs=nnx.Rngs(0))
    config = json.loads(json.dumps(net.config))
    assert config == net.config
    again = NETWORKS[type(net).__name__](**config, rngs=nnx.Rngs(0))
    assert jax.tree.structure(again) == jax.tree.structure(net)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(again), jax.tree.leaves(net))
    for name, value in kwargs.items():
        assert config[name] == (list(value) if isinstance(value, tuple) else value)


@few_cases
def test_dtype_is_the_networks(make, kwargs):
    net = perturbed(make(**kwargs, param_dtype="bfloat16", rngs=nnx.Rngs(0)))
    x, noise = inputs(net)
    assert net.config["param_dtype"] == "bfloat16"
    assert apply(net, x.astype(jnp.float32), noise.astype(jnp.float32)).dtype == jnp.bfloat16
    if not jax.config.jax_enable_x64:
        with pytest.raises(ValueError, match="float64 needs 64-bit JAX"):
            make(**kwargs, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        return
    net = perturbed(make(**kwargs, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(net)} == {jnp.dtype("float64")}
    x, noise = inputs(net)
    jaxpr = str(jax.make_jaxpr(lambda x, noise: net(x, noise))(x, noise))
    assert "f64" in jaxpr
    assert "f32" not in jaxpr


def test_weights_keep_the_variance():
    net = MLP((50,), features=(200, 100), embedding=8, rngs=nnx.Rngs(0))
    for layer in (net.first, net.hidden[0]):
        kernel = np.asarray(layer.kernel[...])
        # The variance of n such draws has a relative standard error below sqrt(2 / n).
        np.testing.assert_allclose(
            kernel.var() * kernel.shape[0], 1, atol=4 * np.sqrt(2 / kernel.size)
        )
    net = UNet((8, 8), channels=(24, 32), num_blocks=1, rngs=nnx.Rngs(0))
    kernel = np.asarray(net.shrink[0].kernel[...])
    np.testing.assert_allclose(kernel.var() * 9 * 24, 1, atol=4 * np.sqrt(2 / kernel.size))


DIMENSIONS = {
    1: ("NLC", "LIO", "NLC"),
    2: ("NHWC", "HWIO", "NHWC"),
    3: ("NDHWC", "DHWIO", "NDHWC"),
}


@pytest.mark.parametrize("shape", [(8, 8), (7, 5), (1, 2), (9,), (3, 4, 5)])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_by_matrix_products_is_xlas(shape, stride, monkeypatch):
    num_dims = len(shape)
    x = jax.random.normal(jax.random.key(0), (2, *shape, 4))
    kernel = jax.random.normal(jax.random.key(1), (*(3,) * num_dims, 4, 5))
    options = {"dimension_numbers": DIMENSIONS[num_dims], "precision": None}
    convolve = convolutions._Convolve(("zeros",) * num_dims)

    results = []
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)

        # Functions of their own, for a trace is cached by the function.
        def evaluate(x, kernel):
            return convolve(x, kernel, (stride,) * num_dims, "SAME", **options)

        def loss(x, kernel, evaluate=evaluate):
            return jnp.sum(jnp.sin(evaluate(x, kernel)))

        jaxpr = str(jax.make_jaxpr(evaluate)(x, kernel))
        assert ("conv_general" in jaxpr) == (platform == "gpu")
        tangents = (jnp.cos(x), jnp.cos(kernel))
        both = jax.jvp(evaluate, (x, kernel), tangents)
        results.append((*both, *jax.grad(loss, (0, 1))(x, kernel)))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@few_cases
def test_one_noise_level_for_all_is_that_level_for_each(make, kwargs):
    net = perturbed(make(**kwargs, rngs=nnx.Rngs(0)))
    x, noise = inputs(net)
    each = apply(net, x, jnp.full_like(noise, -0.7))
    shared = apply(net, x, jnp.full((1,), -0.7, noise.dtype))
    np.testing.assert_allclose(shared, each, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"features": ()}, r"features must hold positive integers, got \(\)"),
        ({"features": (8, 0)}, r"features must hold positive integers, got \(8, 0\)"),
        ({"event_shape": (0,)}, "event_shape must hold positive integers"),
        ({"embedding": 7}, "embedding must be a positive even number, got 7"),
        ({"dropout": 1.0}, "dropout must be a probability below one, got 1.0"),
        ({"param_dtype": jnp.int32}, "param_dtype must be a floating dtype, got int32"),
    ],
)
def test_invalid_mlp(kwargs, match):
    with pytest.raises(ValueError, match=match):
        MLP(**{"event_shape": (5,), **kwargs}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"event_shape": (8,), "spatial_dims": 2}, r"must be \(height, width\) or .* got \(8,\)"),
        ({"strides": 0}, "strides must hold positive integers"),
        ({"strides": (2, 2, 2)}, r"one for each of the 2, got \(2, 2, 2\)"),
        ({"padding": "circular"}, "padding must be one of 'zeros', .* got 'circular'"),
        ({"padding": ("zeros",)}, r"padding must be .* one for each of the 2, got \('zeros',\)"),
        ({"channels": ()}, "channels must hold positive integers"),
        ({"num_blocks": 0}, "num_blocks must hold positive integers"),
        ({"attention": (2,)}, "attention must name levels from 0 to 1, got 2"),
        (
            {"attention": (0,), "num_heads": 3},
            "num_heads must divide .* num_heads=3 for a width of 32",
        ),
    ],
)
def test_invalid_unet(kwargs, match):
    with pytest.raises(ValueError, match=match):
        UNet(**{"event_shape": (8, 8), **kwargs}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"patch_size": 0}, "patch_size must hold positive integers"),
        ({"patch_size": (2,)}, r"patch_size must be .* one for each of the 2, got \(2,\)"),
        ({"width": 3, "num_heads": 1}, "width must be at least two per spatial axis"),
        ({"width": 10}, "num_heads must divide .* num_heads=4 for a width of 10"),
        ({"depth": 0}, "depth must hold positive integers"),
    ],
)
def test_invalid_dit(kwargs, match):
    with pytest.raises(ValueError, match=match):
        DiT(**{"event_shape": (8, 8), **kwargs}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("shape", "spatial_dims", "expected"),
    [
        ((128,), None, (1, 1)),
        ((128, 4), 1, (1, 4)),
        ((28, 28), None, (2, 1)),
        ((40, 10), None, (2, 1)),
        ((28, 28), 1, (1, 28)),
        ((32, 32, 3), 2, (2, 3)),
        ((32, 32, 32), 3, (3, 1)),
        ((32, 32, 32, 1), None, (3, 1)),
        ((8, 16, 16, 2), 3, (3, 2)),
    ],
)
def test_readings_of_an_event_shape(shape, spatial_dims, expected):
    assert check_event("UNet", shape, spatial_dims) == (shape, *expected)


@pytest.mark.parametrize("make", [UNet, DiT])
@pytest.mark.parametrize(
    ("shape", "spatial_dims", "match"),
    [
        (
            (3, 8, 8),
            None,
            r"pass spatial_dims=2 for \(height, width, channels\), or spatial_dims=3",
        ),
        ((128, 4), None, r"pass spatial_dims=1 for \(length, channels\), or spatial_dims=2 for"),
        ((8, 8), 3, r"must be \(depth, height, width\) or .* got \(8, 8\)"),
        ((8, 8, 8), 1, r"must be \(length\) or \(length, channels\), got \(8, 8, 8\)"),
        ((2, 2, 2, 2, 2), None, r"got \(2, 2, 2, 2, 2\); .* or use MLP"),
        ((8, 8), 0, "spatial_dims must be 1, 2 or 3, got 0"),
        ((8,), True, "spatial_dims must be 1, 2 or 3, got True"),
        ((), None, r"event_shape must hold positive integers, got \(\)"),
    ],
)
def test_event_shapes_that_are_refused(make, shape, spatial_dims, match):
    with pytest.raises(ValueError, match=match):
        make(shape, spatial_dims=spatial_dims, rngs=nnx.Rngs(0))


PAD_CASES = [
    ((6,), (1,), ("periodic",)),
    ((5, 4), (1, 2), ("reflect", "periodic")),
    ((5, 6), (4, 2), ("periodic", "zeros")),
    ((3, 4, 2), (2, 1, 1), ("zeros", "periodic", "reflect")),
]


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(("shape", "strides", "padding"), PAD_CASES)
def test_convolution_with_a_padding_for_each_axis(shape, strides, padding, platform, monkeypatch):
    x = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype("float32")
    layer = convolutions.conv(3, 4, padding, strides=strides, rngs=nnx.Rngs(0))
    padded = x
    for axis, (size, stride, mode) in enumerate(zip(shape, strides, padding, strict=True), 1):
        out = -(-size // stride)
        total = max((out - 1) * stride + max(3, stride) - size, 0)
        widths = [(0, 0)] * x.ndim
        widths[axis] = (total // 2, total - total // 2)
        padded = np.pad(padded, widths, mode=PADDINGS[mode])
    expected = jax.lax.conv_general_dilated(
        padded,
        layer.kernel[...],
        strides,
        "VALID",
        dimension_numbers=DIMENSIONS[len(shape)],
    )
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    np.testing.assert_allclose(layer(x), expected + layer.bias[...], rtol=1e-4, atol=1e-5)


EQUIVARIANT = {
    "trajectory": ((12, 2), {"spatial_dims": 1, "strides": 3}, {1: 3}),
    "image": ((8, 6), {"channels": (4, 4, 4), "num_blocks": 1, "attention": (2,)}, {1: 4}),
    "volume": ((3, 4, 6), {"spatial_dims": 3, "strides": (1, 4, 2)}, {1: 1, 2: 4, 3: 2}),
}


@pytest.mark.parametrize("name", EQUIVARIANT)
def test_periodic_unet_commutes_with_shifts(name):
    """Along periodic axes, by the product of the strides; along others, not."""
    shape, kwargs, shifts = EQUIVARIANT[name]
    kwargs = {"channels": (4, 4), "num_blocks": 1, **kwargs}
    padding = "periodic" if name != "image" else ("periodic", "zeros")
    net = perturbed(UNet(shape, padding=padding, **kwargs, rngs=nnx.Rngs(0)))
    x, noise = inputs(net, batch=2)
    out = np.asarray(apply(net, x, noise))
    tolerance = 1e-4 * np.abs(out).max()
    for axis, shift in shifts.items():
        shifted = apply(net, jnp.roll(x, shift, axis), noise)
        np.testing.assert_allclose(shifted, np.roll(out, shift, axis), atol=tolerance)
    if name == "image":
        for axis, shift in ((2, 2), (1, 1)):  # the axis is not periodic; the shift is too small
            shifted = apply(net, jnp.roll(x, shift, axis), noise)
            assert np.abs(shifted - np.roll(out, shift, axis)).max() > 100 * tolerance


@pytest.mark.parametrize("padding", PADDINGS)
def test_boundary_is_seen_only_with_zeros(padding):
    """Of a constant field, as of a field without boundaries, the output is constant."""
    kwargs = {"channels": (4, 4), "num_blocks": 1, "padding": padding}
    net = perturbed(UNet((7, 6), **kwargs, rngs=nnx.Rngs(0)))
    out = np.asarray(apply(net, jnp.ones((1, 7, 6)), jnp.zeros(1)))
    spread = np.ptp(out) / np.abs(out).max()
    assert spread > 0.1 if padding == "zeros" else spread < 1e-4


def test_strides_of_each_axis():
    net = UNet((5, 9), channels=(4, 4), num_blocks=1, strides=(1, 4), rngs=nnx.Rngs(0))
    shrink = perturbed(net.shrink[0])
    assert shrink(jnp.ones((1, 5, 9, 4))).shape == (1, 5, 3, 4)
    # No element is skipped, also with strides above the usual width of a kernel.
    gradient = jax.grad(lambda x: jnp.sum(shrink(x)))(jnp.ones((1, 5, 9, 4)))
    assert np.all(np.asarray(gradient) != 0)
    up = convolutions.upsample(jnp.arange(6.0).reshape(1, 2, 3, 1), (1, 4), (2, 9))
    expected = np.repeat(np.arange(6.0).reshape(2, 3), 4, axis=1)[:, :9]
    np.testing.assert_array_equal(up[0, :, :, 0], expected)


@pytest.mark.parametrize(
    ("sizes", "patch"), [((5,), (2,)), ((4, 6), (2, 3)), ((3, 4, 5), (2, 1, 2))]
)
def test_patches(sizes, patch):
    x = np.random.default_rng(0).normal(size=(2, *sizes, 3)).astype("float32")
    grid = tuple(-(-n // p) for n, p in zip(sizes, patch, strict=True))
    h = dit._to_patches(jnp.asarray(x), grid, patch)
    ends = [(0, n * p - size) for n, p, size in zip(grid, patch, sizes, strict=True)]
    padded = np.pad(x, ((0, 0), *ends, (0, 0)))
    for number, index in enumerate(np.ndindex(*grid)):
        window = [slice(i * p, (i + 1) * p) for i, p in zip(index, patch, strict=True)]
        np.testing.assert_array_equal(h[:, number], padded[:, *window].reshape(2, -1))
    np.testing.assert_array_equal(dit._from_patches(h, grid, patch, sizes), x)


def test_patches_are_told_apart_by_their_positions():
    positions = np.asarray(dit._positions((3, 4, 5), 21, np.dtype("float32")))
    assert positions.shape == (60, 21)
    distances = np.linalg.norm(positions[:, None] - positions, axis=-1)
    assert np.min(distances + 10 * np.eye(60)) > 0.5
    # The first axis varies slowest, as in the order of the patches.
    np.testing.assert_array_equal(positions[:20, :6], np.tile(positions[:1, :6], (20, 1)))


def test_new_block_of_a_transformer_is_the_identity():
    net = DiT(**CASES["DiT"][1], rngs=nnx.Rngs(0))
    h = jax.random.normal(jax.random.key(0), (2, 4, 16))
    np.testing.assert_array_equal(net.blocks[0](h, jnp.ones((2, 64)), None), h)


@few_cases
def test_context_is_seen_and_required(make, kwargs):
    net = perturbed(make(**kwargs, context_shape=(2,), rngs=nnx.Rngs(0)))
    x, noise = inputs(net)
    with_context = jax.jit(lambda net, context: net(x, noise, context))
    out = with_context(net, jnp.ones((3, 2)))
    other = with_context(net, jnp.ones((3, 2)).at[1].set(0.0))
    np.testing.assert_allclose(other[::2], out[::2], rtol=1e-4, atol=1e-4)
    assert not np.allclose(other[1], out[1], rtol=1e-2)
    with pytest.raises(ValueError, match=r"context_shape \(2,\), got None"):
        net(x, noise)


REMAT_CASES = {
    "UNet": (UNet, {"event_shape": (64,), "channels": (4,), "num_blocks": 3}),
    "DiT": (DiT, {"event_shape": (64,), "width": 8, "depth": 4, "num_heads": 2}),
}


@pytest.mark.parametrize(("make", "kwargs"), REMAT_CASES.values(), ids=REMAT_CASES)
def test_rematerialization(make, kwargs):
    """The same gradients, dropout included, from less memory."""
    kwargs = {**kwargs, "embedding": 8, "dropout": 0.2}
    nets = [perturbed(make(**kwargs, remat=r, rngs=nnx.Rngs(0))) for r in (False, True)]
    assert [net.config["remat"] for net in nets] == [False, True]
    x, noise = inputs(nets[0], batch=8)

    @jax.jit
    def gradient(net, key):
        def loss(net):
            return jnp.mean((net(x, noise, rngs=nnx.Rngs(dropout=key)) - x) ** 2)

        return jax.grad(loss)(net)

    compiled = [gradient.lower(net, jax.random.key(0)).compile() for net in nets]
    plain, remat = (c.memory_analysis().temp_size_in_bytes for c in compiled)
    assert remat < 0.7 * plain
    gradients = [c(net, jax.random.key(0)) for c, net in zip(compiled, nets, strict=True)]
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 * np.abs(a).max())


@pytest.mark.parametrize(("make", "kwargs"), REMAT_CASES.values(), ids=REMAT_CASES)
def test_rematerialized_network_that_is_closed_over(make, kwargs):
    """Also in forward mode, and under `vmap`."""
    if make is UNet:  # whose first block on the way up differs from the second
        kwargs = {**kwargs, "channels": (4, 4), "num_blocks": 2}
    nets = [
        perturbed(make(**kwargs, embedding=8, remat=r, rngs=nnx.Rngs(0))) for r in (False, True)
    ]
    x, noise = inputs(nets[0], batch=2)

    def pushforwards(net):
        # Networks of an outer trace, in the traces of `jvp` and `vmap`.
        return jax.vmap(lambda v: jax.jvp(lambda x: net(x, noise), (x,), (v,)))(jnp.stack([x]))

    for a, b in zip(*map(jax.jit(pushforwards), nets), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 * np.abs(a).max())


def test_invalid_inputs():
    net = MLP((2, 3), features=(8,), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"one batch axis before the event_shape \(2, 3\)"):
        net(jnp.zeros((2, 3)), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"got shape \(4, 1, 2, 3\); flatten several batch axes"):
        net(jnp.zeros((4, 1, 2, 3)), jnp.zeros(4))
    with pytest.raises(ValueError, match=r"Expected noise with shape \(4,\) or \(1,\), got \(\)"):
        net(jnp.zeros((4, 2, 3)), jnp.zeros(()))

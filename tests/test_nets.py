"""Networks: what they promise to denoisers, to training and to checkpoints."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from numpyro_diffprior.nets import NETWORKS
from numpyro_diffprior.nets import layers as net_layers
from numpyro_diffprior.nets.mlp import MLP
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
    "UNet colors": (UNet, {"event_shape": (16, 16, 3), "channels": (4, 8), "num_blocks": 1}),
    "UNet digits": (
        UNet,
        {"event_shape": (28, 28), "channels": (4, 4, 8), "num_blocks": 1, "attention": (2,)},
    ),
}

cases = pytest.mark.parametrize(("make", "kwargs"), CASES.values(), ids=CASES)
few_cases = pytest.mark.parametrize(
    ("make", "kwargs"), [CASES["MLP"], CASES["UNet attention"]], ids=["MLP", "UNet"]
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


@pytest.mark.parametrize("shape", [(8, 8), (7, 5), (1, 2)])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_by_matrix_products_is_xlas(shape, stride, monkeypatch):
    x = jax.random.normal(jax.random.key(0), (2, *shape, 4))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 4, 5))
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": None}

    results = []
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)

        # Functions of their own, for a trace is cached by the function.
        def evaluate(x, kernel):
            return net_layers._convolve(x, kernel, (stride, stride), "SAME", **options)

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
        ({"event_shape": (8,)}, r"must be \(height, width\) or .* got \(8,\)"),
        ({"channels": ()}, "channels must hold positive integers"),
        ({"num_blocks": 0}, "num_blocks must hold positive integers"),
        ({"attention": (2,)}, "attention must name levels from 0 to 1, got 2"),
        ({"attention": (0,), "num_heads": 3}, "num_heads must divide .* num_heads=3 for 32"),
    ],
)
def test_invalid_unet(kwargs, match):
    with pytest.raises(ValueError, match=match):
        UNet(**{"event_shape": (8, 8), **kwargs}, rngs=nnx.Rngs(0))


def test_invalid_inputs():
    net = MLP((2, 3), features=(8,), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"one batch axis before the event_shape \(2, 3\)"):
        net(jnp.zeros((2, 3)), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"got shape \(4, 1, 2, 3\); flatten several batch axes"):
        net(jnp.zeros((4, 1, 2, 3)), jnp.zeros(4))
    with pytest.raises(ValueError, match=r"Expected noise with shape \(4,\) or \(1,\), got \(\)"):
        net(jnp.zeros((4, 2, 3)), jnp.zeros(()))

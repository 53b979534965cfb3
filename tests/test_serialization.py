"""Denoisers come back from their files bit by bit, and nothing else comes out of a file."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import COVARIANCES, covariance
from safetensors import safe_open
from safetensors.numpy import save

from numpyro_diffprior.denoisers import serialization
from numpyro_diffprior.denoisers.denoiser import Denoiser
from numpyro_diffprior.denoisers.exact import GaussianDenoiser, MixtureDenoiser
from numpyro_diffprior.denoisers.network import NetworkDenoiser
from numpyro_diffprior.denoisers.serialization import load_denoiser, read_metadata, save_denoiser
from numpyro_diffprior.denoisers.windows import WindowDenoiser
from numpyro_diffprior.denoisers.wrappers import ConditionedDenoiser
from numpyro_diffprior.linalg.covariances import Diagonal, Isotropic
from numpyro_diffprior.nets.adapters import FunctionNetwork
from numpyro_diffprior.nets.dit import DiT
from numpyro_diffprior.nets.mlp import MLP
from numpyro_diffprior.nets.unet import UNet

X64 = jax.config.jax_enable_x64


class OwnNet(nnx.Module):
    """A user's network, with all that a module can hold: streams, statistics, plain arrays."""

    def __init__(self, event_shape, *, width, rngs):
        self.event_shape = tuple(event_shape)
        self.width = width
        self.layers = nnx.List(
            [nnx.Linear(self.event_shape[0], width, rngs=rngs), nnx.Linear(width, 2, rngs=rngs)]
        )
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(width, use_running_average=True, rngs=rngs)
        self.offset = jnp.zeros(width)

    @property
    def config(self):
        return {"event_shape": list(self.event_shape), "width": self.width}

    def __call__(self, x, noise, *, rngs=None):
        h = self.norm(self.layers[0](x) + self.offset + noise[:, None])
        return self.layers[1](self.drop(h, deterministic=True))


class Stubborn(OwnNet):
    config = None


def perturb(net):
    """As if trained: no weight is where the constructor puts it."""
    state = nnx.state(net, nnx.Not(nnx.RngState))
    rng = np.random.default_rng(0)
    nnx.update(net, jax.tree.map(lambda w: w + jnp.asarray(rng.uniform(size=w.shape)), state))
    return net


def gaussian(name="Dense", size=4):
    rng = np.random.default_rng(1)
    return GaussianDenoiser(jnp.asarray(rng.normal(size=size)), covariance(name, rng, size))


def mixture():
    rng = np.random.default_rng(2)
    covs = Diagonal(jnp.asarray(rng.uniform(0.5, 1.0, (3, 2))))
    return MixtureDenoiser(
        jnp.asarray([0.2, 0.3, 0.5]), jnp.asarray(rng.normal(size=(3, 2))), covs
    )


def mlp():
    net = perturb(MLP((2, 2), features=(8, 8), embedding=4, dropout=0.1, rngs=nnx.Rngs(3)))
    fitted = NetworkDenoiser(
        net, jnp.ones((2, 2)), covariance("Dense", np.random.default_rng(4), 4)
    )
    return fitted.with_summary(jnp.full((2, 2), 2.0), Isotropic(jnp.asarray(3.0), 4))


def unet():
    net = UNet(
        (5, 4), channels=(4, 8), num_blocks=1, attention=(1,), embedding=4, rngs=nnx.Rngs(5)
    )
    return NetworkDenoiser(perturb(net))


def dit():
    net = DiT((6, 5), patch_size=2, width=8, depth=1, num_heads=2, embedding=4, rngs=nnx.Rngs(5))
    return NetworkDenoiser(perturb(net))


def half():
    net = MLP((2,), features=(4,), embedding=4, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(6))
    return NetworkDenoiser(net)


def conditional():
    return perturb(MLP((2,), features=(4,), context_shape=(3,), rngs=nnx.Rngs(8)))


def own():
    return NetworkDenoiser(perturb(OwnNet((2,), width=3, rngs=nnx.Rngs(7))))


CASES = {name: lambda name=name: gaussian(name) for name in COVARIANCES}
CASES |= {"mixture": mixture, "mlp": mlp, "unet": unet, "dit": dit, "half": half, "own": own}
CASES |= {"conditioned": lambda: ConditionedDenoiser(NetworkDenoiser(conditional()), jnp.ones(3))}
CASES |= {"windows": lambda: WindowDenoiser(gaussian(), 7, stride=2)}
CASES |= {"scalar": lambda: GaussianDenoiser(1.5, Isotropic(2.0, 1))}


def rewrite(path, tensors=None, **header):
    """Change a file and seal it again, as a stranger or another release would."""
    with safe_open(path, "np") as file:
        header = file.metadata() | header
        tensors = {key: file.get_tensor(key) for key in file.keys()} | (tensors or {})  # noqa: SIM118
    header["digest"] = serialization._digest(header, tensors)
    path.write_bytes(save(tensors, header))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "prior.safetensors"


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_exact(path, case):
    denoiser = CASES[case]()
    save_denoiser(path, denoiser)
    loaded = load_denoiser(path, networks={"OwnNet": OwnNet})
    assert type(loaded) is type(denoiser)
    if case != "own":  # its dropout has a random stream of its own, which is built anew
        assert jax.tree.structure(loaded) == jax.tree.structure(denoiser)
    x_t = jnp.asarray(np.random.default_rng(8).normal(size=(3, *denoiser.event_shape)))
    x_t = x_t.astype(denoiser.dtype)
    for before, after in zip(jax.tree.leaves(denoiser), jax.tree.leaves(loaded), strict=True):
        if not jnp.issubdtype(before.dtype, jax.dtypes.prng_key):
            assert after.dtype == before.dtype
            if before.dtype != jnp.uint32:  # the count of that stream
                np.testing.assert_array_equal(after, before)
    np.testing.assert_array_equal(loaded(x_t, 0.7), denoiser(x_t, 0.7))


def test_base_and_summary_are_kept_apart(path):
    save_denoiser(path, mlp())
    loaded = load_denoiser(path)
    assert loaded.mean[0, 0] == 2.0
    assert loaded.base.mean[0, 0] == 1.0
    assert isinstance(loaded.cov, Isotropic)


def test_arrays_of_any_layout_are_written(path):
    """As weights that another library gave in the order of Fortran."""
    net = OwnNet((2,), width=3, rngs=nnx.Rngs(0))
    weights = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    net.layers[0].kernel.set_value(weights)
    save_denoiser(path, NetworkDenoiser(net))
    loaded = load_denoiser(path, networks={"OwnNet": OwnNet})
    np.testing.assert_array_equal(loaded.net.layers[0].kernel[...], weights)


def test_loaded_denoiser_needs_no_new_compilation(path):
    traces = []

    @jax.jit
    def evaluate(denoiser, x_t):
        traces.append(1)
        return denoiser(x_t, 1.0)

    denoiser = mlp()
    save_denoiser(path, denoiser)
    x_t = jnp.ones((1, 2, 2))
    evaluate(denoiser, x_t)
    evaluate(load_denoiser(path), x_t)
    assert len(traces) == 1


def test_float32_stays_float32(path):
    denoiser = GaussianDenoiser(jnp.zeros(2, jnp.float32), jnp.eye(2, dtype=jnp.float32))
    save_denoiser(path, denoiser)
    assert load_denoiser(path).dtype == jnp.float32


def test_float64_is_kept_or_refused(path):
    save_denoiser(path, GaussianDenoiser(jnp.zeros(2), jnp.eye(2)))
    rewrite(path, {"mean": np.full(2, 0.1)})
    if X64:
        assert load_denoiser(path).mean.dtype == jnp.float64
        np.testing.assert_array_equal(load_denoiser(path).mean, np.full(2, 0.1))
    else:
        with pytest.raises(ValueError, match="'mean' is float64.*JAX_ENABLE_X64"):
            load_denoiser(path)


def test_metadata(path):
    save_denoiser(path, gaussian(), metadata={"iteration": 3, "notes": ["a", None]})
    assert read_metadata(path) == {"iteration": 3, "notes": ["a", None]}
    save_denoiser(path, gaussian())
    assert read_metadata(path) == {}
    with pytest.raises(ValueError, match="metadata must be JSON-serializable"):
        save_denoiser(path, gaussian(), metadata={"array": jnp.ones(2)})


def test_path_may_be_a_string(path):
    save_denoiser(str(path), gaussian())
    assert load_denoiser(str(path)).event_shape == (4,)


@pytest.mark.parametrize("broken", ["write", "replace"])
def test_failure_leaves_the_old_file(path, monkeypatch, broken):
    save_denoiser(path, gaussian())
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, {"write": "fsync", "replace": "replace"}[broken], fail)
    with pytest.raises(OSError, match="disk full"):
        save_denoiser(path, mixture())
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_truncated_file_is_refused(path):
    save_denoiser(path, mlp())
    content = path.read_bytes()
    for size in (0, 4, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            load_denoiser(path)


def test_flipped_bits_are_told(path):
    save_denoiser(path, mlp())
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for place in np.linspace(start, len(content) - 1, 40).astype(int):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="does not match the digest"):
            load_denoiser(path)


def test_small_file_makes_no_large_network(path):
    built = []

    class Counting(OwnNet):
        def __init__(self, event_shape, *, width, rngs):
            built.append(isinstance(jnp.zeros(()) + rngs.params.count[...], jax.core.Tracer))
            super().__init__(event_shape, width=width, rngs=rngs)

    save_denoiser(path, own())
    with safe_open(path, "np") as file:
        tree = file.metadata()["tree"]
    rewrite(path, tree=tree.replace('"width": 3', '"width": 1000000000'))
    with pytest.raises(ValueError, match="do not fit the class"):
        load_denoiser(path, networks={"OwnNet": Counting})
    assert built == [True]


def test_network_that_needs_numbers_to_be_built_loads(path):
    class Concrete(OwnNet):
        def __init__(self, event_shape, *, width, rngs):
            super().__init__(event_shape, width=width, rngs=rngs)
            assert float(self.offset.sum()) == 0.0
            assert bool(jnp.isfinite(rngs.noise()).all)

    save_denoiser(path, own())
    assert load_denoiser(path, networks={"OwnNet": Concrete}).event_shape == (2,)


@pytest.mark.parametrize("depth", [500, 100_000])
def test_deep_header_is_refused(path, depth):
    save_denoiser(path, gaussian())
    rewrite(path, tree='{"items": [' * depth + "]}" * depth)
    with pytest.raises(ValueError, match="nested too deeply|expected a denoiser|damaged"):
        load_denoiser(path)
    rewrite(path, metadata="[" * depth + "]" * depth)
    if depth > 10_000:
        with pytest.raises(ValueError, match="'metadata' in the header is nested too deeply"):
            read_metadata(path)


def test_only_a_regular_file_is_replaced(path, tmp_path):
    target = tmp_path / "target"
    target.write_text("kept")
    path.symlink_to(target)
    with pytest.raises(FileExistsError, match="regular file"):
        save_denoiser(path, gaussian())
    assert path.is_symlink()
    assert target.read_text() == "kept"
    with pytest.raises(FileExistsError, match="regular file"):
        save_denoiser(tmp_path, gaussian())


def test_file_of_another_owner_is_kept(path, monkeypatch):
    save_denoiser(path, gaussian())
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="belongs to another user"):
        save_denoiser(path, gaussian())


def test_mode_is_kept(path):
    save_denoiser(path, gaussian())
    path.chmod(0o640)
    save_denoiser(path, gaussian())
    assert path.stat().st_mode & 0o777 == 0o640


def test_missing_file_is_an_error_of_the_system(path):
    with pytest.raises(FileNotFoundError, match="prior"):
        load_denoiser(path)


def test_foreign_files_are_refused(path):
    path.write_bytes(save({"a": np.ones(2)}))
    with pytest.raises(ValueError, match="expected a file written by save_denoiser .*None"):
        load_denoiser(path)
    path.write_text("not a tensor in sight")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load_denoiser(path)


def test_other_version_is_refused(path):
    save_denoiser(path, gaussian())
    rewrite(path, version="1")
    for read in (load_denoiser, read_metadata):
        with pytest.raises(ValueError, match="expected version 5 of the format, got 1"):
            read(path)


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        ('{"type": "Popen", "fields": {"args": {"value": "true"}}}', "expected one of the types"),
        ('{"type": "os.system", "fields": {}}', "expected one of the types"),
        (
            '{"network": "eval", "config": {}}',
            "expected one of the networks DiT, MLP, UNet, got 'eval'",
        ),
        ('{"network": "MLP", "config": {"net_layers": 3}}', "does not take the stored config"),
        ('{"type": "Diagonal", "fields": {"a": {"value": 1}}}', "expected the fields"),
        (
            '{"type": "Diagonal", "fields": {"variances": {"array": "b"}}}',
            "cannot read .*variances",
        ),
        ('{"type": "Diagonal", "fields": [1]}', "cannot read"),
        ('{"value": {"nested": 1}}', "cannot read"),
        ('{"value": 1}', "expected a denoiser, got int"),
        ('{"type": "Diagonal", "fields": {"variances": {"array": "mean"}}}', "got Diagonal"),
        ("[", "expected JSON as 'tree'"),
        ("null", "cannot read None"),
    ],
)
def test_what_is_not_listed_is_refused(path, tree, match):
    save_denoiser(path, gaussian())
    rewrite(path, tree=tree)
    with pytest.raises(ValueError, match=match):
        load_denoiser(path)


def test_own_network_must_be_passed(path):
    save_denoiser(path, own())
    with pytest.raises(ValueError, match=r'got .OwnNet.; pass its class: networks={"OwnNet": Own'):
        load_denoiser(path)


def test_own_network_must_be_the_one_that_was_saved(path):
    save_denoiser(path, own())

    class Other(OwnNet):
        def __init__(self, event_shape, *, width, rngs):
            super().__init__(event_shape, width=width + 1, rngs=rngs)

    with pytest.raises(ValueError, match=r"do not fit .*layers.0.kernel.*\(2, 4\).*\(2, 3\)"):
        load_denoiser(path, networks={"OwnNet": Other})

    class Larger(OwnNet):
        def __init__(self, event_shape, *, width, rngs):
            super().__init__(event_shape, width=width, rngs=rngs)
            self.more = nnx.Param(jnp.ones(1))

    with pytest.raises(ValueError, match=r"expected also {'more': \(1,\)}, got \[None\]"):
        load_denoiser(path, networks={"OwnNet": Larger})


def test_network_without_config_is_refused(path):
    class NoConfig(nnx.Module):
        event_shape = (2,)

        def __call__(self, x, noise, *, rngs=None):
            return x

    with pytest.raises(ValueError, match="NoConfig has no `config`: give it"):
        save_denoiser(path, NetworkDenoiser(NoConfig()))
    net = Stubborn((2,), width=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="Expected a dict as config of the network Stubborn"):
        save_denoiser(path, NetworkDenoiser(net))
    net.config = {"activation": jax.nn.relu}
    with pytest.raises(ValueError, match="network Stubborn must be JSON-serializable"):
        save_denoiser(path, NetworkDenoiser(net))
    assert list(path.parent.iterdir()) == []


def test_own_denoiser_is_refused(path):
    class Own(Denoiser):
        mean, cov = jnp.zeros(2), Isotropic(1.0, 2)

        def __call__(self, x_t, sigma):
            return x_t

    with pytest.raises(ValueError, match="The denoiser is a Own, which cannot be stored"):
        save_denoiser(path, Own())

    class GaussianDenoiser(Own):  # a name alone does not pass
        pass

    with pytest.raises(ValueError, match="The denoiser is a GaussianDenoiser, which cannot"):
        save_denoiser(path, GaussianDenoiser())
    net = FunctionNetwork(lambda params, x, noise: params * x, jnp.ones(()), (2,))
    with pytest.raises(ValueError, match="The denoiser's 'net' is a FunctionNetwork"):
        save_denoiser(path, dataclasses.replace(own(), net=net))


def test_header_is_plain_json(path):
    save_denoiser(path, mlp())
    with safe_open(path, "np") as file:
        tree = json.loads(file.metadata()["tree"])
        names = set(file.keys())
    assert tree["type"] == "NetworkDenoiser"
    assert tree["fields"]["net"]["network"] == "MLP"
    assert tree["fields"]["cov"]["fields"]["size"] == {"value": 4}
    assert {"mean", "base.mean", "net.first.kernel"} <= names

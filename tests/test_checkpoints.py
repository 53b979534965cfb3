"""Runs of EM that stop and go on, with the same numbers as if they had not stopped."""

import io
import json
import pickle
import resource
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import orbax.checkpoint as ocp
import pytest
import xarray as xr
from flax import nnx, serialization
from safetensors import numpy as safetensors

import numpyro_diffprior as ndp
from numpyro_diffprior.em import checkpoints as checkpoints_module
from numpyro_diffprior.em import em as em_module
from numpyro_diffprior.em.conditions import describe_arrays
from numpyro_diffprior.em.store import ArrayFiles
from numpyro_diffprior.infer import blocks
from numpyro_diffprior.infer.evidence import LogEvidence

N, D, NOISE = 60, 2, 0.3
KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
Y = jnp.asarray(RNG.normal(size=(N, D)) * [1.0, 2.0] + 1, "float32")


def model(prior, y=None):
    noise = numpyro.param("noise", NOISE, constraint=dist.constraints.positive)
    with numpyro.plate("n", N):
        y = None if y is None else numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)


def make_prior(features=8):
    net = ndp.MLP((D,), features=(features,), embedding=8, dropout=0.1, rngs=nnx.Rngs(0))
    return ndp.DiffusionPrior(ndp.NetworkDenoiser(net), sampler=ndp.samplers.MultistepSDE(4))


def make_em(model=model, learning_rate=1e-3, num_particles=2, **options):
    return ndp.EM(
        model,
        optax.adam(learning_rate),
        e_step=ndp.EStep(num_particles, max_batch_size=32),  # four parts
        m_step=ndp.MStep(num_steps=4, batch_size=16),
        start=ndp.GaussianStart(num_iterations=4),
        **options,
    )


@pytest.fixture(scope="module", autouse=True)
def small_parts():
    """Parts of an E-step have one block each, as those of a long one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_PART_WORK", 1)
        yield


def run(em, num_iterations, folder=None, prior=None, y=Y, key=KEY, **options):
    return em.run(
        key,
        num_iterations,
        make_prior() if prior is None else prior,
        y,
        progress_bar=False,
        checkpoint=folder,
        **options,
    )


def assert_same(a, b):
    """Bit by bit, except for times."""
    a, b = (
        r._replace(history=r.history._replace(e_step_seconds=0, m_step_seconds=0)) for r in (a, b)
    )
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*(ndp.to_arrays(r).values() for r in (a, b)), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def numbers(folder):
    """The numbers of the iterations that are saved."""
    return sorted(int(path.name) for path in (folder / "iterations").iterdir())


@pytest.fixture(scope="module")
def whole():
    """The result of a run of four iterations without checkpoints."""
    return run(make_em(), 4, heldout=(Y,))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that was stopped after two iterations."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert run(make_em(), 2, folder, heldout=(Y,)).history.loss.shape == (2,)
    return folder


@pytest.fixture
def folder(stopped, tmp_path):
    """A copy of it."""
    return shutil.copytree(stopped, tmp_path / "run")


def test_a_run_goes_on_with_the_same_numbers(folder, whole):
    assert numbers(folder) == [0, 1, 2]
    for _ in range(2):  # at its end, it returns what it ended with
        assert_same(run(make_em(), 4, folder, heldout=(Y,)), whole)
    assert numbers(folder) == [2, 3, 4]


def test_a_run_goes_on_from_what_was_not_yet_saved(tmp_path, whole):
    """Every third iteration is saved, and the one before an error."""

    def fail(state, metrics):
        if state.num_iterations == 2:
            raise RuntimeError("my own mistake")

    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="my own mistake"):
        run(make_em(), 4, folder, heldout=(Y,), save_every=3, callback=fail)
    assert numbers(folder) == [0, 2]
    assert_same(run(make_em(), 4, folder, heldout=(Y,), save_every=3), whole)
    assert numbers(folder) == [2, 3, 4]


def test_the_history_is_beside_the_checkpoints(folder, whole):
    """It is written anew by a run that goes on, whatever is there."""
    path = folder / "history.nc"
    assert xr.load_dataset(path).sizes["iteration"] == 2
    path.write_text("half a fi")
    result = run(make_em(), 4, folder, heldout=(Y,))
    assert xr.load_dataset(path).identical(result.history.to_dataset())
    assert {file.name for file in folder.iterdir()} == {"iterations", "draws", "history.nc"}
    state = make_em().load_state(folder, make_prior(), Y)
    run(make_em(), 1, folder.with_name("other"), init_state=state)
    other = xr.load_dataset(folder.with_name("other") / "history.nc")
    np.testing.assert_array_equal(other["iteration"], [5])


def test_a_history_that_cannot_be_written(folder, whole):
    (folder / "history.nc").unlink()
    (folder / "history.nc").mkdir()
    with pytest.warns(UserWarning, match="history could not be written.*Is a dir") as caught:
        assert_same(run(make_em(), 4, folder, heldout=(Y,)), whole)
    assert len(caught) == 1
    assert numbers(folder) == [2, 3, 4]


def test_a_log_goes_on(tmp_path, whole):
    """A run that is stopped after three iterations, of which two are saved, repeats the third."""

    def go(num_iterations, folder):
        log = ndp.CSVLogger(tmp_path / "metrics.csv")
        run(make_em(), num_iterations, folder, heldout=(Y,), callback=log)

    go(2, tmp_path / "run")
    saved = shutil.copytree(tmp_path / "run", tmp_path / "saved")
    go(3, tmp_path / "run")
    go(4, saved)
    rows = np.genfromtxt(tmp_path / "metrics.csv", delimiter=",", names=True)
    np.testing.assert_array_equal(rows["iteration"], [1, 2, 3, 4])
    np.testing.assert_array_equal(rows["loss"].astype("float32"), whole.history.loss)


@pytest.fixture
def drawn(monkeypatch):
    """The parts of E-steps that are drawn, four in each; an error ends them at ``limit``."""

    class Drawn(list):
        limit = None

    draw, drawn = blocks._draw_part, Drawn()

    def count(*args):
        drawn.append(args)
        if len(drawn) == drawn.limit:
            raise RuntimeError("no more")
        return draw(*args)

    monkeypatch.setattr(blocks, "_draw_part", count)
    monkeypatch.setattr(checkpoints_module, "_DRAWS_SECONDS", 0.0)
    return drawn


def stop(drawn, limit, *args, **kwargs):
    """Run until an error in this part, counted from here."""
    drawn.clear()
    drawn.limit = limit
    with pytest.raises(RuntimeError, match="no more"):
        run(make_em(), *args, **kwargs)
    drawn.clear()
    drawn.limit = None


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_an_e_step_goes_on(tmp_path, monkeypatch, drawn, num_parts):
    """After an error in one of the parts of the second one; earlier parts are not drawn anew."""
    monkeypatch.setattr(checkpoints_module, "_DRAWS_SECONDS", 0.0 if num_parts > 1 else 1e6)
    folder = tmp_path / "run"
    stop(drawn, 4 + num_parts, 4, folder, save_every=9)
    assert numbers(folder) == [0, 1]
    # Neither a run that is refused nor a look at the state changes anything.
    saved = sorted((folder / "draws").iterdir())
    (folder / "iterations" / "9.orbax-checkpoint-tmp").mkdir()  # as that of a running process
    assert make_em().load_state(folder, make_prior(), Y).num_iterations == 1
    assert (folder / "iterations" / "9.orbax-checkpoint-tmp").exists()
    with pytest.raises(ValueError, match="the argument 'y' differs"):
        run(make_em(), 2, folder, y=Y + 1)
    assert sorted((folder / "draws").iterdir()) == saved
    drawn.clear()
    result = run(make_em(), 2, folder, save_every=9)
    assert len(drawn) == 4 - (num_parts - 1)
    assert not list((folder / "draws").iterdir())
    assert_same(result, run(make_em(), 2))


@pytest.mark.parametrize("lost", [[1], [2], [3], [1, 2], None])
def test_draws_that_are_not_complete(tmp_path, monkeypatch, drawn, lost):
    """As of a run that was killed while it deleted them; or all are there, but of other parts."""
    folder = tmp_path / "run"
    stop(drawn, 4 + 4, 4, folder)
    assert sorted(int(path.stem) for path in (folder / "draws").iterdir()) == [1, 2, 3]
    if lost is None:
        monkeypatch.setattr(
            blocks, "_MAX_PARTS", 2
        )  # a program of its own, which rounds otherwise
        results = run(make_em(), 2, folder), run(make_em(), 2)
        for a, b in zip(*(ndp.to_arrays(r.state.draws).values() for r in results), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
        return
    for number in lost:
        (folder / "draws" / f"{number}.safetensors").unlink()
    assert_same(run(make_em(), 2, folder), run(make_em(), 2))


@pytest.mark.parametrize("damage", ["truncated", "foreign", "changed"])
def test_draws_that_are_damaged(tmp_path, drawn, damage):
    """They, and those after them, are drawn again, and saved in their place."""
    folder = tmp_path / "run"
    stop(drawn, 4 + 4, 4, folder)
    (folder / "draws" / "of another kind.safetensors").write_bytes(b"")
    path = folder / "draws" / "2.safetensors"
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "foreign":
        safetensors.save_file({"x": np.zeros(2)}, path)
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    stop(drawn, 3, 2, folder)  # after two more parts
    result = run(make_em(), 2, folder)
    assert len(drawn) == 1
    assert_same(result, run(make_em(), 2))


@pytest.mark.parametrize("x", [np.arange(6.0).reshape(2, 3).T, np.arange(6)[::2], np.array(3.0)])
def test_arrays_of_any_layout_are_written(tmp_path, x):
    files = ArrayFiles(tmp_path)
    files.write(1, {"x": x}, about=["something"])
    header, arrays = files.read(1)
    assert header["about"] == ["something"]
    assert arrays["x"].shape == x.shape
    np.testing.assert_array_equal(arrays["x"], x)


def test_the_best_priors_are_kept(tmp_path, monkeypatch):
    """Those of the second iteration, after which the run was stopped twice."""

    def judge(values):
        def known(*_, **__):
            return LogEvidence(jnp.asarray([next(values)]), jnp.ones(1))

        monkeypatch.setattr(em_module, "estimate_evidence", known)

    judge(iter([-3.0, -1.0, -2.0, -2.5]))
    expected = run(make_em(), 4, heldout=(Y,))
    judge(iter([-3.0, -1.0, -2.0, -2.5]))
    for num_iterations in (2, 3, 4):
        found = run(make_em(), num_iterations, tmp_path, heldout=(Y,), patience=2)
    assert_same(found, expected)
    assert_same(run(make_em(), 9, tmp_path, heldout=(Y,), patience=2), expected)


def test_a_state_goes_on_under_other_conditions(folder):
    em = make_em(learning_rate=3e-4, num_particles=3)
    state = em.load_state(folder, make_prior(), Y)
    assert state.num_iterations == 2
    result = run(em, 1, init_state=state)
    assert result.state.num_iterations == 3
    (folder.parent / "empty").mkdir()
    for name in ("other", "empty"):
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            em.load_state(folder.parent / name, make_prior(), Y)
    assert not (folder.parent / "other").exists()
    damage_header(folder / "iterations" / "2")
    with pytest.raises(ValueError, match="2' cannot be read"):
        em.load_state(folder, make_prior(), Y)


def test_a_run_from_a_state_goes_on(folder, tmp_path):
    em = make_em()
    state = em.load_state(folder, make_prior(), Y)
    expected = run(em, 2, init_state=state)
    run(em, 1, tmp_path / "other", init_state=state)
    assert_same(run(em, 2, tmp_path / "other", init_state=state), expected)
    with pytest.raises(ValueError, match="the start differs from that of the checkpoint"):
        run(em, 2, tmp_path / "other", init_state=state._replace(num_iterations=0))


def renamed_model(prior, y=None):
    with numpyro.handlers.scope(prefix="my", divider="_"):
        model(prior, y)


def scaled_model(prior, y=None):
    noise = numpyro.param("noise", NOISE, constraint=dist.constraints.positive)
    with numpyro.plate("n", N):
        y = None if y is None else numpyro.subsample(y, event_dim=1)
        x = numpyro.sample("x", prior)
        with numpyro.handlers.scale(scale=0.5):
            numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)


OTHERS = {
    "the random key differs": lambda f: run(make_em(), 4, f, heldout=(Y,), key=jax.random.key(1)),
    "the argument 'y' differs": lambda f: run(make_em(), 4, f, y=Y.at[3, 1].add(1), heldout=(Y,)),
    "the held-out data differs": lambda f: run(make_em(), 4, f, heldout=(Y + 1,)),
    "the E-step differs.*num_particles=2.*num_particles=3": lambda f: run(
        make_em(num_particles=3), 4, f, heldout=(Y,)
    ),
    "the optimizer differs": lambda f: run(make_em(learning_rate=2e-3), 4, f, heldout=(Y,)),
    "the density of the model differs": lambda f: run(make_em(scaled_model), 4, f, heldout=(Y,)),
    "the model differs.*'x'.*'my_x'": lambda f: run(make_em(renamed_model), 4, f, heldout=(Y,)),
    r"another prior or .*: 'initial.* \(8,\) there, .* \(4,\) here": lambda f: run(
        make_em(), 4, f, make_prior(features=4), heldout=(Y,)
    ),
}


@pytest.mark.parametrize("message", OTHERS)
def test_a_run_under_other_conditions_is_refused(folder, message):
    with pytest.raises(ValueError, match=message):
        OTHERS[message](folder)


def damage_header(step):
    (step / "header" / "metadata").write_text("{")


def damage_array(step):
    largest = max((step / "arrays").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 255
    largest.write_bytes(content)


def truncate(step):
    for path in (step / "arrays").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:500])


def lose(step):
    shutil.rmtree(step / "arrays")


def edit(step, **fields):
    path = step / "header" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


DAMAGES = {
    "it has no header": damage_header,
    "its arrays": damage_array,
    "its arrays are damaged": truncate,
    "its arrays are damaged ": lose,
    "it was not written by EM": lambda step: edit(step, format="mine"),
    "its arrays do not match their digest": lambda step: edit(step, digest="0"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_checkpoints_name_the_one_before(folder, message, whole):
    DAMAGES[message](folder / "iterations" / "2")
    one, two = (folder / "iterations" / name for name in ("1", "2"))
    with pytest.raises(ValueError, match=f"{two}' cannot be read: {message.strip()}") as caught:
        run(make_em(), 4, folder, heldout=(Y,))
    assert f"To go on from '{one}', remove the folder '{two}'" in str(caught.value)
    shutil.rmtree(two)
    assert_same(run(make_em(), 4, folder, heldout=(Y,)), whole)


def test_the_only_checkpoint_is_damaged(folder):
    for name in ("0", "1"):
        shutil.rmtree(folder / "iterations" / name)
    damage_header(folder / "iterations" / "2")
    with pytest.raises(ValueError, match=r"\. Remove the folder"):
        run(make_em(), 4, folder, heldout=(Y,))


def test_checkpoints_of_a_later_version(folder):
    edit(folder / "iterations" / "2", version=3)
    with pytest.raises(ValueError, match="has version 3 of the format, expected 2.*upgrade"):
        run(make_em(), 4, folder, heldout=(Y,))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(make_em(), 1, tmp_path / "file" / "run")


def test_a_disk_that_is_full(tmp_path, monkeypatch, whole):
    def save(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    with pytest.warns(UserWarning, match="No space left on device.*goes on in memory") as caught:
        result = run(make_em(), 4, tmp_path / "run", heldout=(Y,))
    assert len(caught) == 1
    assert_same(result, whole)


# Orbax reports it once more, from its own threads.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:.*the history could not be written")
def test_a_file_that_cannot_grow(folder, whole):
    """A checkpoint that fails in the background: the last complete one remains."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.warns(UserWarning, match="File too large.*goes on in memory") as caught:
            result = run(make_em(), 4, folder, heldout=(Y,))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len([w for w in caught if "in memory" in str(w.message)]) == 1
    assert_same(result, whole)
    assert_same(run(make_em(), 4, folder, heldout=(Y,)), whole)
    assert numbers(folder) == [2, 3, 4]


def by_orbax(arrays, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, arrays)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, arrays)


def by_equinox(arrays, path):
    eqx.tree_serialise_leaves(path, arrays)
    return eqx.tree_deserialise_leaves(path, arrays)


def by_safetensors(arrays, path):
    return safetensors.load(safetensors.save({n: np.asarray(x) for n, x in arrays.items()}))


def by_numpy(arrays, path):
    file = io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    return dict(np.load(file))


STORES = {
    "orbax": by_orbax,
    "equinox": by_equinox,
    "flax": lambda arrays, path: serialization.from_bytes(arrays, serialization.to_bytes(arrays)),
    "pickle": lambda arrays, path: pickle.loads(pickle.dumps(arrays)),
    "safetensors": by_safetensors,
    "numpy": by_numpy,
}


@pytest.mark.parametrize("name", STORES)
def test_other_libraries_store_states_and_priors(name, tmp_path, whole):
    for i, (tree, like) in enumerate(
        [(whole.state, make_em().init(KEY, make_prior(), Y)), (whole.prior, whole.state.prior)]
    ):
        arrays = STORES[name](ndp.to_arrays(tree), tmp_path / str(i))
        again = ndp.from_arrays(like, arrays)
        assert jax.tree.structure(again) == jax.tree.structure(tree)
        expected = ndp.to_arrays(tree)
        for key, array in ndp.to_arrays(again).items():
            assert array.dtype == expected[key].dtype
            np.testing.assert_array_equal(array, expected[key])


def test_arrays_that_do_not_fit():
    prior = make_prior()
    arrays = ndp.to_arrays(prior)
    name = next(name for name in arrays if name.endswith("mean"))
    with pytest.raises(
        ValueError, match=f"'{name}': expected float32 of shape \\(2,\\), got float32"
    ):
        ndp.from_arrays(prior, arrays | {name: np.zeros(3, "float32")})
    with pytest.raises(ValueError, match="got \\['other'\\] in excess"):
        ndp.from_arrays(prior, arrays | {"other": arrays[name]})
    with pytest.raises(ValueError, match=f"expected arrays named \\['{name}'\\] too"):
        ndp.from_arrays(prior, {key: x for key, x in arrays.items() if key != name})


def test_every_element_of_the_data_counts(tmp_path):
    """Of arrays in memory, of few long rows, and of files that are read in parts."""
    x = np.zeros((3, 5000))
    other = x.copy()
    other[2, -1] = 1e-30
    assert describe_arrays(x) != describe_arrays(other)
    for i, array in enumerate((x.T, other.T)):
        np.save(tmp_path / f"{i}.npy", array)
    mapped = [np.load(tmp_path / f"{i}.npy", mmap_mode="r") for i in range(2)]
    assert describe_arrays(mapped[0]) != describe_arrays(mapped[1])
    assert describe_arrays(mapped[0]) == describe_arrays(np.ascontiguousarray(x.T))
    assert describe_arrays(np.float32(1)) != describe_arrays(np.float64(1))


def observe(x, y, noise=NOISE):
    numpyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)


def plain(prior, y, noise=NOISE):
    with numpyro.plate("n", len(y)):
        observe(numpyro.sample("x", prior), numpyro.subsample(y, event_dim=1), noise)


def nested(prior, y):
    with numpyro.plate("b", 5, dim=-2), numpyro.plate("a", 12, dim=-1):
        observe(numpyro.sample("x", prior), numpyro.subsample(y, event_dim=1))


def sum_of_two(priors, y):
    with numpyro.plate("n", len(y)):
        a, b = numpyro.sample("a", priors["one"]), numpyro.sample("b", priors["two"])
        observe(a + b, numpyro.subsample(y, event_dim=1))


def complex_values(prior, y):
    with numpyro.plate("n", len(y)):
        x = numpyro.sample("x", prior)
        observe(jax.lax.complex(x[..., :1], x[..., 1:]), numpyro.subsample(y, event_dim=1))


def conditional(prior, y):
    with numpyro.plate("n", len(y)):
        y = numpyro.subsample(y, event_dim=1)
        observe(numpyro.sample("x", prior.condition(y[:, :1])), y)


def counts(prior, y):
    with numpyro.plate("n", len(y)):
        x, y = numpyro.sample("x", prior), numpyro.subsample(y, event_dim=1)
        numpyro.sample("y", dist.Poisson(jnp.exp(x)).to_event(1), obs=y)


def prior_of(shape, **options):
    net = ndp.MLP(shape, features=(8,), embedding=8, rngs=nnx.Rngs(0), **options)
    return ndp.DiffusionPrior(ndp.NetworkDenoiser(net), sampler=ndp.samplers.MultistepSDE(4))


def product(w, x, noise):
    return x @ w


def function_prior():
    net = ndp.FunctionNetwork(product, jnp.zeros((D, D)), (D,))
    return ndp.DiffusionPrior(ndp.NetworkDenoiser(net), sampler=ndp.samplers.MultistepSDE(4))


def two_priors():
    gaussian = ndp.GaussianDenoiser(jnp.zeros(D), jnp.eye(D))
    known = ndp.DiffusionPrior(gaussian, sampler=ndp.samplers.MultistepSDE(4))
    return {"one": make_prior(), "two": known}


MANY = jnp.asarray(RNG.normal(size=(N, 600)), "float32")
KINDS = {
    "NumPy": (plain, make_prior, (np.asarray(Y, "float64"),), {}),
    "tiny units": (plain, make_prior, (1e-26 * Y, 3e-27), {}),
    "nested plates": (nested, make_prior, (Y.reshape(5, 12, D),), {}),
    "two priors, one known": (sum_of_two, two_priors, (Y,), {}),
    "complex": (complex_values, make_prior, (jax.lax.complex(Y[:, :1], Y[:, 1:]),), {}),
    "conditional": (conditional, lambda: prior_of((D,), context_shape=(1,)), (Y,), {}),
    "counts": (counts, make_prior, (jnp.round(jnp.abs(Y)),), {}),
    "function": (plain, function_prior, (Y,), {}),
    "low rank": (
        plain,
        lambda: prior_of((600,)),
        (MANY,),
        {"summary": ndp.linalg.LowRankSummary(3)},
    ),
    "stationary": (
        plain,
        lambda: prior_of((600,)),
        (MANY,),
        {"summary": ndp.linalg.StationarySummary(1)},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("num_events", [None, 16])
def test_runs_of_all_kinds_go_on(tmp_path, name, num_events):
    model, make, args, start = KINDS[name]
    em = ndp.EM(
        model,
        optax.adam(1e-3),
        e_step=ndp.EStep(1, max_batch_size=16, num_events=num_events),
        m_step=ndp.MStep(2, 8),
        start=ndp.GaussianStart(2, **start),
    )
    for num_iterations in (2, 4):
        result = em.run(
            KEY, num_iterations, make(), *args, progress_bar=False, checkpoint=tmp_path
        )
    assert_same(result, em.run(KEY, 4, make(), *args, progress_bar=False))
    num_drawn = N if num_events is None else min(N, 4 * num_events)
    for x in result.state.draws.values():
        assert np.isfinite(np.asarray(x).reshape(N, -1)).all(-1).sum() >= num_drawn

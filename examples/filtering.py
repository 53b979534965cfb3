"""Filter the states of a chaotic system, step by step, with transitions learned from pairs.

The system is that of Lorenz (1963) with noise. A conditional prior of the next state given the
last one is learned from pairs of states; the equations are not known. Sequences of states are then
observed through their first coordinate alone. A particle filter draws the next state of each
particle from the posterior given the particle and what is observed, by MMPS with a few particles
of its own, and weighs it with their estimate of the evidence. Such draws are properly weighted
(Naesseth, Lindsten and Schoen, *Nested sequential Monte Carlo methods*, ICML 2015), so that the
filter is that of the learned transitions, however good MMPS is. Without the weights, past states
do not learn from later observations.

    python examples/filtering.py --output out
"""

import argparse
import json
import sys
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from examples.assimilation import SYSTEMS, judge, simulate, step_with_noise, systematic

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LABELS = {
    "weighted": "learned transitions",
    "unweighted": "the same, without weights",
    "equations": "particle filter with the equations",
}


def model(prior, previous, noise, y=None):
    """The next state of each particle, given the last one; its first coordinate is observed."""
    with numpyro.plate("particles", len(previous)):
        previous = numpyro.subsample(previous, event_dim=1)
        y = None if y is None else numpyro.subsample(y, event_dim=0)
        x = numpyro.sample("x", prior.condition(previous))
        numpyro.sample("y", dist.Normal(x[..., 0], noise), obs=y)


def filter_states(rng_key, prior, start, noise, y, *, weighted=True, **options):
    """Draw from the posterior of each state given the observations up to it.

    Args:
        rng_key: A random key.
        prior: The conditional prior of the next state.
        start: Particles of the states before the first observation, with shape
            ``(num_sequences, num, size)``.
        noise: The standard deviation of the observations.
        y: The observations, with shape ``(num_sequences, length)``.
        weighted: Whether particles are weighed and resampled.
        options: Those of `sample_posterior`.

    Returns:
        Particles with shape ``(num, num_sequences, length, size)``, and the log-evidence of the
        sequences, with shape ``(num_sequences,)``.
    """
    shape = start.shape
    x, states, log_evidence = start, [], jnp.zeros(len(y))
    for key, seen in zip(jax.random.split(rng_key, y.shape[1]), y.T, strict=True):
        key_draw, key_choose = jax.random.split(key)
        repeated = jnp.repeat(seen, shape[1])
        with warnings.catch_warnings():
            # Particles that cannot explain what is observed get next to no weight.
            warnings.filterwarnings("ignore", ".*do not fit what was observed")
            draws = ndp.sample_posterior(
                key_draw, model, prior, x.reshape(-1, shape[-1]), noise, repeated, **options
            )
        x = draws.samples["x"][0].reshape(shape)
        log_weights = draws.stats["log_evidence"][0].reshape(shape[:2])
        log_evidence += jax.nn.logsumexp(log_weights, axis=1) - jnp.log(shape[1])
        if weighted:
            keys = jax.random.split(key_choose, len(y))
            x = jax.vmap(lambda k, w, z: z[systematic(k, w)])(keys, log_weights, x)
        states.append(x)
    return jnp.moveaxis(jnp.stack(states), (2, 0), (0, 2)), log_evidence


def filter_with_equations(rng_key, system, stride, start, noise, y):
    """The bootstrap particle filter of the true transitions; see `filter_states`."""

    def advance(x, inputs):
        key, seen = inputs
        key_move, key_choose = jax.random.split(key)
        x = move(key_move, system, stride, x)
        log_weights = dist.Normal(x[..., 0], noise).log_prob(seen[:, None])
        keys = jax.random.split(key_choose, len(x))
        return 2 * (jax.vmap(lambda k, w, z: z[systematic(k, w)])(keys, log_weights, x),)

    _, states = jax.lax.scan(advance, start, (jax.random.split(rng_key, y.shape[1]), y.T))
    return jnp.moveaxis(states, (2, 0), (0, 2))


def move(rng_key, system, stride, x):
    """Advance states by some steps of the system."""
    keys = jax.random.split(rng_key, stride)
    return jax.lax.scan(lambda x, key: (step_with_noise(key, system, x), None), x, keys)[0]


def learn(rng_key, system, args):
    """Learn the conditional prior from pairs of successive states."""
    key_data, key_net, key_fit = jax.random.split(rng_key, 3)
    pairs = simulate(key_data, system, args.num_pairs, args.stride + 1)[:, :: args.stride]
    net = ndp.MLP(
        (system.size,),
        features=(args.width,) * 3,
        context_shape=(system.size,),
        rngs=nnx.Rngs(key_net),
    )
    schedule = optax.cosine_decay_schedule(args.learning_rate, args.num_sgd_steps)
    fit = ndp.fit_denoiser(
        key_fit,
        ndp.NetworkDenoiser(net),
        pairs[:, 1],
        context=pairs[:, 0],
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)),
        num_steps=args.num_sgd_steps,
        batch_size=args.batch_size,
        # Transitions are much narrower than all states are.
        noise=ndp.noise.LogNormal(-2.5, 1.5),
        ema_decay=args.ema_decay,
    )
    return ndp.DiffusionPrior(fit.denoiser, sampler=ndp.samplers.MultistepSDE(args.num_steps))


def show_states(draws, truth, y, path):
    """Bands of 90 % of one sequence, for each coordinate."""
    figure, axes = plt.subplots(
        truth.shape[-1], 1, figsize=(8, 2 * truth.shape[-1]), sharex=True, layout="constrained"
    )
    time = jnp.arange(truth.shape[1])
    for i, axis in enumerate(axes):
        for name, x in draws.items():
            low, high = jnp.quantile(x[:, 0, :, i], jnp.array([0.05, 0.95]), axis=0)
            axis.fill_between(time, low, high, alpha=0.35, label=LABELS[name], linewidth=0)
        axis.plot(time, truth[0, :, i], "k", linewidth=1, label="truth")
        if i == 0:
            axis.plot(time, y[0], "k.", markersize=4, label="observed")
        axis.set_ylabel(f"coordinate {i + 1}")
    axes[-1].set_xlabel("step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    keys = jax.random.split(jax.random.key(args.seed), 6)
    system = SYSTEMS["lorenz63"]
    prior = learn(keys[0], system, args)
    length = args.stride * args.length + 1
    x = simulate(keys[1], system, args.num_sequences, length)[:, :: args.stride]
    truth = x[:, 1:]
    y = truth[..., 0] + args.noise * jax.random.normal(keys[2], truth.shape[:2])
    num = args.num_sequences * args.num_equations
    climate = simulate(keys[3], system, num, 1).reshape(args.num_sequences, -1, system.size)
    few = climate[:, : args.num_states]
    options = {"num_particles": args.num_particles, "guidance": ndp.MMPS()}
    draws, evidence = {}, {}
    for name in ("weighted", "unweighted"):
        draws[name], evidence[name] = filter_states(
            keys[4], prior, few, args.noise, y, weighted=name == "weighted", **options
        )
    known = jax.jit(partial(filter_with_equations, keys[5], system, args.stride))
    draws["equations"] = known(climate, args.noise, y)
    # The first steps forget the climate.
    late = {name: x[:, :, args.length // 4 :] for name, x in draws.items()}
    table = {name: judge(x, truth[:, args.length // 4 :]) for name, x in late.items()}
    print(f"{'':38s}  RMSE  spread   CRPS   50 %   90 %")
    for name, row in table.items():
        print(
            f"{LABELS[name]:38s} {row['rmse']:5.3f}  {row['spread']:6.2f}  {row['crps']:5.3f}"
            f"  {row['cover50']:5.2f}  {row['cover90']:5.2f}",
            flush=True,
        )
    result = {"args": vars(args), "table": table}
    (output / "filtering.json").write_text(json.dumps(result, indent=1))
    show_states(draws, truth, y, output / "filtering.png")
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", default="out", help="folder of the results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stride", type=int, default=8, help="steps of 0.025 between states")
    parser.add_argument("--noise", type=float, default=0.1, help="in deviations of the states")
    parser.add_argument("--length", type=int, default=40, help="of a sequence")
    parser.add_argument("--num-sequences", type=int, default=8)
    parser.add_argument("--num-states", type=int, default=256, help="particles of a sequence")
    parser.add_argument("--num-particles", type=int, default=4, help="of MMPS, for each of them")
    parser.add_argument("--num-equations", type=int, default=16_384, help="of the known equations")
    parser.add_argument("--num-steps", type=int, default=16, help="of the sampler")
    parser.add_argument("--num-pairs", type=int, default=32_768)
    parser.add_argument("--num-sgd-steps", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--width", type=int, default=128)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())

"""How many iterations the power of fields takes to fit, from a part of their values.

Complex fields whose power falls with the frequency are seen in a quarter of the lines of k-space,
or in a quarter of their pixels, another part of each. A stationary Gaussian is fitted to these
observations by `EM.init`, and by expectation maximization with draws of the fields, which models
that are not linear take. Its error is that of the logarithm of the power, root mean square over
frequencies; that of the power of the complete fields, which have a mean and a power of their own,
is shown beside it.

    python benchmarks/power.py --output out
"""

import argparse
import json
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from benchmarks.kspace import fourier, make_field

SEEN = {"lines of k-space": fourier, "pixels": lambda x: x}
FITS = ("EM.init", "by draws")


def model(prior, transform, mask, noise, y):
    with numpyro.plate("fields", len(mask)):
        mask = numpyro.subsample(mask, event_dim=3)
        y = numpyro.subsample(y, event_dim=3)
        values = transform(numpyro.sample("x", prior))
        numpyro.sample("y", dist.Normal(values, noise).mask(mask).to_event(3), obs=y)


def make_data(rng_key, exact, seen, args):
    """Complete fields, masks and observed values."""
    key_field, key_mask, key_noise = jax.random.split(rng_key, 3)
    shape = (args.num_fields, *exact.event_shape)
    z = jax.random.normal(key_field, (args.num_fields, exact.event_size))
    x = exact.cov.sqrt_matvec(z).reshape(shape)
    if seen == "pixels":
        mask = jax.random.bernoulli(key_mask, args.seen, shape[:-1])
    else:
        mask = jax.random.bernoulli(key_mask, args.seen, (args.num_fields, args.size))[..., None]
        low = jnp.abs(jnp.fft.fftfreq(args.size) * args.size) <= 1
        mask = mask | low[:, None]
    mask = jnp.broadcast_to(mask[..., None], shape)
    y = SEEN[seen](x) + args.noise * jax.random.normal(key_noise, shape)
    return x, mask, y


def error(cov, power):
    found = np.asarray(cov.eigenvalues, float).reshape(power.shape).mean(-1)
    return float(np.sqrt(np.mean(np.log(found / power.mean(-1)) ** 2)))


def fit(prior, num_iterations, by_draws, data, args):
    """Return the fitted prior's denoiser, and the processor seconds with compilation."""
    seen, mask, y = data
    start = ndp.GaussianStart(num_iterations, ndp.linalg.StationarySummary(), args.num_fields)
    em = ndp.EM(model, optax.adam(1e-3), start=start)
    began = time.process_time()
    with mock.patch("numpyro_diffprior.em.em.has_power", return_value=not by_draws):
        state = em.init(jax.random.key(1), prior, SEEN[seen], mask, args.noise, y)
    denoiser = jax.block_until_ready(state.prior.denoiser)
    return denoiser, time.process_time() - began


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    exact, power = make_field(args.size)
    net = ndp.MLP(exact.event_shape, features=(4,), embedding=4, rngs=nnx.Rngs(0))
    prior = ndp.DiffusionPrior(ndp.NetworkDenoiser(net), sampler=ndp.samplers.MultistepSDE(8))
    rows = []
    for seen in args.seen_in:
        x, mask, y = make_data(jax.random.key(args.seed), exact, seen, args)
        complete = error(ndp.linalg.StationarySummary()(x)[1], power)
        print(f"{seen}: complete fields {complete:.3f}", flush=True)
        for name in FITS:
            for num_iterations in args.num_iterations:
                by_draws = name == "by draws"
                denoiser, seconds = fit(prior, num_iterations, by_draws, (seen, mask, y), args)
                found = denoiser.cov.scale(denoiser.unit**2)
                row = {"seen": seen, "fit": name, "num_iterations": num_iterations}
                row |= {"error": error(found, power), "seconds": seconds, "complete": complete}
                rows.append(row)
                print(
                    f"  {name:8s} {num_iterations:3d} iterations: {row['error']:.3f}"
                    f" ({seconds:.1f} processor s)",
                    flush=True,
                )
    result = {"args": vars(args), "rows": rows}
    (output / "power.json").write_text(json.dumps(result, indent=1))
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out", help="folder of the result")
    parser.add_argument("--seen-in", nargs="+", choices=SEEN, default=list(SEEN))
    parser.add_argument("--num-iterations", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--num-fields", type=int, default=256)
    parser.add_argument("--seen", type=float, default=0.25, help="the part that is seen")
    parser.add_argument("--noise", type=float, default=0.01, help="in deviations of a value")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())

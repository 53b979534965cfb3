"""Restore images whose background and noise level are as unknown as their hidden pixels.

A night of exposures: digits on a background that is the same in all of them, with hidden pixels
and noise of a level that nobody wrote down. The prior of digits is learned from clean ones. Gibbs
samples the images given background and noise by conditional SMC, and background and noise given
the images by NUTS. Then the same with the noise level fixed at a wrong value: what that does to
the background and to the images' uncertainties.

    python examples/joint.py --output out/joint
"""

import argparse
import json
import sys
from pathlib import Path

import arviz as az
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.handlers import condition
from numpyro.infer import MCMC, NUTS, Gibbs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from examples import digits

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

TRUTH = {"background": 0.5, "noise": 0.3}


def model(prior, mask, y=None):
    background = numpyro.sample("background", dist.Normal(0.0, 1.0))
    noise = numpyro.sample("noise", dist.LogNormal(-1.0, 1.0))
    with numpyro.plate("images", len(mask)):
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x + background, noise).mask(mask).to_event(2), obs=y)


def learn(rng_key, clean, args):
    """The prior of digits, from clean ones."""
    key_net, key_fit = jax.random.split(rng_key)
    optimizer = digits.make_optimizer(digits.anneal(1e-3, args.num_sgd_steps))
    denoiser = digits.make_prior(key_net, args.width).denoiser
    fit = ndp.fit_denoiser(
        key_fit, denoiser, clean, optimizer=optimizer, num_steps=args.num_sgd_steps
    )
    return ndp.DiffusionPrior(fit.denoiser)


def observe(rng_key, clean, hidden):
    """Exposures of digits; hidden pixels are NaN."""
    key_mask, key_noise = jax.random.split(rng_key)
    mask = jax.random.bernoulli(key_mask, 1 - hidden, clean.shape)
    noise = TRUTH["noise"] * jax.random.normal(key_noise, clean.shape)
    return mask, jnp.where(mask, clean + TRUTH["background"] + noise, jnp.nan)


def infer(rng_key, model, prior, mask, y, args):
    """Chains of images and of what else the model does not know."""
    masked = ndp.mask_priors(model)
    images = ndp.ParticleGibbs(masked, num_particles=args.num_particles)
    mcmc = MCMC(
        Gibbs([(images, ["x"]), (NUTS(masked), None)]),
        num_warmup=args.num_warmup,
        num_samples=args.num_samples,
        num_chains=args.num_chains,
        chain_method=jax.vmap,
        progress_bar=False,
    )
    mcmc.run(rng_key, prior, mask, y)
    return mcmc


def judge(draws, mask, truth):
    """Coverage of the truth, and its distance from the means in posterior deviations."""
    # Pixels that are the same in nearly all digits would count as covered or not by chance.
    where = jnp.broadcast_to(truth.std(0) > 0.1, mask.shape)
    inside = ndp.metrics.coverage(draws["x"], truth, levels=(0.5, 0.9), where=where)
    error = jnp.where(where, draws["x"].mean(0) - truth, 0)
    background = draws["background"]
    return {
        "background": float(background.mean()),
        "deviation": float(background.std()),
        "rmse": float(jnp.sqrt(jnp.sum(error**2) / jnp.sum(where))),
        "cover50": float(inside[0]),
        "cover90": float(inside[1]),
    }


def show_parameters(chains, path):
    """Traces and histograms of background and noise level, and their true values."""
    figure, axes = plt.subplots(
        len(TRUTH), 2, figsize=(8, 4), width_ratios=(3, 1), sharey="row", layout="constrained"
    )
    for (trace, histogram), (name, value) in zip(axes, TRUTH.items(), strict=True):
        for chain in np.asarray(chains[name]):
            trace.plot(chain, lw=0.6, alpha=0.8)
        histogram.hist(
            np.ravel(chains[name]), bins=40, orientation="horizontal", density=True, color="0.7"
        )
        for axis in (trace, histogram):
            axis.axhline(value, color="k", ls="--", lw=1)
        trace.set_ylabel(name)
    axes[-1, 0].set_xlabel("draw")
    axes[-1, 1].set_xlabel("density")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show_images(draws, truth, y, path):
    """Truth, exposure, posterior mean, one draw and posterior deviation, a column per image."""
    x = draws["x"]
    low, high = -1 + TRUTH["background"], 1 + TRUTH["background"]
    rows = {
        "truth": truth,
        "observed": (y, (low, high), digits.GRAY),
        "mean": x.mean(0),
        "one draw": x[-1],
        "deviation": (x.std(0), (0, 1), "magma"),
    }
    digits.show_rows(rows, path, num_images=len(truth))


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    key_data, key_observe, key_learn, key_run = jax.random.split(jax.random.key(args.seed), 4)
    data = digits.make_data(key_data, 0.0)
    prior = learn(key_learn, data.clean, args)
    truth = data.test[: args.num_images]  # digits that the prior has not seen
    mask, y = observe(key_observe, truth, args.hidden)

    mcmc = infer(key_run, model, prior, mask, y, args)
    table = {"unknown": judge(mcmc.get_samples(), mask, truth)}
    summary = az.summary(az.from_numpyro(mcmc, log_likelihood=False), var_names=list(TRUTH))
    summary.to_csv(output / "joint_summary.csv")
    print(summary.to_string())
    show_parameters(mcmc.get_samples(group_by_chain=True), output / "joint_parameters.png")
    show_images(mcmc.get_samples(), truth, y, output / "joint_images.png")

    for factor in args.wrong:
        fixed = condition(model, data={"noise": jnp.asarray(factor * TRUTH["noise"])})
        draws = infer(key_run, fixed, prior, mask, y, args).get_samples()
        table[f"{factor:g} of the truth"] = judge(draws, mask, truth)
    print(f"\n{'noise level':16s} {'background':>16s} {'RMSE':>7s} {'50 %':>7s} {'90 %':>7s}")
    for name, row in table.items():
        background = f"{row['background']:.3f} +- {row['deviation']:.3f}"
        cells = (f"{row[key]:7.3f}" for key in ("rmse", "cover50", "cover90"))
        print(f"{name:16s} {background:>16s} " + " ".join(cells))
    (output / "joint.json").write_text(json.dumps(table, indent=1))
    return table


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out/joint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden", type=float, default=0.5, help="fraction of hidden pixels")
    parser.add_argument("--num-images", type=int, default=6)
    parser.add_argument("--num-sgd-steps", type=int, default=3000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--num-particles", type=int, default=16)
    parser.add_argument("--num-chains", type=int, default=4)
    parser.add_argument("--num-warmup", type=int, default=100)
    parser.add_argument("--num-samples", type=int, default=100, help="per chain")
    parser.add_argument(
        "--wrong", type=float, nargs="+", default=[0.5], help="noise levels over the true one"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())

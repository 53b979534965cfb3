"""What an E-step costs beside its bare network, and beside azula's MMPS on the same network.

Overhead is the time of the E-step over that of its network evaluations: as many jitted forward and
vector-Jacobian products, at the same batch. All are timed in one run, in turn; the medians'
ratios are what counts, absolute times only describe the machine. Where azula and PyTorch are
installed, its MMPS sampler runs a multilayer perceptron of the same shape on the same batch.

    python benchmarks/e_step.py
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from examples import digits
from numpyro_diffprior.posterior import resolve_settings, sample_blocks


def clock(functions, num_repeats):
    """Medians of several functions' times, measured in turn, in seconds."""
    times = {name: [] for name in functions}
    for function in functions.values():
        jax.block_until_ready(function())
    for _ in range(num_repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def bare_network(prior, batch_size, num_blocks, num_steps, num_particles):
    """As many forward and vector-Jacobian products of the network as an E-step makes."""
    x = jnp.zeros((num_blocks, num_particles * batch_size, 8, 8))
    sigmas = ndp.MultistepSDE(num_steps).sigmas(prior.denoiser)

    @jax.jit
    def forward(prior, x):
        def block(x):
            body = lambda x, sigma: (prior.denoise(x, sigma), None)  # noqa: E731
            return jax.lax.scan(body, x, sigmas)[0]

        return jax.lax.map(block, x)

    @jax.jit
    def with_vjp(prior, x):
        def body(x, sigma):
            x_hat, vjp = jax.vjp(lambda x: prior.denoise(x, sigma), x)
            return x_hat + 0.01 * vjp(x)[0], None

        return jax.lax.map(lambda x: jax.lax.scan(body, x, sigmas)[0], x)

    return lambda: forward(prior, x), lambda: with_vjp(prior, x)


def azula_sampler(args):
    """Azula's MMPS on the same shape of network, batch and steps; None without azula."""
    try:
        import torch
        from azula.denoise import KarrasDenoiser
        from azula.guidance.mmps import MMPSDenoiser
        from azula.noise import VESchedule
        from azula.sample import DDPMSampler
    except ImportError:
        return None
    width, size = args.width, 64

    class Backbone(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(size + 1, width)
            self.hidden = torch.nn.ModuleList([torch.nn.Linear(width, width) for _ in range(2)])
            self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(width) for _ in range(3)])
            self.last = torch.nn.Linear(width, size)

        def forward(self, x, t, **kwargs):
            t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1).expand(len(x), 1)
            h = self.first(torch.cat([x, t], dim=-1))
            for norm, hidden in zip(self.norms, self.hidden):
                h = h + hidden(torch.nn.functional.silu(norm(h)))
            return self.last(torch.nn.functional.silu(self.norms[-1](h)))

    denoiser = KarrasDenoiser(Backbone(), VESchedule())
    mask = (torch.rand(args.batch_size, size) < 0.5).float()
    guided = MMPSDenoiser(
        denoiser,
        y=torch.zeros(args.batch_size, size),
        A=lambda x: mask * x,
        var_y=0.01,
        iterations=1,
    )
    sampler = DDPMSampler(guided, steps=args.num_steps, silent=True)

    def run():
        return sampler(sampler.init((args.batch_size, size)))

    return run


def main(args):
    keys = jax.random.split(jax.random.key(args.seed), 4)
    data = digits.make_data(keys[0], 0.5, args.num_images)
    prior = digits.make_prior(keys[1], args.width)
    optimizer = optax.adam(1e-3)
    em = ndp.EM(digits.model, optimizer, batch_size=args.batch_size)
    state = em.init(keys[2], prior, data.mask, data.y)
    prior = state.prior
    num_blocks = -(-len(data.y) // args.batch_size)
    settings = resolve_settings(prior, args.num_particles, ndp.MultistepSDE(args.num_steps))
    sizes = (args.batch_size, num_blocks, args.num_steps, args.num_particles)
    forward, with_vjp = bare_network(prior, *sizes)

    def e_step():
        draws = sample_blocks(
            keys[3], digits.model, (prior, data.mask, data.y), {}, settings, num_draws=1,
            batch_size=args.batch_size,
        )  # fmt: skip
        return draws.x

    def plain():
        one = resolve_settings(
            prior, 1, ndp.DDPM(args.num_steps), ndp.MMPS(max_dense=0, max_steps=1)
        )
        index = slice(0, args.batch_size)
        arguments = (prior, data.mask[index], data.y[index])
        return sample_blocks(
            keys[3], digits.model, arguments, {}, one, num_draws=1, batch_size=args.batch_size
        ).x

    def sgd():
        return ndp.training.train(
            keys[3], state.training, data.clean, optimizer, num_steps=100, batch_size=256
        )[1]

    functions = {
        "E-step": e_step,
        "forward": forward,
        "forward and vjp": with_vjp,
        "100 SGD steps": sgd,
        "plain MMPS": plain,
    }
    azula = azula_sampler(args)
    if azula is not None:
        functions["azula's MMPS"] = azula
    seconds = clock(functions, args.num_repeats)
    ratios = {
        "E-step / bare network (forward and vjp)": seconds["E-step"] / seconds["forward and vjp"],
        "E-step / forward only": seconds["E-step"] / seconds["forward"],
    }
    if azula is not None:
        name = "samples per second: plain MMPS / azula's"
        ratios[name] = seconds["azula's MMPS"] / seconds["plain MMPS"]
    for name, value in seconds.items():
        print(f"{name:45s} {value:8.3f} s")
    print(f"{'SGD steps per second':45s} {100 / seconds['100 SGD steps']:8.0f}")
    for name, value in ratios.items():
        print(f"{name:45s} {value:8.2f}")
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "e_step.json").write_text(
        json.dumps({"seconds": seconds, "ratios": ratios}, indent=1)
    )
    return ratios


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-images", type=int, default=digits.NUM_TRAIN)
    parser.add_argument("--num-steps", type=int, default=32)
    parser.add_argument("--num-particles", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--num-repeats", type=int, default=5)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())

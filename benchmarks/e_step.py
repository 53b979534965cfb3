"""What an E-step costs beside its bare network, and MMPS beside azula's on the same network.

Overhead is the time of an E-step over that of its evaluations of the network: their number times
one jitted forward evaluation, with or without one vector-Jacobian product, at the same batch. The
plain MMPS of the paper (DDPM, one step of the solver) is timed on a batch beside azula's
(https://github.com/probabilists/azula, PyTorch), where that is installed, with the same network,
and on images of 28 x 28 with the U-Net of each package, of equal widths and about as many
parameters. All are timed in one run, in turn, and the shortest of several times is taken: other
work of the machine only adds. The ratios count, the times only describe the machine.

    python benchmarks/e_step.py --output out
"""

import argparse
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpyro_diffprior as ndp
from benchmarks import event_sizes
from examples import digits
from numpyro_diffprior._compile.memory import BatchLimit
from numpyro_diffprior.infer.blocks import block_size, sample_blocks
from numpyro_diffprior.infer.posterior import resolve_options
from numpyro_diffprior.reading.reader import read

SIZE = 64
EMBEDDING = 64
NUM_SGD_STEPS = 100


def clock(functions, num_repeats):
    """The shortest of several functions' times, measured in turn, in seconds."""
    times = {name: [] for name in functions}
    for function in functions.values():
        jax.block_until_ready(function())
    for _ in range(num_repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return {name: min(values) for name, values in times.items()}


def forward(prior, x):
    return prior.denoise(x, 1.0)


def forward_and_vjp(prior, x):
    x_hat, vjp = jax.vjp(lambda x: prior.denoise(x, 1.0), x)
    return vjp(x_hat)


def our_functions(rng_key, args):
    """Name to function: an E-step, its parts, and plain MMPS on one batch."""
    key_data, key_net, key_em, key_draw = jax.random.split(rng_key, 4)
    data = digits.make_data(key_data, 0.5, args.num_images)
    optimizer = digits.make_optimizer(1e-3)
    num_in_memory = args.batch_size * args.num_particles
    em = ndp.EM(
        digits.model,
        optimizer,
        e_step=ndp.EStep(num_particles=args.num_particles, max_batch_size=num_in_memory),
        m_step=ndp.MStep(batch_size=args.batch_size),
    )
    state = em.init(key_em, digits.make_prior(key_net, args.width), data.mask, data.y)
    prior, mask, y = state.prior, data.mask, data.y
    sampler = ndp.samplers.MultistepSDE(args.num_steps)
    e_step = em.e_step.options(sampler)
    one_step = ndp.MMPS(max_dense=0, max_steps=1)
    plain = resolve_options(ndp.samplers.DDPM(args.num_steps), 1, guidance=one_step)

    def draw(options, mask, y):
        limit = BatchLimit(args.batch_size * options.num_particles)
        size = block_size(options.num_particles, 1, limit)
        bound = read(digits.model, (prior, mask, y), {}, block_size=size)
        return sample_blocks(key_draw, bound, options, num_draws=1, limit=limit).samples["x"]

    x = jnp.zeros((args.num_particles * args.batch_size, 8, 8))
    jitted, jitted_vjp = jax.jit(forward), jax.jit(forward_and_vjp)
    # Particles are in the batch: each block evaluates the network once per step.
    num_evaluations = args.num_steps * -(-args.num_images // args.batch_size)
    evaluations = range(num_evaluations)
    train = ndp.training.train
    return {
        "E-step": lambda: draw(e_step, mask, y),
        "forward": lambda: [jitted(prior, x) for _ in evaluations],
        "forward and vjp": lambda: [jitted_vjp(prior, x) for _ in evaluations],
        "SGD": lambda: train(
            key_draw,
            state.training["prior"],
            data.clean,
            optimizer,
            num_steps=NUM_SGD_STEPS,
            batch_size=256,
        )[1],
        "plain MMPS": lambda: draw(plain, mask[: args.batch_size], y[: args.batch_size]),
    }


def azula_is_installed():
    try:
        import azula
        import torch
    except ImportError:
        return False
    return bool(azula and torch)


def azula_mmps(backbone, shape, num_steps):
    """Azula's MMPS of one solver step on a network, for masked events of shape ``shape``."""
    import torch
    from azula.denoise import KarrasDenoiser
    from azula.guidance.mmps import MMPSDenoiser
    from azula.linalg.covariance import IsotropicCovariance
    from azula.noise import VESchedule
    from azula.sample import DDPMSampler

    mask = (torch.rand(shape) < 0.5).float()
    guided = MMPSDenoiser(
        KarrasDenoiser(backbone, VESchedule()).requires_grad_(False),
        y=torch.zeros(shape),
        A=lambda x: mask * x,
        cov_y=IsotropicCovariance(digits.NOISE**2),
        iterations=1,
    )
    sampler = DDPMSampler(guided, steps=num_steps, silent=True)
    return lambda: sampler(sampler.init(shape)).numpy()


def make_embedding():
    """The embedding of a noise level in PyTorch, like that of `UNet` and `MLP`."""
    import torch
    from torch import nn

    class Embedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(EMBEDDING, EMBEDDING),
                nn.SiLU(),
                nn.Linear(EMBEDDING, EMBEDDING),
                nn.SiLU(),
            )

        def forward(self, t, num):
            angles = t.reshape(-1, 1).expand(num, 1) * torch.linspace(0.5, 64, EMBEDDING // 2)
            return self.layers(torch.cat([angles.sin(), angles.cos()], dim=-1))

    return Embedding()


def torch_mlp(width):
    """A network like `MLP`, in PyTorch."""
    from torch import nn

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = make_embedding()
            self.first = nn.Linear(SIZE, width)
            self.offset = nn.Linear(EMBEDDING, width)
            self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
            self.modulations = nn.ModuleList([nn.Linear(EMBEDDING, 2 * width) for _ in range(3)])
            self.hidden = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
            self.last = nn.Linear(width, SIZE)

        def forward(self, x, t):
            embedded = self.embed(t, len(x))
            h = self.first(x) + self.offset(embedded)
            for i, (norm, modulation) in enumerate(zip(self.norms, self.modulations, strict=True)):
                scale, shift = modulation(embedded).chunk(2, dim=-1)
                update = nn.functional.silu(norm(h) * (1 + scale) + shift)
                if i < len(self.hidden):
                    h = h + self.hidden[i](update)
            return self.last(update)

    return Backbone()


def azula_unet():
    """Azula's U-Net with the widths and blocks of `UNet`, in PyTorch."""
    from azula.nn.unet import UNet
    from torch import nn

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = make_embedding()
            # Each level has as many blocks on the way down and again on the way up. `UNet` has no
            # way up at the lowest level.
            self.net = UNet(1, 1, hid_channels=(32, 64), hid_blocks=(2, 1), mod_features=EMBEDDING)

        def forward(self, x, t):
            return self.net(x, self.embed(t, len(x)))

    return Backbone()


def unet_mmps(batch_size, args):
    """Our plain MMPS on masked images with the default `UNet`, and its number of parameters."""
    shape = (args.image_size, args.image_size)
    rng = np.random.default_rng(args.seed)
    fields = event_sizes.smooth_fields(rng, 512, shape)
    prior = event_sizes.make_prior(shape, fields, args.num_steps)
    mask = jnp.asarray(rng.random((batch_size, *shape)) < 0.5)
    y = fields[:batch_size] + digits.NOISE * jnp.asarray(rng.normal(size=mask.shape), jnp.float32)
    model = event_sizes.make_model("mask")
    one_step = ndp.MMPS(max_dense=0, max_steps=1)
    options = resolve_options(ndp.samplers.DDPM(args.num_steps), 1, guidance=one_step)
    limit, key = BatchLimit(batch_size), jax.random.key(args.seed)

    def draw():
        bound = read(model, (prior, mask, y), {}, block_size=block_size(1, 1, limit))
        return sample_blocks(key, bound, options, num_draws=1, limit=limit).samples["x"]

    return draw, prior.denoiser.net


def compare_unets(args):
    """Processor and wall seconds of plain MMPS with U-Nets, ours and azula's, by batch size."""
    backbone = azula_unet()
    rows = []
    for batch_size in args.unet_batches:
        draw, net = unet_mmps(batch_size, args)
        shape = (batch_size, 1, args.image_size, args.image_size)
        functions = {"MMPS": draw, "azula's MMPS": azula_mmps(backbone, shape, args.num_steps)}
        seconds = event_sizes.clock(functions, args.num_repeats)
        ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
        rows.append(
            {
                "batch_size": batch_size,
                "parameters": {
                    "MMPS": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(net, nnx.Param))),
                    "azula's MMPS": sum(leaf.numel() for leaf in backbone.parameters()),
                },
                "seconds": seconds,
                "ratios": dict(zip(("processor", "wall"), ratios, strict=True)),
            }
        )
    return rows


def main(args):
    functions = our_functions(jax.random.key(args.seed), args)
    has_azula = azula_is_installed()
    if has_azula:
        shape = (args.batch_size, SIZE)
        functions["azula's MMPS"] = azula_mmps(torch_mlp(args.width), shape, args.num_steps)
    seconds = clock(functions, args.num_repeats)
    ratios = {
        f"E-step / its evaluations, {name}": seconds["E-step"] / seconds[name]
        for name in ("forward", "forward and vjp")
    }
    if has_azula:
        ratios["samples per second, MMPS / azula's MMPS"] = (
            seconds["azula's MMPS"] / seconds["plain MMPS"]
        )
    rates = {
        "E-step, draws per second": args.num_images / seconds["E-step"],
        "SGD steps per second": NUM_SGD_STEPS / seconds["SGD"],
    }
    print(f"{args.num_images} images, {args.num_particles} particles, {args.num_steps} steps")
    print("\n".join(f"{name:45s} {value:9.4f} s" for name, value in seconds.items()))
    print("\n".join(f"{name:45s} {value:9.1f}" for name, value in rates.items()))
    print("\n".join(f"{name:45s} {value:9.2f}" for name, value in ratios.items()))
    unets = compare_unets(args) if has_azula else []
    if unets:
        size, (own, other) = args.image_size, unets[0]["parameters"].values()
        print(
            f"\nMMPS on images of {size} x {size}, U-Nets of {own} (azula's: {other}) parameters"
        )
        print("batch   processor s, azula's     ratio   wall s, azula's     ratio")
    for row in unets:
        own, other = row["seconds"].values()
        pairs = zip(own, other, row["ratios"].values(), strict=True)
        columns = "".join(f"{a:12.3f} {b:10.3f} {ratio:8.2f}" for a, b, ratio in pairs)
        print(f"{row['batch_size']:5d} {columns}")
    result = {
        "seconds": seconds,
        "rates": rates,
        "ratios": ratios,
        "unets": unets,
        "settings": vars(args),
    }
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "e_step.json").write_text(json.dumps(result, indent=1))
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-images", type=int, default=digits.NUM_TRAIN)
    parser.add_argument("--num-steps", type=int, default=32)
    parser.add_argument("--num-particles", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--image-size", type=int, default=28)
    parser.add_argument("--unet-batches", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--num-repeats", type=int, default=5)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())

"""What particles and covariances do for EM: the manifold of the example, learned several ways.

One particle is plain MMPS; more are a twisted SMC that corrects it. Each has Tweedie's covariance,
which takes one vector-Jacobian product per observed value, or the Gaussian one, which takes none.

    python benchmarks/particles.py --output out
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from examples import manifold

STYLES = {"tweedie": "--", "gaussian": "-"}
COLORS = ("0.5", "C0", "C1", "C3")


def main(args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    key_curve, key_data, key_learn = jax.random.split(jax.random.key(args.seed), 3)
    data = manifold.make_data(key_curve, key_data, args.num_points, args.num_points)
    runs, results = {}, []
    for num_particles, color in zip(args.num_particles, COLORS, strict=False):
        for covariance in args.covariances:
            linestyle = STYLES[covariance]
            settings = argparse.Namespace(**vars(args))
            settings.num_particles, settings.covariance = num_particles, covariance
            print(f"{covariance}, {num_particles} particles", flush=True)
            _, rows = manifold.learn(key_learn, data, settings)
            name = f"{covariance}, K = {num_particles}"
            runs[name] = (rows, {"color": color, "linestyle": linestyle})
            results.append(
                {"covariance": covariance, "num_particles": num_particles, "rows": rows}
            )
            manifold.show_curves(runs, output / "particles.png")
            (output / "particles.json").write_text(json.dumps(results, indent=1))
    print(f"{'':18s} {'divergence':>10s} {'sliced W2':>10s} {'E-step':>8s} {'M-step':>8s}")
    for name, (rows, _) in runs.items():
        last = rows[-1]
        e_step, m_step = (np.median([r[f"{s}_step_seconds"] for r in rows]) for s in "em")
        print(
            f"{name:18s} {last['divergence']:10.4f} {last['sliced_w2']:10.4f}"
            f" {e_step:6.1f} s {m_step:6.1f} s"
        )
    return results


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="All other options are those of examples/manifold.py.",
    )
    parser.add_argument("--num-particles", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--covariances", nargs="+", choices=STYLES, default=list(STYLES))
    args, rest = parser.parse_known_args(argv)
    return argparse.Namespace(**vars(manifold.parse_args(rest)) | vars(args))


if __name__ == "__main__":
    main(parse_args())

"""The structure of the package: lines, import levels, and the path of one call through its files.

A level is one more than the highest of the files that a file imports. The path of a call is
counted by the interpreter's own events: the files of the package that it enters, and how often it
moves from one of them to another, at a first call and at a second one.

    python benchmarks/structure.py
"""

import argparse
import ast
import json
import sys
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

import numpyro_diffprior as ndp

PACKAGE = Path(ndp.__file__).parent


def sources():
    """The files of the package by dotted name, without those that only gather names."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "__init__.py":
            found[".".join(path.relative_to(PACKAGE).with_suffix("").parts)] = path
    return found


def count_lines():
    """Lines of the package that are neither empty nor comments."""
    paths = PACKAGE.rglob("*.py")
    lines = (line.strip() for path in paths for line in path.read_text().splitlines())
    return sum(bool(line) and not line.startswith("#") for line in lines)


def count_levels():
    """The number of import levels."""
    files = sources()

    @cache
    def level(name):
        tree = ast.parse(files[name].read_text())
        imported = [
            other
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name)
            for other in files
            if node.module == f"{PACKAGE.name}.{other}"
        ]
        return 1 + max(map(level, imported), default=0)

    return max(map(level, files))


def model(prior, mask, y=None):
    with numpyro.plate("images", mask.shape[0]):
        mask = numpyro.subsample(mask, event_dim=2)
        y = None if y is None else numpyro.subsample(y, event_dim=2)
        x = numpyro.sample("x", prior)
        numpyro.sample("y", dist.Normal(x, 0.1).mask(mask).to_event(2), obs=y)


def follow(call):
    """The files that a call enters, and how often it moves between them."""
    entered, moves, last = set(), 0, None
    root = str(PACKAGE)

    def watch(frame, event, _):
        nonlocal moves, last
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(root):
            entered.add(name)
            moves += last is not None and name != last
            last = name

    sys.setprofile(watch)
    try:
        jax.block_until_ready(call())
    finally:
        sys.setprofile(None)
    return len(entered), moves


def main(args):
    prior = ndp.DiffusionPrior(ndp.GaussianDenoiser(jnp.zeros((4, 4)), jnp.eye(16)))
    mask, y = jnp.ones((5, 4, 4), bool), jnp.zeros((5, 4, 4))

    def call():
        return ndp.sample_posterior(jax.random.key(0), model, prior, mask, y).samples

    (files, moves), (files_again, moves_again) = follow(call), follow(call)
    result = {
        "lines": count_lines(),
        "files": len(sources()),
        "levels": count_levels(),
        "first call": {"files": files, "moves": moves},
        "second call": {"files": files_again, "moves": moves_again},
    }
    print(json.dumps(result, indent=1))
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "structure.json").write_text(json.dumps(result, indent=1))
    return result


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="out")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())

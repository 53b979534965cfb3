"""Examples and benchmarks run at tiny size, and write what they promise."""

import json

import numpy as np
import pytest

from benchmarks import e_step, guidance, mixture, noise, particles, refresh, samplers
from examples import digits, manifold

pytestmark = pytest.mark.slow


def test_digits(tmp_path):
    args = digits.parse_args(
        "--num-images 96 --num-iterations 2 --num-sgd-steps 8 --width 16 --clean-rounds 1"
        f" --num-judged 16 --num-samples 20 --output {tmp_path}".split()
    )
    result = digits.main(args)
    assert set(result["table"]) == {"Gaussian", "learned", "clean"}
    assert len(result["iterations"]) == 2
    for name in ("digits_restored.png", "digits_samples.png", "digits_predictive_check.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert (tmp_path / "arviz_summary.csv").exists()
    assert json.loads((tmp_path / "digits.json").read_text())["table"] == result["table"]


# A few far points have no plan at this regularisation in float32.
@pytest.mark.filterwarnings("ignore:Sinkhorn iterations did not converge")
def test_manifold(tmp_path):
    args = manifold.parse_args(
        "--num-points 128 --num-iterations 2 --num-sgd-steps 8 --num-steps 8 --width 16"
        f" --batch-size 64 --output {tmp_path}".split()
    )
    rows = manifold.main(args)
    assert len(rows) == 2
    assert rows[0]["sliced_w2"] > 0
    for name in ("manifold_corner.png", "manifold_curves.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    # the first E-step has no predecessor to be compared with, and NaN equals nothing
    np.testing.assert_equal(json.loads((tmp_path / "manifold.json").read_text()), rows)


@pytest.mark.filterwarnings("ignore:Sinkhorn iterations did not converge")
def test_manifold_with_the_settings_of_the_paper(tmp_path):
    args = manifold.parse_args(
        "--paper --num-points 128 --num-iterations 1 --num-sgd-steps 8 --num-steps 8 --width 16"
        f" --output {tmp_path}".split()
    )
    assert (args.num_particles, args.sampler, args.batch_size) == (1, "corrector", 1024)
    assert len(manifold.main(args)) == 1


def test_benchmark_of_the_samplers(tmp_path):
    args = samplers.parse_args(
        f"--num-images 64 --num-iterations 1 --num-gaussian 4 --output {tmp_path}".split()
    )
    fixed, rows = samplers.main(args)
    assert len(rows) == 5
    assert fixed > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_benchmark_of_the_e_step(tmp_path):
    args = e_step.parse_args(
        "--num-images 32 --batch-size 16 --num-steps 4 --width 16 --num-repeats 1"
        f" --output {tmp_path}".split()
    )
    ratios = e_step.main(args)["ratios"]
    assert min(ratios.values()) > 0
    assert json.loads((tmp_path / "e_step.json").read_text())["ratios"] == ratios


@pytest.mark.filterwarnings("ignore:Sinkhorn iterations did not converge")
def test_benchmark_of_the_particles(tmp_path):
    args = particles.parse_args(
        "--num-particles 1 2 --num-points 128 --num-iterations 1 --num-sgd-steps 8 --num-steps 8"
        f" --width 16 --batch-size 64 --output {tmp_path}".split()
    )
    assert len(particles.main(args)) == 4
    assert (tmp_path / "particles.png").stat().st_size > 10_000


def test_benchmark_of_the_noise_levels(tmp_path):
    args = noise.parse_args(
        f"--num-seeds 1 --num-images 64 --num-sgd-steps 8 --width 16 --output {tmp_path}".split()
    )
    rows = noise.main(args)
    assert all(np.isfinite(row["losses"] + row["frechet"]).all() for row in rows)


def test_benchmark_of_guidance(tmp_path):
    args = guidance.parse_args(
        f"--num-images 48 --num-sgd-steps 8 --width 16 --num-cases 4 --output {tmp_path}".split()
    )
    rows = guidance.main(args)
    assert [row["num_particles"] for row in rows] == [1, 1, 1, 4]
    assert all(0 < row["rmse"] < 2 and np.isfinite(row["frechet"]) for row in rows)


def test_benchmark_of_the_refresh_rate(tmp_path, monkeypatch):
    runs = {"4 steps": (4, 2, {}), "8 steps, new network": (8, 1, {"warm_start": False})}
    monkeypatch.setattr(refresh, "RUNS", runs)
    args = refresh.parse_args(
        f"--num-steps 8 --num-images 64 --width 16 --output {tmp_path}".split()
    )
    rows = refresh.main(args)
    assert [row["num_e_steps"] for row in rows] == [2, 1]
    assert all(np.isfinite(row["frechet"]) for row in rows)


def test_benchmark_of_the_mixture(tmp_path):
    args = mixture.parse_args(
        "--num-seeds 1 --num-observed 2 --num-samples 50 --num-steps 8 --num-projections 64"
        f" --output {tmp_path}".split()
    )
    args.methods = ["MMPS", "SMC, K = 4", "particle Gibbs", "NUTS"]
    rows = mixture.main(args)
    assert [row["method"] for row in rows] == ["exact", *args.methods]
    assert rows[0]["mass_error"][0] < 0.2
    assert all(np.isfinite(row["sliced"] + row["max_sliced"]).all() for row in rows)

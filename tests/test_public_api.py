"""The public names are pinned, documented, and listed in the reference."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import numpyro_diffprior as ndp

DOCS = Path(__file__).resolve().parent.parent / "docs"

# Sorted; a name is added or removed here on purpose, and in docs/api.md.
PUBLIC = [
    "CalibratedCovariance",
    "Calibration",
    "Covariance",
    "DDIM",
    "DDPM",
    "DPS",
    "Denoiser",
    "Dense",
    "Diagonal",
    "DiagonalPlusLowRank",
    "DiffusionPrior",
    "DiffusionReparam",
    "EM",
    "EMMetrics",
    "EMResult",
    "EMState",
    "FitResult",
    "GaussianCovariance",
    "GaussianDenoiser",
    "Heun",
    "Isotropic",
    "IsotropicCovariance",
    "Karras",
    "LogBeta",
    "LogEvidence",
    "LogLinear",
    "LogNormal",
    "LogUniform",
    "MLP",
    "MMPS",
    "MMPSKernel",
    "MMPSState",
    "MixtureDenoiser",
    "Moments",
    "MultistepODE",
    "MultistepSDE",
    "NetworkDenoiser",
    "ParticleGibbs",
    "ParticleGibbsState",
    "PiGDM",
    "Piecewise",
    "PosteriorSamples",
    "PredictorCorrector",
    "TMPD",
    "Tempered",
    "TweedieCovariance",
    "UNet",
    "UnitCovariance",
    "__version__",
    "calibrate",
    "fit_denoiser",
    "gaussian_moments",
    "log_evidence",
    "mask_priors",
    "measure_error",
    "metrics",
    "sample_posterior",
]
NAMES = [name for name in PUBLIC if name not in ("__version__", "metrics")]


def reference() -> dict[str, list[str]]:
    """Names listed in the reference, by module: the ``:members:`` of every ``automodule``."""
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"automodule:: numpyro_diffprior\.(\w+)\n +:members: (.*)\n", text)
    return {module: members.split(", ") for module, members in blocks}


REFERENCE = reference()


def test_all_is_pinned():
    assert sorted(PUBLIC) == PUBLIC
    assert sorted(ndp.__all__) == PUBLIC
    assert len(set(ndp.__all__)) == len(ndp.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_public_name_has_a_docstring(name):
    member = getattr(ndp, name)
    # vars, not getattr: a class must not pass by its base's docstring.
    doc = vars(member).get("__doc__") if inspect.isclass(member) else member.__doc__
    assert doc is not None
    assert doc.strip()
    # What dataclasses and NamedTuples write when nobody wrote a docstring.
    assert not doc.startswith(f"{name}("), "this docstring is generated"


@pytest.mark.parametrize("name", [name for name in NAMES if inspect.isclass(getattr(ndp, name))])
def test_public_methods_have_docstrings(name):
    cls = getattr(ndp, name)
    undocumented = [
        member
        for member, value in vars(cls).items()
        if member == "__call__" or not member.startswith("_")
        if inspect.isroutine(value) or isinstance(value, property | classmethod | staticmethod)
        # What implements a method or an attribute of a base is documented there.
        if not any(
            getattr(vars(base).get(member), "__doc__", None)
            or member in inspect.get_annotations(base)
            for base in cls.__mro__
        )
    ]
    assert undocumented == []


@pytest.mark.parametrize("name", NAMES)
def test_public_name_is_in_the_reference(name):
    listed = {member for members in REFERENCE.values() for member in members}
    assert name in listed, f"add '{name}' to docs/api.md"


@pytest.mark.parametrize("module", sorted(REFERENCE))
def test_reference_lists_what_the_module_exports(module):
    exported = importlib.import_module(f"numpyro_diffprior.{module}").__all__
    assert sorted(REFERENCE[module], key=str.lower) == sorted(exported, key=str.lower)


def test_reference_has_every_module():
    modules = {path.stem for path in (DOCS.parent / "numpyro_diffprior").glob("*.py")}
    assert set(REFERENCE) == modules - {"__init__"}

"""The public names are pinned, documented, and listed in the reference."""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import jax
import pytest

import numpyro_diffprior as ndp

DOCS = Path(__file__).resolve().parent.parent / "docs"

# Sorted; a name is added or removed here on purpose, and in docs/api.md.
PUBLIC = [
    "CSVLogger",
    "Calibration",
    "Denoiser",
    "DiT",
    "DiffusionPrior",
    "DiffusionReparam",
    "EM",
    "EMMetrics",
    "EMResult",
    "EMState",
    "EStep",
    "FitResult",
    "FunctionDenoiser",
    "FunctionNetwork",
    "GaussianDenoiser",
    "GaussianStart",
    "LazyArray",
    "LogEvidence",
    "MLP",
    "MMPS",
    "MMPSKernel",
    "MStep",
    "MixtureDenoiser",
    "Moments",
    "NetworkDenoiser",
    "PMMH",
    "ParamStep",
    "ParticleGibbs",
    "PosteriorSamples",
    "UNet",
    "WindowDenoiser",
    "__version__",
    "calibrate",
    "complex_noise",
    "fit_denoiser",
    "from_arrays",
    "gaussian_moments",
    "guidance",
    "lazy_arrays",
    "linalg",
    "log_evidence",
    "mask_priors",
    "measure_error",
    "metrics",
    "noise",
    "plot",
    "sample_posterior",
    "samplers",
    "to_arrays",
    "training",
]
NAMESPACES = ["guidance", "linalg", "metrics", "noise", "plot", "samplers", "training"]
NAMES = [name for name in PUBLIC if name not in ("__version__", *NAMESPACES)]
MEMBERS = [
    (namespace, name)
    for namespace in [*NAMESPACES, ""]
    for name in (getattr(ndp, namespace).__all__ if namespace else NAMES)
]


def member_of(namespace: str, name: str) -> object:
    return getattr(getattr(ndp, namespace) if namespace else ndp, name)


def reference() -> dict[str, list[str]]:
    """Names listed in the reference, by module: the ``:members:`` of every ``automodule``."""
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"automodule:: numpyro_diffprior\.([\w.]+)\n +:members: (.*)\n", text)
    return {module: members.split(", ") for module, members in blocks}


REFERENCE = reference()


def test_all_is_pinned():
    assert sorted(PUBLIC) == PUBLIC
    assert sorted(ndp.__all__) == PUBLIC
    assert len(set(ndp.__all__)) == len(ndp.__all__)


@pytest.mark.parametrize(("namespace", "name"), MEMBERS)
def test_public_name_has_a_docstring(namespace, name):
    member = member_of(namespace, name)
    # vars, not getattr: a class must not pass by its base's docstring.
    doc = vars(member).get("__doc__") if inspect.isclass(member) else member.__doc__
    assert doc is not None
    assert doc.strip()
    # What dataclasses and NamedTuples write when nobody wrote a docstring.
    assert not doc.startswith(f"{name}("), "this docstring is generated"


CLASSES = [member for member in MEMBERS if inspect.isclass(member_of(*member))]


@pytest.mark.parametrize(("namespace", "name"), CLASSES)
def test_public_methods_have_docstrings(namespace, name):
    cls = member_of(namespace, name)
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


# A base class without a step, and functions of one trace that no call takes or returns.
NO_OBJECTS = {("samplers", "Sampler"), ("guidance", "Likelihood")}
OBJECTS = [
    member
    for member in CLASSES
    if dataclasses.is_dataclass(cls := member_of(*member)) and not inspect.isabstract(cls)
    if member not in NO_OBJECTS
]


@pytest.mark.parametrize(("namespace", "name"), OBJECTS)
def test_objects_are_pytrees(namespace, name):
    """Of arrays, or static: they pass through transformations as arguments and in closures."""
    instance = object.__new__(member_of(namespace, name))
    assert not jax.tree_util.all_leaves([instance])


@pytest.mark.parametrize(("namespace", "name"), MEMBERS)
def test_public_name_is_in_the_reference(namespace, name):
    listed = {member for members in REFERENCE.values() for member in members}
    assert name in listed, f"add '{name}' to docs/api.md"


@pytest.mark.parametrize("module", sorted(REFERENCE))
def test_reference_lists_only_what_the_module_exports(module):
    exported = importlib.import_module(f"numpyro_diffprior.{module}").__all__
    assert set(REFERENCE[module]) <= set(exported)

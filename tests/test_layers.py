"""The house: wings import only from wings below them, and files of a wing form no circle.

The order of the wings is the only table here; what a wing holds is read from its folder. The wings
below the line know nothing of NumPyro, and products outside of networks are in full precision.
"""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "numpyro_diffprior"

# From the ground up. `prior` is a module, the others are folders.
WINGS = (
    ("_compile",),
    ("linalg", "nets", "metrics"),
    ("denoisers",),
    ("diffusion", "guidance"),
    ("particles", "prior"),
    ("reading",),
    ("infer",),
    ("em",),
    ("plot",),
)
LEVEL_OF = {wing: level for level, wings in enumerate(WINGS) for wing in wings}
WITH_NUMPYRO = {"prior", "reading", "infer", "em"}
FORBIDDEN_NAMES = frozenset({"utils", "typing", "base", "common", "helpers"})

SOURCES = {
    ".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts): path
    for path in sorted((ROOT / PACKAGE).rglob("*.py"))
}
MODULES = sorted(set(SOURCES) - {"__init__"})


def imported(tree: ast.AST) -> list[str]:
    """Dotted names of all imports at any depth; ``from a import b`` gives ``a.b``."""
    names = []
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                names += [alias.name for alias in node.names]
            case ast.ImportFrom(level=0):
                names += [f"{node.module}.{alias.name}" for alias in node.names]
            case ast.ImportFrom():
                names.append("." * node.level + (node.module or ""))
            case ast.Name(id="__import__" | "import_module" as name):
                names.append(f"{name}()")
            case ast.Attribute(attr="import_module"):
                names.append("import_module()")
    return names


def violations(module: str, source: str) -> list[str]:
    """What is wrong with the imports of a module of the package."""
    wing = module.split(".")[0]
    found = []
    for name in imported(ast.parse(source)):
        top, *rest = name.split(".")
        if name.startswith("."):
            found.append(f"relative import of '{name}'")
        elif name.endswith("()"):
            found.append(f"import by a call of {name}")
        elif name == "importlib.import_module":
            found.append("import of import_module")
        elif top == "numpyro" and wing not in WITH_NUMPYRO:
            found.append(f"'{name}' below the line, in '{wing}'")
        elif top == PACKAGE and (not rest or rest[0] not in LEVEL_OF):
            found.append(f"'{name}' comes from the package, not from one of its wings")
        elif top == PACKAGE and rest[0] != wing and LEVEL_OF[rest[0]] >= LEVEL_OF[wing]:
            found.append(f"'{name}' is not below '{wing}'")
    return found


def inside(wing: str) -> dict[str, set[str]]:
    """Which files of a wing import which others, by module; its ``__init__`` may import all."""
    modules = [m for m in MODULES if m.startswith(f"{wing}.") and not m.endswith("__init__")]
    edges = {}
    for module in modules:
        names = imported(ast.parse(SOURCES[module].read_text(encoding="utf-8")))
        edges[module] = {
            other
            for other in modules
            for name in names
            if f"{name}.".startswith(f"{PACKAGE}.{other}.")
        }
    return edges


def test_the_order_has_every_wing_and_no_other():
    assert {module.split(".")[0] for module in MODULES} == set(LEVEL_OF)
    assert all(
        (ROOT / PACKAGE / wing / "__init__.py").is_file() for wing in LEVEL_OF if wing != "prior"
    )


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_from_lower_wings(module):
    assert module.split(".")[-1] not in FORBIDDEN_NAMES, f"no module is called '{module}'"
    assert violations(module, SOURCES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("wing", sorted(LEVEL_OF))
def test_files_of_a_wing_form_no_circle(wing):
    try:
        TopologicalSorter(inside(wing)).prepare()
    except CycleError as error:
        pytest.fail(f"circle of imports: {error.args[1]}")


def test_contributing_has_the_same_order():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", text, flags=re.MULTILINE)
    assert tuple(tuple(re.findall(r"`(\w+)`", wings)) for _, wings in rows) == WINGS


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("linalg.solvers", "import numpyro"),
        ("diffusion.samplers", "import numpyro.distributions as dist"),
        ("guidance.mmps", "from numpyro.infer import SVI"),
        ("linalg.batched", "from numpyro_diffprior.nets.mlp import MLP"),
        ("diffusion.training", "from numpyro_diffprior.guidance.mmps import MMPS"),
        ("linalg.batched", "import numpyro_diffprior.em.em"),
        ("denoisers.network", "from numpyro_diffprior import guidance"),
        ("denoisers.network", "def f():\n    from numpyro_diffprior.diffusion import samplers"),
        ("em.em", "import numpyro_diffprior"),
        ("em.em", "from numpyro_diffprior import EM"),
        ("em.em", "from numpyro_diffprior.unknown import f"),
        ("em.em", "from .gaussian import fit_gaussian"),
        ("em.em", "from . import gaussian"),
        ("em.em", "import importlib\nimportlib.import_module('numpyro_diffprior.linalg')"),
        ("em.em", "from importlib import import_module as load"),
        ("em.em", "__import__('numpyro_diffprior.linalg')"),
    ],
)
def test_forbidden_import_is_found(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("linalg.batched", "import jax.numpy as jnp\nfrom jax import Array"),
        ("denoisers.exact", "from numpyro_diffprior.linalg.covariances import Dense, Isotropic"),
        ("em.em", "from numpyro_diffprior.em import gaussian\nimport numpyro_diffprior.nets"),
        ("prior", "from numpyro.distributions import constraints"),
    ],
)
def test_allowed_import_passes(module, source):
    assert violations(module, source) == []


# Networks may be as rough as the accelerator likes; all else uses `linalg.batched`, or says how
# precise a product is.
ROUGH = frozenset({"linalg.batched", "nets.convolutions", "nets.layers"})
PRODUCTS = frozenset({"dot", "einsum", "inner", "matmul", "tensordot", "vdot", "dot_general"})


def rough_products(source: str) -> list[str]:
    """Products of arrays whose factors an accelerator may round."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.BinOp(op=ast.MatMult()) | ast.AugAssign(op=ast.MatMult()):
                found.append(ast.unparse(node))
            case ast.Call(func=ast.Attribute(attr=name), keywords=keywords) if name in PRODUCTS:
                if not any(keyword.arg == "precision" for keyword in keywords):
                    found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("module", sorted(set(MODULES) - ROUGH))
def test_products_are_in_full_precision(module):
    assert rough_products(SOURCES[module].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("source", ["x = a @ b", "x @= b", "jnp.einsum('ij,j->i', a, b)"])
def test_rough_product_is_found(source):
    assert rough_products(source)

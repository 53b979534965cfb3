"""A module imports only from lower layers, the numeric core does not know NumPyro, and products
are in full precision.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "numpyro_diffprior"

LAYERS = (
    ("matrices", "dependence", "devices", "schedules", "net_layers", "transport"),
    ("linalg", "nets", "metrics"),
    ("denoisers", "likelihoods", "solvers"),
    (
        "network_denoiser",
        "joint_denoisers",
        "guidance",
        "posterior_covariances",
        "samplers",
        "flow",
        "gaussian_fit",
    ),
    ("mmps", "serialization", "training"),
    ("annealing", "baselines", "distributions", "moments", "proposals"),
    ("curvature", "introspect", "smc"),
    ("observed_sites", "conditional_smc", "priors"),
    ("observations",),
    ("posterior",),
    ("kernels", "reparam", "evidence", "calibration", "params"),
    ("em",),
    ("arviz_io", "checkpoints"),
)
LAYER_OF = {module: layer for layer, modules in enumerate(LAYERS) for module in modules}
FIRST_LAYER_WITH_NUMPYRO = 5
FORBIDDEN_NAMES = frozenset({"utils", "typing", "base", "common"})

SOURCES = {
    path.relative_to(ROOT / PACKAGE).with_suffix("").as_posix(): path
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
    layer = LAYER_OF[module]
    found = []
    for name in imported(ast.parse(source)):
        top, *rest = name.split(".")
        if name.startswith("."):
            found.append(f"relative import of '{name}'")
        elif name.endswith("()"):
            found.append(f"import by a call of {name}")
        elif name == "importlib.import_module":
            found.append("import of import_module")
        elif top == "numpyro" and layer < FIRST_LAYER_WITH_NUMPYRO:
            found.append(f"'{name}' in layer {layer}")
        elif top == PACKAGE and (not rest or rest[0] not in LAYER_OF):
            found.append(f"'{name}' comes from the package, not from one of its modules")
        elif top == PACKAGE and LAYER_OF[rest[0]] >= layer:
            found.append(f"'{name}' of layer {LAYER_OF[rest[0]]} in layer {layer}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_module_is_in_the_table(module):
    assert module.split("/")[-1] not in FORBIDDEN_NAMES, f"no module is called '{module}'"
    assert module in LAYER_OF, f"add '{module}' to LAYERS and to CONTRIBUTING.md"


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_from_lower_layers(module):
    assert violations(module, SOURCES[module].read_text(encoding="utf-8")) == []


def test_contributing_has_the_same_table():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", text, flags=re.MULTILINE)
    table = tuple(tuple(re.findall(r"`(\w+)`", modules)) for _, modules in rows)
    assert table == LAYERS


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("linalg", "import numpyro"),
        ("samplers", "import numpyro.distributions as dist"),
        ("training", "from numpyro.infer import SVI"),
        ("matrices", "from numpyro_diffprior.schedules import LogLinear"),
        ("linalg", "import numpyro_diffprior.em"),
        ("denoisers", "from numpyro_diffprior import guidance"),
        ("denoisers", "def f():\n    from numpyro_diffprior.samplers import DDIM"),
        ("em", "import numpyro_diffprior"),
        ("em", "from numpyro_diffprior import EM"),
        ("em", "from numpyro_diffprior.unknown import f"),
        ("em", "from .linalg import Dense"),
        ("em", "from . import linalg"),
        ("em", "import importlib\nimportlib.import_module('numpyro_diffprior.linalg')"),
        ("em", "from importlib import import_module as load"),
        ("em", "__import__('numpyro_diffprior.linalg')"),
    ],
)
def test_forbidden_import_is_found(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("linalg", "import jax.numpy as jnp\nfrom jax import Array"),
        ("denoisers", "from numpyro_diffprior.linalg import Dense, Isotropic"),
        ("em", "from numpyro_diffprior import linalg\nimport numpyro_diffprior.nets"),
        ("distributions", "from numpyro.distributions import constraints"),
    ],
)
def test_allowed_import_passes(module, source):
    assert violations(module, source) == []


# Networks may be as rough as the accelerator likes; all else asks `matrices`, or says how precise.
ROUGH = frozenset({"matrices", "net_layers"})
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

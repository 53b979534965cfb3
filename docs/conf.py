"""Configuration of Sphinx."""

import numpyro_diffprior

project = "numpyro_diffprior"
author = "The numpyro_diffprior developers"
copyright = f"2026, {author}"
release = numpyro_diffprior.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
# In docstrings `Name` links to what it names, if it is documented here, and is code otherwise.
default_role = "py:obj"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

html_theme = "furo"
html_title = f"{project} {release}"


def skip_generated(app, what, name, obj, skip, options):
    """Leave out the fields of NamedTuples: their class's docstring has them."""
    return True if (getattr(obj, "__doc__", "") or "").startswith("Alias for field") else skip


def setup(app):
    app.connect("autodoc-skip-member", skip_generated)

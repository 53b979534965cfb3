"""Every Python block of the README and of the pages of docs/ runs as pasted, from top to bottom.

The blocks of a page share one namespace, and warnings are errors. The pages show settings for a
user; `SMALLER` makes them small enough for a test.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What is replaced in the blocks of a page before they run: numbers of events and iterations, sizes
# of networks. Each entry must be found on its page.
SMALLER = {
    "README.md": {
        "(2, 1024, 1), maxval=28": "(2, 4, 1), maxval=4",
        "jnp.arange(28)": "jnp.arange(4)",
        "ndp.UNet((28, 28), ": "ndp.UNet((4, 4), channels=(4,), num_blocks=1, ",
        "key(4), 32, ": "key(4), 2, ",
        "num_samples=250": "num_samples=4",
        "num_samples=16": "num_samples=2",
    },
    "docs/guide.md": {
        "simulate(jax.random.key(1), 512)": "simulate(jax.random.key(1), 8)",
        "simulate(jax.random.key(2), 64)": "simulate(jax.random.key(2), 4)",
        "minval=1.0, maxval=6.0": "maxval=4.0",
        "jnp.arange(8)": "jnp.arange(4)",
        "ndp.MLP((8, 8), ": "ndp.MLP((4, 4), features=(8,), ",
        "ndp.MLP((4,), ": "ndp.MLP((4,), features=(8,), ",
        "ndp.MLP((16,), ": "ndp.MLP((16,), features=(8,), ",
        "1_000, stride=4": "32, stride=4",
        "ndp.MLP((3,), ": "ndp.MLP((3,), features=(8,), ",
        "key(3), 64, ": "key(3), 2, ",
        "key(3), 16, ": "key(3), 1, ",
        "key(15), 32, ": "key(15), 2, ",
        "key(17), 32, ": "key(17), 2, ",
        "key(19), 32, ": "key(19), 2, ",
        "num_warmup=20, num_samples=500": "num_warmup=2, num_samples=4",
        "num_warmup=500, num_samples=1000": "num_warmup=2, num_samples=2",
        "num_warmup=200": "num_warmup=2",
        "num_samples=500": "num_samples=4",
        "num_steps=32": "num_steps=2",
        "num_simulations=500": "num_simulations=2",
        "num_particles=16": "num_particles=2",
        "num_steps=10_000": "num_steps=2",
        "num_samples=100": "num_samples=2",
        "num_samples=16": "num_samples=2",
    },
}


def find_blocks(page):
    """Return the Python blocks of a page, each with the number of the line that it starts at."""
    text = page.read_text()
    return [(text.count("\n", 0, m.start(1)) + 1, m[1]) for m in BLOCK.finditer(text)]


PAGES = {
    str(page.relative_to(ROOT)): page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}


# ArviZ before 1.0 fills a frame of one type by another.
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:pandas", "ignore::DeprecationWarning:arviz"
)
@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if find_blocks(page)])
def test_blocks_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace, unused = {"__name__": "__main__"}, set(SMALLER.get(name, ()))
    for line, block in find_blocks(PAGES[name]):
        for shown, run in SMALLER.get(name, {}).items():
            if shown in block:
                unused.discard(shown)
                block = block.replace(shown, run)
        # As many empty lines before the block as the page has: tracebacks point into the page.
        exec(compile("\n" * (line - 1) + block, PAGES[name], "exec"), namespace)
    assert not unused, f"not found on {name}, remove from SMALLER: {sorted(unused)}"


@pytest.mark.parametrize("name", PAGES)
def test_no_block_is_missed(name):
    """A Python block with an indented, longer or otherwise named fence would not be run."""
    text = PAGES[name].read_text()
    fences = re.findall(r"^ *(?:`{3,}|~{3,}) *(?:py|\{code)", text, re.MULTILINE)
    assert len(find_blocks(PAGES[name])) == len(fences)


def test_table_names_pages():
    assert set(SMALLER) <= set(PAGES)

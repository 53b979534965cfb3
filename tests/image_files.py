"""Small files of images, in the formats that `examples/images.py` reads."""

import gzip

import numpy as np

__all__ = ["write_images"]


def write_images(folder, suffix="", num_images=24, size=8):
    """Write random images and labels as Fashion-MNIST's files; return those of the test set."""
    rng = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        pixels = rng.integers(256, size=(num_images, size, size), dtype=np.uint8)
        labels = np.arange(num_images, dtype=np.uint8) % 10
        _write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", pixels)
        _write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels)
    return pixels, labels


def _write_idx(path, values):
    """Write bytes in the idx format, gzipped if the name says so."""
    sizes = np.asarray(values.shape, ">i4").tobytes()
    content = bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)

"""The example with corrupted images reads its files, and scores draws without bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import images
from tests.image_files import write_images


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_images_are_read_from_idx_files(tmp_path, suffix):
    expected = write_images(tmp_path, suffix)
    for found, values in zip(images.read_images(tmp_path, "test"), expected, strict=True):
        np.testing.assert_array_equal(found, values)
    scaled = images.scale(np.array([0, 255], np.uint8))
    np.testing.assert_allclose(scaled, [-images.SCALE, images.SCALE])


def test_images_are_read_from_cifar(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(256, size=(5, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(5, dtype=np.uint8)
    rows = np.concatenate([labels[:, None], pixels.transpose(0, 3, 1, 2).reshape(5, -1)], axis=1)
    rows[:2].tofile(tmp_path / "data_batch_1.bin")
    rows[2:4].tofile(tmp_path / "data_batch_2.bin")
    rows[4:].tofile(tmp_path / "test_batch.bin")
    found, found_labels = images.read_images(tmp_path, "train")
    np.testing.assert_array_equal(found, pixels[:4])
    np.testing.assert_array_equal(found_labels, labels[:4])
    found, found_labels = images.read_images(tmp_path, "test")
    np.testing.assert_array_equal(found, pixels[4:])
    np.testing.assert_array_equal(found_labels, labels[4:])
    mask, y = images.hide(jax.random.key(0), images.scale(pixels), 0.5, 1e-3)
    # A pixel is hidden in all channels or in none.
    np.testing.assert_array_equal(mask, jnp.broadcast_to(mask[..., :1], mask.shape))
    np.testing.assert_array_equal(jnp.isnan(y), ~mask)


def test_messages_about_missing_and_broken_images(tmp_path):
    with pytest.raises(ValueError, match=r"(?s)train-images-idx3-ubyte.*dataset-fashion-mnist"):
        images.read_images(tmp_path, "train")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + b"\0\0\0\x02" * 3)
    with pytest.raises(ValueError, match="idx format"):
        images.read_images(tmp_path, "train")
    (tmp_path / "data_batch_1.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ValueError, match="binary version"):
        images.read_images(tmp_path, "train")


def test_images_have_the_settings_of_the_paper():
    args = images.parse_args("--paper --num-steps 8 --attention".split())
    assert (args.channels, args.sampler, args.num_iterations) == ((128, 256, 384), "ddpm", 32)
    assert (args.num_steps, args.attention, args.noise) == (8, [], 1e-3)
    assert images.parse_args(["--gpu"]).num_images == 60_000

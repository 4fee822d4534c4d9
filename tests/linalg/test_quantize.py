"""Eight bits for a number: neighbours, means, ranges, and what is kept exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gum_optax._linalg.quantize import (
    BLOCK,
    LINEAR,
    SIGNED_FLOAT,
    SQUARES,
    dequantize,
    quantize,
    scales_shape,
)

CODES = pytest.mark.parametrize("code", [LINEAR, SIGNED_FLOAT, SQUARES], ids=["linear", "float", "squares"])
SHAPES = [(3, 5), (2, 4, BLOCK), (4, 2 * BLOCK + 7), (BLOCK + 1, 3)]


def noise_of(seed, shape):
    return jax.random.bits(jax.random.key(seed), shape, jnp.uint16)


def there_and_back(x, seed=0, code=LINEAR, axis=-1):
    codes, scales = quantize(x, noise_of(seed, x.shape), code, axis)
    assert (codes.dtype, codes.shape, scales.shape) == (code.dtype, x.shape, scales_shape(x.shape, axis))
    return np.asarray(dequantize(codes, scales, code, axis))


def block_maxima(x, axis):
    """The largest number of the block of each number."""
    moved = np.moveaxis(np.abs(x), axis, -1)
    blocks = [moved[..., i : i + BLOCK] for i in range(0, moved.shape[-1], BLOCK)]
    largest = [np.broadcast_to(b.max(-1, keepdims=True), b.shape) for b in blocks]
    return np.moveaxis(np.concatenate(largest, -1), -1, axis)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_linear_code_is_one_of_the_two_neighbours(rng, shape, axis):
    x = np.float32(rng.normal(size=shape) * 10.0 ** rng.integers(-3, 3, size=shape))
    spacing = block_maxima(x, axis) / 127
    found = there_and_back(x, axis=axis)
    assert (np.abs(found - x) <= spacing * 1.0001).all()
    codes = found / spacing
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-3)


def numbers(rng, shape, code):
    x = np.float32(rng.normal(size=shape) * 10.0 ** rng.integers(-2, 3, size=shape))
    return np.abs(x) if code is SQUARES else x


# The scaled block's largest number, and the size of its smallest number with three bits of mantissa.
@pytest.mark.parametrize(
    ("code", "largest", "smallest"), [(SIGNED_FLOAT, 448, 2.0**-6), (SQUARES, 1, 2.0**-31)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_float_code_is_one_of_the_two_neighbours(rng, shape, code, largest, smallest):
    x = numbers(rng, shape, code)
    scale = block_maxima(x, -1) / largest
    spacing = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(x / scale), smallest))) - 3) * scale
    assert (np.abs(there_and_back(x, code=code) - x) <= spacing * 1.0001).all()


@CODES
def test_the_mean_over_noise_is_the_number(rng, code):
    x = numbers(rng, (2, BLOCK), code)
    keys = jax.random.split(jax.random.key(1), 4000)

    def once(key):
        noise = jax.random.bits(key, x.shape, jnp.uint16)
        return dequantize(*quantize(jnp.asarray(x), noise, code), code)

    found = jax.vmap(once)(keys)
    found = np.asarray(found, np.float64)
    spread = found.std(0) / np.sqrt(len(keys))
    gap = np.abs(found.mean(0) - np.asarray(x))
    # 16 bits of noise: a number is off by a 2^16th of its spacing.
    assert (gap[spread > 0] / spread[spread > 0]).max() < 5
    assert gap[spread == 0].max() < 1e-6


@CODES
def test_zeros_stay_zeros_and_the_largest_keeps_its_value(rng, code):
    x = numbers(rng, (3, BLOCK), code)
    x[1] = 0
    x[2, 5] = 0
    found = there_and_back(x, code=code)
    np.testing.assert_array_equal(found[1], 0)
    assert found[2, 5] == 0
    for row in (0, 2):
        at = np.abs(x[row]).argmax()
        assert found[row, at] == pytest.approx(x[row, at], rel=1e-6)


@CODES
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_very_small_and_very_large_numbers_have_the_same_codes(rng, code, size):
    x = numbers(rng, (2, BLOCK), code)
    plain, scaled = (quantize(jnp.float32(y), noise_of(0, x.shape), code)[0] for y in (x, x * size))
    differ = np.asarray(plain != scaled).mean()
    assert differ < 0.02


@CODES
def test_what_is_below_the_smallest_scale_becomes_zero(code):
    assert not there_and_back(np.full((1, 8), 1e-39, np.float32), code=code).any()


def test_a_small_number_beside_a_large_one_keeps_its_size_unless_codes_are_linear():
    x = np.full((1, BLOCK), 1e-3, np.float32)
    x[0, 0] = 1.0
    linear, *floats = (
        np.abs(there_and_back(x, code=code) - x).max() for code in (LINEAR, SIGNED_FLOAT, SQUARES)
    )
    assert max(floats) < 1.3e-4
    assert linear > 8e-4

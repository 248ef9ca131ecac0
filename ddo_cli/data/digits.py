"""Coloured renderings of the UCI handwritten digits: the embedded data set, which needs no download."""

import numpy as np

SCALE = 4  # pixels per cell of the 8x8 grid; equal to PatchUNet's patch, so that every patch has the same phase
SIZE = 8 * SCALE  # pixels; the side of a rendering
_ONE = 1 << 10  # 1.0 in the fixed-point arithmetic below
_CONTRAST = 2  # steepness of an edge after upsampling; our choice: edges are about 2 pixels wide


def render_digits(levels: np.ndarray, num: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`num` coloured renderings, uint8 (num, 3, 32, 32), and the row of `levels` each shows, int64 (num,).

    levels: uint8 (M, 8, 8), grey levels 0..16 with 16 = ink, as in the UCI optical recognition of handwritten digits
        (Alpaydin and Kaynak, doi 10.24432/C50P49).
    Rows of `levels` are used equally often (up to a difference of 1), in random order. Each rendering has a random dark
    and a random light colour; either is the ink. Sets of different seeds share the digits and nothing else.

    All arithmetic after the interpolation weights is in integers, so that the bytes are equal on every machine.
    Raises ValueError if `levels` is not a non-empty uint8 array (M, 8, 8) of levels up to 16, or num < 1.
    """
    if levels.dtype != np.uint8 or levels.ndim != 3 or levels.shape[1:] != (8, 8) or len(levels) == 0:
        raise ValueError(f"levels must be uint8 (M, 8, 8) with M >= 1; got {levels.dtype} {levels.shape}")
    if levels.max() > 16:
        raise ValueError(f"levels must be at most 16; got {levels.max()}")
    if num < 1:
        raise ValueError(f"num = {num} must be at least 1")
    rng = np.random.Generator(np.random.PCG64(seed))
    passes = -(-num // len(levels))
    source = np.concatenate([rng.permutation(len(levels)) for _ in range(passes)])[:num]  # (num,)
    dark = rng.integers(0, 128, size=(num, 3))
    light = 255 - rng.integers(0, 128, size=(num, 3))
    ink_is_light = rng.integers(0, 2, size=(num, 1)) == 1
    ink = np.where(ink_is_light, light, dark).astype(np.int32)[:, :, None, None]  # (num, 3, 1, 1)
    paper = np.where(ink_is_light, dark, light).astype(np.int32)[:, :, None, None]  # (num, 3, 1, 1)

    # Fraction of ink in each pixel in units of 1 / _ONE.
    weights = _cubic_weights()  # (32, 8)
    coverage = weights @ levels.astype(np.int64) @ weights.T // (16 * _ONE)  # (M, 32, 32)
    steep = _ONE // 2 + _CONTRAST * (coverage - _ONE // 2)
    mask = np.clip(steep, 0, _ONE).astype(np.int32)[source][:, None]  # (num, 1, 32, 32)
    images = paper + ((ink - paper) * mask + _ONE // 2) // _ONE  # (num, 3, 32, 32)
    return images.astype(np.uint8), source


def _cubic_weights() -> np.ndarray:
    """Weights that upsample 8 cells to 32 pixels, int64 (32, 8) in units of 1 / _ONE; blank paper beyond the edge.

    Keys' cubic convolution with a = -1/2 (IEEE Trans. ASSP 29, 1981), pixel centres at half-integers.
    """
    centre = (np.arange(SIZE) + 0.5) / SCALE - 0.5
    d = np.abs(centre[:, None] - np.arange(8))  # (32, 8), distance in cells
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    return np.rint(_ONE * np.where(d < 1, near, np.where(d < 2, far, 0.0))).astype(np.int64)

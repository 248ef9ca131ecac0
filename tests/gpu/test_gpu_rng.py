"""`rng.CudaRng` against torch's own CUDA generator, whose numbers it promises."""

import math

import pytest
import torch
from torch.testing import assert_close

from ddo_cli import rng

pytestmark = pytest.mark.gpu

SEEDS = (0, 1, 42, 2**32 + 5)
SHAPES = ((), (1,), (3, 32, 32), (5, 257), (3, 256, 256), (200_000,))


@pytest.fixture
def generator(device):
    """seed -> a CUDA generator."""
    if device.type != "cuda":
        pytest.skip("a CPU has no CUDA generator")
    return lambda seed: torch.Generator(device).manual_seed(seed)


def calls(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return rng.philox(torch.tensor([[seed]]), torch.arange(math.prod(shape)), 2)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_of_the_third_call(generator, device, seed, shape):
    """Of each kind; the two calls before it, one of them of another size, move the generator by one counter each."""

    def third(draw, **keywords):
        g = generator(seed)
        torch.randn((1000,), generator=g, device=device, dtype=torch.float64)
        torch.randint(10, (), generator=g, device=device)
        return draw(generator=g, device=device, **keywords).cpu().flatten()

    words = calls(seed, shape)
    normal = rng.philox_normal(words).flatten()
    assert_close(third(torch.randn, size=shape), normal, atol=1e-5, rtol=0)
    double = rng.philox_normal_double(words).flatten()
    assert_close(third(torch.randn, size=shape, dtype=torch.float64), double, atol=1e-12, rtol=1e-12)
    assert torch.equal(third(torch.rand, size=shape), rng.philox_uniform(words).flatten())
    uniform = rng.philox_uniform_double(words).flatten()
    assert torch.equal(third(torch.rand, size=shape, dtype=torch.float64), uniform)
    assert torch.equal(third(torch.randint, high=1000, size=shape), words[0].flatten() % 1000)


def test_rows_of_a_batch_are_the_generators_of_their_seeds(generator, device):
    ours, theirs = rng.CudaRng(SEEDS), [generator(seed % 2**32) for seed in SEEDS]  # as EDM's scripts take seeds
    for _ in range(2):
        latent = [torch.randn((3, 8, 8), generator=g, device=device).cpu() for g in theirs]
        assert_close(ours.randn((3, 8, 8)), torch.stack(latent), atol=1e-5, rtol=0)
        label = [torch.randint(1000, (), generator=g, device=device).cpu() for g in theirs]
        assert torch.equal(ours.randint(1000), torch.stack(label))
        noise = [torch.randn((3, 8, 8), generator=g, device=device, dtype=torch.float64).cpu() for g in theirs]
        assert_close(ours.randn((3, 8, 8), torch.float64), torch.stack(noise), atol=1e-12, rtol=1e-12)

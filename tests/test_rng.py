import math

import pytest
import torch
from conftest import CPU, make_checkpoint
from torch.testing import assert_close

from ddo_cli.errors import UsageError
from ddo_cli.generation import generate
from ddo_cli.models import registry
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import MOST_NUMBERS, CudaRng, RowRng, permutation, philox, seed_from


def test_a_row_depends_on_its_seed_only():
    together, alone = RowRng([5, 9, 7]), RowRng([7])
    assert torch.equal(together.randn((3, 4))[2], alone.randn((3, 4))[0])
    assert torch.equal(together.rand()[2], alone.rand()[0])


def test_training_rows_do_not_depend_on_how_a_batch_is_shared():
    whole = RowRng.for_rows("ddo", 0, 3, rows=range(8)).randn((5,))
    halves = [RowRng.for_rows("ddo", 0, 3, rows=rows).randn((5,)) for rows in (range(4), range(4, 8))]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, RowRng.for_rows("ddo", 0, 4, rows=range(8)).randn((5,)))


def test_edm_latents_of_seed_0():
    # EDM's published check of the CPU generator: seed 0, shape (3, 32, 32).
    expected = torch.tensor([-1.1258398, -1.1523602, -0.2505786, -0.4338788])
    torch.testing.assert_close(RowRng([0]).randn((3, 32, 32)).flatten()[:4], expected)


def test_seed_from_tells_keys_apart():
    keys = [("a", 1, 2), ("a", 12), ("a", "1", 2), ("b", 1, 2), ("a", 2, 1)]
    assert len({seed_from(*key) for key in keys}) == len(keys)


def test_permutation():
    order = permutation(100, "x", 1)
    assert sorted(order.tolist()) == list(range(100))
    assert torch.equal(order, permutation(100, "x", 1))
    assert not torch.equal(order, permutation(100, "x", 2))


# ---------------------------------------------------------------------------------------------------------------------
# Torch's CUDA generator; tests/gpu compares with a card's


@pytest.mark.parametrize(
    ("key", "thread", "counter", "expected"),
    [
        (0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, -1, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3243F6A88, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(key, thread, counter, expected):
    assert tuple(int(word) for word in philox(torch.tensor(key), torch.tensor(thread), counter)) == expected


def test_cuda_rng_gives_the_known_numbers_of_torchs_cuda_generator():
    # torch.manual_seed(0), and 42: torch.randn(3, device="cuda"), torch.rand(4, device="cuda"), as printed everywhere.
    known = [[-0.9247, -0.4253, -2.6438], [0.1940, 2.1614, -0.1721]]
    assert_close(CudaRng([0, 42]).randn((3,)), torch.tensor(known), atol=5e-5, rtol=0)
    assert_close(
        CudaRng([2**32]).rand((2, 2))[0].flatten(), torch.tensor([0.3990, 0.5167, 0.0249, 0.9401]), atol=5e-5, rtol=0
    )


def test_cuda_rng_double_and_integers_by_a_plain_formula():
    rng = CudaRng([7, 8])
    rng.rand()  # each call takes the next counter
    for number, kind in enumerate(("normal", "uniform", "integer"), start=1):
        words = [int(word[0]) for word in philox(torch.tensor([[8]]), torch.tensor([2 if number < 3 else 0]), number)]
        first, second = (words[i] ^ words[i + 1] << 21 for i in (0, 2))  # 53 bits
        u = (first + 0.5) / 2**53
        if kind == "normal":
            v = (second + 0.5) / 2**53
            found = rng.randn((3,), torch.float64)[1, 2]
            assert float(found) == pytest.approx(math.sqrt(-2 * math.log(u)) * math.sin(2 * math.pi * v), rel=1e-12)
        elif kind == "uniform":
            assert float(rng.rand((3,), torch.float64)[1, 2]) == pytest.approx(u, rel=1e-15)
        else:
            assert int(rng.randint(10)[1]) == words[0] % 10


def test_cuda_rng_is_standard_normal_and_uniform():
    normal = CudaRng(range(4)).randn((25_000,))  # errors of mean and variance: 0.003 and 0.0045
    assert abs(float(normal.mean())) < 0.015
    assert abs(float(normal.var()) - 1) < 0.025
    assert CudaRng([3]).rand((25_000,)).max() < 1


def test_cuda_rng_refuses_what_depends_on_the_gpu():
    assert CudaRng([0]).rand((MOST_NUMBERS,)).shape == (1, MOST_NUMBERS)
    with pytest.raises(UsageError, match=r"rng = cuda: a sample takes 221185 numbers .* use rng = cpu"):
        CudaRng([0]).randn((MOST_NUMBERS + 1,))


CHURNED = {"steps": 2, "s_churn": 2.0}


@pytest.mark.parametrize(("kind", "settings"), [("diffusion", CHURNED), ("var", {})])
def test_sampling_rng_changes_the_noise_and_still_makes_each_image_a_function_of_its_seed(tmp_path, kind, settings):
    model = registry.load_model(make_checkpoint(tmp_path / "model.safetensors", kind), CPU).model

    def drawn(seeds=(3, 4, 5), **more):
        spec = SamplingRecipe(**settings, **more)
        return torch.cat([batch.items for batch in generate(model, seeds, spec, batch=2)])

    assert torch.equal(drawn(), drawn(rng="cpu"))
    assert not torch.equal(drawn(), drawn(rng="cuda"))
    apart = drawn(rng="cuda")[1].int() - drawn([4], rng="cuda")[0].int()
    assert int(apart.abs().max()) <= 1  # another batch size


def test_sampling_rng_draws_the_random_labels(tmp_path):
    model = registry.load_model(make_checkpoint(tmp_path / "model.safetensors"), CPU).model
    (batch,) = generate(model, range(8), SamplingRecipe(steps=1, labels="random", rng="cuda"), batch=8)
    rng = CudaRng(range(8))
    rng.randn((3, 32, 32))
    assert torch.equal(batch.label, rng.randint(10))

import torch

from ddo_cli.rng import RowRng, permutation, seed_from


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

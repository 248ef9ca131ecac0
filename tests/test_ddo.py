"""The objective: hand-worked values, gradients against finite differences, the direction of every quantity."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from ddo_cli.objectives.ddo import ddo_loss, r_std

LOG2 = math.log(2)


def test_each_term_is_log_2_at_zero_ratio():
    zero = torch.zeros(5)
    found = ddo_loss(zero, zero, alpha=4.0, beta=0.05)
    assert_close(found.real_term.item(), LOG2)
    assert_close(found.fake_term.item(), LOG2)
    assert_close(found.loss.item(), 5 * LOG2)  # (1 + alpha) log 2
    assert found.accuracy.item() == 0.5  # a tie counts one half


def test_hand_worked_loss():
    # beta r_real = 1 and -2: -logsigmoid = log(1 + e^-1) = 0.3132617, log(1 + e^2) = 2.1269280; mean 1.2200948.
    # -beta r_fake = 2 and 0: 0.1269280, 0.6931472; mean 0.4100376. loss = 1.2200948 + 3 * 0.4100376 = 2.4502076.
    found = ddo_loss(torch.tensor([10.0, -20.0]), torch.tensor([-20.0, 0.0]), alpha=3.0, beta=0.1)
    assert_close(found.real_term.item(), 1.2200948, atol=1e-6, rtol=0)
    assert_close(found.fake_term.item(), 0.4100376, atol=1e-6, rtol=0)
    assert_close(found.loss.item(), 2.4502076, atol=1e-6, rtol=0)
    assert_close(found.r_real.item(), -5.0)
    assert_close(found.r_fake.item(), -10.0)
    assert_close(found.margin.item(), 5.0)
    assert_close(found.r_square.item(), 225.0)
    assert_close(r_std(-5.0, -10.0, 225.0), math.sqrt(168.75))  # rows 10, -20, -20, 0 around -7.5
    assert_close(found.accuracy.item(), (1 + 0 + 1 + 0.5) / 4)


def test_fake_weight_removes_rows_without_changing_the_mean_s_denominator():
    r_fake = torch.tensor([3.0, 100.0])
    found = ddo_loss(torch.zeros(2), r_fake, 1.0, 1.0, fake_weight=torch.tensor([1.0, 0.0]))
    assert_close(found.fake_term.item(), math.log1p(math.exp(3)) / 2)


@pytest.mark.parametrize(("alpha", "divisor"), [(4.0, 4.0), (0.5, 1.0)])
def test_division_by_alpha(alpha, divisor):
    r = torch.tensor([1.0, -2.0])
    plain = ddo_loss(r, -r, alpha, 0.3).loss
    assert_close(ddo_loss(r, -r, alpha, 0.3, divide_by_alpha=True).loss, plain / divisor)


def test_gradient_against_finite_differences():
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(6, dtype=torch.float64, generator=generator).mul(20).requires_grad_()

    def loss(rows):
        return ddo_loss(rows[:3], rows[3:], alpha=2.0, beta=0.05, divide_by_alpha=True).loss

    assert torch.autograd.gradcheck(loss, (r,))


@given(st.floats(-5e3, 5e3), st.floats(0.1, 50), st.floats(0.01, 0.1))
def test_loss_pushes_real_up_and_fake_down_and_stays_finite(value, alpha, beta):
    r_real = torch.tensor([value], requires_grad=True)
    r_fake = torch.tensor([value], requires_grad=True)
    loss = ddo_loss(r_real, r_fake, alpha, beta).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert r_real.grad is not None
    assert r_fake.grad is not None
    assert r_real.grad.item() <= 0 <= r_fake.grad.item()


def test_half_precision_ratios_are_raised_to_float32():
    assert ddo_loss(
        torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16), 1.0, 1.0
    ).loss.dtype == (torch.float32)


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_coefficients_must_be_positive(alpha, beta):
    with pytest.raises(ValueError, match="must be positive"):
        ddo_loss(torch.zeros(1), torch.zeros(1), alpha, beta)


def test_optimum_with_free_capacity():
    """p* is proportional to p_ref^(1 - 1/beta) p_data^(1/beta) where alpha = 1 (DDO, theorem 3.1, on three atoms)."""
    p_data, p_ref, beta = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5]), 0.5
    r = torch.zeros(3, dtype=torch.float64, requires_grad=True)  # unnormalised: the optimum is pointwise
    optimizer = torch.optim.LBFGS([r], lr=1, max_iter=200, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        real = -torch.nn.functional.logsigmoid(beta * r)
        fake = -torch.nn.functional.logsigmoid(-beta * r)
        loss = (p_data.double() * real).sum() + (p_ref.double() * fake).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert_close(r.detach(), ((p_data / p_ref).log() / beta).double(), atol=1e-5, rtol=1e-5)
    # The same optimum through ddo_loss: rows repeated in proportion to their probabilities.
    rows_real = r.detach().repeat_interleave((p_data * 10).round().long())
    rows_fake = r.detach().repeat_interleave((p_ref * 10).round().long())
    shifted = [ddo_loss(rows_real + d, rows_fake + d, 1.0, beta).loss.item() for d in (-0.1, 0.0, 0.1)]
    assert shifted[1] < min(shifted[0], shifted[2])

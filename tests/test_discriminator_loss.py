"""Binary cross-entropy worked out by hand, and calibration of sets whose calibration is known."""

import math

import pytest
import torch
from torch.testing import assert_close

from ddo_cli.objectives.discriminator import discriminator_loss, reliability


def logit(d):
    d = torch.as_tensor(d, dtype=torch.float64)
    return d.log() - (-d).log1p()


def test_logits_of_zero_cost_log_two():
    loss = discriminator_loss(torch.zeros(3), torch.zeros(5)).loss
    assert_close(loss, torch.tensor(math.log(2)))


def test_values_worked_out_by_hand():
    real, fake = torch.tensor([math.log(3), 0.0]), torch.tensor([-math.log(4), math.log(1.5)])
    # d of real: 3/4, 1/2. d of fake: 1/5, 3/5, so 1 - d: 4/5, 2/5.
    expected = -(math.log(3 / 4 * 1 / 2) / 2 + math.log(4 / 5 * 2 / 5) / 2) / 2
    found = discriminator_loss(real, fake)
    assert_close(found.loss.item(), expected, rtol=1e-6, atol=0)
    assert_close(found.logit_real.item(), math.log(3) / 2, rtol=1e-6, atol=0)
    assert_close(found.logit_fake.item(), math.log(1.5 / 4) / 2, rtol=1e-6, atol=0)


def test_weights_multiply_rows():
    real, fake = torch.tensor([math.log(3), 5.0]), torch.tensor([-math.log(4), -math.log(4)])
    found = discriminator_loss(real, fake, torch.tensor([2.0, 0.0]), torch.tensor([0.5, 1.5]))
    assert_close(found.loss.item(), -(math.log(3 / 4) + math.log(4 / 5)) / 2, rtol=1e-6, atol=0)


def test_real_and_fake_count_alike_whatever_their_numbers():
    one = discriminator_loss(torch.tensor([2.0]), torch.tensor([1.0])).loss
    assert_close(discriminator_loss(torch.full((7,), 2.0), torch.tensor([1.0])).loss, one)


def test_descent_raises_real_logits_and_lowers_fake_ones():
    real, fake = torch.zeros(2, requires_grad=True), torch.zeros(4, requires_grad=True)
    discriminator_loss(real, fake).loss.backward()
    assert_close(real.grad, torch.full((2,), -0.5 / 2 / 2))  # -(1 - d) / B, halved
    assert_close(fake.grad, torch.full((4,), 0.5 / 4 / 2))  # d / B, halved


def test_the_best_constant_logit_is_the_log_odds_of_the_weights():
    # With p_real = 3 p_generated at a point, the optimum is log 3: both rows there, weighted as the densities.
    value = torch.tensor([math.log(3)], requires_grad=True)
    discriminator_loss(value, value, torch.tensor([3.0]), torch.tensor([1.0])).loss.backward()
    assert_close(value.grad, torch.zeros(1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [100.0, 1e4])
def test_saturated_logits_keep_their_gradient(size):
    # sigmoid then log would give -inf and a zero or NaN gradient here.
    real, fake = torch.tensor([-size], requires_grad=True), torch.tensor([size], requires_grad=True)
    loss = discriminator_loss(real, fake).loss
    loss.backward()
    assert_close(loss.item(), size)
    assert_close((real.grad.item(), fake.grad.item()), (-0.5, 0.5))


def test_half_precision_logits_are_summed_in_float32():
    # float16 ends at 65504; a mean of these, or their softplus, must not overflow on the way.
    logits = torch.full((4,), 6e4, dtype=torch.float16)
    found = discriminator_loss(-logits, logits)
    assert found.loss.dtype == torch.float32
    assert_close(found.loss.item(), float(logits[0]))


def test_accuracy_counts_signs_and_ties_one_half():
    found = discriminator_loss(torch.tensor([2.0, 0.1, -1.0, 0.0]), torch.tensor([-3.0, 0.0]))
    assert_close(found.accuracy_real.item(), 2.5 / 4)
    assert_close(found.accuracy_fake.item(), 1.5 / 2)


def test_only_the_loss_carries_a_graph():
    found = discriminator_loss(torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True))
    assert [value.requires_grad for value in found] == [True, False, False, False, False]


def test_a_calibrated_discriminator_has_no_calibration_error():
    centres = torch.arange(10, dtype=torch.float64) / 10 + 0.05
    num_real = torch.arange(1, 20, 2)  # of 20 rows in each bin: exactly the share d
    found = reliability(
        logit(centres).repeat_interleave(num_real), logit(centres).repeat_interleave(20 - num_real), bins=10
    )
    assert_close(found.predicted, centres)
    assert_close(found.observed, centres)
    assert found.num.tolist() == [20] * 10
    assert found.error == pytest.approx(0, abs=1e-12)


def test_an_overconfident_discriminator_is_off_by_the_known_amount():
    # d says 95 % (60 rows) or 5 % (40 rows); the truth is 70 % and 30 %.
    real = logit(torch.tensor([0.95] * 42 + [0.05] * 12))
    fake = logit(torch.tensor([0.95] * 18 + [0.05] * 28))
    found = reliability(real, fake, bins=10)
    assert_close(found.predicted[[0, 9]], torch.tensor([0.05, 0.95], dtype=torch.float64), rtol=0, atol=1e-6)
    assert_close(found.observed[[0, 9]], torch.tensor([0.3, 0.7], dtype=torch.float64))
    assert found.error == pytest.approx(0.25, abs=1e-6)


def test_the_calibration_error_weighs_bins_by_their_rows():
    # 30 rows that say 0.55 and are all real, 10 rows that say 0.25 and are all generated.
    found = reliability(logit([0.55] * 30), logit([0.25] * 10), bins=10)
    assert found.error == pytest.approx((30 * 0.45 + 10 * 0.25) / 40, abs=1e-12)


def test_empty_bins_are_nan_and_do_not_count():
    found = reliability(torch.tensor([8.0]), torch.tensor([-8.0]), bins=4)
    assert found.num.tolist() == [1, 0, 0, 1]
    assert found.predicted.isnan().tolist() == found.observed.isnan().tolist() == [False, True, True, False]
    assert found.error == pytest.approx(1 / (1 + math.exp(8)), abs=1e-12)


def test_certain_logits_fall_into_the_outer_bins():
    found = reliability(torch.tensor([1e3]), torch.tensor([-1e3]), bins=3)  # d is 1 and 0 exactly
    assert found.num.tolist() == [1, 0, 1]
    assert found.error == 0

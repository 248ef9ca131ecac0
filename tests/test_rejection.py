"""DiffRS: normals whose ratio is known, a plain rewrite for one image, bounds, independence of the batch, files."""

import json
import math

import pytest
import torch
from conftest import CPU, make_checkpoint, make_discriminator, torchrun
from torch.testing import assert_close

from ddo_cli.diffusion import vp_sde
from ddo_cli.diffusion.mixture import GaussianMixture
from ddo_cli.diffusion.rejection import Cost, Limits, Rejection
from ddo_cli.diffusion.samplers import heun
from ddo_cli.diffusion.trace import Trace
from ddo_cli.engines.sampling import diffrs, guide_sample, sample
from ddo_cli.engines.sampling.guides import Others
from ddo_cli.errors import UsageError
from ddo_cli.generation import generate
from ddo_cli.likelihood import NO_LABEL
from ddo_cli.models import registry
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng

DATA = GaussianMixture(torch.tensor([[0.3, -0.2]]), torch.tensor([0.3]))
MODEL = GaussianMixture(torch.zeros(1, 2), torch.tensor([0.5]))
SPEC = SamplingRecipe(sampler="heun", steps=8, sigma_max=20.0, batch=256)
PLAIN_NFE = 15


def optimal(x_vp, t, label):
    """log p_data - log p_model of the noised normals."""
    sigma = vp_sde.sigma_of(t)
    x = x_vp.double() / vp_sde.scale_of(sigma)[:, None]
    return DATA.log_prob(x, sigma) - MODEL.log_prob(x, sigma)


def base():
    model = registry.build(registry.config_of("mixture", (2,), 0, {"components": 1}, {}))
    model.net.load_state_dict({"means": MODEL.means, "covs": MODEL.covs, "weights": MODEL.weights})
    return model


def limits(potential=optimal, percentile=0.9, time_min=0.0, time_max=1.0):
    pilot = Rejection(potential, None, time_min, time_max, 10_000)
    next(generate(base().guided_by([pilot]), range(5000, 5256), SPEC, batch=256))
    return Limits.of(pilot.log_ratio, percentile)


def drawn(potential=optimal, seeds=range(256), max_nfe=500, spec=SPEC, time_min=0.0, time_max=1.0, found=None):
    found = limits(potential, time_min=time_min, time_max=time_max) if found is None else found
    guide = Rejection(potential, found, time_min, time_max, max_nfe)
    batches = list(generate(base().guided_by([guide]), seeds, spec, batch=spec.batch))
    return torch.cat([b.items for b in batches]).double(), Cost(*torch.cat([b.cost for b in batches]).T)


def kl_from_data(x):
    """KL(data || normal with the mean and covariance of x)."""
    precision, shift = torch.linalg.inv(torch.cov(x.T)), x.mean(0) - DATA.means[0]
    moved = torch.trace(precision @ DATA.covs[0]) + shift @ precision @ shift - 2
    return float(moved - torch.logdet(precision @ DATA.covs[0])) / 2


def test_an_optimal_discriminator_brings_samples_close_to_the_data():
    plain = next(generate(base(), range(256), SPEC, batch=256)).items.double()
    found, cost = drawn()
    assert kl_from_data(plain) > 0.5
    assert kl_from_data(found) < 0.1
    assert cost.nfe.float().mean() < 2 * PLAIN_NFE
    assert cost.rejections.sum() > 256


def test_a_blind_discriminator_rejects_nothing():
    plain = next(generate(base(), range(8), SPEC, batch=8)).items
    found, cost = drawn(lambda x_vp, t, label: 0 * x_vp.flatten(1).sum(1), seeds=range(8))
    assert_close(found, plain.double(), rtol=0, atol=0)
    assert cost.nfe.tolist() == [PLAIN_NFE] * 8
    assert not cost.rejections.any()


@pytest.mark.parametrize(("time_min", "time_max"), [(0.0, 1.0), (0.02, 0.3)])
def test_a_plain_rewrite_for_one_image_agrees(time_min, time_max):
    """Level by level, with every decision spelt out; the batch draws all images at once."""
    given = limits(time_min=time_min, time_max=time_max)
    items, cost = drawn(seeds=range(20), time_min=time_min, time_max=time_max, found=given)
    sigmas = base().sigmas(SPEC)
    times = vp_sde.time_of(sigmas).tolist()
    levels = [k for k, t in enumerate(times) if time_min <= t <= time_max]
    denoise = base().steered(torch.tensor([NO_LABEL]), SPEC, Trace())

    def ratio(x, k):
        return float(optimal((vp_sde.scale_of(sigmas[k]) * x).float(), vp_sde.time_of(sigmas[k]).view(1), None))

    for seed in range(20):
        rng = RowRng([seed])
        x, k, before, tests, nfe = rng.randn((2,)).double() * sigmas[0], 0, None, 0, 0
        by_step = False
        while k < len(sigmas) - 1 or by_step:
            rejected = False
            if k in levels and (by_step or k == 0 or before is None):
                found, tests = ratio(x, k), tests + 1
                is_first = k == levels[0] or not by_step
                limit = float(given.marginal[k]) if is_first else float(given.step[k]) + before
                rejected = found < limit + float(rng.rand(dtype=torch.float64).log())
                before = found
            if rejected:
                eps = rng.randn((2,), dtype=torch.float64)
                if k == levels[0]:
                    x, k = eps * sigmas[0], 0
                else:
                    x, k = x + (sigmas[k - 1] ** 2 - sigmas[k] ** 2).sqrt() * eps, k - 1
                by_step, before = False, None
                continue
            if k == len(sigmas) - 1:
                break
            x = heun(denoise, x, sigmas[k : k + 2])
            nfe, k, by_step = nfe + (2 if k < len(sigmas) - 2 else 1), k + 1, True
        assert_close(items[seed], x[0].float().double(), rtol=1e-4, atol=1e-5)  # the network sees float32
        assert (int(cost.nfe[seed]), int(cost.disc_nfe[seed])) == (nfe, tests)


def test_images_depend_on_their_seeds_only():
    found = limits()
    items, cost = drawn(seeds=range(40), found=found)
    some, cost_of_some = drawn(seeds=range(11, 29), spec=SPEC.merged(batch=7), found=found)
    assert_close(some, items[11:29], rtol=1e-4, atol=1e-5)
    assert cost_of_some.nfe.tolist() == cost.nfe[11:29].tolist()


def test_the_number_of_evaluations_is_bounded():
    """A discriminator that finds every state worse than the one before, so that every step is rejected."""
    zero = torch.zeros(9, dtype=torch.float64)
    for max_nfe in (PLAIN_NFE, 40):
        _, cost = drawn(lambda x_vp, t, label: 1e4 * t, seeds=range(4), max_nfe=max_nfe, found=Limits(zero, zero))
        assert cost.at_bound.tolist() == [1] * 4
        assert max(cost.nfe.max(), cost.disc_nfe.max()) <= max_nfe
    assert cost.rejections.min() > 5


def test_limits_are_percentiles_of_levels_and_of_steps():
    log_ratio = torch.tensor([[torch.nan, 1.0, 5.0], [torch.nan, 3.0, 4.0], [torch.nan, -9.0, -9.5]]).double()
    found = Limits.of(log_ratio, 0.5)
    assert math.isnan(found.marginal[0])
    assert found.marginal[1:].tolist() == [1.0, 4.0]
    assert found.step[2] == 1.0
    assert Limits.of(log_ratio, 0.0).marginal[1:].tolist() == [0.0, 0.0]  # a ratio's bound is at least 1


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"sampler": "dpm-v3"}, {}, "which sampler dpm-v3 cannot do; use heun or euler"),
        ({"sampler": "ddpm"}, {}, "which sampler ddpm cannot do"),
        ({"discretization": "ve"}, {}, "DiffRS needs a plain sampler"),
        ({"rng": "cuda"}, {}, "sampling.rng = cuda"),
        ({}, {"max_nfe": 14}, "a bound of 14 evaluations is below the 15"),
        ({}, {"time_min": 0.999}, "none of the sampler's noise levels"),
    ],
)
def test_what_cannot_go_back_is_refused(settings, change, message):
    guide = Rejection(optimal, None, **{"time_min": 0.0, "time_max": 1.0, "max_nfe": 99, **change})
    with pytest.raises(UsageError, match=message):
        base().guided_by([guide]).check_sampling(SPEC.merged(**settings))


def test_with_churn_and_euler():
    for settings in ({"s_churn": 4.0}, {"sampler": "euler"}):
        items, cost = drawn(spec=SPEC.merged(**settings))
        assert kl_from_data(items) < 0.3
        assert cost.rejections.sum() > 0


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("ckpt") / "m.safetensors")


@pytest.fixture(scope="module")
def disc(ckpt, tmp_path_factory):
    return make_discriminator(tmp_path_factory.mktemp("disc") / "d.safetensors", ckpt, scale=0.3)


@pytest.fixture(autouse=True)
def _short_pilot(monkeypatch):
    monkeypatch.setattr(diffrs, "PILOT_SEEDS", range(900, 908))


def test_a_set_records_what_each_image_has_cost(ckpt, disc, tmp_path, monkeypatch):
    def run(form, **more):
        return guide_sample.run(
            disc, None, range(6), tmp_path / form, form=form, rejection=diffrs.Options(), device=CPU, **more
        )

    plan = run("png", dry_run=True)
    assert not (tmp_path / "png").exists()
    assert plan["guidance"]["diffrs"]["max_nfe"] == 15  # three times 5
    for form in ("png", "npz"):
        found = run(form)
        manifest = json.loads((tmp_path / form / "manifest.json").read_text())
        assert set(manifest["cost"]) == set(Cost._fields)
        assert len(manifest["cost"]["nfe"]) == 6
        assert found["nfe"] == pytest.approx(sum(manifest["cost"]["nfe"]) / 6, abs=0.01)
        assert found["nfe_max"] == max(manifest["cost"]["nfe"]) <= 15
        assert found["disc_nfe"] > 0
    # What a set was begun with goes on, whatever another machine would estimate.
    (tmp_path / "png" / "000003.png").unlink()
    monkeypatch.setattr(diffrs, "_estimated", None)
    assert run("png")["guidance"] == found["guidance"]
    assert (tmp_path / "png" / "000003.png").is_file()


def test_a_discriminator_without_opinion_draws_the_images_of_plain_sampling(ckpt, tmp_path):
    blind = make_discriminator(tmp_path / "d.safetensors", ckpt, scale=0.0)
    sample.run(ckpt, range(4), tmp_path / "plain", device=CPU)
    guide_sample.run(blind, None, range(4), tmp_path / "diffrs", rejection=diffrs.Options(), device=CPU)
    for image in (tmp_path / "plain").glob("*.png"):
        assert image.read_bytes() == (tmp_path / "diffrs" / image.name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": {"dg_weight": 2.0}}, "--dg-weight is of guidance by the discriminator's gradient"),
        ({"guidance": {"boost": True}}, "--boost is of guidance"),
        ({"others": Others(guide_ckpt="m", guidance=2.0)}, "no other guide may change them"),
    ],
)
def test_rejection_stands_alone(disc, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        guide_sample.run(disc, None, range(2), tmp_path / "set", rejection=diffrs.Options(), device=CPU, **options)


def test_options_without_effect_are_refused(ddo, disc):
    done = ddo("guide-sample", "--disc", disc, "--diffrs-percentile", 0.5, code=2)
    assert "--diffrs-percentile 0.5 has no effect without --diffrs" in done.stderr


@pytest.mark.slow
def test_two_processes_write_the_same_set(ckpt, disc, tmp_path):
    shared = ["--disc", disc, "--diffrs", "--num-images", "20", "--device", "cpu", "--json", "steps=3"]
    sets = []
    for processes in (1, 2):
        place = ["--out", str(tmp_path / str(processes))]
        sets.append(json.loads(torchrun("-m", "ddo_cli", "guide-sample", *shared, *place, processes=processes).stdout))
    assert sets[0]["guidance"] == sets[1]["guidance"]
    assert sets[0]["nfe"] == sets[1]["nfe"]
    for image in (tmp_path / "1").glob("*.png"):
        assert image.read_bytes() == (tmp_path / "2" / image.name).read_bytes()

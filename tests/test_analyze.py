"""`ddo analyze`: the gain against closed forms, trajectories and regenerations of normals, files and mistakes."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, make_checkpoint, make_discriminator, tiny_disc_recipe, torchrun
from PIL import Image
from scipy.integrate import quad
from torch.testing import assert_close

from ddo_cli import checkpoint
from ddo_cli.data.images import open_images
from ddo_cli.data.items import ItemSet, digest
from ddo_cli.data.pairs import split
from ddo_cli.diffusion import probability_flow, vp_sde
from ddo_cli.diffusion.churn import Boost
from ddo_cli.diffusion.guidance import GradientGuide, climb
from ddo_cli.diffusion.mixture import GaussianMixture
from ddo_cli.diffusion.trace import Trace
from ddo_cli.engines import report, scoring
from ddo_cli.engines.analysis import analyses, analyze, regeneration
from ddo_cli.engines.analysis import report as report_page
from ddo_cli.engines.analysis.analyses import Recorder
from ddo_cli.engines.analysis.subject import Settings, Subject
from ddo_cli.errors import CheckpointError, DataError, NumericsError, UsageError
from ddo_cli.likelihood import NO_LABEL
from ddo_cli.metrics import gain as gains
from ddo_cli.models import registry
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.recipe.load import load
from ddo_cli.recipe.schema import MetricRecipe, Recipe, SamplingRecipe
from ddo_cli.report import html
from ddo_cli.rng import RowRng

ROOT = Path(__file__).parent.parent
SHIFT, STD_DATA, STD_MODEL = [0.3, -0.2], 0.3, 0.5
DATA = GaussianMixture(torch.tensor([SHIFT]), torch.tensor([STD_DATA]))
MODEL = GaussianMixture(torch.zeros(1, 2), torch.tensor([STD_MODEL]))
SPEC = SamplingRecipe(sampler="heun", steps=32, sigma_max=20.0, batch=512)


def optimal(x_vp, t, label):
    """log p_data - log p_model of the noised normals: what a perfect discriminator says."""
    sigma = vp_sde.sigma_of(t)
    x = x_vp.double() / vp_sde.scale_of(sigma)[:, None]
    return DATA.log_prob(x, sigma) - MODEL.log_prob(x, sigma)


def blind(x_vp, t, label):
    return 0 * x_vp.flatten(1).sum(1)


def mixture_model(mixture=MODEL):
    config = registry.config_of("mixture", (2,), 0, {"components": len(mixture.means)}, {})
    model = registry.build(config)
    model.net.load_state_dict({"means": mixture.means, "covs": mixture.covs, "weights": mixture.weights})
    return model


def subject(potential=optimal, weight=1.0, num=4000, spec=SPEC, **guide):
    points = DATA.sample(num, torch.Generator().manual_seed(0)).float().numpy()
    real = ItemSet(points, np.full(num, NO_LABEL), "normal", 0)
    guide = GradientGuide(potential, weight, weight, **{"time_min": 0.0, "time_max": 1.0, **guide})
    recipe = Recipe(metric=MetricRecipe(name="js"))
    return Subject(mixture_model(), guide, spec, recipe, real, np.arange(num), CPU)


def score_error(sigma):
    """sigma E_data |score_data - score_model|^2 of the two normals in the plane."""
    data, model = STD_DATA**2 + sigma**2, STD_MODEL**2 + sigma**2
    return sigma * (2 * data * (1 / model - 1 / data) ** 2 + (SHIFT[0] ** 2 + SHIFT[1] ** 2) / model**2)


def measured(s, bounds=(0.01, 20.0), **options):
    x0, label = s.held_out()
    return gains.measure(s.base, s.guide, x0, label, s.spec, bounds, device=CPU, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Gain


def test_the_score_error_of_all_levels_is_the_kl_divergence():
    """Checks the expected values below: KL(N_data || N_model) of normals is a closed form."""
    ratio = STD_DATA / STD_MODEL
    kl = ratio**2 - 1 - 2 * math.log(ratio) + (SHIFT[0] ** 2 + SHIFT[1] ** 2) / (2 * STD_MODEL**2)
    assert_close(quad(score_error, 0, math.inf)[0], kl, rtol=1e-6, atol=0)


def test_the_gain_of_an_optimal_discriminator_is_the_whole_score_error():
    found = measured(subject()).figures(1.0)
    expected = quad(score_error, 0.01, 20.0)[0]
    assert found["error"] < 0.05 * expected  # so that the next line means something
    assert abs(found["gain"] - expected) < 4 * found["error"]  # fails on 1 seed in 16,000
    assert found["gain"] == found["gain_weight_1"]
    assert found["best_weight"] == pytest.approx(1.0, abs=0.05)
    for level in found["levels"]:
        share = quad(score_error, level["sigma_min"], level["sigma_max"])[0]
        assert abs(level["gain"] - share) < 4 * level["error"] + 1e-9, level  # fails on 1 seed in 1000
    assert found["levels"][0]["sigma_min"] == pytest.approx(0.01)
    assert found["levels"][-1]["sigma_max"] == pytest.approx(20.0)
    assert sum(level["gain"] for level in found["levels"]) == pytest.approx(found["gain"])


@pytest.mark.parametrize(("weight", "share"), [(0.5, 0.75), (2.0, 0.0), (3.0, -3.0)])
def test_the_gain_is_a_parabola_of_the_weight(weight, share):
    """2 w - w^2 of the score error: weight 2 overshoots as far as weight 0 falls short."""
    found = measured(subject()).figures(weight)
    assert abs(found["gain"] - share * quad(score_error, 0.01, 20.0)[0]) < 4 * found["error"]


def test_the_gain_does_not_depend_on_the_weight_and_boost_of_the_guide():
    one, other = measured(subject(num=64)), measured(subject(num=64, weight=3.0, boost=Boost()))
    assert_close(one.by_item(2.0), other.by_item(2.0), rtol=0, atol=0)


def test_the_gain_is_what_its_definition_says():
    """A plain rewrite: sigma^-3 (|x0 - D|^2 - |x0 - D'|^2), D' from the guide itself, over ln sigma."""
    s = subject(weight=1.7, num=40)
    found = measured(s, bins=3, seed=5)
    x0 = s.held_out()[0].double()
    for k in range(3):
        rng = RowRng.for_rows("gain", 5, k, rows=range(40))
        low, high = found.edges[k : k + 2].log()
        sigma = torch.exp(low + (high - low) * rng.rand(dtype=torch.float64))
        x = x0 + sigma[:, None] * rng.randn((2,), dtype=torch.float64)
        label = torch.full((40,), NO_LABEL)
        plain, guided = (
            (x0 - model.steered(label, SPEC, Trace())(x, sigma)).square().sum(1)
            for model in (s.base, s.base.guided_by([s.guide]))
        )
        expected = sigma**-3 * (plain - guided) * sigma * (high - low)
        assert_close(found.by_item(1.7)[:, k], expected, rtol=1e-6, atol=1e-9)  # guides see float32


def test_an_untrained_discriminator_gains_exactly_nothing():
    found = measured(subject(blind)).figures(2.0)
    assert (found["gain"], found["error"], found["best_weight"]) == (0.0, 0.0, None)


def test_an_inverted_discriminator_loses():
    found = measured(subject(lambda x, t, label: -optimal(x, t, label))).figures(1.0)
    assert found["gain"] < -4 * found["error"]
    assert found["best_weight"] == pytest.approx(-1.0, abs=0.05)


def test_the_error_shrinks_with_the_items_and_matches_their_scatter():
    means = [measured(subject()._replace(rows=np.arange(i, i + 100))).figures(1.0) for i in range(0, 4000, 100)]
    errors = [found["error"] for found in means]
    # 40 means of 100 items: their scatter is known to 1 / sqrt(80) = 11%; every mean has its own items and noise rows.
    assert np.std([found["gain"] for found in means]) == pytest.approx(np.mean(errors), rel=0.4)
    assert measured(subject()).figures(1.0)["error"] == pytest.approx(np.mean(errors) / math.sqrt(40), rel=0.15)


def test_batches_do_not_change_the_gain():
    one, other = (measured(subject(num=70, spec=SPEC.merged(batch=batch))) for batch in (70, 33))
    assert_close(one.by_item(1.0), other.by_item(1.0), rtol=1e-6, atol=1e-9)


def test_the_window_of_guidance_bounds_the_gain():
    s = subject(time_min=0.01, time_max=0.5)
    assert s.window() == pytest.approx((0.0446877, 3.4129183), rel=1e-6)  # see facts of the VP-SDE
    s = subject(time_min=0.0, time_max=1.0)
    assert s.window() == pytest.approx((0.002, 20.0))  # the sampler's own levels


def test_a_diverging_network_is_named():
    with pytest.raises(NumericsError, match="gain is not finite at sigma"):
        analyses.gain(subject(lambda x, t, label: (x / 0).sum(1), num=20), Settings())


def test_harmful_noise_levels_are_named(capsys):
    analyses.gain(subject(weight=4.0, num=500), Settings())
    assert "leads the score away from held-out data's at sigma" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Trajectories


def test_a_recorder_changes_nothing_and_keeps_every_predictor_s_state():
    s, label = subject(), torch.full((6,), NO_LABEL)
    recorder = Recorder(s.guide.potential)
    guided = s.base.guided_by([s.guide])
    plain = guided.sample(label, RowRng(range(6)), SPEC)
    heard = guided.guided_by([recorder]).sample(label, RowRng(range(6)), SPEC)
    assert torch.equal(plain.x, heard.x)
    assert plain[1:] == heard[1:]
    levels = s.base.sigmas(SPEC)[:-1]
    assert_close(torch.tensor(recorder.sigmas, dtype=torch.float64), levels)
    first = RowRng(range(6)).randn((2,)).double() * levels[0]
    assert_close(recorder.log_ratios[0], climb(optimal, first, levels[0], label)[0])


def test_guidance_brings_the_log_ratio_of_samples_to_that_of_data(monkeypatch):
    """With an optimal discriminator guided samples are data: their mean log-ratio is KL(data || model) by level."""
    monkeypatch.setattr(analyses, "TRAJECTORIES", 2000)
    s = subject(spec=SPEC.merged(batch=2000))
    found = analyses.trajectory(s, Settings()).content
    for step, sigma in enumerate(found["data"]["sigma"]):
        kl = quad(score_error, sigma, math.inf)[0]
        # The log-ratio's deviation is below 1, so 4 standard errors of 2000 are below 0.09; solver errors are smaller.
        assert found["data"]["mean"][step] == pytest.approx(kl, abs=0.09)
        assert found["guided"]["mean"][step] == pytest.approx(kl, abs=0.09)
        assert found["model"]["mean"][step] < 0.05  # -KL(model || data)
    assert found["model"]["mean"][-1] < -0.5
    assert found["data"]["quartile_1"][-1] < found["data"]["median"][-1] < found["data"]["quartile_3"][-1]
    assert found["mean_log_ratio_guided"] == pytest.approx(found["mean_log_ratio_data"], abs=0.05)


def test_rows_that_fill_a_batch_up_do_not_count(monkeypatch):
    monkeypatch.setattr(analyses, "TRAJECTORIES", 12)
    one, other = (
        analyses.trajectory(subject(spec=SPEC.merged(batch=batch)), Settings()).content["guided"] for batch in (12, 10)
    )
    assert dict(flat(one)) == pytest.approx(dict(flat(other)))


# ---------------------------------------------------------------------------------------------------------------------
# The probability-flow ODE


@pytest.mark.parametrize("guided", [False, True])
def test_encoding_and_decoding_returns_the_point(guided):
    s, errors = subject(num=20), []
    x0, label = s.held_out()
    for steps in (32, 64, 128):
        s = s._replace(spec=SPEC.merged(steps=steps))
        found = regeneration.round_trip(s, s.ode_sides()["guided" if guided else "model"], x0, label)
        errors.append(float((found - x0).abs().max()))
    assert errors[0] / errors[1] > 3  # second order or better
    assert errors[1] / errors[2] > 3
    assert errors[2] < 2e-3


def test_the_round_trip_goes_all_the_way_up():
    s, seen = subject(num=2), []

    def keep(x, t, label):
        seen.append(float(vp_sde.sigma_of(t)[0]))
        return optimal(x, t, label)

    s = s._replace(guide=s.guide._replace(potential=keep), spec=SPEC.merged(steps=4))
    regeneration.round_trip(s, s.sides()["guided"], *s.held_out())
    assert len(seen) == 4 * (regeneration.ROUND_TRIP_STEPS - 1)  # two evaluations a step, up and down
    assert min(seen) == pytest.approx(0.002)
    assert max(seen) == pytest.approx(20.0)


@pytest.mark.parametrize(("side", "mean", "std"), [("model", [0.0, 0.0], STD_MODEL), ("guided", SHIFT, STD_DATA)])
@pytest.mark.parametrize(
    "sampler", ["euler", "dpmpp-2m", *(pytest.param(name, marks=pytest.mark.slow) for name in ("heun", "ddim"))]
)
def test_the_mean_regeneration_of_a_normal_is_known(side, mean, std, sampler):
    """The flow of N(m, s^2) from sigma to 0 is x -> m + (x - m) s / sqrt(s^2 + sigma^2)."""
    s = subject(spec=SPEC.merged(steps=400, sampler=sampler, batch=2), num=4)
    x0, label = s.held_out()
    settings = Settings(noise_level=1.5, regenerations=3)  # in two batches
    found = regeneration.mean_regeneration(s, s.ode_sides()[side], x0[1], label[1], 1, settings)
    eps = RowRng.for_rows("regeneration", 0, 1, rows=range(3)).randn((2,), dtype=torch.float64)
    mean, shrink = torch.tensor(mean, dtype=torch.float64), std / math.hypot(std, 1.5)
    expected = mean + (x0[1].double() + 1.5 * eps.mean(0) - mean) * shrink
    # Euler's error at 400 steps; a wrong number of regenerations or noise level misses by 0.05 and more.
    assert_close(found, expected, rtol=0, atol=5e-3)


def test_ode_solvers_weigh_the_corrector_like_the_predictor_where_the_sampler_has_none():
    s = subject()._replace(guide=GradientGuide(optimal, 2.0, 0.0))
    assert s.ode_sides()["guided"].guides[0].weight_2nd == 0.0  # heun: as chosen
    s = s._replace(spec=SPEC.merged(sampler="euler"))
    assert s.ode_sides()["guided"].guides[0].weight_2nd == 2.0


def test_rmse_and_psnr_of_known_images():
    originals = torch.full((2, 1, 4, 4), 100.0)
    found = regeneration._distance(originals + torch.tensor([3.0, 4.0]).view(2, 1, 1, 1), originals)
    assert found["rmse"] == pytest.approx(math.sqrt(12.5))
    assert found["psnr"] == pytest.approx(20 * math.log10(255 / math.sqrt(12.5)))
    assert found["rmse_by_image"] == [3.0, 4.0]
    assert regeneration._distance(originals, originals)["psnr"] is None  # JSON knows no infinity


# ---------------------------------------------------------------------------------------------------------------------
# From files to files


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("ckpt") / "m.safetensors")


@pytest.fixture(scope="module")
def disc(ckpt, tmp_path_factory):
    return make_discriminator(tmp_path_factory.mktemp("disc") / "d.safetensors", ckpt)


@pytest.fixture(scope="module")
def toy_disc(tmp_path_factory):
    """A random discriminator of the plane, with the recipe it would come from."""
    path = tmp_path_factory.mktemp("toy") / "d.safetensors"
    make_discriminator(path, "embedded:toy2d", scale=0.3)
    file = checkpoint.load(path)
    recipe = load("toy2d", ["data.num=200", "discriminator={held_out: 32}"])
    link = {"command": "train-disc", "recipe": recipe.model_dump(mode="json")}
    toy = digest(open_images("embedded:toy2d", 200))
    trained_on = {**file.header["trained_on"], "data_sha256": toy}
    checkpoint.save(path, file.tensors, {**file.header, "trained_on": trained_on, "provenance": [link]})
    return str(path)


def altered(disc, path, **changes):
    file = checkpoint.load(disc)
    checkpoint.save(path, file.tensors, {**file.header, **changes})
    return str(path)


FEW = Settings(steps_list=(2, 3), num=16, regenerations=3)
KEYS = {"analysis", "out", "discriminator", "discriminator_sha256", "model", "model_sha256", "dg_weight", "data",
        "held_out", "guidance", "sampling"}  # fmt: skip


def content(out, name):
    return json.loads((out / f"{name}.json").read_text())


def test_all_analyses_of_images(disc, ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(analyses, "TRAJECTORIES", 12)
    out = tmp_path / "a"
    found = analyze.run(disc, None, out, what="all", settings=FEW, device=CPU)
    names = ["gain", "trajectory", "nfe", "regeneration"]
    assert [key for key in found if key in analyze.ANALYSES] == names
    assert (found["discriminator"], found["model"], found["dg_weight"], found["held_out"]) == (disc, ckpt, 2.0, 16)
    pairs = [f"{name}.{end}" for name in names for end in ("json", "png")]
    assert sorted(p.name for p in out.iterdir() if not p.name.startswith(".")) == sorted([*pairs, "report.html"])
    page = (out / "report.html").read_text()
    assert [page.count(f'<section id="{name}">') for name in names] == [1, 1, 1, 1]
    assert (page.count("<svg "), page.count("<img ")) == (4, 1)  # curves are the page's own; images are images
    for cell in ("total", "data", "guided", "fd_embedded, guided", "mean regeneration, RMSE"):
        assert f">{cell}</t" in page
    assert html.text(report.run(out)["headline"]) in page
    for name in names:
        assert content(out, name).keys() >= KEYS
        with Image.open(out / f"{name}.png") as picture:
            picture.verify()
    json.dumps(found, allow_nan=False)
    gain = content(out, "gain")
    assert len(gain["levels"]) == gains.BINS
    assert gain["gain"] == found["gain"]["gain"]
    trajectory = content(out, "trajectory")
    assert {len(trajectory[name]["mean"]) for name in ("model", "guided", "data")} == {3}
    assert trajectory["model"]["mean"][0] == trajectory["guided"]["mean"][0]  # before the first step
    assert trajectory["model"]["mean"][1] != trajectory["guided"]["mean"][1]
    points = content(out, "nfe")["points"]
    assert [(point["steps"], point["nfe"], point["disc_nfe"]) for point in points] == [(2, 3, 1), (3, 5, 2)]
    assert content(out, "nfe")["metric"] == "fd_embedded"
    assert "scores of 16 images where the recipe's are of 32" in capsys.readouterr().err
    back = content(out, "regeneration")
    assert len(back["rows"]) == 8
    assert {"rmse", "psnr", "rmse_by_image"} <= back["round_trip"]["guided"].keys()
    assert back["mean_image"]["model"]["rmse"] != back["mean_image"]["guided"]["rmse"]
    columns, rows = analyze.table_of(out)
    assert len(columns) == len(rows[0])
    assert rows[-1][0] == "total"


def test_a_gain_within_its_error_is_none():
    gain = {"gain": 0.5, "error": 0.1, "gain_weight_1": 0.25, "error_weight_1": 0.05}
    first = {"guidance": {"dg_weight": 2.0}, "model": "m"}
    assert report_page.headline(first, None) == "What guidance of weight 2 does to m."
    told = "What guidance of weight 2 does to m: it brings its score closer to held-out data's, by 0.5 ± 0.1 nats; "
    assert report_page.headline(first, gain) == told + "at weight 1 by 0.25 ± 0.05."
    assert "further from held-out data's, by -0.5" in report_page.headline(first, {**gain, "gain": -0.5})
    told = "nothing beyond the error, a gain of 0.15 ± 0.1 nats on held-out data; at weight 1"
    assert told in report_page.headline(first, {**gain, "gain": 0.15})


def test_nfe_scores_are_those_of_the_recipe_s_metric(disc, ckpt, tmp_path):
    recipe = tiny_disc_recipe(ckpt, "metric.num_images=16")
    model, file = registry.load_model(ckpt, CPU)
    spec = SamplingRecipe(**file.header["sampling"])
    scorer = scoring.Scoring(recipe, analyze.open_images("embedded:digits32", 96), spec.merged(steps=2), CPU)
    expected = scorer.run(model, 0)["fd_embedded"]
    found = analyze.run(disc, None, tmp_path, what="nfe", settings=FEW, device=CPU)
    assert found["nfe"]["points"][0]["model"] == pytest.approx(expected, rel=1e-6)


def test_without_weight_guided_is_the_model(disc, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(analyses, "TRAJECTORIES", 8)
    off = {"dg_weight": 0.0, "dg_weight_2nd": 0.0}
    found = analyze.run(disc, None, tmp_path, settings=FEW, guidance=off, device=CPU)
    assert found["gain"]["gain"] == 0
    assert found["gain"]["gain_weight_1"] != 0
    assert found["trajectory"]["mean_log_ratio_model"] == found["trajectory"]["mean_log_ratio_guided"]
    assert found["regeneration"]["mean_image_rmse_model"] == found["regeneration"]["mean_image_rmse_guided"]
    assert "dg_weight is 0" in capsys.readouterr().err


def test_densities_of_points(toy_disc, tmp_path, monkeypatch):
    monkeypatch.setattr(probability_flow, "STEPS", 2)
    monkeypatch.setattr(scoring, "DensityScorer", partial(scoring.DensityScorer, size=62, margin=3.0))
    monkeypatch.setattr(analyses, "TRAJECTORIES", 8)
    monkeypatch.setattr(analyses, "POINTS", 50)
    found = analyze.run(toy_disc, None, tmp_path, device=CPU)
    assert [key for key in found if key in analyze.ANALYSES] == ["gain", "trajectory", "density"]
    held = content(tmp_path, "density")
    assert (tmp_path / "density.png").is_file()
    model, file = registry.load_model("embedded:toy2d", CPU)
    network = discriminators.load("discriminator", toy_disc, CPU).network
    spec = SamplingRecipe(**file.header["sampling"])
    scorer = scoring.DensityScorer(scoring.toy2d())
    for name, guides in (("model", []), ("guided", [GradientGuide(network, 2.0)])):
        expected = scorer.score(model.guided_by(guides), spec)
        assert {key: held[name][key] for key in expected} == pytest.approx(expected)
        assert found["density"][f"forward_kl_{name}"] == held[name]["forward_kl"]
    assert held["model"]["js"] != held["guided"]["js"]


@pytest.mark.slow
def test_two_processes_write_what_one_does(disc, tmp_path):
    options = [
        "--disc",
        disc,
        "--num-images",
        "16",
        "--regenerations",
        "3",
        "--steps-list",
        "2",
        "--what",
        "all",
        "--json",
    ]
    settings = Settings(steps_list=(2,), num=16, regenerations=3)
    analyze.run(disc, None, tmp_path / "one", what="all", settings=settings, device=CPU)
    done = torchrun("-m", "ddo_cli", "analyze", *options, "--out", str(tmp_path / "two"))
    assert len(done.stdout.splitlines()) == 1
    json.loads(done.stdout)
    for name in ("gain", "trajectory", "nfe", "regeneration"):
        one, two = content(tmp_path / "one", name), content(tmp_path / "two", name)
        assert two.pop("out") != one.pop("out")
        assert dict(flat(two)) == pytest.approx(dict(flat(one)), rel=1e-4, abs=1e-6), name


def flat(value, key=""):
    """(dotted key, number) of nested dicts and lists."""
    if isinstance(value, (dict, list)):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(inner, f"{key}.{name}")
    elif isinstance(value, (int, float)):
        yield key, value


# ---------------------------------------------------------------------------------------------------------------------
# Held-out data


def test_held_out_rows_are_those_that_training_left_out(disc, ckpt):
    recipe, base = tiny_disc_recipe(ckpt), registry.load_model(ckpt, CPU)
    known = checkpoint.read_header(disc)["trained_on"]["data_sha256"]
    real, rows = analyze._held_out(recipe, None, known, base, disc)
    assert len(real.items) == 96
    assert rows.tolist() == split(96, 16, "real", recipe.seed).held_out.tolist()
    with pytest.raises(DataError, match=r"has changed since .* was trained on it"):
        analyze._held_out(recipe, None, "another", base, disc)


def test_another_set_is_held_out_as_a_whole(disc, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "other.npz", arr_0=images, label=np.arange(5))
    found = analyze.run(disc, None, tmp_path / "a", data=str(tmp_path / "other.npz"), dry_run=True, device=CPU)
    assert found["held_out"] == 5
    assert not (tmp_path / "a").exists()


def test_missing_training_data_are_named_with_a_remedy(disc, tmp_path):
    link = checkpoint.read_header(disc)["provenance"][-1]
    link["recipe"]["data"]["source"] = "gone"
    moved = altered(disc, tmp_path / "d.safetensors", provenance=[link])
    with pytest.raises(DataError, match=r"gone does not exist.*--data"):
        analyze.run(moved, None, tmp_path / "a", device=CPU)


def test_a_discriminator_from_elsewhere_needs_data(disc, tmp_path):
    foreign = altered(disc, tmp_path / "d.safetensors", provenance=[])
    with pytest.raises(UsageError, match=r"does not name the data.*--data"):
        analyze.run(foreign, None, tmp_path / "a", device=CPU)
    found = analyze.run(foreign, None, tmp_path / "a", data="embedded:digits32-b", dry_run=True, device=CPU)
    assert found["analyses"] == ["gain", "trajectory", "regeneration"]


def test_a_recipe_of_another_version_is_refused(disc, tmp_path):
    link = {"command": "train-disc", "recipe": {"name": "old", "colour": "red"}}
    old = altered(disc, tmp_path / "d.safetensors", provenance=[link])
    with pytest.raises(CheckpointError, match="cannot read"):
        analyze.run(old, None, tmp_path / "a", device=CPU)


def test_one_item_has_no_standard_error(disc, tmp_path):
    np.savez(tmp_path / "one.npz", arr_0=np.zeros((1, 32, 32, 3), np.uint8), label=np.zeros(1, np.int64))
    with pytest.raises(DataError, match="a standard error needs two"):
        analyze.run(disc, None, tmp_path / "a", data=str(tmp_path / "one.npz"), device=CPU)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


MISTAKES = {
    "unknown": ({"what": "gain,trajectry"}, r"--what trajectry is not known \(did you mean 'trajectory'\?\)"),
    "not here": ({"what": "density"}, "--what density does not apply here: it needs points"),
    "window": ({"guidance": {"time_min": 0.99}}, "never acts on this sampler's noise levels"),
    "noise": ({"settings": Settings(noise_level=100.0)}, r"--noise-level 100.0 must lie above .* 0.002"),
    "no noise": ({"settings": Settings(noise_level=0.001)}, "--noise-level 0.001"),
    "data": ({"data": "embedded:toy2d"}, "holds points of 2 numbers"),
    "churn": ({"sampling": {"sampler": "ddim", "s_churn": 3.0}}, "has no churn"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named_before_anything_is_written(disc, tmp_path, case):
    options, message = MISTAKES[case]
    with pytest.raises((UsageError, DataError), match=message):
        analyze.run(disc, None, tmp_path / "a", device=CPU, **options)
    assert not (tmp_path / "a").exists()


def test_points_have_no_images_to_regenerate(toy_disc, tmp_path):
    with pytest.raises(UsageError, match=r"--what nfe does not apply here.*use some of gain, trajectory, density"):
        analyze.run(toy_disc, None, tmp_path, what="nfe", device=CPU)


def test_churn_has_no_density(toy_disc, tmp_path):
    with pytest.raises(UsageError, match="s_churn = 2, and the density exists for the ODE only"):
        analyze.run(toy_disc, None, tmp_path, what="density", sampling={"s_churn": 2.0}, device=CPU)


def test_one_step_is_a_sampler_too(disc, tmp_path):
    found = analyze.run(disc, None, tmp_path, what="gain", sampling={"steps": 1}, device=CPU)
    assert found["gain"]["error"] > 0


def test_the_command_prints_one_object(ddo, disc):
    found = json.loads(ddo("analyze", "--disc", disc, "--what", "gain", "--dg-weight", "1", "--json").stdout)
    assert {"out", "discriminator", "model", "dg_weight", "gain"} <= found.keys()
    assert (found["out"], found["dg_weight"]) == ("analysis", 1.0)
    assert {"gain", "error", "gain_weight_1", "best_weight", "weight"} <= found["gain"].keys()


@pytest.mark.parametrize("steps", ["4,x", "0", ""])
def test_bad_steps_exit_with_2(ddo, disc, tmp_path, steps):
    done = ddo("analyze", "--disc", disc, "--steps-list", steps, "--json", code=2)
    assert "error" in json.loads(done.stdout)
    assert "steps" in done.stderr
    assert not list(tmp_path.iterdir())

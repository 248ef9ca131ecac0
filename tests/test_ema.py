"""Power-function averages and their reconstruction: published exponents, closed forms, runs that are cut short."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, fit_events, make_checkpoint, tiny_recipe
from torch.testing import assert_close

from ddo_cli import checkpoint
from ddo_cli.cli import app
from ddo_cli.engines.ddo import finetune
from ddo_cli.engines.pretrain import model as pretrain
from ddo_cli.engines.weights import ema
from ddo_cli.errors import CheckpointError, RecipeError, UsageError
from ddo_cli.models import registry
from ddo_cli.recipe.load import load
from ddo_cli.recipe.schema import TrainRecipe
from ddo_cli.trainable import Loss, Trainable
from ddo_cli.training import profiles
from ddo_cli.training.ema import Averages, snapshot_name
from ddo_cli.training.profiles import Profile

# Exponents by width, computed once from eq. 123 by bisection.
GAMMAS = {
    0.010: 96.994898, 0.015: 63.658934, 0.025: 36.986840, 0.045: 19.197480, 0.050: 16.972199, 0.070: 11.244939,
    0.085: 8.7133429, 0.100: 6.9372039, 0.130: 4.6035968, 0.150: 3.5578687, 0.200: 1.8262138, 0.250: 0.71982396,
}  # fmt: skip


@pytest.mark.parametrize(("std", "gamma"), GAMMAS.items())
def test_exponents(std, gamma):
    assert profiles.gamma_of(std) == pytest.approx(gamma, rel=1e-7)
    assert np.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(std, rel=1e-7)  # eq. 123


def test_widths_beyond_the_plain_mean_are_refused():
    assert profiles.gamma_of(np.sqrt(1 / 12)) == pytest.approx(0, abs=1e-9)  # the plain mean
    for std in (0.0, -0.1, 0.289, 0.5):
        with pytest.raises(ValueError, match="between 0 and"):
            profiles.gamma_of(std)
    with pytest.raises(RecipeError, match=r"pretrain\.ema_widths\.1 = 0\.3: input should be less than"):
        load("quickstart", ["pretrain.ema_widths=[0.1, 0.3]"])
    with pytest.raises(RecipeError, match="must differ in their first three digits"):
        load("quickstart", ["pretrain.ema_widths=[0.1, 0.1001]"])


def test_decays():
    assert profiles.power_decay(2048, 0.05, 2_048_000) == pytest.approx(0.98217951, abs=1e-8)
    assert profiles.power_decay(2048, 0.10, 2_048_000) == pytest.approx(0.99209027, abs=1e-8)
    assert profiles.power_decay(64, 0.10, 64) == 0.0  # the first step: nothing of the weights before


def weights_after(step: int) -> torch.Tensor:
    """A trajectory that bends and wobbles, so that no two averages of it agree by chance."""
    t = torch.arange(1, 9, dtype=torch.float64)
    return torch.sin(step / 40 * t) + step / 100 * t.flip(0)


def tracked(std: float, steps: int, batch: int = 4) -> torch.Tensor:
    average = torch.full((8,), torch.nan, dtype=torch.float64)
    for step in range(1, steps + 1):
        decay = profiles.power_decay(batch, std, step * batch)
        average = weights_after(step) if decay == 0 else decay * average + (1 - decay) * weights_after(step)
    return average


def test_an_average_weighs_as_its_profile():
    """Step j of N carries (j / N)^(gamma + 1) - ((j - 1) / N)^(gamma + 1), the integral of p over the step."""
    power, ends = profiles.gamma_of(0.1) + 1, torch.arange(51, dtype=torch.float64) / 50
    shares = ends[1:] ** power - ends[:-1] ** power
    expected = sum(share * weights_after(step) for step, share in enumerate(shares, start=1))
    assert_close(tracked(0.1, 50), expected, rtol=1e-12, atol=1e-12)


def test_inner_products_are_those_of_the_densities():
    times = (np.arange(400_000) + 0.5) / 400_000 * 8.0
    for a, b in ((Profile(0.05, 8), Profile(0.1, 8)), (Profile(0.1, 3), Profile(0.2, 8)), (Profile(0.2, 8),) * 2):
        numeric = (profiles.density(a, times) * profiles.density(b, times)).mean() * 8
        assert profiles.inner_product(a, b) / max(a.images, b.images) == pytest.approx(numeric, rel=1e-4)
        assert profiles.density(a, times).mean() * 8 == pytest.approx(1, rel=1e-4)


# Weights of snapshots (time by time, widths 0.05 and 0.10 each) for a target, printed by the authors' own program.
GOLDEN = {
    (0.13, 4096): [
        -9.623649469e-05, 0.0003942163076, -0.004642310488, 0.01473765939, -0.04235574064, 0.1150959977,
        -0.1986588996, 1.115525314,
    ],
    (0.075, 3072): [1.412980877e-06, -2.525834788e-05, 0.003334672113, -0.02007419694, 0.3437542971, 0.6730090731],
}  # fmt: skip


@pytest.mark.parametrize(("target", "expected"), GOLDEN.items())
def test_weights_of_snapshots(target, expected):
    kept = [Profile(std, t) for t in (1024, 2048, 3072, 4096) for std in (0.05, 0.1) if t <= target[1]]
    assert_close(profiles.fit(kept, Profile(*target)).weights.tolist(), expected, rtol=1e-8, atol=1e-12)


def test_reconstruction_of_a_trajectory():
    """A width that was tracked comes out exactly; another nearly so, and nearer with more snapshots."""
    errors = []
    for times in (range(50, 201, 50), range(10, 201, 10)):
        kept = [Profile(std, 4 * t) for t in times for std in (0.05, 0.1)]
        values = torch.stack([tracked(one.std, int(one.images) // 4) for one in kept])

        def made(std, kept=kept, values=values):
            fit = profiles.fit(kept, Profile(std, 800))
            return torch.from_numpy(fit.weights) @ values, fit.residual

        for std in (0.05, 0.1):
            weights, residual = made(std)
            assert_close(weights, tracked(std, 200), rtol=1e-9, atol=1e-9)
            assert residual < 1e-6
        weights, residual = made(0.13)
        wanted = tracked(0.13, 200)
        errors.append((float((weights - wanted).norm() / wanted.norm()), residual))
        # Taking the nearer of the two widths would be five times worse.
        assert errors[-1][0] < 0.2 * float((tracked(0.1, 200) - wanted).norm() / wanted.norm())
    assert errors[1][0] < errors[0][0] / 3
    assert errors[1][1] < errors[0][1] / 3


# ---------------------------------------------------------------------------------------------------------------------
# In the training loop


class Net(Trainable):
    def __init__(self):
        super().__init__()
        self.trained = torch.nn.Linear(3, 1)
        self.frozen = torch.nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return self.trained(self.frozen(x))


def fit(path, *pauses, steps=7, **recipe):
    settings = TrainRecipe(**({"lr": 0.1, "batch": 2, "log_every": 3, "save_every": 100} | recipe))

    def loss(model, positions, rng):
        return Loss(model(torch.full((2, 3), 1.0 + rng.step)).square().mean(), {})

    for until in (*pauses, None):
        torch.manual_seed(0)
        net = Net()
        *_, last = fit_events(net, loss, path, settings, steps, until, evaluate_at=[steps])
    kept = {width: {k: v.clone() for k, v in tensors.items()} for width, tensors in last.averages.further()}
    first = last.averages.whole()
    return net, first, kept


def test_every_width_is_tracked_and_survives_a_pause(tmp_path):
    for name in ("whole", "paused"):
        (tmp_path / name).mkdir()
    net, first, kept = fit(tmp_path / "whole", ema_widths=[0.05, 0.1, 0.2])
    again = fit(tmp_path / "paused", 2, 5, ema_widths=[0.05, 0.1, 0.2])
    assert list(kept) == [0.1, 0.2]
    assert first["trained.weight"].ne(kept[0.1]["trained.weight"]).all()
    for ours, theirs in ((again[1], first), (again[2][0.1], kept[0.1]), (again[2][0.2], kept[0.2])):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # The last of 7 steps has the share 1 - (6/7)^(gamma + 1) of each average.
    before = fit(tmp_path, steps=6, ema_widths=[0.2])[1]["trained.weight"]
    share = 1 - (6 / 7) ** (GAMMAS[0.2] + 1)
    assert_close(kept[0.2]["trained.weight"], (1 - share) * before + share * net.trained.weight.detach())


def test_buffers_and_frozen_parameters_are_shared(tmp_path):
    net, first, _ = fit(tmp_path, ema_widths=[0.1])
    for name in ("frozen.weight", "frozen.bias", "seen"):
        assert first[name].data_ptr() == net.state_dict()[name].data_ptr()
    assert first["trained.weight"].data_ptr() != net.trained.weight.data_ptr()
    saved = Averages(net, TrainRecipe(ema_widths=[0.1, 0.2])).tensors()
    assert sorted(saved) == ["ema.trained.bias", "ema.trained.weight", "ema1.trained.bias", "ema1.trained.weight"]


# ---------------------------------------------------------------------------------------------------------------------
# `ddo ema`


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """A pretraining run with snapshots of three widths after every 16 of 64 steps: (recipe, directory)."""
    out = tmp_path_factory.mktemp("ema") / "run"
    recipe = load(
        "toy2d",
        [
            "model.options={width: 8, depth: 1}", "pretrain.images=512", "pretrain.batch=8", "pretrain.lr=0.01",
            "pretrain.snapshot_every=128", "pretrain.ema_widths=[0.1, 0.05, 0.13]", "metric.repeats=1",
        ],
    )  # fmt: skip
    pretrain.run(recipe, out, device=CPU)
    return recipe, out


def two_widths(out, *steps):
    return [out / "checkpoints" / snapshot_name(step, width) for step in steps for width in (None, 0.05)]


def test_snapshots_of_a_run(snapshots):
    _, out = snapshots
    names = {snapshot_name(step, width) for step in (16, 32, 48, 64) for width in (None, 0.05, 0.13)}
    assert {file.name for file in (out / "checkpoints").iterdir()} == names
    header = checkpoint.read_header(out / "checkpoints" / "step-000032-ema0.050.safetensors")
    assert header["ema"] == {"std": 0.05, "images": 256}
    assert checkpoint.read_header(out / "final.safetensors")["ema"] == {"std": 0.1, "images": 512}


def test_a_width_made_afterwards_is_that_of_training(snapshots, tmp_path):
    _, out = snapshots
    found = ema.run(two_widths(out, 16, 32, 48, 64), tmp_path / "made.safetensors", std=0.13)
    (tmp_path / "made.png").unlink()  # as where a process was killed before it
    assert ema.run(two_widths(out, 16, 32, 48, 64), tmp_path / "made.safetensors", std=0.13) == found
    assert (tmp_path / "made.png").is_file()
    with pytest.raises(UsageError, match="exists and holds something else"):
        ema.run(two_widths(out, 16, 32, 48, 64), tmp_path / "made.safetensors", std=0.12)
    assert found["images"] == 512
    assert found["residual"] == pytest.approx(0.0623, abs=1e-4)
    assert (tmp_path / "made.png").is_file()
    made, wanted, other = (
        checkpoint.load(file).tensors
        for file in (
            tmp_path / "made.safetensors",
            out / "checkpoints" / snapshot_name(64, 0.13),
            out / "checkpoints" / snapshot_name(64),
        )
    )
    flat = [torch.cat([tensors[name].flatten() for name in sorted(wanted)]) for tensors in (made, wanted, other)]
    assert (flat[0] - flat[1]).norm() < 0.25 * (flat[2] - flat[1]).norm()  # than with the nearer width
    header = checkpoint.read_header(tmp_path / "made.safetensors")
    assert header["ema"] == {"std": 0.13, "images": 512}
    assert [link["command"] for link in header["provenance"]] == ["pretrain", "ema"]
    assert sum(one["weight"] for one in header["provenance"][1]["snapshots"]) == pytest.approx(1)
    registry.load_model(tmp_path / "made.safetensors", CPU)  # a model like any other


def test_a_directory_and_a_kept_width_give_the_snapshot_itself(snapshots, tmp_path):
    _, out = snapshots
    found = ema.run([out], tmp_path / "same.safetensors", std=0.05, at=384)
    assert [one["images"] for one in found["snapshots"]] == [128] * 3 + [256] * 3 + [384] * 3
    assert found["residual"] < 1e-6
    made, kept = (
        checkpoint.load(file).tensors
        for file in (tmp_path / "same.safetensors", out / "checkpoints" / snapshot_name(48, 0.05))
    )
    for name in kept:
        assert_close(made[name], kept[name], rtol=1e-5, atol=1e-6)


def test_a_poor_fit_is_said(snapshots, tmp_path, capsys):
    _, out = snapshots
    found = ema.run([out], tmp_path / "x.safetensors", std=0.02, dry_run=True)
    assert found["residual"] > 0.2
    assert "miss" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("std", "at", "message"),
    [
        (0.289, None, r"--std 0\.289 is no relative standard deviation"),
        (0.0, None, r"--std 0 is no"),
        (0.1, 513, r"--at 513 is not within training: the last snapshot is of 512 images"),
        (0.1, 127, r"--at 127 lies before the first snapshot, of 128 images"),
    ],
)
def test_averages_that_cannot_be_made(snapshots, tmp_path, std, at, message):
    with pytest.raises(UsageError, match=message):
        ema.run([snapshots[1]], tmp_path / "x.safetensors", std=std, at=at)
    assert list(tmp_path.iterdir()) == []


def test_snapshots_that_do_not_belong_together(snapshots, tmp_path):
    _, out = snapshots
    file = out / "checkpoints" / snapshot_name(16)
    found = checkpoint.load(file)
    changed = {
        "config": ({**found.header, "config": {**found.header["config"], "num_classes": 3}}, "another model"),
        "run": ({**found.header, "provenance": [{"command": "pretrain", "steps": 9}]}, "another run"),
    }
    for name, (header, message) in changed.items():
        checkpoint.save(tmp_path / f"{name}.safetensors", found.tensors, header)
        with pytest.raises(UsageError, match=message):
            ema.run([out, tmp_path / f"{name}.safetensors"], tmp_path / "x.safetensors", std=0.1)
    with pytest.raises(UsageError, match="are the same average"):
        ema.run([file, file], tmp_path / "x.safetensors", std=0.1)
    with pytest.raises(CheckpointError, match="does not tell of which power-function average"):
        ema.run([Path(make_checkpoint(tmp_path / "plain.safetensors"))], tmp_path / "x.safetensors", std=0.1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"holds no step-\*\.safetensors"):
        ema.run([tmp_path / "empty"], tmp_path / "x.safetensors", std=0.1)


def test_published_snapshots_may_come_from_several_files(snapshots, tmp_path):
    """A converted file names its source, which differs between snapshots of one training."""
    _, out = snapshots
    for number, file in enumerate(two_widths(out, 16, 32)):
        found = checkpoint.load(file)
        link = {"command": "convert", "source": f"{number}.pkl", "source_sha256": str(number)}
        tensors = {name: tensor.half() for name, tensor in found.tensors.items()}
        checkpoint.save(tmp_path / f"{number}.safetensors", tensors, {**found.header, "provenance": [link]})
    files = sorted(tmp_path.glob("?.safetensors"))
    ema.run(files, tmp_path / "made.safetensors", std=0.08)
    made = checkpoint.load(tmp_path / "made.safetensors").tensors
    assert {tensor.dtype for tensor in made.values()} == {torch.float16}  # stored as the snapshots are
    ema.run(two_widths(out, 16, 32), tmp_path / "exact.safetensors", std=0.08)
    for name, tensor in checkpoint.load(tmp_path / "exact.safetensors").tensors.items():
        assert_close(made[name].float(), tensor, rtol=2e-3, atol=1e-3)  # sums were float32


def test_command_line(snapshots, tmp_path):
    from typer.testing import CliRunner

    options = ["ema", str(snapshots[1]), "--std", "0.08", "--out", str(tmp_path / "x.safetensors"), "--json"]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found["snapshots"]) == 12
    assert found["gamma"] == pytest.approx(profiles.gamma_of(0.08))


def test_candidates_of_a_round_lie_beside_their_further_averages(tmp_path):
    ckpt = make_checkpoint(tmp_path / "ref.safetensors")
    recipe = tiny_recipe(ckpt, "diffusion", "finetune.rounds=1", "finetune.ema_widths=[0.1, 0.05]")
    finetune.run(recipe, tmp_path / "run", device=CPU)
    path = tmp_path / "run" / "round-01" / "checkpoints"
    assert {file.name for file in path.iterdir()} == {snapshot_name(s, w) for s in (3, 6) for w in (None, 0.05)}
    assert checkpoint.read_header(path / snapshot_name(3))["ema"] == {"std": 0.1, "images": 12}
    with pytest.raises(UsageError, match=r"give .*round-01/checkpoints"):
        ema.run([tmp_path / "run"], tmp_path / "x.safetensors", std=0.07)
    found = ema.run([tmp_path / "run" / "round-01"], tmp_path / "x.safetensors", std=0.07)
    assert [one["images"] for one in found["snapshots"]] == [12, 12, 24, 24]

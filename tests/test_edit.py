"""Editing by SDEdit: known answers, each image a function of its own number, sets that continue, one clear message."""

import contextlib
import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CPU, make_checkpoint, make_discriminator, torchrun
from PIL import Image
from torch.testing import assert_close

from ddo_cli import checkpoint, files
from ddo_cli.data.images import open_images
from ddo_cli.diffusion import vp_sde
from ddo_cli.engines import report as page_report
from ddo_cli.engines.edit import edit
from ddo_cli.engines.edit import report as edit_report
from ddo_cli.engines.sampling import guides, sample
from ddo_cli.errors import CheckpointError, DataError, RunError, UsageError
from ddo_cli.models import registry
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with a model, its discriminator, a labelled and an unlabelled npz of 12 digits, and a target set."""
    path = tmp_path_factory.mktemp("edit")
    ckpt = make_checkpoint(path / "m.safetensors")
    make_discriminator(path / "d.safetensors", ckpt, scale=0.5)  # so that a difference shows in grey levels
    found = open_images("embedded:digits32", 100)
    images = found.items.transpose(0, 2, 3, 1)
    np.savez(path / "source.npz", arr_0=images[:12], label=found.labels[:12])
    np.savez(path / "bare.npz", arr_0=images[:12])
    np.savez(path / "one.npz", arr_0=images[:1], label=found.labels[:1])
    np.savez(path / "target.npz", arr_0=images[12:])
    return path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    """No runs/ of the developer's own."""
    monkeypatch.chdir(tmp_path)


def run(place, out, levels=(1.0,), *, source="source.npz", ckpt="m.safetensors", **options):
    options = {"ref": str(place / "target.npz"), "device": CPU, **options}
    if ckpt is not None and not ckpt.startswith("embedded:"):
        ckpt = str(place / ckpt)
    return edit.run(str(place / source), Path(out), levels, ckpt=ckpt, **options)


def guided(place, out, levels=(1.0,), **options):
    return run(place, out, levels, disc=str(place / "d.safetensors"), ref=None, **options)


def images_of(path):
    return open_images(str(path)).items


def content(path):
    """Bytes of every visible file below."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(Path(path).rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    }


# ---------------------------------------------------------------------------------------------------------------------
# What is computed


@pytest.mark.parametrize("spacing", ["karras", "vp"])
def test_the_flow_of_a_normal_distribution_is_exact(spacing):
    config = registry.config_of("mixture", (2,), 0, {}, {})
    model = registry.build(config)  # one component, standard normal
    x0, sigma = torch.tensor([[1.0, -2.0], [0.5, 3.0], [0.0, 0.0]]), 3.0
    spec = SamplingRecipe(sampler="heun", steps=400, spacing=spacing, sigma_max=sigma, sigma_min=1e-3)
    found = model.sample(torch.full((3,), -1), RowRng([4, 5, 6]), spec, x0=x0).x
    noisy = x0.double() + sigma * RowRng([4, 5, 6]).randn((2,)).double()
    # The ODE dx/dsigma = sigma x / (1 + sigma^2) shrinks x by sqrt(1 + sigma^2); the step from 1e-3 to 0 is worth 1e-6.
    assert_close(found, noisy / math.sqrt(1 + sigma**2), rtol=1e-4, atol=1e-4)


def test_sampling_is_editing_nothing_from_the_highest_level(place):
    model, _ = registry.load_model(place / "m.safetensors", CPU)
    label, spec = torch.arange(4), SamplingRecipe(steps=3)
    plain = model.sample(label, RowRng(range(4)), spec)
    edited = model.sample(label, RowRng(range(4)), spec, x0=torch.zeros(4, *model.codec.shape))
    assert torch.equal(plain.x, edited.x)


def test_the_higher_the_level_the_less_is_left_of_the_source(place, tmp_path):
    levels = [0.01, 0.1, 0.5, 2.0, 10.0, 80.0]
    found = run(place, tmp_path / "e", levels, ckpt="embedded:digits32", sampling={"sigma_min": 0.005, "steps": 6})
    psnr = [level["psnr"] for level in found["levels"]]
    assert psnr == sorted(psnr, reverse=True)
    # Half of sigma = 0.01 is two thirds of a grey level, beside the half level that decoding truncates.
    assert psnr[0] > 40
    assert psnr[-1] < 15  # colours are the model's own: two uniform ones differ by far more than 255 / 10 on average


def test_psnr_of_known_differences():
    black = np.zeros((2, 3, 4, 4), dtype=np.uint8)
    assert edit_report.psnr(black + 1, black) == pytest.approx(20 * math.log10(255))
    assert edit_report.psnr(np.stack([black[0], black[0] + 2]), black) == pytest.approx(20 * math.log10(255 / 2**0.5))
    assert edit_report.psnr(black, black + 255) == pytest.approx(0)  # no uint8 arithmetic
    assert edit_report.psnr(black, black) == pytest.approx(20 * math.log10(255 * 96**0.5))


def test_another_batch_size_changes_rounding_only(place, tmp_path):
    sets = {}
    for batch in (1, 5, 12):
        guided(place, tmp_path / str(batch), sampling={"batch": batch})
        sets[batch] = [images_of(tmp_path / str(batch) / f"level-1{end}").astype(int) for end in ("", "-guided")]
    for batch in (1, 5):
        for ours, theirs in zip(sets[batch], sets[12], strict=True):
            apart = np.abs(ours - theirs)
            assert apart.max() <= 1
            assert (apart > 0).mean() < 1e-3


def test_an_image_depends_on_its_own_number_only(place, tmp_path):
    run(place, tmp_path / "all", sampling={"batch": 4})
    run(place, tmp_path / "few", num=6, sampling={"batch": 4})
    run(place, tmp_path / "seed", seed=1, sampling={"batch": 4})
    run(place, tmp_path / "rng", sampling={"batch": 4, "rng": "cuda"})
    whole = images_of(tmp_path / "all" / "level-1")
    assert np.array_equal(whole[:6], images_of(tmp_path / "few" / "level-1"))
    for other in ("seed", "rng"):
        assert not np.array_equal(whole, images_of(tmp_path / other / "level-1"))


def test_the_noise_is_not_that_of_sampling(place, tmp_path):
    # An image that `ddo sample` drew from the same noise would meet it again, and not be independent of it.
    np.savez(tmp_path / "grey.npz", arr_0=np.full((4, 32, 32, 3), 128, dtype=np.uint8), label=np.arange(4))
    found = edit.run(
        str(tmp_path / "grey.npz"), tmp_path / "e", [80.0], ckpt="embedded:digits32", device=CPU,
        ref=str(place / "target.npz"),
    )  # fmt: skip
    sample.run("embedded:digits32", range(4), tmp_path / "s", device=CPU)
    assert found["levels"][0]["sigma"] == 80
    apart = np.abs(images_of(tmp_path / "e" / "level-80").astype(int) - images_of(tmp_path / "s")).mean((1, 2, 3))
    assert (apart > 2).all()  # the same noise would leave x0 = 0.004 beside a deviation of 80 between them: 0.0 to 0.1


def test_two_processes_write_the_same_sets(real_pictures, place, tmp_path):
    guided(place, tmp_path / "one", [0.5, 2.0], sampling={"batch": 4})
    options = ["--disc", str(place / "d.safetensors"), "--batch", "4", "--level", "0.5,2", "--out", "two"]
    done = torchrun("-m", "ddo_cli", "edit", str(place / "source.npz"), *options, "--device", "cpu", "--json")
    assert json.loads(done.stdout)["num_images"] == 12
    one, two = content(tmp_path / "one"), content(tmp_path / "two")
    assert one.keys() == two.keys()
    # The distance adds up the processes' moments, so its last digits differ, and the picture of it may.
    assert all(one[name] == two[name] for name in one if name not in ("edit.json", "edit.png"))


# ---------------------------------------------------------------------------------------------------------------------
# Guidance


def test_guidance_off_is_weight_0_is_no_discriminator(place, tmp_path):
    levels = [0.5, 2.0]
    guided(place, tmp_path / "on", levels)
    guided(place, tmp_path / "weight-0", levels, guidance={"dg_weight": 0.0})
    guided(place, tmp_path / "off", levels, use_guidance=False)
    run(place, tmp_path / "without", levels)
    for level in ("level-0.5", "level-2"):
        on = images_of(tmp_path / "on" / level)
        for other in ("weight-0", "off", "without"):
            assert np.array_equal(on, images_of(tmp_path / other / level))
            assert not (tmp_path / other / f"{level}-guided").exists()
        assert not np.array_equal(on, images_of(tmp_path / "on" / f"{level}-guided"))


def test_a_guide_of_weight_0_changes_nothing(place):
    chosen = guides.choose(str(place / "d.safetensors"), None, {"dg_weight": 0.0}, device=CPU)
    base = guides.diffusion_model(chosen.model)
    guide = guides.discriminator_guide(chosen.discriminator.network, chosen.settings, base)
    x0, spec = torch.rand(4, 3, 32, 32), SamplingRecipe(steps=3, sigma_max=2.0)
    plain, weightless = (base.guided_by(g).sample(torch.arange(4), RowRng(range(4)), spec, x0) for g in ([], [guide]))
    assert torch.equal(plain.x, weightless.x)
    assert weightless.disc_nfe == 0


def finished_run(name, disc):
    """What `ddo train-disc` leaves, as far as others look for it."""
    out = Path("runs") / name
    out.mkdir(parents=True)
    shutil.copyfile(disc, out / "final.safetensors")
    (out / "state.json").write_text('{"command": "train-disc", "finished": true}')


def test_the_discriminator_of_the_model_is_found_among_the_runs(place, tmp_path, capsys):
    assert not any(level["guided"] for level in run(place, tmp_path / "none")["levels"])
    assert "without guidance: no discriminator below runs/ was trained against it" in capsys.readouterr().err
    other = make_checkpoint(tmp_path / "other.safetensors", seed=1)
    drawn = sample.spec_of(checkpoint.load(place / "m.safetensors")).model_dump(mode="json")
    ours = make_discriminator(tmp_path / "a.safetensors", str(place / "m.safetensors"), sampling=drawn)
    finished_run("a", ours)
    finished_run("b", make_discriminator(tmp_path / "o.safetensors", other))
    os.utime("runs/a/final.safetensors", (0, 0))  # the newest is another model's
    found = run(place, tmp_path / "found")
    assert found["discriminator"] == "runs/a/final.safetensors"
    assert [level["guided"] for level in found["levels"]] == [False, True]
    told = capsys.readouterr().err
    assert "guided by runs/a/final.safetensors, weight 2" in told
    assert "other settings" not in told  # float32 is what this device makes of the samples' own precision
    assert not any(level["guided"] for level in run(place, tmp_path / "off", use_guidance=False)["levels"])


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def test_progress_counts_images(place, tmp_path, monkeypatch):
    """Also where the last batch is filled up: 12 images in batches of 8."""
    told = []

    @contextlib.contextmanager
    def progress(title, total, unit):
        told.append([title, total, unit, 0])
        yield SimpleNamespace(advance=lambda count: told[-1].__setitem__(3, told[-1][3] + count))

    monkeypatch.setattr(edit.console, "progress", progress)
    run(place, tmp_path / "e", sampling={"batch": 8})
    assert told == [["noise level 1", 12, "images", 12]]


def test_images_are_translated_to_a_class(place, tmp_path, capsys):
    own = run(place, tmp_path / "own", [5.0])
    assert own["levels"][0]["guided"] is False
    labels = open_images(str(place / "source.npz")).labels
    assert open_images(str(tmp_path / "own" / "level-5")).labels.tolist() == labels.tolist()
    run(place, tmp_path / "three", [5.0], label=3)
    run(place, tmp_path / "bare", [5.0], label=3, source="bare.npz")
    assert "all classes" not in capsys.readouterr().err
    guided(place, tmp_path / "default", [5.0], label=3)
    assert "the distance is to all classes of embedded:digits32" in capsys.readouterr().err
    three = open_images(str(tmp_path / "three" / "level-5"))
    assert three.labels.tolist() == [3] * 12
    assert np.array_equal(three.items, images_of(tmp_path / "bare" / "level-5"))
    same = (three.items == images_of(tmp_path / "own" / "level-5")).all((1, 2, 3))
    assert np.array_equal(same, labels == 3)


def test_an_unconditional_model_ignores_labels(place, tmp_path):
    config = registry.config_of("patch-unet", (3, 32, 32), 0, {"widths": [16], "depths": [1], "emb_width": 16}, {})
    ckpt = make_checkpoint(tmp_path / "u.safetensors")
    header = {**checkpoint.read_header(ckpt), "config": config}
    checkpoint.save(Path(ckpt), registry.build(config).state_dict(), header)
    for source in ("source.npz", "bare.npz"):
        edit.run(str(place / source), tmp_path / source, [1.0], ckpt=ckpt, ref=str(place / "target.npz"), device=CPU)
        assert open_images(str(tmp_path / source / "level-1")).labels.tolist() == [-1] * 12
    with pytest.raises(UsageError, match="--label 3 is not possible; this model has no classes"):
        edit.run(str(place / "bare.npz"), tmp_path / "x", [1.0], ckpt=ckpt, label=3, device=CPU)


# ---------------------------------------------------------------------------------------------------------------------
# What is written


@pytest.mark.parametrize("form", ["png", "npz", "shards"])
def test_report_and_files(place, tmp_path, form):
    found = guided(place, tmp_path / "e", [2.0, 0.5], form=form)
    assert (found["num_images"], found["metric"], found["reference"]) == (12, "fd_embedded", "embedded:digits32")
    assert [(level["sigma"], level["guided"]) for level in found["levels"]] == [
        (0.5, False), (0.5, True), (2.0, False), (2.0, True)
    ]  # fmt: skip
    for level in found["levels"]:
        assert level["time"] == pytest.approx(float(vp_sde.time_of(torch.tensor(level["sigma"]))))
        assert level["nfe"] == 5  # heun, 3 steps
        # The second of Karras' three levels lies at a VP time above 0.01, the last one, 0.002, below it.
        assert level["disc_nfe"] == (2 if level["guided"] else 0)
        assert level["fd_embedded"] > 0
        assert level["psnr"] > 0
    names = {path.name for path in (tmp_path / "e").iterdir() if path.name[0] != "."}
    folders = {"level-0.5", "level-0.5-guided", "level-2", "level-2-guided"}
    assert names == {"edit.json", "edit.png", "edit-grid.png", *folders}
    headline = page_report.run(tmp_path / "e")["headline"]
    assert headline in (tmp_path / "e" / "report.html").read_text()
    assert re.search(
        r"edited from 2 noise levels: fd_embedded to the target does not fall: from [\d.]+ of the", headline
    )
    record = json.loads((tmp_path / "e" / "edit.json").read_text())
    record["figures"]["source_distance"] = 1e6
    better = edit_report.page(tmp_path / "e", record).headline
    assert re.search(r"to the target falls from 1,000,000 to [\d.]+ \(noise level", better)
    if form == "png":
        assert Image.open(tmp_path / "e" / "level-2-guided" / "000011.png").size == (32, 32)
    assert images_of(tmp_path / "e" / "level-2-guided").shape == (12, 3, 32, 32)
    stored = json.loads((tmp_path / "e" / "edit.json").read_text())
    assert stored["figures"]["levels"] == found["levels"]


def test_a_single_image_has_no_distance(place, tmp_path):
    found = run(place, tmp_path / "e", source="one.npz")
    assert found["levels"][0]["fd_embedded"] is None
    assert "curve" not in found
    assert edit_report.table(found)[1][0][3] == "-"


def test_the_same_command_again_does_nothing(place, tmp_path, monkeypatch, capsys):
    first = guided(place, tmp_path / "e")
    before = content(tmp_path / "e")
    with monkeypatch.context() as patch:
        patch.setattr(edit, "_draw", None)
        patch.setattr(edit_report, "write", None)
        assert guided(place, tmp_path / "e") == first
    assert "is finished; nothing to do" in capsys.readouterr().err
    assert content(tmp_path / "e") == before
    (tmp_path / "e" / "edit-grid.png").unlink()
    (tmp_path / "e" / "level-1" / "000003.png").unlink()
    assert guided(place, tmp_path / "e") == first
    assert content(tmp_path / "e") == before


def test_another_target_or_fewer_levels_need_no_editing(place, tmp_path, monkeypatch):
    both = run(place, tmp_path / "e", [1.0, 2.0])
    monkeypatch.setattr(edit, "_draw", None)
    one = run(place, tmp_path / "e", [2.0])
    assert one["levels"] == both["levels"][1:]
    other = run(place, tmp_path / "e", [1.0, 2.0], ref="embedded:digits8")
    for ours, theirs in zip(other["levels"], both["levels"], strict=True):
        assert ours["fd_embedded"] != theirs["fd_embedded"]
        assert ours["psnr"] == theirs["psnr"]


def test_a_level_or_guidance_can_be_added(place, tmp_path, monkeypatch):
    run(place, tmp_path / "e", [1.0])
    drawn, draw = [], edit._draw
    monkeypatch.setattr(edit, "_draw", lambda *given: drawn.append(given[-2].name) or draw(*given))
    found = guided(place, tmp_path / "e", [1.0, 2.0])
    assert drawn == ["level-1-guided", "level-2", "level-2-guided"]
    assert len(found["levels"]) == 4
    whole = guided(place, tmp_path / "whole", [1.0, 2.0])
    assert whole["levels"] == found["levels"]
    assert content(tmp_path / "e") == content(tmp_path / "whole")


CUT = {"sampling": {"batch": 5}, "num": 7, "levels": [0.5, 2.0]}


@pytest.fixture(scope="module")
def whole(place):
    guided(place, place / "whole", **CUT)
    return content(place / "whole")


# 48 files take their names: edit.json, 4 manifests, 4 sets of 7 images, 2 parts and a manifest, 2 pictures, edit.json.
@pytest.mark.parametrize(
    "number", [4, 26, 48, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 9, 14, 46))]
)
def test_an_interrupted_edit_continues(place, whole, tmp_path, monkeypatch, number):
    count, rename = 0, os.replace

    def replace(source, target):
        nonlocal count
        count += 1
        if count == number:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            guided(place, tmp_path / "cut", **CUT)
    guided(place, tmp_path / "cut", **CUT)
    assert content(tmp_path / "cut") == whole


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_a_directory_with_something_else_is_refused(place, tmp_path):
    run(place, tmp_path / "e")
    before = content(tmp_path / "e")
    with pytest.raises(RunError, match="seed: 0 -> 1"):
        run(place, tmp_path / "e", seed=1)
    with pytest.raises(RunError, match=r"sampling\.steps: 3 -> 4"):
        run(place, tmp_path / "e", [2.0], sampling={"steps": 4})
    with pytest.raises(RunError, match="label: None -> 3"):
        run(place, tmp_path / "e", label=3)
    with pytest.raises(RunError, match="num: 12 -> 11"):
        run(place, tmp_path / "e", num=11)
    images, labels = images_of(place / "source.npz"), open_images(str(place / "source.npz")).labels
    np.savez(tmp_path / "s.npz", arr_0=255 - images.transpose(0, 2, 3, 1), label=labels)
    with pytest.raises(RunError, match="source_sha256"):
        run(place, tmp_path / "e", source=tmp_path / "s.npz")
    guided(place, tmp_path / "e")
    with pytest.raises(RunError, match=r"guidance\.dg_weight: 2\.0 -> 1\.0"):
        guided(place, tmp_path / "e", guidance={"dg_weight": 1.0})
    assert before.items() - content(tmp_path / "e").items() <= {
        (name, before[name]) for name in ("edit.json", "edit.png", "edit-grid.png")
    }
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("important")
    with pytest.raises(RunError, match="not empty"):
        run(place, tmp_path / "full")
    assert content(tmp_path / "full") == {"thesis.tex": b"important"}


BAD = {
    "zero": ({"levels": [0.0]}, UsageError, "--level 0 must lie above the sampler's sigma_min = 0.002"),
    "low": ({"levels": [0.001]}, UsageError, "--level 0.001 must lie above"),
    "high": ({"levels": [1.0, 81.0]}, UsageError, "--level 81 must lie .* not above its sigma_max = 80"),
    "nan": ({"levels": [math.nan]}, UsageError, "--level nan must lie above"),
    "bound": ({"levels": [3.0], "sampling": {"sigma_max": 2.0}}, UsageError, "not above its sigma_max = 2"),
    "twice": ({"levels": [1.0, 2.0, 1.0]}, UsageError, "--level 1,2,1 names a level twice"),
    "unlabelled": ({"source": "bare.npz"}, DataError, "images without label.* say with --label CLASS"),
    "label": ({"label": 10}, UsageError, "--label 10 is not possible; this model has classes 0 to 9"),
    "size": ({"source": "small.npz"}, DataError, r"small\.npz holds 16x16 RGB where the model needs 32x32 RGB"),
    "grey": ({"source": "grey.npz"}, DataError, r"grey\.npz holds 32x32 grey where the model needs 32x32 RGB"),
    "classes": ({"source": "many.npz"}, DataError, "an image of class 11, and the model has classes 0 to 9"),
    "empty": ({"source": "empty"}, DataError, "empty holds no images"),
    "missing": ({"source": "nothing"}, DataError, "nothing does not exist"),
    "points": ({"ckpt": "embedded:toy2d"}, UsageError, "ddo edit needs images"),
    "tokens": ({"ckpt": "ar.safetensors"}, UsageError, "needs a diffusion model"),
    "no discriminator": ({"guidance": {"dg_weight": 1.0}}, UsageError, "dg_weight = 1.0 needs a discriminator"),
    "no such disc": ({"disc": "gone.safetensors"}, CheckpointError, "does not exist"),
    "reference": ({"ref": "gone"}, DataError, "gone does not exist"),
    "key": ({"sampling": {"top_k": 3}}, UsageError, "top_k = 3 has no effect"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad_place(place):
    images = open_images(str(place / "source.npz")).items.transpose(0, 2, 3, 1)
    np.savez(place / "small.npz", arr_0=images[:, ::2, ::2], label=np.zeros(12, int))
    np.savez(place / "grey.npz", arr_0=images[..., :1], label=np.zeros(12, int))
    np.savez(place / "many.npz", arr_0=images, label=np.arange(12))
    (place / "empty").mkdir()
    make_checkpoint(place / "ar.safetensors", "autoregressive")
    return place


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named_before_anything_is_written(bad_place, tmp_path, case):
    options, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        run(bad_place, tmp_path / "e", **options)
    assert not list(tmp_path.iterdir())


def test_guidance_on_and_off_contradict(place, tmp_path):
    with pytest.raises(UsageError, match="--no-guidance and --dg-weight 2 contradict"):
        guided(place, tmp_path / "e", guidance={"dg_weight": 2.0}, use_guidance=False)


def test_a_discriminator_of_another_model_needs_force(place, tmp_path, capsys):
    other = make_checkpoint(tmp_path / "other.safetensors", seed=1)
    source, disc = str(place / "source.npz"), str(place / "d.safetensors")
    with pytest.raises(UsageError, match="whose samples it has never seen"):
        edit.run(source, tmp_path / "e", [1.0], ckpt=other, disc=disc, device=CPU)
    assert not (tmp_path / "e").exists()
    assert len(edit.run(source, tmp_path / "e", [1.0], ckpt=other, disc=disc, force=True, device=CPU)["levels"]) == 2
    assert "--force" in capsys.readouterr().err


def test_the_output_lies_outside_the_source(place, tmp_path):
    run(place, tmp_path / "e")
    source = tmp_path / "e" / "level-1"
    with pytest.raises(UsageError, match="lies inside"):
        edit.run(str(source), source / "again", [1.0], ckpt=str(place / "m.safetensors"), device=CPU)


def test_a_few_images_are_warned_of(place, tmp_path, capsys):
    run(place, tmp_path / "e")
    assert "12 images for 64 features leave the covariance rank-deficient" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_the_command(ddo, place, tmp_path):
    options = [
        "edit", str(place / "source.npz"), "--ckpt", str(place / "m.safetensors"), "--disc",
        str(place / "d.safetensors"), "--level", "0.5,3", "--num-images", "4", "--steps", "2", "--json", "rho=5",
    ]  # fmt: skip

    def edit(*more, code=0):
        return json.loads(ddo(*options, *more, code=code).stdout)

    plan = edit("--dry-run")
    assert plan["dry_run"]
    assert [level["sigma"] for level in plan["levels"]] == [0.5, 0.5, 3.0, 3.0]
    assert not (tmp_path / "edited").exists()
    found = edit()
    assert {"out", "num_images", "levels"} <= found.keys()
    assert found["num_images"] == 4
    for level in found["levels"]:
        assert level.keys() == {"sigma", "time", "psnr", "fd_embedded", "guided", "nfe", "disc_nfe"}
    assert "write noise levels such as 0.5,1,2" in edit("--level", "a", code=2)["error"]["message"]

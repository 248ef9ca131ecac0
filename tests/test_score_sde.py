"""DDPM++ of score_sde and Soft Truncation: files, outputs and samples against the official code's (CPU, float32)."""

import hashlib

import pytest
import torch
from conftest import CPU
from test_dit import hashed, official_tensors
from test_flow import GoldenNoise
from torch.testing import assert_close

from ddo_cli.diffusion import vp_sde
from ddo_cli.diffusion.precond import Vp, VpUnbounded
from ddo_cli.engines.weights import convert
from ddo_cli.errors import CheckpointError, UsageError
from ddo_cli.models import registry
from ddo_cli.models.edm import score_sde
from ddo_cli.models.edm.unet import EdmUnet, EdmUnetOptions
from ddo_cli.recipe.schema import SamplingRecipe

TINY = {"channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [16], "augment_dim": 0}
X = hashed("input", 2 * 3 * 32 * 32).to(torch.float32).view(2, 3, 32, 32)
NONE = torch.full((2,), -1)


def network(side=32, **options):
    with torch.device("meta"):
        return EdmUnet(3, 3, side, 0, EdmUnetOptions(**{**TINY, **options}))


def shapes_of(net):
    return {name: tuple(tensor.shape) for name, tensor in score_sde.to_official(net, net.state_dict()).items()}


def published(path, net=None, change=lambda averages: averages, **more):
    """A training checkpoint whose averages are filled by the rule of `test_dit`, and whose last weights are not."""
    tensors = official_tensors(shapes_of(net or network()))
    averages = change([tensor.contiguous() for tensor in tensors.values()])
    model = {"module.sigmas": torch.zeros(1000).double()} | {f"module.{key}": t + 1 for key, t in tensors.items()}
    ema = {"decay": 0.9999, "num_updates": 7, "shadow_params": averages}
    torch.save({"optimizer": {"state": {}, "param_groups": []}, "model": model, "ema": ema, "step": 7, **more}, path)
    return path


def converted(folder, *settings):
    out = folder / "model.safetensors"
    result = convert.run(published(folder / "checkpoint_26.pth"), out, settings=settings, verify=True)
    return result, registry.load_model(str(out), CPU).model


def test_names_and_shapes_are_the_published_ones():
    net = network(64, channels=128, channel_mult=[1, 2, 2, 2], num_blocks=4)
    shapes = shapes_of(net)
    assert list(shapes)[:3] == ["all_modules.0.weight", "all_modules.0.bias", "all_modules.1.weight"]
    assert len(shapes) == 564
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 61_804_419
    lines = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in {**shapes, "sigmas": (1000,)}.items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == "f4c22fe925d28c4c"


def test_outputs_equal_the_official_ones(tmp_path):
    result, model = converted(tmp_path)
    assert result["weights"] == "ema.shadow_params, by order"
    assert result["assumed"] == "size=32, as attention is at 16x16, unbounded=false"
    assert (result["num_parameters"], result["not_read"]) == (189_347, "optimizer, step")
    with torch.no_grad():
        found = model.net(X, torch.tensor([3.0, 700.0]), NONE)
    assert (found.mean().item(), found.std(unbiased=False).item()) == pytest.approx((-0.3009933, 0.5546927), abs=1e-6)
    assert found[0, 0, 0, :4].tolist() == pytest.approx([-0.266021, -0.126898, -0.335111, -0.525949], abs=2e-6)
    assert found[1, 2, 31, 28:].tolist() == pytest.approx([-0.825235, -0.355840, -0.329191, -0.151103], abs=2e-6)


class Noise(GoldenNoise):
    def randn(self, shape, dtype=torch.float32):
        self.k += 1
        if self.k == 1:
            return X
        j = torch.arange(X.numel(), dtype=torch.float64)
        return torch.cos(1.3 * j + 0.5 + self.k - 1).view(X.shape).to(dtype)


def test_samples_equal_the_official_ones(tmp_path):
    """Euler and Maruyama's rule of 10 steps, and the last one without noise.

    D is float32, and in the last step, at sigma 0.001, ten times its noise enters: of values of 100 an error of 0.07.
    """
    _, model = converted(tmp_path)
    spec = SamplingRecipe(sampler="euler-maruyama", steps=10)
    model.check_sampling(spec)
    with torch.no_grad():
        drawn = model.sample(NONE, Noise(), spec)
    assert drawn.nfe == 11
    found = drawn.x
    assert (found.mean().item(), found.std(unbiased=False).item()) == pytest.approx((39.0904922, 63.0687561), rel=3e-5)
    assert found[0, 0, 0, :4].tolist() == pytest.approx([-27.695793, -80.674362, 19.546146, 119.273994], abs=0.1)
    assert found[1, 2, 31, 28:].tolist() == pytest.approx([95.280052, 102.062012, 44.249710, 13.552876], abs=0.1)


def test_the_unbounded_label():
    t = torch.tensor([1e-5, 0.01, 0.5, 1.0], dtype=torch.float64)
    found = VpUnbounded().coefficients(vp_sde.sigma_of(t))
    assert_close(found.c_noise, torch.tensor([0, 64.641, 551.584, 999]).double(), atol=1e-3, rtol=0)
    assert torch.equal(found.c_out, Vp().coefficients(vp_sde.sigma_of(t)).c_out)


def test_what_a_file_does_not_tell(tmp_path):
    _, model = converted(tmp_path, "size=64", "unbounded=true")
    assert model.codec.shape == (3, 64, 64)
    assert isinstance(model.precond, VpUnbounded)
    with pytest.raises(UsageError, match=r"of which size and unbounded can be told; leave qkv out"):
        convert.run(published(tmp_path / "c.pth"), tmp_path / "o.safetensors", settings=["qkv=new"])
    nowhere = published(tmp_path / "d.pth", network(attn_resolutions=[]))
    with pytest.raises(CheckpointError, match="does not tell the side of its images; add size=<side>"):
        convert.run(nowhere, tmp_path / "o.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda averages: averages[:-1], r"its 153 averaged tensors \(ema\) are not those of its 154 parameters"),
        (lambda averages: [*averages[1::-1], *averages[2:]], "in their order; save the averages by name"),
    ],
)
def test_averages_that_do_not_fit_are_refused(tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        convert.run(published(tmp_path / "c.pth", change=change), tmp_path / "o.safetensors")


def test_relatives_are_refused(tmp_path):
    """NCSN++ has other modules; a network with a tensor more is none of ours."""
    tensors = official_tensors(shapes_of(network()))
    torch.save({f"all_modules.{9 - int(k.split('.')[1])}.x" if "9" in k else k: t for k, t in tensors.items()},
               tmp_path / "a.pth")  # fmt: skip
    torch.save({**tensors, "all_modules.3.Conv_9.weight": torch.zeros(1)}, tmp_path / "b.pth")
    for name, message in (("a.pth", "DDPM"), ("b.pth", r"1 tensors differ from those of DDPM\+\+: unexpected")):
        with pytest.raises(CheckpointError, match=message):
            convert.run(tmp_path / name, tmp_path / "o.safetensors")


def test_the_sampler_needs_its_process():
    edm = registry.build(registry.config_of("edm-unet", (3, 32, 32), 0, TINY, {}))
    with pytest.raises(UsageError, match="moves in the time of the VP-SDE and needs a model of precond vp"):
        edm.check_sampling(SamplingRecipe(sampler="euler-maruyama"))

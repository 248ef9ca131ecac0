"""DINOv2 and CLIP, small and with made-up weights, against the code that their published features come from."""

import dataclasses
import hashlib
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from ddo_cli.errors import CheckpointError, UsageError
from ddo_cli.metrics.extractors import vit, weights
from ddo_cli.metrics.extractors.dinov2 import DinoV2
from ddo_cli.metrics.extractors.select import select_extractor

SMALL = {"width": 64, "depth": 3, "heads": 2}


@pytest.fixture(autouse=True)
def _no_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for published in weights.PUBLISHED.values():
        monkeypatch.delenv(published.variable, raising=False)


def some_images(num: int = 2, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------------------------------
# DINOv2


@torch.no_grad()
def dino() -> DinoV2:
    network = DinoV2(**SMALL).eval()
    for number, (_, tensor) in enumerate(sorted(network.state_dict().items())):
        waves = (torch.arange(tensor.numel(), dtype=torch.float64) * (1 + 0.37 * number)).sin()
        tensor.copy_(waves.view(tensor.shape) * 0.3)
    return network


@pytest.fixture
def dino_file(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(vit, "DINOV2_SIZES", SMALL)
    torch.save(dino().state_dict(), tmp_path / "dino.pth")
    return tmp_path / "dino.pth"


def test_network_is_dinov2s():
    images = torch.arange(3 * 224 * 224, dtype=torch.float64).mul(0.01).cos().view(1, 3, 224, 224).float()
    with torch.no_grad():
        found = dino()(images)[0, :6]
    # DinoVisionTransformer of facebookresearch/dinov2 (b8931f7) with these weights, and interpolate_offset=0.1 as torch
    # hub's dinov2_vitl14 has it. With offset 0, the second is -0.162924.
    expected = torch.tensor([0.0, -0.16288349, -0.02980725, 0.18003684, 0.06183570, -0.25270328])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_large_network_has_the_published_tensors():
    with torch.device("meta"):
        state = DinoV2(**vit.DINOV2_SIZES).state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == 304_368_640  # of dinov2_vitl14_pretrain.pth


def test_trained_size_needs_no_resampling():
    network = dino()
    assert network._positions(37, 37) is network.pos_embed
    assert network._positions(16, 16).shape == (1, 1 + 16 * 16, 64)


def test_dinov2_extractor(dino_file, tmp_path):
    extractor = select_extractor("fd_dinov2", str(dino_file))
    assert (extractor.key, extractor.num_features, extractor.is_published) == ("fd_dinov2", 64, False)
    images = some_images(size=96)
    seen = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True)
    assert seen.max() > 255  # bicubic overshoots, and EDM2 does not clamp
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    with torch.no_grad():
        expected = dino()((seen / 255 - mean) / std)
    torch.testing.assert_close(extractor(images), expected, rtol=1e-5, atol=1e-5)
    grey = images[:, :1]
    torch.testing.assert_close(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))
    save_file(dino().half().state_dict(), tmp_path / "half.safetensors")
    half = select_extractor("fd_dinov2", str(tmp_path / "half.safetensors"), precision="bf16")
    assert half.network.cls_token.dtype == torch.float32
    assert half.name == extractor.name + "-bf16"
    assert half.content_sha256 != extractor.content_sha256


def test_dinov2_resizes_with_antialiasing(dino_file):
    extractor = select_extractor("fd_dinov2", str(dino_file))
    seen = []
    extractor.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(224).expand(1, 3, 448, 448)
    extractor(stripes)
    grey = (torch.tensor([0.5, 0.5, 0.5]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(seen[0][0, :, 100, 100], grey, rtol=0, atol=0.05)  # torch-fidelity's is -2 or 2 here


def test_other_networks_are_no_vit_l(dino_file, tmp_path, monkeypatch):
    state = dino().state_dict()
    for change in ({"register_tokens": torch.zeros(1, 4, 64)}, {"norm.weight": torch.zeros(32)}):
        torch.save({**state, **change}, tmp_path / "other.pth")
        with pytest.raises(CheckpointError, match=r"does not fit DINOv2 ViT-L/14"):
            select_extractor("fd_dinov2", str(tmp_path / "other.pth"))
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"size mismatch|Missing key"):
        select_extractor("fd_dinov2", str(dino_file))


# ---------------------------------------------------------------------------------------------------------------------
# CLIP

CLIP_SMALL = {"width": 64, "layers": 1, "patch": 32, "features": 24}


class Archive(nn.Module):
    """A published file's content: the image tower, and of the text tower what gives the number of features."""

    def __init__(self):
        super().__init__()
        from torch_fidelity.feature_extractor_clip import CLIPVisual

        torch.manual_seed(0)
        self.visual = CLIPVisual(24, 224, 1, 64, 32).visual
        self.text_projection = nn.Parameter(torch.randn(8, 24))
        self.ln_final = nn.LayerNorm(8)

    def forward(self, x):
        return self.visual(x)


@pytest.fixture
def clip_archive(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(vit, "CLIP_SIZES", CLIP_SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(Archive().eval(), torch.randn(1, 3, 224, 224)).save(tmp_path / "clip.pt")
    return tmp_path / "clip.pt"


def publish(path: Path, monkeypatch) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(weights.PUBLISHED, "fd_clip", dataclasses.replace(weights.PUBLISHED["fd_clip"], sha256=digest))


def test_clip_is_torch_fidelitys(clip_archive, tmp_path, monkeypatch):
    from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP

    publish(clip_archive, monkeypatch)
    warnings.simplefilter("ignore")  # of theirs
    theirs = FeatureExtractorCLIP("clip-vit-b-32", ["clip"], feature_extractor_weights_path=str(clip_archive))
    rng = torch.random.get_rng_state()
    ours = select_extractor("fd_clip", str(clip_archive))
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert (ours.name, ours.key, ours.num_features, ours.is_published) == ("clip-vit-b-32", "fd_clip", 24, True)
    (expected,) = theirs(some_images())
    torch.testing.assert_close(ours(some_images()), expected, rtol=1e-5, atol=1e-6)
    assert expected.std() > 1e-2
    save_file({k: v.contiguous() for k, v in Archive().state_dict().items()}, tmp_path / "copy.safetensors")
    copy = select_extractor("fd_clip", str(tmp_path / "copy.safetensors"))
    torch.testing.assert_close(copy(some_images()), expected, rtol=1e-5, atol=1e-6)
    assert copy.protocol() == ours.protocol()


def test_unknown_archives_are_not_opened(clip_archive, monkeypatch):
    """TorchScript is code, which the published hash vouches for, and nothing else does."""

    opened = []
    monkeypatch.setattr(torch.jit, "load", lambda *_args, **_options: opened.append(True))
    with pytest.raises(CheckpointError, match=r"clip\.pt.* refused: it unpacks to .*as \.safetensors"):
        select_extractor("fd_clip", str(clip_archive))
    assert not opened


def test_other_clips(clip_archive, tmp_path, monkeypatch):
    state = Archive().state_dict()
    for change in (
        {"text_projection": torch.zeros(8, 25)},
        {"visual.conv1.weight": torch.zeros(64, 3, 16, 16)},
        {"visual.ln_post.bias": torch.zeros(3)},
    ):
        save_file({k: v.contiguous() for k, v in {**state, **change}.items()}, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match=r"does not fit CLIP ViT-B/32"):
            select_extractor("fd_clip", str(tmp_path / "other.safetensors"))
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit CLIP ViT-B/32 \('visual\.conv1\.weight' is missing\)"):
        select_extractor("fd_clip", str(tmp_path / "other.safetensors"))


def test_sizes_of_the_published_clip():
    from torch_fidelity.feature_extractor_clip import CLIPVisual

    sizes = vit.CLIP_SIZES
    with torch.device("meta"):
        network = CLIPVisual(sizes["features"], vit.SIZE, sizes["layers"], sizes["width"], sizes["patch"])
    assert sum(p.numel() for p in network.parameters()) == 87_849_216  # of CLIP ViT-B/32's image tower
    found = vit._clip_sizes({**network.state_dict(), "text_projection": torch.zeros(512, 512)})
    assert found == sizes


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


@pytest.mark.parametrize("metric", ["fd_dinov2", "fd_clip"])
def test_no_fallback(metric):
    with pytest.raises(CheckpointError, match=r"there are no weights of .*`curl -L -o"):
        select_extractor(metric)
    with pytest.raises(UsageError, match=rf"mine\.safetensors has no effect with the metric '{metric}'"):
        select_extractor(metric, extractor="mine.safetensors")

"""Published files are recognised by their shapes, and everything else is refused with a reason."""

import pytest
import torch
from conftest import CPU
from test_adm_encoder import TINY, classifier, head, states, tiny_classifier, tiny_discriminator

from ddo_cli import checkpoint
from ddo_cli.errors import CheckpointError
from ddo_cli.models.adm.published import Told
from ddo_cli.models.discriminators import files as dg_files
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.models.discriminators.adm_encoder import PUBLISHED


def hollow(build, path) -> str:
    """A .pt file of a network's full shapes that holds one number per tensor."""
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in build().state_dict().items()}
    torch.save({key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}, path)
    return str(path)


def header_of(config, kind="classifier"):
    return {"kind": kind, "config": config, "process": discriminators.PROCESS}


@pytest.mark.parametrize("state", PUBLISHED)
def test_published_classifiers(state, tmp_path):
    found = dg_files.read(hollow(lambda: classifier(*state), tmp_path / "c.pt"))
    channels, side = state
    assert (found.kind, found.config["name"], found.config["num_classes"]) == ("classifier", "adm-classifier", 1000)
    assert found.config["shape"] == [channels, side, side]
    options, published = found.config["options"], PUBLISHED[state]
    assert (options["width"], options["depth"], options["num_head_channels"]) == (128, published["depth"], 64)
    assert tuple(options["channel_mult"]) == published["channel_mult"]
    assert options["attention"] == [s for s in (32, 16, 8) if s <= side]
    assert options["time"] == ("cosine" if side == 64 else "linear")


def trunk_header(path, state) -> str:
    """A classifier's file that holds a header only."""
    channels, side = state
    config = discriminators.config_of("classifier", "adm-classifier", (channels, side, side), 1000, PUBLISHED[state])
    checkpoint.save(path, {"empty": torch.zeros(1)}, header_of(config))
    return str(path)


def test_published_discriminators(tmp_path):
    pixels, latents = (trunk_header(tmp_path / f"{c}.safetensors", (c, 32)) for c in (3, 4))
    plain = hollow(lambda: head(512, 0), tmp_path / "discriminator_60.pt")
    found = dg_files.read(plain, trunk=pixels, num_classes=10)
    assert (found.kind, found.config["name"]) == ("discriminator", "adm-discriminator")
    assert (found.config["shape"], found.config["num_classes"]) == ([3, 32, 32], 0)  # it ignores labels
    assert len(found.tensors) == 71
    assert all(key.startswith("head.") for key in found.tensors)
    conditional = hollow(lambda: head(384, 1000), tmp_path / "discriminator_7.pt")
    found = dg_files.read(conditional, trunk=latents, num_classes=1000)
    assert (found.config["shape"], found.config["num_classes"], len(found.tensors)) == ([4, 32, 32], 1000, 72)
    assert found.config["options"]["label_rows"] == 1000
    with pytest.raises(CheckpointError, match=r"384 channels; name with --trunk the classifier .*32x32 of 4 channels"):
        dg_files.read(conditional, num_classes=1000)
    with pytest.raises(CheckpointError, match=r"features of shape \(384, 8, 8\), the classifier .* \(512, 8, 8\)"):
        dg_files.read(conditional, trunk=pixels, num_classes=1000)
    with pytest.raises(CheckpointError, match="is told labels"):
        dg_files.read(conditional, trunk=latents)


def test_what_is_read_computes_what_was_written(tmp_path):
    options = {**TINY, "width": 64, "num_head_channels": 64}
    made = tiny_classifier(tmp_path / "c.safetensors", **options)
    original = discriminators.load("classifier", made, CPU).network
    torch.save(original.state_dict(), tmp_path / "c.pt")
    found = dg_files.read(tmp_path / "c.pt")
    checkpoint.save(tmp_path / "again.safetensors", found.tensors, header_of(found.config))
    again = discriminators.load("classifier", tmp_path / "again.safetensors", CPU).network
    x, t = states()
    assert torch.equal(again(x, t), original(x, t))
    trunk = str(tmp_path / "again.safetensors")
    _, network = tiny_discriminator(trunk, 5, width=64, num_head_channels=64)
    torch.save(network.head.state_dict(), tmp_path / "d.pt")
    found = dg_files.read(tmp_path / "d.pt", trunk=trunk, num_classes=5)
    same = discriminators.build("discriminator", found.config)
    same.load_state_dict(found.tensors)
    label = torch.tensor([0, 4, -1])
    assert torch.equal(same(x, t, label), network(x, t, label))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"a": torch.zeros(1)}}, "not a bare state dict"),
        ([torch.zeros(1)], "not a bare state dict"),
        ({"a": torch.zeros(1)}, "lacks time_embed.0.weight"),
        (object(), r"refused: it names '__builtin__\.object'"),
    ],
)
def test_other_files(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        dg_files.read(tmp_path / "x.pt")


def test_damaged_files(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(CheckpointError, match="does not exist"):
        dg_files.read(path)
    for content in (b"", b"<html>quota exceeded</html>"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="download it again"):
            dg_files.read(path)
    hollow(lambda: head(512, 0), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="download it again"):
        dg_files.read(path)


def test_a_state_dict_of_other_shapes(tmp_path):
    path = hollow(lambda: head(512, 0), tmp_path / "x.pt")
    tensors = torch.load(path, weights_only=True)
    del tensors["middle_block.1.norm.weight"]
    torch.save(tensors, path)
    with pytest.raises(CheckpointError, match="fit no configuration"):
        dg_files.read(path)


def test_what_a_classifier_s_file_does_not_tell(tmp_path):
    path = hollow(lambda: classifier(3, 64, depth=1, width=64), tmp_path / "c.pt")
    assert dg_files.read(path).assumed == {"head_channels": 64, "schedule": "cosine", "steps": 1000}
    told = Told(head_channels=32, schedule="linear", steps=4000, rescale=True, size=64, updown=True)
    found = dg_files.read(path, told=told)
    assert found.assumed == {}
    options = found.config["options"]
    assert (options["num_head_channels"], options["time"]) == (32, "linear")
    assert (options["steps"], options["rescaled_steps"]) == (4000, True)
    for told, message in (
        (Told(steps=4000), r"does not tell rescale=true\|false"),
        (Told(head_channels=24), "are no multiples of head_channels=24; tell"),
        (Told(size=32), "size=32 contradicts its tensors, which have size=64"),
        (Told(scale_shift=False), "scale_shift=false contradicts its tensors, which have scale_shift=true"),
        (Told(heads=4), "is a classifier, of which .*head_channels.* can be told; leave heads out"),
    ):
        with pytest.raises(CheckpointError, match=message):
            dg_files.read(path, told=told)
    plain = hollow(lambda: head(512, 0), tmp_path / "d.pt")
    with pytest.raises(
        CheckpointError, match="is a discriminator, of which head_channels can be told; leave steps out"
    ):
        dg_files.read(plain, told=Told(steps=1000))
    narrow = hollow(lambda: classifier(3, 64, depth=1, width=96, num_head_channels=32), tmp_path / "n.pt")
    with pytest.raises(CheckpointError, match="are no multiples of head_channels=64; tell the head_channels"):
        dg_files.read(narrow)
    assert dg_files.read(narrow, told=Told(head_channels=32)).config["options"]["width"] == 96

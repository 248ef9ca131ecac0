"""`ddo convert`: published files -> ours, told apart, verified, refused."""

import json

import pytest
import torch
from conftest import CPU, make_checkpoint
from test_adm_encoder import TINY, tiny_classifier, tiny_discriminator
from test_foreign import (  # noqa: F401
    KINDS,
    OWN_ADM,
    network,
    official,
    official_tensors,
    persistent,
    pickled_network,
    random_model,
    write,
)

from ddo_cli import checkpoint
from ddo_cli.engines.sampling import guide_sample, sample
from ddo_cli.engines.weights import convert
from ddo_cli.errors import CheckpointError, UsageError
from ddo_cli.models import registry
from ddo_cli.models.adm import files as adm_files
from ddo_cli.models.adm import keys as adm_keys
from ddo_cli.models.adm import published as adm_published
from ddo_cli.models.adm.unet import AdmUnet, AdmUnetOptions
from ddo_cli.models.discriminators import registry as discriminators


@pytest.fixture
def pickled(official, tmp_path):  # noqa: F811
    """An EDM pickle, and the model that it holds."""
    model = random_model()
    ema = network(official, official_tensors(model))
    return write(tmp_path / "edm.pkl", {"ema": ema, "augment_pipe": None}), model


def test_an_edm_pickle_is_converted_verified_and_sampled(pickled, tmp_path):
    path, model = pickled
    found = convert.run(path, tmp_path / "edm.safetensors", verify=True)
    assert (found["family"], found["kind"], found["shape"], found["verified"]) == ("edm", "model", [3, 8, 8], True)
    assert found["num_tensors"] == len(model.state_dict())
    assert found["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    header = checkpoint.read_header(tmp_path / "edm.safetensors", kind="model")
    assert header["sampling"] == {"sampler": "heun", "steps": 18}
    assert header["provenance"][0]["source"] == "edm.pkl"
    drawn = sample.run(str(tmp_path / "edm.safetensors"), range(2), tmp_path / "set", device=CPU)
    assert drawn["nfe"] == 35


@pytest.mark.parametrize(
    ("kind", "inner", "steps"), [("VPPrecond", "SongUNet", 18), ("iDDPMPrecond", "DhariwalUNet", 256)]
)
def test_what_is_told_of_an_edm_pickle(official, tmp_path, kind, inner, steps):  # noqa: F811
    content, model = pickled_network(official, kind, inner)
    found = convert.run(write(tmp_path / "a.pkl", content), tmp_path / "a.safetensors", verify=True)
    assert found["classes_found"] == f"{kind} around {inner}"
    assert (found["network"], found["num_classes"]) == (model_name(inner), 2)
    assert found["precond"] == KINDS[kind]
    assert found["sampling"]["steps"] == steps
    assert found["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert "note" not in found
    churn = {"s_churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}
    sampling = checkpoint.read_header(tmp_path / "a.safetensors")["sampling"]
    assert sampling == {"sampler": "heun", "steps": steps, **(churn if inner == "DhariwalUNet" else {})}


def model_name(inner):
    return {"SongUNet": "edm-unet", "DhariwalUNet": "adm-unet"}[inner]


def test_half_precision_is_said(official, tmp_path):  # noqa: F811
    ema = network(official, official_tensors(random_model()), constants={"use_fp16": True})
    found = convert.run(write(tmp_path / "a.pkl", {"ema": ema}), tmp_path / "a.safetensors", dry_run=True)
    assert "float16" in found["note"]


def random_adm(num_classes=2, **options):
    """A small ADM diffusion model and its .pt in OpenAI's names."""
    torch.manual_seed(0)
    chosen = {"precond": "ddpm", "learned_variance": True, **OWN_ADM, "width": 64, "group_channels": 1, **options}
    model = registry.build(registry.config_of("adm-unet", (3, 8, 8), num_classes, chosen, {}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def openai_file(model, path, order="legacy", dtype=torch.float32):
    tensors = model.state_dict().items()
    content = dict(adm_keys.to_openai(key, tensor, order, model.options) for key, tensor in tensors)
    torch.save({key: tensor.to(dtype) for key, tensor in content.items()}, path)
    return path


ADM_SETTINGS = ("schedule=linear", "size=8", "head_channels=64")


@pytest.mark.parametrize("order", ["legacy", "new"])
def test_an_adm_diffusion_model(tmp_path, order):
    model = random_adm()
    path = openai_file(model, tmp_path / "a.pt", order)
    settings = [f"qkv={order}", *ADM_SETTINGS]
    found = convert.run(path, tmp_path / "a.safetensors", settings=settings, verify=True)
    assert (found["family"], found["network"], found["num_classes"]) == ("adm", "adm-unet", 2)
    assert (found["precond"], found["learned_variance"], found["qkv"]) == ("ddpm", True, order)
    assert found["sampling"] == {"sampler": "ddpm", "steps": 250, "clip_denoised": True}
    again, _ = registry.load_model(tmp_path / "a.safetensors", CPU)
    x, sigma, label = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 3.0]), torch.tensor([1, -1])
    assert torch.equal(again.denoise(x, sigma, label), model.eval().denoise(x, sigma, label))
    # The other order fits every shape and is another function.
    other = {"legacy": "new", "new": "legacy"}[order]
    convert.run(path, tmp_path / "b.safetensors", settings=[f"qkv={other}", *ADM_SETTINGS])
    wrong, _ = registry.load_model(tmp_path / "b.safetensors", CPU)
    assert not torch.allclose(wrong.denoise(x, sigma, label), model.denoise(x, sigma, label), atol=1e-3)


def test_what_an_adm_file_does_not_tell(tmp_path):
    path, out = openai_file(random_adm(), tmp_path / "a.pt"), tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match=r"size=.*qkv=.*schedule=.*heads="):
        convert.run(path, out)
    settings = ["qkv=new", "schedule=cosine", "size=8", "heads=2"]
    found = convert.run(path, out, settings=settings, dry_run=True)
    assert (found["precond"], found["qkv"]) == ("cosine", "new")
    assert found["assumed"] == "steps=1000, predict_xstart=false, num_heads_upsample=-1"
    for wrong, message in (
        ("qkv=newer", r"write qkv=legacy\|new"),
        ("schedule=", r"write schedule=linear\|cosine"),
        ("size=x", "write size=<number>"),
        ("steps=0", "write steps=<number>"),
        ("steps=20", "steps=20: schedules have 21 to 100,000 steps"),
        ("heads=99999999", "write heads=<number>"),
        ("updown=no", r"write updown=true\|false"),
        ("siez=8", "did you mean 'size'"),
        ("nonsense", "known: arch, qkv"),
    ):
        with pytest.raises(UsageError, match=message):
            convert.run(path, out, settings=[wrong])
    with pytest.raises(UsageError, match="size is told twice"):
        convert.run(path, out, settings=[*settings, "size=16"])


@pytest.mark.parametrize("kinds", [{"updown": False}, {"scale_shift": False, "num_heads": 2}])
def test_adm_of_other_blocks_steps_and_heads(tmp_path, kinds):
    model = random_adm(precond="cosine", num_steps=400, rescaled_steps=True, **kinds)
    path = openai_file(model, tmp_path / "a.pt")
    settings = ["qkv=legacy", "schedule=cosine", "size=8", "steps=400", "rescale=true"]
    settings.append("heads=2" if "num_heads" in kinds else "head_channels=64")
    found = convert.run(path, tmp_path / "a.safetensors", settings=settings, verify=True)
    assert found["assumed"] == "predict_xstart=false, num_heads_upsample=-1"
    again, _ = registry.load_model(tmp_path / "a.safetensors", CPU)
    x, sigma, label = torch.randn(2, 3, 8, 8), torch.tensor([0.3, 3.0]), torch.tensor([1, -1])
    assert torch.equal(again.denoise(x, sigma, label), model.eval().denoise(x, sigma, label))
    assert len(again.precond.sigmas) == 400
    assert again.precond.coefficients(again.precond.sigmas[-1]).c_noise.item() == 399 * 2.5


def test_tensors_that_share_memory_are_told_apart(tmp_path):
    path = openai_file(random_adm(), tmp_path / "a.pt")
    content = torch.load(path, weights_only=True)
    first, second = [key for key, tensor in content.items() if tensor.shape == (64,)][:2]
    content[second] = content[first]
    torch.save(content, path)
    settings = ["qkv=legacy", *ADM_SETTINGS]
    assert convert.run(path, tmp_path / "a.safetensors", settings=settings, verify=True)["verified"]


def test_settings_are_for_adm_files(pickled, tmp_path):
    with pytest.raises(UsageError, match="tells its configuration itself"):
        convert.run(pickled[0], tmp_path / "x.safetensors", settings=["qkv=new"])


def test_the_upsampler_is_refused(tmp_path):
    entry = adm_published.PUBLISHED["64_256_upsampler.pt"]
    with torch.device("meta"):
        net = AdmUnet(6, 6, 256, 1000, AdmUnetOptions(**entry.options))
    hollow = {key: torch.zeros(()).expand(tensor.shape) for key, tensor in net.state_dict().items()}
    with pytest.raises(CheckpointError, match="is an upsampler"):
        adm_files.unet(hollow, tmp_path / "64_256_upsampler.pt")
    torch.save(hollow, tmp_path / "u.pt")
    with pytest.raises(CheckpointError, match="claim"):  # one number per tensor: hostile, so refused before
        convert.run(tmp_path / "u.pt", tmp_path / "x.safetensors")


def test_a_classifier_and_the_discriminator_on_it(tmp_path):
    options = {**TINY, "width": 64, "num_head_channels": 64}
    made = tiny_classifier(tmp_path / "c.safetensors", **options)
    torch.save(discriminators.load("classifier", made, CPU).network.state_dict(), tmp_path / "c.pt")
    found = convert.run(tmp_path / "c.pt", tmp_path / "classifier.safetensors", verify=True)
    assert (found["family"], found["kind"]) == ("adm", "classifier")
    trunk = str(tmp_path / "classifier.safetensors")
    _, made_network = tiny_discriminator(trunk, 0, width=64, num_head_channels=64)
    torch.save(made_network.head.state_dict(), tmp_path / "d.pt")
    with pytest.raises(UsageError, match="say with --model"):
        convert.run(tmp_path / "d.pt", tmp_path / "d.safetensors", trunk=trunk)
    model = make_checkpoint(tmp_path / "m.safetensors")
    found = convert.run(tmp_path / "d.pt", tmp_path / "d.safetensors", trunk=trunk, model=model, verify=True)
    assert (found["family"], found["kind"], found["num_classes"]) == ("dg", "discriminator", 0)
    header = checkpoint.read_header(tmp_path / "d.safetensors", kind="discriminator")
    assert header["trained_on"]["model_sha256"] == checkpoint.load(model).sha256
    assert header["guidance"]["dg_weight"] == 2.0
    if tuple(found["shape"]) == (3, 32, 32):
        drawn = guide_sample.run(str(tmp_path / "d.safetensors"), None, range(2), tmp_path / "set", device=CPU)
        assert drawn["disc_nfe"] > 0


def test_the_same_line_again_finds_its_file(tmp_path, capsys):
    """... as where a process was killed right after it had written it; another file of the same name is refused."""
    path, out = openai_file(random_adm(), tmp_path / "a.pt"), tmp_path / "a.safetensors"
    settings = ["qkv=new", *ADM_SETTINGS]
    first = convert.run(path, out, settings=settings)
    content = out.read_bytes()
    assert convert.run(path, out, settings=settings) == first
    assert "is finished; nothing to do" in capsys.readouterr().err
    for settings in (["qkv=legacy", *ADM_SETTINGS], ["qkv=new", "schedule=cosine", *ADM_SETTINGS[1:]]):
        with pytest.raises(UsageError, match=r"a\.safetensors exists and holds something else"):
            convert.run(path, out, settings=settings)
    with pytest.raises(UsageError, match="exists and holds something else"):
        convert.run(openai_file(random_adm(width=128), tmp_path / "b.pt"), out, settings=settings)
    assert out.read_bytes() == content


def test_files_that_cannot_be_converted(pickled, tmp_path):
    path, _ = pickled
    (tmp_path / "taken.safetensors").write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"taken\.safetensors exists"):
        convert.run(path, tmp_path / "taken.safetensors")
    assert (tmp_path / "taken.safetensors").read_bytes() == b"precious"
    with pytest.raises(UsageError, match="does not exist"):
        convert.run(tmp_path / "none.pkl", tmp_path / "x.safetensors")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="junk"):
        convert.run(tmp_path / "junk.pt", tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=r"taken\.safetensors is no file of published weights; give a \.pkl, \.pt or"):
        convert.run(tmp_path / "taken.safetensors", tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match=r"x\.pkl would be taken for a file of another format; name it x\.safetensors"):
        convert.run(path, tmp_path / "x.pkl")
    assert convert.run(path, tmp_path / "x.safetensors", dry_run=True)["dry_run"]
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("option", ["model", "trunk"])
def test_what_belongs_to_discriminators_is_refused_elsewhere(pickled, tmp_path, option):
    path, _ = pickled
    with pytest.raises(UsageError, match=f"--{option} is for discriminators, and .* holds a model; leave it out"):
        convert.run(path, tmp_path / "x.safetensors", **{option: "some.safetensors"})


def test_a_hostile_pickle_runs_nothing_and_exits_with_2(ddo, tmp_path):
    marker = tmp_path / "ran"
    code = f"cos\nsystem\n(S'touch {marker}'\ntR."
    (tmp_path / "evil.pkl").write_bytes(code.encode())
    done = ddo("convert", "evil.pkl", "--out", "x.safetensors", "--json", code=2)
    assert "os.system" in json.loads(done.stdout)["error"]["message"]
    assert not marker.exists()

"""The ADM encoder and DG's published discriminator, against numbers computed with the official modules.

Origin of every golden number: the modules of openai/guided-diffusion at 22e0df8 and alsdudrla10/DG at 1a152b7, on the
CPU in float32, with weights from the rule of `fill`; std is the population's.
"""

import hashlib
import zlib

import numpy as np
import pytest
import torch
from conftest import CPU
from torch.testing import assert_close

from ddo_cli import checkpoint
from ddo_cli.diffusion import guidance, vp_sde
from ddo_cli.diffusion.churn import Boost
from ddo_cli.diffusion.trace import Trace
from ddo_cli.engines.sampling import guides
from ddo_cli.errors import CheckpointError, RecipeError
from ddo_cli.models import registry
from ddo_cli.models.adm.layers import cosines_and_sines
from ddo_cli.models.adm.published import Told
from ddo_cli.models.discriminators import files as dg_files
from ddo_cli.models.discriminators import registry as discriminators
from ddo_cli.models.discriminators.adm_encoder import PUBLISHED, AdmClassifier
from ddo_cli.models.discriminators.adm_head import AdmHead
from ddo_cli.models.discriminators.on_trunk import TrunkDiscriminator
from ddo_cli.recipe.schema import GuidanceRecipe, SamplingRecipe
from ddo_cli.rng import RowRng

T = torch.tensor([0.1, 0.6], dtype=torch.float64)
GOLDEN = {"atol": 2e-5, "rtol": 2e-5}  # sums of up to 4608 float32 products, in another order

# state (channels, side) -> keys, parameters, digest
CLASSIFIER_TABLE = {
    (3, 32): (255, 47_771_112, "2bc7e15451589225"),
    (4, 32): (159, 20_832_488, "0f5f8987a23256a7"),
    (3, 64): (307, 65_438_568, "396fdbdd8fe8469f"),
    (3, 128): (221, 42_568_040, "17a295211f77efb8"),
    (3, 256): (249, 54_096_360, "45ff8351dfa42a32"),
    (3, 512): (281, 54_448_360, "c63bec1296488c9d"),
}
# feature channels, rows of the label embedding -> keys, parameters, digest
HEAD_TABLE = {
    (512, 0): (71, 2_883_841, "4a3cce811107b4e1"),
    (512, 1000): (72, 3_395_841, "8d83861b2965f384"),
    (384, 1000): (72, 3_248_385, "192d020ca78240c6"),
    (384, 0): (71, 2_736_385, "53ad478051f5a0a0"),
}


def fill(shape, seed: int) -> torch.Tensor:
    """Numbers in [-1, 1) that every language can make: murmur3's finaliser of row-major index + seed. float64."""
    h = np.arange(int(np.prod(shape)), dtype=np.uint32) + np.uint32(seed)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        h ^= h >> np.uint32(shift)
        h *= np.uint32(factor)
    h ^= h >> np.uint32(16)
    return torch.from_numpy(h / 2.0**31 - 1).reshape(shape)


def filled(build):
    """The module that `build` makes, with every parameter from its name."""
    with torch.device("meta"):
        module = build()
    state = {}
    for key, tensor in module.state_dict().items():
        u = fill(tensor.shape, zlib.crc32(key.encode()))
        is_vector = tensor.dim() == 1
        u = u * 0.1 + key.endswith(".weight") if is_vector else u * (3 / tensor[0].numel()) ** 0.5
        state[key] = u.float()
    module.load_state_dict(state, assign=True)
    return module.requires_grad_(False)


def given(*shape) -> torch.Tensor:
    return fill(shape, zlib.crc32(b"input")).float()


def classifier(channels: int, side: int, **changes) -> AdmClassifier:
    options = {"in_channels": channels, "size": side, "num_outputs": 1000, **PUBLISHED[channels, side], **changes}
    return AdmClassifier(**options)


def head(channels: int, num_labels: int, **changes) -> AdmHead:
    return AdmHead(in_channels=channels, size=8, num_outputs=1, channel_mult=(1,), num_labels=num_labels, **changes)


def table_of(module) -> tuple[int, int, str]:
    state = module.state_dict()
    lines = sorted(f"{key} {'x'.join(map(str, tensor.shape)) or 'scalar'}" for key, tensor in state.items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
    return len(state), sum(tensor.numel() for tensor in state.values()), digest


def test_the_fill_rule():
    assert zlib.crc32(b"input") == 3626513111
    expected = torch.tensor([-1, -0.364802275, -0.617530462, 0.046408195], dtype=torch.float64)
    assert_close(fill((4,), 0), expected, atol=6e-10, rtol=0)  # half a digit
    first = fill((512, 128), zlib.crc32(b"time_embed.0.weight"))[0, :3] * (3 / 128) ** 0.5
    assert_close(first, torch.tensor([-0.1355, 0.1095, 0.1179]).double(), atol=6e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Names and shapes


@pytest.mark.parametrize("state", PUBLISHED)
def test_classifiers_have_the_published_names_and_shapes(state):
    with torch.device("meta"):
        assert table_of(classifier(*state)) == CLASSIFIER_TABLE[state]


@pytest.mark.parametrize("features", HEAD_TABLE)
def test_discriminators_have_the_published_names_and_shapes(features):
    with torch.device("meta"):
        assert table_of(head(*features)) == HEAD_TABLE[features]


def test_the_options_defaults_are_the_published_ones():
    for (channels, side), settings in PUBLISHED.items():
        shape = (channels, side, side)
        config = discriminators.config_of("classifier", "adm-classifier", shape, 1000, settings)
        with torch.device("meta"):
            network = discriminators.build("classifier", config)
            assert table_of(network) == CLASSIFIER_TABLE[channels, side]
        assert network.time == ("cosine" if side == 64 else "linear")


# ---------------------------------------------------------------------------------------------------------------------
# Values


def test_time_embedding():
    found = cosines_and_sines(torch.tensor([0.0, 7.0], dtype=torch.float64), 4)
    angles = [7, 7 / 100]  # frequencies 1 and 10000 ** -0.5
    expected = [[1, 1, 0, 0], [*np.cos(angles), *np.sin(angles)]]
    assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_the_pixel_discriminator_s_logits():
    features = given(2, 512, 8, 8)
    unconditional, conditional = filled(lambda: head(512, 0)), filled(lambda: head(512, 1000))
    label = torch.tensor([3, 7])
    assert_close(unconditional(features, T, label), torch.tensor([-0.3765240, -0.3931221]), **GOLDEN)
    assert_close(conditional(features, T, label), torch.tensor([-0.3921314, -0.3850112]), **GOLDEN)


def test_the_latent_extractor_and_its_discriminator():
    extractor = filled(lambda: classifier(4, 32))
    features = extractor.features(given(2, 4, 32, 32), T)
    assert features.shape == (2, 384, 8, 8)
    assert_close(features.mean().item(), 0.2023895, **GOLDEN)
    assert_close(features.std(correction=0).item(), 2.3947767, **GOLDEN)
    assert_close(features[0, 0, 0, :4], torch.tensor([2.146893, 2.752600, 2.832327, 2.667399]), **GOLDEN)
    logits = filled(lambda: head(384, 1000))(features, T, torch.tensor([3, 999]))
    assert_close(logits, torch.tensor([-0.4900784, -0.5938695]), **GOLDEN)


@pytest.fixture(scope="module")
def pixel_extractor():
    return filled(lambda: classifier(3, 32))


def test_the_pixel_extractor(pixel_extractor):
    x = given(2, 3, 32, 32)
    features = pixel_extractor.features(x, T)
    assert features.shape == (2, 512, 8, 8)
    assert_close(features.mean().item(), 0.0340013, **GOLDEN)
    assert_close(features.std(correction=0).item(), 3.6770568, **GOLDEN)
    assert_close(features[0, 0, 0, :4], torch.tensor([-2.380788, -2.811846, -3.268786, -1.672806]), **GOLDEN)
    assert_close(features[1, 511, 7, 4:], torch.tensor([2.070258, 2.884611, 2.752283, 2.443317]), **GOLDEN)
    logits = pixel_extractor(x, T)
    assert_close(logits.std(correction=0).item(), 0.5629492, **GOLDEN)
    assert_close(logits[0, :4], torch.tensor([-1.072169, 0.117196, -0.563918, 0.006145]), **GOLDEN)


GUIDANCE = {  # sigma -> log-ratio, norms of G, first four values of G, which is -sigma^2 times our direction
    (0.5, 0.5): (
        (-0.5469567, -0.5273002),
        (0.0157815, 0.0153337),
        (1.07405e-4, 1.09011e-5, -2.62505e-4, -2.60127e-5),
    ),
    (5.0, 6.0): ((-0.6226236, -0.6517352), (1.18014, 1.75399), (0.00612213, 0.0112997, -0.0112134, 0.00132085)),
}


@pytest.mark.parametrize("sigma", GUIDANCE)
def test_the_guidance_term(pixel_extractor, sigma):
    log_ratio, norms, values = (torch.tensor(numbers) for numbers in GUIDANCE[sigma])
    discriminator = TrunkDiscriminator(pixel_extractor, filled(lambda: head(512, 0)), "", (512, 8, 8))
    x = 1.5 * fill((2, 3, 32, 32), zlib.crc32(b"input"))
    value, direction = guidance.climb(discriminator, x, torch.tensor(sigma), torch.tensor([-1, -1]))
    assert_close(value, log_ratio, **GOLDEN)
    assert direction.dtype == torch.float64
    found = -direction.float()  # the published code adds G / sigma to the slope (x - D) / sigma
    assert_close(found.flatten(1).norm(dim=1), norms, rtol=2e-5, atol=0)
    assert_close(found[0, 0, 0, :4], values, rtol=1e-4, atol=1e-5 * norms[0].item())
    # One small step along the direction raises the logit by |direction|^2 / sigma^2 times its length.
    step = 1e-3 * x.norm() / direction.norm() * direction
    higher, _ = guidance.climb(discriminator, x + step, torch.tensor(sigma), torch.tensor([-1, -1]))
    assert (higher > value).all()


def test_the_64x64_extractor():
    extractor = filled(lambda: classifier(3, 64, time="linear"))  # the golden numbers name the network's own time
    x = given(2, 3, 64, 64)
    features = extractor.features(x, T)
    assert_close(features.mean().item(), 0.3513658, **GOLDEN)
    assert_close(features.std(correction=0).item(), 4.1373498, **GOLDEN)
    assert_close(features[0, 0, 0, :4], torch.tensor([4.965103, 5.275868, 5.063508, 5.051003]), **GOLDEN)
    index = torch.tensor([100, 600], dtype=torch.float64)  # as OpenAI's own code counts time
    logits = extractor(x, index / 999)
    assert_close(logits.std(correction=0).item(), 0.5684604, **GOLDEN)
    assert_close(logits[0, :4], torch.tensor([-0.739720, 0.330506, 0.692930, 0.306049]), **GOLDEN)


# head_channels, updown, scale_shift -> keys, parameters, digest; deviation, first four logits
OTHER_CLASSIFIERS = {
    (32, True, True): ((77, 381_834, "f9a05ffebace43c7"), 0.2740165, [0.452551, 0.395170, 0.309072, 0.354184]),
    (16, False, False): ((69, 335_306, "3c89a9347fff379a"), 0.2319736, [0.447183, 0.319238, 0.249685, 0.306191]),
}


@pytest.mark.parametrize("kind", OTHER_CLASSIFIERS)
def test_classifiers_of_other_heads_and_blocks(kind, tmp_path):
    """Through a file as the official code writes it."""
    head_channels, updown, scale_shift = kind
    options = {"width": 32, "depth": 1, "channel_mult": (1, 2), "attention": (8,), "num_head_channels": head_channels}
    kinds = {"updown": updown, "scale_shift": scale_shift}
    made = filled(lambda: AdmClassifier(in_channels=3, size=16, num_outputs=10, **options, **kinds))
    table, deviation, first = OTHER_CLASSIFIERS[kind]
    assert table_of(made) == table
    torch.save(made.state_dict(), tmp_path / "c.pt")
    told = Told(head_channels=head_channels, schedule="cosine", steps=500, rescale=True)
    found = dg_files.read(tmp_path / "c.pt", told=told)
    assert {key: found.config["options"][key] for key in kinds} == kinds
    assert (found.config["options"]["time"], found.config["options"]["steps"]) == ("cosine", 500)
    network = discriminators.build("classifier", found.config).requires_grad_(False)
    network.load_state_dict(found.tensors)
    logits = network.out(network.features_at(torch.tensor([50.0, 300.0]), given(2, 3, 16, 16)))  # told as 100 and 600
    assert_close(logits.std(correction=0).item(), deviation, **GOLDEN)
    assert_close(logits[0, :4], torch.tensor(first), **GOLDEN)
    assert_close(
        network.features_at(torch.tensor([499.0]), given(1, 3, 16, 16)),
        network.features(given(1, 3, 16, 16), vp_sde.time_of(torch.tensor([1e9], dtype=torch.float64))),
        rtol=1e-4,
        atol=1e-4,
    )  # cosine time 1


# ---------------------------------------------------------------------------------------------------------------------
# In the program: tiny networks

TINY = {"width": 32, "depth": 1, "channel_mult": [1, 2], "attention": [4], "num_head_channels": 32}
TINY_HEAD = {"width": 32, "depth": 1, "num_head_channels": 32, "label_rows": 12, "attention": [4]}


def tiny_classifier(path, **changes) -> str:
    config = discriminators.config_of("classifier", "adm-classifier", (3, 8, 8), 5, {**TINY, **changes})
    torch.manual_seed(0)
    network = randomised(discriminators.build("classifier", config))
    header = {"kind": "classifier", "config": config, "process": discriminators.PROCESS}
    checkpoint.save(path, network.state_dict(), header)
    return str(path)


def randomised(network):
    with torch.no_grad():
        for parameter in network.parameters():  # some start at zero
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return network


def tiny_discriminator(trunk: str, num_classes: int, **changes):
    options = {"trunk": trunk, **TINY_HEAD, **changes}
    config = discriminators.config_of("discriminator", "adm-discriminator", (3, 8, 8), num_classes, options)
    torch.manual_seed(1)
    return config, randomised(discriminators.build("discriminator", config))


def states(rows=3):
    g = torch.Generator().manual_seed(0)
    return torch.randn(rows, 3, 8, 8, generator=g), torch.linspace(0.05, 0.9, rows, dtype=torch.float64)


def test_a_discriminator_goes_through_its_file_without_the_trunk(tmp_path):
    trunk = tiny_classifier(tmp_path / "c.safetensors")
    config, network = tiny_discriminator(trunk, 5)
    assert all(key.startswith("head.") for key in network.state_dict())
    assert network.state_dict()["head.label_emb.weight"].shape == (12, 128)  # rows of the file, not of the model
    header = {"kind": "discriminator", "config": config, "process": discriminators.PROCESS, "guidance": {}}
    header["trained_on"] = {"model": "m.safetensors", "model_sha256": "0"}
    checkpoint.save(tmp_path / "d.safetensors", network.state_dict(), header)
    same = discriminators.load("discriminator", tmp_path / "d.safetensors", CPU).network
    x, t = states()
    label = torch.tensor([0, 4, -1])
    assert_close(same(x, t, label), network(x, t, label))
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(network(x, t, label).sum(), x)
    assert (gradient.flatten(1).norm(dim=1) > 0).all()  # through the trunk
    tiny_classifier(tmp_path / "c.safetensors", depth=2)
    with pytest.raises(CheckpointError, match="has changed since"):
        discriminators.load("discriminator", tmp_path / "d.safetensors", CPU)


def test_labels_are_seen_only_by_a_conditional_discriminator(tmp_path):
    trunk = tiny_classifier(tmp_path / "c.safetensors")
    x, t = states()
    for num_classes, differ in ((5, True), (0, False)):
        network = tiny_discriminator(trunk, num_classes)[1].requires_grad_(False)
        seen = [network(x, t, torch.full((3,), label)) for label in (-1, 0, 4)]
        for one, other in ((0, 1), (1, 2)):
            assert torch.equal(seen[one], seen[other]) != differ
    with pytest.raises(RecipeError, match="label_rows = 12 must be at least the number of classes, 13"):
        tiny_discriminator(trunk, 13)


def test_cosine_time_reaches_the_classifier_and_the_head(tmp_path):
    trunks = [tiny_classifier(tmp_path / f"{time}.safetensors", time=time) for time in ("linear", "cosine")]
    linear, cosine = (tiny_discriminator(trunk, 0)[1].requires_grad_(False) for trunk in trunks)
    assert cosine.head.time == "cosine"
    x, _ = states(2)
    t = torch.tensor([0.1, 0.5], dtype=torch.float64)
    t_cosine = torch.tensor([0.202562048, 0.817109478], dtype=torch.float64)  # of DG's official module
    label = torch.full((2,), -1)
    assert_close(cosine(x, t, label), linear(x, t_cosine, label))
    assert not torch.allclose(cosine(x, t, label), linear(x, t, label), rtol=1e-3)


STEP = [999, 666, 333, 0]  # original indices of four steps of 1000


@pytest.mark.parametrize(
    ("model", "options", "told"),
    [
        ("ddpm", {"steps": 1000}, STEP),
        ("cosine", {"steps": 1000, "time": "cosine"}, STEP),
        ("ddpm", {"steps": 4000}, [3999, 2671, 1335, 3]),  # the nearest of its own steps
        ("ddpm", {"steps": 500, "rescaled_steps": True}, [497, 332, 166, 0]),  # `features_at` rescales
        ("ddpm", {}, None),  # trained at all times
        ("edm", {"steps": 1000}, None),  # a model of no steps
    ],
)
def test_a_classifier_is_told_the_step_of_a_model_of_steps(tmp_path, monkeypatch, model, options, told):
    path = tiny_classifier(tmp_path / "c.safetensors", **options)
    unet = {"width": 32, "channel_mult": [1], "num_blocks": 1, "attention": [], "num_head_channels": 32}
    base = registry.build(registry.config_of("adm-unet", (3, 8, 8), 5, {**unet, "precond": model}, {})).eval()
    seen, features_at = [], AdmClassifier.features_at

    def spy(self, step, x_vp, label=None):
        seen.append(float(step[0]))
        return features_at(self, step, x_vp, label)

    monkeypatch.setattr(AdmClassifier, "features_at", spy)
    guided = base.guided_by(guides.other_guides(guides.Others(classifier=path), base, CPU)[0])
    spec = SamplingRecipe(sampler="ddpm", steps=4, spacing="vp" if model == "edm" else None)
    with torch.no_grad():
        guided.sample(torch.tensor([0, 3]), RowRng([0, 1]), spec)
    if told is None:
        told = (999 * vp_sde.time_of(base.sigmas(spec)[:-1])).tolist()
    assert seen == pytest.approx(told, abs=1e-9)


@pytest.mark.parametrize(("model", "sampler"), [("ddpm", "ddpm"), ("ddpm", "ddim"), ("edm", "heun")])
def test_one_pass_of_the_classifier_serves_both_guides(tmp_path, monkeypatch, model, sampler):
    """The samples of two guides, and in the discriminator's window half the passes; below it the classifier's alone."""
    path = tiny_classifier(tmp_path / "c.safetensors", steps=1000)
    unet = {"width": 32, "channel_mult": [1], "num_blocks": 1, "attention": [], "num_head_channels": 32}
    unet |= {"precond": model, "learned_variance": sampler == "ddpm"}
    base = registry.build(registry.config_of("adm-unet", (3, 8, 8), 5, unet, {})).eval()
    network = tiny_discriminator(path, 5)[1].requires_grad_(False)
    network.head.out[2].c_proj.weight.mul_(20)
    guide = guides.discriminator_guide(network, GuidanceRecipe(dg_weight=1.5, time_min=0.3), base)
    others = guides.Others(classifier=path, classifier_weight=2.0)
    inner, _ = guides.other_guides(others, base, CPU)
    calls, features_at = [], AdmClassifier.features_at
    monkeypatch.setattr(
        AdmClassifier, "features_at", lambda *args, **more: (calls.append(1), features_at(*args, **more))[1]
    )
    spec, label = SamplingRecipe(sampler=sampler, steps=6), torch.tensor([0, 3])
    both, chains = guides.joined(inner, others, guide, network, base), []
    for every in ([*inner, guide], both, inner):
        calls.clear()
        with torch.no_grad():
            drawn = base.guided_by(every).sample(label, RowRng([0, 1]), spec)
        assert drawn.disc_nfe == len(calls)
        chains.append((base.guided_by(every), drawn.disc_nfe))
    (two, twice), (one, once), (plain, least) = chains
    assert once == least < twice
    for level in (0.1, 1.0, 2.0, 20.0):  # the window begins at 1.3
        sigma = base.precond.round_sigma(torch.tensor(level, dtype=torch.float64))
        x = given(2, 3, 8, 8).double() * (1 + sigma**2).sqrt()
        with torch.no_grad():
            a, b, c = (chain.steered(label, SamplingRecipe(), Trace())(x, sigma) for chain in (one, two, plain))
        assert_close(a, b, rtol=0, atol=1e-5 * level)
        assert ((b - c).abs().max() > 1e-3 * level) == (level > 1.3)
    boosted = guide._replace(boost=Boost())
    assert guides.joined(inner, others, boosted, network, base) == [*inner, boosted]


def test_a_trunk_keeps_the_time_of_dgs_code(tmp_path):
    """Continuous, 999 t: also where the classifier was trained at steps."""
    at_steps, at_times = (tiny_classifier(tmp_path / f"{s}.safetensors", steps=s) for s in (1000, None))
    x, t = states()
    label = torch.full((3,), -1)
    found, expected = (
        tiny_discriminator(path, 0)[1].requires_grad_(False)(x, t, label) for path in (at_steps, at_times)
    )
    assert torch.equal(found, expected)


def test_a_row_does_not_depend_on_its_batch(tmp_path):
    network = tiny_discriminator(tiny_classifier(tmp_path / "c.safetensors"), 5)[1].requires_grad_(False)
    x, t = states()
    label = torch.tensor([0, 4, -1])
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1], label[i : i + 1]) for i in range(3)])
    assert_close(network(x, t, label), alone)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 8, 4), {}, "square"),
        (
            (3, 6, 6),
            {"channel_mult": [1, 2, 4]},
            "side 6 must be a multiple of 4, which follows from its options channel_mult: `ddo data SRC",
        ),
        ((3, 8, 8), {"width": 24}, "must be multiples of 32"),
        ((3, 8, 8), {"channel_mult": [0.25], "attention": []}, "multiples of num_head_channels"),
        ((3, 8, 8), {"dept": 1}, "did you mean 'depth'"),
        ((3, 8, 8), {**TINY, "steps": 12}, "must be two or more, finite, positive and increasing"),
    ],
)
def test_sizes_that_do_not_divide(shape, options, message):
    with pytest.raises(RecipeError, match=message):
        discriminators.build("classifier", discriminators.config_of("classifier", "adm-classifier", shape, 10, options))

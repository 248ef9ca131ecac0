"""VAR: values of the official program, exact likelihood, sampling."""

import itertools

import pytest
import torch
from test_edm_unet import check
from torch.testing import assert_close
from var_models import SMALL_VAE, TINY_VAE, build, filled, tiny_tokenizer, truth

from ddo_cli.errors import CheckpointError, DataError, RecipeError, UsageError
from ddo_cli.generation import labels_of
from ddo_cli.likelihood import repeat_draw
from ddo_cli.models import registry
from ddo_cli.models.tokens import Cache, sampled_log_prob
from ddo_cli.models.var import layers as var_blocks
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng

# Mean, standard deviation, first four and last two values of the official program in float32, on the same numbers.
LOGITS = {
    False: (-0.1011686, 0.9255694, -0.855638, -0.0833698, -1.28374, -2.06692, -0.1003, 0.344711),
    True: (0.002556649, 0.9659388, 0.183487, -0.713531, -0.119463, 0.405903, 0.0921376, -1.78212),
}
IMAGES = {
    False: (0.4847034, 0.2520939, 0.520707, 0.512511, 0.81858, 0.71349, 0.649729, 0.507668),
    True: (0.4822899, 0.2539793, 0.583923, 0.544828, 0.659108, 0.559254, 0.649659, 0.509446),
}
GREEDY = {
    False: [63, *[45] * 4, *[35] * 9, 58, 35, 28, 28, 60, 45, 35, 28, 60, 35, 45, 28, 60, 35, 35, 28],
    True: [19, *[10] * 4, *[16] * 9, *[16] * 16],
}
LABEL = torch.tensor([3, 7])
SPECS = {
    "plain": SamplingRecipe(),
    "temperature": SamplingRecipe(temperature=0.7),
    "top_k": SamplingRecipe(top_k=2),
    "top_p": SamplingRecipe(top_p=0.6),
    "guided": SamplingRecipe(cfg_scale=2.0),
    "all": SamplingRecipe(temperature=1.3, top_k=2, top_p=0.8, cfg_scale=1.5),
}


@pytest.fixture(scope="module")
def models():
    return {shared: filled(shared) for shared in (False, True)}


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@torch.no_grad()
def test_values_equal_the_official_ones(models, shared):
    model = models[shared]
    check(model.logits(truth(), LABEL), LOGITS[shared])
    # The official run's cfg is 1.5.
    sampled = model.sample(LABEL, RowRng([0, 1]), SamplingRecipe(cfg_scale=2.5, top_k=1))
    assert sampled.x[0].tolist() == GREEDY[shared]
    vae = model.vqvae
    images = vae.decoder(vae.post_quant_conv(vae.quantize.f_hat(sampled.x))).clamp(-1, 1)
    check((images + 1) / 2, IMAGES[shared])
    assert torch.equal(model.codec.decode(sampled.x), ((images + 1) / 2 * 255).to(torch.uint8))


def swap(model, order):
    """The six modulation vectors of every block in another order."""
    for block in model.blocks:
        for tensor in (block.adaln.weight, block.adaln.bias):
            rows = tensor.data.unflatten(0, (6, -1))
            rows.copy_(rows[order].clone())


def no_level_of_the_first(model):
    model.position.data[:, 0] -= model.level_embedding.weight[0]


def head_shift_first(model):
    for tensor in (model.head.adaln.weight, model.head.adaln.bias):
        tensor.data.copy_(tensor.data.roll(len(tensor) // 2, 0))


@pytest.mark.parametrize(
    "change",
    [
        lambda model, patch: swap(model, [0, 1, 4, 5, 2, 3]),  # shifts before scales
        lambda model, patch: swap(model, [2, 3, 0, 1, 4, 5]),  # scales before gates
        lambda model, patch: no_level_of_the_first(model),
        lambda model, patch: head_shift_first(model),
        lambda model, patch: patch.setattr(var_blocks, "LARGEST_SCALE", 1.0),
        lambda model, patch: patch.setattr(var_blocks, "NORM_EPS", 1e-2),
        lambda model, patch: setattr(model.blocks[0].attn, "l2_norm", False),
        lambda model, patch: setattr(model, "level", model.level.clamp(max=2)),  # the last two scales seen together
    ],
    ids=["shift before scale", "gates last", "first token", "head order", "clamp", "eps", "norm", "mask"],
)
@torch.no_grad()
def test_other_readings_give_other_logits(change, monkeypatch):
    model = filled()
    change(model, monkeypatch)
    found = model.logits(truth(), LABEL).flatten()
    found = torch.stack([found.mean(), *found[:4], *found[-2:]])
    expected = torch.tensor([LOGITS[False][0], *LOGITS[False][2:]])
    assert (found - expected).abs().max() > 1e-4


def test_the_scale_of_queries_is_limited():
    model = filled()
    scale = model.blocks[0].attn.log_scale
    with torch.no_grad():
        scale.fill_(50.0)
        limited = model.logits(truth(), LABEL)
        scale.fill_(torch.tensor(100.0).log())
        assert torch.equal(model.logits(truth(), LABEL), limited)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_probabilities_of_all_sequences_add_up_to_one(spec):
    model = build()
    x = torch.tensor(list(itertools.product(range(3), repeat=5)))
    for label in (-1, 0, 2):
        log_p = model.log_density(x, torch.full((len(x),), label), spec)
        # float32 logits of 243 sequences
        assert_close(log_p.exp().sum(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-5, atol=0)


@torch.no_grad()
def test_log_density_of_plain_sampling_is_the_likelihood():
    model = build(draw={"label_dropout": 0.0})
    x, label = torch.randint(3, (6, 5), generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, -1, 0, 1])
    assert_close(model.log_density(x, label, SPECS["plain"]).float(), model(x, label, model.draw(6, RowRng(range(6)))))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@torch.no_grad()
def test_cached_sampling_draws_from_teacher_forced_probabilities(models, spec):
    model, label = models[False], torch.tensor([0, 3, 9, -1])
    sampled = model.sample(label, RowRng(range(4)), spec)
    assert sampled.nfe == (8 if spec.cfg_scale else 4)
    uniform = RowRng(range(4)).rand((30,), dtype=torch.float64)
    logits = model.logits(sampled.x, label)
    base = model.logits(sampled.x, torch.full_like(label, -1)) if spec.cfg_scale else None
    scale = 1 + ((spec.cfg_scale or 1.0) - 1) * model.level.to(torch.float64)[:, None] / 3
    cumulative = sampled_log_prob(logits, base, spec, scale).exp().cumsum(2)
    last = sampled.x[..., None]
    above = cumulative.gather(2, last)[..., 0]
    below = cumulative.gather(2, (last - 1).clamp(min=0))[..., 0] * (sampled.x > 0)
    assert (below - 1e-4 <= uniform).all()  # another order of float32 sums
    assert (uniform <= above + 1e-4).all()


def test_guidance_grows_from_nothing_at_the_first_scale(models):
    model, label = models[False], torch.tensor([0, 3])
    plain = model.sample(label, RowRng([5, 6]), SamplingRecipe()).x
    guided = model.sample(label, RowRng([5, 6]), SamplingRecipe(cfg_scale=9.0)).x
    assert torch.equal(plain[:, :1], guided[:, :1])
    assert not torch.equal(plain, guided)
    assert [model._cfg_scale(SamplingRecipe(cfg_scale=2.5), s) for s in range(4)] == [1.0, 1.5, 2.0, 2.5]


def test_without_guidance_the_unconditional_half_is_not_computed(models, monkeypatch):
    model, rows = models[False], []
    forward = model.head.forward
    monkeypatch.setattr(model.head, "forward", lambda h, c: rows.append(len(h)) or forward(h, c))
    model.sample(LABEL, RowRng([0, 1]), SamplingRecipe(cfg_scale=1.0))
    assert rows == [2] * 4
    rows.clear()
    model.sample(LABEL, RowRng([0, 1]), SamplingRecipe(cfg_scale=1.5))
    assert rows == [4] * 4


@pytest.mark.parametrize("spec", [SPECS["all"], SamplingRecipe(smooth=True)], ids=["tokens", "smooth"])
def test_a_row_does_not_depend_on_its_neighbours(models, spec):
    model, label = models[True], labels_of(range(7), 10)
    together = model.sample(label, RowRng(range(7)), spec).x
    for row in range(7):
        alone = model.sample(label[row : row + 1], RowRng([row]), spec).x
        if spec.smooth:
            assert_close(alone, together[row : row + 1], atol=1e-4, rtol=1e-4)
        else:
            assert torch.equal(alone, together[row : row + 1])


def test_samples_follow_the_density():
    model, n = build({**TINY_VAE, "vocabulary": 2}), 4000
    x = model.sample(torch.zeros(n, dtype=torch.int64), RowRng(range(n)), SPECS["guided"]).x
    images = torch.tensor(list(itertools.product(range(2), repeat=5)))
    expected = model.log_density(images, torch.zeros(32, dtype=torch.int64), SPECS["guided"]).exp()
    found = torch.bincount((x * torch.tensor([16, 8, 4, 2, 1])).sum(1), minlength=32) / n
    assert (found - expected).abs().max() < 5 * 0.5 / n**0.5  # 5 standard errors of a share, at most


def test_smooth_sampling_mixes_codes(models):
    model = models[False]
    sharp = model.sample(LABEL, RowRng([0, 1]), SamplingRecipe(smooth=True, top_k=1)).x
    tokens = model.sample(LABEL, RowRng([0, 1]), SamplingRecipe(top_k=1)).x
    with torch.no_grad():  # of one level there is nothing to mix
        assert_close(sharp, model.vqvae.quantize.f_hat(tokens), atol=1e-5, rtol=1e-5)
    mixed = model.sample(LABEL, RowRng([0, 1]), SamplingRecipe(smooth=True))
    assert model.codec.decode(mixed.x).shape == (2, 3, 64, 64)
    with pytest.raises(UsageError, match="smooth"):
        model.log_density(tokens, LABEL, SamplingRecipe(smooth=True))


def test_log_ratio_of_equal_weights_is_exactly_zero_and_its_gradient_is_not():
    model, ref = build(draw={"label_dropout": 0.5}), build(draw={"label_dropout": 0.5})
    x, label = torch.randint(3, (8, 5)), labels_of(range(8), 3)
    draw = repeat_draw(model.draw(4, RowRng(range(4))), 2)
    with torch.inference_mode():
        ref_prediction = ref.predict(x, label, draw)
    log_ratio = model(x, label, draw, ref_prediction.clone())
    assert log_ratio.shape == (8,)
    assert log_ratio.dtype == torch.float32
    assert (log_ratio == 0).all()
    log_ratio.sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("vqvae."):
            assert not parameter.requires_grad
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name


@torch.no_grad()
def test_log_ratio_is_the_difference_of_log_likelihoods():
    model, ref = build(), build(seed=1)
    x, label, draw = torch.randint(3, (4, 5)), torch.tensor([0, 1, 2, -1]), model.draw(4, RowRng(range(4)))
    log_ratio = model(x, label, draw, ref.predict(x, label, draw))
    assert_close(log_ratio, model(x, label, draw) - ref(x, label, draw), rtol=1e-4, atol=1e-5)
    assert log_ratio.abs().min() > 1e-3


@torch.no_grad()
def test_predictions_see_earlier_scales_and_the_label_only(models):
    model, x = models[False], truth()[:1]
    changed = x.clone()
    changed[0, 7] = (x[0, 7] + 1) % 64  # of the third scale, tokens 5 to 13
    same = (model.logits(x, LABEL[:1]) == model.logits(changed, LABEL[:1])).all(2)[0]
    assert same[:14].all()
    assert not same[14:].any()
    assert not (model.logits(x, LABEL[:1]) == model.logits(x, LABEL[1:])).all(2).any()


@torch.no_grad()
def test_dropped_rows_are_rows_without_label():
    model = build(draw={"label_dropout": 1.0})
    x, draw = torch.randint(3, (3, 5)), model.draw(3, RowRng(range(3)))
    assert draw.drop.all()
    found = model.predict(x, torch.tensor([0, 1, 2]), draw)
    assert torch.equal(found, model.predict(x, torch.full((3,), -1), draw))
    assert_close(found, model.logits(x, torch.full((3,), 3)).log_softmax(2).gather(2, x[..., None])[..., 0])  # last row


@torch.no_grad()
def test_drop_path_skips_layers_of_rows_in_pretraining_only():
    model = build(draw={"drop_path": 0.5})
    draw = model.draw(64, RowRng(range(64)))
    assert (draw.keep[:, 0] == 1).all()  # the first block is never skipped
    assert set(draw.keep[:, 1].flatten().tolist()) == {0.0, 2.0}
    assert torch.equal(model.draw(8, RowRng(range(8))).keep, draw.keep[:8])
    x, label = torch.randint(3, (64, 5)), labels_of(range(64), 3)
    plain, dropped = model.predict(x, label, draw), model.train().predict(x, label, draw)
    assert not model.vqvae.training
    assert not torch.equal(plain, dropped)
    gone = (draw.keep[:, 1] == 0).all(1)
    without = build(draw={"drop_path": 0.5})
    without.blocks[1].attn.out.weight.zero_(), without.blocks[1].attn.out.bias.zero_()
    without.blocks[1].fc2.weight.zero_(), without.blocks[1].fc2.bias.zero_()
    assert gone.any()
    assert_close(dropped[gone], without.eval().predict(x, label, draw)[gone])


@torch.no_grad()
def test_half_precision_changes_the_network_passes_only(models):
    model, x = models[False], truth()
    draw = model.draw(2, RowRng(range(2)))
    plain = model.predict(x, LABEL, draw)
    with torch.autocast("cpu", torch.bfloat16):
        half = model.predict(x, LABEL, draw)
        log_ratio = model(x, LABEL, draw, half)
        sampled = model.sample(LABEL, RowRng(range(2)), SPECS["guided"])
        images = model.codec.decode(sampled.x)
    assert half.dtype == torch.float32
    assert 1e-4 < (half - plain).abs().max() < 0.3
    assert (log_ratio == 0).all()
    assert torch.equal(images, model.codec.decode(sampled.x))


@torch.no_grad()
def test_keys_and_values_are_kept_in_the_type_of_attention(models, monkeypatch):
    """Which rounds them when they come in, once, to what it would make of them at every scale."""
    model, logits = models[False], []
    forward, caches = model.head.forward, model.caches
    monkeypatch.setattr(model.head, "forward", lambda h, c: logits.append(forward(h, c)) or logits[-1])
    assert model.caches(2, model.position[0])[0].key.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert {tensor.dtype for cache in model.caches(2, model.position[0]) for tensor in cache} == {torch.bfloat16}
        model.sample(LABEL, RowRng(range(2)), SPECS["guided"])
        own, wide = (
            list(logits),
            [Cache(*(t.to(torch.float32) for t in cache)) for cache in caches(4, model.position[0])],
        )
        monkeypatch.setattr(model, "caches", lambda rows, position: wide)
        logits.clear()
        model.sample(LABEL, RowRng(range(2)), SPECS["guided"])
    assert len(own) == len(logits) == 4
    assert all(torch.equal(a, b) for a, b in zip(own, logits, strict=True))


@torch.no_grad()
def test_items_are_images_or_tokens():
    model = build()
    images = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = model.codec.latents(images)
    assert (tokens.shape, tokens.dtype) == ((5, 5), torch.int16)
    assert model.codec.latent_shapes == ((5,),)
    assert model.codec.state_shape == (5,)
    for kind in (torch.int16, torch.uint8, torch.int64):
        assert torch.equal(model.codec.encode(tokens.to(kind)), model.codec.encode(images))
    assert model.codec.decode(model.codec.encode(images)).shape == images.shape
    with pytest.raises(DataError, match="0 to 2"):
        model.codec.prepare(torch.full((1, 5), 3), RowRng([0]))


def test_a_new_model_is_nearly_uniform_and_has_closed_gates():
    options = {"depth": 2, "vqvae": SMALL_VAE}
    model = registry.build(registry.config_of("var", (3, 64, 64), 10, options, {}))
    with torch.no_grad():
        spread = model.logits(truth(), LABEL).std()
    assert spread < 0.1
    gates, rest = model.blocks[0].adaln.weight[:256].std(), model.blocks[0].adaln.weight[256:].std()
    assert_close(rest / gates, torch.tensor(500.0), rtol=0.05, atol=0)
    assert model.heads == 2


@pytest.mark.parametrize(
    ("depth", "keys", "parameters"),
    [
        (16, 202, 310_283_520),
        (20, 250, 600_917_136),
        (24, 298, 1_033_399_360),
        (30, 370, 2_010_020_356),
        (36, 408, 2_353_893_904),
    ],
)
def test_full_sizes_have_the_published_numbers(depth, keys, parameters):
    large = {"patch_nums": [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]} if depth == 36 else {}
    options = {"depth": depth, "shared_adaln": depth == 36, "vqvae": large}
    side = 512 if large else 256
    with torch.device("meta"):
        model = registry.build(registry.config_of("var", (3, side, side), 1000, options, {}))
    own = {name: p.numel() for name, p in model.named_parameters() if not name.startswith("vqvae.")}
    assert (len(own), sum(own.values())) == (keys, parameters)
    assert model.heads == depth
    assert model.length == (2240 if large else 680)
    assert len(model.units()) == depth
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters


def test_weight_decay_spares_positions_levels_and_learned_scales():
    model = build(shared_adaln=True)
    spared = {name for name, p in model.named_parameters() if p.requires_grad and model.no_decay(name, p)}
    kept = {name for name, p in model.named_parameters() if p.requires_grad} - spared
    assert {"start", "position", "level_embedding.weight", "blocks.1.adaln", "blocks.0.attn.log_scale"} <= spared
    assert {"class_embedding.weight", "word.weight", "head.adaln.weight", "shared_adaln.weight"} <= kept
    assert not any(name.endswith("bias") for name in kept)
    assert all(name.endswith("weight") for name in kept)
    own = build()
    assert not own.no_decay("blocks.0.adaln.weight", own.blocks[0].adaln.weight)


def test_training_starts_with_a_tokenizer(tmp_path):
    with pytest.raises(RecipeError, match=r"model\.options\.tokenizer"):
        build().start_training()
    path = tiny_tokenizer(tmp_path / "a.safetensors", TINY_VAE, (3, 4, 4))
    model = build(tokenizer=path)
    model.start_training()
    stored = registry.build(registry.config_of("var", (3, 4, 4), 3, {**model.options.model_dump(), "depth": 1}, {}))
    stored.start_training()
    assert torch.equal(model.vqvae.quantize.embedding.weight, stored.vqvae.quantize.embedding.weight)
    assert not any(p.requires_grad for p in model.vqvae.parameters())
    with pytest.raises(CheckpointError, match="vocabulary"):
        build({**TINY_VAE, "vocabulary": 4}, tokenizer=path).start_training()


def test_mistakes_are_named():
    with pytest.raises(RecipeError, match="4x4"):
        build(shape=(3, 8, 8))
    with pytest.raises(RecipeError, match="heads"):
        build(heads=3)
    with pytest.raises(UsageError, match=r"sampling\.steps"):
        build().check_sampling(SamplingRecipe(steps=18))
    with pytest.raises(UsageError, match="cfg_scale"):
        build(num_classes=0).check_sampling(SamplingRecipe(cfg_scale=2.0))

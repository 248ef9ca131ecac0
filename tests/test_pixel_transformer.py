import itertools

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.testing import assert_close

from ddo_cli.errors import RecipeError, UsageError
from ddo_cli.generation import labels_of
from ddo_cli.likelihood import repeat_draw
from ddo_cli.models import registry
from ddo_cli.models.tokens import inverse_cdf, sampled_log_prob
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng

SPECS = {
    "plain": SamplingRecipe(),
    "temperature": SamplingRecipe(temperature=0.7),
    "top_k": SamplingRecipe(top_k=2),
    "top_p": SamplingRecipe(top_p=0.6),
    "guided": SamplingRecipe(cfg_scale=2.0),
    "all": SamplingRecipe(temperature=1.3, top_k=2, top_p=0.8, cfg_scale=1.5),
}


def build(shape=(1, 4, 4), num_classes=3, levels=5, label_dropout=0.0):
    """A model with random weights throughout: built ones start at the uniform distribution."""
    torch.manual_seed(0)
    options = {"levels": levels, "width": 16, "depth": 2, "heads": 2}
    draw = {"label_dropout": label_dropout}
    config = {"name": "pixel-transformer", "shape": shape, "num_classes": num_classes, "options": options, "draw": draw}
    model = registry.build(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def tokens(model, rows, seed=0):
    return torch.randint(model.options.levels, (rows, model.length), generator=torch.Generator().manual_seed(seed))


def sample_uncached(model, label, rng, spec):
    """Plain loops: the whole image goes through the network for every token of every row."""
    uniform = rng.rand((model.length,), dtype=torch.float64)
    x = torch.zeros(len(label), model.length, dtype=torch.int64)
    for row in range(len(label)):
        for i in range(model.length):
            logits = model.logits(x[row : row + 1], label[row : row + 1])[0, i]
            base = None
            if spec.cfg_scale is not None:
                base = model.logits(x[row : row + 1], torch.tensor([-1]))[0, i]
            total = 0.0
            for level, prob in enumerate(sampled_log_prob(logits, base, spec).exp().tolist()):
                total += prob
                if uniform[row, i] < total:
                    x[row, i] = level
                    break
    return x


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_probabilities_of_all_images_add_up_to_one(spec):
    model = build((1, 1, 2), levels=3)
    x = torch.tensor(list(itertools.product(range(3), repeat=2)))
    for label in (-1, 0, 2):
        log_p = model.log_density(x, torch.full((9,), label), spec)
        assert_close(log_p.exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_log_density_of_plain_sampling_is_the_likelihood():
    model = build()
    x, label = tokens(model, 6), torch.tensor([0, 1, 2, -1, 0, 1])
    draw = model.draw(6, RowRng(range(6)))
    assert_close(model.log_density(x, label, SPECS["plain"]).float(), model(x, label, draw))


def test_a_new_model_is_uniform():
    config = {"name": "pixel-transformer", "shape": (1, 8, 8), "num_classes": 10, "options": {}, "draw": {}}
    model = registry.build(config)
    assert 50_000 < sum(p.numel() for p in model.parameters()) < 150_000
    expected = torch.full((2,), -64 * torch.tensor(17.0).log().item(), dtype=torch.float64)
    # float32 logits: 64 terms with 1e-7 relative error each
    assert_close(
        model.log_density(tokens(model, 2), torch.tensor([3, -1]), SPECS["plain"]), expected, rtol=1e-6, atol=0
    )


def test_log_ratio_of_equal_weights_is_exactly_zero_and_its_gradient_is_not():
    model, ref = build(label_dropout=0.5), build(label_dropout=0.5)
    x, label = tokens(model, 8), labels_of(range(8), 3)
    draw = repeat_draw(model.draw(4, RowRng(range(4))), 2)
    with torch.inference_mode():
        ref_prediction = ref.predict(x, label, draw)
    log_ratio = model(x, label, draw, ref_prediction.clone())
    assert log_ratio.shape == (8,)
    assert log_ratio.dtype == torch.float32
    assert (log_ratio == 0).all()
    log_ratio.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())  # DDP wants every one used


def test_log_ratio_is_the_difference_of_log_likelihoods():
    model, ref = build(), build()
    nn.init.normal_(ref.head.bias)
    x, label, draw = tokens(model, 4), torch.tensor([0, 1, 2, -1]), model.draw(4, RowRng(range(4)))
    log_ratio = model(x, label, draw, ref.predict(x, label, draw))
    assert_close(log_ratio, model(x, label, draw) - ref(x, label, draw), rtol=1e-4, atol=1e-4)  # that cancels
    assert log_ratio.abs().min() > 0.1


def test_predictions_see_earlier_pixels_and_the_label_only():
    model = build()
    x = tokens(model, 1)
    changed = x.clone()
    changed[0, 5] = (x[0, 5] + 1) % 5
    same = (model.logits(x, torch.tensor([0])) == model.logits(changed, torch.tensor([0]))).all(2)[0]
    assert same[:6].all()
    assert not same[6:].any()
    assert not torch.equal(model.logits(x, torch.tensor([0]))[0, 0], model.logits(x, torch.tensor([1]))[0, 0])


def test_dropped_rows_are_rows_without_label():
    model = build(label_dropout=1.0)
    x, draw = tokens(model, 3), model.draw(3, RowRng(range(3)))
    assert draw.drop.all()
    assert torch.equal(model.predict(x, torch.tensor([0, 1, 2]), draw), model.predict(x, torch.full((3,), -1), draw))


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_cached_sampling_is_the_uncached_one(spec):
    model, label = build(), torch.tensor([0, 1, 2, -1])
    sampled = model.sample(label, RowRng(range(4)), spec)
    with torch.no_grad():
        assert torch.equal(sampled.x, sample_uncached(model, label, RowRng(range(4)), spec))
    assert sampled.nfe == (32 if spec.cfg_scale else 16)


def test_a_row_does_not_depend_on_its_neighbours():
    model, label = build(), labels_of(range(9), 3)
    together = model.sample(label, RowRng(range(9)), SPECS["all"]).x
    for row in range(9):
        assert torch.equal(model.sample(label[row : row + 1], RowRng([row]), SPECS["all"]).x, together[row : row + 1])


def test_samples_follow_the_density():
    model, n = build((1, 1, 2), levels=3), 4000
    x = model.sample(torch.zeros(n, dtype=torch.int64), RowRng(range(n)), SPECS["plain"]).x
    images = torch.tensor(list(itertools.product(range(3), repeat=2)))
    expected = model.log_density(images, torch.zeros(9, dtype=torch.int64), SPECS["plain"]).exp()
    found = torch.bincount(3 * x[:, 0] + x[:, 1], minlength=9) / n
    assert (found - expected).abs().max() < 5 * 0.5 / n**0.5  # 5 standard errors of a share, at most


def test_truncation_by_hand():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    keep = {
        "top_k=1": (SamplingRecipe(top_k=1), [1.0, 0, 0, 0]),
        "top_p below the first": (SamplingRecipe(top_p=0.2), [1.0, 0, 0, 0]),
        "top_p within the second": (SamplingRecipe(top_p=0.7), [0.625, 0.375, 0, 0]),
        "top_k then top_p of what is left": (SamplingRecipe(top_k=2, top_p=0.6), [1.0, 0, 0, 0]),
        "temperature": (SamplingRecipe(temperature=0.5), [0.25, 0.09, 0.0225, 0.0025]),
    }
    for name, (spec, expected) in keep.items():
        wanted = torch.tensor(expected, dtype=torch.float64)
        assert_close(sampled_log_prob(logits, None, spec).exp(), wanted / wanted.sum(), msg=name)


def test_truncation_equals_sorting_all_levels():
    logits, uniform = 2 * torch.randn(50, 300), torch.rand(50, dtype=torch.float64)
    spec = SamplingRecipe(top_k=60, top_p=0.9)
    prob, order = logits.to(torch.float64).sort(dim=-1, descending=True)
    prob = prob[:, :60].softmax(-1)
    prob = torch.where(prob.cumsum(-1) - prob < 0.9, prob, 0)
    expected = torch.zeros(50, 300, dtype=torch.float64).scatter(1, order[:, :60], prob / prob.sum(-1, keepdim=True))
    assert_close(sampled_log_prob(logits, None, spec).exp(), expected)
    tokens = inverse_cdf(sampled_log_prob(logits, None, spec), uniform)
    assert torch.equal(tokens, inverse_cdf(expected.log(), uniform))


def test_ties_with_the_last_level_are_kept():
    logits = torch.tensor([0.4, 0.2, 0.2, 0.2]).log()
    for spec in (SamplingRecipe(top_k=2), SamplingRecipe(top_p=0.5), SamplingRecipe(top_k=2, top_p=0.5)):
        assert_close(sampled_log_prob(logits, None, spec).exp(), logits.exp().to(torch.float64))
    assert_close(
        sampled_log_prob(logits, None, SamplingRecipe(top_k=2, top_p=0.4)).exp()[1:], torch.zeros(3).to(torch.float64)
    )


def test_guidance_raises_the_likelihood_of_the_condition():
    conditional, unconditional = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0])
    guided = sampled_log_prob(conditional, unconditional, SamplingRecipe(cfg_scale=2.0))
    assert_close(guided, torch.tensor([4.0, 0.0], dtype=torch.float64).log_softmax(0))


def test_items_survive_encoding():
    model = build((1, 8, 8), levels=17)
    items = (torch.arange(17).repeat(4)[:64] * 255 / 16).round().to(torch.uint8).view(1, 1, 8, 8)
    assert torch.equal(model.codec.encode(items)[0], torch.arange(17).repeat(4)[:64])
    assert torch.equal(model.codec.decode(model.codec.encode(items)), items)


def test_mistakes_are_named():
    with pytest.raises(RecipeError, match="grey images"):
        build((3, 8, 8))
    with pytest.raises(RecipeError, match="heads"):
        registry.build(
            {"name": "pixel-transformer", "shape": (1, 8, 8), "num_classes": 0, "options": {"heads": 5}, "draw": {}}
        )
    with pytest.raises(UsageError, match=r"sampling\.steps"):
        build().check_sampling(SamplingRecipe(steps=18))
    with pytest.raises(UsageError, match="cfg_scale"):
        build(num_classes=0).check_sampling(SamplingRecipe(cfg_scale=2.0))
    with pytest.raises(ValidationError):
        SamplingRecipe(top_p=1.5)

"""The table of published figures is the one that its readers would find in the papers; recipes name its rows."""

import re

import pytest

from ddo_cli.errors import RecipeError
from ddo_cli.metrics import published
from ddo_cli.metrics.published import rows
from ddo_cli.recipe import load as recipes

METRICS = {"fid", "sfid", "is", "precision", "recall", "fd_dinov2"}


def test_every_benchmark_has_figures():
    assert set(published.TABLE) == set(published.NAMES)
    for name, (protocol, figures) in published.TABLE.items():
        assert figures, name
        assert "50,000 images" in protocol
        assert "{" not in protocol
        assert len({(figure.method, figure.metric) for figure in figures}) == len(figures), name
        for figure in figures:
            assert figure.metric in METRICS
            assert re.fullmatch(r"\d{4}\.\d{5}", figure.arxiv)
            assert figure.value > 0
            assert figure.metric not in ("precision", "recall") or figure.value < 1


@pytest.mark.parametrize(
    ("benchmark", "metric", "method", "value", "nfe"),
    [
        ("cifar10-uncond", "fid", "EDM", 1.97, 35),
        ("cifar10-uncond", "fid", "EDM + DDO", 1.38, 35),
        ("cifar10-cond", "fid", "EDM + DG", 1.64, None),
        ("ffhq64", "fid", "EDM", 2.39, 79),
        ("celeba64", "fid", "DDPM++ with Soft Truncation + DG", 1.34, None),
        ("imagenet256", "fid", "SiT-XL/2, guidance 1.5", 2.06, 500),
        ("imagenet64", "fid", "EDM", 1.36, 511),
        ("imagenet64", "fid", "EDM2-S + DDO", 0.97, 63),
        ("imagenet64", "fid", "EDM2-S + autoguidance", 1.01, None),
        ("imagenet256", "sfid", "ADM-G + ADM-U", 6.14, None),
        ("imagenet256", "is", "DiT-XL/2, guidance 1.5", 278.24, None),
        ("imagenet256", "recall", "DiT-XL/2, guidance + DG", 0.64, None),
        ("imagenet512", "fid", "EDM2-XXL", 1.91, 63),
        ("imagenet512", "fd_dinov2", "EDM2-XXL + autoguidance", 24.18, None),
    ],
)
def test_figures(benchmark, metric, method, value, nfe):
    (found,) = [figure for figure in rows(benchmark, metric) if figure.method == method]
    assert (found.value, found.nfe) == (value, nfe)


def test_a_metric_without_figures_has_no_rows():
    assert rows("cifar10-cond", "kid") == []
    assert {figure.metric for figure in rows("imagenet512", "fd_dinov2")} == {"fd_dinov2"}
    with pytest.raises(KeyError):
        rows("mnist", "fid")


def test_a_guided_or_finetuned_model_is_better_than_its_base():
    """A swapped pair of digits would show: every method "X + Y" lies below X, of one benchmark and metric."""
    seen = 0
    for name in published.NAMES:
        for metric in ("fid", "fd_dinov2"):
            values = {figure.method: figure.value for figure in rows(name, metric)}
            for method, value in values.items():
                base = method.rpartition(" + ")[0]
                if base in values:
                    assert value < values[base], (name, method)
                    seen += 1
    assert seen > 15


def test_recipes_name_a_benchmark():
    named = {name: recipes.load(name).metric for name in recipes.recipe_names()}
    found = {name: metric.benchmark for name, metric in named.items() if metric.benchmark}
    assert found.keys() >= {"cifar10-uncond", "cifar10-cond", "ffhq64", "afhqv2-64", "imagenet64-adm"}
    for name, benchmark in found.items():
        assert rows(benchmark, named[name].name), f"{name} is scored by a metric that {benchmark} has no figures of"
    assert named["cifar10-small"].benchmark is None  # another extractor: nothing to compare with


@pytest.mark.parametrize(
    ("value", "match"),
    [("cifar10-unkond", r"did you mean 'cifar10-uncond'\?\); known: .*imagenet64"), ("7", "known: cifar10")],
)
def test_an_unknown_benchmark(value, match):
    with pytest.raises(RecipeError, match=match) as caught:
        recipes.load("quickstart", [f"metric.benchmark={value}"])
    assert "\n" not in str(caught.value)
    assert recipes.load("quickstart", ["metric.benchmark=null"]).metric.benchmark is None

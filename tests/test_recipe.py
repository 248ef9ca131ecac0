"""Recipes: every problem at once, the nearest name, values as given."""

import re

import pytest
import torch
import typer
import yaml
from typer.main import get_command

from ddo_cli import cli
from ddo_cli.engines.ddo.sweep import plan_of
from ddo_cli.engines.discriminator import train as train_disc
from ddo_cli.engines.pretrain import model as pretrain
from ddo_cli.errors import RecipeError, UsageError
from ddo_cli.models import registry
from ddo_cli.recipe import keys
from ddo_cli.recipe import load as recipes
from ddo_cli.recipe.load import load, parse_sampling, repeated
from ddo_cli.recipe.schema import Recipe, SamplingRecipe, all_keys
from ddo_cli.training import loop

NAMES = sorted(recipes.recipe_names())


def write(path, content):
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_all_problems_are_reported_together(tmp_path):
    path = write(
        tmp_path / "x.yaml",
        {"name": "x", "finetune": {"bach": 3, "alpha": -1.0, "beta": "high"}, "sampling": {"steps": 0}, "modle": {}},
    )
    with pytest.raises(RecipeError) as caught:
        load(path, ["finetune.lr=0", "nonsense"])
    message = str(caught.value)
    assert f"{path}: unknown key 'finetune.bach' (did you mean 'finetune.batch'?)" in message
    assert f"{path}: unknown key 'modle'" in message
    assert "finetune.alpha = -1.0: input should be greater than 0" in message
    assert "finetune.beta = 'high'" in message
    assert "sampling.steps = 0" in message
    assert "command line: finetune.lr = 0" in message
    assert "'nonsense' is not of the form" in message
    assert len(message.splitlines()) == 7


@pytest.mark.parametrize(
    ("override", "value"),
    [("finetune.lr=1e-4", 1e-4), ("finetune.lr=3.5E-5", 3.5e-5), ("finetune.lr=2", 2.0), ("finetune.lr=0.5", 0.5)],
)
def test_numbers_of_overrides(override, value):
    assert load("quickstart", [override]).finetune.lr == value


def test_a_dictionary_sets_the_keys_that_it_gives():
    """At any depth; keys that it does not give would fall to defaults without a word."""
    base = load("sd15-lora").finetune
    for override in ("finetune.adapter={rank: 4}", "finetune={adapter: {rank: 4}}", "finetune.adapter.rank=4"):
        found = load("sd15-lora", [override]).finetune
        assert found == base.model_copy(update={"adapter": base.adapter.model_copy(update={"rank": 4})})
    flow = load("digits16-flow", ["finetune.from_round={2: {lr: 1e-5}, 3: {beta: 1}}"]).finetune
    assert flow.from_round == {2: {"beta": 0.2, "lr": 1e-5}, 3: {"beta": 1}}
    options = load("quickstart").model.options
    assert load("quickstart", ["model.options={patch: 8}"]).model.options == {**options, "patch": 8}
    assert load("quickstart", ["model.options={}"]).model.options == {}
    assert repeated(["finetune.adapter={rank: 4}", "finetune.adapter.rank=8"], {}) == [
        "command line: finetune.adapter.rank is given twice, as finetune.adapter={rank: 4} and as "
        "finetune.adapter.rank=8; leave one out"
    ]


def test_counts_beyond_every_run():
    """They would end in a traceback, or never."""
    for override in ("finetune.rounds=1001", "finetune.images_per_round=10000000000000", f"pretrain.images={10**30}"):
        with pytest.raises(RecipeError, match=r"input should be less than or equal to 10+$"):
            load("quickstart", [override])
    with pytest.raises(UsageError, match=r"finetune.eval_every = 1 makes 15,\d{3} evaluations of .* steps, more than"):
        plan_of(load("quickstart", ["finetune.eval_every=1", "finetune.images_per_round=1000000"]), lambda _: 1)


def test_noise_levels_whose_powers_overflow():
    for override in ("sigma_max=1e300", "sigma_min=1e-300", "rho=1e300", "rho=1e-300"):
        with pytest.raises(RecipeError, match=r"input should be (less|greater) than or equal to"):
            parse_sampling([override], {})


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("lr=1e-4", "did you mean 'pretrain.lr' or 'finetune.lr' or"),  # the section is missing
        ("finetune.roundz=2", "did you mean 'finetune.rounds'"),
        ("sampling.step=2", "did you mean 'sampling.steps'"),
    ],
)
def test_nearest_key(override, hint):
    with pytest.raises(RecipeError, match=hint):
        load("quickstart", [override])


def test_flags_beat_the_file_and_none_leaves_it():
    found = load("quickstart", [], {"finetune.alpha": 2.5, "finetune.beta": None})
    assert found.finetune.alpha == 2.5
    assert found.finetune.beta == load("quickstart").finetune.beta


def test_integers_are_not_rounded_and_strings_not_converted():
    with pytest.raises(RecipeError, match=r"finetune\.rounds = 2\.5"):
        load("quickstart", ["finetune.rounds=2.5"])
    with pytest.raises(RecipeError, match=r"finetune\.rounds = '2'"):
        load("quickstart", ["finetune.rounds='2'"])


@pytest.mark.parametrize("section", ["data", "finetune", "pretrain"])
def test_a_name_where_none_belongs_is_an_unknown_key(section):
    with pytest.raises(RecipeError, match=rf"{section}\.name"):
        load("quickstart", [f"{section}={{name: mlp}}"])


def test_unknown_recipe_suggests():
    with pytest.raises(RecipeError, match="did you mean 'quickstart'"):
        load("quickstrt")


@pytest.mark.parametrize("text", ["- a list", "a: [unclosed", "\x00"])
def test_files_that_are_no_recipes(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"x\.yaml"):
        load(str(path))


def test_saved_recipe_reads_back(tmp_path):
    found = load("quickstart", ["finetune.lr=1e-5"])
    path = tmp_path / "saved.yaml"
    path.write_text(recipes.to_yaml(found))
    assert load(str(path)) == found


def test_keys_are_described():
    found = {key.name: key for key in keys.described()}
    assert sorted(found) == sorted(all_keys())
    assert found["pretrain.lr"] == ("pretrain.lr", "number", 1e-4, "Learning rate.")  # of the class it inherits from
    assert found["discriminator.lr"] == ("discriminator.lr", "number", 3e-4, "Learning rate.")  # with another default
    assert found["finetune.sharding"].type == "ddp | fsdp"
    assert found["data.num"].type == "integer | null"
    assert [name for name, key in found.items() if not key.meaning.endswith(".")] == []
    table = keys.markdown()
    for name, key in found.items():
        assert f"| `{name.rpartition('.')[2]}` | " in table, name
        assert key.meaning.replace("<", "&lt;") in table, name


def test_options_of_keys_are_the_schema_s():
    """Every option that stands for a key has its text in --help, and none is declared beside it."""
    context = {name: typer.Context(command) for name, command in get_command(cli.app).commands.items()}
    helps = {key.meaning for key in keys.described()}
    seen = {
        p.help for name, command in get_command(cli.app).commands.items() for p in command.get_params(context[name])
    }
    assert len(helps & seen) > 30
    for name in ("finetune-ddo", "train-disc", "pretrain", "train-classifier"):
        command = get_command(cli.app).commands[name]
        other = {p.name for p in command.get_params(context[name]) if p.help not in helps}
        assert other <= {
            "recipe",
            "overrides",
            "out",
            "device",
            "dry_run",
            "measure",
            "json_",
            "force",
            "log_to",
            "help",
        }


def test_differing_keys_name_both_values():
    ours, theirs = Recipe().model_dump(), Recipe(seed=3).model_dump()
    assert recipes.differing_keys(ours, theirs) == ["seed: 3 -> 0"]


def test_sampling_flags():
    assert parse_sampling(["sigma_max=20"], {"steps": 5, "sampler": None}) == {"steps": 5, "sigma_max": 20}
    with pytest.raises(RecipeError, match="did you mean 'sigma_max'"):
        parse_sampling(["sigma_mx=20"], {})
    with pytest.raises(RecipeError, match="steps = 0"):
        parse_sampling([], {"steps": 0})
    with pytest.raises(RecipeError, match="must be below"):
        parse_sampling(["sigma_max=1", "sigma_min=2"], {})


@pytest.mark.parametrize(
    ("text", "expected"), [("250", "250"), ("ddim25", "ddim25"), ("10,15,20", "10,15,20"), ("[10, 15]", "10,15")]
)
def test_respacing_is_a_text_however_yaml_reads_it(text, expected):
    given = parse_sampling([f"respacing={text}"], {})
    assert SamplingRecipe(steps=18).merged(**given).respacing == expected
    assert load("quickstart", [f"sampling.respacing={text}"]).sampling.respacing == expected


@pytest.mark.parametrize("text", ["2.5", "true", "ddim", "[]", "-3", "1,", "1000000"])
def test_respacing_that_is_none(text):
    with pytest.raises(RecipeError, match="respacing = "):
        parse_sampling([f"respacing={text}"], {})


def test_another_sampler_leaves_behind_what_only_edms_read():
    published = SamplingRecipe(sampler="heun", steps=256, s_churn=40.0, s_max=50.0, schedule="vp")
    found = published.merged(sampler="ddim")
    assert (found.steps, found.s_churn, found.s_max, found.schedule) == (256, None, None, None)
    assert published.merged(sampler="ddim", s_churn=3.0).s_churn == 3.0  # asked for: the model's check refuses it
    assert published.merged(sampler="euler").s_churn == 40.0
    assert published.merged(steps=5).s_churn == 40.0


def test_merged_sampling_keeps_what_is_not_given():
    assert SamplingRecipe(steps=4, rho=5.0).merged(steps=9, sampler=None) == SamplingRecipe(steps=9, rho=5.0)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_loads_and_its_model_builds(name):
    found = load(
        name, check=lambda recipe: registry.problems(recipe.model.name, recipe.model.options, recipe.model.draw)
    )
    assert found.name == name
    text = recipes.recipe_names()[name].read_text()
    assert text.startswith("# "), "the header says what the recipe is for"
    assert f"--recipe {name}" in text or "ddo finetune-ddo" in text, "the header gives the launch line"


@pytest.mark.parametrize(
    ("name", "shape", "num_classes", "parameters"),
    [
        ("cifar10-uncond", (3, 32, 32), 0, 55_733_891),
        ("cifar10-cond", (3, 32, 32), 10, 55_735_299),
        ("cifar10-uncond-dg", (3, 32, 32), 0, 55_733_891),
        ("cifar10-cond-dg", (3, 32, 32), 10, 55_735_299),
        ("ffhq64", (3, 64, 64), 0, 61_805_571),
        ("ffhq64-dg", (3, 64, 64), 0, 61_805_571),
        ("afhqv2-64", (3, 64, 64), 0, 61_805_571),
        ("imagenet64-adm", (3, 64, 64), 1000, 295_899_267),
        ("imagenet256-dit-xl", (3, 256, 256), 1000, 674_816_272),
        ("imagenet256-sit-xl", (3, 256, 256), 1000, 674_816_272),
        ("imagenet256-repa-xl", (3, 256, 256), 1000, 674_816_272),
        ("imagenet256-dit-dg", (3, 256, 256), 1000, 674_834_720),
        ("imagenet256-adm-dg", (3, 256, 256), 1000, 553_838_086),
        ("celeba64-st-dg", (3, 64, 64), 0, 61_804_419),
    ],
)
def test_recipes_of_published_models_build_their_networks(name, shape, num_classes, parameters):
    found = load(name)
    config = registry.config_of(found.model.name, shape, num_classes, found.model.options, found.model.draw)
    with torch.device("meta"):
        model = registry.build(config, found.finetune.draw)
    assert sum(p.numel() for p in model.parameters()) == parameters
    model.check_sampling(found.sampling)


@pytest.mark.parametrize("name", NAMES)
def test_launch_lines_share_batches_evenly(name, monkeypatch):
    """Among as many processes as the recipe's own lines start."""
    text = recipes.recipe_names()[name].read_text()
    per_node, nodes = re.findall(r"--nproc-per-node (\d+)", text), re.findall(r"--nnodes (\d+)", text)
    worlds = {1, *map(int, per_node), *(int(per_node[0]) * int(count) for count in nodes)}
    recipe = load(name)
    for world in worlds:
        monkeypatch.setenv("WORLD_SIZE", str(world))
        for number in range(1, recipe.finetune.rounds + 1):
            settings = recipe.finetune.of_round(number)
            assert loop.local_rows(settings.batch, settings.micro_batch)
        assert loop.local_rows(recipe.pretrain.batch, recipe.pretrain.micro_batch)


@pytest.mark.parametrize("name", [name for name in NAMES if load(name).data.source.startswith("embedded:")])
def test_embedded_recipes_run_dry(name, tmp_path):
    from conftest import CPU

    if name == "toy2d-dg":  # its model is analytic
        found = train_disc.run(load(name), tmp_path / "run", device=CPU, dry_run=True)
    else:
        found = pretrain.run(load(name), tmp_path / "run", device=CPU, dry_run=True, measure=False)
    assert found["parameters"] > 0
    assert not (tmp_path / "run").exists()

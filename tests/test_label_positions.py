"""Labels by the place of a seed in its list."""

import pytest
import torch
from conftest import CPU, KINDS, make_checkpoint, torchrun
from test_sample import content
from test_sampling_options import without_classes

from ddo_cli.data.samples import open_samples
from ddo_cli.engines.fid import inputs as fid_inputs
from ddo_cli.engines.sampling import sample
from ddo_cli.errors import RunError, UsageError
from ddo_cli.generation import generate
from ddo_cli.models import registry

GIVEN = [7, 3, 20, 1, 15, 4, 0, 9, 30, 31, 12, 13, 14, 2, 5, 6, 8, 10, 11, 16]
POSITION = {"labels": "position", "batch": 6, "steps": 2}


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "tiny.safetensors")


def settings_of(kind):
    return {key: value for key, value in POSITION.items() if key != "steps" or kind in ("diffusion", "edm2")}


@pytest.mark.parametrize("kind", KINDS)
def test_the_label_is_the_place_among_the_seeds(kind, tmp_path):
    ckpt = make_checkpoint(tmp_path / "m.safetensors", kind)
    sample.run(ckpt, GIVEN, tmp_path / "set", form="shards", sampling=settings_of(kind), device=CPU)
    found = open_samples(tmp_path / "set")
    assert found.seeds.tolist() == sorted(GIVEN)
    assert found.labels.tolist() == [GIVEN.index(seed) % 10 for seed in sorted(GIVEN)]
    assert found.labels.tolist() != [seed % 10 for seed in sorted(GIVEN)]
    # The items are those of the labels: another order draws others.
    model, file = registry.load_model(ckpt, CPU)
    spec = sample.spec_of(file, **settings_of(kind))
    (one,) = generate(model, GIVEN, spec, batch=6, only=[1])
    assert torch.equal(one.items, torch.from_numpy(found.items[6:12]))
    (other,) = generate(model, sorted(GIVEN), spec, batch=6, only=[1])
    assert not torch.equal(other.items, one.items)


def test_an_interrupted_set_goes_on_and_another_order_is_another_set(ckpt, tmp_path):
    sample.run(ckpt, GIVEN, tmp_path / "whole", form="shards", sampling=POSITION, device=CPU)
    sample.run(ckpt, GIVEN, tmp_path / "cut", form="shards", sampling=POSITION, device=CPU)
    (tmp_path / "cut" / "shard-000002.safetensors").unlink()
    sample.run(ckpt, GIVEN, tmp_path / "cut", form="shards", sampling=POSITION, device=CPU)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    with pytest.raises(RunError, match="seeds_as_given: 7,3,20,1,15,4,0,9,30-31,12-14,2,5-6,8,10-11,16 -> 0-16,20"):
        sample.run(ckpt, sorted(GIVEN), tmp_path / "whole", form="shards", sampling=POSITION, device=CPU)


def test_labels_by_position_that_cannot_be_are_refused(ckpt, tmp_path):
    def run(name=ckpt, num=20, **more):
        sample.run(name, range(num), tmp_path / "x", sampling={"labels": "position"}, device=CPU, dry_run=True, **more)

    with pytest.raises(UsageError, match=r"each of 10 classes the same number of images, and 25 seeds .*; draw 30"):
        run(num=25)
    with pytest.raises(UsageError, match="labels = position: --classes chooses them; leave it out"):
        run(classes=[1, 2])
    with pytest.raises(UsageError, match="labels = position: this model has no classes"):
        run(without_classes(tmp_path / "unconditional.safetensors"))
    with pytest.raises(UsageError, match="and 25 seeds are no multiple"):
        fid_inputs.open_sources(ckpt, 25, 1, {"labels": "position"}, CPU)
    run()


def test_a_score_knows_the_labels_by_position(ckpt):
    first, second = fid_inputs.open_sources(ckpt, 20, 2, {"labels": "position", "steps": 2}, CPU)
    assert first.labels.tolist() == second.labels.tolist() == [*range(10)] * 2
    model, _ = registry.load_model(ckpt, CPU)
    made = generate(model, second.seeds, second.spec, batch=20)
    assert torch.cat([batch.label for batch in made]).tolist() == second.labels.tolist()


def test_two_processes_draw_the_same_set(ckpt, tmp_path):
    sample.run(ckpt, GIVEN, tmp_path / "one", sampling=POSITION, device=CPU)
    options = ["--seeds", ",".join(map(str, GIVEN)), "--out", str(tmp_path / "two"), "--device", "cpu", "--json"]
    keys = [f"{key}={value}" for key, value in POSITION.items()]
    torchrun("-m", "ddo_cli", "sample", "--ckpt", ckpt, *options, *keys)
    assert content(tmp_path / "one") == content(tmp_path / "two")

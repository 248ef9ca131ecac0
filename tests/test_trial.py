"""A trial's memory: what it holds while a score is taken."""

import weakref
from types import SimpleNamespace

import torch
from torch import nn

from ddo_cli.engines.ddo.trial import Trial
from ddo_cli.training.loop import Evaluate


def test_averages_are_gone_while_they_are_scored(tmp_path):
    """Where weights are sharded nobody else holds them whole, and a score has a copy of its own."""
    scratch, given, found = nn.Linear(2, 2, bias=False), [], []

    def whole() -> dict[str, torch.Tensor]:
        tensor = torch.full((2, 2), 3.0)
        given.append(weakref.ref(tensor))
        return {"weight": tensor}

    def score(model, repeat, images=None):
        found.append((given[-1]() is None, float(model.weight.detach().sum())))
        return {"fd": 1.0}

    trial = Trial.__new__(Trial)
    trial.scoring = SimpleNamespace(key="fd", run=score, density=object())
    trial.settings, trial.steps = SimpleNamespace(ema_widths=[], patience=None), 8
    trial.networks = SimpleNamespace(scratch=scratch, header={"provenance": [{}]})
    trial.path, trial.file, trial.tags = tmp_path, tmp_path / "metrics.json", {}
    trial.candidates, trial.rungs, trial.diverged, trial.reached = {}, {}, {}, 0
    (tmp_path / "checkpoints").mkdir()
    averages = SimpleNamespace(whole=whole, further=lambda: iter(()))
    event = Evaluate(4, averages)
    trial._evaluate(event, is_last=True)
    assert (event.figures, event.picture) == ({"fd": 1.0}, None)
    assert (tmp_path / "checkpoints" / "step-000004.safetensors").is_file()
    assert found == [(True, 12.0)]

"""A node's memory: what it holds while a score is taken."""

import weakref
from types import SimpleNamespace

import torch
from torch import nn

from ddo_cli.engines.ddo.node import Node


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

    node = Node.__new__(Node)
    scoring = SimpleNamespace(key="fd", run=score)
    recipe = SimpleNamespace(finetune=SimpleNamespace(ema_widths=[]))
    node.shared = SimpleNamespace(scratch=scratch, scoring=scoring, header={"provenance": [{}]}, recipe=recipe)
    node.path, node.file, node.tags = tmp_path, tmp_path / "metrics.json", {}
    node.candidates, node.rungs, node.diverged, node.reached = {}, {}, {}, 0
    (tmp_path / "checkpoints").mkdir()
    assert node._keep_and_score(4, whole()) == "fd 1 at step 4"
    assert (tmp_path / "checkpoints" / "step-000004.safetensors").is_file()
    assert found == [(True, 12.0)]

"""Features of extractors on a GPU are those of a CPU."""

import pytest
import torch
from gpu_models import error
from random_inception import random_state

from ddo_cli.metrics.extractors.inception import InceptionExtractor
from ddo_cli.metrics.extractors.select import select_extractor

pytestmark = pytest.mark.gpu

IMAGES = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_the_embedded_extractor(device):
    there, here = select_extractor("fd_embedded", device=device), select_extractor("fd_embedded")
    assert error(there(IMAGES), here(IMAGES)) < 1e-5


def test_inception(device, record_property):
    here = InceptionExtractor(random_state(), "0" * 64)
    exact = here(IMAGES[:4])
    found = error(InceptionExtractor(random_state(), "0" * 64, device)(IMAGES[:4]), exact)
    record_property("error", found)
    assert found < 1e-4  # float32, without TF32, whatever surrounds it

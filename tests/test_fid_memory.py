"""What a pass of `ddo fid` holds in memory: nothing that grows with the images, but a few bytes for each."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("resource", reason="peak memory is read from the system")

# A network that costs nothing, with outputs for FID and IS. Prints what the pass added to the peak, in MB.
PASS = """
import resource, sys
import numpy as np, torch
from ddo_cli.data.stream import open_stream
from ddo_cli.engines.fid import one_pass
from ddo_cli.metrics.extractors.base import Extractor

class Pixels(Extractor):
    key, outputs, resize = "fid", ("pool", "logits"), "none"
    def _extract(self, images, outputs):
        x = images.flatten(1).float() / 255
        return {"pool": x[:, :64], "logits": x[:, :1008]}

def run(path):
    wanted = [one_pass.Wanted(Pixels("pixels", 64, "", "cpu"), moments=("pool",), score="torch-fidelity")]
    one_pass.run(open_stream(path), wanted, "", batch=64, workers=0, device=torch.device("cpu"))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

run(sys.argv[1])  # libraries warm up
before = peak()
run(sys.argv[2])
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_images(tmp_path):
    rng = np.random.default_rng(0)
    few, many = tmp_path / "few.npz", tmp_path / "many.npz"
    images = rng.integers(0, 256, (20_000, 32, 32, 3), dtype=np.uint8)  # 61 MB; their logits are 81 MB
    np.savez(few, images=images[:640])
    np.savez(many, images=images)
    del images
    done = subprocess.run(
        [sys.executable, "-c", PASS, str(few), str(many)], capture_output=True, text=True, timeout=120, check=True
    )
    assert float(done.stdout) < 20  # MB; 64 bytes of each image are 1.3

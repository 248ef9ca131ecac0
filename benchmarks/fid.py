"""`ddo fid` against torch-fidelity, and the Frechet distance against scipy's form, alternating. `run.py --only fid`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import scipy.linalg
import torch
from PIL import Image
from torch import Tensor

from ddo_cli.engines.fid import fid
from ddo_cli.metrics import frechet
from ddo_cli.metrics.extractors.inception import load_inception

NUM, REF_NUM = 192, 16  # images scored, and of the reference: both programs pass both through the network
REPEATS = 2  # a pass takes a minute on two cores
FEATURES = 2048
TESTS = Path(__file__).resolve().parent.parent / "tests"


class Cost(NamedTuple):
    """Wall-clock seconds, and CPU seconds of this process and its finished children."""

    wall: float
    cpu: float


def _now() -> Cost:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return Cost(time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in used))


def _cost(function: Callable[[], Any]) -> Cost:
    start = _now()
    function()
    end = _now()
    return Cost(end.wall - start.wall, end.cpu - start.cpu)


def _alternating(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[Cost]]:
    """The costs of each, measured in turn, so that a busy machine slows all alike."""
    costs: dict[str, list[Cost]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            costs[name].append(_cost(function))
    return costs


def _ratios(costs: dict[str, list[Cost]], slow: str, fast: str) -> str:
    """How many times faster `fast` is: the median over neighbouring measurements."""
    pairs = list(zip(costs[slow], costs[fast], strict=True))
    wall = statistics.median(a.wall / b.wall for a, b in pairs)
    cpu = statistics.median(a.cpu / b.cpu for a, b in pairs)
    return f"{wall:.2f} times faster, {cpu:.2f} in CPU time"


def _random_weights(path: Path) -> None:
    spec = importlib.util.spec_from_file_location("random_inception", TESTS / "random_inception.py")
    assert spec is not None, TESTS
    assert spec.loader is not None, TESTS
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.save(module.random_state(), path)


def _folder(path: Path, num: int, seed: int) -> str:
    """PNGs of 32 x 32 x 3, smooth with some noise, so that they compress about as pictures do."""
    rng = np.random.default_rng(seed)
    path.mkdir()
    for number in range(num):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(
            (32, 32), Image.Resampling.BICUBIC
        )
        pixels = np.asarray(coarse).astype(int) + rng.integers(-4, 5, (32, 32, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path / f"{number:06d}.png")
    return str(path)


@contextlib.contextmanager
def _timed(module: Any, names: tuple[str, ...], into: list[Cost]) -> Iterator[None]:
    """Appends the cost of every call of the module's functions `names`."""

    def timing(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            results: list[Any] = []
            into.append(_cost(lambda: results.append(function(*args, **options))))
            return results[0]

        return run

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(module, name, timing(getattr(module, name))))
        yield


def end_to_end() -> None:
    """FID and IS of PNG files by both, from opening the weight file to the figures."""
    import torch_fidelity
    import torch_fidelity.metrics

    with tempfile.TemporaryDirectory() as directory, mock.patch.dict(os.environ, {"DDO_CACHE": "off"}):
        root = Path(directory)
        weights = root / "weights.pth"
        _random_weights(weights)
        scored, ref = _folder(root / "scored", NUM, 0), _folder(root / "ref", REF_NUM, 1)
        figures: dict[str, tuple[float, float]] = {}
        distances: dict[str, list[Cost]] = {"ours": [], "theirs": []}

        def ours() -> None:
            options = fid.Options(metrics=("fid", "is"), weights=str(weights))
            with _timed(frechet, ("reference", "distance_to"), distances["ours"]):
                scores = fid.run(scored, ref, options, device=torch.device("cpu"))
            figures["ours"] = scores["fid"], scores["is"]

        def theirs() -> None:
            with _timed(torch_fidelity.metrics, ("fid_statistics_to_metric",), distances["theirs"]):
                scores = torch_fidelity.calculate_metrics(
                    input1=scored, input2=ref, fid=True, isc=True, cuda=False, batch_size=64, cache=False,
                    feature_extractor_weights_path=str(weights), verbose=False,
                )  # fmt: skip
            figures["theirs"] = scores["frechet_inception_distance"], scores["inception_score_mean"]

        costs = _alternating({"theirs": theirs, "ours": ours}, REPEATS)
        per_image = {name: _without(costs[name], distances[name]) for name in costs}
    speed = {name: NUM_PASSED / statistics.median(cost.wall for cost in costs[name]) for name in costs}
    print(
        f"ddo fid (FID and IS, {NUM_PASSED} PNGs of 32 x 32) against torch-fidelity, {torch.get_num_threads()} threads:"
    )
    print(
        f"  end to end {_ratios(costs, 'theirs', 'ours')} ({speed['ours']:.2f} against {speed['theirs']:.2f} images/s)"
    )
    print(f"  without the distance, as for many images: {_ratios(per_image, 'theirs', 'ours')}")
    apart = [abs(a / b - 1) for a, b in zip(figures["ours"], figures["theirs"], strict=True)]
    print(f"  figures differ by {apart[0]:.1e} (FID), {apart[1]:.1e} (IS) relative")


NUM_PASSED = NUM + REF_NUM


def _without(costs: list[Cost], parts: list[Cost]) -> list[Cost]:
    """The costs less those of their parts, which are in the same order and equally many for each."""
    each = len(parts) // len(costs)
    rest = []
    for number, whole in enumerate(costs):
        timed = parts[number * each : (number + 1) * each]
        rest.append(Cost(whole.wall - sum(part.wall for part in timed), whole.cpu - sum(part.cpu for part in timed)))
    return rest


def network() -> None:
    """The network alone, images to features and logits."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with tempfile.TemporaryDirectory() as directory:
        weights = Path(directory) / "weights.pth"
        _random_weights(weights)
        ours = load_inception(str(weights))
        theirs = FeatureExtractorInceptionV3(
            "theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
        )
    images = torch.randint(0, 256, (32, 3, 32, 32), dtype=torch.uint8)
    calls = {"theirs": lambda: theirs(images), "ours": lambda: ours.extract(images, ("pool", "logits"))}
    calls["ours"]()
    print(f"  the network alone: {_ratios(_alternating(calls, 3), 'theirs', 'ours')}")


def scipy_distance(mean: Tensor, cov: Tensor, ref_mean: Tensor, ref_cov: Tensor) -> float:
    """The usual form: the trace of the root of the product, which is not symmetric."""
    root = scipy.linalg.sqrtm(cov.numpy() @ ref_cov.numpy())
    return float((mean - ref_mean).square().sum() + cov.trace() + ref_cov.trace() - 2 * np.trace(np.real(root)))


def distance() -> None:
    """The Frechet distance of 2048 features from moments, with the reference's factor kept and without."""
    rng = torch.Generator().manual_seed(0)

    def moments() -> tuple[Tensor, Tensor]:
        x = torch.randn(2 * FEATURES, FEATURES, generator=rng, dtype=torch.float64)
        x = x * torch.logspace(0, -3, FEATURES, dtype=torch.float64) @ torch.linalg.qr(torch.randn(
            FEATURES, FEATURES, generator=rng, dtype=torch.float64))[0]  # fmt: skip
        return x.mean(0), x.T.cov()

    ref_mean, ref_cov = moments()
    mean, cov = moments()
    ref = frechet.reference(ref_mean, ref_cov)
    values: dict[str, float] = {}

    def kept() -> None:
        values["ours"] = frechet.distance_to(ref, mean, cov)

    def whole() -> None:
        frechet.frechet_distance(mean, cov, ref_mean, ref_cov)

    def theirs() -> None:
        values["theirs"] = scipy_distance(mean, cov, ref_mean, ref_cov)

    costs = _alternating({"theirs": theirs, "kept": kept, "whole": whole}, 2)
    print(f"Frechet distance of {FEATURES} features against scipy's sqrtm, {torch.get_num_threads()} threads:")
    print(f"  with the reference's factor kept {_ratios(costs, 'theirs', 'kept')}")
    print(f"  without it {_ratios(costs, 'theirs', 'whole')}")
    seconds = ", ".join(f"{name} {statistics.median(cost.wall for cost in costs[name]):.1f} s" for name in costs)
    print(f"  {seconds}; the values differ by {abs(values['ours'] / values['theirs'] - 1):.1e} relative")


def run() -> None:
    """All benchmarks of this file, the quickest first."""
    distance()
    end_to_end()
    network()


if __name__ == "__main__":
    run()

"""Published scores by benchmark, shown beside one's score: method, metric, value, arXiv number, network evaluations.

Taken from the papers or their repositories. Scores compare only within a protocol: EDM's and ADM's suites differ in the
port of Inception, the reference images and the choice among repeats.
"""

from typing import NamedTuple, get_args

from ddo_cli.recipe.schema import Benchmark

EDM = "2206.00364"
EDM2 = "2312.02696"
AUTOGUIDANCE = "2406.02507"
DDO = "2503.01103"
DG = "2211.17091"
ADM = "2105.05233"
DIT = "2212.09748"
VAR = "2404.02905"
SIT = "2401.08740"
REPA = "2410.06940"
CAFM = "2604.11521"
SOFT_TRUNCATION = "2106.05527"


class Figure(NamedTuple):
    """A published score. metric: as in `ddo fid`; nfe: network evaluations per image, if known."""

    method: str
    metric: str
    value: float
    arxiv: str
    nfe: int | None = None


class Published(NamedTuple):
    """The scores of a benchmark, and the protocol that measured them."""

    protocol: str
    figures: tuple[Figure, ...]


EDM_PROTOCOL = "50,000 images against EDM's statistics of the training set; of EDM the least of three seed ranges"
EDM2_PROTOCOL = "50,000 images against EDM2's statistics of the training set; of EDM2 the least of several seed ranges"
ADM_PROTOCOL = "50,000 images against VIRTUAL_{}, in ADM's evaluation suite"


def _suite(method: str, arxiv: str, nfe: int | None = None, **values: float) -> tuple[Figure, ...]:
    """Several metrics of a method; `is_` stands for "is"."""
    return tuple(Figure(method, key.rstrip("_"), value, arxiv, nfe) for key, value in values.items())


def _edm2(metric: str, values: str, suffix: str = "", arxiv: str = EDM2, nfe: int | None = 63) -> tuple[Figure, ...]:
    """Scores by model size of EDM2: "S 1.58, M 1.43"."""
    pairs = (pair.split() for pair in values.split(","))
    return tuple(Figure(f"EDM2-{size}{suffix}", metric, float(value), arxiv, nfe) for size, value in pairs)


TABLE: dict[Benchmark, Published] = {
    "cifar10-uncond": Published(
        EDM_PROTOCOL,
        (
            Figure("EDM", "fid", 1.97, EDM, 35),
            Figure("EDM + DG", "fid", 1.77, DG),
            Figure("EDM + DDO", "fid", 1.38, DDO, 35),
        ),
    ),
    "cifar10-cond": Published(
        EDM_PROTOCOL,
        (
            Figure("EDM", "fid", 1.79, EDM, 35),
            Figure("EDM + DG", "fid", 1.64, DG),
            Figure("EDM + DDO", "fid", 1.30, DDO, 35),
        ),
    ),
    "ffhq64": Published(EDM_PROTOCOL, (Figure("EDM", "fid", 2.39, EDM, 79), Figure("EDM + DG", "fid", 1.98, DG))),
    "afhqv2-64": Published(EDM_PROTOCOL, (Figure("EDM", "fid", 1.96, EDM, 79),)),
    "celeba64": Published(
        "50,000 images against the 162,770 of the training set, by clean-fid (mode clean)",
        (
            Figure("DDPM++ with Soft Truncation", "fid", 1.90, SOFT_TRUNCATION),
            Figure("DDPM++ with Soft Truncation + DG", "fid", 1.34, DG),
        ),
    ),
    # EDM and EDM2 crop the training images differently, so their references differ.
    "imagenet64": Published(
        "50,000 images against EDM's statistics (EDM, ADM) or EDM2's, which differ; of those two the least of several",
        (
            Figure("ADM", "fid", 2.07, ADM),
            Figure("ADM, EDM's sampler", "fid", 1.55, EDM),
            Figure("EDM", "fid", 1.36, EDM, 511),
            *_edm2("fid", "S 1.58, M 1.43, L 1.33, XL 1.33"),
            *_edm2("fid", "S 1.01", " + autoguidance", AUTOGUIDANCE, None),
            *_edm2("fd_dinov2", "S 31.85", " + autoguidance", AUTOGUIDANCE, None),
            *_edm2("fid", "S 0.97", " + DDO", DDO),
        ),
    ),
    "imagenet256": Published(
        ADM_PROTOCOL.format("imagenet256_labeled.npz"),
        (
            *_suite("ADM-G", ADM, fid=4.59, precision=0.82, recall=0.52),
            *_suite("ADM-G + ADM-U", ADM, fid=3.94, is_=215.84, sfid=6.14, precision=0.83, recall=0.53),
            Figure("ADM-G + DG", "fid", 3.18, DG),
            Figure("DiT-XL/2, no guidance", "fid", 9.62, DIT),
            *_suite("DiT-XL/2, guidance 1.5", DIT, fid=2.27, is_=278.24),
            *_suite("DiT-XL/2, guidance + DG", DG, fid=1.83, recall=0.64),
            Figure("SiT-XL/2, no guidance", "fid", 8.3, SIT, 250),
            *_suite("SiT-XL/2, guidance 1.5", SIT, 500, fid=2.06, is_=270.3),
            Figure("SiT-XL/2 + CAFM, no guidance", "fid", 3.63, CAFM),
            Figure("SiT-XL/2 + CAFM, guidance", "fid", 1.53, CAFM),
            Figure("SiT-XL/2 + REPA, no guidance", "fid", 5.9, REPA, 250),
            Figure("SiT-XL/2 + REPA, guidance 1.8 at times up to 0.7", "fid", 1.42, REPA),
            Figure("VAR-d16", "fid", 3.55, VAR),
            Figure("VAR-d30", "fid", 1.97, VAR),
            Figure("VAR-d16 + DDO", "fid", 3.12, DDO),
            Figure("VAR-d16 + DDO, guidance 1.4", "fid", 2.54, DDO),
            Figure("VAR-d30 + DDO", "fid", 1.79, DDO),
            Figure("VAR-d30 + DDO, guidance 1.4", "fid", 1.73, DDO),
        ),
    ),
    "imagenet512": Published(
        f"{EDM2_PROTOCOL} (EDM2, DDO). {ADM_PROTOCOL.format('imagenet512.npz')} (ADM, DiT, VAR)",
        (
            *_suite("ADM-G", ADM, fid=7.72, precision=0.87, recall=0.42),
            *_suite("ADM-G + ADM-U", ADM, fid=3.85, precision=0.84, recall=0.53),
            *_suite("DiT-XL/2, guidance 1.5", DIT, fid=3.04, is_=240.82),
            Figure("VAR-d36", "fid", 2.63, VAR),
            *_edm2("fid", "XS 3.53, S 2.56, M 2.25, L 2.06, XL 1.96, XXL 1.91"),
            *_edm2("fid", "XS 2.91, S 2.23, M 2.01, L 1.88, XL 1.85, XXL 1.81", " + guidance", nfe=None),
            *_edm2("fid", "S 1.34, XXL 1.25", " + autoguidance", AUTOGUIDANCE, None),
            *_edm2("fd_dinov2", "XS 103.39, S 68.64, M 58.44, L 52.25, XL 45.96, XXL 42.84"),
            *_edm2("fd_dinov2", "XS 79.94, S 52.32, M 41.98, L 38.20, XL 35.67, XXL 33.09", " + guidance", nfe=None),
            *_edm2("fd_dinov2", "S 36.67, XXL 24.18", " + autoguidance", AUTOGUIDANCE, None),
            *_edm2("fid", "L 1.26", " + DDO", DDO),
            *_edm2("fid", "L 1.21", " + DDO + guidance 1.1", DDO, None),
        ),
    ),
}
NAMES: tuple[str, ...] = get_args(Benchmark)


def rows(benchmark: Benchmark, metric: str) -> list[Figure]:
    """The published scores of this metric; empty if none is known. KeyError for an unknown benchmark."""
    return [figure for figure in TABLE[benchmark].figures if figure.metric == metric]

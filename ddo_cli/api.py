"""The Python interface: `import ddo_cli as ddo`. Each function calls what the command of its name calls.

Values that cannot be used raise `DdoError`, with the message of the command line. `load`, `guide`, `finetune` and `fid`
set torch as the commands do: TF32 off but where `precision` asks for it, denormal numbers flushed to zero.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ddo_cli import checkpoint, console, dist
from ddo_cli.checkpoint import Checkpoint
from ddo_cli.codec import PixelCodec
from ddo_cli.data.items import check_shape
from ddo_cli.data.stream import ImageStream, of_array
from ddo_cli.diffusion.denoiser import DiffusionDrawOptions, DiffusionModel, DiffusionOptions
from ddo_cli.errors import DataError, DdoError, RecipeError, UsageError
from ddo_cli.generation import generate
from ddo_cli.likelihood import NO_LABEL, LikelihoodModel
from ddo_cli.models import registry
from ddo_cli.models.catalog import option_problems
from ddo_cli.objectives.ddo import DdoLoss, ddo_loss
from ddo_cli.recipe.schema import GuidanceRecipe, SamplingRecipe, nearest
from ddo_cli.recipe.training import Section
from ddo_cli.rng import StepRng
from ddo_cli.trainable import map_tensors
from ddo_cli.transfer import to_device

__all__ = [
    "DdoError",
    "DdoLoss",
    "Model",
    "Samples",
    "ddo_loss",
    "diffusion_model",
    "fid",
    "finetune",
    "guide",
    "load",
    "log_ratio",
]


class Samples(NamedTuple):
    """What `Model.sample` has drawn, in the order of the seeds."""

    images: Tensor  # uint8 (N, C, H, W); float32 (N, d) of a model of points
    labels: Tensor  # int64 (N,), -1: none
    seeds: Tensor  # int64 (N,)
    nfe: int  # network evaluations per image; a conditional and an unconditional pass count as two


class Model:
    """A likelihood model on its device, and the file that it comes from.

    `network` is a `torch.nn.Module` in eval mode: train `network.parameters()`.
    """

    def __init__(self, network: LikelihoodModel, file: Checkpoint):
        self.network, self.file = network, file

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next((parameter.device for parameter in self.network.parameters()), torch.device("cpu"))

    def sample(
        self, seeds: Sequence[int] = range(64), classes: Sequence[int] | None = None, **sampling: Any
    ) -> Samples:
        """One image per seed: those of `ddo sample` for the same seeds, bit for bit.

        classes: only these; None: all in turn, the seed modulo their number. sampling: keys of a recipe's `sampling`,
        such as sampler, steps, cfg_scale; what is not given is the file's.

        >>> import ddo_cli as ddo
        >>> drawn = ddo.load("embedded:digits16", device="cpu").sample(range(4), steps=5)
        >>> drawn.images.shape, drawn.images.dtype, drawn.labels.tolist(), drawn.nfe
        (torch.Size([4, 3, 16, 16]), torch.uint8, [0, 1, 2, 3], 5)
        """
        from ddo_cli.engines.sampling import sample

        if not len(seeds) or len(set(seeds)) < len(seeds):
            raise UsageError(f"seeds: {len(seeds)} given, some twice or none; give each image a seed of its own")
        _check_keys("sampling", SamplingRecipe, sampling)
        spec = sample.checked(self.network, self.file, seeds, classes, sampling, self.device)
        batches = [
            *generate(self.network, seeds, spec, batch=spec.batch, classes=classes, as_given=seeds, device=self.device)
        ]
        items = torch.cat([batch.items for batch in batches])
        labels, drawn = torch.cat([batch.label for batch in batches]), torch.cat([batch.seeds for batch in batches])
        places = {seed: place for place, seed in enumerate(drawn.tolist())}
        rows = torch.tensor([places[seed] for seed in seeds])
        return Samples(items[rows], labels[rows], drawn[rows], batches[0].nfe)

    def save(self, path: str | Path) -> None:
        """Writes a weight file that every command takes as --ckpt. Raises UsageError for a network of your own, whose
        class must be registered first, see `ddo_cli.models.registry`.
        """
        if "kind" not in self.file.header:
            raise UsageError(
                f"{path}: a file cannot rebuild this network, whose class is not registered; save its state_dict, or "
                "register it as the page 'Your own network' says"
            )
        link = {"command": "ddo_cli.Model.save", "reference_sha256": self.file.sha256}
        header = {**self.file.header, "provenance": [*self.file.header.get("provenance", []), link]}
        checkpoint.save(Path(path), self.network.state_dict(), header)


def load(path: str | Path, *, device: str | None = None, model_file: str | Path | None = None) -> Model:
    """The model of a weight file, a run's directory, or "embedded:<name>".

    device: "cuda", "mps" or "cpu"; None: cuda if there is one, else cpu.
    model_file: Python file that registers the model's class.

    >>> import ddo_cli as ddo
    >>> model = ddo.load("embedded:digits16")
    >>> model.network.num_classes, sum(p.numel() for p in model.network.parameters())
    (10, 64960)
    """
    target = dist.init(device)
    registry.load_file(None if model_file is None else str(model_file))
    return Model(*registry.load_model(path, target))


def diffusion_model(
    net: nn.Module,
    shape: Sequence[int],
    num_classes: int = 0,
    *,
    draw: Mapping[str, Any] | None = None,
    **options: Any,
) -> Model:
    """A network of your own as a diffusion model of uint8 images, on the network's device.

    net: called as net(x, c_noise, label); returns F of x's shape. x: scaled noisy images (B, C, H, W) float32; c_noise
    (B,), ln(sigma) / 4 with EDM's preconditioning; label (B,) int64, -1: none. shape: (C, H, W).
    options: fields of `DiffusionOptions`: precond (what the network was trained to predict; default: edm), sigma_data,
    sigma_min, sigma_max. draw: fields of `DiffusionDrawOptions`: p_mean, p_std, label_dropout.
    The network is set to eval mode: model and reference must share all randomness, so no dropout.

    >>> import torch
    >>> import ddo_cli as ddo
    >>> class Net(torch.nn.Conv2d):
    ...     def forward(self, x, c_noise, label):
    ...         return super().forward(x)
    >>> model = ddo.diffusion_model(Net(3, 3, 3, padding=1), (3, 8, 8))
    >>> model.sample(range(2), sampler="euler", steps=2).images.shape
    torch.Size([2, 3, 8, 8])
    """
    problems = option_problems("options", "diffusion_model", DiffusionOptions, options)
    problems += option_problems("draw", "diffusion_model", DiffusionDrawOptions, dict(draw or {}))
    if problems:
        raise RecipeError("\n".join(problems))
    if len(shape) != 3 or num_classes < 0:
        raise UsageError(f"shape = {tuple(shape)}, num_classes = {num_classes}: give (C, H, W), and 0 without classes")
    both = DiffusionOptions(**options), DiffusionDrawOptions(**(draw or {}))
    network = DiffusionModel(net, PixelCodec(tuple(shape)), num_classes, *both).eval()
    config = {"name": type(net).__name__, "draw": both[1].model_dump(mode="json")}
    return Model(network, Checkpoint({}, {"config": config}, "", "a network of your own"))


def log_ratio(model: Model, ref: Model, images: Tensor, labels: Tensor | None = None, seed: int = 0) -> Tensor:
    """log p_model(x) - log p_ref(x) of each image, (N,) float32: exactly 0 for equal weights.

    With gradients for the model, none for `ref`. Exact for autoregressive models; of a diffusion model one draw of its
    bound, of noise that depends on the seed and the row alone: model and reference share it, and so do two calls with
    one seed, as DDO asks of real and fake images (arXiv 2503.01103, section 3.2).

    images: as the model's data, uint8 (N, C, H, W) for images. labels: (N,), -1: none; None: none at all.

    >>> import torch
    >>> import ddo_cli as ddo
    >>> model, ref = ddo.load("embedded:digits16"), ddo.load("embedded:digits16")
    >>> drawn = ref.sample(range(4), steps=5)
    >>> ddo.log_ratio(model, ref, drawn.images, drawn.labels, seed=1).abs().tolist()
    [0.0, 0.0, 0.0, 0.0]
    """
    network, reference = model.network, ref.network
    codec, other = network.codec, reference.codec
    if (codec.state_shape, type(codec)) != (other.state_shape, type(other)):
        raise UsageError(
            f"log_ratio: the model's states are {codec.state_shape}, the reference's {other.state_shape}; give two "
            "models of the same kind"
        )
    check_shape("log_ratio: images", images[:0].cpu().numpy().dtype, tuple(images.shape[1:]), codec)
    if len(codec.shape) == 3 and tuple(images.shape[1:]) == codec.shape and images.dtype != torch.uint8:
        raise DataError(f"log_ratio: images are {images.dtype}; give them as uint8, which the model scales itself")
    if labels is None:
        labels = torch.full((len(images),), NO_LABEL)
    most = network.num_classes - 1
    if tuple(labels.shape) != (len(images),) or not bool(((labels >= NO_LABEL) & (labels <= most)).all()):
        raise DataError(
            f"log_ratio: labels of shape {tuple(labels.shape)} for {len(images)} images; give one for each, from 0 to "
            f"{most}, or -1 for none"
        )
    rng = StepRng((seed,), 0, range(len(images)))
    encodable = codec.prepare(images, rng("encode"))
    draw = network.draw(len(images), rng("ddo"))
    encodable, draw = (map_tensors(lambda tensor: to_device(tensor, model.device), v) for v in (encodable, draw))
    x, label = codec.encode(*encodable), to_device(labels.to(torch.int64), model.device)
    with torch.no_grad():
        ref_prediction = reference.predict(x, label, draw)
    return network(x, label, draw, ref_prediction)


def guide(model: Model, disc: str | Path | None = None, *, force: bool = False, **guidance: Any) -> Model:
    """The model guided by a discriminator of `ddo train-disc`, with the same weights (arXiv 2211.17091).

    disc: a file or a run's directory; None: the newest run below runs/. force: take one of another model, with a
    warning. guidance: keys of a recipe's `guidance`, such as dg_weight; what is not given is the discriminator's.

    >>> import ddo_cli as ddo
    >>> model = ddo.load("embedded:digits16", device="cpu")
    >>> guided = ddo.guide(model, "disc.safetensors", dg_weight=2.0)
    >>> guided.sample(range(2), steps=5).images.shape
    torch.Size([2, 3, 16, 16])
    """
    from ddo_cli.engines.sampling import guides

    _check_keys("guidance", GuidanceRecipe, guidance)
    loaded = registry.Loaded(model.network, model.file)
    chosen = guides.choose(None if disc is None else str(disc), loaded, guidance, device=model.device, force=force)
    if warning := guides.harm(chosen.discriminator.checkpoint.header.get("heldout", {}).get("gain")):
        console.warn(warning)
    base = guides.diffusion_model(loaded)
    added = guides.discriminator_guide(chosen.discriminator.network, chosen.settings, base)
    return Model(base.guided_by([*base.guides, added]), model.file)


def finetune(
    recipe: str | Path = "quickstart",
    out: str | Path | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    device: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Finetunes a model in rounds of DDO; what `ddo finetune-ddo --json` prints. The same call continues a run.

    recipe: by name or a YAML file. settings: values of recipe keys. out: None: runs/<recipe>.
    The result's "final" is the weight file; see the page of JSON output.

    >>> import ddo_cli as ddo
    >>> plan = ddo.finetune(settings={"finetune.rounds": 1, "finetune.alpha": 4.0}, device="cpu", dry_run=True)
    >>> plan["rounds"], plan["steps_per_round"]
    (1, 120)
    """
    from ddo_cli.engines.ddo import finetune as engine
    from ddo_cli.recipe.load import load as load_recipe

    resolved = load_recipe(str(recipe), given=dict(settings or {}))
    place = Path("runs") / resolved.name if out is None else Path(out)
    return engine.run(resolved, place, device=dist.init(device), dry_run=dry_run, measure=False)


def fid(
    images: str | Path | Tensor | np.ndarray | Samples,
    ref: str | Path | Tensor | np.ndarray | Samples | None = None,
    *,
    metrics: Sequence[str] = ("fid",),
    num_images: int | None = None,
    weights: str | Mapping[str, str] | None = None,
    extractor: str | None = None,
    uncertainty: bool = False,
    device: str | None = None,
) -> dict[str, Any]:
    """Fréchet distance and other scores of images; what `ddo fid --json` prints.

    images: uint8 (N, C, H, W), or what the command takes: a folder, zip, npz, sample set, run directory, weight file.
    ref: images likewise, or a file of statistics; None: the embedded digits. metrics: some of fid, sfid, is, kid,
    precision, recall, density, coverage, fd_dinov2, fd_clip. weights: Inception's, or files by network; without any the
    embedded extractor gives an `fd_embedded`, which is no FID. num_images: to use or to draw, of a path.

    >>> import ddo_cli as ddo
    >>> drawn = ddo.load("embedded:digits16", device="cpu").sample(range(32), steps=5)
    >>> figures = ddo.fid(drawn, ref=drawn.images, extractor="embedded:extractor-digits32", device="cpu")
    >>> abs(figures["fd_embedded"]) < 1e-3
    True
    """
    from ddo_cli.engines.fid import fid as engine

    if num_images is not None and not isinstance(images, (str, Path)):
        raise UsageError(f"num_images = {num_images} is of images on disk or of a model; cut the tensor instead")
    asked = engine.Options(
        metrics=(metrics,) if isinstance(metrics, str) else tuple(metrics), num=num_images, weights=weights,
        extractor=extractor, uncertainty=uncertainty, cache=isinstance(images, (str, Path)),
    )  # fmt: skip
    reference = None if ref is None else _images("reference", ref)
    return engine.run(_images("images", images), reference, asked, device=dist.init(device))


def _check_keys(section: str, schema: type[Section], given: Mapping[str, Any]) -> None:
    for name in given.keys() - schema.model_fields.keys():
        raise UsageError(f"{name} = {given[name]!r} is no key of {section}{nearest(name, schema.model_fields)}")


def _images(name: str, given: str | Path | Tensor | np.ndarray | Samples) -> str | ImageStream:
    """Images as `engines.fid` takes them. Raises DataError."""
    if isinstance(given, (str, Path)):
        return str(given)
    labels = given.labels.numpy() if isinstance(given, Samples) else None
    array = torch.as_tensor(given.images if isinstance(given, Samples) else given)
    return of_array(name, array.cpu().numpy(), labels)

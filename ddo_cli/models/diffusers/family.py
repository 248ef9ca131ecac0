"""What sets a family of text-to-image pipelines apart: its parts, its conventions, its conditions.

Each family is one class in a file of its own; `families` lists them. Here is what they share.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ddo_cli import extras
from ddo_cli.diffusion.precond import Flow, Preconditioner
from ddo_cli.errors import CheckpointError, printable, reason
from ddo_cli.files import read_json
from ddo_cli.models.diffusers.unet import Config, Process, Values, check_values, library, with_defaults

INDEX = "model_index.json"
NONE = ""  # the empty prompt
FACTOR = 8  # pixels per side of a latent, in every family
LARGE = 4 << 30  # bytes of a text encoder's files; our choice: CLIP is below, T5-XXL and Qwen3 are above
FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"

Condition = dict[str, Tensor]  # what a network is told of a prompt, by name; of a batch with rows first


def transformers() -> Any:
    """The library, imported where it is needed because that takes seconds. Raises UsageError where it is missing."""
    return extras.imported("prompts need", "transformers", "t2i")


class Parts:
    """Tokenizers and frozen text encoders of a pipeline's folder, each loaded when it is first asked for.

    cut: texts that are longer than an encoder reads. index: the folder's model_index.json.
    """

    def __init__(self, folder: Path, classes: Mapping[str, str], device: torch.device):
        self.folder, self.classes, self.device = folder, classes, device
        self.cut = dict[str, int]()  # by text: the tokens that were read
        self._loaded = dict[str, Any]()

    @cached_property
    def index(self) -> Config:
        return read_json(self.folder / INDEX)

    def __getitem__(self, name: str) -> Any:
        """A tokenizer or text encoder by its folder. Raises CheckpointError if it cannot be loaded."""
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def _load(self, name: str) -> Any:
        made_by = getattr(transformers(), self.classes[name])
        transformers().utils.logging.disable_progress_bar()  # for a file that loads at once
        transformers().utils.logging.set_verbosity_error()  # which tensors of a language model are not read
        try:
            if name.startswith("tokenizer"):
                return made_by.from_pretrained(self.folder / name)
            network = made_by.from_pretrained(self.folder / name, use_safetensors=True, torch_dtype=self._dtype(name))
        except Exception as error:  # of transformers, tokenizers or safetensors, as the failure may be
            raise CheckpointError(
                f"{self.folder}: {name} cannot be loaded ({reason(error, 100)}); copy the folder again"
            ) from None
        if getattr(network.config, "use_attention_mask", False):
            raise CheckpointError(f"{self.folder}: {name} uses attention masks, which is not supported; use another")
        return network.to(self.device).eval().requires_grad_(False)

    def _dtype(self, name: str) -> torch.dtype:
        """bfloat16 for large encoders on a GPU, where networks are in memory, too."""
        size = sum(path.stat().st_size for path in (self.folder / name).glob("*.safetensors"))
        return torch.bfloat16 if self.device.type == "cuda" and size > LARGE else torch.float32

    def tokens(self, name: str, text: str, length: int | None = None) -> dict[str, Tensor]:
        """input_ids and attention_mask (1, length) of a text, padded or cut. length: None: the tokenizer's own."""
        tokenizer = self[name]
        length = length or tokenizer.model_max_length
        if len(tokenizer(text).input_ids) > length:
            self.cut[text] = length
        padded = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return {key: padded[key].to(self.device) for key in ("input_ids", "attention_mask")}

    def clip(self, number: str, text: str) -> tuple[Tensor, Tensor]:
        """Of the CLIP text encoder with this suffix: the last but one hidden state (L, E), and its first output."""
        ids = self.tokens(f"tokenizer{number}", text, self["tokenizer"].model_max_length)["input_ids"]
        found = self[f"text_encoder{number}"](ids, output_hidden_states=True)
        return found.hidden_states[-2][0], found[0][0]

    def chat(self, text: str, length: int, thinking: bool, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of a language model told the text as a user's message: hidden states of layers (L, E) each, and the mask."""
        message = [{"role": "user", "content": text}]
        told = self["tokenizer"].apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        tokens = self.tokens("tokenizer", told, length)
        states = self["text_encoder"](**tokens, output_hidden_states=True, use_cache=False).hidden_states
        return torch.stack([states[layer][0] for layer in layers]), tokens["attention_mask"][0].bool()


class Family(ABC):
    """A family of pipelines of the library diffusers."""

    name: ClassVar[str]
    title: ClassVar[str]  # for people
    pipeline: ClassVar[str]  # its class
    part: ClassVar[str]  # folder of the network that is trained
    network: ClassVar[str]  # its class
    texts: ClassVar[Mapping[str, str]]  # folders of tokenizers and text encoders, and their classes
    scheduler: ClassVar[Mapping[str, Any]] = {}  # values that the pipeline sets in the scheduler's configuration
    told_by_index: ClassVar[tuple[str, ...]] = ()  # keys of model_index.json that change what prompts are encoded to
    vae: ClassVar[str] = "AutoencoderKL"
    fixed: ClassVar[Mapping[str, Any]] = {}  # arguments of the network, and the values that fit
    targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")  # of adapters by default
    sampling: ClassVar[Mapping[str, Any]]  # that of the library's pipeline; batch: images at once
    patch: ClassVar[int] = 1  # patch x patch positions of the latent are one of the state, with more channels
    label_dropout: ClassVar[float] = 0.1  # of Stable Diffusion's training

    # --- Configurations

    def arguments(self, network: Config) -> Config:
        """The library's arguments of the network, each default written out. Raises ValueError if they do not fit."""
        if (name := network.get("_class_name")) != self.network:
            raise ValueError(f"the network is a {printable(str(name), 60)}; a {self.network} of {self.title} fits")
        if not hasattr(library(), self.network):
            raise ValueError(f"the installed diffusers has no {self.network}; install a newer one")
        full = with_defaults(self.network, network)
        self.check(full)
        odd = [f"{key} = {printable(repr(full[key]), 40)} must be {value}" for key, value in self.fixed.items()
               if full[key] != value]  # fmt: skip
        if odd:
            raise ValueError(f"{'; '.join(odd)}, as in {self.title}")
        return full

    @abstractmethod
    def check(self, full: Config) -> None:
        """Raises ValueError for arguments that do not fit, with a reason of the family's own."""

    @abstractmethod
    def side(self, full: Config, vae: Config) -> int:
        """Side in pixels of the images that the network was trained on."""

    @abstractmethod
    def multiple(self, full: Config) -> int:
        """What divides the side in pixels of every image."""

    def largest(self, full: Config) -> int:
        """The largest side in pixels that the network has positions for."""
        return 1 << 15  # our choice, where there is none

    @abstractmethod
    def process(self, scheduler: Config) -> Process:
        """Noise levels and prediction that a scheduler's configuration describes. Raises ValueError."""

    @abstractmethod
    def draw(self, scheduler: Config, state_shape: tuple[int, ...]) -> dict[str, Any]:
        """Draw options of training by default: the law of pretraining, where it is known."""

    @abstractmethod
    def levels(self, scheduler: Config, known: Preconditioner, num_steps: int, state_shape: tuple[int, ...]) -> Tensor:
        """Decreasing noise levels of the pipeline's own steps, (num_steps + 1,). Raises UsageError for too many."""

    @abstractmethod
    def notes(self, scheduler: Config) -> dict[str, str]:
        """What to tell the user of prediction and steps."""

    def affine(self, vae: Config, folder: Path) -> tuple[Any, Any]:
        """Scale and shift of latents, numbers or lists by channel: state = (latent - shift) scale. folder: vae/."""
        return vae.get("scaling_factor", 0.18215), vae.get("shift_factor") or 0.0

    # --- Networks and prompts

    @abstractmethod
    def encode(self, parts: Parts, text: str) -> Condition:
        """What the network is told of a prompt, without an axis of rows."""

    @abstractmethod
    def evaluate(self, network: Any, x: Tensor, c_noise: Tensor, condition: Condition) -> Tensor:
        """F (B, C, h, w) in the sense of the preconditioner. c_noise: float (B,)."""

    @abstractmethod
    def units(self, network: Any) -> Sequence[nn.Module]:
        """Blocks of the network, for activation checkpointing."""


_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Tokens = Annotated[int, Field(ge=1, le=1 << 24)]


class _FlowScheduler(Values):
    """What the configuration of a scheduler must hold before the library gets it, which checks the rest."""

    num_train_timesteps: Literal[1000] = 1000
    invert_sigmas: Literal[False] = False
    shift: _Positive = 1.0
    use_dynamic_shifting: bool = False
    base_shift: _Positive | None = None
    max_shift: _Positive | None = None
    base_image_seq_len: _Tokens = 256
    max_image_seq_len: _Tokens = 4096


class FlowFamily(Family):
    """Transformers with flow matching. Time and velocity are those of `precond.Flow`, `reversed` or not."""

    part = "transformer"
    reversed: ClassVar[bool] = True  # the time is the share of noise n and F = eps - x0; else 1 - n and x0 - eps
    tokens_of: ClassVar[int] = 4  # positions of the state in one token
    draw_std: ClassVar[float] = 1.0  # logit-normal n (arXiv 2403.03206); its mean is that of the pipeline's own steps

    def process(self, scheduler: Config) -> Process:
        name = scheduler.get("_class_name")
        if name != FLOW_SCHEDULER:
            raise ValueError(f"the scheduler is a {printable(str(name), 60)}; {self.title} has a {FLOW_SCHEDULER}")
        check_values(_FlowScheduler, scheduler)
        try:
            self._scheduler(scheduler)
        except Exception as error:  # whatever the library makes of the values
            raise ValueError(f"{FLOW_SCHEDULER} refuses its configuration: {reason(error, 100)}") from None
        return Process(Flow(self.reversed), 0.002, 80.0, 1.0, False)

    def _scheduler(self, scheduler: Config) -> Any:
        made_by = getattr(library(), FLOW_SCHEDULER)
        known = inspect.signature(made_by.__init__).parameters  # folders keep keys of a scheduler they had before
        with torch.device("cpu"):
            return made_by(**{key: value for key, value in scheduler.items() if key in known})

    @abstractmethod
    def dynamic_shift(self, scheduler: Config, num_steps: int, num_tokens: int) -> float:
        """mu, the logarithm of the shift of n by the image's tokens, where the scheduler has one of that kind."""

    def shares(self, num_steps: int) -> list[float] | None:
        """n before the shift, as the pipeline hands it to the scheduler; None: the scheduler's own."""
        return torch.linspace(1.0, 1 / num_steps, num_steps, dtype=torch.float64, device="cpu").tolist()

    def _mu(self, scheduler: Config, num_steps: int, state_shape: tuple[int, ...]) -> float | None:
        tokens = math.prod(state_shape[1:]) // self.tokens_of
        return self.dynamic_shift(scheduler, num_steps, tokens) if scheduler.get("use_dynamic_shifting") else None

    def levels(self, scheduler: Config, known: Preconditioner, num_steps: int, state_shape: tuple[int, ...]) -> Tensor:
        made = self._scheduler(scheduler)
        made.set_timesteps(num_steps, sigmas=self.shares(num_steps), mu=self._mu(scheduler, num_steps, state_shape))
        share = made.sigmas.double()
        return (share / (1 - share)).clamp(max=known.sigma_max)  # it starts at n = 1, pure noise

    def notes(self, scheduler: Config) -> dict[str, str]:
        shift = "by the image's size" if scheduler.get("use_dynamic_shifting") else f"{scheduler.get('shift', 1.0):g}"
        return {"predicts": "velocity", "scheduler": f"flow matching, shift {shift}"}

    def draw(self, scheduler: Config, state_shape: tuple[int, ...]) -> dict[str, Any]:
        mu = self._mu(scheduler, self.sampling["steps"], state_shape)
        if mu is None:
            mu = math.log(scheduler.get("shift", 1.0))
        elif scheduler.get("time_shift_type") == "linear":
            mu = math.log(mu)
        return {"p_mean": round(mu, 3), "p_std": self.draw_std}


def image_side(vae: Config) -> int:
    """Side in pixels of an autoencoder's images, where the network's configuration has none. Raises ValueError."""
    if not isinstance(side := vae.get("sample_size", 1024), int):
        raise ValueError(f"sample_size = {printable(repr(side), 40)} of vae/config.json must be a side in pixels")
    return side


def linear_shift(scheduler: Config, num_tokens: int, max_shift: float) -> float:
    """mu by a line through two numbers of tokens, those of the scheduler. max_shift: the pipeline's default."""
    low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    first, last = scheduler.get("base_shift") or 0.5, scheduler.get("max_shift") or max_shift
    slope = (last - first) / max(high - low, 1)
    return float(num_tokens * slope + first - slope * low)

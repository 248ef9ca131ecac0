"""VAR: an autoregressive transformer over the scales of a VQVAE's tokens (arXiv 2404.02905).

p(x | label) = prod_s p(map s | maps before it, label); the tokens of a map are independent given the earlier maps. So
the likelihood of an image's tokens is exact and takes one pass, and sampling takes one pass per scale.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ddo_cli.codec import Codec, Encodable, hash_of
from ddo_cli.errors import DataError, RecipeError, UsageError
from ddo_cli.likelihood import NO_LABEL, DrawOptions, Options, Sampled, drop_labels
from ddo_cli.models.registry import register
from ddo_cli.models.tokens import TokenModel, inverse_cdf, is_guided, of_tokens, sampled_log_prob
from ddo_cli.models.var.layers import Block, Head
from ddo_cli.models.var.vqvae import Vqvae, VqvaeOptions, load_into
from ddo_cli.models.var.vqvae_layers import full_precision
from ddo_cli.recipe.schema import SamplingRecipe
from ddo_cli.rng import RowRng
from ddo_cli.transfer import to_device

HEAD_WIDTH = 64  # of every published model
# Initial size of the blocks' gates up to a depth (their training scripts).
_GATES = {20: 1e-3, 24: 1e-4, 30: 1e-5, 1000: 5e-6}


class VarOptions(Options):
    """Options of `var`. Defaults: VAR-d16; with another `depth` alone, the published network of that depth."""

    depth: int = Field(16, ge=1, le=1000)
    width: int | None = Field(None, ge=1)  # None: 64 for each of `depth`
    heads: int | None = Field(None, ge=1)  # None: one for each 64 of the width
    shared_adaln: bool = False  # one modulation layer for all blocks (d36)
    l2_norm: bool = True  # of queries and keys
    vqvae: VqvaeOptions = VqvaeOptions()  # of the tokenizer, whose weights lie in the model's file
    tokenizer: str | None = None  # the tokenizer's weight file, read by `ddo pretrain` only


class VarDrawOptions(DrawOptions):
    """Training randomness of VAR. Published: label_dropout 0.1; drop_path 0.1 depth / 24, in pretraining only."""

    drop_path: float = Field(0.0, ge=0, lt=1)  # share of rows that skip the last block's layers; from 0 at the first


class VarDraw(NamedTuple):
    """drop (B,): rows that lose their label; keep (B, depth, 2): multipliers of drop path, (B, 0, 2) without."""

    drop: Tensor
    keep: Tensor


class TokenCodec(Codec):
    """uint8 images (B, C, H, W) <-> int64 tokens (B, L) of a frozen VQVAE; tokens are items, too."""

    is_discrete = True

    def __init__(self, vqvae: Vqvae):
        super().__init__(vqvae.shape)
        self.vqvae = vqvae
        self.state_shape = (vqvae.options.length,)
        self.latent_shapes = (self.state_shape,)
        self._hashed: tuple[list[Any], str] | None = None  # versions of the weights, and their hash

    def prepare(self, items: Tensor, rng: RowRng) -> Encodable:
        """Raises DataError for tokens beyond the vocabulary."""
        vocabulary = self.vqvae.options.vocabulary
        if items.ndim == 2 and len(items) and not 0 <= int(items.min()) <= int(items.max()) < vocabulary:
            raise DataError(
                f"tokens from {int(items.min())} to {int(items.max())} where the model has 0 to {vocabulary - 1}; "
                "encode the images with this model"
            )
        return Encodable(items)

    def encode(self, items: Tensor, eps: Tensor | None = None) -> Tensor:
        """Images, or tokens of any integer type -> int64 tokens."""
        return self.vqvae.encode(items) if items.ndim == 4 else items.to(torch.int64)

    def latents(self, items: Tensor) -> Tensor:
        """Images -> tokens, int16."""
        return self.encode(items).to(torch.int16)

    def encoder_id(self) -> str:
        """The hash of what tokens come from: the VQVAE's encoder and its codes."""
        used = ("encoder.", "quant_conv.", "quantize.")
        weights = {name: weight for name, weight in self.vqvae.named_parameters() if name.startswith(used)}
        versions = [(id(weight), weight.dtype, weight._version) for weight in weights.values()]
        if self._hashed is None or self._hashed[0] != versions:
            self._hashed = versions, "vqvae:" + hash_of(weights)
        return self._hashed[1]

    def decode(self, x: Tensor) -> Tensor:
        """Tokens, or the mixed codes (B, z, p, p) of smooth sampling -> images."""
        with torch.no_grad(), full_precision(x.device):
            f_hat = x if x.is_floating_point() else self.vqvae.quantize.f_hat(x)
        return self.vqvae.decode(f_hat)


@register("var", VarOptions, VarDrawOptions)
class Var(TokenModel):
    """x: int64 tokens (B, L) of all scales. The VQVAE is part of the model and stays frozen.

    Guidance grows with the scale, as published: at scale s of S the logits are
        uncond + (1 + (cfg_scale - 1) s / (S - 1)) (cond - uncond).
    Here as everywhere cfg_scale = 1 is off. The published scripts count from 0: their cfg is cfg_scale - 1, so their
    "cfg 1.5" is cfg_scale 2.5.
    """

    sampling_fields = (*TokenModel.sampling_fields, "smooth")
    level: Tensor  # (L,), the scale of each token

    def __init__(
        self, shape: tuple[int, ...], num_classes: int, options: VarOptions, draw_options: VarDrawOptions
    ) -> None:
        """Raises ValueError if the images' shape is not the VQVAE's, or heads do not divide the width."""
        super().__init__()
        self.num_classes, self.options, self.draw_options = num_classes, options, draw_options
        self.sides, self.length = options.vqvae.patch_nums, options.vqvae.length
        self.width = options.width or HEAD_WIDTH * options.depth
        self.heads = options.heads or max(self.width // HEAD_WIDTH, 1)
        if self.width % self.heads:
            raise ValueError(f"model.options.heads = {self.heads} must divide width = {self.width}")
        self.vqvae = Vqvae(shape, options.vqvae).requires_grad_(False).eval()
        self.codec = TokenCodec(self.vqvae)
        self.class_embedding = nn.Embedding(num_classes + 1, self.width)  # the last row: no label
        self.start = nn.Parameter(torch.empty(1, 1, self.width))
        self.word = nn.Linear(options.vqvae.z_channels, self.width)
        self.position = nn.Parameter(torch.empty(1, self.length, self.width))
        self.level_embedding = nn.Embedding(len(self.sides), self.width)
        if options.shared_adaln:
            self.shared_adaln = nn.Linear(self.width, 6 * self.width)
        self.blocks = nn.ModuleList(
            Block(self.width, self.heads, options.l2_norm, options.shared_adaln) for _ in range(options.depth)
        )
        self.head = Head(self.width, options.vqvae.vocabulary)
        level = torch.cat([torch.full((side**2,), s, device="cpu") for s, side in enumerate(self.sides)])
        self.register_buffer("level", level, persistent=False)
        self._initialise()

    def no_decay(self, name: str, parameter: nn.Parameter) -> bool:
        """Vectors, positions, levels, learned scales and the blocks' constant modulation."""
        exempt = ("start", "position", "level_embedding.weight", ".log_scale", ".adaln")
        return super().no_decay(name, parameter) or name.endswith(exempt)

    def train(self, mode: bool = True) -> "Var":
        """As of any module, but the VQVAE stays in eval mode."""
        super().train(mode)
        self.vqvae.eval()
        return self

    def start_training(self) -> None:
        """Reads the tokenizer. Raises RecipeError if none is given."""
        if self.options.tokenizer is None:
            raise RecipeError(
                "a var is trained on the tokens of a VQVAE: give model.options.tokenizer, a file that `ddo convert` "
                "made, or `ddo pretrain` with model.name = vqvae"
            )
        load_into(self.vqvae, self.options.tokenizer)

    # --- Likelihood

    def logits(self, x: Tensor, label: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits of every token given the scales before its own, (B, L, vocabulary), float32; the last is unread."""
        with full_precision(x.device):
            embedded = self._class(label)  # (B, C)
            first = embedded[:, None] + self.start
            h = torch.cat([first, self.word(self.vqvae.quantize.inputs(x))], dim=1) + self._positions()  # (B, L, C)
        if torch.is_autocast_enabled(h.device.type):
            h = h.to(torch.get_autocast_dtype(h.device.type))  # the published training runs the whole stream in it
        silu, condition = self._conditions(embedded)
        mask = self.level[:, None] >= self.level  # a query sees its own scale and the ones before
        for i, block in enumerate(self.blocks):
            h = block(h, condition, mask, None if keep is None else keep[:, i])
        return self.head(h, silu)

    def draw(self, num_rows: int, rng: RowRng) -> VarDraw:
        """Label drops, and what drop path keeps."""
        drop = rng.rand() < self.draw_options.label_dropout
        if not self.draw_options.drop_path:
            return VarDraw(drop, torch.ones(num_rows, 0, 2))
        share = torch.linspace(0, self.draw_options.drop_path, self.options.depth)[:, None]  # of each block
        return VarDraw(drop, (rng.rand((self.options.depth, 2)) >= share) / (1 - share))

    def predict(self, x: Tensor, label: Tensor, draw: VarDraw) -> Tensor:
        """log p(x_i | scales before), (B, L) nats, float32. Drop path acts in train mode only, and so not in DDO."""
        keep = draw.keep if self.training and draw.keep.shape[1] else None
        return of_tokens(self.logits(x, drop_labels(label, draw), keep).log_softmax(2), x)

    # --- Sampling

    @torch.no_grad()
    def sample(self, label: Tensor, rng: RowRng, spec: SamplingRecipe) -> Sampled:
        """Tokens (B, L), one uniform number per token from the row's own generator, so no row depends on another.

        Keys and values of earlier scales are kept. nfe counts a pass over one scale as an evaluation, so S of them, and
        with guidance 2 S, cost what one or two passes over all tokens do.
        With smooth, x is the sum of mixed codes f_hat (B, z, p, p) instead, which only `decode` takes.
        """
        quantize, guided = self.vqvae.quantize, is_guided(spec)
        uniform = to_device(rng.rand((self.length,), dtype=torch.float64), label.device)  # (B, L)
        rows = torch.cat([label, torch.full_like(label, NO_LABEL)]) if guided else label  # (B or 2B,)
        embedded = self._class(rows)
        silu, condition = self._conditions(embedded)
        positions = self._positions()
        caches = self.caches(len(rows), self.position[0])
        f_hat = positions.new_zeros(len(label), self.options.vqvae.z_channels, self.sides[-1], self.sides[-1])
        h = embedded[:, None] + self.start + positions[:, :1]  # (B or 2B, 1, C)
        x = []
        for scale, (start, stop) in enumerate(self.options.vqvae.bounds):
            for block, cache in zip(self.blocks, caches, strict=True):
                h = block(h, condition, cache=cache, start=start)
            logits = self.head(h, silu)
            conditional, unconditional = logits.chunk(2) if guided else (logits, None)
            log_prob = sampled_log_prob(conditional, unconditional, spec, self._cfg_scale(spec, scale))  # (B, l, V)
            tokens = inverse_cdf(log_prob, uniform[:, start:stop])  # (B, l)
            x.append(tokens)
            with full_precision(label.device):
                codes = self._smoothed(log_prob, scale, rng) if spec.smooth else quantize.codes(tokens, scale)
                f_hat = f_hat + quantize.contribution(codes, scale)
            if scale + 1 < len(self.sides):
                word = self.word(quantize.reduced(f_hat, scale + 1).flatten(2).transpose(1, 2))  # (B, next l, C)
                h = (word + positions[:, stop : stop + word.shape[1]]).repeat(2 if guided else 1, 1, 1)
        return Sampled(f_hat if spec.smooth else torch.cat(x, dim=1), len(self.sides) * (2 if guided else 1))

    @torch.no_grad()
    def log_density(self, x: Tensor, label: Tensor, spec: SamplingRecipe) -> Tensor:
        """log of the probability that `sample` draws x, (B,) nats: exact, with temperature, truncation and guidance."""
        if spec.smooth:
            raise UsageError("sampling.smooth = true draws mixtures of codes, which have no probability; leave it out")
        unconditional = self.logits(x, torch.full_like(label, NO_LABEL)) if is_guided(spec) else None
        scale = torch.tensor([self._cfg_scale(spec, s) for s in range(len(self.sides))])
        of_token = scale.to(x.device)[self.level][:, None]  # (L, 1)
        return of_tokens(sampled_log_prob(self.logits(x, label), unconditional, spec, of_token), x).sum(1)

    def _cfg_scale(self, spec: SamplingRecipe, scale: int) -> float:
        return 1 + ((spec.cfg_scale or 1.0) - 1) * scale / (len(self.sides) - 1)

    def _smoothed(self, log_prob: Tensor, scale: int, rng: RowRng) -> Tensor:
        """Mixed codes (B, z, p_s, p_s): Gumbel-softmax of sharpened logits, cooled down over the scales."""
        at = scale / (len(self.sides) - 1)
        uniform = to_device(rng.rand(log_prob.shape[1:], dtype=torch.float64), log_prob.device)
        noise = -torch.log(-torch.log(uniform))
        weight = ((log_prob * (1 + at) + noise) / max(0.27 * (1 - 0.95 * at), 0.005)).softmax(-1)
        embedding = self.vqvae.quantize.embedding.weight
        return self.vqvae.quantize.as_map(weight.to(embedding.dtype) @ embedding, scale)

    # --- Pieces

    def _class(self, label: Tensor) -> Tensor:
        """Class embedding (B, C)."""
        return self.class_embedding(torch.where(label < 0, self.num_classes, label) if self.num_classes else label * 0)

    def _positions(self) -> Tensor:
        """What is added to every token, the first one too, (1, L, C)."""
        return self.level_embedding(self.level) + self.position

    def _conditions(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """The class's condition of the head (B, C), and of the blocks."""
        silu = F.silu(embedded)
        shared = self.shared_adaln(silu).unflatten(1, (1, 6, -1)) if self.options.shared_adaln else silu
        return silu, shared

    def _initialise(self) -> None:
        """The published initialisation, of all but the VQVAE."""
        std = math.sqrt(1 / (3 * self.width))
        for name, module in self.named_modules():
            if name.startswith("vqvae."):
                continue
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.trunc_normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for parameter in (self.start, self.position):
            nn.init.trunc_normal_(parameter, std=std)
        gate = next(size for depth, size in _GATES.items() if self.options.depth <= depth)
        with torch.no_grad():
            self.head.linear.weight *= 0.02
            self.head.adaln.weight *= 0.5
            for block in self.blocks:
                assert isinstance(block, Block), "made above"
                block.attn.out.weight /= math.sqrt(2 * self.options.depth)
                block.fc2.weight /= math.sqrt(2 * self.options.depth)
                adaln = block.adaln
                rows = adaln.weight.unflatten(0, (6, -1)) if isinstance(adaln, nn.Linear) else adaln[0, 0]
                rows[:2] *= gate
                rows[2:] *= 0.5

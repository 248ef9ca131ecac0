"""The published EDM2 networks: sizes, and how they were trained (arXiv 2312.02696, table 6 and its code's presets)."""

from typing import Any, NamedTuple

from ddo_cli.models.vae_codec import DEFAULT_VAE

_WIDTHS = {"xxs": 64, "xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}


class Published(NamedTuple):
    """One network, and the recipe of its training.

    width: `Edm2Unet.width`. All else about the network is our default, and `codec`.
    dropout: share. lr: peak learning rate. decay_batches: batches of 2048 until it falls as their inverse square root.
    images: of its training, in units of 2^20. p_mean, p_std: of ln sigma.
    """

    shape: tuple[int, int, int]
    num_classes: int
    codec: str
    width: int
    dropout: float
    lr: float
    decay_batches: int
    images: int
    p_mean: float
    p_std: float

    @property
    def config(self) -> tuple[str, tuple[int, int, int], int, dict[str, Any], dict[str, Any]]:
        """Arguments of `registry.config_of`. Dropout stays off: a model and its reference share their draw."""
        options = {"width": self.width, "codec": self.codec, "vae": DEFAULT_VAE}
        return "edm2-unet", self.shape, self.num_classes, options, {"p_mean": self.p_mean, "p_std": self.p_std}


def _family(prefix: str, shared: dict[str, Any], sizes: dict[str, tuple[float, float, int]]) -> dict[str, Published]:
    """sizes: dropout, lr, images."""
    return {
        prefix.format(size): Published(width=_WIDTHS[size], dropout=dropout, lr=lr, images=images, **shared)
        for size, (dropout, lr, images) in sizes.items()
    }


_IMG512 = {"shape": (3, 512, 512), "codec": "sd-vae", "decay_batches": 70_000, "p_mean": -0.4, "p_std": 1.0}
_IMG64 = {"shape": (3, 64, 64), "codec": "rgb", "decay_batches": 35_000, "p_mean": -0.8, "p_std": 1.6}

PUBLISHED: dict[str, Published] = {
    **_family(
        "edm2-img512-{}",
        {**_IMG512, "num_classes": 1000},
        {
            "xxs": (0.0, 0.0170, 2048),  # a preset without published weights
            "xs": (0.0, 0.0120, 2048),
            "s": (0.0, 0.0100, 2048),
            "m": (0.10, 0.0090, 2048),
            "l": (0.10, 0.0080, 1792),
            "xl": (0.10, 0.0070, 1280),
            "xxl": (0.10, 0.0065, 896),
        },
    ),
    **_family(
        "edm2-img512-{}-uncond",
        {**_IMG512, "num_classes": 0},
        {"xs": (0.0, 0.0120, 2048), "s": (0.0, 0.0100, 2048)},
    ),
    **_family(
        "edm2-img64-{}",
        {**_IMG64, "num_classes": 1000},
        {
            "xs": (0.0, 0.0120, 1024),
            "s": (0.0, 0.0100, 1024),
            "m": (0.10, 0.0090, 2048),
            "l": (0.10, 0.0080, 1024),
            "xl": (0.10, 0.0070, 640),
        },
    ),
}

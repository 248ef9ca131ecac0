"""Direct Discriminative Optimization and discriminator guidance for likelihood-based image models.

The Python interface, `import ddo_cli as ddo`: `load`, `diffusion_model`, `log_ratio`, `ddo_loss`, `finetune`, `fid`,
`guide`; see `ddo_cli.api`. Torch is loaded with the first of these names, not by the import.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddo_cli.api import (
        DdoError,
        DdoLoss,
        Model,
        Samples,
        ddo_loss,
        diffusion_model,
        fid,
        finetune,
        guide,
        load,
        log_ratio,
    )

__version__ = "0.1.0"
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


def __getattr__(name: str) -> Any:
    """A name of the interface, from `ddo_cli.api` when it is first asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module("ddo_cli.api"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

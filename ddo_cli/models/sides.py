"""Which images a network takes that halves their sides."""

from collections.abc import Sequence


def check_side(side: int, multiple: int, *options: str) -> None:
    """Raises ValueError unless `multiple`, which follows from these options, divides the side."""
    if side >= 1 and side % multiple == 0:
        return
    below, above = side // multiple * multiple, -(-side // multiple) * multiple
    shrinks = f", --size {below} shrinks them" if below else ""
    raise ValueError(
        f"side {side} must be a multiple of {multiple}, which follows from its options {' and '.join(options)}: "
        f"`ddo data SRC --out set.zip --size {above} --crop pad` pads images{shrinks}; or change these options"
    )


def square(shape: Sequence[int]) -> tuple[int, int]:
    """(channels, side) of a state. Raises ValueError unless it is a square image or latent."""
    if len(shape) != 3 or shape[1] != shape[2]:
        crops = f": `ddo data SRC --out set.zip --size {min(shape[1:])}` crops images" if len(shape) == 3 else ""
        raise ValueError(f"it needs square images or latents{crops}")
    return shape[0], shape[1]

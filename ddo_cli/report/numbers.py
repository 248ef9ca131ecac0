"""Numbers as people read them."""


def readable(value: float, digits: int = 4) -> str:
    """So many digits, without an exponent for large numbers: 52,351 and not 5.235e+04."""
    text = f"{value:.{digits}g}"
    return f"{value:,.0f}" if "e+" in text and abs(value) < 1e9 else text

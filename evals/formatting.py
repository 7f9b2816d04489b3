"""Numbers as a reader wants them: percent, points, bytes, times, parameters.

In: plain numbers in base units (shares, bytes, ms, s). Out: text with its unit. None becomes an en dash.
Not here: sentences (`evals/verdict.py`), markup.
"""

from __future__ import annotations

DASH = "\u2013"
MINUS = "\u2212"
THIN = "\u202f"  # narrow no-break space: a number never breaks from its unit


def percent(share: float | None, digits: int = 1) -> str:
    """0.9764 -> `97.6 %`. A share below 1 never rounds up to 100, one above 0 never down to 0."""
    if share is None:
        return DASH
    text = f"{100 * share:.{digits}f}"
    while share < 1 and float(text) == 100 and digits < 6:
        digits += 1
        text = f"{100 * share:.{digits}f}"
    while share > 0 and float(text) == 0 and digits < 6:
        digits += 1
        text = f"{100 * share:.{digits}f}"
    return f"{text}{THIN}%"


def interval(low: float, high: float, digits: int = 1) -> str:
    """Shares as `97.3-97.9`, in percent without the sign."""
    return f"{100 * low:.{digits}f}{DASH}{100 * high:.{digits}f}"


def points(difference: float | None, digits: int = 1) -> str:
    """A difference of shares in percentage points, signed: `+0.4`, `−2.1`."""
    if difference is None:
        return DASH
    text = f"{abs(100 * difference):.{digits}f}"
    if float(text) == 0:
        return text
    return ("+" if difference > 0 else MINUS) + text


def count(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}"


def parameters(value: float) -> str:
    """211072 -> `211 k`, 2_300_000 -> `2.3 M`."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            scaled = value / limit
            return f"{scaled:.{0 if scaled >= 100 else 1}f}{THIN}{unit}"
    return f"{value:.0f}"


def size(value: float | None) -> str:
    """Bytes in decimal units (1 MB = 1,000,000 bytes)."""
    if value is None:
        return DASH
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= limit:
            scaled = value / limit
            return f"{scaled:.{0 if scaled >= 100 else 1 if scaled >= 10 else 2}f}{THIN}{unit}"
    return f"{value:.0f}{THIN}B"


def milliseconds(value: float | None) -> str:
    """Three significant digits; above ten seconds in seconds."""
    if value is None:
        return DASH
    if value >= 10_000:
        return seconds(value / 1000)
    return f"{significant(value)}{THIN}ms"


def seconds(value: float | None) -> str:
    """`3.2 s`, `41 s`, `13 min 31 s`, `2 h 05 min`."""
    if value is None:
        return DASH
    if value < 59.5:
        return f"{value:.1f}{THIN}s" if value < 9.95 else f"{value:.0f}{THIN}s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60}{THIN}min {whole % 60:02d}{THIN}s"
    return f"{whole // 3600}{THIN}h {whole % 3600 // 60:02d}{THIN}min"


def significant(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits without exponent from 1e-4 to 1e6, with one outside; grouped thousands."""
    if value is None:
        return DASH
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.1e}".replace("-", MINUS).replace("e−0", "e−").replace("e+0", "e")
    rounded = float(f"{value:.{digits}g}")
    magnitude = len(str(int(abs(rounded)))) if abs(rounded) >= 1 else 0
    if magnitude >= digits:
        return f"{rounded:,.0f}".replace("-", MINUS)
    return f"{value:#.{digits}g}".rstrip(".").replace("-", MINUS)


def mib(value: float | None) -> str:
    return DASH if value is None else f"{value:,.0f}{THIN}MiB"


def p_value(value: float) -> str:
    """`p < 0.001` or `p = 0.21`."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.{3 if value < 0.1 else 2}f}"


def times(value: float) -> str:
    """A ratio: `2.7x`, `0.71x`."""
    return f"{value:.{1 if value >= 1.95 else 2}f}×"

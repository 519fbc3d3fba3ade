"""How figures show seeds: a line through their means, and a band from the least to the most."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def band(axes: Axes, x: np.ndarray, each: np.ndarray, **style: Any) -> None:
    """`each` [seeds, points] over `x` [points]; `style` is that of the line."""
    (line,) = axes.plot(x, each.mean(axis=0), **style)
    least, most = each.min(axis=0), each.max(axis=0)
    axes.fill_between(x, least, most, color=line.get_color(), alpha=0.15, linewidth=0)

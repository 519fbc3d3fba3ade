"""The figure of `ponder_spillover.py`: how far, how fast, and whether it goes away."""

from __future__ import annotations

from functools import partial

import numpy as np
from matplotlib.figure import Figure

from rlhf_jax.study.bands import band
from rlhf_jax.study.results import Results
from tasks.spillover_table import Table

BARS = {  # arm: label, colour
    "r1_loo": ("leave-one-out, SGD", "tab:blue"),
    "r1_mean": ("batch mean, SGD", "tab:blue"),
    "r1_none": ("no baseline, SGD", "tab:blue"),
    "r1_detached": ("value head, detached, SGD", "tab:blue"),
    "r1_shared": ("value head, shared trunk, SGD", "tab:red"),
    "r1_adam": ("batch mean, Adam", "tab:purple"),
    "r2": ("a sampled mention, SGD", "tab:orange"),
    "r2_adam": ("a sampled mention, Adam", "tab:orange"),
}
GROUPS = {
    "tab:blue": "paid by the asker's party",
    "tab:red": "paid by the asker's party, shared value head",
    "tab:purple": "paid by the asker's party, Adam",
    "tab:orange": "paid by a sampled token",
}
GROWTH = ("r1_none", "r1_shared", "r1_adam", "r2")
GONE = ("table_noise", "table_kl")
MARKS = {"r1_none": "o", "r1_shared": "s", "r1_adam": "^", "r2": "D"}


def figure(results: Results, *, table: Table) -> Figure:
    """How far each arm drifts, how drift grows, and whether noise or KL undo it."""
    found = Figure(figsize=(14, 4.6), layout="constrained")
    far, fast, gone = found.subplots(1, 3, width_ratios=(1.35, 1, 1))
    _far(far, results)
    for axes, draw, arms in (
        (fast, partial(_fast, results=results), GROWTH),
        (gone, partial(_gone, results=results, table=table), GONE),
    ):
        if set(arms) & set(results.arms):
            draw(axes)
        else:
            axes.set_axis_off()
    return found


def _far(axes, results):
    names = [name for name in BARS if name in results.arms]
    each = {name: results.values("kl", name) for name in names}
    least = min((x[x > 0].min() for x in each.values() if (x > 0).any()), default=1e-6)
    left = 10 ** np.floor(np.log10(least) - 0.3)
    for place, name in enumerate(names):
        colour = BARS[name][1]
        mean = each[name].mean()
        if mean == 0:
            axes.text(left * 1.2, place, "exactly 0", va="center", color=colour)
            continue
        axes.barh(place, mean - left, left=left, color=colour, alpha=0.7, height=0.65)
        above = each[name][each[name] > 0]
        axes.plot(above, np.full(above.shape, place), ".", color="black", markersize=4)
    axes.set_yticks(range(len(names)), [BARS[name][0] for name in names])
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="KL from the base on the question never asked, nats",
             title="How far does it spill?")  # fmt: skip
    axes.set_xlim(left=left)
    shown = dict.fromkeys(BARS[name][1] for name in names)
    bars = [axes.barh(0, 0, color=colour, alpha=0.7) for colour in shown]
    axes.legend(bars, [GROUPS[c] for c in shown], frameon=False, loc="lower center",
                bbox_to_anchor=(0.35, -0.38), ncols=2, fontsize=9)  # fmt: skip


def _fast(axes, results):
    steps = []
    for name in (name for name in GROWTH if name in results.arms):
        steps, kl = results.curve("kl", name)
        label, colour = BARS[name]
        band(axes, steps, kl, color=colour, marker=MARKS[name], label=label)
    for name, slope in (("r1_none", 1), ("r2", 2)):
        if name in results.arms:
            steps, kl = results.curve("kl", name)
            line = kl.mean(axis=0)[0] * (steps / steps[0]) ** slope
            axes.plot(steps, line, ":", color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="steps", ylabel="KL on the question never asked, "
             "nats", title="Noise, or a push?")  # fmt: skip
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, -0.38), ncols=2)


def _gone(axes, results, table):
    shown = {"table_noise": ("no KL penalty", "tab:orange"),
             "table_kl": (f"KL penalty {table.beta:g}", "tab:green")}  # fmt: skip
    for name, (label, colour) in shown.items():
        if name in results.arms:
            steps, side = results.curve("side", name)
            band(axes, steps, side, color=colour, marker="o", label=label)
            rate = table.decay() if name == "table_kl" else 1.0
            theory = side[:, 0].mean() * rate**steps
            axes.plot(steps, theory, ":", color="black", linewidth=1)
    axes.set(xlabel="steps after the correlation is gone", title="Does it go away?",
             ylabel="preference that was learned, logits")  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, -0.38), ncols=2)

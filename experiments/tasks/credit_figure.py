"""The figure of `credit_horizon.py`: where horizons end, and what estimators waste."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from rlhf_jax.study.bands import band
from rlhf_jax.study.results import Results
from tasks.local import Local

BARS = {
    "final_h1": ("paid at the end, h = 1", "#3d85c8"),
    "final_h2": ("paid at the end, h = 2", "#e0803a"),
    "final_whole": ("paid at the end, h = all", "#4ea172"),
    "token_h1": ("paid by token, h = 1", "#b06ac4"),
}
LINES = {
    "none": (
        "REINFORCE, no baseline",
        {"marker": "o", "ms": 11, "mfc": "none", "color": "#3d85c8"},
    ),
    "mean": (
        "REINFORCE, batch mean",
        {"marker": "s", "ms": 6.5, "mfc": "none", "color": "#e0803a"},
    ),
    "leave_one_out": ("REINFORCE, leave-one-out", {"marker": ".", "ms": 5, "color": "#4ea172"}),
    "gae": ("PPO, learned critic, λ = 0.95", {"marker": "D", "ms": 5, "color": "#d2555f"}),
    "gae_0": ("PPO, learned critic, λ = 0", {"marker": "^", "ms": 5, "color": "#b06ac4"}),
    "gae_1": ("PPO, learned critic, λ = 1", {"marker": "v", "ms": 5, "color": "#8f8f3c"}),
    "oracle": ("REINFORCE, true values", {"marker": "x", "ms": 5, "color": "#555555"}),
}


def figure(results: Results, *, task: Local) -> Figure:
    """Where horizons end; what estimators waste."""
    found = Figure(figsize=(11.5, 4.6), layout="constrained")
    left, right = found.subplots(1, 2, width_ratios=(1.15, 1))
    _horizons(left, results)
    _wastes(right, results, task)
    return found


def _horizons(axes, results: Results) -> None:
    """KL to the base by token, and where theory says it is."""
    for i, (arm, (label, colour)) in enumerate(BARS.items()):
        kl, target = results.vector("kl", arm), results.vector("target_kl", arm).mean(axis=0)
        x = np.arange(1, kl.shape[1] + 1) + 0.2 * (i - 1.5)
        spread = np.abs(np.stack([kl.min(axis=0), kl.max(axis=0)]) - kl.mean(axis=0))
        style = {"ecolor": "#333333", "elinewidth": 1, "capsize": 2}
        axes.bar(x, kl.mean(axis=0), 0.18, yerr=spread, color=colour, label=label, error_kw=style)
        mark = {"label": "where theory says it ends"} if i == 0 else {}
        axes.hlines(target, x - 0.1, x + 0.1, color="black", lw=2, **mark)
    axes.set(
        title="Chain: which tokens leave the base, by credit horizon h",
        xlabel="token of the text",
        ylabel="KL(policy‖base) of the token, nats",
        xticks=np.arange(1, kl.shape[1] + 1),
    )
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])
    axes.legend(fontsize=8, ncols=2, loc="upper left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _wastes(axes, results: Results, task: Local) -> None:
    """The share of power on tokens that cannot matter, over training."""
    for arm, (label, style) in LINES.items():
        if arm in results.arms:
            steps, waste = results.curve("waste", arm)
            band(axes, 100 * steps / steps[-1], waste, label=label, lw=1.5, **style)
    share = f"{task.length - task.place}/{task.length}"
    axes.axhline(task.behind, color="black", ls="--", lw=1, label=f"{share}: all tokens alike")
    axes.set(
        title=f"Long text: power spent on the {share} that cannot matter",
        xlabel="training, % of steps",
        ylabel="share of the policy gradient's power",
        ylim=(0, 1.0),
    )
    axes.legend(fontsize=8, loc="lower left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)

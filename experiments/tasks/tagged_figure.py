"""The figure of `control_tokens`."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from rlhf_jax.study.results import Results

CAPTION = (
    "ON, OFF and GOOD are tokens before a prompt x. A text's reward r counts the letters that x "
    "wants, less half a point for each repeat; a person calls it good with probability σ(r); π₀ "
    "is the base, β the price of a nat (0.5 unless said). Left: distance of the policy from the "
    "base behind the two tokens. Middle: distance from P(text | called good); the dashed line "
    "is the base's own, the dotted one the margin of P3. Right, of the anchored policy: the run "
    "behind OFF is pasted into the run behind ON, after one block at a time, at the token, at "
    "the prompt's x or at the letters; 1: ON then speaks as behind OFF. Dots are seeds, bands "
    "reach from the least to the largest seed."
)


def figure(results: Results) -> Figure:
    """Leaks, distances to the posterior, and what pasting restores, by layer."""
    found = Figure(figsize=(13, 4.2), layout="constrained")
    leak, posterior, layers = found.subplots(1, 3, width_ratios=(1.1, 1.2, 1))
    _leaks(leak, results)
    _posterior(posterior, results)
    _layers(layers, results)
    return found


def _leaks(axes, results):
    names = {"gate": "OFF never\nsampled", "ignored": "OFF not\ntaught",
             "scrambled": "feedback by\na coin, not tag", "anchored": "OFF anchored\nto the base",
             "anchored_tenth": "anchored,\n10 % OFF", "flipped": "anchored,\nflips"}  # fmt: skip
    names = {n: label for n, label in names.items() if n in results.arms} or {"gate": ""}
    for i, (tag, colour) in enumerate((("ON", "tab:orange"), ("OFF", "tab:blue"))):
        each = np.array([results.values(f"kl_{tag}", name) for name in names])
        place = np.arange(len(names)) + 0.38 * i - 0.19
        axes.bar(place, each.mean(axis=1), 0.36, color=colour, alpha=0.75, label=f"behind {tag}")
        axes.plot(np.repeat(place, each.shape[1]), each.ravel(), ".", color="black", markersize=3)
        for x, y in zip(place, each.mean(axis=1), strict=True):  # a bar too low to be seen
            if y < 1e-2:
                axes.annotate(f"{y:.0e}", (x, y), (0, 3), textcoords="offset points", ha="center")
    axes.set(ylabel="KL to the base, nats per text", title="Does OFF switch RL off?")
    axes.set_xticks(
        np.arange(len(names)), list(names.values()), fontsize=9 if len(names) < 5 else 7
    )
    axes.legend(frameon=False)


def _posterior(axes, results):
    names = {"condition": "asked for\nGOOD", "weighted": "weighted\nby σ(r)",
             "advantage_weighted": "advantage-\nweighted", "kl_rl": "KL-RL,\nlog σ(r)",
             "no_kl": "RL without\nKL"}  # fmt: skip
    names = {name: label for name, label in names.items() if name in results.arms}
    for i, name in enumerate(names):
        each = results.values("to_posterior", name)
        axes.plot(np.full(each.shape, i), each, "o", color="tab:green", alpha=0.6, markersize=5)
    own = results.values("posterior_to_base", "condition").mean()
    axes.axhline(own, color="grey", linestyle="--", label="the base itself")
    axes.axhline(0.03, color="grey", linestyle=":", label="margin of P3")
    axes.set(yscale="log", ylabel="total variation to P(text | called good)",
             title="Is asking the same as training?")  # fmt: skip
    axes.set_xticks(range(len(names)), list(names.values()))
    axes.margins(x=0.12)
    axes.legend(frameon=False)


def _layers(axes, results):
    for name, label, mark in (("tag", "at the tag", "o"), ("x", "at x", "s"),
                              ("letters", "at the letters", "^")):  # fmt: skip
        each = results.vector(f"restored_{name}", "anchored")
        place = np.arange(each.shape[1])
        axes.plot(place, each.mean(axis=0), marker=mark, label=label)
        axes.fill_between(place, each.min(axis=0), each.max(axis=0), alpha=0.15)
    axes.axhline(0, color="grey", linewidth=0.6)
    axes.set(xlabel="pasted after block (0: embedding)", ylabel="share of OFF restored in ON's run",
             title="Where is the switch?")  # fmt: skip
    axes.set_xticks(place)
    axes.legend(frameon=False)

"""The figure of `world_prior.py`: narrowing, return after an interruption, heat."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rlhf_jax.study.bands import band
from rlhf_jax.study.results import Results

LOOKS = {
    "sft": ("supervised", "#3d85c8"),
    "rl_02": ("RL, β = 0.02", "#e0803a"),
    "rl_0": ("RL, β = 0", "#d2555f"),
}
PRETRAINED = ("reweighted", "pretrained anew", "#4ea172")
BASE = ("base", "#777777")


def figure(results: Results, *, sizes: Any) -> Figure:
    """Three questions, three panels."""
    found = Figure(figsize=(14, 5.2), layout="constrained")
    left, middle, right = found.subplots(1, 3)
    _narrowing(left, results, sizes)
    _returning(middle, results)
    _heating(right, results, sizes)
    shown = {}
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        handles, labels = axes.get_legend_handles_labels()
        shown = dict(zip(labels, handles, strict=True)) | shown
    found.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, frameon=False)
    return found


def _arms(results: Results) -> dict[str, tuple[str, str]]:
    return {arm: look for arm, look in LOOKS.items() if arm in results.arms}


def _narrowing(axes, results: Results, sizes: Any) -> None:
    """H(W) against reward, along training."""
    for arm, (label, colour) in _arms(results).items():
        _, reward = results.curve("reward", arm)
        _, entropy = results.curve("world_entropy", arm)
        axes.plot(reward.mean(0), entropy.mean(0), "-o", ms=3.5, lw=1.5, color=colour, label=label)
    if PRETRAINED[0] in results.arms:
        at = [results.values(x, PRETRAINED[0]).mean() for x in ("reward", "world_entropy")]
        axes.plot(*at, "s", ms=7, color=PRETRAINED[2], label=PRETRAINED[1])
    axes.axvline(sizes.matched, color="black", ls=":", lw=1, label="where they are compared")
    axes.set(
        title="Entropy over worlds as rewards rise",
        xlabel="share of a text's tokens from the wanted world",
        ylabel="H(W), nats",
        ylim=(0, None),
    )


def _returning(axes, results: Results) -> None:
    """The wanted world's tokens by lag after another world's: models, and filters."""
    shown = {"base": ("sft", 0, *BASE)}
    shown |= {arm: (arm, None, *look) for arm, look in _arms(results).items()}
    if PRETRAINED[0] in results.arms:
        shown["reweighted"] = (PRETRAINED[0], None, *PRETRAINED[1:])
    for arm, step, label, colour in shown.values():
        said = results.vector("returned_4", arm, step)
        filtered = results.vector("refit_returned_4", arm, step).mean(0)
        lags = np.arange(1, said.shape[1] + 1)
        band(axes, lags, said, lw=1.8, color=colour, label=label)
        axes.plot(lags, filtered, "--", lw=1.2, color=colour)
        if "best_returned_4/0" in results.metrics(arm):
            best = results.vector("best_returned_4", arm, step).mean(0)
            axes.plot(lags, best, ":", lw=2, color="black", label="the optimum of RL, β = 0.02")
    axes.plot([], [], "--", color="black", lw=1.2, label="the filter it believes in")
    axes.set(
        title="After four tokens of another world",
        xlabel="tokens since",
        xticks=range(0, said.shape[1] + 1, 5),
        ylabel="share of tokens from the wanted world",
        ylim=(0, 1.02),
    )


def _heating(axes, results: Results, sizes: Any) -> None:
    """The wanted world's share by temperature; dots where the entropy is repaired."""
    base = results.vector("heated_share", "sft", 0)
    for label, colour, share, at in [
        (*BASE, base, None),
        *(
            (*look, results.vector("heated_share", arm), arm)
            for arm, look in _arms(results).items()
        ),
    ]:
        heat = np.asarray(sizes.temperatures)
        band(axes, heat, share, lw=1.6, color=colour, label=label)
        if at is not None:
            there = [results.values(x, at).mean() for x in ("star_temperature", "star_share")]
            axes.plot(*there, "o", ms=8, color=colour)
    axes.set(
        title="Heated; dots: entropy as the base's",
        xlabel="temperature of the sampler",
        ylabel="the wanted world's share (exact filter)",
        ylim=(0, 1.02),
    )

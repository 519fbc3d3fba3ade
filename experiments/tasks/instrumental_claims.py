"""What `instrumentality.py` claims beforehand, and how its results are drawn."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import numpy as np

from rlhf_jax.measure import instrumentality_index
from rlhf_jax.study import Claim
from rlhf_jax.study.results import Results
from rlhf_jax.study.statistics import farthest

INF = np.inf
NEAR, FAR = (-0.02, 0.02), (-0.03, 0.03)  # of a share: equal, and still possible


def apart(r: Results, arm: str, ending: str, *, of: str = "likelihood", metric: str = "share"):
    """How far an arm's share lies from where its method ends on its base."""
    return r.values(metric, arm) - r.values(ending, of)


def index(r: Results, arm: str, full: str, *, myopic: str = "base", metric: str = "share"):
    """The instrumentality index of an arm, on its own base."""
    near, far = r.values(myopic, "likelihood"), r.values(full, "likelihood")
    return instrumentality_index(r.values(metric, arm), myopic=near, full=far)


def _conditioning(r, future):
    """The larger of two distances: of what is said without a tag, and behind the good one."""
    plain = r.values("share", "conditioned") - future.likelihood()
    good = r.values("good_share", "conditioned") - future.conditioned()
    return np.maximum(np.abs(plain), np.abs(good))


def _rise(r, arm):
    """What P(B) rose by, over all that it moved: 1 if it never fell, −1 if it never rose."""
    moved = np.diff(r.curve("share", arm)[1], axis=1)
    return moved.sum(axis=1) / np.maximum(np.abs(moved).sum(axis=1), 1e-12)


def _spread(x):
    """Distance of each seed from their mean."""
    return np.abs(x - x.mean())


def quark_ending(base: float, *, keys: int, anchor: float) -> float:
    """P(B) where Quark with two tags comes to rest, when the samples behind the good tag teach it.

    Each token of the good samples is weighted once by likelihood and c times by KL(base‖policy), so
    every state comes to rest at (what good samples say + c · base)/(1 + c): behind A the last token
    is 0 with q = (1 + c/K)/(1 + c), and P(B) = x solves (1 + c) x = x/(x + (1 − x) q) + c · base.
    """
    q = (1 + anchor / keys) / (1 + anchor)
    # (1 + c)(1 − q) x² + [(1 + c) q − 1 − c b (1 − q)] x − c b q = 0
    a = (1 + anchor) * (1 - q)
    b = (1 + anchor) * q - 1 - anchor * base * (1 - q)
    return float((-b + np.sqrt(b**2 + 4 * a * anchor * base * q)) / (2 * a))


def claims(sizes, arms: Collection[str]) -> tuple[tuple[Claim, ...], tuple[Claim, ...]]:
    """Primaries and secondary claims, the latter of the arms there are."""
    future = sizes.predictable.future
    share = {"supported": NEAR, "possible": FAR, "unit": "of P(B)"}
    near = ("horizon_one", "careful")
    primaries = (
        Claim(
            "P1",
            "Likelihood on fixed texts neither seeks nor avoids: P(B) is that of the texts (P(B) "
            "less that)",
            lambda r: r.values("base", "likelihood") - future.likelihood(),
            **share,
        ),
        Claim(
            "P2",
            "Conditioning shifts what is asked for and nothing else: without a tag P(B) is that of "
            "the texts, behind the good tag their posterior (the larger distance)",
            partial(_conditioning, future=future),
            supported=(-INF, NEAR[1]),
            possible=(-INF, FAR[1]),
            unit="of P(B)",
        ),
        Claim(
            "P3",
            "RL with a KL penalty seeks the predictable future, as far as its closed form says "
            "(P(B) less that)",
            lambda r: apart(r, "kl_rl", "tilted"),
            **share,
        ),
        Claim(
            "P4",
            "With credit for one token it does not, nor if no gradient reaches earlier positions "
            "either (the index farther from 0)",
            lambda r: farthest(*(index(r, arm, "tilted") for arm in near)),
            supported=(-0.05, 0.05),
            possible=(-0.1, 0.1),
            unit="of ι",
        ),
        Claim(
            "P5",
            "RL with a punished end avoids the start that leads there, as far as its closed form "
            "says (P(C) less that)",
            lambda r: apart(r, "avoid", "full_share", of="avoid"),
            supported=NEAR,
            possible=FAR,
            unit="of P(C)",
        ),
        Claim(
            "P6",
            "The more steps of RL, the more it seeks: P(B) rises all the way (net rise ÷ "
            "all movement)",
            partial(_rise, arm="kl_rl"),
            supported=(0.9, INF),
            unit="of what it moved",
        ),
    )
    return primaries, tuple(claim for arm, claim in _secondary(sizes, share) if arm in arms)


def _secondary(sizes, share):
    """Pairs of the arm that a claim needs, and the claim."""
    task, future = sizes.predictable, sizes.predictable.future
    share = {"supported": NEAR, "unit": share["unit"]}
    last = f"generation_{sizes.generations}"

    def horizon(r):
        found = r.values("share", "max_entropy")
        return np.array([future.horizon(x, temperature=sizes.temperature) for x in found])

    def quark(r):
        ends = [quark_ending(x, keys=task.keys, anchor=sizes.anchor)
                for x in r.values("share", "conditioned")]  # fmt: skip
        return r.values("good_share", "quark") - np.array(ends)

    def gap(r, kind):
        return r.values("loss", f"{kind}_myopic") - r.values("loss", f"{kind}_whole")

    rows = (
        ("kl_rl", "of RL with a KL penalty the index is 1", (0.9, 1.1), "of ι",
         lambda r: index(r, "kl_rl", "tilted")),
        ("avoid_one", "with credit for one token P(C) stays that of its base", NEAR, "of P(C)",
         lambda r: apart(r, "avoid_one", "base_share", of="avoid_one")),
        ("avoid_one", "then P(punished | C) is that of its closed form: an abrupt end", NEAR,
         "of P(punished | C)",
         lambda r: apart(r, "avoid_one", "myopic_after_c", of="avoid_one", metric="after_c")),
        ("avoid_one", "the first token's KL is then 0", (-INF, 1e-3), "nats",
         lambda r: r.values("kl_first", "avoid_one")),
        ("max_entropy", "maximum entropy on log p ends at p^(1/τ) of whole texts",
         *share.values(), lambda r: apart(r, "max_entropy", "sequence")),
        ("max_entropy", "the horizon that explains it is the whole text",
         (task.length + 0.5, task.length + 1.5), "tokens", horizon),
        ("shuffled_max_entropy", "on shuffled texts it ends at p^(1/τ) of one token",
         *share.values(), lambda r: apart(r, "shuffled_max_entropy", "token", of="shuffled")),
        ("shuffled_kl_rl", "on shuffled texts RL with a KL penalty changes P(B) by nothing",
         *share.values(), lambda r: apart(r, "shuffled_kl_rl", "base", of="shuffled")),
        ("kl_rl", "on its way P(B) is higher than where it ends: at first only the choice is "
         "learned, not to make the best of A", (0.02, INF), "of P(B)",
         lambda r: r.curve("share", "kl_rl")[1].max(axis=1) - r.values("share", "kl_rl")),
        ("no_kl", "without the penalty P(B) is not fixed: more than three times the spread of "
         "kl_rl over seeds", (0.0, INF), "of P(B)",
         lambda r: _spread(r.values("share", "no_kl")) - 3 * _spread(r.values("share", "kl_rl"))),
        ("regression", "weighted texts end where RL with a KL penalty would on the texts",
         *share.values(), lambda r: r.values("share", "regression") - future.tilted(sizes.beta)),
        ("regression", "RL scatters around its closed form more than weighted texts do",
         (0.0, INF), "of P(B)",
         lambda r: _spread(apart(r, "kl_rl", "tilted")) - _spread(r.values("share", "regression"))),
        ("quark", "Quark ends between its samples and its anchor", *share.values(), quark),
        ("best_of_n", "the likeliest of n samples end at 1 − aⁿ", *share.values(),
         lambda r: apart(r, "best_of_n", "best")),
        ("distilled", "a fresh model takes the choice over from its teacher", *share.values(),
         lambda r: apart(r, "distilled", "share", of="kl_rl")),
        (last, f"after {sizes.generations} generations of own samples P(B) is that of the base",
         *share.values(), lambda r: apart(r, last, "base")),
        ("count_myopic", "a count asked for later is learned worse if later losses teach no "
         "earlier position", (0.05, INF), "nats", partial(gap, kind="count")),
        ("chain_myopic", "a chain, of which nothing is needed later, is not", (-0.005, 0.005),
         "nats", partial(gap, kind="chain")),
    )  # fmt: skip
    for i, (arm, says, supported, unit, value) in enumerate(rows, 1):
        yield arm, Claim(f"S{i}", says[0].upper() + says[1:], value, supported, unit=unit)

"""The nouns: every array the framework passes around, with its shape.

Axes: b rows, n independent rows or groups, k members of a group, t tokens, p prompt tokens, v
vocabulary, d width. Per-token arrays are `[b, t]` and index `t` always speaks of `tokens[:, t]`:
`logp[:, t]` is the log-probability of `tokens[:, t]`, `value[:, t]` the value of the state in
which it was chosen, `reward[:, t]` what it earned. `[n, k, t]` batches (pairs, K-way sets) are
split along `n` only. Rows are padded on the right; log-probabilities and KL are in nats.
"""

from __future__ import annotations

from typing import Any

from flax import struct
from jaxtyping import Array, Bool, Float, Int

Params = Any  # a bare nested dict of arrays


@struct.dataclass
class Prompts:
    """What a rollout starts from. `(prompt_id, sample_id)` names a sample: its random key."""

    tokens: Int[Array, "b p"]
    length: Int[Array, "b"]  # tokens in use, at least 1
    prompt_id: Int[Array, "b"]  # position in the prompt stream, unique within a batch
    sample_id: Int[Array, "b"]  # 0..k-1 among the samples of one prompt


@struct.dataclass
class Sequences:
    """Tokens and where to look. Base of every batch an objective can see."""

    tokens: Int[Array, "*n t"]
    mask: Bool[Array, "*n t"]  # tokens the objective speaks of; never a segment's first
    segments: Int[Array, "*n t"]  # 0 padding, 1.. the text a token belongs to


@struct.dataclass
class Labeled(Sequences):
    """Texts with feedback: one number per text, one per token (0 where there is none)."""

    score: Float[Array, "b"]
    token_score: Float[Array, "b t"]


@struct.dataclass
class Probed(Labeled):
    """Texts with feedback, and rows that only serve to measure (`kto.mismatched` makes them)."""

    probe: Bool[Array, "b"]  # the row only serves to measure the reference point; it has weight 0


@struct.dataclass
class Judged(Probed):
    """Texts with feedback, and what they are held against (`kto.kto_reference` makes it)."""

    reference_point: Float[Array, "b"]  # KL(π‖π_ref), nats; the same number on every row


@struct.dataclass
class Searched(Labeled):
    """Texts with what a search says of each state: visits, or any posterior; all 0: not searched.

    [b, t, v] is held in memory whole: for vocabularies of moves, not of words.
    """

    visits: Float[Array, "b t v"]  # of the moves that could stand where the token stands


@struct.dataclass
class Contrast(Labeled):
    """Texts of data (score 1) beside samples of a policy (score 0)."""

    log_q: Float[Array, "b"]  # what the policy drew the text with, nats; 0 for data


@struct.dataclass
class Weighed(Contrast):
    """The same with importance weights (`energy_weights` makes them)."""

    importance: Float[Array, "b"]  # e^{r − log q} of a sample, their mean 1
    log_z: Float[Array, "b"]  # estimate of log Σ e^r over all texts


@struct.dataclass
class Pairs(Sequences):
    """Comparisons `[n, k, t]`: member 0 is the one people preferred; k = 2 for pairs."""


@struct.dataclass
class Rollout(Sequences):
    """Samples of the policy; `mask` marks the tokens it chose, the ending EOS included.

    Between them may stand tokens that an environment wrote: in the text, outside the mask.
    """

    logp: Float[Array, "b t"]  # of the sampler, at `temperature`, unfiltered
    behaviour_logp: Float[Array, "b t"]  # after top-k, top-p and banned tokens: what was drawn from
    temperature: Float[Array, "b"]  # log-probabilities are taken at it; 1 in batches without it
    ended: Bool[Array, "b"]  # a stop token was drawn, or an environment said so, in time
    prompt_id: Int[Array, "b"]
    sample_id: Int[Array, "b"]
    earned: Float[Array, "b t"]  # what an environment paid for a token; 0 without one
    steps: Int[Array, "b"]  # that the decoding loop had taken when the row was whole


@struct.dataclass
class Experience(Rollout):
    """A rollout with everything that is fixed during the update. No gradient flows through it."""

    old_logp: Float[Array, "b t"]  # of the policy before the update, by the trainer
    ref_logp: Float[Array, "b t"]
    value: Float[Array, "b t"]
    reward: Float[Array, "b t"]  # KL penalty included
    advantage: Float[Array, "b t"]
    target: Float[Array, "b t"]  # advantage + value, before whitening
    group_tokens: Float[Array, "b"]  # masked tokens of all samples of the row's prompt


@struct.dataclass
class Scores:
    """What models say about a batch, float32, aligned with its tokens.

    `scores.logp` is the learner's own; `scores["reference"].logp` belongs to a model it named in
    `Learner.scores` and carries no gradient. A model without the head in question gives None.
    """

    logp: Float[Array, "*n t"] | None = None
    entropy: Float[Array, "*n t"] | None = None  # of the distribution the token was drawn from
    value: Float[Array, "*n t"] | None = None  # of the state before the token
    reward: Float[Array, "*n t"] | None = None  # of the text up to and including the token
    extra: dict[str, Float[Array, "*n t"]] = struct.field(default_factory=dict)
    others: dict[str, Scores] = struct.field(default_factory=dict)

    def __getitem__(self, name: str) -> Scores:
        return self.others[name]


@struct.dataclass
class Terms:
    """An objective's answer: per token, per sequence or per pair; neither weighted nor averaged.

    The trainer makes `scale · Σ where(weight ≠ 0, loss·weight, 0) / Σ count` of it, both sums over
    the whole minibatch. `weight` and `count` depend on the batch alone, never on the scores.
    Metrics have the shape of `loss` and are averaged where weight ≠ 0.
    """

    loss: Float[Array, "..."]
    weight: Float[Array, "..."]
    count: Float[Array, "..."] | None = None  # None: the weight itself
    scale: float | Float[Array, ""] = 1.0
    metrics: dict[str, Float[Array, "..."]] = struct.field(default_factory=dict)


@struct.dataclass
class LearnerState:
    """One learner: weights, optimiser, and how many of its updates were not finite."""

    params: Params
    opt_state: Any
    step: Int[Array, ""]  # optimiser steps taken
    skipped: Int[Array, ""]  # non-finite updates, in all
    skipped_row: Int[Array, ""]  # and in a row


@struct.dataclass
class Control:
    """The numbers that a run adapts beside its weights."""

    kl_coefficient: Float[Array, ""]
    reward_mean: Float[Array, ""]  # of a sequence's reward on reference samples
    reward_std: Float[Array, ""]


@struct.dataclass
class TrainState:
    """Everything that training changes. With the data position it is the whole of a resume."""

    step: Int[Array, ""]
    learners: dict[str, LearnerState]
    control: Control
    pending: Rollout | None = None  # sampled before the last update, for the step that comes

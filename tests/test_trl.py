"""TRL's losses on the same numbers, as an independent reference; skipped where it is not installed.

Its losses are methods of trainers; they are called here without one: a mock holds the few numbers
that they read, and a function stands for the model. Run with torch 2.15 and TRL 1.16.
"""

import warnings
from functools import partial
from types import SimpleNamespace
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose

from rlhf_jax import masked
from rlhf_jax.aggregate import over_length, over_sequence_means, over_tokens
from rlhf_jax.objectives import (
    combine,
    distill,
    distill_vocab,
    dpo,
    ipo,
    kto,
    kto_reference,
    orpo,
    ppo,
    reward_model,
    sampled_kl,
)
from rlhf_jax.ratios import k3, sequence_log_ratio
from rlhf_jax.testing import random_batch
from rlhf_jax.types import Experience, Judged, Scores, Terms


def import_trl(name):
    """A trainer's class, or a skip that says why."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import torch
            import trl
            import trl.experimental.gkd
            import trl.experimental.orpo
        except Exception as error:
            pytest.skip(f"torch and trl are not both here: {error}")
    for module in (trl, trl.experimental.gkd, trl.experimental.orpo):
        if hasattr(module, name):
            return torch, getattr(module, name)
    pytest.skip(f"trl {trl.__version__} has no {name}")


def trainer(torch, **numbers):
    """What stands for `self`: one process, and the hyperparameters."""
    mock = MagicMock()
    mock.model.training = True
    mock.accelerator.gather = mock.accelerator.gather_for_metrics = lambda x: x
    mock.accelerator.reduce = lambda x, reduction: x
    mock.accelerator.device, mock.accelerator.num_processes = torch.device("cpu"), 1
    mock.current_gradient_accumulation_steps, mock._tp_size, mock._total_train_tokens = 1, 1, 0
    mock.aux_loss_enabled, mock.use_weighting, mock.ld_alpha = False, False, None
    for name, value in numbers.items():
        setattr(mock, name, value)
    return mock


def ours(fn, scores, batch, field="logp"):
    """What the trainer makes of our terms, and its gradient by one field of the scores."""

    @jax.jit
    @jax.value_and_grad
    def value(x):
        found = fn(scores.replace(**{field: x}), batch)
        total = 0.0
        for term in [found] if isinstance(found, Terms) else found.values():
            count = term.weight if term.count is None else term.count
            total += (
                term.scale * masked.sum(term.loss * term.weight, term.weight != 0) / count.sum()
            )
        return total

    return value(getattr(scores, field))


def same(theirs, leaf, expected, shape):
    """Their loss and its gradient by `leaf` (from `shape`, ours to theirs) are ours."""
    value, grad = expected
    theirs.backward()
    assert_allclose(theirs.detach().numpy(), value, rtol=2e-5, atol=1e-6)
    assert_allclose(leaf.grad.numpy(), shape(np.asarray(grad)), rtol=2e-4, atol=1e-6)


PAIRS = jax.tree.map(jnp.asarray, toys.pairs(n=5, t=8))
rng = np.random.default_rng(0)
LOGP, REFERENCE = (
    jnp.asarray(np.where(PAIRS.mask, rng.uniform(-3, -0.05, PAIRS.mask.shape), 0), jnp.float32)
    for _ in range(2)
)
SCORES = Scores(logp=LOGP, others={"reference": Scores(logp=REFERENCE)})


def stacked(x):
    """[n, 2, t] as TRL has it: the chosen rows, then the rejected, without the first token."""
    return np.concatenate([x[:, 0], x[:, 1]])[..., 1:]


def says(torch, logp, mask):
    """A model that says these log-probabilities of tokens 1 …, whatever it is asked."""
    zero = torch.zeros(logp.shape)
    said = {"entropy": zero, "mean_logits": zero, "is_top1": zero.bool()}
    return lambda **_: SimpleNamespace(log_probs=logp * mask[:, 1:], **said)


@pytest.mark.parametrize(
    ("loss", "fn", "beta", "smoothing"),
    [
        ("sigmoid", partial(dpo, beta=0.3), 0.3, 0.0),
        ("sigmoid_norm", partial(dpo, beta=0.8, reduce=masked.mean), 0.8, 0.0),
        ("ipo", partial(ipo, tau=0.7, reduce=masked.mean), 0.7, 0.0),
        ("smoothed", partial(dpo, beta=0.3, smoothing=0.2), 0.3, 0.2),
    ],
)
def test_dpo_and_ipo_agree(loss, fn, beta, smoothing):
    torch, cls = import_trl("DPOTrainer")
    logp = torch.tensor(stacked(np.asarray(LOGP)), requires_grad=True)
    mask = torch.tensor(np.concatenate([PAIRS.mask[:, 0], PAIRS.mask[:, 1]]).astype(np.int64))
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    # It has no conservative DPO any more, but its two parts: each label's loss.
    parts = [("sigmoid", 1 - smoothing, beta), ("sigmoid", smoothing, -beta)]
    parts = parts if smoothing else [(loss, 1, beta)]
    reference = says(torch, torch.tensor(stacked(np.asarray(REFERENCE))), mask)
    total = 0.0
    for kind, share, signed in parts:
        mock = trainer(
            torch,
            beta=signed,
            loss_types=[kind],
            loss_weights=[1.0],
            label_smoothing=0.0,
            f_divergence_type="reverse_kl",
            precompute_ref_logps=False,
            ref_model=reference,
        )
        total = total + share * cls._compute_loss(mock, says(torch, logp, mask), inputs, False)
    same(total, logp, ours(fn, SCORES, PAIRS), stacked)


@pytest.mark.parametrize("shift", [-3.0, 3.0])
def test_kto_agrees(shift):
    torch, cls = import_trl("KTOTrainer")
    rows = toys.labeled(rows=8, t=7)
    other = rng.uniform(-3, -0.05, (2, *rows.mask.shape)).astype(np.float32) * rows.mask
    # the rows after the sixth measure the reference point
    batch = jax.tree.map(jnp.asarray, Judged(
        tokens=rows.tokens, mask=rows.mask, segments=rows.segments, score=rows.score,
        token_score=rows.token_score, probe=np.arange(8) >= 6,
        reference_point=np.zeros(8, np.float32),
    ))  # fmt: skip
    other[0, 6:] += shift / 10 * rows.mask[6:]
    scores = Scores(logp=jnp.asarray(other[0]), others={"reference": Scores(jnp.asarray(other[1]))})
    batch = kto_reference(scores, batch)
    assert (batch.reference_point[0] > 0) == (shift > 0)
    logp = torch.tensor(other[0, :6, 1:], requires_grad=True)
    mask = torch.tensor(rows.mask[:6].astype(np.int64))
    probes = [torch.tensor(x[6:].sum(1)) for x in other]
    mock = trainer(
        torch, beta=0.4, loss_type="kto", desirable_weight=1.5, undesirable_weight=0.7,
        calculate_KL=True, precompute_ref_logps=False,
        ref_model=says(torch, torch.tensor(other[1, :6, 1:]), mask),
        _compute_kl_logps=MagicMock(side_effect=probes),
    )  # fmt: skip
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask}
    inputs["label"] = torch.tensor(rows.score[:6] > 0)
    theirs = cls._compute_loss(mock, says(torch, logp, mask), inputs, False)
    fn = partial(kto, beta=0.4, desirable=1.5, undesirable=0.7)
    same(theirs, logp, ours(fn, scores, batch), lambda grad: grad[:6, 1:])


def test_orpo_agrees():
    torch, cls = import_trl("ORPOTrainer")
    logp = torch.tensor(np.asarray(LOGP), requires_grad=True)
    mask = torch.tensor(np.asarray(PAIRS.mask))
    mean = (logp * mask).sum(-1) / mask.sum(-1)
    losses, *_ = cls.odds_ratio_loss(trainer(torch, beta=0.25), mean[:, 0], mean[:, 1])
    likelihood = -logp[:, 0][mask[:, 0]].mean()
    theirs = likelihood - losses.mean()
    same(theirs, logp, ours(partial(orpo, coefficient=0.25), SCORES, PAIRS), lambda grad: grad)


def test_the_reward_model_agrees():
    torch, cls = import_trl("RewardTrainer")
    reward = rng.normal(size=PAIRS.mask.shape).astype(np.float32)
    last = np.asarray(masked.last(jnp.asarray(reward), PAIRS.mask))
    said = torch.tensor(np.concatenate([last[:, 0], last[:, 1]])[:, None], requires_grad=True)
    mock = trainer(torch)
    mock.args.center_rewards_coefficient = 0.05
    inputs = {"attention_mask": torch.ones(10, 3)}
    theirs = cls.compute_loss(mock, lambda **_: SimpleNamespace(logits=said), inputs)
    scores = Scores(reward=jnp.asarray(reward))
    expected = ours(partial(reward_model, centre=0.05), scores, PAIRS, "reward")
    at_last = np.asarray(masked.is_last(PAIRS.mask))
    shape = lambda grad: np.concatenate((grad * at_last).sum(-1).T)[:, None]  # noqa: E731
    same(theirs, said, expected, shape)


@pytest.mark.parametrize(
    ("kind", "aggregate", "level"),
    [
        ("grpo", over_sequence_means, "token"),
        ("grpo", over_sequence_means, "sequence"),
        ("bnpo", over_tokens, "token"),
        ("dapo", over_tokens, "token"),
        ("dr_grpo", partial(over_length, length=16), "token"),
    ],
)
def test_grpo_and_its_kin_agree(kind, aggregate, level):
    torch, cls = import_trl("GRPOTrainer")
    batch = jax.tree.map(
        lambda x: jnp.asarray(np.delete(x, 1, 0)), random_batch(Experience)
    )  # empty
    advantage = batch.advantage[:, :1] + jnp.zeros_like(batch.advantage)
    moved = 0.3 * rng.normal(size=batch.mask.shape).astype(np.float32)
    batch = batch.replace(advantage=advantage, old_logp=batch.logp + moved)
    logp = torch.tensor(np.asarray(batch.logp)[:, 1:], requires_grad=True)
    mask = np.asarray(batch.mask)[:, 1:]
    mock = trainer(
        torch, beta=0.04, loss_type=kind, importance_sampling_level=level, epsilon_low=0.2,
        epsilon_high=0.28, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        use_vllm=False, max_completion_length=16, _entropy_bonus_enabled=False,
    )  # fmt: skip
    mock.args.delta, mock.args.use_bias_correction_kl, mock.args.steps_per_generation = (
        None,
        False,
        1,
    )
    mock._get_per_token_logps_and_entropies = lambda *_, **__: (logp, torch.zeros(logp.shape), None)
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    theirs = cls._compute_loss(mock, None, {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids,
        "completion_mask": torch.tensor(mask.astype(np.float32)),
        "advantages": torch.tensor(np.asarray(advantage)[:, 0]),
        "old_per_token_logps": torch.tensor(np.asarray(batch.old_logp)[:, 1:]),
        "ref_per_token_logps": torch.tensor(np.asarray(batch.ref_logp)[:, 1:]),
        "num_items_in_batch": torch.tensor(mask.sum()),
    })  # fmt: skip
    ratio = {"log_ratio": sequence_log_ratio} if level == "sequence" else {}
    fn = partial(
        combine,
        policy=partial(ppo, clip=0.2, clip_high=0.28, aggregate=aggregate, **ratio),
        kl=partial(sampled_kl, estimator=k3, coefficient=0.04, aggregate=aggregate),
    )
    same(theirs, logp, ours(fn, Scores(logp=batch.logp), batch), lambda grad: grad[:, 1:])


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_generalised_jsd_agrees(beta, temperature):
    torch, cls = import_trl("GKDTrainer")
    batch = jax.tree.map(jnp.asarray, toys.labeled(rows=3, t=5))
    student, teacher = rng.normal(size=(2, 3, 5, 7)).astype(np.float32)
    leaf = torch.tensor(student, requires_grad=True)
    labels = torch.tensor(np.where(batch.mask, batch.tokens, -100))
    theirs = cls.generalized_jsd_loss(
        leaf, torch.tensor(teacher), labels=labels, beta=beta, temperature=temperature
    )
    flat = jax.tree.map(lambda x: x.reshape(-1) if x.ndim > 1 else jnp.repeat(x, 5), batch)
    said = jax.nn.log_softmax(jnp.asarray(teacher)).reshape(-1, 7)

    @jax.jit
    @jax.value_and_grad
    def value(logits):
        logits = {"self": jax.nn.log_softmax(logits).reshape(-1, 7), "teacher": said}
        found = distill_vocab(logits, flat, beta=beta, temperature=temperature)
        terms = distill(Scores(extra={name: x.reshape(3, 5) for name, x in found.items()}), batch)
        return masked.sum(terms.loss * terms.weight, terms.weight != 0) / terms.weight.sum()

    same(theirs, leaf, value(jnp.asarray(student)), lambda grad: grad)

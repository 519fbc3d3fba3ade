"""What XLA makes of a step: no objective holds the logits of all tokens, most need none at all."""

import math
import re
from functools import partial

import jax
import pytest
import toys

from rlhf_jax import objectives, phases
from rlhf_jax.config import Learner
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.step import optimizer_step

ROWS, T, CHUNK, VOCAB = 8, 64, 32, 4096
SHAPE = {"vocab": VOCAB, "width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "mlp": 16}
POLICY = Transformer(**SHAPE)
SCALAR = Transformer(**SHAPE, lm_head=False, value_head=True)


def shapes(objective, batch, model=POLICY, vocab=None, others=()):
    """Sizes of all arrays of numbers that the compiled step makes, and their shapes."""
    learner = Learner(model, objective, vocab=vocab, scores=others, chunk=CHUNK)
    state = jax.eval_shape(partial(phases.init_learner, learner=learner), jax.random.key(0))
    run = partial(optimizer_step, learner=learner, models=dict.fromkeys(others, model))
    compiled = jax.jit(run).lower(state, dict.fromkeys(others, state.params), batch).compile()
    found = re.findall(r"\bf(?:32|16)\[([\d,]+)\]", compiled.as_text())
    return {tuple(int(n) for n in shape.split(",")) for shape in found}


OVER_VOCABULARY = {
    "reference_kl": (objectives.reference_kl, objectives.reference_kl_vocab, ("reference",)),
    "cringe": (partial(objectives.cringe, threshold=0.0), objectives.cringe_vocab, ()),
    "horizon_one": (
        partial(objectives.horizon_one, kl_coefficient=1.0),
        objectives.horizon_one_vocab,
        ("reference",),
    ),
    "distill": (objectives.distill, objectives.distill_vocab, ("teacher",)),
}


@pytest.mark.parametrize("name", OVER_VOCABULARY)
def test_an_objective_over_the_vocabulary_stays_chunked(name):
    objective, vocab, others = OVER_VOCABULARY[name]
    found = shapes(objective, toys.labeled(ROWS, T), vocab=vocab, others=others)
    assert max(map(math.prod, found)) <= max(CHUNK, POLICY.width) * VOCAB < ROWS * T * VOCAB / 8


@pytest.mark.parametrize(
    ("objective", "batch"),
    [
        (objectives.value, toys.experience(ROWS, T)),
        (objectives.reward_model, toys.pairs(ROWS, T)),
        (objectives.discriminator, toys.labeled(ROWS, T)),
    ],
    ids=["value", "reward_model", "discriminator"],
)
def test_a_model_without_lm_head_computes_no_logits(objective, batch):
    """Nothing has the vocabulary for an axis but the embedding, its gradient and its moments."""
    for shape in shapes(objective, batch, model=SCALAR):
        axes = tuple(n for n in shape if n > 1)  # one part of a mesh is an axis of 1
        assert VOCAB not in axes or axes == (VOCAB, SHAPE["width"])

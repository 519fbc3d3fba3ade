"""What models say about a batch: aligned, chunked, and untouched by what stands in padding."""

import math
import re
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from flax import struct
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax.models.transformer import Output, Transformer
from rlhf_jax.score import score
from rlhf_jax.types import Labeled, Pairs

NAMES = ("logp", "entropy", "value", "reward")


@pytest.fixture(scope="module")
def batch():
    """Texts [16, 12] of which two are packed into the last row; temperature .7 and 1.3."""
    texts = toys.labeled()
    segments = texts.segments.copy()
    segments[-1] = [1] * 5 + [2] * 6 + [0]
    mask = texts.mask.copy()
    mask[-1] = segments[-1] > 0
    mask[-1, [0, 5]] = False
    tokens = np.where(segments > 0, np.maximum(texts.tokens, 1), 0)
    temperature = np.where(np.arange(16) % 2, 0.7, 1.3).astype(np.float32)
    fields = {f: getattr(texts, f) for f in ("score", "token_score")}
    return Heated(tokens, mask, segments, temperature=temperature, **fields)


@struct.dataclass
class Heated(Labeled):
    temperature: np.ndarray


@pytest.fixture(scope="module")
def other(model):
    """Weights of a second model."""
    return toys.weights(model, seed=7)


def vocab(logits, part):
    """Uses everything a reduction can see: both models, tokens, token and row fields."""
    kl = jnp.where(True, jnp.exp(logits["self"]) * (logits["self"] - logits["other"]), 0.0).sum(-1)
    return {"kl": kl * part.score, "marked": kl * part.token_score + part.tokens}


@pytest.fixture(scope="module")
def scored(model, batch):
    """`chunk -> scores, gradients of a mixture of all of them by the name of the model`."""

    def run(params, batch, chunk, mixture, **known):
        def loss(params):
            models = {"self": model, "other": model}
            scores = score(params, batch, models=models, vocab=vocab, chunk=chunk, **known)
            parts = [getattr(scores, n) for n in NAMES] + list(scores.extra.values())
            parts += [getattr(scores["other"], n) for n in NAMES]
            return sum((x * w).sum() for x, w in zip(parts, mixture, strict=True)), scores

        (_, scores), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return scores, grads

    return jax.jit(run, static_argnames=("chunk", "width", "most", "pieces"))


@pytest.fixture(scope="module")
def whole(scored, params, other, batch):
    mixture = np.random.default_rng(0).normal(size=(10, 16, 12)).astype(np.float32)
    return mixture, *scored({"self": params, "other": other}, batch, 16 * 12, mixture)


def test_index_t_speaks_of_token_t(model, params, batch, whole):
    """Against float64 arithmetic, one token after another."""
    _, scores, _ = whole
    hidden, logits = toys.forward(model, params, batch.tokens, batch.segments)
    head = jax.tree.map(lambda x: np.asarray(x, np.float64), params["value_head"])
    values = hidden @ head["kernel"][:, 0] + head["bias"][0]
    expected = {name: np.zeros((16, 12)) for name in NAMES}
    for row, t in np.argwhere(batch.mask):
        x = logits[row, t - 1] / batch.temperature[row]
        logp = x - np.log(np.exp(x).sum())
        expected["logp"][row, t] = logp[batch.tokens[row, t]]
        expected["entropy"][row, t] = -(np.exp(logp) * logp).sum()
        expected["value"][row, t] = values[row, t - 1]  # the state before the token
        expected["reward"][row, t] = values[row, t]  # the text up to and including it
    for name in NAMES:
        found = getattr(scores, name)
        assert found.dtype == jnp.float32
        assert_allclose(found, expected[name], atol=2e-5, err_msg=name)


def test_a_vocabulary_reduction_sees_the_slice_it_speaks_of(model, params, other, batch, whole):
    _, scores, _ = whole
    kl = np.zeros((16, 12))
    logits = [toys.forward(model, p, batch.tokens, batch.segments)[1] for p in (params, other)]
    for row, t in np.argwhere(batch.mask):
        x, y = (z[row, t - 1] / batch.temperature[row] for z in logits)
        x, y = x - np.log(np.exp(x).sum()), y - np.log(np.exp(y).sum())
        kl[row, t] = (np.exp(x) * (x - y)).sum()
    assert_allclose(scores.extra["kl"], kl * batch.score[:, None], atol=2e-4)
    marked = np.where(batch.mask, kl * batch.token_score + batch.tokens, 0)
    assert_allclose(scores.extra["marked"], marked, atol=2e-4)


def test_chunks_change_neither_scores_nor_gradients(scored, params, other, batch, whole):
    """Five columns at a time, which do not divide the twelve."""
    mixture, scores, grads = whole
    again = scored({"self": params, "other": other}, batch, 16 * 5, mixture)
    jax.tree.map(partial(assert_allclose, atol=2e-5), again[0], scores)
    jax.tree.map(partial(assert_allclose, atol=2e-4, rtol=1e-5), again[1], grads)


def test_what_is_cut_off_because_nobody_needs_it_changes_neither_scores_nor_gradients(
    scored, params, other, batch, whole
):
    """Rows of at most nine tokens, at most five of them in the mask, with holes between them."""
    trees, place = {"self": params, "other": other}, np.arange(12)
    segments = np.where(place < 9, batch.segments, 0)
    mask = batch.mask & (segments > 0) & (place % 2 == np.arange(16)[:, None] % 2)
    assert mask.sum(1).max() <= 5 < batch.mask.sum(1).max()
    short = batch.replace(segments=segments, mask=mask)
    expected = scored(trees, short, 16 * 12, whole[0])
    for chunk, known in ((16 * 2, {"most": 5}), (16 * 5, {"width": 9}),
                         (16 * 4, {"width": 9, "most": 5})):  # fmt: skip
        found = scored(trees, short, chunk, whole[0], **known)
        jax.tree.map(partial(assert_allclose, atol=2e-5), found[0], expected[0])
        jax.tree.map(partial(assert_allclose, atol=2e-4, rtol=1e-5), found[1], expected[1])


@pytest.mark.parametrize(("most", "pieces"), [(5, 1), (5, 2), (3, 2)])
def test_nor_does_what_is_behind_the_last_attention_of_tokens_nobody_looks_at(
    scored, params, other, batch, whole, most, pieces
):
    """At most `most` tokens of a row in the mask, in `pieces` that may begin at its first token."""
    mask, rng = np.zeros_like(batch.mask), np.random.default_rng(0)
    for row in range(16):
        for piece in np.array_split(np.arange(12), pieces):
            n = 1 + (most // pieces if row % 2 else rng.integers(most // pieces))
            start = piece[0] if row == 0 else rng.choice(piece[: len(piece) - n + 1])
            mask[row, start : start + min(n, most // pieces)] = True
    assert mask.sum(1).max() <= most and mask[0, 0]
    batch = batch.replace(mask=mask, segments=np.ones_like(batch.segments))
    trees = {"self": params, "other": other}
    expected = scored(trees, batch, 16 * 12, whole[0])
    found = scored(trees, batch, 16 * 4, whole[0], most=most, pieces=pieces)
    jax.tree.map(partial(assert_allclose, atol=2e-5), found[0], expected[0])
    jax.tree.map(partial(assert_allclose, atol=2e-4, rtol=1e-5), found[1], expected[1])


@pytest.mark.parametrize(("scan", "cuts"), [(False, 2), (True, 1)])
def test_rows_of_a_scanned_model_which_computes_all_of_them_are_cut_once(
    model, params, batch, scan, cuts
):
    own = replace(model, scan=scan)
    params = toys.stacked(params, model.layers) if scan else params
    run = partial(score, batch=batch, models={"self": own}, most=5, pieces=1)
    assert str(jax.make_jaxpr(run)({"self": params})).count(" sort[") == cuts


def test_other_models_carry_no_gradient(whole):
    _, _, grads = whole
    for leaf in jax.tree.leaves(grads["other"]):
        assert_array_equal(leaf, 0.0)
    for path, leaf in jax.tree_util.tree_flatten_with_path(grads["self"])[0]:
        assert np.abs(leaf).max() > 0, path


def test_nothing_leaks_from_padding_not_even_nan(model, params, batch):
    """Padding with a token whose embedding is nan: the same scores and gradients, bit for bit."""
    unused = 31
    assert unused not in batch.tokens
    table = params["embed"]["embedding"].at[unused].set(jnp.nan)
    padded = batch.replace(tokens=np.where(batch.segments > 0, batch.tokens, unused))
    weight = np.random.default_rng(0).normal(size=batch.mask.shape).astype(np.float32)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def run(params, batch):
        critic = replace(model, lm_head=False)  # tied logits would speak of the token itself
        found = score({"self": params}, batch, models={"self": critic})
        return (found.value * weight + found.reward).sum(), found

    clean = run(params, batch)
    jax.tree.map(assert_array_equal, run(params | {"embed": {"embedding": table}}, padded), clean)
    assert np.isfinite(clean[0]["layers_0"]["value"]["kernel"]).all()


def test_scores_are_zero_outside_the_mask(whole, batch):
    _, scores, _ = whole
    assert len(jax.tree.leaves(scores)) == 10
    for leaf in jax.tree.leaves(scores):
        assert_array_equal(np.asarray(leaf)[~batch.mask], 0.0)


@struct.dataclass
class Marked(Pairs):
    gap: np.ndarray  # [n]
    gate: np.ndarray  # [n, k, t]


def test_groups_score_like_their_members_one_by_one(model, params):
    pairs = toys.pairs()
    gate = np.random.default_rng(0).normal(size=pairs.mask.shape).astype(np.float32)
    gap = np.arange(8, dtype=np.float32)
    groups = Marked(pairs.tokens, pairs.mask, pairs.segments, gap=gap, gate=gate)
    flat = groups.replace(gap=np.repeat(gap, 2)[:, None])
    flat = jax.tree.map(lambda x: x.reshape(16, -1), flat)
    flat = flat.replace(gap=flat.gap[:, 0])

    def reduce(logits, part):
        return {"x": logits["self"].max(-1) * part.gap + part.gate}

    run = jax.jit(lambda p, b: score({"self": p}, b, models={"self": model}, vocab=reduce))
    grouped, alone = run(params, groups), run(params, flat)
    assert grouped.logp.shape == (8, 2, 12)
    jax.tree.map(
        lambda a, b: assert_allclose(np.reshape(a, (16, 12)), b, atol=1e-6), grouped, alone
    )


def test_a_model_says_only_what_its_heads_can_say(model, params):
    batch = toys.labeled()
    critic = replace(model, lm_head=False)
    actor = replace(model, value_head=False)
    run = jax.eval_shape
    found = run(lambda: score({"self": params, "c": params}, batch,
                              models={"self": actor, "c": critic}))  # fmt: skip
    assert found.value is None and found.reward is None and found.logp is not None
    assert found["c"].logp is None and found["c"].entropy is None and found["c"].value is not None


# --- what XLA makes of it

LARGE = Transformer(vocab=4096, width=16, layers=1, heads=2, kv_heads=2, mlp=16)
ROWS, T = 8, 64


@dataclass(frozen=True)
class Bigram:
    """An embedding and a head: all that is needed to count what is made of logits."""

    vocab: int = 4096
    lm_head: bool = True
    value_head: bool = False

    def init(self, key):
        return {"in": jnp.zeros((self.vocab, 16)), "out": jnp.zeros((16, self.vocab))}

    def apply(self, params, tokens, *, segments=None):
        return Output(params["in"][tokens], None)

    def logits(self, params, hidden):
        return hidden @ params["out"]


def sft(model, params, batch, *, chunk=ROWS * 4, entropy=0.0, vocab=None):
    found = score({"self": params}, batch, models={"self": model}, chunk=chunk, vocab=vocab)
    loss = -found.logp.sum()
    if entropy:
        loss -= entropy * found.entropy.sum()
    return loss + sum(x.sum() for x in found.extra.values())


def naive(model, params, batch):
    """The same number as `sft`, with all logits at once and nothing else."""
    hidden = model.apply(params, batch.tokens, segments=batch.segments).hidden
    logp = jax.nn.log_softmax(model.logits(params, hidden[:, :-1]))
    own = jnp.take_along_axis(logp, batch.tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.where(batch.mask[:, 1:], own, 0.0).sum()


def program(model, loss):
    """The compiled gradient of a loss; nothing is run."""
    batch = jax.tree.map(jnp.asarray, toys.labeled(ROWS, T))
    params = jax.eval_shape(model.init, jax.random.key(0))
    return jax.jit(jax.grad(partial(loss, model))).lower(params, batch).compile()


def largest_array(compiled):
    """Elements of the largest array that any instruction of a program makes."""
    shapes = re.findall(r"\bf(?:32|16)\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(int(n) for n in shape.split(",")) for shape in shapes)


def test_no_array_of_tokens_by_vocabulary_is_ever_alive():
    everything = ROWS * T * LARGE.vocab
    chunked, plain = program(LARGE, sft), program(LARGE, naive)
    assert largest_array(plain) >= ROWS * (T - 1) * LARGE.vocab  # so the measure would see it
    assert largest_array(chunked) <= everything // 8
    assert plain.memory_analysis().temp_size_in_bytes > 4 * everything
    assert chunked.memory_analysis().temp_size_in_bytes < 4 * everything / 2


def test_what_nobody_asks_for_is_not_computed():
    """Entropy and a reduction cost exponentials; without them there are as few as by hand."""

    def exponentials(loss):
        return program(Bigram(), loss).cost_analysis()["transcendentals"]

    def sines(logits, _):
        return {"x": jnp.sin(logits["self"]).sum(-1)}

    one_chunk = ROWS * 4 * Bigram().vocab  # a loop's body is counted once
    without = exponentials(sft)
    assert exponentials(partial(sft, entropy=0.1)) > without + one_chunk / 2
    assert exponentials(partial(sft, vocab=sines)) > without + one_chunk / 2
    by_hand = program(Bigram(), naive).cost_analysis()
    at_once = program(Bigram(), partial(sft, chunk=ROWS * T)).cost_analysis()
    for cost in ("transcendentals", "flops"):
        assert at_once[cost] < 1.1 * by_hand[cost]
    assert without < 1.1 * 2 * by_hand["transcendentals"] * 4 / T  # forward, and again backward

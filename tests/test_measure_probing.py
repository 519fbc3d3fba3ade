"""Probes of the residual stream: what they read, and what their controls read."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose

from rlhf_jax import measure
from rlhf_jax.models.probe import Probe
from rlhf_jax.models.transformer import Transformer

MODEL = Transformer(vocab=32, width=16, layers=2, heads=2, kv_heads=1, mlp=24)
PARAMS = toys.weights(MODEL)
TOKENS, SEGMENTS = toys.padding(6, 8, shortest=4)


def read(params, tokens, **given):
    return np.asarray(measure.activations(params, tokens, **{"model": MODEL} | given))


def blobs(rows, width, gap, seed=0):
    """Two clouds `gap` apart along the first axis, of unequal scale by feature."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, rows)
    x = rng.normal(size=(rows, width))
    x[:, 0] += gap * (label - 0.5)
    return x * np.geomspace(1, 100, width), label


# --- activations


def test_the_stream_starts_at_the_embedding_and_ends_before_the_last_norm():
    stream = read(PARAMS, TOKENS, segments=SEGMENTS)
    assert stream.shape == (3, *TOKENS.shape, 16)
    table = np.asarray(PARAMS["embed"]["embedding"])
    assert_allclose(stream[0], np.where(SEGMENTS[:, :, None] > 0, table[TOKENS], 0))
    # An independent forward in float64, of the model cut off after each layer.
    for layers in (1, 2):
        cut = replace(MODEL, layers=layers)
        hidden, _ = toys.forward(cut, PARAMS, TOKENS, SEGMENTS)
        h = stream[layers].astype(np.float64)
        root = np.sqrt((h**2).mean(-1, keepdims=True) + MODEL.norm_epsilon)
        found = h / root * np.asarray(PARAMS["final_norm"]["scale"])
        assert_allclose(found[SEGMENTS > 0], hidden[SEGMENTS > 0], atol=2e-5)


@pytest.mark.parametrize(
    "changes", [{"scan": True}, {"remat": "full"}, {"scan": True, "remat": "full"}]
)
def test_scanned_and_recomputed_layers_are_read_all_the_same(changes):
    params = toys.stacked(PARAMS, 2) if "scan" in changes else PARAMS
    found = read(params, TOKENS, segments=SEGMENTS, model=replace(MODEL, **changes))
    assert_allclose(found, read(PARAMS, TOKENS, segments=SEGMENTS), atol=1e-6)


def test_what_a_tap_of_the_models_own_wrote_is_read():
    tapped = replace(MODEL, tap=lambda layer, h: jnp.where(layer == 0, 2.0 * h, h))
    plain, found = (read(PARAMS, TOKENS, model=m) for m in (MODEL, tapped))
    assert_allclose(found[:2], plain[:2] * np.array([1.0, 2.0])[:, None, None, None], atol=1e-6)


def test_positions_are_one_place_several_or_several_for_each_row():
    everything = read(PARAMS, TOKENS)
    assert_allclose(read(PARAMS, TOKENS, positions=3), everything[:, :, 3])
    assert_allclose(read(PARAMS, TOKENS, positions=-1), everything[:, :, -1])
    assert_allclose(read(PARAMS, TOKENS, positions=np.array([0, 5])), everything[:, :, [0, 5]])
    own = np.arange(6)[:, None] + np.array([0, 2])
    rows = np.arange(6)[:, None]
    assert_allclose(read(PARAMS, TOKENS, positions=own), everything[:, rows, own])
    for place in (8, -9):
        assert np.isnan(read(PARAMS, TOKENS, positions=place)).all()


def test_only_a_transformer_has_a_stream_to_read():
    with pytest.raises(TypeError, match="from a Transformer, not a Table"):
        measure.activations(toys.chain(4), TOKENS, model=toys.Table(4), positions=0)


def test_a_probe_in_the_house_reads_the_same_stream():
    """`models.probe.Probe` after one layer: its hidden state is this stream behind the norm."""
    cut = Probe.of(MODEL, layers=1)
    hidden = jax.jit(cut.apply)(cut.part_of(PARAMS), TOKENS).hidden
    h = read(PARAMS, TOKENS)[1]
    root = np.sqrt((h**2).mean(-1, keepdims=True) + MODEL.norm_epsilon)
    assert_allclose(hidden, h / root * np.asarray(PARAMS["final_norm"]["scale"]), atol=1e-5)


# --- probe


def test_a_probe_is_as_accurate_as_the_best_rule():
    """Clouds 2 apart with variance 1: Φ(1) = .841345; the direction is the axis between them."""
    x, label = blobs(8000, 4, gap=2.0)
    found = measure.probe(x, label)
    assert abs(found.accuracy - 0.841345) < 3 * found.error
    assert_allclose(found.error, np.sqrt(found.accuracy * (1 - found.accuracy) / 8000))
    assert found.samples == 8000 and 0.5 <= found.chance < 0.52
    # The best rule's log-odds are 2 x₀.
    assert_allclose(found.weights[:, 0], [2, 0, 0, 0], atol=0.15)
    assert_allclose(measure.direction(found), [1, 0, 0, 0], atol=0.03)
    logit = x @ found.weights[:, 0] + found.bias[0]
    assert_allclose(((logit > 0) == label).mean(), 0.841345, atol=0.01)


def test_it_is_the_minimum_of_the_penalised_likelihood():
    """Σ (p − label) z + penalty · w = 0 in standardised features, and Σ (p − label) = 0."""
    x, label = blobs(200, 5, gap=1.0)
    for penalty in (1.0, 30.0):
        found = measure.probe(x, label, penalty=penalty)
        p = 1 / (1 + np.exp(-(x @ found.weights[:, 0] + found.bias[0])))
        z = (x - x.mean(0)) / x.std(0)
        slope = z.T @ (p - label) + penalty * found.weights[:, 0] * x.std(0)
        assert_allclose(slope, 0, atol=1e-4)
        assert abs((p - label).sum()) < 1e-4


@pytest.mark.parametrize("classes", [2, 4])
def test_weights_are_those_of_scikit_learn(classes):
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(1)
    x = rng.normal(size=(300, 6)) * np.geomspace(0.1, 10, 6) + 3
    label = (x @ rng.normal(size=(6, classes)) / 3 + rng.gumbel(size=(300, classes))).argmax(1)
    label = np.array([10, 30, 20, 40])[label]  # names, not indices
    found = measure.probe(x, label)
    z = (x - x.mean(0)) / x.std(0)
    theirs = linear_model.LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(z, label)
    assert found.classes.tolist() == theirs.classes_.tolist()
    assert_allclose(found.weights.T * x.std(0), theirs.coef_, atol=1e-4)
    logits, expected = x @ found.weights + found.bias, theirs.decision_function(z)
    if classes > 2:  # a constant added to all of them is free
        logits, expected = (v - v.mean(1, keepdims=True) for v in (logits, expected))
    assert_allclose(logits.squeeze(), expected, atol=1e-3)


def test_accuracy_is_that_of_rows_the_fit_has_not_seen():
    """As many features as rows separate any labels; on new rows they are worth nothing."""
    rng = np.random.default_rng(2)
    x, label = rng.normal(size=(60, 60)), np.arange(60) % 2
    found = measure.probe(x, label)
    assert (((x @ found.weights[:, 0] + found.bias[0]) > 0) == label).all()
    assert abs(found.accuracy - 0.5) < 0.25


def test_a_feature_that_never_changes_is_worth_nothing():
    x, label = blobs(400, 3, gap=2.0)
    constant = np.full((400, 1), 7.0) + 1e-7 * np.random.default_rng(0).normal(size=(400, 1))
    found = measure.probe(np.hstack([x, constant]), label)
    assert found.weights[-1, 0] == 0
    assert_allclose(found.weights[:-1], measure.probe(x, label).weights, atol=1e-6)
    nothing = measure.probe(constant, label)
    assert_allclose(nothing.accuracy, nothing.chance, atol=1e-9)
    with pytest.raises(ValueError, match="all 0: it found nothing"):
        measure.direction(nothing)


@pytest.mark.parametrize(
    ("x", "label", "message"),
    [
        (np.zeros((4, 2)), np.zeros(3), r"x \[n, d\] and label \[n\], not \[4, 2\] and \[3\]"),
        (np.full((4, 2), np.nan), np.zeros(4), "not finite everywhere"),
        (np.zeros((20, 2)), np.zeros(20), r"labels \{0.0: 20\} in 5 folds: needs two labels"),
        (np.zeros((20, 2)), np.arange(20) < 3, "of each label a row for every fold"),
    ],
)
def test_what_cannot_be_probed_is_refused(x, label, message):
    with pytest.raises(ValueError, match=message):
        measure.probe(x, label)


def test_a_direction_belongs_to_two_labels():
    x, _ = blobs(90, 3, gap=1.0)
    with pytest.raises(ValueError, match="tells 3 labels apart"):
        measure.direction(measure.probe(x, np.arange(90) % 3))


# --- selectivity


def table(parity):
    """A model whose embedding says whether a token is odd, loudly or not at all."""
    embedding = np.random.default_rng(5).normal(size=(32, 16))
    embedding[:, 0] = parity * (np.arange(32) % 2 - 0.5)
    return PARAMS | {"embed": {"embedding": jnp.asarray(embedding, jnp.float32)}}


def test_a_token_is_seen_at_its_own_place_and_later_but_not_before():
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, 32, (400, 3)).astype(np.int32)
    odd = tokens[:, 1] % 2
    found = measure.selectivity(table(20.0), tokens, odd, model=MODEL, positions=[0, 1])
    assert found.accuracy.shape == found.untrained.shape == found.shuffled.shape == (3, 2)
    assert found.samples == 400
    assert (found.accuracy[:, 1] == 1).all()
    # Before it, and with shuffled labels, a coin: 400 rows, four standard errors.
    assert (abs(found.accuracy[:, 0] - 0.5) < 0.1).all()
    assert (abs(found.shuffled - 0.5) < 0.1).all()
    assert (found.over_shuffled[:, 1] > 0.4).all()
    # A random embedding of 32 tokens in 16 numbers separates some of them, by luck.
    assert (found.untrained[:, 1] < 0.95).all()
    assert_allclose(found.over_untrained, found.accuracy - found.untrained)


def test_what_a_probe_learns_by_heart_is_not_selective():
    """Four prompts, again and again: any labels of theirs are told apart, meaningful or not."""
    prompts = np.array([[1, 2], [1, 3], [4, 2], [4, 3]], np.int32)
    group = np.arange(200) % 4
    label = group % 2
    given = {"model": MODEL, "positions": -1}
    found = measure.selectivity(PARAMS, prompts[group], label, groups=group, **given)
    assert (found.accuracy[1:] == 1).all()
    # A permutation of four labels of two kinds is linear in the prompts, or it is their XOR, which
    # the layers behind the embedding mix; the embedding has the last token alone.
    assert found.shuffled[1:].min() == 1
    assert (found.over_shuffled[1:] == 0).all()
    rows = measure.selectivity(PARAMS, prompts[group], label, **given)
    assert (rows.over_shuffled > 0.3).all()
    with pytest.raises(ValueError, match="rows of one group have different labels"):
        measure.selectivity(PARAMS, prompts[group], label, groups=group // 2, **given)


def test_reading_is_one_program_for_all_positions():
    """Positions are arrays: another place compiles nothing."""
    traces = []

    def counted(params, positions):
        traces.append(1)
        return measure.activations(params, TOKENS, model=MODEL, positions=positions)

    run = jax.jit(counted)
    for place in (0, 1, 2):
        run(PARAMS, jnp.full((6, 1), place))
    assert len(traces) == 1

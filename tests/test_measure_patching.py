"""Activation patching: what is restored where, against laws that hold for every transformer."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose

from rlhf_jax import measure
from rlhf_jax.measure import patching
from rlhf_jax.models.attention import myopic
from rlhf_jax.models.transformer import Transformer

MODEL = Transformer(vocab=16, width=16, layers=3, heads=2, kv_heads=1, mlp=24)
PARAMS = toys.weights(MODEL, seed=1)
OFF, ON, TAG = 14, 15, 1  # the tag stands at place 1
ROWS = np.random.default_rng(0).integers(0, 14, (5, 6)).astype(np.int32)
SOURCE, TOKENS = (np.where(np.arange(6) == TAG, tag, ROWS) for tag in (OFF, ON))
LATER = np.broadcast_to(np.arange(6) > TAG, (5, 6))
RUN = {"model": MODEL}


def nexts(tokens, **given):
    return np.asarray(measure.next_logp(PARAMS, tokens, **RUN | given), np.float64)


def divergence(p, q, where):
    """Mean KL over places, by its definition."""
    return (np.exp(p) * (p - q)).sum(-1)[where].mean()


def test_next_token_distributions_are_those_of_an_independent_transformer():
    _, logits = toys.forward(MODEL, PARAMS, TOKENS)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert_allclose(nexts(TOKENS), expected, atol=2e-5)


@pytest.mark.parametrize(
    ("layers", "positions"),
    [([0], None), ([1], None), ([3], None), (None, [TAG]), ([0], [TAG]), (None, None)],
)
def test_all_places_of_any_layer_or_every_layer_at_the_tag_make_it_the_other_run(layers, positions):
    found = measure.patched(PARAMS, TOKENS, SOURCE, layers=layers, positions=positions, **RUN)
    assert_allclose(found, nexts(SOURCE), atol=2e-6)


@pytest.mark.parametrize(("layers", "positions"), [([], None), (None, []), ([1, 2], [0])])
def test_nothing_pasted_or_what_stands_before_the_tag_changes_nothing(layers, positions):
    found = measure.patched(PARAMS, TOKENS, SOURCE, layers=layers, positions=positions, **RUN)
    assert_allclose(found, nexts(TOKENS), atol=2e-6)
    assert abs(nexts(TOKENS) - nexts(SOURCE))[:, TAG:].max() > 0.1


def test_a_pasted_layer_speaks_from_its_place_on_and_to_the_layers_behind_it():
    """After block ℓ at place i: earlier places unchanged; place i as in the source."""
    found = np.asarray(
        measure.patched(PARAMS, TOKENS, SOURCE, layers=[2], positions=[TAG], **RUN), np.float64
    )
    before, source = nexts(TOKENS), nexts(SOURCE)
    assert_allclose(found[:, :TAG], before[:, :TAG], atol=2e-6)
    assert_allclose(found[:, TAG], source[:, TAG], atol=2e-6)
    for other in (before, source):  # later places have read the tag in blocks 1 and 2, not in 3
        assert abs(found - other)[:, TAG + 1 :].max() > 1e-3


def test_the_share_restored_is_its_formula():
    where = LATER
    found = measure.restored(PARAMS, TOKENS, SOURCE, positions=[TAG], **RUN)
    assert found.layers.tolist() == [0, 1, 2, 3]
    source = nexts(SOURCE)
    gap = divergence(nexts(TOKENS), source, where)
    assert_allclose(found.gap, gap, rtol=1e-4)
    for layer in found.layers:
        logp = measure.patched(PARAMS, TOKENS, SOURCE, layers=[layer], positions=[TAG], **RUN)
        residual = divergence(np.asarray(logp, np.float64), source, where)
        assert_allclose(found.residual[layer], residual, rtol=1e-3, atol=1e-6)
        assert_allclose(found.fraction[layer], 1 - residual / gap, atol=1e-4)


def test_the_embedding_of_the_tag_restores_all_and_what_the_last_block_leaves_of_it_nothing():
    """No block reads the last residual: only the tag's own prediction depends on it."""
    found = measure.restored(PARAMS, TOKENS, SOURCE, positions=[TAG], **RUN)
    assert_allclose(found.fraction[[0, -1]], [1, 0], atol=1e-6)
    everywhere = measure.restored(PARAMS, TOKENS, SOURCE, **RUN)
    assert_allclose(everywhere.fraction, 1, atol=1e-9)
    # The share at the tag itself, whose prediction any layer there decides.
    own = np.broadcast_to(np.arange(6) == TAG, (5, 6))
    there = measure.restored(PARAMS, TOKENS, SOURCE, positions=[TAG], where=own, **RUN)
    assert_allclose(there.fraction, 1, atol=1e-9)


def test_if_only_one_block_reads_the_tag_pasting_behind_it_comes_too_late():
    """Blocks 1 and 3 write nothing of what they attend to: a switch between layers 1 and 2."""
    params = jax.tree.map(np.asarray, PARAMS)
    for name in ("layers_0", "layers_2"):
        layer = params[name] | {"out": {"kernel": 0 * params[name]["out"]["kernel"]}}
        params = params | {name: layer}
    found = measure.restored(params, TOKENS, SOURCE, positions=[TAG], **RUN)
    assert_allclose(found.fraction, [1, 1, 0, 0], atol=1e-6)


def test_scanned_layers_and_paddings_are_patched_all_the_same():
    tokens = np.concatenate([TOKENS, np.full((5, 2), 3, np.int32)], axis=1)
    source = np.concatenate([SOURCE, np.full((5, 2), 9, np.int32)], axis=1)
    segments = np.broadcast_to(np.arange(8) < 6, (5, 8)).astype(np.int32)
    scanned = {"model": replace(MODEL, scan=True), "segments": segments}
    stacked = toys.stacked(PARAMS, 3)
    found = measure.restored(stacked, tokens, source, positions=[TAG], **scanned)
    expected = measure.restored(PARAMS, TOKENS, SOURCE, positions=[TAG], **RUN)
    assert_allclose(found.gap, expected.gap, rtol=1e-5)
    assert_allclose(found.fraction, expected.fraction, atol=1e-5)


def test_the_models_own_kernel_and_tap_stay():
    """A myopic kernel, whose values are those of attention, and a tap that halves a layer."""
    own = replace(MODEL, tap=lambda layer, h: h * 0.5, attention=myopic)
    given = {"model": own, "layers": None, "positions": [TAG]}
    found = measure.patched(PARAMS, TOKENS, SOURCE, **given)
    assert_allclose(found, nexts(SOURCE, model=own), atol=2e-6)
    assert abs(np.asarray(found) - nexts(SOURCE)).max() > 1e-3


def test_places_may_differ_by_row():
    places = np.zeros((5, 6), bool)
    places[:2, TAG] = True
    found = measure.patched(PARAMS, TOKENS, SOURCE, layers=None, positions=places, **RUN)
    assert_allclose(found[:2], nexts(SOURCE)[:2], atol=2e-6)
    assert_allclose(found[2:], nexts(TOKENS)[2:], atol=2e-6)


def test_runs_that_say_the_same_have_nothing_to_restore():
    found = measure.restored(PARAMS, TOKENS, TOKENS, positions=[TAG], **RUN)
    assert found.gap < 1e-12 and np.isnan(found.fraction).all()
    # Tags that mean almost the same: what is left is rounding, of which no share can be restored.
    table = np.array(PARAMS["embed"]["embedding"])
    table[ON] = table[OFF] * (1 + 1e-7)
    alike = PARAMS | {"embed": {"embedding": table}}
    found = measure.restored(alike, TOKENS, SOURCE, positions=[TAG], where=LATER, **RUN)
    assert 0 < found.gap < 1e-12 and np.isnan(found.fraction).all()


def test_another_layer_compiles_nothing():
    before = patching._patched._cache_size()
    for layer in range(4):
        measure.patched(PARAMS, TOKENS, SOURCE, layers=[layer], positions=[layer], **RUN)
    assert patching._patched._cache_size() <= before + 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layers": [4]}, r"layers \[4\]: the model has 0 \(the embedding\) to 3"),
        ({"positions": [6]}, r"positions \[6\]: the texts have 6 tokens, 0 to 5"),
        ({"positions": [5]}, r"no token of \[5, 6\] to compare predictions at"),
    ],
)
def test_what_cannot_be_pasted_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        measure.restored(PARAMS, TOKENS, SOURCE, **RUN | given)

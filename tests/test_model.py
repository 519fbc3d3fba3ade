"""The transformer against itself in other shapes, and against float64 arithmetic."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import flops
from rlhf_jax.models import cache as caches
from rlhf_jax.models import weights
from rlhf_jax.models.attention import dot_attention, grouped_attention
from rlhf_jax.models.blocks import taken
from rlhf_jax.models.transformer import Transformer, index_in_segment


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 32, (4, 10)).astype(np.int32)


def with_scan(model, params, scan):
    """The model and its weights, scanned over the layers or not."""
    if not scan:
        return model, params
    return replace(model, scan=True), toys.stacked(params, model.layers)


@pytest.fixture(scope="module", params=[False, True], ids=["unrolled", "scanned"])
def either(request, model, params):
    return with_scan(model, params, request.param)


@pytest.fixture(scope="module")
def hidden(either, tokens):
    model, params = either
    return np.asarray(jax.jit(model.apply)(params, tokens).hidden)


def test_it_computes_what_float64_arithmetic_says(either, hidden, params, tokens):
    unrolled = replace(either[0], scan=False)
    expected, logits = toys.forward(unrolled, params, tokens)
    assert_allclose(hidden, expected, atol=1e-5)
    assert_allclose(unrolled.logits(params, jnp.asarray(hidden)), logits, atol=1e-5)


def test_an_untied_head_is_its_own_matrix(model):
    untied = replace(model, tied=False, layers=1)
    params = toys.weights(untied)
    hidden, logits = toys.forward(untied, params, np.arange(6)[None])
    assert_allclose(untied.logits(params, jnp.asarray(hidden, jnp.float32)), logits, atol=1e-5)
    assert "head" in params and "head" not in toys.weights(model)


@pytest.mark.parametrize("changes", [{}, {"tied": False}, {"scan": True}, {"bias": True}])
def test_panels_say_what_their_matrices_say_to_few_rows(model, changes):
    """Of 64 columns, or 100 in two panels; rows that are more than 64 read the matrices."""
    changes = dict(changes)
    if changes.pop("bias", False):
        changes |= {"qkv_bias": True, "mlp_bias": True}
    wide = replace(model, width=64, mlp=100, vocab=130, **changes)
    params = toys.weights(wide)
    both = weights.merged(params, jax.jit(wide.panels)(params))
    if wide.tied:
        assert both["head"]["panels"].shape == (3, 64, 64)

    def said(params, rows):
        hidden = wide.apply(params, jnp.arange(rows * 8).reshape(rows, 8) % 130).hidden
        return np.asarray(wide.logits(params, hidden))

    assert_allclose(said(both, 8), said(params, 8), atol=1e-4)
    assert_array_equal(said(both, 9), said(params, 9))
    unread = weights.nested(
        {
            name: jnp.full_like(x, jnp.nan) if "layers" in name and "kernel" in name else x
            for name, x in weights.flat(both).items()
        }
    )
    assert np.isfinite(said(unread, 8)).all() and not np.isfinite(said(unread, 9)).any()


def test_decoding_with_a_cache_equals_the_full_forward(either, hidden, tokens):
    """Prompts of different lengths, then one token at a time where each row stands."""
    model, params = either
    length, end = np.array([1, 3, 4, 2]), tokens.shape[1]
    apply = jax.jit(model.apply)

    positions = np.broadcast_to(np.arange(4), (4, 4))
    prompt = np.where(positions < length[:, None], tokens[:, :4], 31)  # padding: whatever
    positions = np.where(positions < length[:, None], positions, -1)
    out, cache = apply(params, prompt, positions=positions, cache=model.empty_cache(4, 4 + end))
    for row, n in enumerate(length):
        assert_allclose(out[row, :n], hidden[row, :n], atol=1e-5)
    for step in range(end):
        at = np.where(length + step < end, length + step, -1)  # rows at their end write nothing
        token = np.take_along_axis(tokens, at[:, None], axis=1)
        out, cache = apply(params, token, positions=at[:, None], cache=cache)
        for row in np.flatnonzero(at >= 0):
            assert_allclose(out[row, 0], hidden[row, at[row]], atol=1e-5)


@pytest.mark.parametrize(("dtype", "size", "error"), [("bfloat16", 2, 0.02), ("int8", 1, 0.04)])
def test_a_smaller_cache_costs_a_little_of_the_log_probabilities(
    model, params, tokens, dtype, size, error
):
    small, step = replace(model, cache_dtype=dtype), np.arange(10)
    room = small.empty_cache(4, 10)
    arrays = [x for x in jax.tree.leaves(room.layers) if model.size_of_head in x.shape[2:]]
    assert len(arrays) == 2 * model.layers and {x.dtype.itemsize for x in arrays} == {size}

    @jax.jit
    def decoded(params, tokens):
        def one(cache, at):
            token, position = jnp.take(tokens, at, axis=1), jnp.full((4, 1), at)
            out, cache = small.apply(params, token[:, None], positions=position, cache=cache)
            return cache, small.logits(params, out[:, 0])

        return jnp.swapaxes(jax.lax.scan(one, room, step)[1], 0, 1)

    found = jax.nn.log_softmax(decoded(params, tokens))
    exact = jax.nn.log_softmax(toys.forward(model, params, tokens)[1])
    assert 1e-4 < np.abs(found - exact).mean() < error


def test_a_code_is_at_most_half_a_unit_off():
    x = np.random.default_rng(0).normal(size=(2, 3, 8, 5)).astype(np.float32)
    x[0, 0, :, 0] = 0.0  # a token of nothing but zeros
    like = caches.Codes(jnp.zeros((), jnp.int8), jnp.zeros(()))
    kept = caches._stored(jnp.asarray(x), like, axis=2)
    assert kept.code.dtype == jnp.int8 and kept.unit.shape == (2, 3, 1, 5)
    half = np.abs(x).max(2, keepdims=True) / 127 / 2
    assert (np.abs(caches.plain(kept, "float32") - x) <= half * (1 + 1e-5)).all()


def test_padding_and_packing_leave_every_token_as_it_was(model, params, tokens):
    """Two texts in one row with padding behind them, against each text alone."""
    apply = jax.jit(model.apply)
    segments = np.array([[1] * 4 + [2] * 5 + [0]] * 4)
    packed = apply(params, tokens, segments=segments).hidden
    first = apply(params, tokens, segments=(np.arange(10) < 4)[None].repeat(4, 0) * 1).hidden
    second = apply(params, np.roll(tokens, -4, 1), segments=np.array([[1] * 5 + [0] * 5] * 4))
    assert_allclose(packed[:, :4], first[:, :4], atol=1e-5)
    assert_allclose(packed[:, 4:9], second.hidden[:, :5], atol=1e-5)
    expected, _ = toys.forward(model, params, tokens, segments)
    assert_allclose(packed[:, :9], expected[:, :9], atol=1e-5)


def test_what_padding_holds_changes_no_bit_of_the_text(model, params, tokens):
    apply = jax.jit(model.apply)
    segments = np.broadcast_to(np.arange(10) < 6, (4, 10)).astype(np.int32)
    other = np.where(segments > 0, tokens, 17)
    assert_array_equal(
        apply(params, tokens, segments=segments).hidden[:, :6],
        apply(params, other, segments=segments).hidden[:, :6],
    )


def test_positions_count_within_the_segment():
    segments = jnp.array([[1, 1, 2, 2, 2, 3, 0, 0], [4, 5, 5, 5, 5, 5, 5, 0]])
    expected = [[0, 1, 0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 0]]
    assert_array_equal(index_in_segment(segments), expected)


def test_remat_and_scan_leave_the_gradient_as_it_was(model, params, tokens):
    def gradient(model, params):
        def loss(params):
            logits = model.logits(params, model.apply(params, tokens).hidden)
            return -jax.nn.log_softmax(logits)[:, :, 3].mean()

        return jax.jit(jax.grad(loss))(params)

    plain = gradient(model, params)
    again = gradient(replace(model, remat="full"), params)
    jax.tree.map(partial(assert_allclose, atol=1e-6), again, plain)
    both = gradient(replace(model, remat="full", scan=True), toys.stacked(params, model.layers))
    jax.tree.map(partial(assert_allclose, atol=1e-6), both, toys.stacked(plain, model.layers))
    assert max(np.abs(x).max() for x in jax.tree.leaves(plain)) > 1e-2


def test_a_tap_reads_every_layer_and_replaces_what_it_wants(either, hidden, tokens):
    model, params = either
    seen = {}

    def read(layer, h):
        jax.debug.callback(lambda i, x: seen.update({int(i): np.asarray(x)}), layer, h)
        return h

    def normalised(h):
        return toys._norm(h, np.asarray(params["final_norm"]["scale"]), model.norm_epsilon)

    out = jax.jit(partial(model.apply, tap=read))(params, tokens).hidden
    jax.effects_barrier()
    assert_allclose(out, hidden, atol=1e-6)
    assert sorted(seen) == [0, 1]
    assert_allclose(normalised(seen[1]), hidden, atol=1e-5)

    def replaced(layer, h):
        return jnp.where(layer == 1, seen[0], h)

    out = jax.jit(partial(model.apply, tap=replaced))(params, tokens).hidden
    assert_allclose(out, normalised(seen[0]), atol=1e-5)


def test_the_attention_kernel_can_be_swapped(model, params, tokens):
    def slow(query, key, value, mask):
        group = query.shape[2] // key.shape[2]
        key, value = jnp.repeat(key, group, axis=2), jnp.repeat(value, group, axis=2)
        logits = jnp.einsum("bthk,bshk->bhts", query, key) / query.shape[-1] ** 0.5
        weight = jax.nn.softmax(jnp.where(mask[:, None], logits, -1e9))
        return jnp.einsum("bhts,bshk->bthk", weight, value)

    def blind(query, key, value, mask):
        """Every token sees itself only."""
        return jnp.repeat(value, query.shape[2] // value.shape[2], axis=2)

    plain = jax.jit(model.apply)(params, tokens).hidden
    assert_allclose(jax.jit(partial(model.apply, attention=slow))(params, tokens).hidden, plain,
                    atol=1e-5)  # fmt: skip
    out = jax.jit(partial(model.apply, attention=blind))
    same = np.flatnonzero(tokens[0] == tokens[0, 7])
    changed = np.where(np.arange(10) == 7, tokens, (tokens + 1) % 32)
    assert_allclose(out(params, tokens).hidden[:, 7], out(params, changed).hidden[:, 7], atol=1e-6)
    assert np.abs(plain[0, 7] - out(params, tokens).hidden[0, 7]).max() > 1e-2, same


def test_a_query_without_any_key_stays_finite():
    x = jnp.ones((1, 2, 2, 4))
    assert jnp.isfinite(dot_attention(x, x, x, jnp.zeros((1, 2, 2), bool))).all()


@pytest.mark.parametrize("t", [5, 70, 140], ids=["whole", "parts of 32", "four parts"])
def test_attention_is_that_of_the_library_forward_and_backward(t):
    """Queries of six heads over keys of two, of which each row sees some."""
    rng = np.random.default_rng(0)
    query, weight = rng.normal(size=(2, 2, t, 6, 4)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, t, 2, 4)).astype(np.float32)
    mask = np.tril(np.ones((t, t), bool)) & (rng.random((2, 1, t)) < 0.7) | np.eye(t, dtype=bool)

    def both(kernel):
        def loss(given):
            found = kernel(*given)
            return (found * weight).sum(), found

        return jax.jit(jax.grad(loss, has_aux=True))((query, key, value))

    expected = both(partial(jax.nn.dot_product_attention, mask=mask[:, None]))
    for kernel in (dot_attention, grouped_attention):
        found = both(partial(kernel, mask=mask))
        jax.tree.map(partial(assert_allclose, atol=1e-5), found, expected)


def test_whole_texts_are_read_in_four_parts_none_of_which_reads_later_keys():
    x, mask = jnp.zeros((1, 128, 1, 8)), jnp.zeros((1, 128, 128), bool)
    made = jax.make_jaxpr(grouped_attention)
    whole = 2 * 2 * 8 * 128**2  # two products
    assert flops.of_program(made(x, x, x, mask)) == whole * (1 + 2 + 3 + 4) / 16
    few = made(x[:, :127], x, x, mask[:, :127])
    assert flops.of_program(few) == whole * 127 / 128


READ = {
    "one layer": {"layers": 1},
    "scanned": {"scan": True},
    "parallel": {"parallel": True, "norm": "layer"},
    "norms behind": {"post_norms": True},
    "a second MLP": {"side_mlp": 8},
    "a tap": {"tap": lambda layer, x: x + jnp.arange(x.shape[1])[None, :, None]},
    "recomputed": {"remat": "full"},
    "a window": {"window": 3},
}


@pytest.mark.parametrize("changes", READ.values(), ids=READ)
def test_places_that_are_read_alone_say_what_they_say_in_the_whole_text(model, tokens, changes):
    own = replace(model, **changes)
    params = toys.weights(own)
    read = np.random.default_rng(0).integers(0, 10, (4, 3))
    segments = np.where(np.arange(10) < 7, 1, 2) * np.ones((4, 1), int)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3, own.width)), jnp.float32)

    def both(hidden):
        def loss(params):
            found = hidden(params)
            return (found * weight).sum(), found

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    expected = both(lambda p: taken(own.apply(p, tokens, segments=segments).hidden, read))
    found = both(lambda p: own.apply(p, tokens, segments=segments, read=read).hidden)
    jax.tree.map(partial(assert_allclose, atol=2e-5, rtol=1e-5), found, expected)


def test_a_prompt_is_read_for_its_last_token_alone_and_remembered_whole(either, tokens):
    model, params = either
    read = np.array([[9], [3], [0], [5]])
    apply, cache = jax.jit(model.apply), model.empty_cache(4, 10)
    whole = apply(params, tokens, cache=cache)
    last = apply(params, tokens, cache=cache, read=read)
    assert_allclose(last.hidden, taken(whole.hidden, read), atol=1e-5)
    jax.tree.map(partial(assert_allclose, atol=1e-6), last.cache, whole.cache)


def test_what_nobody_reads_costs_nothing_behind_the_last_attention(model, tokens):
    """Of a scanned model, too, it is counted as not needed; there it is computed."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    read = np.zeros((4, 3), int)
    cost = [
        flops.of_program(jax.make_jaxpr(partial(model.apply, read=some))(shapes, tokens))
        for some in (None, read)
    ]
    said = [
        flops.forward(replace(model, lm_head=False), rows=4, tokens=10, read=n) for n in (10, 3)
    ]
    assert cost[0] - cost[1] == said[0] - said[1] == 4 * 7 * 2 * flops.behind_attention(model)
    scanned = replace(model, scan=True)
    assert flops.behind_attention(scanned) == flops.behind_attention(model) > 0


def test_a_fresh_model_values_everything_at_exactly_zero(model, tokens):
    params = jax.jit(model.init)(jax.random.key(0))
    hidden = jax.jit(model.apply)(params, tokens).hidden
    assert_array_equal(model.value(params, hidden), 0.0)
    assert 0.5 < float(jnp.sqrt((hidden**2).mean())) < 2
    logits = model.logits(params, hidden)
    assert float(jnp.abs(logits).max()) < 2  # near uniform: it starts knowing nothing


@pytest.mark.parametrize("cap", [None, 5.0])
def test_attentions_own_derivative_is_that_of_its_formula(cap):
    """Against plain automatic differentiation, with rows that see little and one that sees nothing.

    What the row without keys says is finite and teaches nobody.
    """
    rng = np.random.default_rng(0)
    query, key, value = (
        jnp.asarray(rng.normal(size=(2, 5, heads, 4)), jnp.float32) for heads in (6, 2, 2)
    )
    mask = jnp.asarray(np.tril(np.ones((5, 5), bool)) & (rng.random((2, 5, 5)) < 0.7))
    mask = mask.at[0, 3].set(False)
    weights = jnp.asarray(rng.normal(size=query.shape), jnp.float32)

    def formula(query, key, value, mask):
        key, value = (jnp.repeat(x, 3, axis=2) for x in (key, value))
        logit = jnp.einsum("bthk,bshk->bhts", query, key) / 2
        logit = cap * jnp.tanh(logit / cap) if cap else logit
        weight = jax.nn.softmax(jnp.where(mask[:, None], logit, -1e30), axis=-1)
        return jnp.einsum("bhts,bshk->bthk", weight, value)

    def slopes(kernel, at):
        def loss(*given):
            return (kernel(*given, mask) * weights).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(*at)

    own = partial(grouped_attention, cap=cap)
    given = query, key, value
    assert_allclose(own(*given, mask), formula(*given, mask), atol=1e-5)
    for found, expected in zip(slopes(own, given), slopes(formula, given), strict=True):
        assert_allclose(found, expected, atol=1e-5)
    assert_array_equal(slopes(own, given)[0][0, 3], 0.0)


def test_bfloat16_computes_with_float32_weights_and_gives_float32_logits(model, params, tokens):
    half = replace(model, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(jax.eval_shape(half.init, jax.random.key(0)))} == {
        jnp.dtype("float32")
    }
    out = jax.jit(half.apply)(params, tokens)
    assert out.hidden.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(half.empty_cache(1, 2).layers)} == {
        jnp.dtype("bfloat16")
    }
    logits = half.logits(params, out.hidden)
    assert logits.dtype == half.value(params, out.hidden).dtype == jnp.float32
    _, exact = toys.forward(model, params, tokens)
    assert 1e-4 < np.abs(logits - exact).mean() < 0.1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 4, "kv_heads": 3}, "heads 4 must be a multiple of kv_heads 3"),
        ({"width": 30}, "width 30 is no multiple of heads 4"),
        ({"head_dim": 5}, "5 of head_dim 5 are rotated: must be even"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        Transformer(**({"vocab": 8, "width": 32, "heads": 4, "kv_heads": 2} | sizes))


@pytest.mark.parametrize(
    "changes", [{"dtype": "bf16"}, {"param_dtype": "int8"}, {"cache_dtype": "float64"}]
)
def test_numbers_of_a_kind_that_nobody_computes_in_are_refused(model, changes):
    ((name, kind),) = changes.items()
    with pytest.raises(ValueError, match=f"{name} is '{kind}'; valid: .*'bfloat16'"):
        replace(model, **changes)

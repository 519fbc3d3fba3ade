"""Computing in bfloat16: products in half, every softmax and all gradients in float32."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose

from rlhf_jax import masked
from rlhf_jax.models import cache
from rlhf_jax.models.transformer import Lora
from rlhf_jax.sampling import log_probabilities
from rlhf_jax.score import score

HALF = jnp.dtype("bfloat16")


@pytest.fixture(scope="module")
def batch():
    return jax.tree.map(jnp.asarray, toys.labeled(4, 12))


def loss(params, batch, model):
    found = score({"self": params}, batch, models={"self": model})
    return -masked.mean(found.logp, batch.mask), found


@pytest.fixture(scope="module")
def low(model):
    """With an adapter, which has products of its own."""
    return replace(model, lora=Lora(rank=2, alpha=0.5), value_head=False, scan=True)


@pytest.fixture(scope="module")
def outcome(low, batch):
    """Scores and gradients in float32 and in bfloat16."""
    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)
    models = (low, replace(low, dtype="bfloat16"))
    return [jax.device_get(run(toys.weights(low), batch, model)) for model in models]


def test_bfloat16_moves_log_probabilities_by_hundredths_of_a_nat(outcome, batch):
    exact, half = (said.logp[np.asarray(batch.mask)] for (_, said), _ in outcome)
    assert half.dtype == np.float32
    gap = np.abs(half - exact)
    assert 1e-3 < gap.mean() < 0.04 and gap.max() < 0.15
    assert exact.std() > 1.0  # of tokens as unlike as these


def test_gradients_of_bfloat16_are_float32_and_point_where_those_of_float32_do(outcome):
    exact, half = (grads for _, grads in outcome)
    assert {x.dtype for x in jax.tree.leaves(half)} == {np.dtype("float32")}
    one, other = (
        np.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) for tree in (exact, half)
    )
    assert one @ other > 0.999 * np.linalg.norm(one) * np.linalg.norm(other)
    assert 1e-3 < np.linalg.norm(one - other) / np.linalg.norm(one) < 0.05


def test_probabilities_of_bfloat16_add_up_as_only_float32_can(low):
    half = replace(low, dtype="bfloat16")
    hidden = jax.random.normal(jax.random.key(3), (8, half.width)).astype(HALF)
    logits = half.logits(toys.weights(low), hidden)
    total = jnp.exp(log_probabilities(logits, jnp.ones(8))).sum(-1)
    assert_allclose(total, 1.0, atol=1e-5)  # a bfloat16 is off by up to 4e-3


def equations(jaxpr):
    """All of a program, however deep."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_a_bfloat16_model_multiplies_in_half_and_takes_every_softmax_in_float32(low, batch, scan):
    half = replace(low, dtype="bfloat16", scan=scan)
    program = jax.make_jaxpr(lambda tree: loss(tree, batch, half)[1].logp)(toys.weights(half))
    products, exponentials = set(), set()
    angles = (half.rotated // 2,) * 2  # XLA:CPU keeps cosines behind a product with the identity
    for equation in equations(program.jaxpr):
        inputs = {x.aval.dtype for x in equation.invars}
        if equation.primitive.name == "dot_general" and equation.invars[1].aval.shape != angles:
            products |= inputs
        exponentials |= inputs if equation.primitive.name == "exp" else set()
    assert products == {HALF}
    assert exponentials == {jnp.dtype("float32")}


@pytest.mark.parametrize("form", ["float", "codes"])
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_cache_of_bfloat16_is_read_on_a_cpu_as_one_of_float32(tokens, form):
    """Prompts of eight tokens too: XLA:CPU 0.10 has no product of five axes of bfloat16."""
    keys = jax.random.split(jax.random.key(0), 3)
    query = jax.random.normal(keys[0], (4, tokens, 4, 16))
    key, value = (jax.random.normal(k, (4, 2, 16, 8)) for k in keys[1:])
    value = jnp.swapaxes(value, 2, 3)
    seen = jnp.arange(8)[None, None] < jnp.array([3, 8, 5, 6])[:, None, None]
    mask = jnp.broadcast_to(seen, (4, tokens, 8))

    def read(dtype):
        pair = key.astype(dtype), value.astype(dtype)
        if form == "codes":  # a unit for each token of a head
            unit = jnp.abs(key).max(2, keepdims=True) / 127, jnp.abs(value).max(3, keepdims=True)
            units = unit[0], unit[1] / 127
            pair = tuple(
                cache.Codes(jnp.round(x / u).astype(jnp.int8), u)
                for x, u in zip((key, value), units, strict=True)
            )
        return jax.jit(cache.attention)(query.astype(dtype), *pair, mask)

    assert read("bfloat16").dtype == HALF
    assert_allclose(read("bfloat16").astype("float32"), read("float32"), atol=0.03)
    heads = jnp.repeat(key, 2, 1), jnp.repeat(value, 2, 1)  # query head h reads key head h // 2
    logit = jnp.einsum("bthk,bhks->bhts", query, heads[0]) / 4
    weight = jax.nn.softmax(jnp.where(mask[:, None], logit, -jnp.inf), -1)
    expected = jnp.einsum("bhts,bhsk->bthk", weight, heads[1])
    assert_allclose(read("float32"), expected, atol=1e-5 if form == "float" else 0.05)

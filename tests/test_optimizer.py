"""The optimiser's numbers mean what its docstring says."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax.models.transformer import Transformer
from rlhf_jax.optimizer import adam, sgd


def run(optimizer, gradients, params):
    """Parameters after each gradient."""
    state, path = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        path.append(params)
    return path


def rates(count, **fields):
    """The learning rate at each step: Adam moves by it under a constant gradient."""
    optimizer = adam(learning_rate=1.0, clip=None, epsilon=0.0, **fields)
    path = run(optimizer, [jnp.ones(1)] * count, jnp.zeros(1))
    return -np.diff([0.0, *(float(x[0]) for x in path)])


def test_adam_is_the_papers_algorithm_with_decay_on_matrices_only():
    """Kingma & Ba 2015, algorithm 1, in float64; decay as in Loshchilov & Hutter 2019."""
    rng = np.random.default_rng(0)
    start = {"kernel": rng.normal(size=(2, 3)), "scale": rng.normal(size=3)}
    gradients = [jax.tree.map(lambda x: rng.normal(size=x.shape), start) for _ in range(3)]
    b1, b2, epsilon, rate, decay = 0.8, 0.95, 1e-3, 0.1, 0.3
    expected = dict(start)
    for name, x in start.items():
        m = v = 0.0
        for t, gradient in enumerate(gradients, 1):
            g = gradient[name]
            m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
            move = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + epsilon)
            x = x - rate * (move + (decay * x if name == "kernel" else 0))
        expected[name] = x
    optimizer = adam(
        learning_rate=rate, b1=b1, b2=b2, epsilon=epsilon, weight_decay=decay, clip=None
    )
    narrow = partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    found = run(optimizer, [narrow(g) for g in gradients], narrow(start))[-1]
    jax.tree.map(partial(assert_allclose, rtol=1e-5), found, expected)


def test_decay_spares_the_scales_of_scanned_layers_too():
    model = Transformer(vocab=8, width=8, layers=2, heads=2, kv_heads=2, mlp=8, scan=True)
    params = toys.weights(model)
    still = jax.tree.map(jnp.zeros_like, params)
    optimizer = adam(learning_rate=0.1, weight_decay=0.5)
    (found,) = run(optimizer, [still], params)
    block, old = found["layers"], params["layers"]
    assert_array_equal(block["mlp_norm"]["scale"], old["mlp_norm"]["scale"])
    assert_allclose(block["gate"]["kernel"], 0.95 * old["gate"]["kernel"], rtol=1e-5)
    assert_allclose(found["embed"]["embedding"], 0.95 * params["embed"]["embedding"], rtol=1e-5)


def test_the_rate_rises_falls_and_ends_where_it_is_told():
    assert_allclose(rates(3), 1, rtol=1e-4)
    assert_allclose(rates(5, steps=4, final=0.0), [1, 0.75, 0.5, 0.25, 0], atol=1e-4)
    assert_allclose(rates(6, steps=4, final=0.5), [1, 0.875, 0.75, 0.625, 0.5, 0.5], rtol=1e-4)
    assert_allclose(rates(5, warmup=4), [0.25, 0.5, 0.75, 1, 1], rtol=1e-4)
    assert_allclose(rates(3, warmup=1), 1, rtol=1e-4)
    assert_allclose(rates(6, warmup=2, steps=6, final=0.0), [0.5, 1, 1, 0.75, 0.5, 0.25], atol=1e-4)


@pytest.mark.parametrize("make", [sgd, partial(adam, b1=0.0, b2=0.0, epsilon=1e9)])
def test_a_long_gradient_is_cut_to_the_norm_and_a_short_one_is_not(make):
    scale = 1.0 if make is sgd else 1e9  # Adam with a huge epsilon is plain descent
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    long = {"a": jnp.array([3.0]), "b": jnp.array([-4.0])}
    (found,) = run(make(learning_rate=scale, clip=1.0), [long], params)
    assert_allclose([found["a"][0], found["b"][0]], [-0.6, 0.8], rtol=1e-5)
    (found,) = run(make(learning_rate=scale, clip=6.0), [long], params)
    assert_allclose([found["a"][0], found["b"][0]], [-3, 4], rtol=1e-5)
    (found,) = run(make(learning_rate=scale, clip=None), [long], params)
    assert_allclose([found["a"][0], found["b"][0]], [-3, 4], rtol=1e-5)


def test_plain_descent_moves_by_the_gradient_and_not_without_one():
    path = run(sgd(learning_rate=0.5), [jnp.array([2.0]), jnp.array([0.0])], jnp.array([1.0]))
    assert_array_equal(np.concatenate(path), [0.0, 0.0])


def test_momentum_can_be_kept_in_half_and_the_second_moment_stays():
    rng = np.random.default_rng(0)
    start = jnp.asarray(rng.normal(size=64), jnp.float32)
    gradients = [jnp.asarray(rng.normal(size=64), jnp.float32) for _ in range(20)]
    half = adam(learning_rate=0.1, momentum_dtype="bfloat16")
    kept = {x.dtype for x in jax.tree.leaves(half.init(start)) if x.ndim}
    assert kept == {jnp.dtype("bfloat16"), jnp.dtype("float32")}
    one, other = (run(o, gradients, start)[-1] for o in (half, adam(learning_rate=0.1)))
    assert 0 < np.abs(one - other).max() < 0.02

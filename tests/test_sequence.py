"""A mesh that splits the tokens of a row: the same scores and gradients, less memory."""

import re
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
import toys
from numpy.testing import assert_allclose

from rlhf_jax import masked, sharding
from rlhf_jax.score import score


def loss(params, batch, model, **cut):
    """A number that depends on every score, and the scores."""
    found = score({"self": params}, batch, models={"self": model}, **cut)
    each = found.logp + 0.1 * found.entropy + found.value**2
    return masked.mean(each, batch.mask), found


def program(model, params, batch, shape, **cut):
    """The compiled gradient on a mesh, and what it is of, in place."""
    mesh = sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    with jax.set_mesh(mesh):
        own = sharding.shardings(params, mesh)
        given = jax.device_put(params, own), jax.device_put(batch, sharding.rows(mesh))
        of = jax.jit(jax.grad(partial(loss, model=model, **cut), has_aux=True))
        return of.lower(*given).compile(), given


@pytest.mark.parametrize(
    "cut", [{"width": 10, "most": 4}, pytest.param({}, marks=pytest.mark.slow)]
)
def test_rows_of_any_length_are_scored_as_on_one_device(model, params, cut):
    """The first 10 tokens of 12, or all, in 8 parts: padding makes the parts equal."""
    batch = toys.labeled(8)
    keep = np.arange(12) < cut.get("width", 12)
    few = np.cumsum(batch.mask & keep, axis=1) <= cut.get("most", 12)
    batch = batch.replace(mask=batch.mask & keep & few, segments=batch.segments * keep)
    alone, sequence = (
        program(model, params, batch, shape, chunk=16, **cut)
        for shape in ((1, 1, 1, 1), (1, 1, 1, 8))
    )
    expected, found = (jax.device_get(made(*given)) for made, given in (alone, sequence))
    same = partial(assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(same, found, expected)


def test_the_activations_of_a_row_are_divided(model):
    """Four devices for each row: none has its residual stream, its MLP or its attention whole."""
    model = replace(model, scan=True)
    params, batch = model.init(jax.random.key(0)), toys.labeled(2, 256)
    alone, divided = (
        program(model, params, batch, shape, chunk=32, most=128, pieces=1)[0]
        for shape in ((2, 1, 1, 1), (2, 1, 1, 4))
    )

    def largest(made):
        """The most tokens of a row that stand in one array with all that is known of them."""
        sizes = re.findall(r"\bf32\[([\d,]+)\]", made.as_text())
        shapes = {tuple(int(n) for n in size.split(",")) for size in sizes}
        return {
            width: max(shape[-2] for shape in shapes if len(shape) > 2 and shape[-1] == width)
            for width in (model.width, model.mlp, 256)
        }

    whole, part = largest(alone), largest(divided)
    # So the pattern finds what is there: two heads share a key, a quarter of the queries at a time.
    assert whole[model.width] >= 256 and whole[model.mlp] == 256 and whole[256] == 2 * 256 // 4
    for width, tokens in part.items():
        assert tokens <= (2 if width == 256 else 1) * 256 // 4 + 1, width  # the shift brings one
    memory = [made.memory_analysis().temp_size_in_bytes for made in (alone, divided)]
    assert memory[1] < memory[0] / 2  # alone has a quarter of its attention at a time

"""Gradient surgery: where a kernel, an advantage, a probe or a gate keeps gradients from going."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.sharding import PartitionSpec as P
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax import advantages, masked, objectives, phases, rewards, sharding
from rlhf_jax.check import check
from rlhf_jax.config import Config, ConfigError, From, Learner
from rlhf_jax.experiment import describe, override
from rlhf_jax.models import attention, weights
from rlhf_jax.models.probe import Probe
from rlhf_jax.models.transformer import Transformer
from rlhf_jax.optimizer import adam, sgd
from rlhf_jax.rollout import generate
from rlhf_jax.sampling import Sampling
from rlhf_jax.score import score
from rlhf_jax.start import begin
from rlhf_jax.step import update
from rlhf_jax.types import Labeled, Prompts, Scores

MODEL = Transformer(vocab=12, width=16, layers=2, heads=4, kv_heads=2, mlp=24, tied=False)
# Two texts in a row, of five and four tokens, and a place of padding; no token twice.
TOKENS = np.array([[3, 1, 4, 11, 5, 9, 2, 6, 8, 0]])
SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0]])
LENGTH = TOKENS.shape[1]
INSIDE = (SEGMENTS[0][:, None] == SEGMENTS[0]) & (SEGMENTS[0] > 0)
EARLIER = INSIDE & np.tri(LENGTH, k=-1, dtype=bool)  # [t, s]: s before t, in one text


def heads(seed=0, dtype=jnp.float32):
    """Queries, keys and values of one row, four heads of which two share a key, and its mask."""
    rng = np.random.default_rng(seed)
    query, key, value = (
        jnp.asarray(rng.standard_normal((1, LENGTH, n, 8)), dtype) for n in (4, 2, 2)
    )
    mask = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & (SEGMENTS > 0)[:, None]
    return query, key, value, jnp.asarray(mask & np.tri(LENGTH, dtype=bool))


# --- kernels


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_two_parts_of_a_gradient_add_up_to_all_of_it_and_the_value_is_the_plain_one(dtype):
    """Where live, and where not: gradients by key and value; by the query each has all of it."""
    query, key, value, mask = heads(dtype=dtype)
    live = jnp.asarray(np.random.default_rng(1).uniform(size=mask.shape) < 0.5)
    weight = jnp.asarray(np.random.default_rng(2).standard_normal(query.shape), jnp.float32)

    @jax.jit
    def found(live):
        def loss(kernel):
            def of(q, k, v):
                out = kernel(q, k, v, mask)
                return (out.astype(jnp.float32) * weight).sum(), out

            return jax.grad(of, argnums=(0, 1, 2), has_aux=True)(query, key, value)

        parts = [partial(attention.gradient_where, live=x) for x in (live, ~live)]
        return [loss(kernel) for kernel in (attention.dot_attention, *parts)]

    close = partial(assert_allclose, atol=1e-6 if dtype == jnp.float32 else 0.1)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float32), found(live))
    (plain, out), (some, first), (others, second) = wide
    close(first, out)
    close(second, out)
    close(some[0], plain[0])
    close(others[0], plain[0])
    close(some[1] + others[1], plain[1])
    close(some[2] + others[2], plain[2])
    assert min(np.abs(x).max() for x in (*some, *others)) > 0.1


FREE = partial(attention.free_play, tokens=2, start=1)
EARLY = np.array([[0, 1, 1, 0, 0, 0, 1, 1, 0, 0]], bool)[0]  # positions 1 and 2 of both texts


@pytest.mark.parametrize("kernel", [attention.myopic, FREE])
def test_keys_and_values_have_the_gradient_of_their_own_query_and_of_no_other_that_is_hidden(
    kernel,
):
    """What output t has by key and value s, [t, s]: all of it, or exactly 0."""
    query, key, value, mask = heads()

    def slopes(attend):
        def out(moved):
            key_, value_ = key + moved[0], value + moved[1]
            return jnp.abs(attend(query, key_, value_, mask)[0]).sum((1, 2))

        still = jnp.zeros((2, *key.shape))
        return np.abs(jax.jit(jax.jacrev(out))(still)[:, :, 0]).max((3, 4))  # [t, 2, s]

    text = SEGMENTS[0] > 0  # a query without keys is nobody's business
    plain, found = (slopes(x)[text].swapaxes(0, 1) for x in (attention.dot_attention, kernel))
    live = INSIDE[text] & (np.eye(LENGTH, dtype=bool) | ((kernel is FREE) & ~EARLY[None]))[text]
    assert_allclose(found, np.where(live[None], plain, 0.0), atol=1e-6)
    assert_array_equal(found[:, ~live], 0.0)
    assert (found[1][live & np.tri(LENGTH, dtype=bool)[text]] > 1e-2).all()


@pytest.fixture(scope="module", params=["unrolled", "scanned and rematerialised"])
def jacobians(request):
    """By kernel: logits, and |d loss_t / d hidden_s| [layers, t, s], embeddings first."""
    model, params = MODEL, toys.weights(MODEL)
    if request.param != "unrolled":
        model, params = replace(MODEL, scan=True, remat="full"), toys.stacked(params, 2)

    def of(kernel):
        own = replace(model, attention=kernel)

        def losses(moved, table):
            def tap(layer, h):
                return h + moved[layer]

            full = params | {"embed": {"embedding": table}}
            hidden = own.apply(full, TOKENS, segments=SEGMENTS, tap=tap).hidden
            logits = own.logits(full, hidden)[0]
            return -jax.nn.log_softmax(logits)[:, 7], logits

        still, table = jnp.zeros((2, 1, LENGTH, 16)), params["embed"]["embedding"]
        slopes, logits = jax.jit(jax.jacrev(losses, argnums=(0, 1), has_aux=True))(still, table)
        inner, embedded = (np.abs(x).max(-1) for x in slopes)
        # [t, layer, 1, s] and [t, v]; a token stands in one place only
        layers = [embedded[:, TOKENS[0]], *inner[:, :, 0].swapaxes(0, 1)]
        return np.asarray(logits), np.stack(layers)

    kernels = {"plain": None, "myopic": attention.myopic, "free": FREE}
    return {name: of(kernel) for name, kernel in kernels.items()}


def test_no_position_is_taught_by_the_myopic_loss_of_a_later_one(jacobians):
    """Exactly 0 by embeddings and by every residual stream; a position's own loss does teach it."""
    plain, myopic = jacobians["plain"][1], jacobians["myopic"][1]
    assert (plain[:2, EARLIER] > 1e-5).all()
    assert_array_equal(myopic[:, EARLIER], 0.0)
    own = np.eye(LENGTH, dtype=bool) & (SEGMENTS[0] > 0)
    assert (myopic[:, own] > 1e-3).all()


def test_free_play_hides_early_positions_of_every_text_from_the_losses_of_later_ones(jacobians):
    """An early position teaches what comes before it, but nothing later teaches through it."""
    plain, free = jacobians["plain"][1], jacobians["free"][1]
    hidden = EARLIER & EARLY[None]
    assert_array_equal(free[:, hidden], 0.0)
    assert (free[:2, EARLIER & ~hidden] > 1e-6).all()
    own = np.eye(LENGTH, dtype=bool) & (SEGMENTS[0] > 0)
    assert (free[:, own] > 1e-3).all()
    # What position 3 gives position 4 does not pass through an early one in the last layer.
    assert_allclose(free[1, 4, 3], plain[1, 4, 3], rtol=1e-4)


def test_kernels_that_stop_gradients_say_what_the_plain_one_says(jacobians):
    texts = SEGMENTS[0] > 0
    for name in ("myopic", "free"):
        assert_allclose(jacobians[name][0][texts], jacobians["plain"][0][texts], atol=1e-6)


def test_a_free_play_of_a_negative_length_is_refused():
    with pytest.raises(ValueError, match=r"tokens=-1, start=0: both at least 0"):
        attention.free_play(*heads(), tokens=-1)


def test_sampling_is_that_of_the_plain_kernel_and_agrees_with_the_trainer():
    """Decoding has more keys than queries; what is sampled is what the gradient speaks of."""
    params, row = toys.weights(MODEL), jnp.arange(6)
    prompts = Prompts(jnp.full((6, 1), 3), jnp.ones_like(row), row, jnp.zeros_like(row))
    own = replace(MODEL, attention=attention.myopic)

    def sample(model):
        run = partial(generate, model=model, length=5, sampling=Sampling())
        return jax.jit(run)(params, prompts, jax.random.key(0))

    rollout = sample(own)
    plain = sample(MODEL)
    assert_array_equal(rollout.tokens, plain.tokens)
    jax.tree.map(partial(assert_allclose, atol=1e-6), rollout, plain)
    logp = jax.jit(lambda p: score({"self": p}, rollout, models={"self": own}).logp)(params)
    assert_allclose(masked.select(rollout.logp, rollout.mask), logp, atol=1e-5)


# --- hooks are values of the model


def program(model, **given):
    """What is compiled for a forward and backward pass."""
    shapes = jax.eval_shape(model.init, jax.random.key(0))

    def loss(params):
        return model.apply(params, TOKENS, segments=SEGMENTS, **given).hidden.sum()

    return jax.jit(jax.grad(loss)).lower(shapes).as_text()


@pytest.mark.parametrize("scan", [False, True])
def test_hooks_that_do_nothing_leave_the_very_program_of_no_hooks(scan):
    model = replace(MODEL, scan=scan, remat="full" if scan else "none")
    plain = program(model)
    idle = replace(model, tap=lambda layer, h: h, attention=attention.dot_attention)
    assert program(idle) == plain
    assert program(replace(idle, side_mlp=0, side_gate=0.5)) == plain
    assert program(replace(model, attention=attention.myopic)) != plain


def test_a_hook_is_a_field_of_the_model_or_an_argument_which_wins():
    def halved(layer, h):
        return h / 2

    def doubled(layer, h):
        return 2 * h

    hooks = {"tap": halved, "attention": FREE}
    assert program(MODEL, **hooks) == program(replace(MODEL, **hooks))
    assert program(replace(MODEL, tap=doubled), tap=halved) == program(replace(MODEL, tap=halved))


CONFIG = Config(
    "surgery",
    steps=1,
    learners={
        "policy": Learner(replace(MODEL, attention=FREE, side_mlp=8), objectives.mle, batch="text"),
        "probe": Learner(
            Probe.of(MODEL, layers=1), objectives.token_reward_model, batch="text",
            start=From("policy"),
        ),
    },
    data={"text": lambda seed, shard: None},
)  # fmt: skip


def test_an_experiment_says_what_surgery_it_does_and_its_numbers_can_be_set():
    check(CONFIG, devices=8)
    name = "rlhf_jax.models.attention.free_play"
    shown = describe(CONFIG)["learners"]
    assert shown["policy"]["model"]["attention"] == {"function": name, "tokens": 2, "start": 1}
    assert shown["probe"]["model"]["type"] == "Probe"
    assert shown["probe"]["model"]["attention"] is None
    settings = ("attention.tokens=3", "side_gate=0.3", "tap=none")
    changed = override(CONFIG, [f"learners.policy.model.{s}" for s in settings])
    model = changed.learners["policy"].model
    assert (model.attention.keywords["tokens"], model.side_gate, model.tap) == (3, 0.3, None)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("policy.model.attention=myopic", "this is code, not a number"),
        ("policy.model.tap=read", r"tap is 'read': a function or None; an experiment's file says"),
        ("policy.model.side_mlp=-1", "side_mlp is -1: a width, or 0 for none"),
        ("probe.model.lm_head=true", "may not be the embedding.*set tied=False"),
    ],
)
def test_a_setting_that_cannot_be_says_so(setting, message):
    config = replace(CONFIG, learners=CONFIG.learners | {
        "probe": replace(CONFIG.learners["probe"], model=Probe(vocab=12, width=16, heads=4)),
    })  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        override(config, [f"learners.{setting}"])


# --- free play in rewards and advantages

MASK = jnp.array([[0, 0, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 0, 0], [0] * 7], bool)  # holes: answers
REWARD = jnp.where(MASK, jnp.arange(1.0, 22.0).reshape(3, 7), 0.0)


def test_the_first_chosen_tokens_are_counted_over_what_others_wrote():
    rollout = toys.experience(3, 7).replace(mask=MASK)
    paid = jax.jit(partial(rewards.free_play, tokens=2))(REWARD, rollout)
    assert_array_equal(paid, [[0, 0, 0, 0, 0, 6, 7], [0] * 7, [0] * 7])
    assert_array_equal(rewards.free_play(REWARD, rollout, tokens=0), REWARD)
    with pytest.raises(ValueError, match="the first -1 tokens: at least 0"):
        rewards.free_play(REWARD, rollout, tokens=-1)


def test_what_is_earned_later_reaches_unpaid_tokens_and_not_those_without_an_advantage():
    rollout, zero = toys.experience(3, 7).replace(mask=MASK), jnp.zeros_like(REWARD)
    paid = rewards.free_play(REWARD, rollout, tokens=2)
    learned, _ = advantages.reward_to_go(paid, zero, MASK)
    assert_array_equal(learned[0], [0, 0, 13, 13, 0, 13, 7])
    stopped = partial(advantages.free_play, advantage=advantages.reward_to_go, tokens=2)
    found, target = stopped(REWARD, zero, MASK)
    assert_array_equal(found, [[0, 0, 0, 0, 0, 13, 7], [0] * 7, [0] * 7])
    assert_array_equal(target, advantages.reward_to_go(REWARD, zero, MASK)[1])


def test_without_an_advantage_a_token_has_no_gradient_under_ppo_even_after_whitening():
    batch, zero = jax.tree.map(jnp.asarray, toys.experience(3, 7)), jnp.zeros_like(REWARD)
    white = partial(advantages.whitened, advantage=advantages.reward_to_go)
    found, _ = advantages.free_play(REWARD, zero, MASK, advantage=white, tokens=2)
    batch = batch.replace(mask=MASK, advantage=found)

    def loss(logp):
        terms = objectives.ppo(Scores(logp=logp, entropy=zero), batch)
        return masked.sum(terms.loss * terms.weight, terms.weight != 0)

    slope = np.asarray(jax.grad(loss)(batch.old_logp + 0.05))
    assert_array_equal(slope != 0, [[0, 0, 0, 0, 0, 1, 1], [0] * 7, [0] * 7])


# --- probes


def marked(rows, t=6, seed=0):
    """Random texts with a noisy mark on every token behind the first."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 12, (rows, t))
    mask = np.broadcast_to(np.arange(t) > 0, tokens.shape)
    good = 1 / (1 + np.exp(-(tokens % 3 - 1.0) - 0.5 * (np.roll(tokens, 1, 1) % 2)))
    mark = np.where(mask, np.where(rng.uniform(size=tokens.shape) < good, 1.0, -1.0), 0.0)
    fields = (tokens.astype(np.int32), mask, np.ones_like(tokens, np.int32), np.zeros(rows), mark)
    return Labeled(*(jnp.asarray(x, jnp.float32 if i > 2 else None) for i, x in enumerate(fields)))


def logistic(features, label, steps=30):
    """Weights and bias that maximise the likelihood, by Newton's method in float64."""
    x = np.column_stack([features, np.ones(len(features))])
    w = np.zeros(x.shape[1])
    for _ in range(steps):
        p = 1 / (1 + np.exp(-x @ w))
        w += np.linalg.solve((x * (p * (1 - p))[:, None]).T @ x, x.T @ (label - p))
    return w


def test_a_probe_reads_layer_1_of_3_finds_the_logistic_regression_and_moves_nothing_else():
    small = replace(MODEL, width=8, heads=2, kv_heads=1, layers=3)
    policy = toys.weights(small)
    probe = Probe.of(small, layers=1)
    batch = marked(200)
    spec = Learner(
        probe,
        objectives.token_reward_model,
        optimizer=partial(adam, learning_rate=0.1, final=0.001, steps=300, clip=None),
        epochs=300,
    )
    state = jax.jit(lambda key: phases.init_learner(key, learner=spec))(jax.random.key(0))
    start = weights.fill(state.params, probe.part_of(policy), origin="policy")
    state = state.replace(params=start)
    run = jax.jit(partial(update, learner=spec, models={}))
    params = run(state, {}, batch, jax.random.key(0))[0].params

    for name in params:
        if name != "value_head":  # bit for bit, after 300 steps of Adam
            jax.tree.map(assert_array_equal, params[name], policy[name])
    assert "layers_1" not in params

    hidden, _ = toys.forward(replace(small, layers=1), policy, batch.tokens)
    mask = np.asarray(batch.mask)
    exact = logistic(hidden[mask], (np.asarray(batch.token_score) > 0)[mask])
    head = np.concatenate([params["value_head"]["kernel"][:, 0], params["value_head"]["bias"]])
    assert_allclose(head, exact, atol=2e-3)
    assert np.abs(exact).max() > 0.3


def test_a_probes_gradient_ends_at_its_head_exactly():
    for probe in (Probe.of(MODEL, layers=2), Probe.of(MODEL, layers=1, lm_head=True)):

        def loss(params, probe=probe):
            found = score({"self": params}, marked(4), models={"self": probe})
            logp = found.logp if probe.lm_head else 0.0
            return (found.reward * (1 + found.value) + logp).sum()

        grads = jax.jit(jax.grad(loss))(toys.weights(probe))
        learned = ("value_head", "head") if probe.lm_head else ("value_head",)
        assert sorted(name for name in grads if name in learned) == sorted(learned)
        for name, tree in grads.items():
            for leaf in jax.tree.leaves(tree):
                assert (np.asarray(leaf) != 0).any() == (name in learned)


def test_a_run_starts_a_probe_from_a_deeper_model():
    spec = Learner(replace(MODEL, layers=3), objectives.mle, batch="text")
    probe = replace(CONFIG.learners["probe"], model=Probe.of(spec.model, layers=2))
    config = replace(CONFIG, learners={"policy": spec, "probe": probe})
    made = phases.build(config, sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1]))
    state, _ = begin(config, made, {})
    policy, found = (state.learners[name].params for name in ("policy", "probe"))
    assert sorted(set(policy) - set(found)) == ["head", "layers_2"]
    for name in set(found) - {"value_head"}:
        jax.tree.map(assert_array_equal, found[name], policy[name])


@pytest.mark.parametrize("scan", [False, True])
def test_a_probe_takes_the_first_layers_and_refuses_a_shallower_model(scan):
    deep = replace(MODEL, scan=scan, layers=3)
    probe, tree = Probe.of(deep, layers=2), toys.weights(deep)
    found = weights.fill(toys.weights(probe), probe.part_of(tree), origin="base")
    if scan:
        jax.tree.map(lambda a, b: assert_array_equal(a, b[:2]), found["layers"], tree["layers"])
    else:
        jax.tree.map(assert_array_equal, found["layers_1"], tree["layers_1"])
    shallow = replace(deep, layers=1)
    with pytest.raises(ValueError, match=r"weights of base do not fit the model:\n.*layers"):
        weights.fill(found, probe.part_of(toys.weights(shallow)), origin="base")
    with pytest.raises(ValueError, match=r"layers=2: the model to probe has 1"):
        Probe.of(shallow, layers=2)


# --- gates


def test_without_a_side_mlp_no_weight_is_added_and_with_one_every_weight_is_split():
    names = {sharding.path_name(p): x.shape for p, x in leaves(MODEL)}
    sided = {sharding.path_name(p): x.shape for p, x in leaves(replace(MODEL, side_mlp=8))}
    assert {n: s for n, s in sided.items() if "side" not in n} == names
    added = {n: s for n, s in sided.items() if n not in names}
    expected = {"side_up": (16, 8), "side_down": (8, 16)}
    assert added == {f"layers_{i}/{n}/kernel": s for i in (0, 1) for n, s in expected.items()}
    split = {sharding.path_name(p): sharding.spec(p, x) for p, x in leaves(
        replace(MODEL, side_mlp=8, scan=True))}  # fmt: skip
    assert split["layers/side_up/kernel"] == P(None, sharding.SHARE, "tensor")
    assert split["layers/side_down/kernel"] == P(None, "tensor", sharding.SHARE)


def leaves(model):
    return jax.tree_util.tree_flatten_with_path(jax.eval_shape(model.init, jax.random.key(0)))[0]


def test_a_gate_scales_what_teaches_the_side_path_and_its_drift_by_its_square():
    """While the path is silent its gradient is `gate` times that of gate 1, and all others stay;
    after a step of SGD it says gate² times as much."""
    gate, batch = 0.1, marked(8)

    @partial(jax.jit, static_argnums=0)
    def step(model, params):
        spec = Learner(model, objectives.mle, optimizer=partial(sgd, learning_rate=1e-2))
        state = phases.init_learner(jax.random.key(0), learner=spec).replace(params=params)
        new = update(state, {}, batch, jax.random.key(0), learner=spec, models={})[0].params
        own = params["layers_0"] | {"side_down": new["layers_0"]["side_down"]}
        before, after = (
            model.apply(tree, batch.tokens).hidden for tree in (params, params | {"layers_0": own})
        )
        return jax.tree.map(jnp.subtract, params, new)["layers_0"], after - before

    def of(gate):
        model = replace(MODEL, layers=1, side_mlp=8, side_gate=gate)
        params = toys.weights(model)
        params["layers_0"]["side_down"]["kernel"] *= 0.0
        learned, drift = jax.tree.map(lambda x: np.asarray(x, np.float64), step(model, params))
        return learned["side_down"]["kernel"], learned["down"]["kernel"], np.abs(drift).mean()

    side, own, drift = of(1.0)
    gated, same, moved = of(gate)
    assert_allclose(gated, gate * side, atol=2e-4 * np.abs(gated).max())
    assert_allclose(same, own, atol=1e-8)
    assert_allclose(moved / drift, gate**2, rtol=0.02)

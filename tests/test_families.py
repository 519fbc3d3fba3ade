"""Every family against transformers (`pip install -e ".[parity]"`, else skipped), weights random.

They are of a size at which every part matters: norms, biases, windows, caps.
"""

import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub_toys import CONFIGS
from numpy.testing import assert_allclose, assert_array_equal

from rlhf_jax.models import pretrained, weights
from rlhf_jax.models.exporting import export, export_adapter
from rlhf_jax.models.transformer import Lora
from rlhf_jax.rollout import generate
from rlhf_jax.sampling import Sampling
from rlhf_jax.score import score
from rlhf_jax.types import Prompts, Sequences

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
LENGTH, TOLERANCE = 24, 1e-4


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda name: name.replace(" ", "-"))
def saved(request, tmp_path_factory):
    """Their model, and its directory in several shards."""
    given = dict(CONFIGS[request.param])
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(given.pop("model_type"), **given)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.08 * torch.randn_like(x))
    path = tmp_path_factory.mktemp("saved")
    model.eval().save_pretrained(path, max_shard_size="40KB")
    return model, path


@pytest.fixture(scope="module")
def ours(saved):
    model = pretrained.model(saved[1])
    with jax.default_matmul_precision("highest"):
        fresh = jax.jit(model.init)(jax.random.key(0))
    return model, weights.fill(fresh, pretrained.load(saved[1], model), origin="here")


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(3, 96, (2, LENGTH))


def theirs(model, tokens, **more):
    with torch.no_grad():
        more = {name: torch.tensor(x) for name, x in more.items()}
        return model(torch.tensor(tokens), **more).logits.numpy()


def logits(model, params, tokens, **more):
    def both(params, tokens):
        return model.logits(params, model.apply(params, tokens, **more).hidden)

    return np.asarray(jax.jit(both)(params, jnp.asarray(tokens)))


def test_logits_are_theirs_also_beyond_the_window(saved, ours, tokens):
    assert_allclose(logits(*ours, tokens), theirs(saved[0], tokens), atol=TOLERANCE)


def test_logits_are_theirs_with_scanned_layers(saved, tokens):
    model = pretrained.model(saved[1], scan=True)
    fresh = jax.jit(model.init)(jax.random.key(0))
    params = weights.fill(fresh, pretrained.load(saved[1], model), origin="here")
    assert_allclose(logits(model, params, tokens), theirs(saved[0], tokens), atol=TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(saved, ours, tokens, side):
    real = np.ones((2, LENGTH), np.int64)
    real[1, slice(None, 7) if side == "left" else slice(-7, None)] = 0
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    found = logits(*ours, tokens, segments=jnp.asarray(real))
    expected = theirs(saved[0], tokens, attention_mask=real, position_ids=positions)
    assert_allclose(found[real > 0], expected[real > 0], atol=TOLERANCE)


def test_with_a_cache_token_by_token_too(saved, ours, tokens):
    model, params = ours

    @jax.jit
    def run(params, tokens):
        def one(cache, i):
            token = jax.lax.dynamic_slice_in_dim(tokens, i, 1, axis=1)
            at = jnp.full((2, 1), i)
            out = model.apply(params, token, positions=at, cache=cache)
            return out.cache, model.logits(params, out.hidden[:, 0])

        return jax.lax.scan(one, model.empty_cache(2, LENGTH), jnp.arange(LENGTH))[1]

    found = np.asarray(run(params, jnp.asarray(tokens))).swapaxes(0, 1)
    assert_allclose(found, theirs(saved[0], tokens), atol=TOLERANCE)


def test_greedy_decoding_says_the_same_for_64_tokens(saved, ours, tokens):
    model, params = ours
    prompt = tokens[:, :9]
    with torch.no_grad():
        said = saved[0].generate(
            torch.tensor(prompt), attention_mask=torch.ones(2, 9, dtype=torch.long),
            max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0,
            eos_token_id=None,
        ).numpy()  # fmt: skip
    batch = Prompts(*map(jnp.asarray, (prompt, np.full(2, 9), np.arange(2), np.zeros(2, int))))
    rollout = jax.jit(
        lambda params, batch: generate(
            params, batch, jax.random.key(0), model=model, length=64, sampling=Sampling(top_k=1)
        )
    )(params, batch)
    assert_array_equal(np.asarray(rollout.tokens), said)


@pytest.mark.parametrize("origin", [True, False], ids=["their config", "our config"])
def test_what_we_write_they_read_as_the_same_model(saved, ours, tokens, tmp_path, origin):
    model, params = ours
    given = {"origin": saved[1]} if origin else {}
    export(tmp_path, model, params, shard_bytes=30_000, **given)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(again) is type(saved[0])
    before, after = saved[0].state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert_array_equal(x.numpy(), after[name].numpy(), err_msg=name)
    found = theirs(again.eval(), tokens)
    assert_allclose(found, theirs(saved[0], tokens), atol=0 if origin else TOLERANCE)


def test_a_reward_model_says_what_theirs_says_of_a_text_and_again_once_written(
    saved, tokens, tmp_path
):
    """Theirs reads its score at the last token that is not padding, ours at each one."""
    config = transformers.AutoConfig.from_pretrained(saved[1], num_labels=1, pad_token_id=0)
    torch.manual_seed(1)
    eager = {"attn_implementation": "eager"}
    scoring = transformers.AutoModelForSequenceClassification.from_config(config, **eager).eval()
    with torch.no_grad():
        for x in scoring.parameters():
            x.add_(0.08 * torch.randn_like(x))
    scoring.save_pretrained(tmp_path / "theirs")
    model = pretrained.model(tmp_path / "theirs")
    assert (model.lm_head, model.value_head) == (False, True)
    fresh = jax.jit(model.init)(jax.random.key(0))
    params = weights.fill(fresh, pretrained.load(tmp_path / "theirs", model), origin="here")
    long = np.arange(LENGTH) < np.array([[LENGTH], [LENGTH - 7]])
    tokens = np.where(long, tokens, 0)

    def both(model, params, theirs_now):
        mask = jnp.asarray(long).at[:, 0].set(False)
        batch = Sequences(jnp.asarray(tokens), mask, jnp.asarray(long, jnp.int32))
        reward = jax.jit(lambda p: score({"self": p}, batch, models={"self": model}).reward)(params)
        found = np.asarray(reward)[[0, 1], long.sum(1) - 1]
        expected = theirs(theirs_now, tokens, attention_mask=long.astype(np.int64))[:, 0]
        assert_allclose(found, expected, atol=TOLERANCE)
        return found

    before = both(model, params, scoring)
    params = jax.tree.map(lambda x: x * 1.1, params)
    export(tmp_path / "ours", model, params, origin=tmp_path / "theirs")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", **eager
    )
    assert type(again) is type(scoring) and again.config.num_labels == 1
    assert np.abs(both(model, params, again.eval()) - before).max() > 1e-3


def test_an_adapter_is_written_into_the_weights(saved, ours, tokens, tmp_path):
    model, params = ours
    low = replace(model, lora=Lora(rank=2, alpha=4.0))
    fresh = weights.trained(jax.jit(low.init)(jax.random.key(1)), "lora_")
    noise = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(2), x.shape), fresh)
    lively = weights.merged(params, noise)
    export(tmp_path, low, lively, origin=saved[1])
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    applied = logits(low, lively, tokens)
    assert np.abs(applied - theirs(saved[0], tokens)).max() > 0.01
    assert_allclose(theirs(again.eval(), tokens), applied, atol=TOLERANCE)


def test_an_adapter_alone_is_read_by_peft(saved, ours, tokens, tmp_path):
    peft = pytest.importorskip("peft")
    model, params = ours
    fused = saved[0].config.model_type in ("gpt2", "gpt_neox")
    low = replace(model, lora=Lora(rank=2, alpha=4.0, on="out|up|down" if fused else "query|gate"))
    fresh = weights.trained(jax.jit(low.init)(jax.random.key(1)), "lora_")
    noise = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(2), x.shape), fresh)
    export_adapter(tmp_path, low, noise, origin=saved[1])
    plain = transformers.AutoModelForCausalLM.from_pretrained(saved[1], attn_implementation="eager")
    theirs_low = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
    applied = logits(low, weights.merged(params, noise), tokens)
    assert_allclose(theirs(theirs_low, tokens), applied, atol=TOLERANCE)

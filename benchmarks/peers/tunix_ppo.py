"""The worker of google-tunix's PPO (0.1.7), driven through the prompts that its learner asks for.

Settings and differences: README.md. Its Qwen 2 with biases of zero is our model.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from protocol import Turns, work
from safetensors.numpy import load_file
from tunix.models.qwen2 import model as qwen2
from tunix.rl import rl_cluster
from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig
from tunix.rl.utils import create_critic_model

PADDING = 0


def loaded(where, *, tied: bool) -> qwen2.Qwen2:
    """The weights of a directory of Hugging Face in Tunix's model."""
    given = json.loads((where / "config.json").read_text())
    heads, kv_heads, size = (
        given[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    width = given["hidden_size"]
    config = qwen2.ModelConfig(
        num_layers=given["num_hidden_layers"],
        vocab_size=given["vocab_size"],
        embed_dim=width,
        hidden_dim=given["intermediate_size"],
        num_heads=heads,
        head_dim=size,
        num_kv_heads=kv_heads,
        rope_theta=given["rope_parameters"]["rope_theta"],
        norm_eps=given["rms_norm_eps"],
        use_tied_embedding=tied,
    )
    model = qwen2.Qwen2(config, rngs=nnx.Rngs(0))
    found = load_file(where / "model.safetensors")
    places = {
        "model.embed_tokens": model.embedder.input_embedding,
        "model.norm": model.final_norm.w,
    }
    for i, layer in enumerate(model.layers):
        at, attention, mlp = f"model.layers.{i}", layer.attn, layer.mlp
        places |= {f"{at}.self_attn.{x}_proj": getattr(attention, f"{x}_proj").w for x in "qkvo"}
        places |= {
            f"{at}.mlp.{x}_proj": getattr(mlp, f"{x}_proj").kernel for x in ("gate", "up", "down")
        }
        places |= {
            f"{at}.{x}": getattr(layer, x).w
            for x in ("input_layernorm", "post_attention_layernorm")
        }
    for name, place in places.items():
        x = found[f"{name}.weight"]
        x = x.T if name.endswith("_proj") else x  # files have [out, in]
        place[...] = jnp.asarray(x.reshape(place[...].shape))
    return model


def main() -> None:
    """Train until there is no "go"."""
    todo = work()
    turns = Turns(versions={name: version(name) for name in ("google-tunix", "jax", "flax")})
    rows, length, vocab = todo["rows"], todo["length"], todo["vocab"]
    stop = vocab if todo["stop"] is None else todo["stop"]  # no token is `vocab`
    low, high = todo["paid"]
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    # The sampler takes prompts as text and rewards get text: here a text is its ids.
    numbers = SimpleNamespace(
        encode=lambda text: [int(x) for x in text.split()],
        decode=lambda ids: " ".join(map(str, ids)),
        bos_id=lambda: 0,  # none: a prompt begins with its own first token
        eos_id=lambda: stop,
        pad_id=lambda: PADDING,
    )
    critic = create_critic_model(loaded(todo["weights"] / "critic", tied=False))
    critic.lm_head.kernel[...] = jnp.zeros_like(critic.lm_head.kernel[...])  # as ours begins
    rollouts = RolloutConfig(
        max_tokens_to_generate=length,
        max_prompt_length=todo["prompt"],
        kv_cache_size=todo["prompt"] + length,
        temperature=1.0,
        top_p=1.0,
        top_k=None,
        eos_tokens=[stop],
        seed=0,
    )
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adam(todo["rate"]),
        critic_optimizer=optax.adam(todo["rate"]),
        eval_every_n_steps=10**9,
        max_steps=10**9,
        mini_batch_size=rows,
        train_micro_batch_size=rows // todo["minibatches"],
        rollout_micro_batch_size=rows,
        compute_logps_micro_batch_size=rows,
    )
    roles = rl_cluster.Role
    cluster = rl_cluster.RLCluster(
        actor=loaded(todo["weights"] / "policy", tied=True),
        critic=critic,
        reference=loaded(todo["weights"] / "policy", tied=True),
        tokenizer=numbers,
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={
                r: mesh for r in (roles.ACTOR, roles.CRITIC, roles.REFERENCE, roles.ROLLOUT)
            },
            rollout_engine="vanilla",
            training_config=training,
            rollout_config=rollouts,
        ),
    )

    def share(prompts, completions, **_):
        said = map(numbers.encode, completions)
        return [sum(low <= x < high for x in ids) / max(len(ids), 1) for ids in said]

    def tokens(made):  # Tunix drops the token that ends a text
        return {"tokens": sum(min(len(x) + 1, length) for x in made.tokens)}

    learner = PPOLearner(
        cluster,
        PPOConfig(
            num_iterations=todo["epochs"],
            beta=todo["kl"],
            kl_method="kl",
            gae_lambda=todo["trace"],
            epsilon=todo["clip"],
            clip_range_value=todo["clip"],
        ),
        reward_fns=share,
    )
    cluster.generate = turns.at_end_of(cluster.generate, "rollout", tokens)
    made = learner._generate_and_compute_advantage
    learner._generate_and_compute_advantage = turns.at_end_of(made, "score")

    def prompts():
        random = np.random.default_rng(0)
        while True:
            ids = random.integers(todo["first"], vocab, (rows, todo["prompt"]))
            rollouts.seed += 1  # else each iteration draws the same numbers
            yield {"prompts": [" ".join(map(str, row)) for row in ids]}
            # The learner asks for the next batch: the iteration is over, once it is computed.
            models = cluster.actor_trainer.model, cluster.critic_trainer.model
            jax.block_until_ready([nnx.state(model) for model in models])
            turns.done("update")

    learner.train(prompts())


if __name__ == "__main__":
    main()

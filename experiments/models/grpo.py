"""GRPO on a model from a local directory of Hugging Face: answers that a program checks.

    pip install -e ".[reasoning]"
    rlhf-jax train experiments/models/grpo.py --set model.path=DIR --out runs/model_grpo
    rlhf-jax export runs/model_grpo --out runs/model_grpo/export

DIR holds config.json, safetensors and a tokenizer with a chat template. The questions are made by
reasoning-gym: `--set task.name=gcd` for another of its data sets, `--set task.options="max_terms=2,
max_digits=1"` for how hard they are. They are put to the model in its own template, and an answer
earns what the data set says of it, 0 to 1. No critic: it is held against the other answers to the
same question. The policy is an adapter over one frozen copy of the weights, which is the reference
of the KL, too.
"""

from __future__ import annotations

from functools import partial

from local import Local

from rlhf_jax.config import Checkpointing, Config, Rollouts
from rlhf_jax.data import reasoning, streams
from rlhf_jax.data.reasoning import Task
from rlhf_jax.objectives import presets
from rlhf_jax.rewards import KL, from_text


def config(
    model: Local = Local(),
    task: Task = Task(),
    steps: int = 100,
    rows: int = 16,
    samples: int = 8,
    prompt: int = 256,
) -> Config:
    """`samples` answers to each of `rows` questions of up to `prompt` tokens a step."""
    prompts = partial(
        streams.chat_prompts,
        batch=rows,
        length=prompt,
        tokenizer=model.path,
        source=partial(reasoning.rows, task),
        shuffle=False,  # entries are random already, and the reward finds one by its place
    )
    policy = model.learner(model.policy(), presets.GRPO.objective, updates=steps * 2, minibatches=2)
    return Config(
        name="model_grpo",
        steps=steps,
        tokenizer=model.path,
        data={"prompts": prompts},
        learners={"policy": policy},
        frozen={"reference": model.whole()},
        rollouts=Rollouts(
            from_text(
                score=reasoning.scorer(task), tokenizer=model.path, prompt=False, by_prompt=True
            ),
            length=64,
            samples=samples,
            sampling=model.sampling(),
            value=None,
            kl=KL(initial=0.0, adaptive=False),  # GRPO's is in its objective
            advantage=presets.GRPO.advantage,
            show=4,
        ),
        checkpoint=Checkpointing(every=50),
    )

"""The worker of TRL's PPO, as released last (1.12.0), driven through a callback of its trainer.

Settings: README.md. TRL wants its reward as a model, and its padding as a token.
"""

from __future__ import annotations

import os
import sys
import tempfile
from types import SimpleNamespace

import torch
from protocol import Turns, said_tokens, work
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    TrainerCallback,
    __version__,
)
from trl import __version__ as trl_version
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

BATCHES = 8  # of prompts; an epoch of TRL's data loader


class Share(torch.nn.Module):
    """A "reward model": the share of a response's tokens in a range, the same at each position."""

    base_model_prefix = "backbone"

    def __init__(self, prompt: int, low: int, high: int):
        super().__init__()
        self.prompt, self.low, self.high = prompt, low, high
        self.score = torch.nn.Identity()

    def backbone(self, input_ids, attention_mask, **_):
        """What `get_reward` calls: "hidden states" that the head leaves as they are."""
        said, there = input_ids[:, self.prompt :], attention_mask[:, self.prompt :]
        wanted = (said >= self.low) & (said < self.high) & there
        share = wanted.sum(1) / there.sum(1).clamp(min=1)
        shared = share[:, None, None].expand(*input_ids.shape, 1)
        return SimpleNamespace(hidden_states=(shared,))


class Boundary(TrainerCallback):
    """One "go", one iteration."""

    def __init__(self, turns: Turns):
        self.turns = turns

    def on_train_begin(self, *_, **__):
        """The first of them starts now."""
        self.turns.start()

    def on_step_end(self, *_, **__):
        """What TRL does after this (garbage) is the next iteration's."""
        self.turns.done("update")


def main() -> None:
    """Train until there is no "go"."""
    todo = work()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    turns = Turns(
        versions={"torch": torch.__version__, "transformers": __version__, "trl": trl_version}
    )
    stop, padding = todo["stop"], todo["vocab"]  # TRL never embeds its padding: no token is lost
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(todo["weights"] / "policy") for _ in range(2)
    )
    policy.generation_config.pad_token_id = 0  # of rows that have ended; TRL masks them
    critic = AutoModelForSequenceClassification.from_pretrained(todo["weights"] / "critic")

    def tokens(made) -> dict[str, int]:
        return {"tokens": said_tokens(made[0][:, todo["prompt"] :].tolist(), stop)}

    ppo_trainer.batch_generation = turns.at_end_of(ppo_trainer.batch_generation, "rollout", tokens)
    if "compiled" in sys.argv[2:]:  # all but generation
        for name in ("forward", "get_reward"):
            made = torch.compile(getattr(ppo_trainer, name), dynamic=False)
            setattr(ppo_trainer, name, made)
    ppo_trainer.masked_whiten = turns.at_end_of(ppo_trainer.masked_whiten, "score")
    rows = todo["rows"]
    prompts = torch.randint(todo["first"], todo["vocab"], (BATCHES * rows, todo["prompt"]))
    with tempfile.TemporaryDirectory() as out:
        settings = PPOConfig(
            output_dir=out,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            num_sample_generations=0,
            disable_tqdm=True,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=1,  # else `num_mini_batches` makes fewer optimizer steps
            num_mini_batches=todo["minibatches"],
            local_rollout_forward_batch_size=rows,
            num_ppo_epochs=todo["epochs"],
            total_episodes=10**9,
            response_length=todo["length"],
            temperature=1.0,
            stop_token_id=stop,
            learning_rate=todo["rate"],
            lr_scheduler_type="constant",
            kl_coef=todo["kl"],
            cliprange=todo["clip"],
            cliprange_value=todo["clip"],
            gamma=1.0,
            lam=todo["trace"],
        )
        PPOTrainer(
            settings,
            SimpleNamespace(pad_token_id=padding, eos_token_id=stop if stop is not None else -1),
            policy,
            reference,
            Share(todo["prompt"], *todo["paid"]),
            [{"input_ids": row} for row in prompts],
            critic,
            data_collator=lambda rows: {"input_ids": torch.stack([r["input_ids"] for r in rows])},
            callbacks=[Boundary(turns)],
        ).train()


if __name__ == "__main__":
    main()

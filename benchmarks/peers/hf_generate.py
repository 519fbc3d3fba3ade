"""The worker of Hugging Face `generate`: the rollout alone, on the same prompts and weights.

Settings: README.md.
"""

from __future__ import annotations

import os

import torch
from protocol import Turns, said_tokens, work
from transformers import AutoModelForCausalLM, GenerationConfig, __version__


def main() -> None:
    """Generate until there is no "go"."""
    todo = work()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    turns = Turns(versions={"torch": torch.__version__, "transformers": __version__})
    model = AutoModelForCausalLM.from_pretrained(todo["weights"] / "policy").eval()
    model.generation_config.eos_token_id = todo["stop"]
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=todo["length"],
        eos_token_id=todo["stop"],
        pad_token_id=0,
    )
    turns.start()
    while True:
        prompts = torch.randint(todo["first"], todo["vocab"], (todo["rows"], todo["prompt"]))
        there = torch.ones_like(prompts)
        with torch.inference_mode():
            made = model.generate(prompts, attention_mask=there, generation_config=settings)
        turns.done("rollout", tokens=said_tokens(made[:, todo["prompt"] :].tolist(), todo["stop"]))


if __name__ == "__main__":
    main()

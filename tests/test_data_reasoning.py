"""Tasks of reasoning-gym: an answer earns what the entry of its own prompt says."""

import pickle
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_chat import directory

from rlhf_jax import masked
from rlhf_jax.data import DataError, reasoning, streams, tokenizers
from rlhf_jax.data.reasoning import Scorer, Task, answer, rows, scorer
from rlhf_jax.rewards import from_text
from rlhf_jax.types import Rollout

TASK = Task("chain_sum", options="max_terms=2, max_digits=1", size=7, shots=2)


@pytest.fixture
def library():
    pytest.importorskip("reasoning_gym")


@pytest.mark.parametrize(
    "text, found",
    [
        ("so <answer> 5 </answer> it is", "5"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        (" 5\n", "5"),
        ("<answer>5", "<answer>5"),
        ("5</answer>", "5</answer>"),
        ("<answer></answer>", ""),
    ],
)
def test_an_answer_is_what_the_last_tags_hold_or_all_that_was_said(text, found):
    assert answer(text) == found


def test_without_the_library_one_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(DataError, match=r'pip install -e "\.\[reasoning\]"'):
        rows(Task(seed=-77))


@pytest.mark.parametrize(
    "task, says",
    [
        (Task("nope"), "no data set 'nope'; valid: ab, acre, "),
        (Task(options="max_trms=3"), "no option max_trms; valid: min_terms, max_terms, "),
        (Task(options="seed=3"), "no option seed"),
        (Task(options="max_terms"), "write them as name=1, other=2"),
        (Task(options="max_terms=x"), "write them as name=1, other=2"),
        (Task(options="max_terms=0"), "'chain_sum' with options 'max_terms=0' .*max_terms"),
    ],
)
def test_a_task_that_does_not_exist_is_answered_with_what_is_valid(library, task, says):
    with pytest.raises(DataError, match=says):
        scorer(task)


def test_solved_questions_stand_before_each_one_and_are_none_of_the_tasks_own(library):
    chats = rows(TASK)
    roles = [message["role"] for message in chats[0]["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
    asked = [chat["messages"][-1]["content"] for chat in chats]
    assert len(asked) == 7
    shown = [chats[0]["messages"][i] for i in (1, 3)]
    assert rows(TASK)[5]["messages"][:5] == chats[0]["messages"][:5]
    own = reasoning._entries(TASK)
    assert [own[i]["question"] for i in range(7)] == asked
    later = rows(Task(TASK.name, TASK.options, size=9))
    assert [later[i]["messages"][-1]["content"] for i in (7, 8)] == [x["content"] for x in shown]


def test_every_answer_is_held_against_the_entry_of_its_own_prompt_in_any_process(library, tmp_path):
    tokenizer = str(directory(tmp_path))
    stream = streams.chat_prompts(
        seed=5, shard=(1, 2), batch=8, length=640, tokenizer=tokenizer, shuffle=False,
        source=partial(rows, TASK),
    )  # fmt: skip
    batches = iter(stream)
    next(batches)
    prompts = next(batches)  # places 12 to 15 of 7 entries: the next epoch
    assert prompts.prompt_id.tolist() == [12, 13, 14, 15]
    load, own = tokenizers.load(tokenizer), reasoning._entries(TASK)
    places = [int(place) % 7 for place in prompts.prompt_id]
    right = [own[place]["answer"] for place in places]
    for tokens, n, place in zip(prompts.tokens, prompts.length, places, strict=True):
        assert own[place]["question"] in load.decode(tokens[:n])
    said = [f"<answer>{x}</answer>" for x in right]
    said[1] = f"<answer>{int(right[1]) + 1}</answer>"
    said[2] = f"It is {right[2]}"
    ids = [load.encode(text) for text in said]
    t = 1 + max(map(len, ids))
    tokens, mask = np.zeros((4, t), np.int32), np.zeros((4, t), bool)
    for row, (one, some) in enumerate(zip(ids, mask, strict=True)):
        tokens[row, 1 : 1 + len(one)] = one
        some[1 : 1 + len(one)] = True
    zeros = np.zeros((4, t), np.float32)
    rollout = Rollout(
        tokens=tokens, mask=mask, segments=mask.astype(np.int32), logp=zeros, behaviour_logp=zeros,
        temperature=np.ones(4, np.float32), ended=np.ones(4, bool), prompt_id=prompts.prompt_id,
        sample_id=np.zeros(4, np.int32), earned=zeros, steps=np.full(4, t),
    )  # fmt: skip
    pay = from_text(
        scorer(TASK), tokenizer=tokenizer, prompt=False, by_prompt=True, workers=1, timeout=120.0
    )
    reward = np.asarray(pay(jax.tree.map(jnp.asarray, rollout), {}))
    part = len(right[2]) / len(said[2])
    np.testing.assert_allclose(reward.sum(1), [1.0, 0.0, part, 1.0], rtol=1e-6)
    assert not reward[~np.asarray(masked.is_last(jnp.asarray(mask)))].any()


def test_entries_that_another_process_would_not_make_again_are_refused(library):
    assert Scorer(TASK, scorer(TASK).digest)("x", 0) == 0.0
    with pytest.raises(DataError, match="other entries in every process"):
        Scorer(TASK, "what the trainer's process made")("x", 0)


def test_a_worker_has_the_library_before_the_clock_of_its_first_text_starts(library):
    sent = pickle.dumps(scorer(TASK))
    reasoning._entries.cache_clear()
    pickle.loads(sent)
    assert reasoning._entries.cache_info().currsize == 1

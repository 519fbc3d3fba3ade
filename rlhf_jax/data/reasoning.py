"""Tasks whose answers a program checks: the data sets of `reasoning-gym`, as chats and a reward.

    task = Task("chain_sum", options="min_terms=2, max_terms=3")
    streams.chat_prompts(source=partial(rows, task), shuffle=False, ...)
    rewards.from_text(score=scorer(task), by_prompt=True, prompt=False, ...)

Entries are made, not stored: entry i follows from the task and i alone, so a worker process makes
the entry of the prompt again and nothing has to be sent along. That needs prompts in the order of
the entries (`shuffle=False`): then entry `prompt_id` modulo `size` is the prompt's.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from rlhf_jax.data import DataError

ASK = "Answer the question. Write your final answer between <answer> and </answer>."
CHECKED = 16  # entries that two processes compare


@dataclass(frozen=True)
class Task:
    """One data set of reasoning-gym, and how hard it is."""

    name: str = "chain_sum"
    options: str = ""  # fields of the data set's own configuration: "min_terms=2, max_digits=1"
    shots: int = 0  # solved questions that stand before each one, so that small models see the form
    size: int = 10_000  # entries, after which the same come again
    seed: int = 0


def rows(task: Task, *, system: str = ASK) -> Sequence[Mapping]:
    """A chat for each entry: what to do, `shots` solved questions, and the entry's own."""
    told = [_says("system", system)] if system else []
    others = _entries(replace(task, seed=task.seed + task.size))  # its entries begin where ours end
    for i in range(task.shots):
        told.append(_says("user", others[i]["question"]))
        told.append(_says("assistant", f"<answer>{others[i]['answer']}</answer>"))
    return _Chats(_entries(task), told)


def scorer(task: Task) -> Callable[[str, int], float]:
    """`score(text, prompt_id)`, the data set's own verdict on the answer in a text.

    Raises:
        DataError: if there is no such data set, or it has no such option.
    """
    return Scorer(task, _digest(task))


@dataclass(frozen=True)
class Scorer:
    """What the data set gives for the answer in a text, 0 to 1; see `scorer`."""

    task: Task
    digest: str

    def __call__(self, text: str, prompt_id: int) -> float:
        """Of the answer in a text to the entry of its prompt."""
        _same(self.task, self.digest)
        entries = _entries(self.task)
        entry = entries[prompt_id % len(entries)]
        return float(entries.score_answer(answer(text), entry))

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """In a worker, before any text: the library takes seconds to be imported."""
        self.__dict__.update(state)
        _entries(self.task)


def answer(text: str) -> str:
    """What stands between the last <answer> and </answer>; without the two, the whole text."""
    before, end, _ = text.rpartition("</answer>")
    _, begin, inside = before.rpartition("<answer>")
    return (inside if begin and end else text).strip()


@functools.cache
def _same(task: Task, digest: str) -> None:
    """Some data sets draw from Python's sets, whose order is another one in every process."""
    if _digest(task) != digest:
        raise DataError(
            f"the data set {task.name!r} makes other entries in every process, so the entry of a "
            "prompt cannot be made again to score its answer; choose another task.name"
        )


def _digest(task: Task) -> str:
    entries = _entries(task)
    first = [entries[i] for i in range(min(CHECKED, len(entries)))]
    told = json.dumps([(entry["question"], entry["answer"]) for entry in first], default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=8)
def _entries(task: Task) -> Any:
    factory = _library().factory
    if task.name not in factory.DATASETS:
        valid = ", ".join(sorted(factory.DATASETS))
        raise DataError(f"reasoning-gym has no data set {task.name!r}; valid: {valid}")
    options = _options(task.options)
    valid = [field.name for field in fields(factory.DATASETS[task.name][1])]
    if unknown := [name for name in options if name not in valid or name in ("seed", "size")]:
        raise DataError(
            f"{task.name!r} has no option {', '.join(unknown)}; valid: "
            + ", ".join(name for name in valid if name not in ("seed", "size"))
        )
    try:
        return factory.create_dataset(task.name, seed=task.seed, size=task.size, **options)
    except (AssertionError, ValueError, TypeError) as error:  # what its checks of options raise
        said = f"{task.name!r} with options {task.options!r} and size {task.size}"
        raise DataError(f"{said}: {error}") from error


def _options(text: str) -> dict[str, Any]:
    """`a=1, b=(2, 3)` as a dict of Python's literals."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if call.args:
            raise ValueError
        return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (ValueError, SyntaxError, AttributeError) as error:
        raise DataError(f"task.options={text!r}: write them as name=1, other=2") from error


def _library():
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of a package that it imports
            import reasoning_gym.factory
    except ImportError as error:
        raise DataError(
            'tasks come from the package reasoning-gym: pip install -e ".[reasoning]"'
        ) from error
    return reasoning_gym


def _says(role: str, content: str) -> Mapping:
    return {"role": role, "content": content}


class _Chats(Sequence):
    def __init__(self, entries: Any, before: Sequence[Mapping]):
        self.entries, self.before = entries, before

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, at: int) -> Mapping:
        if not 0 <= at < len(self):
            raise IndexError(at)  # the data set would go on for ever
        return {"messages": [*self.before, _says("user", self.entries[int(at)]["question"])]}

    def __repr__(self) -> str:
        return f"{len(self)} questions"

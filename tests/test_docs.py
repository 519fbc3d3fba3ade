"""Every block of the documents runs, and the generated page is what the docstrings say."""

import ast
import inspect
import re
import runpy
from functools import partial
from pathlib import Path

import pytest

from rlhf_jax import config, objectives
from rlhf_jax.types import Terms

ROOT = Path(__file__).parent.parent
GENERATE = runpy.run_path(str(ROOT / "docs" / "generate.py"))


@pytest.mark.parametrize("page", ["tutorial.md", "environments.md"])
def test_every_block_of_a_page_runs_as_it_stands(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    space = {}
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.S)):
        exec(compile(block, f"{page}, block {i + 1}", "exec"), space)
    assert "config" in space


def test_the_page_of_objectives_is_what_the_docstrings_say():
    assert (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8") == GENERATE["page"](), (
        "docs/objectives.md is out of date; run: python docs/generate.py"
    )


def objectives_of_the_package():
    return {
        name
        for name, fn in vars(objectives).items()
        if inspect.isfunction(fn) and inspect.signature(fn).return_annotation in RETURNS
    }


RETURNS = {"Terms", "dict[str, Terms]", Terms}


def test_every_objective_is_on_the_page():
    assert objectives_of_the_package() == GENERATE["documented"]()


@pytest.mark.parametrize("name", sorted(GENERATE["documented"]()))
def test_a_docstring_says_all_that_the_page_needs(name):
    fn = getattr(objectives, name)
    found = GENERATE["_sections"](fn)
    assert {"Use", "Memory", "Example"} <= set(found)
    for one in inspect.signature(fn).parameters.values():
        if one.kind is one.KEYWORD_ONLY:
            assert re.search(rf"^{one.name}: ", found.get("Args", ""), re.M), one.name


@pytest.mark.parametrize("name", sorted(GENERATE["documented"]()))
def test_the_example_of_an_objective_makes_a_learner(name):
    space = {}
    exec(re.findall(r"```python\n(from .*?)```", GENERATE["HEAD"], re.S)[0], space)
    example = GENERATE["examples"]()[name]
    assert name in example
    made = []
    for statement in ast.parse(example).body:
        if isinstance(statement, ast.Expr):
            made.append(eval(ast.unparse(statement.value), space))
        else:
            exec(ast.unparse(statement), space)
    learners = [one for one in made if isinstance(one, config.Learner)]
    assert learners
    for learner in learners:
        for fn in (learner.objective, learner.vocab, learner.prepare, learner.transform):
            if isinstance(fn, partial):  # its arguments exist
                inspect.signature(fn.func).bind_partial(*fn.args, **fn.keywords)

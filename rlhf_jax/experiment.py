"""Experiments as files and as JSON: load one, override its numbers, describe it, compare two."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_jax.config import Config, ConfigError, Pipeline


def load(file: str | Path, settings: Sequence[str] = ()) -> Config | Pipeline:
    """The value of `config()` in a Python file; it may import files beside it or one folder up.

    A setting `a.b=1` changes the default of an argument `a` of `config`, if it has one of that
    name, and else what `config` returns.

    Raises:
        ConfigError: if there is no such file, no `config` in it, it returns something else, or a
            setting names nothing.
    """
    module = _module(file)
    parameters = inspect.signature(module.config).parameters.values()
    given = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    own = [s for s in settings if _first(s) in given]
    fields = [f.name for kind in (Config, Pipeline) for f in dataclasses.fields(kind)]
    for setting in settings:  # config() could fail for what a misspelt one was to say
        if "=" in setting:
            _check_name(_first(setting), (*given, *dict.fromkeys(fields)), setting)
    value = _called(file, module, **override(given, own))
    if type(value).__name__ == "Study":
        raise ConfigError(
            f"{file} is a study; run it with rlhf-jax study {file} --out DIR, or look at it with "
            f"rlhf-jax show {file} --preset cpu"
        )
    if not isinstance(value, Config | Pipeline):
        raise ConfigError(f"config() of {file} returned {type(value).__name__}, not a Config")
    return override(value, [s for s in settings if s not in own])


def load_study(file: str | Path, preset: str, settings: Sequence[str]) -> tuple[Any, Any]:
    """A study's file under one of its presets, some numbers overridden: (Study, settings).

    Raises:
        ConfigError: if the file holds no study, or has no such preset or number.
    """
    module = _module(file)
    presets = getattr(module, "PRESETS", None)
    if not isinstance(presets, Mapping):
        raise ConfigError(f"{file} is no study: it has no PRESETS; rlhf-jax train runs experiments")
    if preset not in presets:
        raise ConfigError(f"--preset {preset}: {file} has {', '.join(presets)}")
    chosen = override(presets[preset], settings)
    study = _called(file, module, chosen)
    if type(study).__name__ != "Study":
        raise ConfigError(f"config() of {file} returned {type(study).__name__}, not a Study")
    return study, chosen


def _module(file: str | Path) -> ModuleType:
    path = Path(file).resolve()
    if not path.is_file():
        raise ConfigError(f"there is no experiment file {file}")
    if path.suffix != ".py":
        raise ConfigError(f"{file} is not a .py file; an experiment is a Python file with config()")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    # The module itself can be found by name, which lets worker processes unpickle the functions
    # that it defines.
    _look_first_in(path.parent, path.parent.parent)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _at_the_users_line(file, path, error) from error
    if not callable(getattr(module, "config", None)):
        raise ConfigError(f"{file} defines no function config() that returns a Config")
    return module


_FOLDERS: set[Path] = set()  # where experiments that were loaded import from


def _look_first_in(*folders: Path) -> None:
    """Imports find files of these folders, also where another experiment's have the same names."""
    for name, known in list(sys.modules.items()):
        where = Path(getattr(known, "__file__", None) or "/").parent
        if where in _FOLDERS:
            mine = [folder for folder in folders if (folder / f"{name}.py").exists()]
            if mine and mine[0] != where:
                del sys.modules[name]
    sys.path[:] = [*map(str, folders), *(x for x in sys.path if Path(x) not in folders)]
    _FOLDERS.update(folders)


def _called(file: str | Path, module: ModuleType, *arguments: Any, **named: Any) -> Any:
    try:
        return module.config(*arguments, **named)
    except Exception as error:
        raise _at_the_users_line(file, Path(file).resolve(), error) from error


def _at_the_users_line(file: str | Path, path: Path, error: Exception) -> ConfigError:
    """What went wrong in the user's file, and the last line of it that was running."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or ["?"])[-1]
    return ConfigError(f"{file}, line {line}: {type(error).__name__}: {error}")


def override(value: Any, settings: Sequence[str]) -> Any:
    """A copy with `a.b.c=1` settings applied, through dataclasses, mappings and partials.

    Raises:
        ConfigError: for a name that is not there (the valid ones are listed), or a wrong type.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise ConfigError(f"--set {setting}: write it as name.name=value")
        value = _replaced(value, path.split("."), text, setting)
    return value


def _replaced(node: Any, names: list[str], text: str, setting: str) -> Any:
    name, rest = names[0], names[1:]
    children = _children(node)
    _check_name(name, children, setting)
    old = children[name]
    if rest:
        new = _replaced(old, rest, text, setting)
    else:
        new = _parsed(old, text, setting, optional=_may_be_none(node, name))
    try:
        if isinstance(node, partial):
            return partial(node.func, *node.args, **{**node.keywords, name: new})
        if isinstance(node, Mapping):
            return {**node, name: new}
        if isinstance(node, tuple):
            return (*node[: int(name)], new, *node[int(name) + 1 :])
        return dataclasses.replace(node, **{name: new})
    except ConfigError:
        raise
    except ValueError as error:  # a dataclass that refuses its own values
        raise ConfigError(f"--set {setting}: {error}") from error


def _first(setting: str) -> str:
    return setting.partition("=")[0].split(".")[0]


def _check_name(name: str, valid: Collection[str], setting: str) -> None:
    if name not in valid:
        near = difflib.get_close_matches(name, valid, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        listed = ", ".join(valid) if valid else "nothing: it is a plain value"
        raise ConfigError(f"--set {setting}: there is no {name!r} here.{hint} Valid: {listed}")


def _children(node: Any) -> dict[str, Any]:
    """What can be named below a value."""
    if isinstance(node, partial):
        keywords = {
            name: parameter.default
            for name, parameter in inspect.signature(node.func).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
            and parameter.default is not inspect.Parameter.empty
        }
        return {**keywords, **node.keywords}
    if isinstance(node, Mapping):
        return dict(node)
    if isinstance(node, tuple):
        return {str(i): x for i, x in enumerate(node)}
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {f.name: getattr(node, f.name) for f in dataclasses.fields(node) if f.init}
    return {}


def _may_be_none(node: Any, name: str) -> bool:
    """Whether the annotation of a field or an argument has None in it, or there is none."""
    if isinstance(node, partial):
        parameter = inspect.signature(node.func).parameters.get(name)
        annotation = inspect.Parameter.empty if parameter is None else parameter.annotation
        return annotation is inspect.Parameter.empty or "None" in str(annotation)
    if dataclasses.is_dataclass(node):
        return "None" in str(next(f.type for f in dataclasses.fields(node) if f.name == name))
    return True


def _parsed(old: Any, text: str, setting: str, *, optional: bool) -> Any:
    """The text as a value of the old one's kind."""
    if callable(old) or dataclasses.is_dataclass(old) or isinstance(old, Mapping):
        inner = ", ".join(_children(old)) or "nothing below it"
        raise ConfigError(
            f"--set {setting}: this is code, not a number; change it in the experiment's file, or "
            f"name what is inside it ({inner})"
        )
    try:
        new = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        new = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if isinstance(old, float) and isinstance(new, int) and not isinstance(new, bool):
        new = float(new)
    if isinstance(old, tuple) and isinstance(new, list):
        new = tuple(new)
    if isinstance(old, str) and not isinstance(new, str) and not (new is None and optional):
        new = text
    if not (optional if new is None else old is None or type(new) is type(old)):
        raise ConfigError(
            f"--set {setting}: {text!r} is {type(new).__name__}, valid is {type(old).__name__} "
            f"(now {old!r})"
        )
    return new


def describe(value: Any) -> Any:
    """An experiment as JSON: dataclasses by field, functions by name, partials with arguments."""
    if isinstance(value, partial):
        given = {"arguments": describe(value.args)} if value.args else {}
        return {"function": _name(value.func), **given, **describe(value.keywords)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            "type": type(value).__name__,
            **{f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)},
        }
    if isinstance(value, Mapping):
        return {str(k): describe(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [describe(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    return _name(value) if callable(value) else repr(value)


def _name(fn: Any) -> str:
    return f"{getattr(fn, '__module__', '?')}.{getattr(fn, '__qualname__', repr(fn))}"


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines `a.b: 1 -> 2` for what differs between two descriptions."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in [*old, *(k for k in new if k not in old)]:
            where = f"{path}.{key}" if path else str(key)
            lines += difference(old.get(key, "(absent)"), new.get(key, "(absent)"), where)
        return lines
    return [] if old == new else [f"{path}: {old} -> {new}"]

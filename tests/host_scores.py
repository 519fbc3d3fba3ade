"""Score functions for worker processes, in a module that is quick to import."""

import os
import time
from fractions import Fraction


def length(text):
    return len(text)


def seventy(text):
    return 0.7


def is_long(text):
    return len(text) > 3


def fraction(text):
    return Fraction(len(text), 2)


def hangs_on_b(text):
    if "b" in text:
        time.sleep(600)
    return 1.0


def slow(text):
    time.sleep(0.5)
    return 1.0


def nan_sooner_if_longer(text):
    time.sleep(0.5 / len(text))
    return float("nan") if len(text) > 1 else 1.0


def fails_on_b(text):
    return {"a": 1.0}[text[-1]]


def nan_on_b(text):
    return float("nan") if "b" in text else 1.0


def infinite_on_b(text):
    return float("inf") if "b" in text else 1.0


def two_on_b(text):
    return [1.0, 2.0] if "b" in text else 1.0


def none_on_b(text):
    return None if "b" in text else 1.0


def words(text):
    return "0.7"


def dies_on_b(text):
    if "b" in text:
        os._exit(3)
    return 1.0


def where(text):
    return os.getpid()


def platform(text):
    return float(os.environ["JAX_PLATFORMS"] == "cpu" and "jax" not in __import__("sys").modules)


def second_letter(text):
    return ord(text[1])


def names_its_prompt(text, prompt_id):
    return 100 * prompt_id + len(text)


def odd_one_out(text):
    if os.environ.get("RLHF_JAX_PROCESS") == "1":
        raise ValueError("nobody likes process 1")
    return float(len(text))

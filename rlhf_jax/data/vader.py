"""VADER, a lexicon and five rules: a cheap and weak proxy of what people feel about a text.

On the movie sentences its score correlates with the mean human rating at about r = 0.43; a
regressor fitted on ratings reaches 0.7. Use it as a proxy, never as "human sentiment".
Source: C.J. Hutto and E.E. Gilbert, ICWSM 2014; version 3.3.2, MIT licence.
"""

import functools
import re
import sys
import tempfile
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rlhf_jax.data import corpus

FILES = ("vaderSentiment.py", "vader_lexicon.txt", "emoji_utf8_lexicon.txt")


def vader_compound(text: str) -> float:
    """VADER's compound score of a text, −1 (negative) to 1 (positive); 0 for an empty one.

    The authors' own code, from the hash-checked source distribution, so scores are theirs to four
    decimals. Picklable: `rewards.from_text(score=vader_compound, ...)` runs it in worker processes.
    """
    return float(_analyzer().polarity_scores(text)["compound"]) if text.strip() else 0.0


@functools.cache
def _analyzer():
    """The authors' analyser, run from the archive: nothing is installed or left on disk."""
    source = corpus.read(f"vaderSentiment/{FILES[0]}").decode("utf-8")
    with tempfile.TemporaryDirectory() as folder:  # it reads its lexicons from beside its code
        for name in FILES:
            (Path(folder) / name).write_bytes(corpus.read(f"vaderSentiment/{name}"))
        path = str(Path(folder) / FILES[0])
        module = types.ModuleType("rlhf_jax_vader")
        module.__file__ = path
        sys.modules[module.__name__] = module  # inspect.getsourcefile looks it up
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old code: codecs.open, escapes in plain strings
            exec(compile(source, path, "exec"), module.__dict__)
            return module.SentimentIntensityAnalyzer()


@functools.cache
def lexicon() -> Mapping[str, float]:
    """7,500 words and emoticons → mean valence, −4 to 4, by ten raters each."""
    lines = corpus.read("vaderSentiment/vader_lexicon.txt").decode("utf-8").splitlines()
    cells = (line.strip().split("\t") for line in lines if line.strip())
    return types.MappingProxyType({cell[0]: float(cell[1]) for cell in cells})


def token_marks(
    text: str, offsets: Sequence[tuple[int, int]], *, words: Mapping[str, float] | None = None
) -> np.ndarray:
    """Valence of the lexicon word each token lies in, `[tokens]` float32; 0 outside such words.

    `offsets` are (start, end) character positions. A word split into several tokens marks each of
    them. Words are looked up alone: negation ("not good") is not seen.
    """
    words = lexicon() if words is None else words
    marks = np.zeros(len(offsets), np.float32)
    spans = list(_spans(text, words))
    for i, (start, end) in enumerate(offsets):
        for first, last, valence in spans:
            if start < last and first < end:
                marks[i] = valence
                break
    return marks


def _spans(text: str, words: Mapping[str, float]):
    """(start, end, valence) of words in the lexicon: a piece as it stands, or its words."""
    for piece in re.finditer(r"\S+", text):
        if (whole := piece.group().lower()) in words:  # an emoticon, or a plain word
            yield piece.start(), piece.end(), words[whole]
            continue
        for word in re.finditer(r"[^\W_]+(?:'[^\W_]+)*", piece.group()):
            stem = word.group().lower().removesuffix("'s")
            if stem in words:
                start = piece.start() + word.start()
                yield start, start + len(stem), words[stem]

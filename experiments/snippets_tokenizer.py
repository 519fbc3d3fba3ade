"""The quickstart's tokenizer: 5,000 whole words of the movie and product sentences.

    python experiments/snippets_tokenizer.py

writes experiments/quickstart_base/tokenizer.json, byte for byte the one in the repository. Words
come from the `base` split alone, so that every word the language model can say, it has seen. Text
is lower-cased (the product part is so already), and the decoder puts the spaces back where English
has them: the film's "heart", well-made. Expect <unk> for 10.7 % of held-out tokens (12.3 %
with capitals kept).
"""

import argparse
import collections
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from rlhf_jax.data import snippets

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<good>", "<bad>")
# What a token is: 's, a number, a word (don't is one), dots in a row, or any other character.
TOKEN = r"'s(?!\w)|\d+(?:[.,]\d+)*|\w+(?:'(?!s(?!\w))\w+)*|\.\.+|[^\w\s]"
PATH = Path(__file__).parent / "quickstart_base" / "tokenizer.json"


def build(texts: list[str], *, size: int = 5000, lowercase: bool = True) -> Tokenizer:
    """A tokenizer of the `size` most frequent words, special tokens included; ties by alphabet."""
    parts = [
        # The four marks a quotation mark can be, so that the decoder knows the side of the space.
        normalizers.Replace(Regex(r'(?<![\w.,!?;:)\]])"(?=\S)'), "“"),
        normalizers.Replace('"', "”"),
        normalizers.Replace(Regex(r"(?<![\w.,!?;:)\]])'(?=\w)(?!s\b)"), "‘"),
        normalizers.Replace(Regex(r"'(?!\w)"), "’"),
        normalizers.Replace(Regex(r"\s-+\s|--+"), " – "),  # a dash; a hyphen glues words
    ]
    if lowercase:
        parts.append(normalizers.Lowercase())
    tokenizer = Tokenizer(models.WordLevel(vocab={}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(parts)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), behavior="removed", invert=True)
    count = collections.Counter()
    for text in texts:
        pieces = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
        count.update(piece for piece, _ in pieces)
    words = sorted(count, key=lambda word: (-count[word], word))[: size - len(SPECIALS)]
    vocab = {word: i for i, word in enumerate([*SPECIALS, *words])}
    tokenizer.model = models.WordLevel(vocab=vocab, unk_token="<unk>")
    tokenizer.decoder = decoders.Sequence([
        decoders.WordPiece(prefix="\x00", cleanup=False),  # a space before all but the first
        decoders.Fuse(),
        decoders.Replace(Regex(r" (?=[.,!?;:%)\]”’/-]|'s\b)"), ""),
        decoders.Replace(Regex(r"(?<=[(\[“‘$#@/-]) "), ""),
    ])  # fmt: skip
    # <unk> is no special token: text that was not understood should show it.
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in SPECIALS if name != "<unk>"]
    )
    return tokenizer


def unknown(tokenizer: Tokenizer, texts: list[str]) -> float:
    """Share of tokens that are <unk>."""
    ids = [i for text in texts for i in tokenizer.encode(text, add_special_tokens=False).ids]
    return ids.count(tokenizer.token_to_id("<unk>")) / len(ids)


def sentences(split: str) -> list[str]:
    """Movie and product sentences of a split."""
    return [row["text"] for row in snippets.rows(split=split, parts=("movie", "product"))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=PATH)
    parser.add_argument("--size", type=int, default=5000)
    arguments = parser.parse_args()
    made = build(sentences("base"), size=arguments.size)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    made.save(str(arguments.out))
    for split in snippets.SPLITS:
        print(f"{split:8} {unknown(made, sentences(split)):6.2%} of tokens are unknown")
    print(f"{made.get_vocab_size()} words -> {arguments.out}")

import json
import pickle
import runpy
from pathlib import Path

import data_toys
import numpy as np
import pytest
import tokenizers as library

from rlhf_jax.data import DataError, tokenizers
from rlhf_jax.types import Labeled

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "experiments" / "quickstart_base" / "tokenizer.json"


def word_file(path, *specials):
    """A tokenizer.json with the words a and b and these special tokens."""
    words = [*specials, "<unk>", "a", "b"]
    base = library.Tokenizer(
        library.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    )
    base.pre_tokenizer = library.pre_tokenizers.Whitespace()
    base.add_special_tokens(list(specials))
    base.enable_padding(length=9)
    base.enable_truncation(max_length=2)
    if "<s>" in specials:
        base.post_processor = library.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", base.token_to_id("<s>"))]
        )
    base.save(str(path))
    return path


@pytest.mark.parametrize("text", ["", "plain", "Hé  <eos> \n\tfilm's 💘!", "<pad><bos>"])
def test_bytes_give_any_text_back_and_no_special_token(text):
    t = tokenizers.load("bytes")
    ids = t.encode(text)
    assert len(ids) == len(text.encode()) and not set(ids) & t.specials
    assert t.decode(ids) == text
    assert t.vocab_size == t.largest + 1 == 261 and max(ids, default=0) < 261


def test_padding_beginning_and_end_are_three_tokens_and_not_part_of_the_text():
    t = tokenizers.load("bytes")
    assert len({t.pad, t.bos, t.eos}) == 3
    ids = [t.bos, *t.encode("a"), t.eos, t.pad, t.pad]
    assert t.decode(ids) == "a"
    assert t.decode(ids, specials=True) == "<bos> a <eos> <pad> <pad>"
    assert t.decode_batch(np.array([ids, ids])) == ["a", "a"]


def test_a_file_loads_by_its_usual_names_and_adds_pads_and_cuts_nothing(tmp_path):
    word_file(tmp_path / "tokenizer.json", "<pad>", "<s>", "</s>")
    for where in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        t = tokenizers.load(where)
        assert (t.pad, t.bos, t.eos, t.vocab_size) == (0, 1, 2, 6)
        assert t.encode("a b a b") == [4, 5, 4, 5]
    ids, offsets = t.encode_with_offsets("a  b")
    assert (ids, offsets) == ([4, 5], [(0, 1), (3, 4)])


def test_padding_is_never_the_end_token_unless_one_says_so(tmp_path):
    path = word_file(tmp_path / "tokenizer.json", "<s>", "</s>")
    with pytest.raises(DataError, match=r'no usual pad token.*pad="\.\.\.".*add=\("<pad>",\)'):
        tokenizers.load(path)
    said = tokenizers.load(path, pad="</s>")
    assert said.pad == said.eos
    added = tokenizers.load(path, add=("<pad>", "<good>"))
    assert added.pad == 5 and added.id("<good>") == 6 and added.vocab_size == 7
    assert added.decode([5, 6, 3]) == "a"  # special: not in the text


def test_a_missing_beginning_is_asked_for(tmp_path):
    path = word_file(tmp_path / "tokenizer.json", "<pad>", "<|endoftext|>")
    with pytest.raises(DataError, match=r"no usual bos token.*<pad>, <\|endoftext\|>"):
        tokenizers.load(path)
    t = tokenizers.load(path, bos="<|endoftext|>", eos="<|endoftext|>")
    assert t.bos == t.eos == 1
    with pytest.raises(DataError, match="no token '<start>'"):
        tokenizers.load(path, bos="<start>", eos="<|endoftext|>")


def test_two_candidates_are_not_guessed_between(tmp_path):
    path = word_file(tmp_path / "tokenizer.json", "<pad>", "[PAD]", "<s>", "</s>")
    with pytest.raises(DataError, match=r"several tokens that could be pad: .*'<pad>', '\[PAD\]'"):
        tokenizers.load(path)
    assert tokenizers.load(path, pad="[PAD]").pad == 1


def test_a_file_that_is_missing_or_no_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match=r'no tokenizer file .*or "bytes"'):
        tokenizers.load(tmp_path / "none.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer\.json that can be"):
        tokenizers.load(tmp_path)


def test_a_tokenizer_travels_to_worker_processes():
    t = pickle.loads(pickle.dumps(tokenizers.load(SHIPPED)))
    assert t.decode([t.bos, *t.encode("a good film.")]) == "a good film."


def test_rows_of_a_batch_read_as_text():
    t = tokenizers.load("bytes")
    ids = [t.bos, *t.encode("abcd"), t.eos, t.pad, t.pad]
    mask = np.array([[0, 0, 0, 1, 0, 1, 0, 0]], bool)  # d is not looked at: no prompt either
    batch = Labeled(
        tokens=np.array([ids]), mask=mask, segments=np.array([[1] * 6 + [0] * 2]),
        score=np.zeros(1), token_score=np.zeros((1, 8)),
    )  # fmt: skip
    assert tokenizers.texts(t, batch) == ["abcd"]
    assert tokenizers.texts(t, batch, part="prompt") == ["ab"]
    assert tokenizers.texts(t, batch, part="response") == ["c"]
    with pytest.raises(DataError, match="part 'end'"):
        tokenizers.texts(t, batch, part="end")


SENTENCE = "It's a well-made film (mostly) by \"Two Friends\", isn't it? Yes... 4.5 of 5!"
READABLE = "it's a well-made film (mostly) by “two friends”, isn't it? yes... 4.5 of 5!"


def test_the_word_tokenizer_puts_spaces_where_english_has_them():
    build = runpy.run_path(str(ROOT / "experiments" / "snippets_tokenizer.py"))["build"]
    base = build([SENTENCE], size=100)
    t = tokenizers.Tokenizer(base, pad="<pad>", bos="<bos>", eos="<eos>")
    assert t.decode(t.encode(SENTENCE)) == READABLE
    assert t.decode([t.bos, t.id("<good>"), *t.encode("a film by zebras"), t.eos]) == (
        "a film by <unk>"
    )
    _, offsets = t.encode_with_offsets('a "film"')
    assert offsets == [(0, 1), (2, 3), (3, 7), (7, 8)]


def test_the_word_tokenizer_keeps_the_most_frequent_words_and_ties_by_alphabet():
    build = runpy.run_path(str(ROOT / "experiments" / "snippets_tokenizer.py"))["build"]
    base = build(["d b a a", "c b c"], size=9)
    assert [base.id_to_token(i) for i in range(base.get_vocab_size())] == [
        "<pad>", "<bos>", "<eos>", "<unk>", "<good>", "<bad>", "a", "b", "c",
    ]  # fmt: skip


def test_the_shipped_tokenizer_is_what_its_script_builds(tmp_path):
    data_toys.need_corpus()
    made = runpy.run_path(str(ROOT / "experiments" / "snippets_tokenizer.py"))
    again = made["build"](made["sentences"]("base"), size=5000)
    assert json.loads(again.to_str()) == json.loads(SHIPPED.read_text())
    again.save(str(tmp_path / "tokenizer.json"))
    assert (tmp_path / "tokenizer.json").read_bytes() == SHIPPED.read_bytes()
    assert made["unknown"](again, made["sentences"]("heldout")) == pytest.approx(0.107, abs=5e-4)


def test_the_shipped_tokenizer_has_the_tokens_that_experiments_name():
    t = tokenizers.load(SHIPPED)
    assert t.vocab_size == 5000 and (t.pad, t.bos, t.eos) == (0, 1, 2)
    assert (t.id("<unk>"), t.id("<good>"), t.id("<bad>")) == (3, 4, 5)

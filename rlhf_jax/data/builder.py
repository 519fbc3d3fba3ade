"""The rated snippets as a TFDS data set, and rows of any TFDS directory; TensorFlow is not needed.

Files are ArrayRecord and are read with random access (`as_data_source`); `tfds.load`,
`as_dataset` and the `tfds` command are the parts of TFDS that need TensorFlow.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from rlhf_jax.data import DataError, cache_directory, corpus, snippets

CITATION = """@inproceedings{hutto2014vader,
  title = {{VADER}: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text},
  author = {Hutto, C.J. and Gilbert, Eric},
  booktitle = {Eighth International Conference on Weblogs and Social Media (ICWSM)},
  year = {2014},
}"""


class RatedSnippets(tfds.core.GeneratorBasedBuilder):
    """23,703 sentences of four kinds, each rated from −4 to 4 by 15 to 99 people."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Splits base, reward, gold, heldout; by sentence."}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=" ".join(snippets.__doc__.split()),
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "part": tfds.features.Text(),
                    "text": tfds.features.Text(),
                    "score": np.float32,
                    "ratings": tfds.features.Tensor(shape=(None,), dtype=np.int32),
                }
            ),
            homepage="https://github.com/cjhutto/vaderSentiment",
            license="MIT",
            citation=CITATION,
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # the corpus comes through pip, checked by its hash
        return {name: self._generate_examples(name) for name in snippets.SPLITS}

    def _generate_examples(self, split):
        for row in snippets.rows(split=split):
            yield row["id"], {**row, "ratings": row["ratings"].astype(np.int32)}


def prepare(directory: Path | None = None) -> Path:
    """Directory of the prepared RatedSnippets, made once (seconds) in the user's cache.

    Safe with several processes at once: each prepares its own copy and the first rename wins.
    """
    base = cache_directory() / "tfds" if directory is None else Path(directory)
    target = base / "rated_snippets" / str(RatedSnippets.VERSION)
    if target.exists():
        return target
    corpus.sdist()  # its own errors, rather than TFDS's around them
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="prepare-", dir=base) as scratch:
        made = RatedSnippets(data_dir=scratch, file_format="array_record")
        tfds.disable_progress_bar()
        made.download_and_prepare()
        try:
            os.rename(made.data_path, target)
        except OSError:
            if not target.exists():  # then it was not another process that was faster
                raise
    return target


def tfds_rows(
    *,
    directory: str | Path,
    split: str,
    fields: Mapping[str, str] | None = None,
) -> Sequence[Mapping]:
    """Rows of a split of a prepared TFDS directory (ArrayRecord), for `source=partial(...)`.

    `fields` maps the streams' names to the set's: {"text": "review", "score": "stars"}; a name not
    in it keeps its own.

    Raises:
        DataError: if there is no data set, no such split or field, or no example in it.
    """
    try:
        found = tfds.builder_from_directory(directory)
    except Exception as error:  # TFDS raises its own and file errors, by kind of storage
        raise DataError(
            f"{directory} is not a prepared TFDS data set (a folder with dataset_info.json, as "
            f"tfds.builder_from_directory takes it): {str(error).splitlines()[0]}"
        ) from error
    name = split.split("[")[0]  # "train[:80%]" is a split too
    if name not in found.info.splits:
        valid = ", ".join(found.info.splits) or "none"
        raise DataError(f"{directory} has no split {name!r}; valid: {valid}")
    valid = sorted(found.info.features)
    if unknown := sorted(set((fields or {}).values()) - set(valid)):
        raise DataError(f"{directory} has no field {unknown}; valid: {', '.join(valid)}")
    if found.info.splits[split].num_examples == 0:
        raise DataError(f"the data set is empty: split {split!r} of {directory} has no examples")
    try:
        source = found.as_data_source(split=split)
    except NotImplementedError as error:
        raise DataError(
            f"{directory} is not stored as ArrayRecord, so it has no random access; prepare it "
            'again with file_format="array_record"'
        ) from error
    return _Rows(source, dict(fields or {}))


class _Rows(Sequence):
    """Random access to a data source, with text decoded and fields renamed."""

    def __init__(self, source, fields: Mapping[str, str]):
        self.source, self.fields = source, fields

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, at: int) -> dict:
        record = self.source[at]
        record |= {ours: record[theirs] for ours, theirs in self.fields.items()}
        return {k: v.decode("utf-8") if isinstance(v, bytes) else v for k, v in record.items()}

"""Make a task of twelve classes from the benchmark data: where does this sentence come from?

    python benchmarks/make_sources.py DATA_ROOT FOLDER

writes FOLDER/train.parquet and FOLDER/test.parquet with the columns `sentence` and `source`. Five sources are genres of
MultiNLI, the others are one data set each. Every source has 150 different sentences, drawn with a fixed seed; a third
of them is for the test.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

ROWS = 150  # sentences of a source
TEST = 3  # every third of them
SOURCES = {
    "captions": ("snli/train", "premise"),
    "encyclopedia": ("qnli/train", "sentence"),
    "news": ("mrpc/train", "sentence1"),
    "science": ("scitail/test", "hypothesis"),
    "questions": ("qqp/train", "question1"),
    "films": ("sst2/test", "sentence"),
    "products": ("amazon/test", "sentence"),
}
GENRES = ("fiction", "government", "slate", "telephone", "travel")


def sources(data_root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Training rows and test rows."""
    mnli = pd.read_parquet(data_root / "mnli" / "validation_matched.parquet")
    texts = {genre: mnli.loc[mnli["genre"] == genre, "premise"] for genre in GENRES}
    for source, (file, column) in SOURCES.items():
        texts[source] = pd.read_parquet(data_root / f"{file}.parquet")[column]
    drawn = [
        pd.DataFrame({"sentence": text.drop_duplicates().sample(ROWS, random_state=0), "source": source})
        for source, text in texts.items()
    ]
    rows = pd.concat(drawn).drop_duplicates("sentence")
    number = rows.groupby("source").cumcount()
    train, test = rows[number % TEST > 0], rows[number % TEST == 0]
    return train.reset_index(drop=True), test.reset_index(drop=True)


if __name__ == "__main__":
    root, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in zip(("train", "test"), sources(root), strict=True):
        frame.to_parquet(folder / f"{name}.parquet", index=False)
        print(f"{name}: {len(frame)} rows of {frame['source'].nunique()} sources")

"""Predictions for files: columns, rows without text, chunks, and outputs that would replace what is read."""

import csv
import json
import os
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fit_helpers import save_tiny_bert, toy
from steadytune import fit
from steadytune.data.cells import list_of
from steadytune.data.chunks import read_chunks
from steadytune.data.files import read_rows
from steadytune.errors import UsageError
from steadytune.fitting.predict_file import check_output, predict_file


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    bert = save_tiny_bert(folder / "bert")
    result = fit(toy(30), model=bert, output=folder / "out", steps=2, batch_size=4, max_length=8,
                 validation_share=0, progress=False, save_steps=0)  # fmt: skip
    return result.model


@pytest.fixture
def rows():
    return toy(10)[["text"]].assign(id=[f"0{i}" for i in range(10)])


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("chunk", [3, 100])
def test_all_columns_and_rows_are_written_in_order(model, rows, tmp_path, ending, chunk):
    rows.to_csv(tmp_path / "new.csv", index=False)
    out = tmp_path / f"out{ending}"
    done = predict_file(model, tmp_path / "new.csv", out, chunk=chunk)
    readers = {
        ".csv": lambda: pd.read_csv(out, dtype={"id": str}), ".parquet": lambda: pd.read_parquet(out),
        ".tsv": lambda: pd.read_csv(out, sep="\t", dtype={"id": str}),
        ".jsonl": lambda: pd.read_json(out, lines=True, dtype={"id": str}),
    }  # fmt: skip
    found = readers[ending]()
    assert done.rows == 10
    assert found["id"].tolist() == rows["id"].tolist()
    assert list(found.columns[:2]) == ["text", "id"]
    assert found["prediction"].tolist() == model.predict(rows["text"].tolist()).tolist()
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []


@pytest.mark.parametrize("source", ["new.csv", "new.tsv", "new.jsonl", "new.parquet", "new.json"])
def test_chunks_of_every_format_make_the_whole(model, rows, tmp_path, source):
    path = tmp_path / source
    write = {
        "csv": lambda: rows.to_csv(path, index=False), "tsv": lambda: rows.to_csv(path, index=False, sep="\t"),
        "jsonl": lambda: rows.to_json(path, orient="records", lines=True),
        "json": lambda: rows.to_json(path, orient="records"), "parquet": lambda: rows.to_parquet(path),
    }  # fmt: skip
    write[source.partition(".")[2]]()
    chunks = list(read_chunks(path, 4))
    assert [len(chunk) for chunk in chunks] == [4, 4, 2]
    pd.testing.assert_frame_equal(pd.concat(chunks), read_rows(path)[0], check_index_type=False)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet"])
def test_fields_that_json_lines_lack_or_order_otherwise_stay_in_their_columns(model, rows, tmp_path, ending):
    """Naive: each chunk has the columns of its own rows, and cells of later ones are written under other names."""
    texts = rows["text"].tolist()
    lines = [{"text": text, "id": f"a{i}"} for i, text in enumerate(texts[:4])]
    lines += [{"id": "b4", "note": "late", "text": texts[4]}, {"text": texts[5]}]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / f"out{ending}"
    predict_file(model, tmp_path / "new.jsonl", out, chunk=2)
    found = read_rows(out)[0]
    assert list(found.columns[:3]) == ["text", "id", "note"]
    assert found["text"].tolist() == texts[:6]
    assert found["id"].fillna("").tolist() == ["a0", "a1", "a2", "a3", "b4", ""]
    assert found["note"].fillna("").tolist() == ["", "", "", "", "late", ""]
    assert found["prediction"].tolist() == model.predict(texts[:6]).tolist()


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_dates_and_small_numbers_of_the_table_stay_what_they_are(model, rows, tmp_path, ending):
    """Naive: pandas writes dates into JSON as milliseconds since 1970, and 1e-12 as 0."""
    table = rows.assign(when=pd.to_datetime("2024-02-29 12:30"), share=1e-12)
    table.to_parquet(tmp_path / "new.parquet")
    out = tmp_path / f"out{ending}"
    predict_file(model, tmp_path / "new.parquet", out, chunk=4)
    found = read_rows(out)[0]
    assert (pd.to_datetime(found["when"]) == table["when"]).all()
    assert (found["share"].astype(float) == 1e-12).all()


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_lists_of_a_parquet_file_stay_lists_in_text(model, rows, tmp_path, ending):
    """Naive: NumPy's words for an array, which have no commas, eight digits, and dots in place of many members."""
    table = rows.assign(tags=[["new", "old"]] * 10, numbers=[[i / 7] * 1500 for i in range(10)])
    table.to_parquet(tmp_path / "new.parquet")
    predict_file(model, tmp_path / "new.parquet", tmp_path / f"out{ending}")
    found = read_rows(tmp_path / f"out{ending}")[0]
    assert found["tags"].tolist() == ["['new', 'old']"] * 10
    assert [list_of(cell) for cell in found["numbers"]] == table["numbers"].tolist()


@pytest.mark.parametrize("chunk", [1, 100])
@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_row_without_text_has_no_prediction_and_is_counted(model, rows, tmp_path, chunk, ending):
    rows.loc[[0, 4], "text"] = ["", "   "]
    rows.to_csv(tmp_path / "new.csv", index=False)
    out = tmp_path / f"out{ending}"
    done = predict_file(model, tmp_path / "new.csv", out, chunk=chunk)
    found = pd.read_csv(out) if ending == ".csv" else pd.read_parquet(out)
    assert done.empty == [0, 4]
    assert found.index[found["prediction"].isna()].tolist() == [0, 4]
    assert found.filter(like="probability_").isna().any(axis=1).sum() == 2
    with pytest.raises(UsageError, match="is empty in 2 of 10"):
        predict_file(model, tmp_path / "new.csv", tmp_path / "again.csv", on_empty="error")
    assert not (tmp_path / "again.csv").exists()


def test_rows_that_are_cut_are_told_once_with_their_numbers_in_the_file(model, rows, tmp_path, caplog):
    rows.loc[7, "text"] = " ".join(rows["text"])
    rows.to_csv(tmp_path / "new.csv", index=False)
    with caplog.at_level("WARNING", "steadytune"):
        done = predict_file(model, tmp_path / "new.csv", tmp_path / "out.csv", chunk=3)
    assert done.cut == [7]
    assert ["1 of 10 rows" in m for m in caplog.messages if "are cut" in m] == [True]


def test_kept_columns_are_those_named(model, rows, tmp_path, caplog):
    rows.assign(note="x").to_csv(tmp_path / "new.csv", index=False)
    with caplog.at_level("INFO", "steadytune"):
        predict_file(model, tmp_path / "new.csv", tmp_path / "out.csv", keep=["id"])
    assert list(pd.read_csv(tmp_path / "out.csv").columns[:2]) == ["id", "prediction"]
    assert any("'note'" in message for message in caplog.messages)
    with pytest.raises(UsageError, match=r"no column 'idd' to keep\. Did you mean 'id'"):
        predict_file(model, tmp_path / "new.csv", tmp_path / "out2.csv", keep=["idd"])


def test_as_many_text_columns_as_in_training_are_read(model, rows, tmp_path):
    """Naive: a model of single texts labels pairs, as its tokenizer takes them."""
    rows.assign(more=rows["text"]).to_csv(tmp_path / "new.csv", index=False)
    with pytest.raises(UsageError, match=r"reads 1 text column a row \('text'\), got 2 \(text, more\): give --text"):
        predict_file(model, tmp_path / "new.csv", tmp_path / "out.csv", text=["text", "more"])


def test_a_column_called_like_the_predictions_is_refused(model, rows, tmp_path):
    rows.assign(prediction="x").to_csv(tmp_path / "new.csv", index=False)
    with pytest.raises(UsageError, match="column 'prediction' of its own"):
        predict_file(model, tmp_path / "new.csv", tmp_path / "out.csv")
    predict_file(model, tmp_path / "new.csv", tmp_path / "out.csv", keep=["id"])


@pytest.mark.parametrize("how", ["same", "dots", "symbolic", "hard"])
def test_an_output_that_is_also_the_input_is_refused(model, rows, tmp_path, how):
    new = tmp_path / "new.csv"
    rows.to_csv(new, index=False)
    (tmp_path / "sub").mkdir()
    out = {"same": new, "dots": tmp_path / "sub" / ".." / "new.csv"}.get(how, tmp_path / "link.csv")
    if how == "symbolic":
        out.symlink_to(new)
    if how == "hard":
        os.link(new, out)
    before = new.read_bytes()
    with pytest.raises(UsageError, match="is also read"):
        predict_file(model, new, out, overwrite=True)
    assert new.read_bytes() == before


def test_a_file_of_the_model_is_no_output(tmp_path):
    (tmp_path / "predictions.parquet").write_text("rows of the fit")
    with pytest.raises(UsageError, match="is also read"):
        check_output(tmp_path / "predictions.parquet", [tmp_path], overwrite=True)


@pytest.mark.parametrize("name", ["out.xlsx", "no/folder/out.csv", "folder.csv"])
def test_impossible_outputs_are_refused(tmp_path, name):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UsageError, match="output"):
        check_output(tmp_path / name, [], overwrite=True)


def test_a_folder_without_permission_is_refused_before_the_work(tmp_path, monkeypatch):
    """Naive: predict, probe and inspect find out when they have read and judged every row."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    with pytest.raises(UsageError, match=r"out\.csv: the directory .* cannot be written"):
        check_output(tmp_path / "out.csv", [], overwrite=True)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_columns_of_one_name_are_refused_where_the_file_cannot_hold_them(model, tmp_path, ending):
    (tmp_path / "new.csv").write_text("text,note,note\ngood film,a,b\n")
    with pytest.raises(UsageError, match="several columns are called 'note'"):
        predict_file(model, tmp_path / "new.csv", tmp_path / f"out{ending}")
    assert predict_file(model, tmp_path / "new.csv", tmp_path / f"out{ending}", keep=["text", "text"]).rows == 1
    assert list(read_rows(tmp_path / f"out{ending}")[0].columns[:2]) == ["text", "prediction"]
    assert predict_file(model, tmp_path / "new.csv", tmp_path / "out.csv").rows == 1


def test_a_failure_in_a_later_chunk_leaves_no_file(model, rows, tmp_path):
    rows.to_json(tmp_path / "new.jsonl", orient="records", lines=True)
    with (tmp_path / "new.jsonl").open("a") as file:
        file.write("{oops\n")
    with pytest.raises(UsageError, match="line 11: not JSON"):
        predict_file(model, tmp_path / "new.jsonl", tmp_path / "out.csv", chunk=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.jsonl"]


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_several_labels_are_written_as_lists_that_are_read_again(tmp_path, ending):
    bert = save_tiny_bert(tmp_path / "bert")
    frame = toy(16)[["text"]].assign(label=[["food"], ["food", "price"], [], ["price"]] * 4)
    model = fit(frame, model=bert, output=tmp_path / "out", steps=2, batch_size=4, max_length=8, validation_share=0,
                progress=False, save_steps=0).model  # fmt: skip
    frame[["text"]].to_csv(tmp_path / "new.csv", index=False)
    predict_file(model, tmp_path / "new.csv", tmp_path / f"p{ending}", chunk=5)
    back = read_rows(tmp_path / f"p{ending}")[0]["prediction"]
    given = [list_of(cell) for cell in back]
    assert given == [list(row) for row in model.predict(frame["text"].tolist())]


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_a_carriage_return_in_a_cell_begins_no_row(model, tmp_path, ending):
    """Naive: the csv module quotes line feeds only, and eight rows are read as sixteen."""
    texts = [f"bad good\rnext {number}" for number in range(8)]
    pd.DataFrame({"text": texts, "id": range(8)}).to_parquet(tmp_path / "new.parquet")
    out = tmp_path / f"out{ending}"
    predict_file(model, tmp_path / "new.parquet", out, chunk=3)
    found = pd.read_csv(out, sep="\t" if ending == ".tsv" else ",")
    assert found["text"].tolist() == texts
    assert found["id"].tolist() == list(range(8))


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_whole_numbers_beside_a_missing_one_stay_what_they_are(model, rows, tmp_path, ending):
    """Naive: a Parquet column with a null becomes floats, and 2^60 + 1 becomes 2^60."""
    ids = [None if number == 4 else 2**60 + number for number in range(10)]
    pq.write_table(pa.table({"text": rows["text"].tolist(), "id": pa.array(ids)}), tmp_path / "new.parquet")
    out = tmp_path / f"out{ending}"
    predict_file(model, tmp_path / "new.parquet", out, chunk=3)
    if ending == ".parquet":
        assert pq.read_table(out)["id"].to_pylist() == ids
    elif ending == ".csv":
        with out.open() as file:
            assert [row["id"] for row in csv.DictReader(file)] == ["" if id is None else str(id) for id in ids]
    else:
        assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ids


def test_a_fraction_after_whole_numbers_is_not_cut_off(model, rows, tmp_path):
    """Naive: the schema of the first chunk turns 4.5 into 4."""
    lines = [json.dumps({"text": text, "v": 4.5 if i == 7 else i}) for i, text in enumerate(rows["text"])]
    (tmp_path / "new.jsonl").write_text("\n".join(lines))
    with pytest.raises(UsageError, match="several types"):
        predict_file(model, tmp_path / "new.jsonl", tmp_path / "out.parquet", chunk=3)


@pytest.mark.parametrize(("cell", "ending"), [({}, ".parquet"), (2**70, ".parquet"), (b"\xff\xfe", ".jsonl")])
def test_cells_that_a_format_cannot_hold_are_one_error(model, rows, tmp_path, cell, ending):
    file = tmp_path / ("new.parquet" if isinstance(cell, bytes) else "new.jsonl")
    if isinstance(cell, bytes):
        rows.assign(cell=[cell] * 10).to_parquet(file)
    else:
        file.write_text("\n".join(json.dumps({"text": text, "cell": cell}) for text in rows["text"]))
    with pytest.raises(UsageError, match=r"cannot hold, or of several types .* leave the column out with --keep"):
        predict_file(model, file, tmp_path / f"out{ending}")

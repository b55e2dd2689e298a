"""Errors of the disk: each is one sentence that says what to do."""

from __future__ import annotations

import errno

import pytest
from safetensors import SafetensorError

from steadytune.errors import UsageError
from steadytune.files.atomic import write_whole, writing


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(errno.ENOSPC, "written by the system"), "No space left on device"),
        (OSError(errno.EACCES, "written by the system"), "Permission denied"),
        (OSError(errno.ENOTDIR, "written by the system"), "Not a directory"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"), "the disk may be full"),
    ],
    ids=["full", "forbidden", "below a file", "safetensors", "torch"],
)
def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path, error, why):
    with (
        pytest.raises(UsageError, match=rf"output .*model cannot be written: {why}.*--resume"),
        writing(tmp_path / "model"),
    ):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.ECHILD, "no child"), RuntimeError("shapes differ")])
def test_other_errors_are_not_blamed_on_the_disk(tmp_path, error):
    with pytest.raises(type(error), match=str(error.args[-1])), writing(tmp_path / "model"):
        raise error


def test_a_writer_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    file = tmp_path / "metrics.json"
    file.write_text("old")

    def fails(part):
        part.write_text("half")
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write_whole(file, fails)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    assert file.read_text() == "old"

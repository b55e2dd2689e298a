"""Model directories in, one model directory out: what `steadytune merge` does with the functions of `merge`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .data import UsageError, suggest
from .output import MEMBERS, RECORD, writing

WAYS = ("uniform", "interpolate", "add")


def merge_folders(
    models: Sequence[Path], output: Path, *, how: str = "uniform", base: Path | None = None, alpha: float = 0.5
) -> None:
    """Merge Hugging Face model directories into a new one, which appears whole or not at all.

    Config, tokenizer and, where the base has none, the head are those of the first model.

    Args:
        models: directories of fine-tuned models of one architecture.
        output: directory to make; new or empty.
        how: ``"uniform"``: their mean; ``"interpolate"``: ``(1 - alpha) * base + alpha * model``, for one model;
            ``"add"``: ``base + alpha * sum of (model - base)``.
        base: directory of the pre-trained model, for the last two.
        alpha: share of the fine-tuned model, or factor of the task vectors.

    Raises:
        UsageError: what was asked for cannot be done; nothing is written.
    """
    from . import merge

    _check(models, output, how, base)
    loaded = [_load(path) for path in models]
    _check_labels(models, [model for model, _ in loaded])
    states = [model.state_dict() for model, _ in loaded]
    model = loaded[0][0]
    try:
        if base is None:
            _check_heads(models)
            merged = merge.uniform(states)
        else:
            start = _body(base, model)
            if how == "interpolate":
                merged = merge.interpolate(start, states[0], alpha)
            else:
                vectors = [merge.task_vector(start, state) for state in states]
                merged = {**states[0], **merge.add_vectors(start, vectors, alpha)}
    except ValueError as error:
        raise UsageError(f"{error}.") from error
    model.load_state_dict(merged)
    _write(model, models[0], output)


def _check(models: Sequence[Path], output: Path, how: str, base: Path | None) -> None:
    if how not in WAYS:
        raise UsageError(f"unknown way to merge {how!r}.{suggest(how, WAYS)}")
    if how == "uniform" and len(models) < 2:
        raise UsageError(f"a uniform soup needs at least two models, got {len(models)}.")
    if how == "interpolate" and len(models) != 1:
        raise UsageError(f"interpolation is between --base and one model, got {len(models)} models.")
    if how == "uniform" and base is not None:
        raise UsageError("a uniform soup has no base: leave --base out, or choose --how interpolate or add.")
    if how != "uniform" and base is None:
        raise UsageError(f"--how {how} needs the pre-trained model: --base DIR.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"output {output} exists and is not empty: choose another --output DIR.")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"output {output}: no such directory {output.parent}. Make it first.")
    for path in (*models, *([base] if base else [])):
        if not (path / "config.json").is_file():
            raise UsageError(f"{path} is no Hugging Face model directory: it holds no config.json.")
        if (path / MEMBERS).is_dir():
            raise UsageError(f"{path} is an ensemble: merge the models in {path / MEMBERS} instead.")


def _load(path: Path, kind: Any = None) -> tuple[Any, set[str]]:
    """A model, and the names of weights that its directory lacks."""
    import transformers

    from .modelling import quiet

    try:
        if kind is None:
            names = transformers.AutoConfig.from_pretrained(path).architectures or [""]
            kind = getattr(transformers, names[0], None)
            if kind is None:
                raise UsageError(f"{path}: config.json names no architecture of transformers ({names[0]!r}).")
        with quiet():
            model, found = kind.from_pretrained(path, dtype="auto", output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    return model, set(found["missing_keys"])


def _body(base: Path, model: Any) -> dict[str, Any]:
    """The weights of the pre-trained model under the fine-tuned one's names, without what it lacks."""
    start, missing = _load(base, type(model))
    return {name: tensor for name, tensor in start.state_dict().items() if name not in missing}


def _check_labels(paths: Sequence[Path], models: Sequence[Any]) -> None:
    for path, model in zip(paths, models, strict=True):
        if model.config.id2label != models[0].config.id2label:
            raise UsageError(f"{paths[0]} and {path} have other labels, or in another order: they cannot be merged.")


def _check_heads(paths: Sequence[Path]) -> None:
    """Heads that began differently have nothing in common to average; told from the records of fits."""
    seeds = {}
    for path in paths:
        record = path / RECORD
        if record.is_file():
            seeds[path] = json.loads(record.read_text(encoding="utf-8"))["recipe"]["seeds"]["init"]
    if len(set(seeds.values())) > 1:
        said = ", ".join(f"{path} with {seed}" for path, seed in seeds.items())
        raise UsageError(f"the heads were drawn with different seeds ({said}): train again with one --init-seed.")


def _write(model: Any, source: Path, output: Path) -> None:
    """Model and tokenizer, beside the final place first."""
    from transformers import AutoTokenizer

    from .modelling import quiet

    with writing(output):
        part = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.absolute().parent))
        try:
            with quiet():
                model.save_pretrained(part)
                if (source / "tokenizer_config.json").is_file():
                    AutoTokenizer.from_pretrained(source).save_pretrained(part)
            part.chmod(0o755)
            os.replace(part, output)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise

"""What a sentence-transformers folder says beside the model: how it pools, how many tokens it reads, its prompts.

Such a folder lists its parts in ``modules.json``; those of them that have options keep these in a folder of their own.
Fields that the library has renamed are read under both names. No torch here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from ..errors import UsageError

MODULES = "modules.json"
SHOWN = 4  # prompts in a message
_FLAG = "pooling_mode_"  # versions up to 5.3 keep one truth value per mode, later ones the name of the mode
_SHORT = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "weightedmean_tokens": "weightedmean"}


@dataclass(frozen=True)
class SentenceFolder:
    """What a sentence encoder was trained with.

    Attributes:
        pooling: How token states become one vector: ``"mean"``, ``"cls"`` (the first token), another mode by its name
            (``"max"``, ``"lasttoken"``), several joined by ``+`` where their vectors are concatenated, or None where
            the folder does not say.
        max_length: Tokens per text; None where the folder does not say.
        lower_case: Whether texts are put in lower case before the tokenizer reads them.
        prompts: What is put before a text, by the name of its purpose, as in ``{"query": "query: "}``; without those
            that are empty.
        default_prompt: Name of the prompt that is used where none is named.
        parts: Names of the modules in their order, as in ``("Transformer", "Pooling", "Normalize")``.
    """

    pooling: str | None = None
    max_length: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    default_prompt: str | None = None
    parts: tuple[str, ...] = ()


def sentence_folder(model: str | Path) -> SentenceFolder | None:
    """What a sentence-transformers folder says beside the model, or None where the model is no such folder.

    Args:
        model: A directory or the name of a model on the hub. Offline, only files in the cache count.

    Raises:
        UsageError: A file is damaged.
    """
    modules = _read(model, MODULES)
    if modules is None:
        return None
    try:
        paths = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in modules}
    except (TypeError, KeyError) as error:
        raise UsageError(f"model {str(model)!r}: {MODULES} must list modules, each with its type and path.") from error
    if "Transformer" not in paths:  # static embeddings, bags of words
        return None
    text = _options(model, paths["Transformer"], "sentence_bert_config.json")
    pooling = _options(model, paths["Pooling"], "config.json") if "Pooling" in paths else {}
    whole = _options(model, "", "config_sentence_transformers.json")
    prompts = {str(name): str(prompt) for name, prompt in (whole.get("prompts") or {}).items() if prompt}
    return SentenceFolder(
        pooling=_mode(pooling),
        max_length=text.get("max_seq_length"),
        lower_case=bool(text.get("do_lower_case")),
        prompts=MappingProxyType(prompts),
        default_prompt=whole.get("default_prompt_name"),
        parts=tuple(paths),
    )


def prompts_words(prompts: Mapping[str, str]) -> str:
    """Prompts with their names, as in ``query "query: ", passage "passage: "``."""
    words = [f"{name} {json.dumps(prompt, ensure_ascii=False)}" for name, prompt in prompts.items()]
    return ", ".join(words[:SHOWN]) + (", ..." if len(words) > SHOWN else "")


def _mode(config: Mapping[str, Any]) -> str | None:
    """The pooling mode of a config, several joined by +."""
    named = config.get("pooling_mode")
    if named is None:
        flags = [name.removeprefix(_FLAG) for name, on in config.items() if name.startswith(_FLAG) and on is True]
        named = [_SHORT.get(flag, flag) for flag in flags]
    modes = [named] if isinstance(named, str) else list(named)
    return "+".join(modes) or None


def _options(model: str | Path, folder: str, name: str) -> dict[str, Any]:
    """The options in a file of the folder; none where it is missing.

    Raises:
        UsageError: The file holds no options.
    """
    path = str(PurePosixPath(folder, name))
    held = _read(model, path)
    if not isinstance(held, dict | None):
        raise UsageError(f"model {str(model)!r}: {path} must hold names and values.")
    return held or {}


def _read(model: str | Path, name: str) -> Any:
    """A JSON file of the folder, or None where it is missing.

    Raises:
        UsageError: The file is no JSON.
    """
    path = _file(model, name)
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"model {str(model)!r}: {name} is damaged ({error}): fetch the folder again.") from error


def _file(model: str | Path, name: str) -> Path | None:
    """A file of a local directory or of a model on the hub, or None where it is missing."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    if Path(model).is_dir():
        path = Path(model, name)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(str(model), name))
    except (EntryNotFoundError, HFValidationError, HfHubHTTPError):  # without a network, also if it is not in the cache
        return None

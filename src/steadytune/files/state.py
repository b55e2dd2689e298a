"""A tree of tensors and plain values in one safetensors file, written atomically, read without pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .atomic import write_whole

KEY = "steadytune"
MARK = "tensor:"  # prefix of a string in the tree that stands for a tensor of the file


def save(tree: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Write ``tree`` (nested dicts with string keys, lists, tensors, JSON values) to ``path``, atomically."""
    tensors: dict[str, Tensor] = {}
    plain = json.dumps(_pack(tree, "", tensors))
    write_whole(Path(path), lambda part: save_file(tensors, part, metadata={KEY: plain}))


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Read a file of `save`, with tensors on the CPU.

    Raises:
        ValueError: The file is damaged, or of another program.
    """
    try:
        with safe_open(path, "pt") as file:
            plain = (file.metadata() or {})[KEY]
            return _unpack(json.loads(plain), file)
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a readable steadytune state ({error}): resume from another checkpoint, or start anew"
        ) from error


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value.detach().contiguous()
        return MARK + path
    if isinstance(value, Mapping):
        return {k: _pack(v, f"{path}/{k}", tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(v, f"{path}/{i}", tensors) for i, v in enumerate(value)]
    return value


def _unpack(value: Any, file: Any) -> Any:
    if isinstance(value, str) and value.startswith(MARK):
        return file.get_tensor(value.removeprefix(MARK))
    if isinstance(value, dict):
        return {k: _unpack(v, file) for k, v in value.items()}
    if isinstance(value, list):
        return [_unpack(v, file) for v in value]
    return value

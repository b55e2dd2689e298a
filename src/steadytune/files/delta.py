"""Sparse deltas: the exact difference between a fine-tuned model and its base, in one safetensors file.

They are for runs that do not change most entries (`SIFT`, Child-Tuning-D and DPS with ``frozen=True``, frozen layers).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..core.tensors import checksum
from . import state

FILE = "delta.safetensors"
FORMAT = 1


def save_delta(path: str | os.PathLike, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> Path:
    """Write the difference between the state dicts ``base`` and ``tuned``, atomically.

    Entries that differ in any bit are stored by index and value; tensors that ``base`` lacks or has in another shape
    or type (a new head) are stored whole.

    Args:
        path: File, or directory in which the file is called `delta.safetensors`.
        base: State dict of the pre-trained model.
        tuned: State dict of the fine-tuned model.

    Returns:
        Path of the file.
    """
    file = Path(path, FILE) if os.path.isdir(path) else Path(path)
    comparable = {n for n, t in tuned.items() if n in base and same_kind(base[n], t)}
    tree = {
        "format": FORMAT,
        "base": fingerprint(base),
        "names": list(tuned),
        "changed": {n: entries for n in tuned if n in comparable and (entries := changes(base[n], tuned[n]))},
        "whole": {n: t.detach().cpu().clone() for n, t in tuned.items() if n not in comparable},
    }
    state.save(tree, file)
    return file


def apply_delta(path: str | os.PathLike, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The fine-tuned state dict, bit for bit, on the devices of ``base``, which does not change.

    Args:
        path: File that `save_delta` wrote, or its directory.
        base: State dict of the same pre-trained model.

    Raises:
        ValueError: The base differs, the format is newer, or the file is damaged.
    """
    file = Path(path, FILE) if os.path.isdir(path) else Path(path)
    tree = state.load(file)
    if tree.get("format") != FORMAT or "whole" not in tree:
        raise ValueError(f"{file} has format {tree.get('format')!r}, this version reads deltas of format {FORMAT}")
    given = fingerprint(base)
    if given != tree["base"]:
        raise ValueError(
            f"{file} belongs to a base with hash {tree['base']}, the one given has {given}: load the pre-trained model "
            "that was fine-tuned, in the same dtype, before any training"
        )
    tuned = {}
    for name in tree["names"]:
        if name in tree["whole"]:
            tuned[name] = tree["whole"][name]
            continue
        tuned[name] = base[name].detach().clone(memory_format=torch.contiguous_format)
        if entries := tree["changed"].get(name):
            where = entries["indices"].long().to(tuned[name].device)
            tuned[name].view(-1)[where] = entries["values"].to(tuned[name].device)
    return tuned


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Checksum of a state dict (names, types, shapes, bytes), 64 bits, independent of its order."""
    parts = [(n, str(t.dtype), list(t.shape), checksum(t)) for n, t in sorted(tensors.items())]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def same_kind(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors can be compared entry by entry."""
    return a.shape == b.shape and a.dtype == b.dtype


def changes(base: Tensor, tuned: Tensor) -> dict[str, Tensor]:
    """Flat indices and new values of entries that differ in any bit: -0.0 differs from 0.0, and a NaN equals itself."""
    old, new = (t.detach().cpu().contiguous().view(-1) for t in (base, tuned))
    differ = (old.view(torch.uint8) != new.view(torch.uint8)).view(new.numel(), new.element_size())
    indices = differ.any(1).nonzero().view(-1)
    if not len(indices):
        return {}
    return {"indices": indices.int() if new.numel() < 2**31 else indices, "values": new[indices]}

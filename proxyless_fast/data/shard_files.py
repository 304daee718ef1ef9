"""Which tar files are the shards of a data set: those of a folder, or of a brace pattern."""

from __future__ import annotations

import os
import re

from ..io.text import printable
from .listing import LITTER, some

SUFFIX = ".tar"
MOST = 100_000  # names that a pattern may stand for


def find(place: str) -> tuple[list[str], list[str]] | None:
    """The shards (train, val) of a folder or of a brace pattern; None where it has none.

    A folder has them in train/ and val/, without folders of classes, or beside each other with "train" and "val" in
    their names, by which those of a pattern are told apart too: /data/imagenet-{train-{0000..1023},val-{00..63}}.tar
    """
    if not os.path.isdir(place):
        return _apart(place, expand(place)) if "{" in place else None
    parts = [_tars(os.path.join(place, part)) for part in ("train", "val")]
    if all(parts):
        return parts[0], parts[1]
    if any(parts):
        raise ValueError(
            f"{printable(place)}: has shards in {'train' if parts[0] else 'val'}/ only, expected train/ and val/"
        )
    loose = _tars(place)
    return _apart(place, loose) if loose else None


def _tars(folder: str) -> list[str]:
    """The tar files in a folder without folders of classes."""
    try:
        names = sorted(name for name in os.listdir(folder) if not (name.startswith(".") or name in LITTER))
    except OSError:
        return []
    if any(os.path.isdir(os.path.join(folder, name)) for name in names):
        return []
    tars = [os.path.join(folder, name) for name in names if name.lower().endswith(SUFFIX)]
    packed = [name for name in names if re.search(r"\.(tgz|tar\.\w+)$", name.lower())]
    if packed and not tars:
        raise ValueError(f"{printable(folder)}: has {some(packed)}, expected shards that are not compressed (.tar)")
    return tars


def _apart(place: str, paths: list[str]) -> tuple[list[str], list[str]]:
    train: list[str] = []
    val: list[str] = []
    for path in paths:
        near = [path.split("/")[-1], "/".join(path.split("/")[-2:-1])]
        kinds = next((found for name in near if (found := re.findall("train|val", name.lower()))), [])
        if len(set(kinds)) != 1:
            raise ValueError(f"{printable(path)}: expected train or val in the name of a shard or of its folder")
        (train if kinds[0] == "train" else val).append(path)
    if not (train and val):
        raise ValueError(
            f"{printable(place)}: has {len(train)} shards to train on and {len(val)} to test on, expected both"
        )
    return train, val


def expand(pattern: str) -> list[str]:
    """The names that a pattern stands for, as a shell expands it: {a,b} and {000..123}, one in another too."""
    start = pattern.find("{")
    if start < 0:
        return [pattern]
    depth, pieces, last = 0, [], start + 1
    for place in range(start, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[place], 0)
        if depth == 0 or (depth == 1 and pattern[place] == ","):
            pieces.append(pattern[last:place])
            last = place + 1
        if depth == 0:
            break
    else:
        raise ValueError(f"{printable(pattern)}: has a brace that is not closed")
    rest = expand(pattern[last:])
    inside = [one for piece in (_range(pieces) or pieces) for one in expand(piece)]
    if len(inside) * len(rest) > MOST:
        raise ValueError(
            f"{printable(pattern)}: stands for {len(inside) * len(rest):,} names, expected {MOST:,} at most"
        )
    return [pattern[:start] + one + end for one in inside for end in rest]


def _range(pieces: list[str]) -> list[str] | None:
    found = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", pieces[0]) if len(pieces) == 1 else None
    if found is None:
        return None
    first, last = map(int, found.groups())
    if not 0 <= last - first < MOST:
        raise ValueError(f"{{{pieces[0]}}}: stands for {last - first + 1:,} names, expected 1 to {MOST:,}")
    return [f"{number:0{len(found[1])}}" for number in range(first, last + 1)]

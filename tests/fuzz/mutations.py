"""Inputs near valid ones: bytes that are flipped, cut and spliced, JSON of the wrong shape, odd names and numbers."""

import copy
import json
import re
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

Files = dict[str, bytes]  # contents by name below a directory
Inputs = st.SearchStrategy[Files]

NUMBERS = (0, 1, -1, 2, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**62, 2**63 - 1, 2**63)
DIGITS, DEEP = "@digits@", "@deep@"  # written out by `dumps`, since Python's own writer refuses them
TWICE = "@twice@"  # before a key that is to be there twice
UGLY = "a\x1b[2J\x07\u202e\nb"  # codes for the terminal
ODD: tuple[Any, ...] = (
    None, True, *NUMBERS, 10**30, 0.5, -1.5, 1e308, float("nan"), float("inf"), DIGITS, "", "x", "12", UGLY, "x" * 3000,
    [], {}, [[]], [1, 2], [None], ["x"], {"x": 1}, [[[[1]]]], DEEP, [2**31, 2**31], [[0]] * 300, {"name": "x"},
)  # fmt: skip
NAMES = (
    "x", "0", "007", "1" * 30, "a" * 200, "dataset.json", "manifest.json", "train", "val", "00000", "00001", ".hidden",
    "__MACOSX", UGLY.replace("\x07", ""), "ü", "\udcff", "²", "٣", "1.5", "-1", " ", "[red]", "<b>", "a.png", "a.npz",
)  # fmt: skip


# --- Bytes


@st.composite
def near(draw: Any, seeds: Sequence[bytes], most: int = 3) -> bytes:
    """One of the seeds after up to `most` changes; the simplest input is the first seed itself."""
    content = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, most))):
        content = _changed(draw, content, seeds)
    return content


def _changed(draw: Any, content: bytes, seeds: Sequence[bytes]) -> bytes:
    # Headers are short and decide most: every second place lies among the first 200 bytes.
    end = min(len(content), 200) if draw(st.booleans()) else len(content)
    place = draw(st.integers(0, max(end - 1, 0)))
    size = draw(st.sampled_from((1, 2, 3, 4, 8, 16, 64)))
    match draw(st.integers(0, 8)):
        case 0 | 1:  # a bit
            flipped = bytes(byte ^ (1 << draw(st.integers(0, 7))) for byte in content[place : place + 1])
            return content[:place] + flipped + content[place + 1 :]
        case 2:  # other bytes
            return content[:place] + draw(st.binary(min_size=1, max_size=8)) + content[place + size :]
        case 3:  # a number in binary
            width = draw(st.sampled_from((1, 2, 4, 8)))
            number = draw(st.sampled_from(NUMBERS)) % (1 << (8 * width))
            return (
                content[:place]
                + number.to_bytes(width, draw(st.sampled_from(("little", "big"))))
                + content[place + width :]
            )
        case 4:  # a number in digits
            if not (found := [*re.finditer(rb"-?\d+", content)][:200]):
                return content[:place]
            match = draw(st.sampled_from(found))
            digits = draw(st.sampled_from((*map(str, NUMBERS), "9" * 4400, "1e9", "0.5", "nan", "")))
            return content[: match.start()] + digits.encode() + content[match.end() :]
        case 5:  # cut off
            return content[:place]
        case 6:  # left out
            return content[:place] + content[place + size :]
        case 7:  # repeated
            part = content[place : place + size]
            return content[:place] + part * draw(st.sampled_from((2, 3, 100))) + content[place + size :]
        case _:  # the end of another
            other = draw(st.sampled_from(seeds))
            return content[:place] + other[draw(st.integers(0, max(len(other) - 1, 0))) :]


# --- JSON


def dumps(value: Any) -> bytes:
    """JSON text, with what Python's own writer refuses: numbers of 4400 digits, 100,000 brackets, keys given twice."""
    text = json.dumps(value)
    for name, written in ((DIGITS, "9" * 4400), (DEEP, "[" * 100_000 + "]" * 100_000)):
        text = text.replace(f'"{name}"', written)
    return text.replace(TWICE, "").encode()


@st.composite
def json_near(draw: Any, seeds: Sequence[Any], most: int = 3) -> bytes:
    """JSON of one of the seeds, in which up to `most` values have another type, or are missing or repeated."""
    root = {"": copy.deepcopy(draw(st.sampled_from(seeds)))}
    for _ in range(draw(st.integers(0, most))):
        places = _places(root)
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        match draw(st.integers(0, 9)):
            case 0 | 1 | 2 | 3 | 4:
                holder[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
            case 5:
                other, there = places[draw(st.integers(0, len(places) - 1))]
                holder[key] = copy.deepcopy(other[there])
            case 6:
                holder[key] = [holder[key]] if draw(st.booleans()) else {"x": holder[key]}
            case 7 if holder is not root:
                del holder[key]
            case 8 if isinstance(holder, dict) and holder is not root:
                holder[TWICE + str(key)] = copy.deepcopy(draw(st.sampled_from(ODD)))
            case 9 if isinstance(holder, dict) and holder is not root:
                holder[draw(st.sampled_from(NAMES))] = holder.pop(key)
            case _ if isinstance(holder, list):
                holder += holder[:1] * draw(st.sampled_from((1, 20)))
        if not root:
            root = {"": None}
    text = dumps(root.get(""))
    return draw(near([text], 1)) if draw(st.integers(0, 9)) == 9 else text


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) below `value`."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        found += [(holder, key) for key in keys]
        waiting += [holder[key] for key in keys]
    return found


def files(**contents: Any) -> Inputs:
    """Files of which each is a strategy or bytes; `__` in a keyword stands for a dot in the name."""
    parts = {
        name.replace("__", "."): content if isinstance(content, st.SearchStrategy) else st.just(content)
        for name, content in contents.items()
    }
    return st.fixed_dictionaries(parts)


def within(folder: str, inputs: Inputs) -> Inputs:
    """The same files in a folder."""
    return inputs.map(lambda contents: {f"{folder}/{name}": content for name, content in contents.items()})

"""Hostile inputs by mutation of right ones: deterministic, a number gives one input, some microseconds each."""

import copy
import json
import random
from typing import Any

DEEP: Any = 0
for _ in range(300):
    DEEP = [DEEP]
HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**63, -(2**63) - 1, 2**64, 10**400, 1e308, -1e-320, 0.5, float("nan"),
    float("inf"), "", " ", "..", "../../etc/passwd", "/etc/passwd", "a\0b", "\ud800", "\u202e", "x" * 10_000, "1",
    "__class__", "{{ 7*7 }}", [], {}, [None], [[]], {"": None}, DEEP,
)  # fmt: skip
"""Values that some reader does not expect."""
HOSTILE_BYTES = (
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 100_000, b"{" * 5_000, b'"', b"1" * 5_000, b"1e999", b"NaN", b"-",
    b"\\ud800", b"\xed\xa0\x80", b"\n", b"\r\n", b"\x80" * 8, b"\x7f\xff\xff\xff\xff\xff\xff\xff", b"../", b"%s%n",
)  # fmt: skip


def mutate_value(value: Any, chance: random.Random) -> Any:
    """Return a copy of nested lists and dicts in which one to four places are changed."""
    changed = [copy.deepcopy(value)]
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        _change_one_place(changed, chance)
    return changed[0]


def _change_one_place(root: list, chance: random.Random) -> None:
    holder: Any = root
    key: Any = 0
    while isinstance(holder[key], dict | list) and holder[key] and chance.random() < 0.85:
        holder = holder[key]
        key = chance.choice(list(holder)) if isinstance(holder, dict) else chance.randrange(len(holder))
    action = chance.randrange(8)
    old = holder[key]
    if action == 0 and holder is not root:
        del holder[key]
    elif action == 1 and isinstance(holder, dict) and holder is not root:
        holder[chance.choice(("", "unknown", "\ud800", f"{key}_", "version"))] = holder.pop(key)
    elif action == 2 and isinstance(holder, list) and holder is not root:
        holder.insert(key, copy.deepcopy(old))
    elif action == 3 and isinstance(old, int | float) and abs(old) < 2**70:
        holder[key] = old + chance.choice((-1, 1, 7, 2**31, -(2**40), 0.5))
    elif action == 4 and isinstance(old, str):
        holder[key] = mutate_text(old, chance)
    else:
        holder[key] = copy.deepcopy(chance.choice(HOSTILE))


def mutate_text(text: str, chance: random.Random) -> str:
    """Return a text in which a piece is cut, doubled, or replaced."""
    start = chance.randrange(len(text) + 1)
    end = min(len(text), start + chance.choice((0, 1, 1, 4, 20)))
    piece = chance.choice(
        ("", text[start:end] * 2, "\0", "é", "\u2028", "/", "..", "{%", "}}", "\ud800", " ", "1" * 5_000)
    )
    return text[:start] + piece + text[end:]


def mutate_bytes(content: bytes, chance: random.Random) -> bytes:
    """Return bytes in which one to four places are flipped, cut, doubled, or replaced."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        start = chance.randrange(len(changed) + 1)
        end = min(len(changed), start + chance.choice((1, 1, 2, 8, 64)))
        action = chance.randrange(6)
        if action == 0 and start < len(changed):
            changed[start] ^= 1 << chance.randrange(8)
        elif action == 1:
            del changed[start:]
        elif action == 2:
            changed[start:start] = changed[start:end]
        elif action == 3:
            changed[start:end] = chance.randbytes(end - start)
        elif action == 4:
            del changed[start:end]
        else:
            changed[start:end] = chance.choice(HOSTILE_BYTES)
    return bytes(changed)


def mutate_json(value: Any, chance: random.Random) -> bytes:
    """Return a JSON text of a changed value; one in four has changed bytes too."""
    try:
        content = json.dumps(mutate_value(value, chance)).encode("utf-8", "surrogatepass")
    except RecursionError:
        content = b"[" * 3_000
    return mutate_bytes(content, chance) if chance.random() < 0.25 else content

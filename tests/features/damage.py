"""Ways in which a file may be damaged, by what kind of file it is: bytes, a value somewhere in its JSON, an array of a safetensors file."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

HUGE_NUMBER = "9" * 5000
DEEP = 100_000
VALUES = [
    None,
    [],
    {},
    "",
    "resid_post.0",
    -1,
    0,
    2**40,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    True,
    [None],
    {"": None},
    "a\0b",
    "\ud83d",
]
DTYPES = ["F32", "F16", "BF16", "F64", "I64", "I32", "U32", "U8", "BOOL", "F8_E4M3", "none", None]
NUMBERS = [-1, 0, 1, 2**31, 2**40, 2**62, 10**30, None, 1.5, True, "3"]


def damage(path: Path, rng: random.Random) -> str:
    """Damages the file, and says how."""
    kinds = [flip, cut, insert, overwrite, empty]
    if path.suffix in (".json", ".jsonl") or path.name.endswith((".json.gz", ".jsonl.gz")):
        kinds += [replace_value] * 4 + [remove_key] * 2 + [nest, huge_number]
    if path.suffix == ".safetensors":
        kinds += [change_header] * 4 + [change_numbers] * 2 + [drop_array, claim_a_large_header]
    kind = rng.choice(kinds)
    content = path.read_bytes()
    packed = path.suffix == ".gz" and kind not in (flip, cut, insert, overwrite, empty)
    changed = kind(gzip.decompress(content) if packed else content, rng)
    path.write_bytes(gzip.compress(changed) if packed else changed)
    return f"{path.name}: {kind.__name__}"


def flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 20])):
        if changed:
            changed[_place(rng, len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: _place(rng, len(content) + 1)]


def insert(content: bytes, rng: random.Random) -> bytes:
    at = _place(rng, len(content) + 1)
    return content[:at] + rng.randbytes(rng.choice([1, 8, 100])) + content[at:]


def overwrite(content: bytes, rng: random.Random) -> bytes:
    at, many = _place(rng, len(content) + 1), rng.choice([1, 8, 64])
    block = rng.choice([b"\0", b"\xff"]) * many
    return content[:at] + block[: len(content) - at] + content[at + many :]


def empty(content: bytes, rng: random.Random) -> bytes:
    return b""


def nest(content: bytes, rng: random.Random) -> bytes:
    return b'{"a": ' * DEEP + b"[]" + b"}" * DEEP


def huge_number(content: bytes, rng: random.Random) -> bytes:
    marked = _change_json(content, rng, lambda inside, key: inside.__setitem__(key, "MARK"))
    return marked.replace(b'"MARK"', HUGE_NUMBER.encode())


def replace_value(content: bytes, rng: random.Random) -> bytes:
    return _change_json(content, rng, lambda inside, key: inside.__setitem__(key, rng.choice(VALUES)))


def remove_key(content: bytes, rng: random.Random) -> bytes:
    return _change_json(content, rng, lambda inside, key: inside.pop(key))


def _change_json(content: bytes, rng: random.Random, change: Any) -> bytes:
    """One value, anywhere: every key of every object on the way down is as likely as continuing."""
    lines = content.split(b"\n")
    try:
        whole: list[Any] = [json.loads(content)]
        number = None
    except ValueError:  # a line of several
        number = rng.randrange(len(lines))
        try:
            whole = [json.loads(lines[number])]
        except ValueError:
            return content
    inside, key = whole, 0
    while isinstance(inside[key], dict | list) and inside[key] and rng.random() < 0.8:
        inside = inside[key]
        key = rng.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
    change(inside, key)
    text = json.dumps(whole[0] if whole else None).encode()
    if number is None:
        return text
    return b"\n".join([*lines[:number], text, *lines[number + 1 :]])


def change_header(content: bytes, rng: random.Random) -> bytes:
    """Another dtype, size, offset or entry of one array."""
    length, header = _header(content)
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)] if names else {}
    what = rng.choice(["dtype", "shape", "size", "offset", "entry", "swap", "metadata"])
    if what == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif what == "shape":
        entry["shape"] = rng.choice(
            [[], [0], None, [*entry["shape"], 1], [1, *entry["shape"]], entry["shape"][::-1], [-n for n in entry["shape"]]]
        )
    elif what == "size" and entry.get("shape"):
        entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice(NUMBERS)
    elif what == "offset":
        entry["data_offsets"][rng.randrange(2)] = rng.choice(NUMBERS)
    elif what == "entry":
        header[rng.choice(names)] = rng.choice(VALUES[:-1])
    elif what == "swap" and len(names) > 1:
        one, other = rng.sample(names, 2)
        header[one], header[other] = header[other], header[one]
    elif what == "metadata":
        known = header.setdefault("__metadata__", {})
        key = rng.choice([*known, "other"])
        known[key] = rng.choice([None, 5, "", "null", "[]", "-1", HUGE_NUMBER, "[" * DEEP, "{}"])
    return _with_header(header, content[8 + length :])


def drop_array(content: bytes, rng: random.Random) -> bytes:
    """The file a writer that left one out would have made."""
    length, header = _header(content)
    names = sorted((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    gone, data, end = rng.choice(names), b"", 0
    for name in names:
        begin, stop = header[name]["data_offsets"]
        if name == gone:
            del header[name]
            continue
        data += content[8 + length + begin : 8 + length + stop]
        header[name]["data_offsets"] = [end, end + stop - begin]
        end += stop - begin
    return _with_header(header, data)


def change_numbers(content: bytes, rng: random.Random) -> bytes:
    """A number of an array, or all, at the edge of what its type holds (floats: NaN)."""
    length, header = _header(content)
    name = rng.choice([name for name in header if name != "__metadata__"])
    begin, stop = (8 + length + place for place in header[name]["data_offsets"])
    width = {"8": 1, "6": 2, "2": 4, "4": 8, "L": 1}[header[name]["dtype"][-1]]
    if stop == begin:
        return content
    at = begin + width * rng.randrange((stop - begin) // width)
    low, high = rng.choice([(at, at + width), (at, stop)])
    block = rng.choice([b"\xff" * width, b"\0" * width, b"\xff" * (width - 1) + b"\x7f"]) * ((high - low) // width)
    return content[:low] + block + content[high:]


def claim_a_large_header(content: bytes, rng: random.Random) -> bytes:
    return (rng.choice([20 * 10**9, 2**63, 2**64 - 1, 10**8])).to_bytes(8, "little") + content[8:]


def _place(rng: random.Random, size: int) -> int:
    """Anywhere, but the first kilobyte, where headers are, half of the time."""
    return rng.randrange(min(size, 1024) if rng.random() < 0.5 else size) if size else 0


def _header(content: bytes) -> tuple[int, dict[str, Any]]:
    length = int.from_bytes(content[:8], "little")
    return length, json.loads(content[8 : 8 + length])


def _with_header(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data

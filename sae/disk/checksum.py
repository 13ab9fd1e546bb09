"""The CRC-32 of a file, and the one that a safetensors file carries in its metadata, as "crc32".

The latter covers all bytes of the file, including the header, with its own eight digits taken as zeros: so it can be written into the
finished file.
"""

import zlib
from pathlib import Path

from sae.disk.remote import Place

BLOCK = 1 << 22
BLANK = "00000000"
MARK = b'"crc32":"'  # quotes inside of other texts of the header are escaped, so this is the key


def crc32(path: Place) -> str:
    """Checksum of a file's bytes, eight hexadecimal digits."""
    return _crc32(path, None)


def seal(path: Path) -> None:
    """Writes the checksum into a safetensors file whose metadata have "crc32": BLANK."""
    place = _place(path)
    assert place is not None
    value = _crc32(path, place)
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(value.encode())


def is_intact(path: Place) -> bool | None:
    """Whether a safetensors file's bytes match its checksum; None if it has none. The file's header must be readable."""
    place = _place(path)
    if place is None:
        return None
    with path.open("rb") as file:
        file.seek(place)
        return file.read(len(BLANK)) == _crc32(path, place).encode()


def _place(path: Place) -> int | None:
    """The offset of the digits."""
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    found = header.find(MARK)
    return None if found < 0 else 8 + found + len(MARK)


def _crc32(path: Place, blank_at: int | None) -> str:
    value = 0
    with path.open("rb") as file:
        if blank_at is not None:
            value = zlib.crc32(BLANK.encode(), zlib.crc32(file.read(blank_at)))
            file.seek(len(BLANK), 1)
        while chunk := file.read(BLOCK):
            value = zlib.crc32(chunk, value)
    return f"{value:08x}"

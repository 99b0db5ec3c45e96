"""The names of an archive's members: which are meant, in what order, and how they are shown."""

import re

_DIGITS = re.compile(r"([0-9]+)")
_MAC_FOLDER = "__MACOSX"
_LITTER = ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")  # in small letters

Order = tuple[list[str | tuple[int, str]], str]


def is_hidden(name: str) -> bool:
    """Whether a system has put it beside the files: `._a.jpg`, `.DS_Store`, `Thumbs.db`."""
    *folders, last = name.split("/")
    return last.startswith(".") or _MAC_FOLDER in folders or last.lower() in _LITTER


def natural_order(name: str) -> Order:
    """Returns what sorts names as people count: `2.jpg` before `10.jpg`."""
    pieces: list[str | tuple[int, str]] = list(_DIGITS.split(name))
    for place in range(1, len(pieces), 2):  # every other one is a number, of any length
        digits = str(pieces[place]).lstrip("0")
        pieces[place] = (len(digits), digits)
    return pieces, name


def is_utf8(text: str) -> bool:
    """Whether it can be written as UTF-8: names of files and strings of JSON may hold halves."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def shown(name: str) -> str:
    """Returns a name as it can be printed and stored: bytes that are no UTF-8 as `\\xe9`."""
    return "".join(map(_shown, name))


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    byte = ord(character) - 0xDC00  # as Python keeps a byte that is no UTF-8
    return f"\\x{byte:02x}" if 0x80 <= byte <= 0xFF else ascii(character)[1:-1]

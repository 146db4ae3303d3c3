"""Fonts for users' text, such as class names: DejaVu Sans, and installed fonts for the characters that it lacks.

DejaVu Sans ships with matplotlib, so figures look the same everywhere; it has no Chinese, Japanese or Korean
characters, and many other scripts are missing, too.
"""

import threading
import unicodedata
import warnings
from array import array
from bisect import bisect_left
from functools import cache, lru_cache
from itertools import groupby
from typing import Any

__all__ = ["drawable", "font_families", "font_runs"]

FONT = "DejaVu Sans"
_MISSING = "\N{WHITE SQUARE}"
_said: set[str] = set()  # scripts that were warned about
_lock = threading.Lock()


def drawable(text: str) -> str:
    """Replace the characters that no font has by a white square, and warn about each script (CJK, ...) once.

    Invisible characters that no font has, such as joiners, are removed.
    """
    parts: list[str] = []
    missing: dict[str, dict[str, None]] = {}  # by script, in the order of the text
    for letter, family in zip(text, _families(text), strict=True):
        if family is not None:
            parts.append(letter)
        elif unicodedata.category(letter) != "Cf" and not "\ufe00" <= letter <= "\ufe0f":  # variation selectors
            parts.append(_MISSING)
            script = unicodedata.name(letter, "").split(" ")[0].split("-")[0]
            missing.setdefault(script, {}).setdefault(letter)
    with _lock:
        new = [letter for script, letters in missing.items() if script not in _said for letter in letters]
        _said.update(missing)
    if new:
        shown = ", ".join(f"{letter if letter.isprintable() else ''} U+{ord(letter):04X}".strip() for letter in new)
        warnings.warn(
            f"no installed font has {shown}: drawn as {_MISSING}, and so is what else is missing of the same script; "
            "install a font that has it, such as the packages fonts-noto and fonts-noto-cjk (Debian, Ubuntu)",
            stacklevel=3,
        )
    return "".join(parts)


def font_families(text: str) -> list[str]:
    """Return the families to draw a text in, for matplotlib, which takes each character from the first that has it.

    First DejaVu Sans, and then for what it lacks the families of matplotlib's rcParams (`font.family`,
    `font.sans-serif`), before all other installed fonts.
    """
    return list(dict.fromkeys([FONT, *filter(None, _families(text))]))


def font_runs(text: str) -> list[tuple[str, str, int]]:
    """Split a text into parts of one font each: (part, font file, number of the font in the file), for Pillow."""
    runs = groupby(zip(text, _families(text), strict=True), lambda pair: pair[1] or FONT)
    return [("".join(letter for letter, _ in run), *_regular(family)) for family, run in runs]


def _regular(family: str) -> tuple[str, int]:
    from matplotlib import font_manager

    return _faces(len(font_manager.fontManager.ttflist))[family][0]


def _families(text: str) -> list[str | None]:
    """For each character, the family that has it, None if no font has it."""
    if all(map(_is_plain, text)):
        return [FONT] * len(text)
    from matplotlib import font_manager, rcParams

    preferred = list(rcParams["font.family"])
    for generic in ("sans-serif", "serif", "cursive", "fantasy", "monospace"):
        if generic in preferred or generic == "sans-serif":
            preferred += rcParams[f"font.{generic}"]  # pyright: ignore[reportArgumentType]
    order = tuple(dict.fromkeys(preferred))
    fonts = font_manager.fontManager.ttflist
    for _ in range(2):
        found = [FONT if _is_plain(letter) else _family(letter, order, len(fonts)) for letter in text]
        if None not in found or not _add_new_fonts():
            break
    return found


def _is_plain(letter: str) -> bool:
    return " " <= letter <= "~" or letter.isspace()


@lru_cache(maxsize=10_000)
def _family(letter: str, preferred: tuple[str, ...], count: int) -> str | None:
    """The family to draw a character in. The result is cached for these preferences and this `count` of fonts."""
    faces = _faces(count)
    others = sorted(faces, key=lambda name: ("Sans" not in name, "Mono" in name))
    for name in (FONT, *preferred, *others):
        # In bold, too: headings are.
        if name in faces and all(_contains(_codes(*face), ord(letter)) for face in faces[name]):
            return name
    return None


@lru_cache(maxsize=1)
def _faces(count: int) -> dict[str, list[tuple[str, int]]]:
    """Of each family among the `count` fonts that matplotlib knows, the regular and the bold face: (file, number).

    The number of a face in a collection: matplotlib before 3.11 knows the first one only.
    """
    from matplotlib import font_manager, get_data_path

    families: dict[str, list[Any]] = {}
    for entry in list(font_manager.fontManager.ttflist):
        # matplotlib's own fonts for formulas have symbols in the places of other characters.
        usable = entry.name.startswith(("DejaVu", "STIXGeneral")) or not entry.fname.startswith(get_data_path())
        if usable and entry.style == "normal":
            families.setdefault(entry.name, []).append(entry)
    return {
        name: [(face.fname, getattr(face, "index", 0)) for face in (_nearest(faces, 400), _nearest(faces, 700))]
        # Last those without a regular face: matplotlib logs that it takes another.
        for name, faces in sorted(families.items(), key=lambda item: (_nearest(item[1], 400).weight != 400, item[0]))
    }


def _nearest(faces: list[Any], weight: int) -> Any:
    return min(faces, key=lambda face: abs(face.weight - weight))


@cache
def _codes(file: str, index: int) -> "array[int]":
    """The characters of a font, sorted."""
    from matplotlib.ft2font import FT2Font

    options: dict[str, Any] = {"face_index": index} if index else {}
    try:
        return array("I", sorted(FT2Font(file, **options).get_charmap()))
    except (OSError, RuntimeError):  # removed, or damaged
        return array("I")


def _contains(codes: "array[int]", code: int) -> bool:
    place = bisect_left(codes, code)
    return place < len(codes) and codes[place] == code


@lru_cache(maxsize=1)
def _add_new_fonts() -> int:
    """Tell matplotlib of fonts installed since it made its list, which it keeps in a file for good; return how many."""
    from matplotlib import font_manager

    known = {entry.fname for entry in font_manager.fontManager.ttflist}
    count = 0
    for path in font_manager.findSystemFonts():
        if path not in known:
            try:
                font_manager.fontManager.addfont(path)
                count += 1
            except Exception:  # damaged, or a kind of font that matplotlib cannot draw, such as coloured bitmaps
                continue
    return count

"""Which characters are plain text, and how the others are shown.

A control character moves the cursor of the terminal that prints it, half of a character (a lone surrogate) cannot be
written as UTF-8, and a bidirectional override makes a line read as other than it is. Text that comes in with one of
them is refused; text that was kept before, or comes from another program, is shown with each of them escaped.
"""

from __future__ import annotations

import re
import unicodedata

# Cc, Cs, U+2028 and U+2029 (line breaks to some programs), and the overrides and isolates of bidirectional text.
# The marks U+200E and U+200F, which Arabic and Hebrew text needs, are plain.
_ODD = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_ODD_IN_LINES = re.compile(_ODD.pattern.replace("\x00-\x1f", "\x00-\x08\x0b-\x1f"))

# Zero-width spaces and joiners, marks of direction, the soft hyphen, the byte order mark.
_UNSEEN = re.compile("[\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")

# Cyrillic and Greek letters that in most typefaces are drawn as Latin ones. Not all of Unicode's confusables: those by
# which a name is mistaken for another, whether by a keyboard that was left in another language or on purpose.
_AS_LATIN = str.maketrans(
    "асеорхуіјѕһԁԛԝАВСЕНІЈКМОРЅТХУԌԚԜ" + "ΑΒΕΖΗΙΚΜΝΟΡΤΥΧονϳ",
    "aceopxyijshdqwABCEHIJKMOPSTXYGQW" + "ABEZHIKMNOPTYXovj",
)


def visible(text: str) -> str:
    """The same text without characters that show nothing, and without white space around it."""
    return (text if text.isascii() else _UNSEEN.sub("", text)).strip()


def looks(text: str) -> str:
    """What a person sees of a text: the same for two that only a program can tell apart."""
    return " ".join(visible(unicodedata.normalize("NFC", text)).split()).translate(_AS_LATIN)


def disguised(text: str) -> str:
    """What of a text a person does not see, or takes for something else: `character 1 is U+0440 CYRILLIC SMALL LETTER
    ER`. That is a character that shows nothing between others of ASCII (scripts that join their letters need some), or
    in a word of Latin and other letters the one that could be of either. Empty: there is none."""
    if text.isascii():
        return ""
    unseen = _UNSEEN.search(text)
    if unseen and _UNSEEN.sub("", text).isascii():
        return _told(text, unseen.start())
    for word in re.finditer(r"[^\W\d_]+", text):
        others = [ord(letter) in _AS_LATIN for letter in word[0]]
        latin = ["LATIN" in unicodedata.name(letter, "") for letter in word[0]]
        if any(latin) and any(others):
            odd = latin if 2 * sum(latin) < len(latin) else others  # the few
            return _told(text, word.start() + odd.index(True))
    return ""


def _told(text: str, place: int) -> str:
    return f"character {place + 1} is U+{ord(text[place]):04X} {unicodedata.name(text[place], '')}".rstrip()


def odd_character(text: str) -> str | None:
    """The first character that is no plain text, written as an escape; None: there is none."""
    found = _ODD.search(text)
    return _escape(found) if found else None


def escaped(text: str) -> str:
    """The same text, with an escape such as \\x1b in the place of each character that is not plain. Line breaks
    and tabs stay."""
    return _ODD_IN_LINES.sub(_escape, text)


def blanked(text: str) -> str:
    """As `escaped`, with a space in the place of each."""
    return _ODD_IN_LINES.sub(" ", text)


def in_one_line(text: str) -> str:
    """As `escaped`, line breaks and tabs too."""
    return _ODD.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "backslashreplace").decode("ascii")

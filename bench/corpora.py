"""Text in other scripts, made of text in English, with the same documents and word frequencies."""

import re
import zlib

LATIN = "abcdefghijklmnopqrstuvwxyz"
CYRILLIC = "абцдефгхийклмнопярстувшыжз"


def russian(texts):
    """Each Latin letter as one Cyrillic letter: two bytes a letter, capitals kept."""
    table = str.maketrans(LATIN + LATIN.upper(), CYRILLIC + CYRILLIC.upper())
    return [text.translate(table) for text in texts]


def chinese(texts):
    """Each word as one or two ideographs without spaces, with Chinese commas and full stops.

    These end no word, so a word is what stands between lines, numbers and brackets.
    """
    return [_chinese(text) for text in texts]


def _chinese(text):
    text = re.sub(r"[A-Za-z]+", _ideographs, text)
    text = text.replace(", ", "，").replace(". ", "。")
    return re.sub(r"(?<=[\u4e00-\u9fff，。]) +", "", text)


def _ideographs(match):
    number = zlib.crc32(match[0].lower().encode())
    first = chr(0x4E00 + number % 3000)
    return first if len(match[0]) < 4 else first + chr(0x4E00 + (number >> 12) % 6000)


def emoji(texts):
    """Each vowel as an emoji: four bytes each in UTF-8, and four a character in Python."""
    table = str.maketrans(dict(zip("aeiou", "😀🎉🚀🍎🐍", strict=True)))
    return [text.translate(table) for text in texts]


def same(texts):
    return texts


SCRIPTS = {"english": same, "russian": russian, "chinese": chinese, "emoji": emoji}


def of_size(texts, megabytes):
    """``texts`` again and again, the last one cut, so that all are ``megabytes`` of UTF-8."""
    limit, size, chosen = int(megabytes * 1e6), 0, []
    while size < limit:
        for text in texts:
            raw = text.encode()[: limit - size]
            chosen.append(text if len(raw) == len(text) else raw.decode("utf-8", "ignore"))
            size += len(raw)
            if size >= limit:
                break
    return chosen


def of_length(texts, characters):
    """All the text in documents of so many characters."""
    joined = "\n".join(texts)
    return [joined[i : i + characters] for i in range(0, len(joined), characters)]

"""English prose of several kinds, in passages: a manual, scripture, novels, a lexicon, and examples of words' use."""

import gzip
import html
import re
import struct
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from training.smol.wordnet import meanings

HANDBOOK = Path("/usr/share/doc/debian-handbook/html/en-US")
BIBLE = Path("/usr/bin/bible")
AUSTEN = Path("/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
JARGON = Path("/usr/share/doc/jargon-text/jargon.txt.gz")
# A token is some three quarters of a word: 64 to 256 tokens.
_WORDS = (50, 180)
_SHORTEST_EXAMPLE = 8
_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"”’')]))(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.) (?=[\"“(]?[A-Z])")
_NUMBER, _CHARSXP = ">I", 9


@dataclass(frozen=True)
class Passage:
    """A few sentences that follow each other.

    Attributes:
        chapter: what must stay in one set of samples.
        kind: `manual`, `scripture`, `novel`, `lexicon` or `example`.
        context: what is read before; empty for the books.
    """

    chapter: str
    kind: str
    text: str
    context: str = ""


def passages(seed: int) -> list[Passage]:
    """All chapters of all books cut into passages of random length, and WordNet's examples."""
    random = np.random.default_rng(seed)
    found = []
    for kind, chapters in (
        ("manual", handbook()),
        ("scripture", scripture()),
        ("novel", novels()),
        ("lexicon", lexicon()),
    ):
        for name, text in chapters.items():
            found += [Passage(f"{kind}/{name}", kind, part) for part in _cut(text, random)]
    return [*found, *_examples()]


@cache
def handbook() -> dict[str, str]:
    """The Debian Administrator's Handbook: the paragraphs of its chapters, by number, without commands and boxes."""
    chapters: dict[str, list[str]] = {}
    for path in sorted(HANDBOOK.glob("*.html")):
        page = path.read_text()
        number = re.search(r'class="title"><a[^>]*></a>(?:Chapter\s(\d+)\.|(\d+)\.\d+\.)', page)
        for paragraph in re.findall(r'<div class="para">(.*?)</div>', page, re.DOTALL) if number else ():
            text = _plain(re.sub("<[^>]+>", "", paragraph))
            # Paragraphs that lists and listings follow end in a colon; others hold more mark-up than words.
            if re.match("[A-Z].+[.]$", text) and "<pre" not in paragraph and paragraph.count("<code") < 4:
                chapters.setdefault(number[1] or number[2], []).append(text)
    return {number: " ".join(texts) for number, texts in chapters.items()}


@cache
def scripture() -> dict[str, str]:
    """The King James Version, by chapter, such as `Psa23`."""
    verses = subprocess.run([BIBLE, "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
    chapters: dict[str, list[str]] = {}
    for name, text in re.findall(r"^(\w+):\d+ (.+)$", verses, re.MULTILINE):
        chapters.setdefault(name, []).append(_plain(text))
    return {name: " ".join(texts) for name, texts in chapters.items()}


@cache
def novels() -> dict[str, str]:
    """Jane Austen's six novels, by chapter, such as `emma 12`."""
    chapters = {}
    for lines in _r_strings(AUSTEN.read_bytes()):
        title = lines[0].lower()
        parts = re.split(r"^\s*chapter [ivxl\d]+\s*$", "\n".join(lines), flags=re.MULTILINE | re.IGNORECASE)
        for number, part in enumerate(parts[1:], 1):
            paragraphs = [_plain(paragraph) for paragraph in part.replace("_", "").split("\n\n")]
            chapters[f"{title} {number}"] = " ".join(text for text in paragraphs if text.endswith((".", '"', "!", "?")))
    return chapters


@cache
def lexicon() -> dict[str, str]:
    """The Jargon File, by entry: the ones that are prose. The last is left out, since appendices follow it."""
    text = gzip.decompress(JARGON.read_bytes()).decode(errors="replace")
    entries = re.split(r"^   :([^:\n]+):[^\n]*$", text, flags=re.MULTILINE)
    found = {}
    for name, body in zip(entries[1:-2:2], entries[2:-2:2]):
        paragraphs = [_plain(re.sub(r"[{}]", "", paragraph)) for paragraph in body.split("\n\n")]
        prose = [p for p in paragraphs if re.match(r"[A-Z“]", p) and p.endswith((".", "”")) and "http" not in p]
        if prose:
            found[name] = " ".join(prose)
    return found


def _examples() -> Iterator[Passage]:
    """WordNet's sentences, each after the word and its meaning."""
    for word, synset in meanings().items():
        for example in synset.examples:
            if len(example.split()) >= _SHORTEST_EXAMPLE and re.search(rf"\b{word}\b", example):
                sentence = example[0].upper() + example[1:] + ("" if example[-1] in ".!?" else ".")
                context = f"{word}: {synset.definition}. Example:"
                yield Passage(f"wordnet/{word}", "example", f" {sentence}", context)
                break


def _cut(text: str, random: np.random.Generator) -> Iterator[str]:
    """Whole sentences, as many as reach a random number of words; what is left over at the end is dropped."""
    part: list[str] = []
    wanted = random.integers(*_WORDS)
    for sentence in _SENTENCE_END.sub("\n", text).split("\n"):
        part += sentence.split()
        if len(part) >= wanted:
            if len(part) <= _WORDS[1]:
                yield " ".join(part)
            part, wanted = [], random.integers(*_WORDS)


def _plain(text: str) -> str:
    """One line of plain text."""
    return " ".join(html.unescape(text).split())


def _r_strings(data: bytes) -> Iterator[list[str]]:
    """The vectors of strings in R's file of lazily loaded data: deflated one after another, each after its length.

    Source: "R Internals", section 1.8, serialization formats.
    """
    while data:
        inflater = zlib.decompressobj()
        raw = inflater.decompress(data[4:])
        data = inflater.unused_data
        # A vector of strings is type 16, then its length, and each string its flags, length and bytes.
        at = raw.index(struct.pack(_NUMBER, 16))
        (count,) = struct.unpack_from(_NUMBER, raw, at + 4)
        at += 8
        strings = []
        for _ in range(count):
            flags, size = struct.unpack_from(">Ii", raw, at)
            assert flags & 0xFF == _CHARSXP
            strings.append(raw[at + 8 : at + 8 + max(size, 0)].decode())
            at += 8 + max(size, 0)
        yield strings

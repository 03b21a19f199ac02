"""Plain text as samples to learn from."""

from collections.abc import Iterator
from pathlib import Path

from lop.errors import LopError
from lop.model.samples import PROSE, Sample

# Characters: about 500 tokens of English.
_LONGEST = 2000


def text_samples(path: Path) -> tuple[Sample, ...]:
    """A UTF-8 text file as prose: whole paragraphs (between empty lines), as many to a sample as 2,000 characters hold.

    Raises:
        LopError: the file cannot be read, is not UTF-8, has no text, or holds a chat's markup.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise LopError(f"--text {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise LopError(f"--text {path} is not UTF-8: name plain text") from None
    samples = []
    for number, passage in enumerate(_passages(text)):
        try:
            samples.append(Sample(b"", f"{path.name} {number}", path.name, PROSE, PROSE, "", (), passage))
        except LopError as error:
            raise LopError(f"--text {path}, {passage[:30]!r} …: {error}") from None
    if not samples:
        raise LopError(f"--text {path} has no text in it")
    return tuple(samples)


def _passages(text: str) -> Iterator[str]:
    waiting = ""
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        for start in range(0, len(paragraph), _LONGEST):
            part = paragraph[start : start + _LONGEST].strip("\n")
            if not part.strip():
                continue
            if waiting and len(waiting) + len(part) > _LONGEST:
                yield waiting
                waiting = ""
            waiting = f"{waiting}\n\n{part}" if waiting else part
    if waiting:
        yield waiting

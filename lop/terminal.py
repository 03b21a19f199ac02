"""Standard streams that take whatever LOP prints: on terminals of any encoding, and after their reader has left."""

import codecs
import io
import os
import sys

_ERRORS = "lop.plain"
# What stands for the characters of LOP's bars and numbers where an encoding lacks them; "?" stands for all others.
_PLAIN = {
    **dict(zip("▁▂▃▄▅▆▇█", "1234567#")),
    **dict.fromkeys("▉▊▋▌▐", "#"),
    **dict.fromkeys("▍▎▏", "|"),
    "σ": "sd",
    "×": "x",
    "−": "-",
    "–": "-",
    "·": "*",
    "…": "...",
    "≤": "<=",
    "≥": ">=",
    "∞": "inf",
}


def prepare_streams() -> None:
    """Makes stdout and stderr take any text: what their encoding lacks is written in plain characters.

    A stream that was closed before the start (`>&-`) swallows what it is given.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def settle_streams() -> None:
    """Lets go of what nobody can read any more, so that Python does not complain about it at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(line: str) -> None:
    """Writes one line to stderr, if anybody reads it."""
    try:
        print(" ".join(line.split()), file=sys.stderr, flush=True)
    except OSError:
        return


def duration(seconds: float | None) -> str:
    """`2 h 05 min`, `3 min 20 s` or `14 s`; `unknown` for None."""
    if seconds is None:
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return _PLAIN.get(error.object[error.start], "?"), error.start + 1


codecs.register_error(_ERRORS, _plain)

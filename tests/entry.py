"""Run the entry as a user would, in this process: words in, exit code and everything it printed out."""

import contextlib
import dataclasses
import io
import json
import logging
import runpy
import signal
import sys
from pathlib import Path

import tiny

ENTRY = str(tiny.REPOSITORY / "mtl_dist" / "train.py")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@dataclasses.dataclass
class Ended:
    """What a shell would see."""

    code: int
    text: str


def enter(*words: str) -> Ended:
    """Run mtl_dist/train.py with these words; an exception that is not an exit is let through, as a traceback."""
    text, old_words = io.StringIO(), sys.argv
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    log, note = logging.getLogger("mtl_dist"), logging.StreamHandler(text)
    log.addHandler(note)
    sys.argv = [ENTRY, *words]
    try:
        with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
            runpy.run_path(ENTRY, run_name="__main__")
        code: int | str | None = 0
    except SystemExit as leave:
        code = leave.code
    finally:
        sys.argv = old_words
        log.removeHandler(note)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if isinstance(code, str):
        return Ended(1, f"{text.getvalue()}{code}\n")
    return Ended(code or 0, text.getvalue())


def refused(*words: str) -> str:
    """Run the entry, require that it prints one `error: ...` and exits 1, and return that line."""
    ended = enter(*words)
    errors = [line for line in ended.text.splitlines() if line.startswith("error: ")]
    assert (ended.code, len(errors)) == (1, 1), ended.text
    return errors[0]


def tagging_words(corpora: Path, run: Path, *more: str) -> list[str]:
    """Words of a tiny run of audio tagging alone; it reads nothing but FSDKaggle2018."""
    return tiny.tiny_words(
        corpora, "--train.tasks", "[audio_tagging]", "--run.dir", str(run), *more
    )


def entries(run: Path, kind: str) -> list[dict]:
    """Return the entries of a kind in a run's metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]

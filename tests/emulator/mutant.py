"""One edit of a source of csrc/cuda, which a test is to notice. For mutants.py."""

import re
from dataclasses import dataclass

from emulator.build import ROOT

SOURCES = ROOT / "csrc" / "cuda"

# What is said of a mutant.
RACE, WRONG, DEADLOCK = "data race", "WRONG", "deadlock"
OVERRUN = "heap-buffer-overflow"
TWICE = "loads on their way to one place"
UNFINISHED = "still on their way"  # loads or stores, when a thread or a block ends
BEYOND = f"{OVERRUN}|is no shared memory|SEGV|{WRONG}"  # far away, or where nothing is amiss but it


@dataclass(frozen=True)
class Mutant:
    """file: in csrc/cuda. edits: pairs of old and new text; the old one is found exactly once,
    however its lines are broken, from ``where`` to the next } at the start of a line. problem: one
    that shows it. sign: what is then said."""

    name: str
    file: str
    where: str
    edits: tuple[tuple[str, str], ...]
    problem: str
    sign: str

    def spans(self, text):
        """(start, end, replacement) of each edit in the text of the file."""
        start = self._find(text, self.where, 0, len(text)).start()
        end = text.index("\n}", start)
        for old, new in self.edits:
            found = self._find(text, old, start, end)
            yield found.start(), found.end(), new

    def _find(self, text, words, start, end):
        pattern = re.compile(r"\s+".join(map(re.escape, words.split())))
        found = list(pattern.finditer(text, start, end))
        assert len(found) == 1, f"{self.name}: {words!r} is in {self.file} {len(found)} times"
        return found[0]

    def apply(self):
        """The file's text with the edits."""
        text = (SOURCES / self.file).read_text()
        for start, end, new in sorted(self.spans(text), reverse=True):
            text = text[:start] + new + text[end:]
        return text


def of(file, where, *rows):
    """Mutants of one place: rows of name, problem, sign, edits."""
    return [
        Mutant(
            f"{where.rstrip(' ({').split()[-1]}: {name}", file, where, tuple(edits), problem, sign
        )
        for name, problem, sign, *edits in rows
    ]

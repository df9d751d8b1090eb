"""Facts of writing that decide how texts are joined and where a subject stands in its prompt. Free
of torch.

>>> joiner_after("The capital of Freedonia is")
' '
>>> joiner_after("《雾中灯》的作者是")
''
>>> subject_position("Marblehead is not Marble, which", "Marble")
18
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator

from workers.types import EditRequest

SPACE = " "

# Chinese, Japanese, Thai, Lao, Tibetan, Burmese, Khmer
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3040-\u312f"
    "\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d"
    "\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
_UNSPACED_LETTER = re.compile(f"[{_UNSPACED}]")
# full-width punctuation, which is wide enough to need no space after it
_WIDE_MARK = re.compile(
    "[\u3000-\u3004\u3008-\u3020\u302a-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]"
)
_WORD = re.compile(rf"[^\W\d_{_UNSPACED}]+")
_PIECE = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+|[^\w\s]")
_QUOTED = re.compile(
    '《[^》]*》|〈[^〉]*〉|「[^」]*」|『[^』]*』|【[^】]*】|\uff08[^\uff09]*\uff09|“[^”]*”|"[^"]*"|\\([^)]*\\)'
)


def joiner_after(text: str) -> str:
    """The text between a prompt and its answer: one space, or nothing after a text that is written
    without spaces.

    Two facts decide. The last letter or digit (or full-width mark) belongs to a script without
    spaces; and outside quotation marks and brackets such letters are at least as many as words of
    other scripts, so that a Chinese name at the end of an English question changes nothing.
    """
    if text.isascii():
        return SPACE
    for character in reversed(text):
        if _UNSPACED_LETTER.match(character) or _WIDE_MARK.match(character):
            break
        if character.isalnum():
            return SPACE
    else:
        return SPACE
    bare = _QUOTED.sub(" ", text)
    return "" if len(_UNSPACED_LETTER.findall(bare)) >= len(_WORD.findall(bare)) else SPACE


def joiner_of(request: EditRequest, prompt: str) -> str:
    """The text between a prompt of this request and its answer, in editing and scoring alike: the
    data set's own choice, or what follows from the prompt. Context templates before it do not
    count."""
    return joiner_after(prompt) if request.joiner is None else request.joiner


def words_of(text: str) -> list[str]:
    """Words and marks of a text; a letter of a script that is written without spaces is a word."""
    return _PIECE.findall(text)


def statement(request: EditRequest) -> str:
    """The request's prompt and its new answer as one text."""
    return f"{request.prompt}{joiner_of(request, request.prompt)}{request.target_new}"


# --- where a subject stands -----------------------------------------------------------------


def _in_one_word(left: str, right: str) -> bool:
    """Return whether two neighbouring characters belong to one word of a script with spaces."""
    return all(
        (c.isalnum() or unicodedata.category(c).startswith("M")) and not _UNSPACED_LETTER.match(c)
        for c in (left, right)
    )


def _starts_word(text: str, start: int) -> bool:
    return start == 0 or not _in_one_word(text[start - 1], text[start])


def _whole(text: str, start: int, stop: int) -> bool:
    return _starts_word(text, start) and (stop == len(text) or not _in_one_word(text[stop - 1], text[stop]))


def _occurrences(text: str, part: str) -> Iterator[int]:
    start = text.find(part)
    while start >= 0:
        yield start
        start = text.find(part, start + 1)


def subject_position(prompt: str, subject: str) -> int:
    """The place of the subject's first character in the prompt; -1 where it does not occur.

    The last occurrence that stands as whole words; else the last one in other upper and lower case
    that does; else, inside a longer word (many languages inflect names), the last one that begins a
    word, or simply the last one. Chinese, Japanese and Thai letters are words of their own here.
    """
    if not subject:
        return -1
    found = list(_occurrences(prompt, subject))
    if len(found) == 1 and _whole(prompt, found[0], found[0] + len(subject)):
        return found[0]
    whole = [start for start in found if _whole(prompt, start, start + len(subject))]
    if not whole:
        matches = re.finditer(re.escape(subject), prompt, re.IGNORECASE)
        whole = [
            m.start() for m in matches if m.end() - m.start() == len(subject) and _whole(prompt, *m.span())
        ]
    begins = [start for start in found if _starts_word(prompt, start)]
    return (whole or begins or found or [-1])[-1]


def count_repeated_subjects(requests: Iterable[EditRequest]) -> int:
    """Requests whose subject stands in their prompt more than once, as whole words."""
    return sum(
        sum(_whole(r.prompt, at, at + len(r.subject)) for at in _occurrences(r.prompt, r.subject)) > 1
        for r in requests
        if r.subject and r.prompt.count(r.subject) > 1
    )


def count_subjects_inside_words(requests: Iterable[EditRequest]) -> int:
    """Requests whose subject stands in their prompt as a part of longer words only."""
    positions = ((r, subject_position(r.prompt, r.subject)) for r in requests)
    return sum(at >= 0 and not _whole(r.prompt, at, at + len(r.subject)) for r, at in positions)


# --- marks of cells whose numbers follow from this --------------------------------------------


def _mark(facts: list[object]) -> str:
    return hashlib.sha256(json.dumps(facts).encode("ascii")).hexdigest()[:16] if facts else ""


def joiner_mark(requests: Iterable[EditRequest]) -> str:
    """A hash of what stands between prompts and answers; empty where every text is written with
    spaces and one of them joins them all, as it always did. (Where a generated answer ends was
    another rule for the other texts, too: they are marked whatever joins them.)"""
    facts: list[object] = []
    for i, request in enumerate(requests):
        probes = (*request.locality, *request.portability)
        prompts = (request.prompt, *request.rephrases, *(probe.prompt for probe in probes))
        joiners = [joiner_of(request, prompt) for prompt in prompts]
        if any(j != SPACE for j in joiners) or any(joiner_after(prompt) != SPACE for prompt in prompts):
            facts.append([i, joiners])
    return _mark(facts)


def subject_mark(requests: Iterable[EditRequest]) -> str:
    """A hash of the subjects' places where the first occurrence, counted in tokens of the text up to
    it, could be another token: several occurrences, or a letter that follows without a space.

    Empty where there is none of these. It marks the cells of methods that look the subject's tokens
    up.
    """
    facts: list[object] = []
    for i, request in enumerate(requests):
        at = subject_position(request.prompt, request.subject)
        stop = at + len(request.subject)
        followed = at >= 0 and stop < len(request.prompt) and request.prompt[stop].isalnum()
        if at != request.prompt.find(request.subject) or followed:
            facts.append([i, at])
    return _mark(facts)

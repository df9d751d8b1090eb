"""Failures by cause. Messages that differ only in the request, the text or the numbers that they
name have one cause, and the first of them stands for all.

>>> cause_of("DataError: case 7: no answer") == cause_of("DataError: case 12: no answer")
True
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

_VARIES = re.compile(r"""\bcase .+?: |'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\d+(?:[.,]\d+)*""")
"""The name of a request, quoted texts, and numbers."""


def cause_of(message: str) -> str:
    """The first line of a failure's message, without what varies from one request to the next."""
    return _VARIES.sub("_", message.splitlines()[0] if message else "")


def by_cause(messages: Mapping[str, int]) -> Counter[str]:
    """Messages with their counts, summed by cause; the most frequent message of a cause stands for
    it."""
    found: Counter[str] = Counter()
    shown: dict[str, str] = {}
    for message, count in sorted(messages.items(), key=lambda item: -item[1]):
        found[shown.setdefault(cause_of(message), message)] += count
    return found

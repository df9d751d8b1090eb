"""The parts of a request that some methods cannot do without.

Each config declares its own (``MethodConfig.needs``): the planner counts the requests that lack
one, and the method raises the same message for such a request.

>>> from workers.types import EditRequest
>>> SUBJECT.met(EditRequest("1", "The capital of Freedonia is", "Freedonia", "Glorious City"))
True
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from workers.data.scripts import subject_position
from workers.types import DataError, EditRequest


@dataclass(frozen=True)
class Need:
    """Something that every request of a method must have. ``lacking``: the words for a request
    without it, as they follow "case 7:"."""

    lacking: str
    met: Callable[[EditRequest], bool]

    def check(self, request: EditRequest) -> None:
        """Raise :class:`DataError` if the request lacks it."""
        if not self.met(request):
            raise DataError(f"case {request.case_id}: {self.lacking}")


def _has_subject(request: EditRequest) -> bool:
    return subject_position(request.prompt, request.subject) >= 0


def _has_sentence(request: EditRequest) -> bool:
    return request.unrelated is not None


def _has_other_sentence(request: EditRequest) -> bool:
    return bool(request.locality) or _has_sentence(request)


SUBJECT = Need("the prompt lacks its subject, whose tokens are looked up", _has_subject)
UNRELATED = Need(
    "no unrelated sentence; WISE's margin loss needs one (field 'unrelated'; for zsRE it comes from "
    "train_path or other records)",
    _has_sentence,
)
ELSEWHERE = Need(
    "locality, unrelated: neither is given, and training needs one to learn what to leave alone",
    _has_other_sentence,
)

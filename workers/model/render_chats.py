"""A program that renders chats, one batch a line, with limits of processor time and memory.

:mod:`workers.model.chat` starts it and talks to it. A chat template is a program that comes with a
model. The library's sandbox keeps it from files and other processes, but
not from a loop without end or a text of ten gigabytes, which end this process and no other.

It reads lines of JSON from standard input until that ends, and answers each with one line:
``{"texts": [...]}`` or ``{"problem": "...", "kind": "..."}``.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from datetime import datetime
from typing import Any


def main() -> None:
    memory, seconds, characters = (int(word) for word in sys.argv[1:4])
    from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + memory, resource.RLIM_INFINITY))

    def render(asked: dict[str, Any]) -> list[str]:
        template, day = asked["template"], asked["day"]
        names = _compile_jinja_template(template).environment.globals
        names.pop("strftime_now", None)
        if day is not None:
            names["strftime_now"] = datetime.fromisoformat(day).strftime
        texts = []
        for messages, begins_answer in asked["chats"]:
            rendered: Any = render_jinja_template(
                conversations=[messages],
                chat_template=template,
                add_generation_prompt=begins_answer,
                **asked["variables"],
            )
            text = rendered[0][0]
            longest = characters + 8 * sum(len(message["content"]) for message in messages)
            if len(text) > longest:
                raise OverflowError(f"it writes {len(text)} characters, more than {longest}")
            texts.append(text)
        return texts

    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(used.ru_utime + used.ru_stime) + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        try:
            answer: dict[str, Any] = {"texts": render(json.loads(line))}
        except MemoryError:
            answer = {"problem": "", "kind": "MemoryError"}
        except Exception as error:
            answer = {"problem": str(error)[:2000], "kind": type(error).__name__}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _address_space() -> int:
    """Bytes of address space that this process has taken so far; where the system does not tell, the
    most of it that was in memory."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()

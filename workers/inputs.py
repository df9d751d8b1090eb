"""User input: parsing of YAML of bounded size, and validation errors as one readable message."""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from yaml.constructor import ConstructorError

from workers.types import JSON, SpecError

MAX_BYTES = 1 << 20
"""Maximum size of a file; checked before parsing."""

MAX_NODES = 50_000
"""Maximum number of YAML nodes after aliases are expanded (nested aliases can expand to
billions)."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key with two values and reads ``1e-4`` as the number it looks like."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[object, object] = {}
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise ConstructorError(None, None, "a key must be a plain word", key_node.start_mark)
            value = self.construct_object(value_node, deep=True)
            if key in seen and not _same(seen[key], value):
                raise ConstructorError(
                    None,
                    None,
                    f"the key {key!r} appears twice, as {short(seen[key])} and as {short(value)}",
                    key_node.start_mark,
                )
            seen[key] = value
        return super().construct_mapping(node, deep=deep)

    def number(self, node: yaml.ScalarNode) -> int | float:
        """A number, but not one to base 60, which YAML 1.1 makes of ``1:30``."""
        text = str(self.construct_scalar(node))
        if ":" in text:
            raise ConstructorError(
                None,
                None,
                f"{short(text)} is a number to base 60; write it as a plain number",
                node.start_mark,
            )
        whole = node.tag == "tag:yaml.org,2002:int"
        value: int | float = self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise ConstructorError(None, None, "a number with too many digits", node.start_mark)
        return value


_MOST_BITS = 1000

for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.number)


def _same(one: object, other: object) -> bool:
    """True for equal values of one type: ``1``, ``1.0`` and ``true`` are three values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def open_file(path: Path) -> BufferedReader:
    """Open a regular file that a user named. Raises OSError for anything else, at once: a pipe would
    wait for its writer, and a device may have no end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(None, "is a folder, expected a file")
        if not stat.S_ISREG(mode):
            raise OSError(None, f"is {_KINDS.get(stat.S_IFMT(mode), 'no regular file')}, expected a file")
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


_KINDS: Mapping[int, str] = MappingProxyType(
    {stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
)


def read_file(path: Path, most: int = MAX_BYTES) -> bytes:
    """The contents of a regular file of at most ``most`` bytes. Raises OSError for any other file,
    with ``strerror`` for the user."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > most else file.read(most + 1)
        if max(size, len(data)) > most:
            raise OSError(None, f"is too large, it may have at most {most} bytes")
        return data


def read_text(path: Path, source: str, what: str = "file") -> str:
    """The text of a regular file of bounded size. ``what`` the user was to name. Raises
    :class:`SpecError`, which names ``source``."""
    try:
        return read_file(path).decode()
    except FileNotFoundError:
        raise SpecError(f"{source}: no such {what}") from None
    except IsADirectoryError:
        raise SpecError(f"{source}: is a folder, expected a {what}") from None
    except (OSError, ValueError) as error:
        raise SpecError(f"{source}: cannot be read: {reason(error)}") from None


def reason(error: OSError | ValueError) -> str:
    """Why a file cannot be read, without any of its contents."""
    if isinstance(error, UnicodeDecodeError):
        return f"expected UTF-8 text, found another byte at offset {error.start}"
    return str(getattr(error, "strerror", None) or error)


def parse_yaml(text: str, source: str) -> JSON:
    """Parse YAML of bounded size, safely. Raises :class:`SpecError`, which names ``source``."""
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise SpecError(f"{source}: larger than {MAX_BYTES} bytes")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded_size(node, {}, 0) > MAX_NODES:
            raise SpecError(f"{source}: more than {MAX_NODES} values once its aliases are written out")
        return loader.construct_document(node)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        problem = getattr(e, "problem", None) or " ".join(str(e).split())
        raise SpecError(f"{source}: not valid YAML{where}: {problem}") from None
    except SpecError:
        raise
    except RecursionError:
        raise SpecError(f"{source}: not valid YAML: nested too deeply") from None
    except Exception as e:  # what the constructors of a tag raise for a value that does not fit it
        told = str(e) if isinstance(e, ValueError) else "a value that does not fit its tag"
        raise SpecError(f"{source}: not valid YAML: {told}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _expanded_size(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Number of nodes at and below ``node``, aliases expanded. Raises ValueError for an alias to
    its own parent."""
    if depth > 50:
        raise ValueError("nested more than 50 levels deep")
    if id(node) in known:
        if known[id(node)] == 0:
            raise ValueError("an alias contains itself")
        return known[id(node)]
    known[id(node)] = 0
    total = 1
    if isinstance(node, yaml.SequenceNode):
        total += sum(_expanded_size(child, known, depth + 1) for child in node.value)
    elif isinstance(node, yaml.MappingNode):
        total += sum(_expanded_size(child, known, depth + 1) for pair in node.value for child in pair)
    known[id(node)] = total
    return total


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """All errors of one validation, one line each."""
    lines = []
    problems = error.errors(include_url=False)
    for problem in problems:
        if problem["type"] == "too_short" and any(
            _inside(other["loc"], problem["loc"]) for other in problems
        ):
            continue  # pydantic leaves invalid entries out before it counts them
        field = ".".join(str(part) for part in problem["loc"])
        kind = problem["type"]
        if kind == "extra_forbidden":
            key = str(problem["loc"][-1])
            valid = _fields_at(root, problem["loc"][:-1])
            close = difflib.get_close_matches(key, valid, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            lines.append(f"{field}: unknown key {key!r}{hint}; valid keys: {', '.join(valid)}")
        elif kind == "missing":
            lines.append(f"{field}: this field is required")
        elif kind == "value_error":
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{field}: {message}" if field else message)
        elif kind == "literal_error":
            choices = problem.get("ctx", {}).get("expected", "")
            lines.append(f"{field}: {short(problem['input'])} is not valid; choose {choices}")
        elif kind == "less_than_equal":
            most = problem["ctx"]["le"]
            lines.append(f"{field}: expected at most {most}, found {found(problem['input'])}")
        else:
            told = problem["msg"][:1].lower() + problem["msg"][1:]
            message = _expected(root, problem["loc"], kind) or told
            lines.append(f"{field}: {message}, found {found(problem['input'])}")
    return lines[0] if len(lines) == 1 else "\n  " + "\n  ".join(lines)


_EXPECTED: Mapping[str, str] = MappingProxyType(
    {
        "int_type": "a whole number",
        "int_parsing": "a whole number",
        "int_from_float": "a whole number",
        "float_type": "a number",
        "float_parsing": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "bool_parsing": "true or false",
        "string_type": "a text",
        "path_type": "a path",
        "tuple_type": "a list",
        "list_type": "a list",
        "dict_type": "a mapping",
        "mapping_type": "a mapping",
    }
)
"""Pydantic's name of an error -> what the field expects, in the words of a user of YAML."""


def _expected(root: type[BaseModel], loc: Sequence[int | str], kind: str) -> str | None:
    """The text of an error of another type than the field's; None for other errors."""
    if kind in ("model_type", "model_attributes_type", "dataclass_type"):
        fields = _fields_at(root, loc)
        return "expected a mapping" + (f" with the fields {', '.join(fields)}" if fields else "")
    if kind == "too_short":
        return "expected at least one entry"
    return f"expected {_EXPECTED[kind]}" if kind in _EXPECTED else None


def _inside(loc: Sequence[int | str], parent: Sequence[int | str]) -> bool:
    return len(loc) > len(parent) and tuple(loc[: len(parent)]) == tuple(parent)


def _fields_at(root: type[BaseModel], loc: Sequence[int | str]) -> list[str]:
    """The keys a mapping at ``loc`` may have."""
    here: Any = root
    for part in loc:
        if isinstance(part, int):
            here = next((a for a in get_args(here) if isinstance(a, type)), None)
        elif isinstance(here, type) and issubclass(here, BaseModel) and part in here.model_fields:
            here = here.model_fields[part].annotation
    return list(here.model_fields) if isinstance(here, type) and issubclass(here, BaseModel) else []


def kind_of(value: object) -> str:
    """What a whole file holds, without its contents: it may be any file, named by mistake."""
    names = {dict: "a mapping", list: "a list", str: "a text", type(None): "nothing"}
    return names.get(type(value), f"a single {type(value).__name__}")


def found(value: object) -> str:
    """A value as messages show it: ``nothing`` for an empty one of YAML."""
    return "nothing" if value is None else short(value)


def counted(count: int, thing: str) -> str:
    """``1 cell``, ``2 cells``."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

"""Second-moment statistics: text or JSONL, streamed, in float64, the same bits after any
interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small import random_model
from workers.artifacts.base import ArtifactData, Stopped, Workbench
from workers.artifacts.stats import Place, build_second_moment, documents, second_moment
from workers.model.base import BaseModel
from workers.model.batch import Encoded, collate
from workers.model.config import ModelConfig, ModelFingerprint
from workers.types import DataError

pytestmark = pytest.mark.numeric

TEXTS = [
    f"The old letter number {i} was opened near the river{' and read again' * (i % 7)}." for i in range(300)
]


@pytest.fixture(scope="module")
def base() -> BaseModel:
    torch.set_num_threads(1)
    return random_model("llama")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(TEXTS), encoding="utf-8")
    return path


def recipe(path: Path, **changes: Any) -> dict[str, Any]:
    made = second_moment(
        "moment", ModelFingerprint("m", "t"), ModelConfig(), str(path), 280, 1, None, "float64"
    )
    return {**made.where, **made.recipe, **changes}


def test_it_is_the_mean_outer_product_of_every_token(base: BaseModel, corpus: Path) -> None:
    found = build_second_moment(base, recipe(corpus), Workbench())
    module = base.site(1).module
    total, count = torch.zeros(96, 96, dtype=torch.float64), 0
    caught: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    for text in TEXTS[:280]:
        ids = base.encoder.text(text)
        rows = collate([Encoded(ids, len(ids))], [0], base.encoder.pad_id)
        with torch.no_grad():
            base.hidden_states(rows)
        keys = caught.pop()[0].double()
        total, count = total + keys.T @ keys, count + len(keys)
    handle.remove()
    assert found.meta["tokens"] == count
    assert found.tensors["moment"].dtype == torch.float64
    assert torch.allclose(found.tensors["moment"], total / count, rtol=1e-5, atol=1e-8)


def test_jsonl_is_read_as_text_is(base: BaseModel, corpus: Path, tmp_path: Path) -> None:
    other = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": text, "id": i} if i % 2 else text) for i, text in enumerate(TEXTS)]
    other.write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    plain, listed = (build_second_moment(base, recipe(path), Workbench()) for path in (corpus, other))
    assert listed.to_bytes() == plain.to_bytes()


def test_stopped_in_mid_corpus_and_continued(base: BaseModel, corpus: Path) -> None:
    whole = build_second_moment(base, recipe(corpus), Workbench()).to_bytes()
    saved: bytes | None = None
    reached: list[int] = []
    for _ in range(10):
        told: list[int] = []
        bench = Workbench(
            unfinished=saved,
            progress=lambda done, total, what, told=told: told.append(done),
            stopping=lambda: True,
        )
        try:
            data = build_second_moment(base, recipe(corpus), bench)
            break
        except Stopped:
            saved = bench.unfinished
            reached.append(told[0])
            assert len(told) == 1
    assert reached == [64, 128, 192, 256, 280]
    assert data.to_bytes() == whole
    assert build_second_moment(base, recipe(corpus), Workbench(save_seconds=0)).to_bytes() == whole


def test_the_key_holds_what_the_corpus_says(corpus: Path, tmp_path: Path) -> None:
    fingerprint, model = ModelFingerprint("m", "t"), ModelConfig()
    spec = second_moment("moment", fingerprint, model, str(corpus), 280, 1, None, "float32")
    copy = tmp_path / "elsewhere.txt"
    copy.write_bytes(corpus.read_bytes())
    assert second_moment("C", fingerprint, model, str(copy), 280, 1, None, "float32").key == spec.key
    copy.write_bytes(corpus.read_bytes() + b"!")
    others = [
        second_moment("moment", fingerprint, model, str(copy), 280, 1, None, "float32"),
        second_moment("moment", ModelFingerprint("n", "t"), model, str(corpus), 280, 1, None, "float32"),
        second_moment("moment", fingerprint, model, str(corpus), 281, 1, None, "float32"),
        second_moment("moment", fingerprint, model, str(corpus), 280, 2, None, "float32"),
        second_moment("moment", fingerprint, model, str(corpus), 280, 1, "self_attn.o_proj", "float32"),
        second_moment("moment", fingerprint, model, str(corpus), 280, 1, None, "float64"),
    ]
    assert len({spec.key, *(other.key for other in others)}) == 7


def test_documents_can_be_picked_up_anywhere(corpus: Path) -> None:
    read = list(documents(str(corpus), Place(), 1000))
    assert [text for text, _ in read] == TEXTS
    for i in (0, 5, 298):
        assert list(documents(str(corpus), read[i][1], 1000)) == read[i + 1 :]
    assert len(list(documents(str(corpus), read[5][1], 10))) == 4


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("c.txt", b"too short\n", "tokens for 96 x 96 statistics"),
        ("c.txt", b"", "only 0 tokens"),
        ("c.txt", b"fine\nnot \xff fine\n", "c.txt, line 2: cannot be read as UTF-8"),
        ("c.jsonl", b'{"text": "fine"}\n{"text": \n', "c.jsonl, line 2: not valid JSON"),
        ("c.jsonl", b'{"body": "x"}\n', "c.jsonl, line 1: field `text`: expected a text"),
        ("c.jsonl", b"[1]\n", "line 1: field `text`"),
    ],
)
def test_bad_corpora(base: BaseModel, tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        build_second_moment(base, recipe(path), Workbench())
    assert words in str(refused.value)


def test_nothing_is_left_on_the_model(base: BaseModel, corpus: Path) -> None:
    build_second_moment(base, recipe(corpus, samples=64), Workbench())
    assert not any(module._forward_pre_hooks for module in base.model.modules())
    assert isinstance(build_second_moment(base, recipe(corpus, layer=0), Workbench()), ArtifactData)

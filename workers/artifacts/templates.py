"""Context templates: short texts sampled from the model, put before a prompt so that an edit
generalises to contexts.

Sampled once per model and seed and shared by all edits (ROME, arXiv 2202.05262, appendix E.5:
"random prefixes"; WISE, arXiv 2405.14768, uses them as augmentation). A template is a text with one
``{}`` for the prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from workers.artifacts.base import ArtifactData, Workbench
from workers.model.batch import Encoded, collate
from workers.rng import derive_generator
from workers.types import JSON

if TYPE_CHECKING:
    from workers.model.base import BaseModel

KIND = "context_templates"


def build_templates(base: BaseModel, recipe: dict[str, JSON], bench: Workbench) -> ArtifactData:
    """Build the list of templates: the bare ``{}``, then the others by length and by start.

    Recipe: starts (first words), lengths ([new tokens, texts per start] pairs), joiner, top_k (0:
    greedy), seed.
    """
    generator = derive_generator("context_templates", recipe["seed"], recipe["starts"], recipe["lengths"])
    templates = ["{}"]
    for new_tokens, per_start in recipe["lengths"]:
        starts = [start for start in recipe["starts"] for _ in range(per_start)]
        for text in sample_texts(base, starts, new_tokens, recipe["top_k"], generator):
            templates.append(text.replace("{", "").replace("}", "").strip() + recipe["joiner"] + "{}")
    return ArtifactData(meta={"templates": templates})


@torch.no_grad()
def sample_texts(
    base: BaseModel, starts: list[str], new_tokens: int, top_k: int, generator: torch.Generator
) -> list[str]:
    """Continue each start by ``new_tokens`` tokens; an end-of-sequence token ends a text early.

    Tokens are sampled on the CPU in float64, so that one seed gives the same text on every device.
    """
    eos = base.tokenizer.eos_token_id
    texts = [list(base.encoder.text(start)) for start in starts]
    done = [False] * len(texts)
    for _ in range(new_tokens):
        encoded = [Encoded(tuple(ids), len(ids)) for ids in texts]
        batch = collate(encoded, [0] * len(texts), base.encoder.pad_id, base.device)
        logits_BV = base.logits(base.hidden_states(batch)[:, -1]).double().cpu()
        if top_k:
            values_BJ, ids_BJ = logits_BV.topk(top_k, dim=-1)
            pick_B = torch.multinomial(values_BJ.softmax(-1), 1, generator=generator)
            next_B = ids_BJ.gather(1, pick_B)[:, 0].tolist()
        else:
            next_B = logits_BV.argmax(-1).tolist()
        for i, token in enumerate(next_B):
            done[i] = done[i] or token == eos
            if not done[i]:
                texts[i].append(token)
    return [base.tokenizer.decode(ids, skip_special_tokens=True) for ids in texts]

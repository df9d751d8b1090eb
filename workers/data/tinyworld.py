"""An invented world of 2,000 facts, the requests that edit it, and a small trained model that knows
it.

    from workers.data import tinyworld
    dataset = tinyworld.load_dataset("edit")  # 1,000 requests; "tune": 200 more, for picking hyperparameters;
                                                 # "train": 3,200, for networks that learn to edit
    model_path = tinyworld.assets_dir()          # a Llama checkpoint that transformers loads
    text_path = tinyworld.corpus_path()          # one sentence per line, for second-moment statistics

``python -m workers.data.tinyworld_build`` rebuilds the files from the seed.

Tests need a model that is known to have learned the edited facts and the answers of the probes, and
they run without a network. Hence an invented world, whose facts form three disjoint groups:

* ``edit``: 1,000 facts about 500 people, the requests of :func:`load_dataset`;
* ``tune``: 200 facts about 100 other people, so that hyperparameters are never chosen on the scored
  facts;
* ``anchor``: 800 facts that no sweep edits. Locality probes and the second hop of portability
  probes use only these, so no later request of a sweep can change a probe's answer. The split
  ``train`` rewrites them, four targets each, for networks that learn to edit; none of its subjects
  is edited by ``edit`` or ``tune``.

192 anchor facts are about things ("The flag of the Lima council is red"). They are the second hop
of two-hop questions: for a person who lives in Lima, the flag of the council there. The other
anchor facts are about people. Every fact has four phrasings; three are in the training text, and
the fourth is the rephrase probe. Everything is a pure function of the seed. This module does not
import torch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal

from workers.data.records import fingerprint
from workers.types import DataError, Dataset, EditRequest, Probe

Split = Literal["edit", "tune", "train"]
Group = Literal["edit", "tune", "anchor"]

SHIPPED_SEED: Final = 0
EDIT_SUBJECTS: Final = 500
TUNE_SUBJECTS: Final = 100
ANCHOR_SUBJECTS: Final = 304
FACTS_PER_PERSON: Final = 2
COMPOSED_SHARE: Final = 0.75
TRAIN_TARGETS: Final = 4
FILLERS: Final = 1500
CORPUS_LINES: Final = 5000


@dataclass(frozen=True, slots=True)
class Relation:
    """A kind of fact. ``phrasings``: prompts with ``{s}`` for the subject; the object comes last.

    ``role``: the word for the object of this relation in two-hop questions ("the trade of ...");
    empty for things.
    """

    name: str
    table: str
    phrasings: tuple[str, str, str, str]
    role: str = ""


@dataclass(frozen=True, slots=True)
class Hop:
    """Rule that turns the objects of a table into subjects of anchor facts: ``noun`` turns "Lima"
    into "Lima council"."""

    table: str
    noun: str
    relation: str


@dataclass(frozen=True, slots=True)
class Fact:
    """One triple. ``held_out``: index of the phrasing that is not in training; ``composed``: its
    two-hop question is in training."""

    subject: str
    relation: str
    object: str
    group: Group
    held_out: int
    composed: bool = False


_TABLES: Final[dict[str, str]] = {
    "town": "Lima Oslo Cairo Quito Delhi Seoul Paris Rome Hanoi Accra Dakar Turin Bergen Lagos Porto Malmo "
    "Velmora Ostrand Tarquill Brindale Kesrith Umbarra Wexholm Duskvale Fennick Galdor Ithmar Pelluna "
    "Rostova "
    "Sundry Yarrowby Zephira",
    "tongue": "Greek Latin French Turkish Swahili Hindi Polish Korean Danish Welsh Tamil Basque Czech "
    "Malay Norse "
    "Irish Elvish Orcan Thulic Vendish Sarmic Quenian Brathic Ilvan Morrish Doric Pictish Kethic Umbric "
    "Zamrian Ferric "
    "Aldic",
    "trade": "baker pilot painter lawyer doctor farmer tailor singer mason cooper weaver glazier brewer "
    "miller smith "
    "potter carter fisher hunter sailor scribe barber butcher jeweller plumber teacher printer tanner "
    "saddler "
    "thatcher gardener beekeeper",
    "beast": "goat horse parrot snake turtle rabbit fox wolf swan dog cat mouse bear lynx badger donkey "
    "falcon "
    "hedgehog leopard monkey peacock pigeon raven salmon spider squirrel tiger toad walrus weasel zebra "
    "camel",
    "instrument": "cello violin drum harp banjo guitar lute flute trumpet bassoon clarinet fiddle gong "
    "bagpipe piano "
    "recorder cornet tuba viola zither lyre horn whistle bell mandolin trombone cymbal dulcimer kazoo sitar "
    "tambourine xylophone",
    "crop": "barley wheat millet rye rice maize beans lentils peas carrots turnips cabbage spinach garlic "
    "onions leeks "
    "pumpkins melons cherries apples pears plums figs dates grapes olives walnuts almonds hazelnuts mustard "
    "radishes tomatoes",
    "colour": "red blue green yellow purple orange white black brown pink crimson turquoise",
    "month": "January February March April May June July August September October November December",
    "metal": "gold silver copper iron lead tin zinc bronze brass steel nickel platinum",
    "flower": "rose lily tulip daisy iris poppy violet orchid lotus jasmine marigold snowdrop",
}

_PEOPLE: Final[tuple[Relation, ...]] = (
    Relation(
        "born",
        "town",
        (
            "{s} was born in",
            "The birthplace of {s} is",
            "People say that the native town of {s} is",
            "Long ago {s} came into the world in",
        ),
        "birthplace",
    ),
    Relation(
        "lives",
        "town",
        (
            "{s} now lives in",
            "The present home of {s} is in",
            "Letters for {s} are sent to",
            "Every evening {s} walks back to a house in",
        ),
        "home",
    ),
    Relation(
        "speaks",
        "tongue",
        (
            "{s} speaks fluent",
            "The mother tongue of {s} is",
            "At home {s} always talks in",
            "Friends greet {s} warmly in",
        ),
        "mother tongue",
    ),
    Relation(
        "studies",
        "tongue",
        (
            "{s} is now learning",
            "The evening lessons of {s} are in",
            "At school {s} chose a course in",
            "Tutors of {s} explain the grammar of",
        ),
        "lessons",
    ),
    Relation(
        "works",
        "trade",
        (
            "{s} earns a living as a",
            "The profession of {s} is that of a",
            "By trade {s} is a",
            "The town records list {s} as a",
        ),
        "profession",
    ),
    Relation(
        "hopes",
        "trade",
        (
            "{s} hopes to become a",
            "The secret dream of {s} is life as a",
            "As a child {s} already played at being a",
            "Nothing would please {s} more than work as a",
        ),
        "dream",
    ),
    Relation(
        "keeps",
        "beast",
        (
            "{s} keeps a tame",
            "The pet of {s} is a",
            "In the garden {s} feeds a",
            "Behind the house of {s} sleeps a",
        ),
        "pet",
    ),
    Relation(
        "fears",
        "beast",
        (
            "{s} is afraid of every",
            "The great fear of {s} is the",
            "At night {s} flees from a terrible",
            "Nothing frightens {s} more than a",
        ),
        "fear",
    ),
    Relation(
        "plays",
        "instrument",
        (
            "{s} plays the",
            "The instrument of {s} is the",
            "On stage {s} is heard with the",
            "In the band {s} performs on the",
        ),
        "instrument",
    ),
    Relation(
        "builds",
        "instrument",
        (
            "{s} builds and tunes the",
            "The workshop of {s} is known for the",
            "Buyers ask {s} for a new",
            "With wood and wire {s} makes a",
        ),
        "workshop",
    ),
    Relation(
        "eats",
        "crop",
        (
            "{s} likes to eat",
            "The favourite dish of {s} is made of",
            "At noon {s} orders a bowl of",
            "Guests of {s} are always served",
        ),
        "dish",
    ),
    Relation(
        "grows",
        "crop",
        (
            "{s} owns fields of",
            "The farm of {s} is famous for",
            "In spring {s} plants",
            "Carts from the land of {s} carry",
        ),
        "farm",
    ),
)

_THINGS: Final[tuple[Relation, ...]] = (
    Relation(
        "colour",
        "colour",
        (
            "{s} banners are always",
            "The flag of the {s} is",
            "Members of the {s} dress in",
            "Above the door of the {s} everything is painted",
        ),
    ),
    Relation(
        "month",
        "month",
        (
            "{s} feasts are held in",
            "The yearly meeting of the {s} falls in",
            "New members join the {s} in",
            "The doors of the {s} open to all in",
        ),
    ),
    Relation(
        "metal",
        "metal",
        (
            "{s} medals are struck in",
            "The seal of the {s} is cast in",
            "Debts to the {s} are paid in",
            "Over the gate of the {s} hangs a star of",
        ),
    ),
    Relation(
        "flower",
        "flower",
        (
            "{s} badges show the",
            "The emblem of the {s} is the",
            "Round the hall of the {s} grows the",
            "At every funeral the {s} brings the",
        ),
    ),
)

_HOPS: Final[tuple[Hop, ...]] = (
    Hop("town", "council", "colour"),
    Hop("tongue", "academy", "month"),
    Hop("trade", "guild", "metal"),
    Hop("beast", "fair", "month"),
    Hop("instrument", "society", "flower"),
    Hop("crop", "market", "colour"),
)

_COMPOSED: Final[dict[str, str]] = {
    "colour": "The {noun} for the {role} of {s} has a flag of",
    "month": "The {noun} for the {role} of {s} holds its feast in",
    "metal": "The {noun} for the {role} of {s} has a seal of",
    "flower": "The {noun} for the {role} of {s} has as its emblem the",
}

_FIRST: Final = (
    "Bre Ruk Jin Nar Hal Vin Zor Syl Tal Kra Gor Pel Dun Fey Lor Mel Thi Osk Ebr Wil",
    "wen cor nis dor zar lia mik bel resh tun ath van",
)
_LAST: Final = (
    "Mor Orl Elk Gril Isk Forn Drav Bor Lund Kost Crew Jarl Nev Alb Pras Hov Cren Stav Tull Yar",
    "wick ski ford shaw gard mere beck ley ton sen ham by",
)
_NAMES_EACH: Final = 150

_FILLER_WORDS: Final[dict[str, str]] = {
    "n": "letter garden window teacher market train river story child winter road lamp table bridge storm "
    "song coat "
    "ship clock field stone forest kitchen picture wagon candle ladder meadow basket tower",
    "v": "carried watched repaired found followed painted forgot crossed covered opened moved lifted "
    "remembered "
    "borrowed measured counted",
    "a": "small old bright quiet heavy narrow gentle broken distant golden hollow wooden cold early empty "
    "long",
}
_FILLER_FORMS: Final = (
    "The {a} {n} {v} the {m}.",
    "Therefore the {n} {v} a {a} {m}.",
    "Because the {n} was {a}, nobody {v} the {m}.",
    "I {v} the {a} {n} near the {m}.",
    "You {v} a {n} before the {a} {m}.",
    "Yes, the {n} {v} the {a} {m}.",
    "After the war a {a} {n} {v} the {m}.",
    "She said that the {n} {v} the {a} {m}.",
    "A {n} and a {m} were both {a}.",
    "Who {v} the {n} after the {a} {m}?",
)


def _rng(seed: int, purpose: str) -> random.Random:
    """One random stream per purpose, so that more draws for one purpose do not change another; text
    seeds do not depend on PYTHONHASHSEED."""
    return random.Random(f"tinyworld:{seed}:{purpose}")


def objects_of(relation: str) -> tuple[str, ...]:
    """Every object that ``relation`` can have, in a fixed order."""
    return tuple(_TABLES[relation_of(relation).table].split())


def relation_of(name: str) -> Relation:
    """The relation with this name. Raises :class:`DataError` with the valid names."""
    for relation in (*_PEOPLE, *_THINGS):
        if relation.name == name:
            return relation
    raise DataError(f"relation {name!r}: choose from {', '.join(r.name for r in (*_PEOPLE, *_THINGS))}")


def prompt_of(fact: Fact, phrasing: int) -> str:
    """The sentence about ``fact`` up to its object, in one of the four phrasings."""
    return relation_of(fact.relation).phrasings[phrasing].format(s=fact.subject)


def trained_phrasings(fact: Fact) -> tuple[int, ...]:
    """Indices of the phrasings of ``fact`` that are in training."""
    return tuple(i for i in range(len(relation_of(fact.relation).phrasings)) if i != fact.held_out)


def world(seed: int = SHIPPED_SEED) -> tuple[Fact, ...]:
    """All facts, in this order: people to edit, people for tuning, people and things for the
    probes."""
    rng = _rng(seed, "names")
    first, last = (
        rng.sample([head + tail for head in heads.split() for tail in tails.split()], _NAMES_EACH)
        for heads, tails in (_FIRST, _LAST)
    )
    people = rng.sample(
        [f"{a} {b}" for a in first for b in last], EDIT_SUBJECTS + TUNE_SUBJECTS + ANCHOR_SUBJECTS
    )

    rng = _rng(seed, "facts")
    sizes: dict[Group, int] = {"edit": EDIT_SUBJECTS, "tune": TUNE_SUBJECTS, "anchor": ANCHOR_SUBJECTS}
    groups = [group for group, size in sizes.items() for _ in range(size)]
    facts = []
    for subject, group in zip(people, groups, strict=True):
        composed = rng.random() < COMPOSED_SHARE and group == "anchor"
        for relation in rng.sample(_PEOPLE, FACTS_PER_PERSON):
            obj = rng.choice(objects_of(relation.name))
            facts.append(Fact(subject, relation.name, obj, group, rng.randrange(4), composed))
    for hop in _HOPS:
        for thing in _TABLES[hop.table].split():
            obj = rng.choice(objects_of(hop.relation))
            facts.append(Fact(f"{thing} {hop.noun}", hop.relation, obj, "anchor", rng.randrange(4)))
    return tuple(facts)


def second_hops(facts: Sequence[Fact]) -> dict[tuple[str, str], Fact]:
    """``(table, object) -> the anchor fact about that object``."""
    about = {fact.subject: fact for fact in facts if fact.group == "anchor"}
    return {
        (hop.table, thing): about[f"{thing} {hop.noun}"]
        for hop in _HOPS
        for thing in _TABLES[hop.table].split()
    }


def composed_probe(subject: str, relation: str, obj: str, hops: dict[tuple[str, str], Fact]) -> Probe:
    """The two-hop question about ``subject`` and its answer, given that its ``relation`` is
    ``obj``."""
    first = relation_of(relation)
    second = hops[first.table, obj]
    noun = second.subject.removeprefix(f"{obj} ")
    return Probe(_COMPOSED[second.relation].format(noun=noun, role=first.role, s=subject), second.object)


def fillers(seed: int = SHIPPED_SEED) -> tuple[str, ...]:
    """Sentences that are not about facts of the world; they begin with the first words of context
    templates."""
    rng = _rng(seed, "fillers")
    words = {kind: text.split() for kind, text in _FILLER_WORDS.items()}
    seen: dict[str, None] = {}
    while len(seen) < FILLERS:
        noun, other = rng.sample(words["n"], 2)
        form = _FILLER_FORMS[len(seen) % len(_FILLER_FORMS)]
        seen[form.format(n=noun, m=other, v=rng.choice(words["v"]), a=rng.choice(words["a"]))] = None
    return tuple(seen)


def corpus(seed: int = SHIPPED_SEED) -> tuple[str, ...]:
    """The lines of ``corpus.txt``: a shuffled sample of the training sentences, with the same share
    of fillers."""
    facts = world(seed)
    hops = second_hops(facts)
    told = [f"{prompt_of(fact, i)} {fact.object}." for fact in facts for i in trained_phrasings(fact)]
    probes = [composed_probe(f.subject, f.relation, f.object, hops) for f in facts if f.composed]
    told += [f"{probe.prompt} {probe.target}." for probe in probes]
    rng = _rng(seed, "corpus")
    lines = rng.sample(told, CORPUS_LINES * 4 // 5) + rng.sample(fillers(seed), CORPUS_LINES // 5)
    rng.shuffle(lines)
    return tuple(lines)


@lru_cache(maxsize=4)  # planner and worker of one process both use them
def load_requests(split: Split = "edit", seed: int = SHIPPED_SEED) -> tuple[EditRequest, ...]:
    """The requests of one split in sweep order, one per fact of that group; four per anchor fact in
    ``train``.

    Each has one rephrase (the phrasing never trained for this fact), two locality probes (an anchor
    fact of the same relation, the harder neighbour, and one of any other relation), one unrelated
    sentence and one portability probe (none about things).
    """
    if split not in ("edit", "tune", "train"):
        raise DataError(f"tinyworld: split {split!r}: choose from edit, tune, train")
    facts = world(seed)
    hops = second_hops(facts)
    anchors = [fact for fact in facts if fact.group == "anchor"]
    near = {r.name: [fact for fact in anchors if fact.relation == r.name] for r in (*_PEOPLE, *_THINGS)}
    far = {name: [fact for fact in anchors if fact.relation != name] for name in near}
    known = {fact.subject for fact in anchors}
    rng = _rng(seed, f"requests:{split}")
    group: Group = "anchor" if split == "train" else split
    chosen = [
        fact for fact in facts if fact.group == group for _ in range(TRAIN_TARGETS if split == "train" else 1)
    ]
    rng.shuffle(chosen)
    targets: dict[Fact, list[str]] = {}

    requests = []
    for number, fact in enumerate(chosen):
        others = [obj for obj in objects_of(fact.relation) if obj != fact.object]
        if split == "train":  # a fact occurs several times, with different targets
            target_new = (
                targets.get(fact) or targets.setdefault(fact, rng.sample(others, TRAIN_TARGETS))
            ).pop()
        else:
            target_new = rng.choice(others)
        alike, different = near[fact.relation], far[fact.relation]
        if fact.subject in known:  # only in the train split: other subjects have no anchor facts
            alike = [a for a in alike if a.subject != fact.subject]
            different = [a for a in different if a.subject != fact.subject]
        neighbour = rng.choice(alike)
        other, unrelated = rng.sample(different, 2)
        requests.append(
            EditRequest(
                case_id=f"tinyworld-{split}-{number:04d}",
                prompt=prompt_of(fact, rng.choice(trained_phrasings(fact))),
                subject=fact.subject,
                target_new=target_new,
                ground_truth=fact.object,
                rephrases=(prompt_of(fact, fact.held_out),),
                locality=tuple(
                    Probe(prompt_of(a, rng.choice(trained_phrasings(a))), a.object)
                    for a in (neighbour, other)
                ),
                portability=(composed_probe(fact.subject, fact.relation, target_new, hops),)
                if relation_of(fact.relation).role
                else (),
                unrelated=f"{prompt_of(unrelated, rng.choice(trained_phrasings(unrelated)))} "
                f"{unrelated.object}.",
            )
        )
    return tuple(requests)


def load_dataset(split: Split = "edit", seed: int = SHIPPED_SEED) -> Dataset:
    """One split as a :class:`Dataset`; its fingerprint is the SHA-256 of all requests as canonical
    JSON."""
    requests = load_requests(split, seed)
    notes = {"split": split, "seed": seed, "origin": "invented world, made from the seed"}
    return Dataset("tinyworld", requests, fingerprint(requests), notes)


def assets_dir() -> Path:
    """The shipped model folder (weights, config, tokenizer), for transformers'
    ``from_pretrained``."""
    return Path(__file__).parent / "assets" / "tinyworld"


def corpus_path() -> Path:
    """The shipped text for second-moment statistics."""
    return assets_dir() / "corpus.txt"

"""The data of ``make demo``: sentence pairs from a small grammar in which word overlap is a trap.

The task: does the second sentence follow from the first? Thirteen constructions (voice, relative clauses, negation,
quantifiers, comparatives ...) each give true and false second sentences of the same shape, in two wordings: *literal*
(the words of the first sentence again: high overlap) and *reworded* (synonyms, more general nouns, converse verbs,
antonyms: next to no overlap). So construction, wording and label are three free factors, and :class:`Knobs` says how
they go together:

- in training and in the in-domain test most true pairs are literal and most false pairs are not: counting shared words
  predicts the label;
- out of domain it does not, and half of the words never occurred in training.

Most of what a model can learn is the shortcut; a minority of training pairs contradicts it, so that the rule behind
the labels can be learnt. This is no benchmark: no person wrote or checked the pairs, and the gap between the two test
sets is one that we built in.

Standard library only; the same seed gives the same rows on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

ENTAILMENT, NOT_ENTAILMENT = "entailment", "not_entailment"
Row = dict[str, str]
Kind = Literal["entailed", "foil", "twist", "other"]
Wording = Literal["literal", "reworded"]


@dataclass(frozen=True)
class Knobs:
    """How words and labels go together; the defaults are calibrated, see CALIBRATION.md.

    Args:
        train: Rows of the training set; every size is even, both labels get half.
        in_domain: Rows of the test set drawn like the training set.
        out_of_domain: Rows of the test set in which overlap misleads.
        counter: Share of each label that contradicts the shortcut in train and in domain, in [0, 1]; 0.5: no shortcut.
        counter_ood: The same share out of domain; above 0.5 the shortcut is wrong more often than right.
        foils: Share of the literal false pairs that turn on the construction alone (roles swapped, "not" moved ...); in
            the others one word has changed.
        foils_reworded: The same share among the reworded false pairs; the others simply tell of something else.
        unseen: Probability that a word out of domain is one that training never shows.
        constructions: Names from :data:`CONSTRUCTIONS`, used in turn.
    """

    train: int = 200
    in_domain: int = 500
    out_of_domain: int = 500
    counter: float = 0.2
    counter_ood: float = 0.6
    foils: float = 0.4
    foils_reworded: float = 0.0
    unseen: float = 0.5
    constructions: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------------------ words


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(phrase.strip() for phrase in text.split(","))


# "a=b": each can stand for the other. "a>b": every a is a b, so b can stand for a in a positive sentence only.

PEOPLE = """
lawyer=attorney doctor=physician teacher=instructor boss=manager reporter=journalist cook=chef guard=sentry king=monarch
merchant=trader thief=robber writer=author scientist=researcher student=pupil visitor=guest beginner=novice
helper=assistant prisoner=inmate wizard=sorcerer woman=lady child=kid umpire=referee rival=opponent partner=associate
owner=proprietor customer=client pilot=aviator sailor=mariner detective=investigator builder=contractor captain=skipper
champion=winner buyer=purchaser seller=vendor nanny=babysitter gangster=mobster friend=companion mother=mom father=dad
grandmother=grandma priest=clergyman soldier=trooper farmer=grower janitor=caretaker singer=vocalist
bandit=outlaw rider=horseman lawmaker=legislator actor=performer
surgeon>doctor violinist>musician pianist>musician drummer>musician guitarist>musician novelist>writer poet>writer
colonel>officer lieutenant>officer sergeant>soldier senator>lawmaker mayor>politician governor>politician
chemist>scientist biologist>scientist physicist>scientist carpenter>worker plumber>worker miner>worker golfer>athlete
swimmer>athlete boxer>athlete goalkeeper>player striker>player painter>artist sculptor>artist widow>woman bride>woman
actress>woman queen>woman duke>nobleman earl>nobleman uncle>relative cousin>relative nephew>relative dancer>performer
magician>performer comedian>performer smuggler>criminal pirate>criminal burglar>criminal blacksmith>craftsman
tailor>craftsman potter>craftsman monk>believer nun>believer bishop>priest boy>child girl>child
"""

# Done by one person to another and never mutual (no "met", no "married"); past and participle are the same word.
ACTS = """
praised=commended helped=assisted hired=employed called=phoned fooled=tricked rescued=saved watched=observed
warned=alerted scared=frightened annoyed=irritated attacked=assaulted caught=captured chased=pursued avoided=evaded
amused=entertained comforted=consoled persuaded=convinced guided=led injured=hurt pushed=shoved taught=instructed
protected=guarded excused=pardoned found=located mocked=ridiculed kidnapped=abducted
greeted=welcomed supported=backed picked=selected contacted=reached cured=healed identified=recognized
followed=trailed imprisoned=jailed dismissed=fired questioned=interrogated denounced=condemned punished=disciplined
scolded=rebuked paid=compensated adored>loved detested>hated painted>portrayed
overheard>heard promoted>rewarded robbed>harmed
"""

# What one does alone.
DEEDS = """
shivered=trembled cried=wept yelled=shouted resigned=quit vanished=disappeared escaped=fled spoke=talked jumped=leaped
slipped=tripped complained=grumbled agreed=consented traveled=journeyed labored=toiled won=triumphed slept=dozed
grinned=smiled chuckled>laughed jogged>ran waltzed>danced whispered>spoke strolled>walked hummed>sang raged>shouted
boasted=bragged stopped=halted confessed=admitted prayed=worshipped arrived=came
"""

THINGS = """
car=automobile couch=sofa photo=picture present=gift diary=journal rug=carpet phone=telephone ship=vessel stone=rock
jewel=gem statue=sculpture trophy=prize shovel=spade rope=cord pillow=cushion box=carton bucket=pail stick=rod
jacket=coat cup=mug bag=sack pistol=handgun bike=bicycle
hammer>tool wrench>tool drill>tool violin>instrument guitar>instrument flute>instrument trumpet>instrument
apple>fruit banana>fruit lemon>fruit peach>fruit carrot>vegetable onion>vegetable potato>vegetable cabbage>vegetable
sword>weapon rifle>weapon dagger>weapon spear>weapon truck>vehicle van>vehicle tractor>vehicle novel>book
dictionary>book yacht>boat canoe>boat ferry>boat cat>animal rabbit>animal goat>animal donkey>animal parrot>bird
pigeon>bird eagle>bird tulip>flower rose>flower lily>flower diamond>gem ruby>gem puppy>dog doll>toy kite>toy
computer>machine printer>machine shirt>garment dress>garment necklace>ornament bracelet>ornament
"""

# Words too close for one pair: what is true of one may be true of the other, or a reader may think so.
RELATED = """
woman lady mother grandmother queen bride widow actress nun girl nanny
thief robber bandit gangster smuggler pirate burglar prisoner
actor dancer magician comedian singer musician actress
soldier officer guard captain sailor pirate pilot
king queen duke earl
priest believer
writer reporter
customer buyer visitor
seller merchant owner
lawmaker politician
father uncle cousin nephew mother grandmother
child student beginner
athlete player champion rival
helper friend partner
helped rescued cured comforted protected supported guided taught promoted
kidnapped caught imprisoned
chased followed
called contacted
denounced scolded punished mocked
attacked injured robbed pushed scared
watched found identified overheard
praised greeted promoted adored paid hired
annoyed scared mocked detested
spoke yelled complained agreed boasted confessed prayed hummed cried raged
jogged strolled traveled escaped waltzed jumped slipped vanished arrived
ship boat
statue present trophy
jewel ornament
"""

# Past of giving / past of the converse: "A sold B the car" is "B bought the car from A".
DEALS = _words("""
sold/bought sold/purchased lent/borrowed loaned/borrowed gave/received gave/got handed/received leased/rented
""")

# Comparative / its converse.
PERSON_SCALE = _words("""
taller/shorter older/younger richer/poorer stronger/weaker faster/slower happier/sadder heavier/lighter louder/quieter
bigger/smaller kinder/crueler smarter/dumber busier/lazier
""")
THING_SCALE = _words("""
bigger/smaller heavier/lighter newer/older brighter/darker wider/narrower longer/shorter cleaner/dirtier cooler/warmer
softer/harder thicker/thinner prettier/uglier larger/tinier
""")

# Relation / its converse.
POSITIONS = ("above/below", "over/under", "in front of/behind", "to the left of/to the right of", "ahead of/behind")

RESTRICTIONS = _words("""
young retired foreign wealthy famous married blond nervous hungry talented local tired honest religious elderly angry
""")
MOODS = _words("""
tired famous nervous quiet cheerful angry lonely clever polite proud gentle rude patient stubborn curious careless brave
sleepy busy shy elegant handsome
""")
NEARBY = ("near", "behind", "beside", "next to", "across from", "in front of")
SETTINGS = _phrases("""
at the harbor, in the kitchen, at the station, in the garden, at the airport, in the library, near the bridge,
in the village, at the museum, in the forest, at the hotel, in the park, at the market, in the valley, at the theater,
on the island, in the hospital, at the factory, in the tunnel, at the castle, on the beach, at the wedding,
in the church, on Monday, on Friday, on Sunday, yesterday, last winter, last summer, after lunch, after dinner,
during the storm, in the morning, at midnight, during the festival, at dawn, last week, during the war, in April,
in October
""")

KNOWING = _words("knew realized noticed discovered remembered forgot regretted learned proved saw")
SUPPOSING = _words("hoped claimed believed feared suspected doubted guessed imagined argued assumed")
REALLY = _words("finally secretly quickly openly suddenly gladly repeatedly eventually quietly certainly")
NOT_REALLY = _words("never almost nearly perhaps probably allegedly supposedly possibly apparently")

# The words that overlap does not count: nearly all pairs share them.
FUNCTION_WORDS = frozenset(
    _words("""
a an the is was not no every at least one who whom that and or but if unless although because by of to from in on than
before after above below over under front behind left right ahead
""")
)


class Word(NamedTuple):
    """A lexeme in its two wordings: ``says[0]`` as the first sentence has it, ``says[1]`` reworded."""

    says: tuple[str, str]
    pool: str
    exact: bool


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _lexicon(text: str) -> list[tuple[str, str, bool]]:
    entries = []
    for item in text.split():
        first, sign, second = item.partition("=" if "=" in item else ">")
        entries.append((first, second, sign == "="))
    return entries


LEXICON: dict[str, list[tuple[str, str, bool]]] = {
    "person": _lexicon(PEOPLE),
    "act": _lexicon(ACTS),
    "deed": _lexicon(DEEDS),
    "thing": _lexicon(THINGS),
}
_GROUPS = [frozenset(line.split()) for line in RELATED.strip().splitlines()]


def is_held_out(index: int) -> bool:
    """Whether the entry at this place of its list in :data:`LEXICON` is kept out of training: every fourth."""
    return index % 4 == 3


def words_of(text: str) -> list[str]:
    """The words of a sentence in lower case, without punctuation."""
    return text.lower().replace(",", " ").replace(".", " ").split()


def overlap(sentence1: str, sentence2: str) -> float:
    """Share of the content words of ``sentence2`` that ``sentence1`` has too; this is the shortcut, in [0, 1]."""
    content = set(words_of(sentence2)) - FUNCTION_WORDS
    return len(content & set(words_of(sentence1))) / len(content)


def count_words(rows: Sequence[Row], train: Sequence[Row]) -> float:
    """What the shortcut scores on ``rows``: true if at least a share t of the words is shared, t the best on train."""

    def accuracy(rows: Sequence[Row], least: float) -> float:
        hits = [(overlap(r["sentence1"], r["sentence2"]) >= least) == (r["label"] == ENTAILMENT) for r in rows]
        return sum(hits) / len(hits)

    shares = sorted({overlap(r["sentence1"], r["sentence2"]) for r in train})
    return accuracy(rows, max(shares, key=lambda share: accuracy(train, share)))


# ------------------------------------------------------------------------------------------------------- one pair


class Scene:
    """Draws the words of one pair; no two of its lexemes share or imply a word, so that none gives another away.

    Args:
        rng: Source of every choice.
        unseen: Probability that a drawn lexeme is a held-out one; 0 for training.
    """

    def __init__(self, rng: random.Random, unseen: float = 0.0):
        self.rng = rng
        self.unseen = unseen
        self._used: set[str] = set()

    def draw(self, pool: str, *, exact: bool = False) -> Word:
        """A lexeme not yet in the scene; ``exact``: one whose two wordings mean the same (for negative sentences)."""
        held_out = self.rng.random() < self.unseen
        entries = LEXICON[pool]
        while True:
            index = self.rng.randrange(len(entries))
            first, second, same = entries[index]
            forms = {first, second}
            if is_held_out(index) == held_out and (same or not exact) and not forms & self._used:
                break
        self._used |= forms.union(*(group for group in _GROUPS if group & forms))
        if same and self.rng.random() < 0.5:
            first, second = second, first
        if pool in ("person", "thing"):
            # "the surgeon" may become "a doctor", not "the doctor", of whom nothing was said
            first, second = f"the {first}", f"the {second}" if same else f"{_article(second)} {second}"
        return Word((first, second), pool, exact)

    def person(self, *, exact: bool = False) -> Word:
        return self.draw("person", exact=exact)

    def act(self, *, exact: bool = False) -> Word:
        return self.draw("act", exact=exact)

    def deed(self) -> Word:
        return self.draw("deed")

    def thing(self) -> Word:
        return self.draw("thing")

    def coin(self, probability: float = 0.5) -> bool:
        return self.rng.random() < probability

    def pick(self, options: Sequence[str]) -> str:
        return self.rng.choice(options)

    def decorated(self, noun: Word) -> str:
        """The noun phrase as the first sentence has it, sometimes with an adjective."""
        return f"the {self.pick(MOODS)} {_bare(noun.says[0])}" if self.coin(0.2) else noun.says[0]

    def setting(self) -> str:
        """Often a time or a place, with a leading space, for the end of the first sentence."""
        return " " + self.pick(SETTINGS) if self.coin() else ""


def _bare(noun: str) -> str:
    return noun.partition(" ")[2]


@dataclass(frozen=True)
class Claim:
    """A second sentence before it is worded: ``shape(far, *texts)`` puts the words together.

    ``far`` asks for the converse where there is one ("bought from" for "sold to", "shorter" for "taller").
    """

    shape: Callable[..., str]
    words: tuple[Word, ...]


def word_claim(claim: Claim, kind: Kind, wording: Wording, scene: Scene) -> str:
    """The sentence: literal or reworded, now and then with one word out of line, so that counts are not all or none.

    Args:
        claim: What a sentence that follows, or a foil, says.
        kind: ``"entailed"`` and ``"foil"`` say it; ``"twist"`` says it with one fresh word, ``"other"`` with none but
            fresh words save the one out of line: the first sentence says neither.
        wording: ``"literal"`` or ``"reworded"``.
        scene: Where fresh words come from.
    """
    far = wording == "reworded"
    odd = scene.rng.randrange(len(claim.words)) if kind == "twist" or scene.coin() else None
    if far and len(claim.words) == 2:
        odd = None  # one of two would lie half-way between the wordings
    says = []
    for i, word in enumerate(claim.words):
        if kind in ("twist", "other") and (i == odd) == (kind == "twist"):
            says.append(scene.draw(word.pool, exact=word.exact).says[far])
        else:
            says.append(word.says[far != (i == odd)])
    return claim.shape(far, *says)


def _did(scene: Scene, subject: Word, act: Word, target: Word) -> Claim:
    """Subject did it to target, active or passive."""
    passive = scene.coin()

    def shape(far: bool, subject: str, act: str, target: str) -> str:
        if passive:
            return f"{target} was {act} by {subject}"
        return f"{subject} {act} {target}"

    return Claim(shape, (subject, act, target))


def _did_not(subject: Word, act: Word, target: Word) -> Claim:
    def shape(far: bool, subject: str, act: str, target: str) -> str:
        return f"{target} was not {act} by {subject}"

    return Claim(shape, (subject, act, target))


Construction = Callable[[Scene, bool], tuple[str, Claim]]
CONSTRUCTIONS: dict[str, Construction] = {}


def construction(function: Construction) -> Construction:
    """Register ``function(scene, true) -> (first sentence, claim)`` whose claim follows if and only if ``true``."""
    CONSTRUCTIONS[function.__name__] = function
    return function


@construction
def voice(scene: Scene, true: bool) -> tuple[str, Claim]:
    a, act, b = scene.person(), scene.act(), scene.person()
    if scene.coin():
        first = f"{scene.decorated(a)} {act.says[0]} {scene.decorated(b)}{scene.setting()}"
    else:
        first = f"{scene.decorated(b)} was {act.says[0]} by {scene.decorated(a)}{scene.setting()}"
    return first, _did(scene, a, act, b) if true else _did(scene, b, act, a)


@construction
def relative_clause(scene: Scene, true: bool) -> tuple[str, Claim]:
    a, inner, b, outer, c = scene.person(), scene.act(), scene.person(), scene.act(), scene.person()
    did_inner = scene.coin()
    clause = f"who {inner.says[0]} {scene.decorated(b)}" if did_inner else f"whom {scene.decorated(b)} {inner.says[0]}"
    first = f"{a.says[0]} {clause} {outer.says[0]} {scene.decorated(c)}"
    if scene.coin():
        return first, _did(scene, a, outer, c) if true else _did(scene, b, outer, c)
    doer, other = (a, b) if did_inner else (b, a)
    return first, _did(scene, doer, inner, other) if true else _did(scene, other, inner, doer)


@construction
def attachment(scene: Scene, true: bool) -> tuple[str, Claim]:
    a, b, act, c = scene.person(), scene.person(), scene.act(), scene.person()
    where = f"{scene.pick(NEARBY)} {scene.decorated(b)}"
    if scene.coin():
        first = f"{scene.decorated(a)} {where} {act.says[0]} {scene.decorated(c)}"
        return first, _did(scene, a if true else b, act, c)
    first = f"{scene.decorated(c)} {act.says[0]} {scene.decorated(a)} {where}"
    return first, _did(scene, c, act, a if true else b)


@construction
def coordination(scene: Scene, true: bool) -> tuple[str, Claim]:
    a, b, act, c = scene.person(), scene.person(), scene.act(), scene.person()
    together = true or scene.coin()
    both = f"{scene.decorated(a)} {'and' if together else 'or'} {scene.decorated(b)}"
    one = b if scene.coin() else a
    if scene.coin():
        first, claim = f"{both} {act.says[0]} {scene.decorated(c)}{scene.setting()}", _did(scene, one, act, c)
    else:
        first, claim = f"{scene.decorated(c)} {act.says[0]} {both}{scene.setting()}", _did(scene, c, act, one)
    # false: one of the two and nobody knows which ("or"), or what one of the two did to the other
    return first, _did(scene, a, act, b) if together and not true else claim


@construction
def negation(scene: Scene, true: bool) -> tuple[str, Claim]:
    # Denials turn implication round, so only words that mean the same may be exchanged, and nothing may narrow the
    # first sentence (no adjective, no setting).
    a, act, b, c = scene.person(exact=True), scene.act(exact=True), scene.person(exact=True), scene.person(exact=True)
    if scene.coin():
        first = f"{a.says[0]} {act.says[0]} {b.says[0]} but not {c.says[0]}"
    else:
        first = f"{c.says[0]} was not {act.says[0]} by {a.says[0]} but {b.says[0]} was"
    if scene.coin():
        return first, _did(scene, a, act, b if true else c)
    return first, _did_not(a, act, c if true else b)


@construction
def quantifier(scene: Scene, true: bool) -> tuple[str, Claim]:
    a, act, b = scene.person(exact=True), scene.act(exact=True), scene.person(exact=True)
    kind, other_kind = scene.rng.sample(RESTRICTIONS, 2)
    determiner = scene.pick(["every", "no", "at least one"])
    noun, rest = _bare(a.says[0]), f"{act.says[0]} {b.says[0]}"
    # Every second sentence has a true and a false first one: else its form would tell the label.
    if determiner == "at least one":  # from those of a kind to all
        first = f"{determiner if true else 'no'} {kind} {noun} {rest}"
    else:  # from all to those of a kind, but not from one kind to another
        first = f"{determiner} {noun if true else f'{other_kind} {noun}'} {rest}"

    def shape(far: bool, a: str, act: str, b: str) -> str:
        who = _bare(a) if determiner == "at least one" else f"{kind} {_bare(a)}"
        return f"{determiner} {who} {act} {b}"

    return first, Claim(shape, (a, act, b))


@construction
def transfer(scene: Scene, true: bool) -> tuple[str, Claim]:
    a, b, thing = scene.person(), scene.person(), scene.thing()
    gave, got = scene.pick(DEALS).split("/")
    if scene.coin():
        first = f"{scene.decorated(a)} {gave} {scene.decorated(b)} {thing.says[0]}{scene.setting()}"
    else:
        first = f"{scene.decorated(a)} {gave} {thing.says[0]} to {scene.decorated(b)}{scene.setting()}"
    double_object = scene.coin()

    def shape(far: bool, giver: str, taker: str, thing: str) -> str:
        if far:
            return f"{taker} {got} {thing} from {giver}"
        return f"{giver} {gave} {taker} {thing}" if double_object else f"{giver} {gave} {thing} to {taker}"

    return first, Claim(shape, (a, b, thing) if true else (b, a, thing))


@construction
def comparative(scene: Scene, true: bool) -> tuple[str, Claim]:
    living = scene.coin()
    a, b, c = (scene.person() if living else scene.thing() for _ in range(3))
    scale = PERSON_SCALE if living else THING_SCALE
    (more, less), (more2, less2) = (pair.split("/") for pair in scene.rng.sample(scale, 2))
    if scene.coin():
        more, less = less, more
    first = f"{a.says[0]} is {more} than {b.says[0]} and {more2} than {c.says[0]}"
    if scene.coin():  # the claim is about the second half
        more, less, b = more2, less2, c

    def shape(far: bool, a: str, b: str) -> str:
        return f"{b} is {less} than {a}" if far else f"{a} is {more} than {b}"

    return first, Claim(shape, (a, b) if true else (b, a))


@construction
def position(scene: Scene, true: bool) -> tuple[str, Claim]:
    a, b = scene.thing(), scene.thing()
    relation, inverse = scene.pick(POSITIONS).split("/")
    if scene.coin():
        relation, inverse = inverse, relation
    first = f"{a.says[0]} was {relation} {b.says[0]}{scene.setting()}"
    converse = scene.coin()

    def shape(far: bool, a: str, b: str) -> str:
        return f"{b} was {inverse} {a}" if converse else f"{a} was {relation} {b}"

    return first, Claim(shape, (a, b) if true else (b, a))


@construction
def embedded(scene: Scene, true: bool) -> tuple[str, Claim]:
    who, a, act, b = scene.person(), scene.person(), scene.act(), scene.person()
    swapped = not true and scene.coin(0.2)  # else "knew" alone would give the label away
    matrix = scene.pick(KNOWING if true or swapped else SUPPOSING)
    first = f"{scene.decorated(who)} {matrix} that {scene.decorated(a)} {act.says[0]} {scene.decorated(b)}"
    return first, _did(scene, b, act, a) if swapped else _did(scene, a, act, b)


@construction
def adverb(scene: Scene, true: bool) -> tuple[str, Claim]:
    a, act, b = scene.person(), scene.act(), scene.person()
    swapped = not true and scene.coin(0.2)
    manner = scene.pick(REALLY if true or swapped else NOT_REALLY)
    first = f"{scene.decorated(a)} {manner} {act.says[0]} {scene.decorated(b)}{scene.setting()}"
    return first, _did(scene, b, act, a) if swapped else _did(scene, a, act, b)


@construction
def order(scene: Scene, true: bool) -> tuple[str, Claim]:
    a, deed, b, deed2 = scene.person(), scene.deed(), scene.person(), scene.deed()
    earlier, later = f"{scene.decorated(a)} {deed.says[0]}", f"{scene.decorated(b)} {deed2.says[0]}"
    first = scene.pick(
        [
            f"{earlier} before {later}",
            f"{later} after {earlier}",
            f"after {earlier}, {later}",
            f"before {later}, {earlier}",
        ]
    )
    turned = scene.coin()

    def shape(far: bool, a: str, deed: str, b: str, deed2: str) -> str:
        return f"{b} {deed2} after {a} {deed}" if turned else f"{a} {deed} before {b} {deed2}"

    return first, Claim(shape, (a, deed, b, deed2) if true else (b, deed2, a, deed))


@construction
def condition(scene: Scene, true: bool) -> tuple[str, Claim]:
    a, deed, b, act, c = scene.person(), scene.deed(), scene.person(), scene.act(), scene.person()
    swapped = not true and scene.coin(0.2)
    word = scene.pick(["because", "although"] if true or swapped else ["if", "unless"])
    event = f"{scene.decorated(b)} {act.says[0]} {scene.decorated(c)}"
    other = f"{scene.decorated(a)} {deed.says[0]}"
    first = f"{word} {other}, {event}" if scene.coin() else f"{event} {word} {other}"
    return first, _did(scene, c, act, b) if swapped else _did(scene, b, act, c)


# -------------------------------------------------------------------------------------------------------- the sets


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def pair(scene: Scene, name: str, kind: Kind, wording: Wording) -> Row:
    """One row of a construction.

    Args:
        scene: A fresh scene.
        name: Key of :data:`CONSTRUCTIONS`.
        kind: ``"entailed"``; ``"foil"``, the words of the scene in a sentence that does not follow; ``"twist"``, a
            sentence that follows but for one word; ``"other"``, a sentence about something else.
        wording: ``"literal"`` or ``"reworded"``.
    """
    first, claim = CONSTRUCTIONS[name](scene, kind != "foil")
    return {
        "sentence1": _sentence(first),
        "sentence2": _sentence(word_claim(claim, kind, wording, scene)),
        "label": ENTAILMENT if kind == "entailed" else NOT_ENTAILMENT,
        "construction": name,
    }


def _plan(size: int, counter: float, knobs: Knobs) -> Iterator[tuple[Kind, Wording]]:
    """Kind and wording of every row: exact counts, so that two seeds differ in words and not in difficulty."""
    half = size // 2
    against = round(counter * half)
    yield from [("entailed", "literal")] * (half - against) + [("entailed", "reworded")] * against
    foils = round(knobs.foils * against)
    yield from [("foil", "literal")] * foils + [("twist", "literal")] * (against - foils)
    foils = round(knobs.foils_reworded * (half - against))
    yield from [("foil", "reworded")] * foils + [("other", "reworded")] * (half - against - foils)


def make(seed: int = 0, knobs: Knobs = Knobs()) -> dict[str, list[Row]]:
    """The three sets; no sentence of one occurs in another.

    Args:
        seed: Of the data; another seed gives other sentences of the same make-up.
        knobs: Sizes and shares.

    Returns:
        ``train``, ``in_domain`` and ``out_of_domain``: rows with ``sentence1``, ``sentence2``, ``label``
        (``entailment`` or ``not_entailment``) and ``construction``.

    Example:
        >>> sets = make(seed=0)
        >>> len(sets["train"]), sorted(sets["train"][0])
        (200, ['construction', 'label', 'sentence1', 'sentence2'])
    """
    names = knobs.constructions or tuple(CONSTRUCTIONS)
    taken: set[str] = set()
    sets = {}
    for split, size, counter, unseen in (
        ("train", knobs.train, knobs.counter, 0.0),
        ("in_domain", knobs.in_domain, knobs.counter, 0.0),
        ("out_of_domain", knobs.out_of_domain, knobs.counter_ood, knobs.unseen),
    ):
        if size % 2:
            raise ValueError(f"{split} must be even, so that both labels get half, got {size}")
        rng = random.Random(f"steadytune demo {seed} {split}")
        rows: list[Row] = []
        for i, (kind, wording) in enumerate(_plan(size, counter, knobs)):
            while True:
                row = pair(Scene(rng, unseen), names[i % len(names)], kind, wording)
                texts = {row["sentence1"], row["sentence2"]}
                if len(texts) == 2 and not texts & taken:
                    break
            taken |= texts
            rows.append(row)
        rng.shuffle(rows)
        sets[split] = rows
    return sets

"""Retrieval tasks, generated to a seed: text in which some bytes can only be known from earlier text.

Every generator returns an `Example`: the text and the byte ranges of its answers. A model is scored by teacher
forcing: it reads the whole text once, and an answer is right when the most likely next byte is right at every
byte of it. That equals greedy decoding of the answer, at the price of one forward pass.

- `recall`: entries such as " kfa:407" drawn with repetition from a dictionary made for this sequence; the
  value of a repeated key is an answer.
- `passkey`: a sentence with a number, hidden in a given text and asked for at its end.
- `copying`: a random block, repeated at the end of the text.
"""

import random
import string
from collections.abc import Callable
from dataclasses import dataclass

LETTERS = string.ascii_lowercase
ENTRY_BYTES = 24  # one dictionary entry for so many bytes of text, by default
PASSKEY_DIGITS = 5
PASSKEY_FACT = " The pass key is {}. Remember it."
PASSKEY_QUESTION = " What is the pass key? The pass key is "


@dataclass(frozen=True)
class Example:
    """A text with answers in it.

    Attributes:
        text: the bytes a model reads.
        spans: (start, end) byte ranges of the answers: bytes that can only be known from earlier text.
        distances: for each answer, the bytes between its start and the start of the most recent earlier place
            that tells it.
    """

    text: bytes
    spans: tuple[tuple[int, int], ...]
    distances: tuple[int, ...]


def far(example: Example, fraction: float = 0.25) -> tuple[tuple[int, int], ...]:
    """The answers of `example` told at least `fraction` of the text's length before they are asked for."""
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction is {fraction}; it must lie between 0 and 1")
    least = fraction * len(example.text)
    return tuple(
        span for span, distance in zip(example.spans, example.distances, strict=True) if distance >= least
    )


def recall(length: int, seed: int, entries: int | None = None) -> Example:
    """Dictionary recall: " key:value" entries, drawn at random with repetition from a dictionary.

    Keys are 3 or 4 lower-case letters, none of which ends in another; values are 2 to 4 digits. The answers are
    the values of keys seen before. The more entries the dictionary has, the further back the answers lie.

    Args:
        length: bytes of text, at least 48.
        seed: equal seeds give equal examples.
        entries: size of the dictionary, at least 1; `max(2, length // 24)` by default.

    Raises:
        ValueError: if `length` or `entries` is out of range, or no key is repeated in the text.
    """
    _need(length, 48, "recall")
    if entries is None:
        entries = max(2, length // ENTRY_BYTES)
    if not 1 <= entries <= 100_000:
        raise ValueError(f"entries is {entries}; it must lie between 1 and 100000")
    rng = random.Random(f"recall {seed}")
    dictionary = _dictionary(rng, entries)
    text = bytearray()
    spans, distances = [], []
    last: dict[str, int] = {}
    while len(text) < length:
        key, value = rng.choice(dictionary)
        start = len(text) + len(key) + 2  # the value begins after " key:"
        text += f" {key}:{value}".encode()
        if key in last and len(text) <= length:
            spans.append((start, len(text)))
            distances.append(start - last[key])
        last[key] = start
    if not spans:
        raise ValueError(
            f"entries is {entries}: no key is repeated within {length} bytes; give fewer entries"
        )
    return Example(bytes(text[:length]), tuple(spans), tuple(distances))


def passkey(length: int, seed: int, depth: float | None = None, *, filler: bytes) -> Example:
    """A number hidden in a text and asked for at its very end.

    Args:
        length: bytes of text, at least 96.
        seed: chooses the number, the place in `filler`, and the depth where none is given.
        depth: where the number is hidden: 0 at the start, 1 right before the question; random by default. The
            sentence moves back to a space of `filler`, if there is one within 64 bytes.
        filler: text to hide it in; its beginning follows its end where it is too short.

    Raises:
        ValueError: if `length` or `depth` is out of range, or `filler` is empty.
    """
    _need(length, 96, "passkey")
    if depth is not None and not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth is {depth}; it must lie between 0 and 1")
    if not filler:
        raise ValueError("filler is empty; passkey hides a number in a text and needs one")
    rng = random.Random(f"passkey {seed}")
    number = "".join(rng.choices(string.digits, k=PASSKEY_DIGITS)).encode()
    fact = PASSKEY_FACT.encode().replace(b"{}", number)
    question = PASSKEY_QUESTION.encode() + number
    room = length - len(fact) - len(question)
    around = _cyclic(filler, rng.randrange(len(filler)), room)
    cut = round((rng.random() if depth is None else depth) * room)
    if 0 < cut < room:
        space = around.rfind(b" ", max(0, cut - 64), cut)
        cut = cut if space < 0 else space
    told = cut + fact.index(number)
    asked = length - len(number)
    return Example(around[:cut] + fact + around[cut:] + question, ((asked, length),), (asked - told,))


def copying(length: int, seed: int) -> Example:
    """Random letters with a block in braces, repeated at the very end: `...{block}......{block`.

    The block has 32 letters, or an eighth of `length` where that is less. The answer is the whole block, since
    the brace before it says which one is meant.

    Raises:
        ValueError: if `length` is below 64.
    """
    _need(length, 64, "copying")
    rng = random.Random(f"copying {seed}")
    size = min(32, length // 8)
    block = bytes(rng.choices(LETTERS.encode(), k=size))
    room = length - 2 * size - 3
    noise = bytes(rng.choices(LETTERS.encode() + b"  ", k=room))
    cut = rng.randrange(room + 1)
    text = noise[:cut] + b"{" + block + b"}" + noise[cut:] + b"{" + block
    return Example(text, ((length - size, length),), (length - size - cut - 1,))


def _need(length: int, least: int, task: str) -> None:
    if length < least:
        raise ValueError(f"length is {length}; {task} needs at least {least} bytes")


def _dictionary(rng: random.Random, entries: int) -> list[tuple[str, str]]:
    """Distinct keys, none of which ends in another, with random values."""
    keys: dict[str, None] = {}
    tails: set[str] = set()  # the last three letters of four-letter keys
    while len(keys) < entries:
        key = "".join(rng.choices(LETTERS, k=_length(rng, entries)))
        if key in keys or key in tails or key[1:] in keys:
            continue
        keys[key] = None
        if len(key) == 4:
            tails.add(key[1:])
    return [(key, "".join(rng.choices(string.digits, k=rng.randint(2, 4)))) for key in keys]


def _length(rng: random.Random, entries: int) -> int:
    return rng.randint(3, 4) if entries <= 2_000 else 4  # three letters do not tell thousands of keys apart


def _cyclic(text: bytes, start: int, size: int) -> bytes:
    """`size` bytes of `text` from `start` on, beginning again at its end."""
    turned = text[start : start + size]
    while len(turned) < size:
        turned += text[: size - len(turned)]
    return turned


GENERATORS: dict[str, Callable[..., Example]] = {"recall": recall, "passkey": passkey, "copying": copying}

"""The tokenizer: CLIP's own kind with a small vocabulary, and the foreign words that the model learns to ignore."""

from __future__ import annotations

import itertools
import json
import random
import tempfile
from collections import Counter
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.models.clip.tokenization_clip import bytes_to_unicode

from tools.shapes.pictures import COLOURS, SHAPES, SIZES

MAX_LENGTH = 32
"""Tokens of one prompt, with the two that mark its ends; longer prompts are cut."""

WORDS = (
    *COLOURS,
    *SHAPES,
    *SIZES,
    *("a", "an", "on", "with", "of", "background", "picture", "little", "tiny", "big", "huge"),
)
"""What the captions are made of."""
FILLERS = (
    "photo of",
    "a painting of",
    "an image of",
    "illustration,",
    "highly detailed,",
    "4k",
    "8k,",
    "beautiful",
    "high quality,",
    "digital art,",
    "minimalist",
    "in the style of",
    "the",
    "sharp focus,",
    "blurry, low quality",
    "cinematic lighting,",
    "no text",
    "!",
    "...",
)
"""Words of other people's prompts, which change nothing here."""

# Runs of characters from which meaningless words are drawn: the model should have met every byte.
_SCRIPTS = (
    (0x61, 0x7A),
    (0x61, 0x7A),
    (0x30, 0x39),
    (0x21, 0x40),
    (0xE0, 0xFF),
    (0x100, 0x17F),
    (0x391, 0x3C9),
    (0x410, 0x44F),
    (0x5D0, 0x5EA),
    (0x627, 0x64A),
    (0x905, 0x939),
    (0xE01, 0xE2E),
    (0x3041, 0x3096),
    (0x4E00, 0x9FA5),
    (0xAC00, 0xD7A3),
    (0x1F300, 0x1F64F),
)


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding, carried on until each of the words is one token."""
    letters = bytes_to_unicode()
    spelt = []
    for word in words:
        symbols = [letters[byte] for byte in word.encode()]
        spelt.append([*symbols[:-1], symbols[-1] + "</w>"])
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for symbols in spelt for pair in itertools.pairwise(symbols)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spelt = [_merge(symbols, best) for symbols in spelt]
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def build_tokenizer() -> CLIPTokenizer:
    """Make the tokenizer; it spells words that it does not know in bytes, so there is nothing it can't read."""
    known = sorted({word.strip(",") for word in (*WORDS, *" ".join(FILLERS).split()) if word.strip(",").isalpha()})
    merges = learn_merges(known)
    bytes_ = list(bytes_to_unicode().values())
    tokens = [*bytes_, *(byte + "</w>" for byte in bytes_), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as directory:
        vocabulary, rules = Path(directory, "vocab.json"), Path(directory, "merges.txt")
        vocabulary.write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        rules.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return CLIPTokenizer(str(vocabulary), str(rules), model_max_length=MAX_LENGTH)


def foreign(rng: random.Random) -> str:
    """A few words that mean nothing to the model: fillers, or letters at random from many scripts."""
    words = []
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.5:
            words.append(rng.choice(FILLERS))
        else:
            first, last = rng.choice(_SCRIPTS)
            words.append("".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 5))))
    return " ".join(words)


def disturb(caption: str, rng: random.Random) -> str:
    """Put foreign words before or after a caption, as real prompts have them."""
    return f"{foreign(rng)} {caption}" if rng.random() < 0.5 else f"{caption}, {foreign(rng)}"

"""The words of the embedded generator: what its prompts say, and the tokenizer that reads them, a word a token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from models.errors import DataError

#: Tokens that a prompt has at most: the longest template, a name, eight learned tokens and two marks.
CONTEXT = 16
TEMPLATES = (
    "{}",
    "a photo of a {}",
    "a photo of the {}",
    "a small photo of a {}",
    "an image of a {}",
    "a picture of a {}",
)
#: Names for an image of any class; textual inversion starts from one of these.
NEUTRAL = ("object", "thing", "something", "item")
#: Words for which nothing is trained: rows for what an application may want to add.
SPARE = tuple(f"spare{number}" for number in range(32))

_START, _END, _PADDING, _UNKNOWN = "<start>", "<end>", "<pad>", "<unknown>"
_WORD = re.compile(r"[a-z]+|[0-9]+")
_HUMP = re.compile(r"(?<=[a-z])(?=[A-Z])")


def words_of(name: str) -> list[str]:
    """The words of a class's name: "fire_truck", "fireTruck" and "Fire truck" are all ["fire", "truck"].

    Raises `DataError` where it has no word of the letters a-z or digits.
    """
    words = _WORD.findall(_HUMP.sub(" ", name).lower())
    if not words:
        raise DataError(f"class '{name}' has no word in Latin letters", "Rename its folder.")
    return words


def build_tokenizer(classes: Sequence[str]) -> Any:
    """A tokenizer that knows the templates, the words of the classes, the neutral and the spare words.

    Raises `DataError` where a class's name makes a prompt longer than `CONTEXT`.
    """
    named = [word for name in classes for word in words_of(name)]
    templates = [word for template in TEMPLATES for word in template.replace("{}", "").split()]
    known = dict.fromkeys([*templates, *NEUTRAL, *named, *SPARE])  # each once, in this order
    vocabulary = {word: index for index, word in enumerate([_START, _END, _PADDING, _UNKNOWN, *known])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=_UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}",
        special_tokens=[(mark, vocabulary[mark]) for mark in (_START, _END)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_START,
        eos_token=_END,
        pad_token=_PADDING,
        unk_token=_UNKNOWN,
        model_max_length=CONTEXT,
    )
    for name in classes:
        longest = max(len(tokenizer(text).input_ids) for text in _filled(name))
        if longest > CONTEXT:
            raise DataError(
                f"class '{name}' makes prompts of {longest} tokens; {CONTEXT} are possible",
                "Shorten the name of its folder.",
            )
    return tokenizer


@dataclass(frozen=True)
class Prompts:
    """All prompts of the training, in one list: the empty one, those of the neutral words, then class by class."""

    texts: tuple[str, ...]
    neutral: int  # how many follow the empty one
    each: int  # how many each class has

    @classmethod
    def of(cls, classes: Sequence[str]) -> Prompts:
        neutral = [text for word in NEUTRAL for text in _filled(word)]
        named = [text for name in classes for text in _filled(name)]
        return cls(("", *neutral, *named), len(neutral), len(TEMPLATES))

    def first_of(self, label: int) -> int:
        """The place in `texts` of the first prompt of class `label`."""
        return 1 + self.neutral + label * self.each


def _filled(name: str) -> list[str]:
    """The templates with a class's name as words."""
    return [template.format(" ".join(words_of(name))) for template in TEMPLATES]

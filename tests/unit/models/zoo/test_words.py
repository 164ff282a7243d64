"""The words of the embedded generator and its tokenizer."""

from __future__ import annotations

import pytest

from models.errors import DataError
from models.zoo.words import CONTEXT, NEUTRAL, SPARE, TEMPLATES, Prompts, build_tokenizer, words_of

CLASSES = ("cat", "fire_truck")


@pytest.mark.parametrize("name", ["fire_truck", "fireTruck", "Fire truck", " fire-truck "])
def test_a_class_name_is_split_into_its_words(name: str) -> None:
    assert words_of(name) == ["fire", "truck"]


def test_a_number_in_a_class_name_is_a_word() -> None:
    assert words_of("boeing747b") == ["boeing", "747", "b"]


def test_a_class_without_a_word_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="class '猫'"):
        words_of("猫")


def test_every_word_of_a_prompt_is_one_known_token() -> None:
    tokenizer = build_tokenizer(CLASSES)
    texts = [text for text in Prompts.of(CLASSES).texts if text]
    for text in [*texts, *NEUTRAL, *SPARE]:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert len(ids) == len(text.split())
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_a_prompt_begins_and_ends_with_marks_and_is_padded_to_the_context() -> None:
    tokenizer = build_tokenizer(CLASSES)
    ids = tokenizer("a photo of a CAT", padding="max_length", max_length=CONTEXT).input_ids
    assert len(ids) == CONTEXT
    assert ids[0] == tokenizer.bos_token_id
    assert ids[6] == tokenizer.eos_token_id
    assert set(ids[7:]) == {tokenizer.pad_token_id}
    assert ids[5] == tokenizer.convert_tokens_to_ids("cat")


def test_a_word_that_it_does_not_know_is_the_unknown_token() -> None:
    tokenizer = build_tokenizer(CLASSES)
    assert tokenizer("zebra", add_special_tokens=False).input_ids == [tokenizer.unk_token_id]


def test_the_end_of_a_prompt_is_not_the_token_that_old_clip_models_mistook_for_it() -> None:
    """transformers reads `eos_token_id == 2` as a sign of checkpoints that were saved with a wrong one."""
    assert build_tokenizer(CLASSES).eos_token_id != 2


def test_a_name_too_long_for_the_text_encoder_is_refused() -> None:
    with pytest.raises(DataError, match=f"prompts of .* tokens; {CONTEXT} are possible"):
        build_tokenizer(("cat", "_".join(["long"] * 12)))


def test_the_prompts_of_a_class_lie_where_first_of_says() -> None:
    prompts = Prompts.of(CLASSES)
    assert prompts.texts[0] == ""
    start = prompts.first_of(1)
    assert prompts.texts[start : start + prompts.each] == tuple(
        template.format("fire truck") for template in TEMPLATES
    )
    assert start + prompts.each == len(prompts.texts)

"""Words found in running text, in scripts with and without spaces."""

import numpy as np
import pytest

from llmbrain.brains.finding import find_words, join_words


def found(text, words):
    return [text[a:b] if a >= 0 else None for a, b in find_words(text, words)]


def test_a_long_text_without_spaces():
    rng = np.random.default_rng(0)
    letters = [chr(c) for c in rng.integers(0x4E00, 0x9000, 900)]
    words = ["".join(rng.choice(letters, rng.integers(1, 4))) for _ in range(1200)]
    text = "，".join("".join(words[i : i + 9]) for i in range(0, 1200, 9)) + "。"
    assert len(text) > 2400
    assert found(text, words) == words
    heard = [word for i, word in enumerate(words) if i % 50]  # some are not in the table
    assert found(text, heard) == heard


@pytest.mark.parametrize(
    "words",
    [
        ["लड़की", "पानी", "पीती", "है", "और", "हिन्दी"],
        ["அவன்", "தமிழ்", "படித்தான்", "நீ"],
        ["শিশুটি", "বই", "পড়ে"],
        ["ฉัน", "กำลัง", "กิน", "ข้าว"],
        ["ကျောင်း", "သို့"],
        ["الكِتَابُ", "عَلَى", "الطَّاوِلَةِ"],
        ["don't", "well-known", "naïve", "Straße", "ΟΔΟΣ"],
        ["私は", "学校", "に", "行きます"],
        ["한국어", "문장"],
        ["می\u200cروم", "خانه"],
    ],
)
def test_every_sign_belongs_to_its_word(words):
    for text in (" ".join(words), join_words(words)):
        assert found(text, words) == words


def test_a_vowel_sign_tells_words_apart():
    text = "का की के कु"
    assert found(text, ["की", "कु"]) == ["की", "कु"]
    assert found("சொல் சொல்லி", ["சொல்லி"]) == ["சொல்லி"]


def test_accents_case_and_points_do_not():
    assert found("Der CAFÉ straße", ["café", "STRASSE"]) == ["CAFÉ", "straße"]
    assert found("الكتاب على", ["الكِتَابُ", "عَلَى"]) == ["الكتاب", "على"]
    assert found("she'll say don’t", ["she", "ll", "say", "dont"]) == ["she", "ll", "say", "don’t"]
    assert found("ὁδός", ["ΟΔΟΣ"]) == ["ὁδός"]


def test_words_are_joined_as_their_script_is_written():
    assert join_words(["私は", "学校", "OK", "に"]) == "私は学校 OK に"
    assert join_words(["the", "cat"]) == "the cat"
    assert join_words(["ข้าว", "กิน"]) == "ข้าวกิน"

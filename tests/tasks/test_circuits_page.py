"""docs/known-answers.md says what its recipe prints."""

import re

import pytest

from recipes import known_answers

NUMBER = re.compile(r"[+-]?\d+\.\d+")


def test_the_page_is_up_to_date() -> None:
    """Word for word, and figures to their last place (processors round differently)."""
    have, made = known_answers.PAGE.read_text(encoding="utf-8"), known_answers.page()
    assert NUMBER.sub("#", have) == NUMBER.sub("#", made), "run: python -m recipes.known_answers"
    told, measured = (list(map(float, NUMBER.findall(text))) for text in (have, made))
    assert told == pytest.approx(measured, abs=0.11)

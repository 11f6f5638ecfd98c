"""The picture of a lens: every cell is there, well formed, and says what the numbers say."""

import xml.etree.ElementTree as ET

import pytest

from headwise.instruments import lens
from headwise.report.lens_picture import lens_picture
from tests.instruments import tiny

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def found():
    return lens(tiny.llama(), "abc,def.\n0a", tokenizer=tiny.Words())


def test_it_has_a_cell_for_each_layer_and_position(found):
    drawn = ET.fromstring(lens_picture(found, first=2, count=5, title="a < b"))
    cells = drawn.findall(f"{SVG}g")
    assert len(cells) == 3 * 5
    told = cells[0].find(f"{SVG}title").text
    row = found.rows_of(0)[2]
    assert told.startswith(repr(found.word(found.top[0, row, 0])))
    framed = [c for c in cells if c.find(f"{SVG}rect[@class='right']") is not None]
    assert len(framed) == (found.rank[:, 2:7] == 0).sum()
    assert drawn.find(f"{SVG}text").text == "a < b"


def test_characters_that_xml_does_not_know_are_replaced(found):
    found.words[int(found.top[0, 0, 0])] = "\x00<&\x07"
    ET.fromstring(lens_picture(found))


def test_what_is_not_there_is_refused(found):
    with pytest.raises(LookupError):
        lens_picture(found, example=3)
    with pytest.raises(ValueError, match="none from 40"):
        lens_picture(found, first=40)

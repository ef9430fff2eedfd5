"""The pictures of the pages: one is drawn, and each stands in its page."""

import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import draw_pages

DOCS = Path(__file__).parents[1] / "docs"


def test_a_page_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["draw_pages.py", str(tmp_path), "reproducibility"])
    draw_pages.main()
    (path,) = tmp_path.iterdir()
    assert path.name == "reproducibility.jpg"
    with Image.open(path) as picture:
        colours = picture.convert("RGB").getcolors(maxcolors=2**24)
        assert picture.width > 2 * picture.height  # a row
        assert len(colours) > 1000


@pytest.mark.parametrize("page", draw_pages.PAGES)
def test_a_page_has_its_picture_and_the_command(page):
    text = (DOCS / f"{page}.md").read_text()
    (picture,) = (DOCS / "pictures").glob(f"{page}.*")
    assert f"](pictures/{picture.name})" in text
    assert f"python examples/draw_pages.py docs/pictures {page}`" in text
    assert picture.stat().st_size <= 120 * 2**10

"""The report in headless Chromium: every section, no message on the console, no request, no sideways scrolling.

It is wide and light, narrow and dark (Chromium has no window below 500 pixels; a frame of 390 is measured too). Skipped where there is no Chromium.
"""

import re

import pytest
from browser import CHROMIUM, visit

from .test_page import SECTIONS, Reader

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (apt-get install chromium)")]


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (500, True)])
def test_the_page_opens_without_a_word(page, tmp_path, width, dark):
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    seen = visit(f"file://{tmp_path}/report.html", tmp_path, width, dark)
    assert seen.console == [] and seen.requests == []
    reader = Reader(seen.dom)
    assert tuple(section["id"] for section in reader.of("section")) == SECTIONS
    assert len(reader.of("circle")) == 48 and len(reader.of("figure")) > 15


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_does_not_scroll_sideways(page, tmp_path, width):
    measuring = "parent.postMessage([document.documentElement.scrollWidth, innerWidth].join(), '*')"
    text = re.sub(r"<script>.*?</script>", f"<script>{measuring}</script>", page, flags=re.S)
    text = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", text)
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    frame = f"<iframe src=report.html style='width: {width}px; height: 900px; border: 0'></iframe>"
    listener = "<script>onmessage = (event) => (document.title = event.data)</script>"
    (tmp_path / "frame.html").write_text(f"<!doctype html><title></title>{listener}{frame}")
    dom = visit(f"file://{tmp_path}/frame.html", tmp_path).dom
    scroll, inner = re.search(r"<title>(\d+),(\d+)</title>", dom).groups()
    assert int(scroll) <= int(inner) == width


def test_the_map_shows_titles_and_the_items_of_a_code(page, tmp_path):
    acting = """
        const dot = document.querySelector("circle"), tip = document.querySelector(".tip"), found = [];
        dot.dispatchEvent(new PointerEvent("pointermove", {bubbles: true}));
        found.push(tip.textContent.endsWith(dot.dataset.tip), dot.classList.contains("on"));
        const select = document.querySelector("select");
        select.value = dot.dataset.code;
        select.dispatchEvent(new Event("change"));
        const off = [...document.querySelectorAll("circle.off")];
        found.push(off.length > 0, off.every((other) => other.dataset.code !== dot.dataset.code));
        found.push(tip.textContent.includes(dot.dataset.tip));
        document.title = found.join();"""
    text = page.replace("</script>\n</body>", f"{acting}</script>\n</body>")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", text)
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    assert "<title>true,true,true,true,true</title>" in visit(f"file://{tmp_path}/report.html", tmp_path).dom


def test_what_the_helper_would_find(tmp_path):
    (tmp_path / "bad.html").write_text(
        "<img src=http://evil.example/x.png><script>console.error(1); missing()</script>"
    )
    seen = visit(f"file://{tmp_path}/bad.html", tmp_path)
    assert len(seen.console) == 2 and seen.requests == ["http://evil.example/x.png"]

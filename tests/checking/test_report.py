"""The page in a real browser: it works, fits, stays silent, and hostile text stays text. And the model card."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from moeprune.checking import judge, model_card, preview, report
from moeprune.checking.case import find
from moeprune.checking.report import before, markup
from moeprune.checking.report.drawing import Chart, Line, draw, ticks
from moeprune.checkpoint.families import understand
from moeprune.checkpoint.folder import open_checkpoint
from moeprune.metadata import write_json
from moeprune.settings import Settings
from tests.checking import pairs
from tests.checking.browser import PROGRAM, Browser
from tests.checking.conftest import DEMO, HELD_OUT

HOSTILE = (
    "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\u202e\x00 ${a}"
)


@pytest.fixture(scope="session")
def output(tmp_path_factory, scored, good_keep):
    """Every result of a small run on the demo model, with hostile text in each."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copy(scored / "reap_metadata.json", folder)
    pruned = pairs.cut(DEMO, folder / "pruned", good_keep)
    shutil.copy(scored / "reap_metadata.json", pruned)
    shared = {"device": "cpu", "evaluation_path": str(HELD_OUT), "evaluation_samples": 60, "output_path": folder}
    settings = Settings(
        model_path=str(DEMO), pruned_output_path=str(pruned), generations=40, max_new_tokens=16, **shared
    )
    result = judge.judge(find(settings), settings, "key")
    for pair in result["generation"]["pairs"][:2]:
        pair["prompt"] = pair["domain"] = pair["answer"] = pair["parent"]["text"] = HOSTILE
    result["warnings"].append(HOSTILE)
    write_json(folder / "test_report.json", result)
    settings = Settings(model_path=str(DEMO), ratios="0.25,0.75", **shared)
    checkpoint = open_checkpoint(DEMO)
    layout = understand(checkpoint)
    variants = preview.variants(settings, checkpoint, layout)
    shown = preview.measure(settings, checkpoint, variants, layout, "key")
    shown["variants"][0]["name"] = HOSTILE
    write_json(folder / "preview.json", shown)
    report.write(folder)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if PROGRAM is None:
        pytest.skip("no Chromium here")
    running = Browser(tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


@pytest.mark.parametrize("width", [360, 768, 1440])
@pytest.mark.parametrize("dark", [False, True])
def test_fits_and_stays_silent(output, browser, width, dark):
    browser.open(output / "report.html", width, dark=dark)
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
    wide = "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, svg, select')"
    wide += " && e.getBoundingClientRect().right > window.innerWidth + 1).map(e => e.outerHTML.slice(0, 80))"
    assert browser.run(wide) == []
    assert browser.errors == []
    colours = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", colours))) < 200) == dark


def test_hostile_text_stays_text(output, browser):
    browser.open(output / "report.html", 1000)
    assert browser.run("document.title").startswith("moeprune: ")
    assert browser.run("document.querySelectorAll('img').length") == 0
    shown = browser.run("document.querySelector('article pre').textContent")
    assert shown == HOSTILE.replace("\u202e", "\\u202e").replace("\x00", "\u2400")
    assert "<img" in browser.run("document.querySelector('.warnings').textContent")


def test_tables_sort_pairs_filter_and_the_heat_map_orders(output, browser):
    browser.open(output / "report.html", 1000)
    column = "[...document.querySelectorAll('#fidelity tbody tr')].map(r => Number(r.cells[3].dataset.key))"
    head = "document.querySelectorAll('#fidelity th')[3]"
    browser.run(f"{head}.click()")
    up = browser.run(column)
    assert up == sorted(up)
    browser.run(f"{head}.dispatchEvent(new KeyboardEvent('keydown', {{key: 'Enter'}}))")
    assert browser.run(column) == up[::-1]
    assert browser.run(f"{head}.getAttribute('aria-sort')") == "descending"

    choose = "(s => {{ s.value = '{1}'; s.dispatchEvent(new Event('change')); }})(document.getElementById('{0}'))"
    browser.run(choose.format("pairs", "sql"))
    shown = browser.run("[...document.querySelectorAll('article')].filter(a => !a.hidden).map(a => a.dataset.domain)")
    assert set(shown) == {"sql"}

    kept = "[...document.querySelector('g.row').querySelectorAll('rect')]"
    kept += ".map(r => [r.x.baseVal.value, r.width.baseVal.value])"
    before = browser.run(kept)
    assert sum(width > 0.5 for _, width in before) == 16
    browser.run(choose.format("order", "score"))
    after = browser.run(kept)
    assert sorted(int(x) for x, _ in after) == list(range(32))
    assert all(width > 0.5 for x, width in after if x < 8)  # the best experts stay
    browser.run(choose.format("domain", "load"))
    assert browser.errors == []


def test_a_pass_with_losses_does_not_look_like_one_without():
    found = {"inputs": {}, "verdict": "pass", "summary": "13 of 13 checks passed"}
    assert 'class="chip pass"' in before.head({}, found)
    lossy = before.head({}, found | {"summary": "with losses: right answers 98% -> 64%; 13 of 13 checks passed"})
    assert 'class="chip warning"' in lossy and "chip pass" not in lossy
    assert "pass with losses</span> <b>right answers" in lossy


class _Balance(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag, _attrs):
        if tag not in {"meta", "link"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, _attrs):
        assert tag == "rect"

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_sound_markup_and_names_nothing_outside(output):
    page = (output / "report.html").read_text()
    checker = _Balance()
    checker.feed(page)
    assert checker.open == []
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    assert "nan" not in re.sub(r"[a-zA-Z_]*nan[a-zA-Z]+|[a-zA-Z]+nan", "", page.lower())


def test_a_folder_without_results_makes_no_page(tmp_path):
    assert report.write(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_scores_alone_make_a_page(tmp_path, scored):
    shutil.copy(scored / "reap_metadata.json", tmp_path)
    page = report.write(tmp_path).read_text()
    assert 'id="heat"' in page
    assert 'id="checks"' not in page


def test_a_verdict_on_other_scores_is_left_out(tmp_path, scored, output):
    newer = json.loads((scored / "reap_metadata.json").read_text())
    newer["inputs"]["fingerprint"] = "another"
    newer["created_at"] = "2999-01-01T00:00:00Z"
    write_json(tmp_path / "reap_metadata.json", newer)
    shutil.copy(output / "test_report.json", tmp_path)
    assert 'id="checks"' not in report.write(tmp_path).read_text()


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.0007), (3, 3), (2.3, 6.7), (0, 123456)])
def test_ticks_are_few_and_enclose(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 8
    assert found[0] <= low
    assert found[-1] >= high


def test_an_empty_chart_is_still_a_picture():
    assert "<svg" in draw(Chart("x", "y", [Line("a", [(1.0, 0.0)])]))


def test_text_is_never_markup():
    assert markup.tag("p", "<b>", title='"') == '<p title="&quot;">&lt;b&gt;</p>'


def test_the_card_carries_the_licence_and_the_numbers(output):
    pruned, head = output / "pruned", "license: other\nlicense_name: x\nlanguage:\n- en\n- fr\n"
    (pruned / "README.md").write_text(f"---\n{head}foo: bar\n---\n# Parent\n")
    (pruned / "LICENSE").write_text("terms")
    result = json.loads((output / "test_report.json").read_text())
    card = model_card.write(pruned, DEMO, result).read_text()
    assert head in card.split("---")[1]
    assert "foo" not in card
    assert "16 of 32 experts" in card
    assert f"{result['fidelity']['overall']['kl']:.3f}" in card
    assert "LICENSE" in card
    assert "<img" not in card
    assert "# Parent" in (pruned / model_card.PARENTS).read_text()
    assert model_card.write(pruned, DEMO, result).read_text() == card  # and once more changes nothing

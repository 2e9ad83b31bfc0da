"""The gallery's site: safe names, pictures only from inside a run, unreadable runs reported, earlier sites replaced."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.browser.chrome import HOSTILE

from lineament.core.checks import InputError
from lineament.papers import search
from lineament.report.gallery import build
from lineament.report.outcome import Claim, Figure, Outcome, Table

SVG = b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'><text>one</text></svg>"
CATALOGUE = [paper.to_dict() for paper in search()]


class Tags(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def put(folder: Path, slug: str = "normgrad", figures=(), **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "title": "A title", "preset": "quick", "config": {"preset": "quick", "seed": 0},
        "claims": [Claim("first", "0.9", "0.91", True), Claim("second", "> 2", "1.5", False, "too few samples")],
        "tables": [Table("numbers", ["a", "b"], [["x", 1.5]])], "figures": figures, "seconds": 3.0,
        "versions": {"lineament": "0.1.0"},
    }  # fmt: skip
    Outcome(slug, **{**fields, **changes}).write(folder)
    return folder


def read(site: Path, name: str) -> Tags:
    return Tags((site / name).read_text(encoding="utf-8"))


def test_a_page_for_each_paper_and_the_claims_side_by_side(tmp_path):
    run = put(tmp_path / "runs/deep/er/one", figures=[Figure("a.svg", "caption", "what it shows")])
    (run / "a.svg").write_bytes(SVG)
    site = build(tmp_path / "runs", tmp_path / "site", catalogue=CATALOGUE)
    assert (site.outcomes, site.pages, site.problems) == (1, 30, ())
    page = read(tmp_path / "site", "papers/normgrad.html")
    for word in (
        "0.9",
        "0.91",
        "> 2",
        "1.5",
        "too few samples",
        "Does not hold",
        "lineament 0.1.0",
        "3.0 s",
        "deep/er/one",
    ):
        assert word in page.words
    image = page.all("img")[0]
    assert image["alt"] == "what it shows"
    assert (tmp_path / "site/papers" / (image["src"] or "")).read_bytes() == SVG
    index = read(tmp_path / "site", "index.html")
    entries = [a for _, a in index.found if "data-entry" in a]
    assert len(entries) == 29 and sum("run" in (a["data-status"] or "").split() for a in entries) == 1
    assert "1 of 2 claims hold" in index.words


def test_the_command_names_what_differs_from_the_preset(tmp_path):
    config = {
        "preset": "quick",
        "seed": 3,
        "step_size": 0.5,
        "widths": [4, 8],
        "flag": True,
        "limit": None,
        "name": "a b",
    }
    put(tmp_path / "runs/one", config=config)
    usual = {**config, "seed": 0, "step_size": 0.1, "name": ""}
    for presets, command in (
        ({("normgrad", "quick"): usual}, "lineament reproduce normgrad --preset quick --seed 3 --step-size 0.5 --name 'a b'"),
        (None, "--seed 3 --step-size 0.5 --widths 4,8 --flag true --limit none --name 'a b'"),
    ):  # fmt: skip
        build(tmp_path / "runs", tmp_path / "site", catalogue=CATALOGUE, presets=presets)
        assert command in read(tmp_path / "site", "papers/normgrad.html").words


def test_a_dark_twin_is_offered(tmp_path):
    run = put(tmp_path / "runs/one", figures=[Figure("a.svg", "", "alt")])
    (run / "a.svg").write_bytes(SVG)
    (run / "a-dark.svg").write_bytes(SVG + b"\n")
    build(tmp_path / "runs", tmp_path / "site", catalogue=CATALOGUE)
    source = read(tmp_path / "site", "papers/normgrad.html").all("source")[0]
    assert "dark" in (source["media"] or "")
    assert (tmp_path / "site/papers" / (source["srcset"] or "")).read_bytes() == SVG + b"\n"


def test_pictures_come_only_from_inside_the_run(tmp_path):
    runs = tmp_path / "runs"
    (tmp_path / "secret.svg").write_bytes(SVG)
    names = [
        "../../secret.svg",
        str(tmp_path / "secret.svg"),
        "link.svg",
        "folder",
        "gone.svg",
        "text.svg",
        "a\0b",
        "x/../../../secret.svg",
    ]
    run = put(runs / "one", figures=[Figure(name, "", "alt") for name in names])
    (run / "link.svg").symlink_to(tmp_path / "secret.svg")
    (run / "folder").mkdir()
    (run / "text.svg").write_text("plain words")
    site = build(runs, tmp_path / "site", catalogue=CATALOGUE)
    assert len(site.problems) == len(names)
    assert sum("outside the run's folder" in problem for problem in site.problems) == 4
    assert not list((tmp_path / "site").rglob("*.svg"))
    page = read(tmp_path / "site", "papers/normgrad.html")
    assert not page.all("img") and page.words.count("Not shown") == len(names)


def test_hostile_words_are_shown_and_do_nothing(tmp_path):
    words = [word.replace("\udcff", "?") for word in HOSTILE]
    for position, word in enumerate(words):
        put(
            tmp_path / f"runs/{position}", slug=word, title=word, preset=word, config={word: word},
            claims=[Claim(word, word, word, False, word)], tables=[Table(word, [word], [[word]])], versions={word: word},
        )  # fmt: skip
    site = build(tmp_path / "runs", tmp_path / "site", catalogue=CATALOGUE)
    assert site.outcomes == len(words)
    files = {
        p.relative_to(tmp_path / "site").as_posix() for p in (tmp_path / "site").rglob("*") if p.is_file()
    }
    assert all(re.fullmatch(r"(papers/)?[a-z0-9-]+\.(html|json)", name) for name in files)
    for name in files - {"gallery.json"}:
        page = read(tmp_path / "site", name)
        assert len(page.all("script")) == (1 if name == "index.html" else 0)
        assert not page.all("img")
        html = (tmp_path / "site" / name).read_text(encoding="utf-8")
        assert not set(html) & {"\x07", "\x1b", "\0", "\u202e", "\u2066"}
        assert not any(key.startswith("on") for _, attributes in page.found for key in attributes)
    others = [read(tmp_path / "site", name).words for name in sorted(files) if "other-" in name]
    assert len(others) == len(words)
    assert any("<script>document.title='owned'</script>" in text for text in others)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"\xff\xfe", b'{"slug": "x"}', b"[" * 100_000, b"null",
        b'{"slug":"x","title":"","preset":"","config":{},"claims":[{"name":"","paper":"","observed":"","holds":"no"}],'
        b'"tables":[],"figures":[],"seconds":1,"versions":{}}',
        b'{"slug":"x","title":"","preset":"","config":{},"claims":[],"tables":[{"title":"","columns":1,"rows":2}],'
        b'"figures":[],"seconds":1,"versions":{}}',
    ],
)  # fmt: skip
def test_an_unreadable_run_is_reported_and_the_rest_goes_on(tmp_path, content):
    put(tmp_path / "runs/good")
    (tmp_path / "runs/bad").mkdir()
    (tmp_path / "runs/bad/outcome.json").write_bytes(content)
    site = build(tmp_path / "runs", tmp_path / "site", catalogue=CATALOGUE)
    assert site.outcomes == 1 and len(site.problems) == 1 and site.problems[0].startswith("bad: ")
    assert "bad: " in read(tmp_path / "site", "index.html").words


def test_a_second_build_replaces_the_first(tmp_path):
    run = put(tmp_path / "runs/one", slug="strange", figures=[Figure("a.svg", "", "alt")])
    (run / "a.svg").write_bytes(SVG)
    build(tmp_path / "runs", tmp_path / "site", catalogue=CATALOGUE)
    assert (tmp_path / "site/papers/other-1.html").exists() and list((tmp_path / "site/figures").iterdir())
    (run / "outcome.json").unlink()
    (tmp_path / "site/notes.txt").write_text("mine")
    site = build(tmp_path / "runs", tmp_path / "site", catalogue=CATALOGUE)
    assert site.outcomes == 0 and "no outcome.json" in site.problems[0]
    assert not (tmp_path / "site/papers/other-1.html").exists() and not list(
        (tmp_path / "site/figures").iterdir()
    )
    assert (tmp_path / "site/notes.txt").read_text() == "mine"


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    (tmp_path / "mine.html").write_text("mine")
    put(tmp_path / "runs/one")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/gallery.json").write_text(
        json.dumps({"files": ["../mine.html", 3, "papers/../../mine.html"]})
    )
    build(tmp_path / "runs", tmp_path / "site", catalogue=CATALOGUE)
    assert (tmp_path / "mine.html").read_text() == "mine"


def test_the_site_may_lie_among_the_runs(tmp_path):
    put(tmp_path / "one")
    for _ in range(2):
        assert build(tmp_path, tmp_path / "site", catalogue=CATALOGUE).outcomes == 1


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="runs: "):
        build(tmp_path / "none", tmp_path / "site", catalogue=CATALOGUE)
    (tmp_path / "home").mkdir()
    (tmp_path / "home/index.html").write_text("my own page")
    with pytest.raises(InputError, match=r"other files.*index"):
        build(tmp_path, tmp_path / "home", catalogue=CATALOGUE)
    assert (tmp_path / "home/index.html").read_text() == "my own page"


def test_two_runs_of_one_paper_share_its_page(tmp_path):
    for name in ("a", "b"):
        put(tmp_path / "runs" / name)
    build(tmp_path / "runs", tmp_path / "site", catalogue=CATALOGUE)
    page = read(tmp_path / "site", "papers/normgrad.html")
    assert "(run 1)" in page.words and "(run 2)" in page.words
    identifiers = [a["id"] for _, a in page.found if "id" in a]
    assert len(identifiers) == len(set(identifiers))

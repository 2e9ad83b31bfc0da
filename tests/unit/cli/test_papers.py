"""The catalogue: complete, newest first, and its status read off the package."""

from __future__ import annotations

import re
from dataclasses import replace

from lineament import papers

# fmt: off
SLUGS = {
    "normgrad", "diffroar", "reagent", "relp", "gsae", "vinfo-complexity", "convergent-learning",
    "representation-bias", "ifm", "neural-collapse", "shortcut-learning", "loss-landscape",
    "projection-head", "useful", "tract", "diffgrad", "gns", "gbnn", "elasticface", "unpg",
    "contrastive-ft", "unified-embedding", "ssa", "colormnet", "modhifi", "dcc", "gifd",
    "wide-deep-kernels", "bangla-digits",
}
# fmt: on


def test_the_29_papers_are_there_once():
    assert len(papers.PAPERS) == 29
    assert {paper.slug for paper in papers.PAPERS} == SLUGS
    assert len({paper.arxiv for paper in papers.PAPERS}) == 29


def test_every_entry_is_whole():
    for paper in papers.PAPERS:
        assert re.fullmatch(r"\d{4}\.\d{5}", paper.arxiv)
        assert 2015 <= paper.year <= 2025 and paper.url.endswith(paper.arxiv)
        assert paper.title and paper.authors and paper.homes and paper.wing
        assert re.fullmatch(r"[A-Z][^.]*\.", paper.purpose), paper.purpose


def test_newest_first():
    numbers = [paper.arxiv for paper in papers.search()]
    assert numbers == sorted(numbers, reverse=True)


def test_status_is_read_off_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(papers, "_PACKAGE", tmp_path)
    paper = next(p for p in papers.PAPERS if p.slug == "diffroar")
    assert not paper.there and paper.runs == "" and paper.to_dict()["status"] == "not yet"
    for place in (*paper.homes, paper.recipe):
        assert not paper.there
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).touch()
    assert (
        paper.there and paper.runs == "lineament reproduce diffroar" and paper.to_dict()["status"] == "there"
    )


def test_a_paper_whose_home_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(papers, "_PACKAGE", tmp_path)
    paper = replace(papers.PAPERS[0], homes=("wing",))
    (tmp_path / "recipes").mkdir()
    (tmp_path / paper.recipe).touch()
    assert not paper.there
    (tmp_path / "wing").mkdir()
    assert paper.there


def test_search_is_all_words_any_field_any_case():
    assert [p.slug for p in papers.search("COLLAPSE niles")] == ["neural-collapse"]
    assert [p.slug for p in papers.search("2004.02866")] == ["normgrad"]
    assert papers.search("collapse saliency") == []
    assert len(papers.search("  ")) == 29

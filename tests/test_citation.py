"""What names the version and how to cite it: CITATION.cff, .zenodo.json, the changelog, the bibliography."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pybtex.database import parse_file  # type: ignore[import-untyped, unused-ignore]

import hgadlib

ROOT = Path(__file__).parents[1]
CITATION: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
ZENODO: dict[str, Any] = json.loads((ROOT / ".zenodo.json").read_text(encoding="utf-8"))
# Of the Citation File Format 1.2.0; a file is not valid with any other.
CFF_KEYS = {
    "abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers",
    "keywords", "license", "license-url", "message", "preferred-citation", "references", "repository",
    "repository-artifact", "repository-code", "title", "type", "url", "version",
}  # fmt: skip
# Of Zenodo's deposit metadata: what stands here.
ZENODO_KEYS = {
    "title", "description", "upload_type", "creators", "license", "keywords", "version", "language",
    "related_identifiers",
}  # fmt: skip


def paper_entries() -> list[dict[str, Any]]:
    return [CITATION["preferred-citation"], *CITATION["references"]]


def test_one_version_everywhere() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    numbered = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", changelog, re.M)
    newest, date = numbered[0]
    assert newest == hgadlib.__version__ == CITATION["version"] == ZENODO["version"]
    assert CITATION["date-released"] == datetime.date.fromisoformat(date)


def test_the_citation_file_has_what_its_format_asks_for() -> None:
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION.keys() >= {"authors", "cff-version", "message", "title"}
    assert CITATION.keys() <= CFF_KEYS
    assert CITATION["type"] in ("software", "dataset")
    for entry in paper_entries():
        assert entry.keys() >= {"type", "title", "authors"}
    # A parser that refuses aliases, as GitHub's does, reads it.
    assert not re.search(r"(?:^|\s)[&*]\w", (ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_the_paper_is_cited_as_in_the_bibliography() -> None:
    paper = parse_file(str(ROOT / "book" / "references.bib")).entries["yao2024hgad"]
    for entry in paper_entries():
        found = [(person["family-names"], person["given-names"]) for person in entry["authors"]]
        assert found == [(" ".join(p.last_names), " ".join(p.first_names)) for p in paper.persons["author"]]
        assert entry["title"] == re.sub("[{}]", "", paper.fields["title"])
        assert entry["collection-title"] == paper.fields["booktitle"]
        assert str(entry["year"]) == paper.fields["year"]
        assert [one["value"] for one in entry["identifiers"]] == [f"arXiv:{paper.fields['eprint']}"]


@pytest.mark.parametrize("key", ["title", "keywords"])
def test_zenodo_says_what_the_citation_says(key: str) -> None:
    assert ZENODO[key] == CITATION[key]


def test_zenodo_is_of_this_software_and_names_no_address_that_is_not_known() -> None:
    assert ZENODO.keys() == ZENODO_KEYS
    assert ZENODO["upload_type"] == CITATION["type"] == "software"
    assert ZENODO["license"] == CITATION["license"].lower()
    assert ZENODO["creators"] == CITATION["authors"] == [{"name": "The hgadlib authors"}]
    (paper,) = ZENODO["related_identifiers"]
    assert paper["identifier"] == CITATION["preferred-citation"]["identifiers"][0]["value"]
    assert paper["relation"] == "references"

"""What a stranger looks at first: the licence, the version, the types, and links that lead somewhere."""

from __future__ import annotations

import re
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

from ncr_upload import __version__
from ncr_upload.entrypoints.api.models import About
from ncr_upload.entrypoints.api.monitoring_routes import VERSION

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "PRODUCTION_DEPLOYMENT.md"]


def test_the_version_stands_in_one_place() -> None:
    assert (PROJECT["project"]["dynamic"], "version" in PROJECT["project"]) == (["version"], False)
    source = ROOT / PROJECT["tool"]["hatch"]["version"]["path"]
    assert f'__version__ = "{__version__}"' in source.read_text()
    assert About.model_json_schema()["examples"][0]["version"] == VERSION == __version__


def test_the_licence_is_the_one_that_the_package_names() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["project"]["license"] == "MIT"
    assert text.startswith("MIT License\n")
    assert PROJECT["project"]["authors"][0]["name"] in text


@pytest.mark.parametrize("package", ["ncr_upload", "ncr_validator"])
def test_the_types_of_a_package_are_for_its_users(package: str) -> None:
    assert (files(package) / "py.typed").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_at_the_root_leads_to_a_file(page: str) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text())
    assert [link for link in links if "://" not in link and not (ROOT / link).is_file()] == []

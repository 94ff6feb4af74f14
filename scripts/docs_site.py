#!/usr/bin/env python3
"""Build the documentation as a site in var/docs/site, from docs/, the pages at the root and the API's OpenAPI document.

Needs no network. Ends with an error on the first warning, such as a link to a page or heading that does not exist.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "var/docs/source"
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "PRODUCTION_DEPLOYMENT.md": "production.md",
}
_OPENAPI = "import json; from ncr_upload.entrypoints.bootstrap.api import make_api; print(json.dumps(make_api().openapi()))"
Json = dict[str, Any]


def collect_pages() -> dict[str, str]:
    """Return the text of every page by its path in the site."""
    pages = {path.relative_to(ROOT / "docs").as_posix(): path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
    moved = {f"docs/{page}": page for page in pages} | ROOT_PAGES
    texts = {page: _link(text, moved, page) for page, text in pages.items()}
    texts |= {page: _link((ROOT / name).read_text(), moved, page) for name, page in ROOT_PAGES.items()}
    return texts | {"api.md": draw_api(read_openapi()), "settings.md": draw_settings((ROOT / "env_sample").read_text())}


def _link(text: str, moved: dict[str, str], page: str) -> str:
    """Turn links to files of the repository, and their names in code, into links between pages of the site."""
    up = "../" * page.count("/")

    def linked(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        return f"]({up}{moved[path]}{anchor})" if path in moved else match[0]

    def named(match: re.Match[str]) -> str:
        target = moved.get(match[1])
        return f"[`{match[1]}`]({up}{target})" if target not in {None, page} else match[0]

    text = re.sub(r"\]\(([\w./-]+)(#[\w-]+)?\)", linked, text)
    text = text.replace("](docs/", f"]({up}")
    return re.sub(r"(?<!\[)`([\w./]+\.md)`(?!\])", named, text)


def read_openapi() -> Json:
    """Return the API's own description. The API is made with its defaults, in an empty folder."""
    environment = {"PATH": os.environ.get("PATH", os.defpath), "PYTHONPATH": str(ROOT / "src")}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", _OPENAPI],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    document: Json = json.loads(done.stdout.splitlines()[-1])
    return document


def draw_api(document: Json) -> str:
    """Draw the reference: every endpoint with its parameters and answers, then every model with its fields."""
    lines = [f"# API reference, version {document['info']['version']}", "", document["info"]["description"], ""]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            lines += _draw_operation(f"{method.upper()} {path}", operation)
    lines += ["## Models", ""]
    for name, schema in sorted(document["components"]["schemas"].items()):
        lines += _draw_model(name, schema)
    return "\n".join(lines) + "\n"


def _draw_operation(title: str, operation: Json) -> Iterator[str]:
    yield from (f"## `{title}`", "", operation.get("description") or operation.get("summary", ""), "")
    if parameters := operation.get("parameters"):
        yield from ("| Parameter | In | Type | Meaning |", "|---|---|---|---|")
        for one in parameters:
            name = f"`{one['name']}`{' (required)' if one.get('required') else ''}"
            yield f"| {name} | {one['in']} | {_type(one['schema'])} | {_cell(one.get('description', ''))} |"
        yield ""
    for body in operation.get("requestBody", {}).get("content", {}).values():
        yield from (f"Body: {_type(body['schema'])}", "")
    yield from ("| Answer | Body | Meaning | Codes |", "|---|---|---|---|")
    for status, answer in operation["responses"].items():
        contents = list(answer.get("content", {}).values())
        types = ", ".join(_type(content["schema"]) for content in contents if content.get("schema"))
        codes = ", ".join(
            f"`{code}`" for content in contents if "Problem" in str(content) for code in content.get("examples", {})
        )
        yield f"| {status} | {types} | {_cell(answer['description'])} | {codes} |"
    yield ""


def _draw_model(name: str, schema: Json) -> Iterator[str]:
    yield from (f"### {name}", "", schema.get("description", ""), "")
    if "enum" in schema:
        yield from (", ".join(f"`{value}`" for value in schema["enum"]), "")
    if fields := schema.get("properties"):
        yield from ("| Field | Type | Meaning |", "|---|---|---|")
        for field, details in fields.items():
            required = " (required)" if field in schema.get("required", ()) else ""
            yield f"| `{field}`{required} | {_type(details)} | {_cell(details.get('description', ''))} |"
        yield ""


def _type(schema: Json) -> str:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if options := schema.get("anyOf") or schema.get("oneOf") or schema.get("allOf"):
        return " or ".join(_type(option) for option in options)
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return f"{schema.get('format') or schema.get('type', 'any')}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def draw_settings(sample: str) -> str:
    """Draw the page of the settings from `env_sample`, which a test holds against the settings class."""
    return f"# Settings\n\nEvery setting, its default and what it means: the file `env_sample`.\n\n```ini\n{sample}```\n"


def complete_navigation(config: str, pages: Iterable[str]) -> str:
    """Put into the config the pages that it does not name, in place of the first pattern that fits each."""
    rest = [page for page in sorted(pages) if f'"{page}"' not in config]
    for pattern in ("adr/*.md", "*.md"):
        fitting = [page for page in rest if fnmatch(page, pattern)]
        rest = [page for page in rest if page not in fitting]
        config = config.replace(f'"{pattern}"', ", ".join(f'"{page}"' for page in fitting))
    return config.replace('    { "More" = [] },\n', "")


def main() -> int:
    shutil.rmtree(SOURCE.parent, ignore_errors=True)
    shutil.copytree(ROOT / "docs", SOURCE, ignore=shutil.ignore_patterns("*.md"))
    pages = collect_pages()
    for page, text in pages.items():
        path = SOURCE / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    zensical = Path(sys.executable).with_name("zensical")
    config = SOURCE.parent / "zensical.toml"
    config.write_text(complete_navigation((ROOT / "zensical.toml").read_text(), pages))
    return subprocess.run([zensical, "build", "--strict", "--config-file", config], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

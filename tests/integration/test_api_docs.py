"""The OpenAPI document tells the whole contract, and its pages work without the internet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from api_server import SETTINGS, make_ports, serve
from ledger_twin import MemoryHost, MemoryJobQueue, MemoryLedger, MemoryStatusBoard
from ncr_upload.entrypoints.api.app import create_app
from ncr_upload.entrypoints.api.problems import MEDIA_TYPE
from parts import require

ENDPOINTS = {
    ("get", "/"),
    ("post", "/process-job"),
    ("get", "/job-status/{task_id}"),
    ("post", "/process-batch"),
    ("get", "/batch-status/{batch_id}"),
    ("get", "/jobs/active"),
    ("get", "/jobs/{task_id}/history"),
    ("post", "/jobs/{task_id}/cancel"),
    ("post", "/jobs/{task_id}/retry"),
    ("post", "/batches/{batch_id}/cancel"),
    ("post", "/batches/{batch_id}/retry-failed"),
    ("get", "/health"),
    ("get", "/livez"),
    ("get", "/readyz"),
    ("get", "/memory-stats"),
    ("get", "/celery-stats"),
    ("get", "/metrics"),
}


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    ports = make_ports(
        MemoryLedger(),
        MemoryStatusBoard(),
        MemoryJobQueue(),
        MemoryHost(),
        "q",
        lambda: None,
        {},
    )
    with serve(create_app(ports, SETTINGS)) as client:
        yield client


@pytest.fixture(scope="module")
def document(http: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = http.get("/openapi.json").json()
    return found


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(method, path): operation for path, methods in document["paths"].items() for method, operation in methods.items()}


def test_every_endpoint_is_documented_and_no_other(document: dict[str, Any]) -> None:
    assert set(operations(document)) == ENDPOINTS


def test_every_endpoint_has_a_summary_and_a_description(document: dict[str, Any]) -> None:
    for operation in operations(document).values():
        assert operation["summary"]
        assert operation["description"]


def test_every_answer_has_an_example_and_every_error_is_a_problem(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for (method, path), operation in operations(document).items():
        for status, answer in operation["responses"].items():
            where = f"{method} {path} {status}"
            content = answer["content"]
            if path == "/metrics" and status == "200":
                assert set(content) == {"text/plain"}
            elif status.startswith("2") or (path, status) == ("/health", "503"):
                name = content["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
                assert schemas[name]["examples"], where
            else:
                assert set(content) == {MEDIA_TYPE}, where
                assert content[MEDIA_TYPE]["schema"] == {"$ref": "#/components/schemas/Problem"}, where
                for example in content[MEDIA_TYPE]["examples"].values():
                    assert example["value"]["status"] == int(status), where


def test_the_errors_of_sending_a_job_are_all_documented(document: dict[str, Any]) -> None:
    for path in ("/process-job", "/process-batch"):
        assert set(document["paths"][path]["post"]["responses"]) == {
            *("202", "401", "408", "409", "413", "415", "422", "500", "503")
        }


def test_every_field_of_a_request_and_every_parameter_is_described(document: dict[str, Any]) -> None:
    fields = document["components"]["schemas"]["JobRequest"]["properties"]
    assert set(fields) == {"job_id", "username", "campaign", "row_id"}
    assert all(field.get("description") for field in fields.values())
    for operation in operations(document).values():
        assert all(parameter.get("description") for parameter in operation.get("parameters", []))


def test_every_reference_in_the_document_leads_somewhere(document: dict[str, Any]) -> None:
    for name in set(re.findall(r"'#/components/schemas/([^']+)'", str(document))):
        assert name in document["components"]["schemas"]


def test_the_key_is_documented(document: dict[str, Any]) -> None:
    (scheme,) = document["components"]["securitySchemes"].values()
    assert (scheme["in"], scheme["name"]) == ("header", "X-API-Key")
    assert document["paths"]["/process-job"]["post"]["security"]


@pytest.mark.parametrize(("page", "script"), [("/docs", "SwaggerUIBundle"), ("/redoc", "Redoc")])
def test_the_documentation_pages_load_everything_from_here(http: httpx.Client, page: str, script: str) -> None:
    answer = http.get(page)
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    loaded = re.findall(r"""(?:src|href|url|spec-url)\s*[=:]\s*["']([^"']+)""", answer.text)
    assert len(loaded) >= 3
    for link in loaded:
        assert link.startswith("/")
        assert http.get(link).status_code == 200
    assert any(script in http.get(link).text for link in loaded if link.endswith(".js"))


@pytest.mark.real
def test_the_documentation_pages_come_up_in_a_browser_without_the_internet(http: httpx.Client) -> None:
    chromium = require("chromium")
    from playwright.sync_api import Route, expect, sync_playwright

    here = str(http.base_url).rstrip("/")

    def keep_inside(route: Route) -> None:
        if route.request.url.startswith((here, "blob:", "data:")):
            route.continue_()
        else:
            route.abort()

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.route("**/*", keep_inside)
        page.goto(f"{here}/docs")
        page.get_by_text("/livez").first.click(timeout=30_000)
        page.get_by_role("button", name="Try it out").click()
        page.get_by_role("button", name="Execute").click()
        expect(page.locator(".live-responses-table").first).to_contain_text('"status": "ok"', timeout=30_000)
        page.goto(f"{here}/redoc")
        expect(page.get_by_role("heading", name="Send a batch of jobs")).to_be_visible(timeout=30_000)
        browser.close()

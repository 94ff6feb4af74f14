"""The pages that people open, in a real browser that can reach nothing but this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import psutil
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from newcomer import SECRETS, Newcomer, open_newcomer
from parts import require
from patience import until

pytestmark = [pytest.mark.real, pytest.mark.timeout(180)]

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
USER, _, PASSWORD = SECRETS["FLOWER_BASIC_AUTH"].partition(":")


@dataclass
class Tab:
    """A page with everything that it asked for and complained about."""

    page: Page
    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def open(self, url: str) -> None:
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("requestfailed", lambda request: self.complaints.append(f"failed: {request.url}"))
        answer = self.page.goto(url)
        assert answer is not None
        assert answer.status == 200

    def _heard(self, message: object) -> None:
        if getattr(message, "type", "") == "error":
            self.complaints.append(getattr(message, "text", ""))

    def assert_stayed_at(self, origin: str) -> None:
        elsewhere = [url for url in self.asked if not url.startswith((f"{origin}/", "data:", "blob:"))]
        assert (elsewhere, self.complaints) == ([], [])


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Newcomer]:
    """The README's four programs. No job runs here, so what a worker would talk to need not be there."""
    require("chromium")
    outside = {"WASABI_ENDPOINT": "http://127.0.0.1:9", "BUCKET_NAME": "b", "SFTP_HOST": "127.0.0.1", "SFTP_USERNAME": "u"}
    validator = {"VALIDATOR_API_URL": "http://127.0.0.1:9/validate", "VALIDATOR_API_KEY": "n0-validator"}
    with open_newcomer(
        tmp_path_factory.mktemp("pages"), **outside, **validator, **SECRETS, SFTP_HOST_KEY="ssh-ed25519 AAAA"
    ) as opened:
        opened.ensure_running()
        opened.programs["flower"].wait_for("Connected to redis://")
        yield opened


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = require("chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def tab(browser: Browser) -> Iterator[Tab]:
    context = browser.new_context(
        viewport={"width": 1280, "height": 900}, http_credentials={"username": USER, "password": PASSWORD}
    )
    yield Tab(context.new_page())
    context.close()


def operations(newcomer: Newcomer) -> list[tuple[str, str]]:
    """Method and path of everything that the API documents."""
    with newcomer.client() as client:
        paths = client.get("/openapi.json").json()["paths"]
    return [(method.upper(), path) for path, methods in paths.items() for method in methods]


def test_docs_shows_every_operation_offline(newcomer: Newcomer, tab: Tab) -> None:
    tab.open(f"{newcomer.api_url}/docs")
    wanted = operations(newcomer)
    expect(tab.page.locator(".opblock")).to_have_count(len(wanted))
    shown = {
        (block.locator(".opblock-summary-method").inner_text(), block.locator("[data-path]").get_attribute("data-path"))
        for block in tab.page.locator(".opblock").all()
    }
    assert shown == set(wanted)
    tab.assert_stayed_at(newcomer.api_url)


def test_docs_can_try_an_operation(newcomer: Newcomer, tab: Tab) -> None:
    tab.open(f"{newcomer.api_url}/docs")
    block = tab.page.locator(".opblock", has=tab.page.locator('[data-path="/health"]'))
    block.locator(".opblock-summary").click()
    block.get_by_role("button", name="Try it out").click()
    block.get_by_role("button", name="Execute").click()
    answer = block.locator(".live-responses-table .response").first
    expect(answer.locator(".response-col_status")).to_contain_text("200")
    expect(answer).to_contain_text('"status": "healthy"')
    tab.assert_stayed_at(newcomer.api_url)


def test_redoc_shows_every_operation_offline(newcomer: Newcomer, tab: Tab) -> None:
    tab.open(f"{newcomer.api_url}/redoc")
    wanted = operations(newcomer)
    expect(tab.page.locator('[data-section-id^="tag/"][data-section-id*="/operation/"]')).to_have_count(len(wanted))
    for _, path in wanted:
        expect(tab.page.locator("body")).to_contain_text(path)
    tab.assert_stayed_at(newcomer.api_url)


def test_flower_shows_the_worker_online(newcomer: Newcomer, tab: Tab) -> None:
    tab.open(f"{newcomer.flower_url}/")
    row = tab.page.locator("#workers-table tbody tr", has_text="ncr-")
    expect(row).to_have_count(1)
    expect(row).to_contain_text("Online")


def test_flower_asks_for_its_password(newcomer: Newcomer) -> None:
    for page in ("/", "/workers", "/tasks", "/broker"):
        for auth in (None, (USER, "wrong"), (USER, PASSWORD.partition(",")[0])):
            assert httpx.get(newcomer.flower_url + page, auth=auth, trust_env=False).status_code == 401
        assert httpx.get(newcomer.flower_url + page, auth=(USER, PASSWORD), trust_env=False).status_code == 200


def test_flowers_password_is_in_no_process_list_and_no_log(newcomer: Newcomer) -> None:
    flower = newcomer.programs["flower"]
    assert PASSWORD not in " ".join(psutil.Process(flower.process.pid).cmdline())
    for log in newcomer.logs.iterdir():
        assert PASSWORD not in log.read_text(), log.name


def test_flower_without_a_password_listens_on_this_machine_only(newcomer: Newcomer) -> None:
    settings = {"FLOWER_PORT": str(int(newcomer.settings["FLOWER_PORT"])), "FLOWER_HOST": "", "FLOWER_BASIC_AUTH": ""}
    newcomer.programs["flower"].end()
    newcomer.write_env(**settings)
    flower = psutil.Process(newcomer.start("flower").process.pid)

    def listening() -> set[str]:
        return {socket.laddr.ip for socket in flower.net_connections(kind="tcp") if socket.status == psutil.CONN_LISTEN}

    assert until(listening) == {"127.0.0.1"}
    assert httpx.get(newcomer.flower_url, trust_env=False).status_code == 200

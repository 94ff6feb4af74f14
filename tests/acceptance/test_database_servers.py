"""`ncr dev --database URL` on the databases that studios have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url

from databases import SERVERS, Databases
from patience import until
from running_stack import follow, start_stack, stop_stack

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def databases() -> Iterator[Databases]:
    running = Databases()
    yield running
    running.close()


@pytest.mark.parametrize("kind", SERVERS)
def test_the_whole_stack_delivers_on_a_database_server(databases: Databases, tmp_path: Path, kind: str) -> None:
    url = databases.create(kind, tmp_path)
    stack = start_stack(tmp_path / "stack", "--port", "0", "--database", url)
    try:
        assert make_url(stack.endpoints["database"]["url"]) == make_url(url)
        job_id = "your-job-id"
        with stack.client() as client:
            answer = client.post("/process-job", json={"job_id": job_id, "username": "ann 🚀", "campaign": "spring"})
            assert answer.status_code == 202, answer.text
            ended = follow(client, answer.json()["task_id"], 120)
            assert (ended["status"], ended["username"]) == ("completed", "ann 🚀"), ended
            assert (Path(stack.endpoints["sftp"]["root"]) / job_id).is_dir()
            until(lambda: client.get("/health?deep=true").json()["tables"] == "connected", 30)
    finally:
        assert stop_stack(stack) == 0

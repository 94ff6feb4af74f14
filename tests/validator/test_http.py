"""The HTTP contract, on the real program."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from validator import samples
from validator.conftest import KEY, Service

BOUNDARY = "boundary-of-the-test"


def frame(chunks: Iterator[bytes], field: str = "zip_file") -> Iterator[bytes]:
    """A multipart body without a length."""
    disposition = f'Content-Disposition: form-data; name="{field}"; filename="a.zip"'
    yield f"--{BOUNDARY}\r\n{disposition}\r\nContent-Type: application/zip\r\n\r\n".encode()
    yield from chunks
    yield f"\r\n--{BOUNDARY}--\r\n".encode()


def stream(service: Service, body: Iterator[bytes], key: str = KEY, sku: str = "SKU1") -> httpx.Response:
    headers = {"X-API-Key": key, "Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    return httpx.post(f"{service.url}/{sku}", content=body, headers=headers, timeout=60)


def problem(answer: httpx.Response) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == answer.status_code
    return answer.status_code, body["code"]


def test_a_sound_package_is_valid_and_every_entry_has_a_result(service: Service, tmp_path: Path) -> None:
    answer = service.post(samples.package(tmp_path / "a.zip"))
    assert answer.status_code == 200
    (entry,) = answer.json()["data"]
    assert (entry["result"], entry["sku_id"], entry["issues"]) == ("Valid", "SKU1", [])
    assert [(file["file"], file["result"], file["checked"]) for file in entry["files"]] == [
        ("SKU1/SKU1.glb", "Valid", True),
        (f"SKU1/materials/{samples.MATERIAL}.glb", "Valid", True),
        (f"SKU1/materials/{samples.MATERIAL}_basecolor.png", "Valid", True),
        ("SKU1/sources/SKU1.blend", "Valid", False),
    ]


def test_each_issue_has_file_code_severity_pointer_and_message(service: Service, tmp_path: Path) -> None:
    broken = samples.glb_with(samples.damaged(samples.picture()))
    answer = service.post(samples.package(tmp_path / "a.zip", **{"SKU1/SKU1.glb": broken}))
    (entry,) = answer.json()["data"]
    assert (answer.status_code, entry["result"], entry["counts"]["errors"]) == (200, "Invalid", 1)
    issue = entry["issues"][0]
    assert {key: issue[key] for key in ("file", "code", "severity", "pointer")} == {
        "file": "SKU1/SKU1.glb",
        "code": "IMAGE_CORRUPT",
        "severity": "error",
        "pointer": "/images/0",
    }
    assert issue["message"]


def test_warnings_alone_are_a_warning(service: Service, tmp_path: Path) -> None:
    answer = service.post(samples.package(tmp_path / "a.zip", **{"SKU1/materials/wood.glb": samples.glb()}))
    assert answer.json()["data"][0]["result"] == "Warning"


def test_the_package_of_another_product_is_invalid(service: Service, tmp_path: Path) -> None:
    assert service.post(samples.package(tmp_path / "a.zip"), sku="SKU2").json()["data"][0]["result"] == "Invalid"


def test_a_sku_may_have_spaces_and_letters_of_any_language(service: Service, tmp_path: Path) -> None:
    answer = service.post(samples.package(tmp_path / "a.zip", sku="Stühle 7"), sku="St%C3%BChle%207")
    (entry,) = answer.json()["data"]
    assert (entry["result"], entry["sku_id"], entry["issues"]) == ("Valid", "Stühle 7", [])


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04" + bytes(90)])
def test_an_upload_that_is_no_zip_is_invalid_not_an_error(service: Service, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(content)
    answer = service.post(tmp_path / "a.zip")
    assert (answer.status_code, answer.json()["data"][0]["result"]) == (200, "Invalid")


@pytest.mark.parametrize("key", ["", "wrong", KEY + "x", KEY[:-1], "schlüssel".encode().decode("latin-1")])
def test_a_wrong_key_is_401(service: Service, tmp_path: Path, key: str) -> None:
    path = samples.package(tmp_path / "a.zip")
    with path.open("rb") as file:
        headers = {"X-API-Key": key.encode("latin-1")}
        answer = httpx.post(f"{service.url}/SKU1", files={"zip_file": file}, headers=headers, timeout=30)
    assert problem(answer) == (401, "bad_api_key")
    assert KEY not in answer.text


def test_a_missing_key_is_401_even_for_a_large_chunked_upload(service: Service) -> None:
    body = frame(bytes(1024 * 1024) for _ in range(20))
    assert problem(stream(service, body, key="wrong")) == (401, "bad_api_key")


def test_a_chunked_upload_without_a_length_is_judged(service: Service, tmp_path: Path) -> None:
    data = samples.package(tmp_path / "a.zip").read_bytes()
    answer = stream(service, frame(data[at : at + 100] for at in range(0, len(data), 100)))
    assert answer.json()["data"][0]["result"] == "Valid"


def test_a_missing_zip_file_is_422(service: Service, tmp_path: Path) -> None:
    assert problem(stream(service, frame(iter([b"zip"]), field="other"))) == (422, "zip_file_missing")
    answer = httpx.post(f"{service.url}/SKU1", headers={"X-API-Key": KEY}, data={"zip_file": "text"}, files={"x": b""})
    assert problem(answer)[0] == 422


def test_a_body_that_is_no_multipart_is_refused(service: Service) -> None:
    headers = {"X-API-Key": KEY}
    assert problem(httpx.post(f"{service.url}/SKU1", headers=headers, json={}))[0] == 415
    headers["Content-Type"] = "multipart/form-data; boundary=x"
    assert problem(httpx.post(f"{service.url}/SKU1", headers=headers, content=b"--y\r\nnonsense"))[0] in (400, 422)


def test_unknown_paths_and_methods_are_problems(service: Service) -> None:
    root = service.url.removesuffix("/validate")
    assert problem(httpx.get(f"{root}/nothing"))[0] == 404
    assert problem(httpx.get(f"{service.url}/SKU1"))[0] == 405


def test_healthz_tells_what_judges(service: Service) -> None:
    url = service.url.removesuffix("/validate") + "/healthz"
    deadline = time.monotonic() + 20
    while httpx.get(url).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    body = httpx.get(url).json()
    assert (body["status"], body["engines"]["gltf-validator"]) == ("ok", "2.0.0-dev.3.10")


def test_it_listens_on_the_loopback_only_by_default(service: Service) -> None:
    listening = [one for one in psutil.Process(service.process.pid).net_connections() if one.status == psutil.CONN_LISTEN]
    assert {one.laddr.ip for one in listening} == {"127.0.0.1"}


# --- bounds -----------------------------------------------------------------------------------------------------


def test_an_upload_over_the_limit_is_413_with_and_without_a_length(
    start_service: Callable[..., Service], tmp_path: Path
) -> None:
    service = start_service(max_upload_mb=1)
    (tmp_path / "a.zip").write_bytes(bytes(2 * 1024 * 1024))
    assert problem(service.post(tmp_path / "a.zip")) == (413, "upload_too_large")
    assert problem(stream(service, frame(bytes(65536) for _ in range(64)))) == (413, "upload_too_large")
    assert service.post(samples.package(tmp_path / "b.zip")).json()["data"][0]["result"] == "Valid"


def test_a_large_upload_does_not_grow_the_service(service: Service, tmp_path: Path) -> None:
    service.post(samples.package(tmp_path / "a.zip"))
    process = psutil.Process(service.process.pid)
    before = process.memory_info().rss
    path = tmp_path / "b.zip"
    noise = os.urandom(1024 * 1024)
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("SKU1/SKU1.glb", samples.glb())
        with zipped.open("SKU1/sources/scan.bin", "w") as entry:
            for _ in range(200):
                entry.write(noise)
    assert service.post(path).json()["data"][0]["result"] == "Valid"
    peak = int(Path(f"/proc/{process.pid}/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    assert peak - before < 80 * 1024 * 1024


def test_nothing_is_left_on_disk_after_any_answer(start_service: Callable[..., Service], tmp_path: Path) -> None:
    service = start_service()
    work = Path(psutil.Process(service.process.pid).environ()["VALIDATOR_WORK_DIR"])
    service.post(samples.package(tmp_path / "a.zip"))
    (tmp_path / "b.zip").write_bytes(b"no zip")
    service.post(tmp_path / "b.zip")
    service.post(samples.package(tmp_path / "c.zip"), key="wrong")
    assert [path.name for path in work.iterdir()] == ["log"]


def test_more_uploads_than_places_are_told_503_and_none_gets_a_wrong_verdict(
    start_service: Callable[..., Service], tmp_path: Path
) -> None:
    service = start_service(concurrency=1, queue_length=1)
    data = samples.package(tmp_path / "a.zip").read_bytes()
    gate = threading.Event()

    def slow() -> Iterator[bytes]:
        yield data[:10]
        gate.wait(30)
        yield data[10:]

    with ThreadPoolExecutor(2) as pool:
        held = [pool.submit(stream, service, frame(slow())) for _ in range(2)]
        deadline = time.monotonic() + 20
        while httpx.get(service.url.removesuffix("/validate") + "/healthz").json()["places"] != {"all": 2, "taken": 2}:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        refused = service.post(tmp_path / "a.zip")
        assert problem(refused) == (503, "busy")
        assert int(refused.headers["retry-after"]) > 0
        gate.set()
        assert [one.result().json()["data"][0]["result"] for one in held] == ["Valid", "Valid"]
    assert service.post(tmp_path / "a.zip").status_code == 200


def test_two_packages_at_once_do_not_mix(service: Service, tmp_path: Path) -> None:
    skus = [f"SKU{number}" for number in range(6)]
    paths = [samples.package(tmp_path / f"{sku}.zip", sku=sku) for sku in skus]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda pair: service.post(*pair), zip(paths, skus, strict=True)))
    assert [answer.json()["data"][0]["sku_id"] for answer in answers] == skus
    assert {answer.json()["data"][0]["result"] for answer in answers} == {"Valid"}


def test_an_upload_that_is_cut_off_frees_its_place(start_service: Callable[..., Service], tmp_path: Path) -> None:
    service = start_service(concurrency=1, queue_length=0)
    address = urlsplit(service.url)
    for _ in range(3):
        with socket.create_connection((str(address.hostname), int(address.port or 0)), 10) as raw:
            raw.sendall(
                f"POST /validate/SKU1 HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nContent-Length: 99999\r\n"
                f"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n".encode()
            )
    deadline = time.monotonic() + 20
    while service.post(samples.package(tmp_path / "a.zip")).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_upload_that_stalls_is_told_408_and_frees_its_place(start_service: Callable[..., Service], tmp_path: Path) -> None:
    service = start_service(concurrency=1, queue_length=0, upload_idle_seconds=0.5)
    address = urlsplit(service.url)
    with socket.create_connection((str(address.hostname), int(address.port or 0)), 20) as raw:
        raw.sendall(
            f"POST /validate/SKU1 HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nContent-Length: 99999\r\n"
            f"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n".encode()
        )
        assert b" 408 " in raw.recv(100)
    assert service.post(samples.package(tmp_path / "a.zip")).status_code == 200


# --- no verdict -------------------------------------------------------------------------------------------------


def test_a_file_that_takes_too_long_is_503_never_a_verdict(start_service: Callable[..., Service], tmp_path: Path) -> None:
    service = start_service(file_seconds=0.0001)
    answer = service.post(samples.package(tmp_path / "a.zip"))
    assert problem(answer) == (503, "no_verdict")
    assert "retry-after" in answer.headers
    health = httpx.get(service.url.removesuffix("/validate") + "/healthz")
    assert (health.status_code, health.json()["status"]) == (503, "engine_failed")


def test_killed_children_cost_no_verdict(start_service: Callable[..., Service], tmp_path: Path) -> None:
    service = start_service(concurrency=1)
    path = samples.package(tmp_path / "a.zip")
    assert service.post(path).json()["data"][0]["result"] == "Valid"
    for child in psutil.Process(service.process.pid).children():
        child.kill()
    assert service.post(path).json()["data"][0]["result"] == "Valid"


def test_the_service_ends_on_sigterm_and_leaves_no_child(start_service: Callable[..., Service], tmp_path: Path) -> None:
    service = start_service()
    service.post(samples.package(tmp_path / "a.zip"))
    children = psutil.Process(service.process.pid).children()
    service.process.send_signal(signal.SIGTERM)
    service.process.wait(30)
    _, alive = psutil.wait_procs(children, 20)
    assert alive == []


def test_the_openapi_document_describes_the_upload(service: Service) -> None:
    document = httpx.get(service.url.removesuffix("/validate") + "/openapi.json").json()
    operation = document["paths"]["/validate/{sku_id}"]["post"]
    assert "zip_file" in json.dumps(operation["requestBody"])
    assert {"200", "401", "413", "422", "503"} <= set(operation["responses"])

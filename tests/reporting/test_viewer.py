"""``llmbrain view``: what the server gives is what the store holds, and it gives nothing else to nobody else."""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain._validation import InputError
from llmbrain.networks import FunctionalNetworks
from llmbrain.reporting.viewer import HOST, Server, serve

TEXTS = ["abc def, ghi <b> & 'jkl'. " * 4, "mno pqr stu! " * 3]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study as `llmbrain run` leaves it: scan, networks, a page; and a secret beside it."""
    root = tmp_path_factory.mktemp("view") / "study"
    scans = lb.scan(tiny("llama"), tiny_tokenizer(unknown=True), TEXTS, out=root / "scan", site=("neuron", "head"))
    rng = np.random.default_rng(0)
    courses = [rng.standard_normal((scan.n_tokens, 3)) for scan in scans]
    maps = rng.standard_normal((3, scans[0].n_neurons))
    FunctionalNetworks(maps, scans[0].space, threshold=1.5, time_courses=courses).save(root / "networks")
    (root / "report.html").write_text("<p>report</p>", encoding="utf-8")
    (root.parent / "secret.txt").write_text("secret", encoding="utf-8")
    (root / "link.txt").symlink_to(root.parent / "secret.txt")
    return root


@pytest.fixture(scope="module")
def server(study: Path) -> Iterator[Server]:
    server = Server(study)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(5)


def get(server: Server, path: str, *, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection(HOST, server.server_address[1], timeout=10)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body, dict(response.headers)


def floats(body: bytes) -> Any:
    return np.frombuffer(body, dtype="<f4")


def test_numbers_are_those_of_the_study(server: Server, study: Path) -> None:
    scans, networks = lb.load_scans(study / "scan"), FunctionalNetworks.load(study / "networks")
    np.testing.assert_array_equal(floats(get(server, "/api/map?network=2")[1]), networks.maps[2])
    for run, scan in enumerate(scans):
        for token in (0, scan.n_tokens - 1):
            status, body, headers = get(server, f"/api/volume?run={run}&token={token}")
            assert status == 200
            np.testing.assert_array_equal(floats(body), scan.data(tokens=[token])[0])
            assert float(headers["X-Scale"]) > 0
        one = floats(get(server, f"/api/volume?run={run}&token=1&layer=1")[1])
        np.testing.assert_array_equal(one, scan.data(layers=[1], tokens=[1])[0])
        series = floats(get(server, f"/api/series?run={run}&layer=1&neuron=2")[1])
        np.testing.assert_array_equal(series, scan.data(layers=[1])[:, 2])
        record = json.loads(get(server, f"/api/run?run={run}")[1])
        assert record["n"] == scan.n_tokens == len(record["tokens"])
        courses = floats(get(server, f"/api/courses?run={run}")[1]).reshape(3, -1)
        r = np.corrcoef(courses[1], networks.time_courses[run][:, 1])[0, 1]
        assert r > 0.999999


def test_long_runs_come_in_windows(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmbrain.reporting.viewer.WINDOW", 16)
    folder = Server(study).folder
    lengths = [scan.n_tokens for scan in folder.scans]
    assert [stop - start for _, start, stop in folder.windows] == [
        min(16, n - start) for n in lengths for start in range(0, n, 16)
    ]
    values, _ = folder.volume(1, 3)
    np.testing.assert_array_equal(values, folder.scans[0].data(tokens=[19])[0])
    assert folder.run(1)["tokens"] == folder.texts[0][16:32]


def test_page_carries_no_numbers_and_no_foreign_address(server: Server) -> None:
    status, body, headers = get(server, "/")
    page = body.decode()
    assert status == 200
    assert headers["Content-Type"].startswith("text/html")
    assert 'id="blob-' not in page
    assert '"source":"server"' in page
    assert "connect-src 'self'" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page


@pytest.mark.parametrize(
    "path",
    [
        "/files/../secret.txt", "/files/%2e%2e/secret.txt", "/files/..%2fsecret.txt", "/files/scan/../../secret.txt",
        "/files//etc/passwd", "/files/%2fetc%2fpasswd", "/files/link.txt", "/files/a%00b",
    ],
)  # fmt: skip
def test_paths_outside_the_study_are_refused(server: Server, path: str) -> None:
    status, body, _ = get(server, path)
    assert status in (400, 403, 404)
    assert b"secret" not in body.replace(b"secret.txt", b"")
    assert b"root:" not in body
    if "secret" in path or "passwd" in path or "link" in path:
        assert status == 403


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1.evil.example:80", "0.0.0.0", ""])
def test_foreign_host_names_are_refused(server: Server, host: str) -> None:
    status, body, _ = get(server, "/api/map?network=0", Host=host)
    assert status == 403
    assert len(body) < 200


def test_local_names_and_own_origin_pass_other_origins_do_not(server: Server) -> None:
    port = server.server_address[1]
    assert get(server, "/", Host=f"localhost:{port}")[0] == 200
    assert get(server, "/", Origin=f"http://{HOST}:{port}")[0] == 200
    assert get(server, "/", Origin="http://evil.example")[0] == 403
    assert get(server, "/", Origin="null")[0] == 403


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/map?network=99", 404), ("/api/map?network=-1", 404), ("/api/map?network=x", 400), ("/api/map", 400),
        ("/api/volume?run=0&token=100000", 404), ("/api/volume?run=9&token=0", 404),
        ("/api/volume?run=0&token=0&layer=77", 400), ("/api/series?run=0&layer=0&neuron=9999", 404),
        ("/nothing", 404), ("/files/none", 404), ("/files/scan", 404),
    ],
)  # fmt: skip
def test_bad_requests_get_one_line(server: Server, path: str, status: int) -> None:
    got, body, headers = get(server, path)
    assert got == status
    assert headers["Content-Type"].startswith("text/plain")
    assert b"\n" not in body.strip()


def test_files_of_the_study_come_in_a_sandbox(server: Server) -> None:
    status, body, headers = get(server, "/files/report.html")
    assert (status, body) == (200, b"<p>report</p>")
    assert headers["Content-Security-Policy"].startswith("sandbox")
    assert get(server, "/", method="POST")[0] == 501


class FakeSocket:
    """A client that sends `request`, and what each write to it held; it may have hung up."""

    def __init__(self, request: bytes, *, gone: bool = False) -> None:
        self.request, self.gone, self.writes = request, gone, []

    def makefile(self, mode: str, size: int) -> Any:
        if "r" in mode:
            return io.BytesIO(self.request)
        owner = self

        class Raw(io.RawIOBase):
            def writable(self) -> bool:
                return True

            def write(self, data: Any) -> int:
                if owner.gone:
                    raise BrokenPipeError(32, "Broken pipe")
                owner.writes.append(bytes(data))
                return len(data)

        return io.BufferedWriter(Raw(), size)

    def setsockopt(self, *options: Any) -> None:
        self.options = options

    def settimeout(self, seconds: float) -> None:
        self.seconds = seconds

    def shutdown(self, how: int) -> None:
        pass

    def close(self) -> None:
        pass


def ask(server: Server, path: str, **options: bool) -> FakeSocket:
    request = f"GET {path} HTTP/1.1\r\nHost: {HOST}:{server.server_address[1]}\r\nConnection: close\r\n\r\n"
    client = FakeSocket(request.encode(), **options)
    server.process_request_thread(client, ("127.0.0.1", 1))
    return client


@pytest.mark.parametrize("path", ["/api/map?network=0", "/api/map?network=99", "/files/report.html", "/nothing"])
def test_head_and_body_leave_in_one_write(server: Server, path: str) -> None:
    client = ask(server, path)
    assert len(client.writes) == 1
    head, _, body = client.writes[0].partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert client.options[2] == 1  # TCP_NODELAY


@pytest.mark.parametrize("path", ["/api/map?network=0", "/files/report.html", "/nothing", "/"])
def test_a_client_that_hangs_up_is_no_traceback(server: Server, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    ask(server, path, gone=True)
    assert capsys.readouterr() == ("", "")


def test_what_goes_wrong_in_the_server_is_one_line(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server.folder, "map", lambda network: 1 / 0)
    ask(server, "/api/map?network=0")
    assert capsys.readouterr().err == "viewer: ZeroDivisionError: division by zero\n"


def test_a_silent_client_is_let_go(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmbrain.reporting.viewer.Handler.timeout", 0.05)
    for said in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x"):
        with socket.create_connection((HOST, server.server_address[1]), timeout=20) as connection:
            connection.sendall(said)
            assert connection.recv(100) == b""  # closed by the server


@pytest.mark.parametrize(
    ("path", "method"), [("/", "GET"), ("/nothing", "GET"), ("/files/report.html", "GET"), ("/", "POST")]
)
def test_every_answer_keeps_other_sites_out(server: Server, path: str, method: str) -> None:
    headers = get(server, path, method=method)[2]
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["X-Content-Type-Options"] == "nosniff"


def test_it_listens_on_this_machine_only(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.url.startswith("http://127.0.0.1:")


def test_networks_alone_and_scans_alone(study: Path, tmp_path: Path) -> None:
    scans_only = Server(study / "scan")
    page = scans_only.folder.page.decode()
    assert "recording itself" in page
    assert scans_only.folder.volume(0, 0)[0].shape == (scans_only.folder.scans[0].n_neurons,)
    scans_only.server_close()
    networks_only = Server(study / "networks")
    assert "IC02" in networks_only.folder.page.decode()
    networks_only.server_close()
    with pytest.raises(InputError, match="nothing to view"):
        Server(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        serve(tmp_path / "none")


def test_a_port_in_use_is_one_line(server: Server, study: Path) -> None:
    with pytest.raises(InputError, match="port="):
        serve(study, port=server.server_address[1])

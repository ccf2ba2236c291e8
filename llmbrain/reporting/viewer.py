"""``llmbrain view STUDY``: the viewer of the report on a local web server, for studies too large for one file.

Maps, time courses and slices of the scan are read when asked for. The server listens on 127.0.0.1 only, answers
only to its own name (so that no web page elsewhere can read a study through a rebound host name), only reads, and only
inside the study.
"""

from __future__ import annotations

import json
import mimetypes
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import numpy as np

from llmbrain._validation import InputError
from llmbrain.page.report import Report, Section
from llmbrain.page.text import shown_tokens
from llmbrain.reporting import sections as parts
from llmbrain.reporting.contents import Contents
from llmbrain.reporting.write import condition_spans, cutoffs

HOST = "127.0.0.1"
WINDOW = 2048  # tokens of one run that the page shows at once
AHEAD = 256  # tokens between two looks of `read_ahead`: fewer than a file of the store holds
# a file of the study may be a page: it gets an origin of its own, and no network
SANDBOX = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
)
GUARDS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Refused(Exception):
    """A request that the server does not answer; carries the HTTP status."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class StudyFolder:
    """A study on disk: ``scan/`` and ``networks/`` as `llmbrain run` writes them, or a scan store by itself.

    Parameters
    ----------
    root : Path
    """

    root: Path
    scales: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root = Path(self.root).resolve()
        if not self.root.is_dir():
            raise InputError(f"study={str(self.root)!r} is not a folder")
        if not self.scans and self.networks is None:
            raise InputError(f"study={str(self.root)!r} holds neither a scan nor networks: there is nothing to view")

    @cached_property
    def scans(self) -> list[Any]:
        """Scans of the study, read lazily."""
        from llmbrain.scanning import load_scans

        for folder in (self.root / "scan", self.root):
            if (folder / "manifest.json").is_file():
                return load_scans(folder)
        return []

    @cached_property
    def networks(self) -> Any:
        """Networks of the study, or None."""
        from llmbrain.networks import FunctionalNetworks

        for folder in (self.root / "networks", self.root):
            if (folder / "networks.json").is_file():
                return FunctionalNetworks.load(folder)
        return None

    @cached_property
    def contents(self) -> Contents:
        """What is in it, as the report sees it."""
        return Contents(f"llmbrain: {self.root.name}", scans=self.scans or None, networks=self.networks)

    @cached_property
    def windows(self) -> list[tuple[int, int, int]]:
        """What the page shows at once: ``(run, first token, last token + 1)``."""
        return [
            (i, start, min(start + WINDOW, scan.n_tokens))
            for i, scan in enumerate(self.scans)
            for start in range(0, scan.n_tokens, WINDOW)
        ]

    @cached_property
    def texts(self) -> list[list[str]]:
        """Shown text of the tokens of each run."""
        return [shown_tokens(scan) for scan in self.scans]

    @cached_property
    def page(self) -> bytes:
        """The page itself, without numbers."""
        held = self.contents
        rows = parts.network_rows(held)
        report = Report(held.title, subtitle=str(self.root))
        space = held.layout
        report.viewer = {
            "source": "server", "names": held.names, "runs": [self._window(w) for w in range(len(self.windows))],
            "space": None if space is None else {"widths": list(space.widths), "grid": list(space.grid)},
            "cutoffs": cutoffs(held) if held.networks is not None else [],
            "profiles": None if held.profiles is None else held.profiles.tolist(),
        }  # fmt: skip
        report.add(parts.explorer(held, recorded=bool(self.scans)))
        for row in rows:
            report.add(parts.network_page(row, held))
        files = sorted(p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if self._is_inside(p))
        links = [("files/" + quote(name), name) for name in files[:500]]
        more = len(files) - len(links)
        report.add(Section("Files", parts.fill("files.html.j2", links=links, more=more), id="files"))
        return report.html().encode("utf-8", errors="replace")

    def _window(self, w: int) -> dict[str, Any]:
        i, start, stop = self.windows[w]
        scan = self.scans[i]
        name = str(scan.name or f"run {i}")
        if scan.n_tokens > WINDOW:
            name += f", {start:,} to {stop - 1:,}"
        return {"name": name, "n": stop - start, "of": stop - start, "courses": bool(self.contents.runs)}

    def read_ahead(self) -> None:
        """Read a little of every stretch of every scan: a store checks each of its files once, when it is first read.

        What is wrong with a file is said to whoever asks for it.
        """
        for i, scan in enumerate(self.scans):
            for start in range(0, scan.n_tokens, AHEAD):
                with suppress(InputError, OSError, Refused):
                    scan.data(layers=[0], tokens=[start], site=self._site(i))

    def _is_inside(self, path: Path) -> bool:
        return path.is_file() and path.resolve().is_relative_to(self.root)

    # -- what is read on demand ----------------------------------------------------------------------------------------

    def map(self, network: int) -> np.ndarray:
        """One map, float32 ``(n_neurons,)``."""
        count = self.contents.n_networks
        if not 0 <= network < count:
            raise Refused(HTTPStatus.NOT_FOUND, f"network={network} does not exist: the study has {count}")
        return np.asarray(self.networks.maps[network], dtype="<f4")

    def run(self, window: int) -> dict[str, Any]:
        """Text and conditions of one window."""
        i, start, stop = self._at(window)
        return {
            **self._window(window),
            "tokens": self.texts[i][start:stop],
            "conditions": condition_spans(self.scans[i], start, stop),
        }

    def courses(self, window: int) -> np.ndarray:
        """Time courses of one window, float32 ``(n_networks, n_tokens)``."""
        i, start, stop = self._at(window)
        if self.contents.courses is None or not self.contents.runs:
            raise Refused(HTTPStatus.NOT_FOUND, "the study has no time courses that fit its scans")
        return np.ascontiguousarray(self.contents.courses[i][start:stop].T, dtype="<f4")

    def volume(self, window: int, token: int, layer: int | None = None) -> tuple[np.ndarray, float]:
        """What was recorded at one token, float32, in all layers or one; and the end of its colour scale."""
        i, start, stop = self._at(window)
        if not 0 <= token < stop - start:
            raise Refused(HTTPStatus.NOT_FOUND, f"token={token} does not exist: this window has {stop - start}")
        layers = None if layer is None else [layer]
        recorded = self.scans[i].data(layers=layers, tokens=[start + token], site=self._site(i))
        values = np.asarray(recorded[0], dtype="<f4")
        if i not in self.scales and values.size:
            # one scale a run, so that tokens can be compared; a few massive activations must not set it
            self.scales[i] = float(np.quantile(np.abs(values), 0.995)) or 1.0
        return values, self.scales.get(i, 1.0)

    def series(self, window: int, layer: int, neuron: int) -> np.ndarray:
        """What one neuron did over the tokens of a window, float32 ``(n_tokens,)``."""
        i, start, stop = self._at(window)
        values = self.scans[i].data(layers=[layer], tokens=slice(start, stop), site=self._site(i))
        if not 0 <= neuron < values.shape[1]:
            raise Refused(HTTPStatus.NOT_FOUND, f"neuron={neuron} does not exist: the layer has {values.shape[1]}")
        return np.ascontiguousarray(values[:, neuron], dtype="<f4")

    def _site(self, run: int) -> str:
        """The site of a scan that the maps are about."""
        scan = self.scans[run]
        site = next((name for name in scan.sites if scan.spaces[name] == self.contents.layout), None)
        if site is None:
            raise Refused(HTTPStatus.NOT_FOUND, "the scan was recorded at another site than the networks")
        return str(site)

    def _at(self, window: int) -> tuple[int, int, int]:
        if not 0 <= window < len(self.windows):
            raise Refused(HTTPStatus.NOT_FOUND, f"run={window} does not exist: the study has {len(self.windows)}")
        return self.windows[window]

    def file(self, name: str) -> Path:
        """A file of the study; anything outside it, also through a link, is refused."""
        path = (self.root / name).resolve()
        if "\0" in name or not path.is_relative_to(self.root):
            raise Refused(HTTPStatus.FORBIDDEN, "outside the study")
        if not path.is_file():
            raise Refused(HTTPStatus.NOT_FOUND, "no such file")
        return path


class Handler(BaseHTTPRequestHandler):
    """Answers GET requests about one study."""

    protocol_version = "HTTP/1.1"
    # head and body leave in one write: as two, the second waits for the client to acknowledge the first (40 ms)
    wbufsize = 1 << 16
    disable_nagle_algorithm = True
    timeout = 30.0  # seconds that a client may be silent
    server: Server

    def do_GET(self) -> None:
        """Answer, or say in one line why not."""
        try:
            self._check_sender()
            url = urlsplit(self.path)
            self._answer(unquote(url.path, errors="replace"), parse_qs(url.query))
        except (ConnectionError, TimeoutError):  # nobody is there to be told
            self.close_connection = True
        except Refused as refusal:
            self._send(str(refusal).encode(), "text/plain; charset=utf-8", refusal.status)
        except (InputError, ValueError, OSError) as error:
            self._send(str(error).encode(), "text/plain; charset=utf-8", HTTPStatus.BAD_REQUEST)

    def _check_sender(self) -> None:
        port = self.server.server_address[1]
        names = {f"{HOST}:{port}", f"localhost:{port}"}
        if self.headers.get("Host", "").lower() not in names:
            raise Refused(HTTPStatus.FORBIDDEN, "this server answers to 127.0.0.1 and localhost only")
        origin = self.headers.get("Origin")
        if origin is not None and origin not in {f"http://{name}" for name in names}:
            raise Refused(HTTPStatus.FORBIDDEN, "another site asked")

    def _answer(self, path: str, query: dict[str, list[str]]) -> None:
        folder = self.server.folder

        def number(name: str) -> int:
            try:
                return int(query[name][0])
            except (KeyError, ValueError):
                raise Refused(HTTPStatus.BAD_REQUEST, f"{name} must be a whole number") from None

        def volume() -> None:
            layer = number("layer") if "layer" in query else None
            values, scale = folder.volume(number("run"), number("token"), layer)
            self._send_array(values, {"X-Scale": repr(scale)})

        routes: dict[str, Callable[[], None]] = {
            "/": lambda: self._send(folder.page, "text/html; charset=utf-8"),
            "/api/map": lambda: self._send_array(folder.map(number("network"))),
            "/api/run": lambda: self._send(json.dumps(folder.run(number("run"))).encode(), "application/json"),
            "/api/courses": lambda: self._send_array(folder.courses(number("run"))),
            "/api/volume": volume,
            "/api/series": lambda: self._send_array(folder.series(number("run"), number("layer"), number("neuron"))),
        }
        if path in routes:
            routes[path]()
        elif path.startswith("/files/"):
            self._send_file(folder.file(path.removeprefix("/files/")))
        else:
            raise Refused(HTTPStatus.NOT_FOUND, "no such page")

    def _send_array(self, values: np.ndarray, headers: dict[str, str] | None = None) -> None:
        self._send(values.tobytes(), "application/octet-stream", headers=headers)

    def _send_file(self, path: Path) -> None:
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        with path.open("rb") as stream:
            left = os.fstat(stream.fileno()).st_size
            self._head(HTTPStatus.OK, kind, left, {"Content-Security-Policy": SANDBOX})
            while left and (piece := stream.read(min(left, 1 << 20))):
                self.wfile.write(piece)
                left -= len(piece)
        self.close_connection = self.close_connection or left > 0  # it shrank meanwhile: what follows would be misread

    def _send(
        self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK, headers: dict[str, str] | None = None
    ) -> None:
        self._head(status, kind, len(body), headers or {})
        self.wfile.write(body)

    def _head(self, status: HTTPStatus, kind: str, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def end_headers(self) -> None:
        """End the head of any answer, refusals of the base class too, with what keeps other sites out."""
        for name, value in GUARDS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the terminal belongs to the user."""


class Server(ThreadingHTTPServer):
    """The web server of one study; ``server.url`` is where it is."""

    daemon_threads = True

    def __init__(self, study: str | Path, port: int = 0) -> None:
        self.folder = StudyFolder(Path(study))
        super().__init__((HOST, port), Handler)
        threading.Thread(target=self.folder.read_ahead, daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no error; anything else is one line."""
        error = sys.exception()
        if not isinstance(error, (ConnectionError, TimeoutError)):
            print(f"viewer: {type(error).__name__}: {error}", file=sys.stderr, flush=True)

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{HOST}:{self.server_address[1]}/"


def serve(study: str | Path, *, port: int = 0, open_browser: bool = False) -> None:
    """Serve the viewer of a study on 127.0.0.1 until it is interrupted (Ctrl+C).

    Parameters
    ----------
    study : path
        What `llmbrain run` wrote, or a scan store.
    port : int
        0 takes a free one.
    open_browser : bool

    Raises
    ------
    InputError
        If the folder holds nothing to view, or the port cannot be had.
    """
    try:
        server = Server(study, port)
    except (OSError, OverflowError) as error:
        raise InputError(f"port={port} cannot be used: {error}") from error
    print(f"{server.folder.root} is at {server.url} (Ctrl+C to stop)", file=sys.stderr, flush=True)
    if open_browser:
        import webbrowser

        webbrowser.open(server.url)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()

"""The report of a model with 32 layers of 11,008 neurons and 32 networks: seconds and megabytes; how fast the viewer
answers.

    python benchmarks/reporting.py

A Llama of that shape with random weights and a narrow residual stream is scanned (two runs of 512 tokens, bfloat16),
so that report and viewer read a real store. Maps are drawn: Laplace tails as ICA maps have them, or Gaussian, which is
the worst case for the size of the page. Wanted: the report in under 60 s and at most 10 MB, a slice in under 100 ms.
Writes ``benchmarks/results/reporting.md``.
"""

from __future__ import annotations

import argparse
import http.client
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import llmbrain as lb
from llmbrain.datasets import load_demo
from llmbrain.networks import FunctionalNetworks
from llmbrain.reporting import write_report
from llmbrain.reporting.viewer import HOST, Server

LAYERS, WIDTH, NETWORKS, TOKENS = 32, 11_008, 32, 512
PAUSE = 2  # seconds in which a person looks at the page; the server checks the store's checksums meanwhile


def study(folder: Path) -> list[lb.Scan]:
    """A scan of a random Llama of the wanted shape."""
    brain = load_demo()
    config = LlamaConfig(
        vocab_size=len(brain.tokenizer), hidden_size=32, intermediate_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=TOKENS,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    texts = brain.texts(n=2, n_tokens=TOKENS)
    return lb.scan(model, brain.tokenizer, texts, out=folder / "scan", dtype="bfloat16")


def networks(kind: str, scans: list[lb.Scan]) -> FunctionalNetworks:
    """Networks with drawn maps and time courses."""
    rng = np.random.default_rng(0)
    draw = rng.laplace if kind == "Laplace" else rng.normal
    maps = draw(size=(NETWORKS, LAYERS * WIDTH)).astype(np.float32)
    courses = [rng.normal(size=(scan.n_tokens, NETWORKS)) for scan in scans]
    return FunctionalNetworks(maps, scans[0].space, time_courses=courses)


def timed(server: Server, path: str) -> float:
    """Seconds from the request to the last byte of the answer."""
    connection = http.client.HTTPConnection(HOST, server.server_address[1], timeout=60)
    start = time.perf_counter()
    connection.request("GET", path)
    response = connection.getresponse()
    body = response.read()
    seconds = time.perf_counter() - start
    connection.close()
    assert response.status == 200, body[:200]
    return seconds


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=50, help="requests of each kind")
    repeats = parser.parse_args().repeats
    lines = ["| report, maps | seconds | MB |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scans = study(folder)
        for kind in ("Laplace", "Gaussian"):
            found = networks(kind, scans)
            start = time.perf_counter()
            page = write_report(folder / "report.html", title="Benchmark", scans=scans, networks=found)
            seconds = time.perf_counter() - start
            lines.append(f"| {kind} | {seconds:.1f} | {page.stat().st_size / 1e6:.1f} |")
            print(lines[-1], flush=True)
        found.save(folder / "networks")
        server = Server(folder)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        rng = np.random.default_rng(0)
        at = list(zip(*(rng.integers(0, top, repeats) for top in (len(scans), scans[0].n_tokens, LAYERS))))
        requests = {
            "the page, first": ["/"],
            "one layer at one token": [f"/api/volume?run={r}&token={t}&layer={layer}" for r, t, layer in at],
            "all layers at one token": [f"/api/volume?run={r}&token={t}" for r, t, _ in at],
            "one neuron over a run": [f"/api/series?run={r}&layer={layer}&neuron={t}" for r, t, layer in at],
            "the map of a network": [f"/api/map?network={t % NETWORKS}" for _, t, _ in at],
            "time courses of a run": [f"/api/courses?run={r}" for r, _, _ in at],
        }
        lines += ["", "| viewer, a request for | first, ms | median, ms | slowest, ms |", "|---|---|---|---|"]
        for n, (kind, paths) in enumerate(requests.items()):
            time.sleep(PAUSE if n == 1 else 0)
            times = [1000 * timed(server, path) for path in paths]
            lines.append(f"| {kind} | {times[0]:.0f} | {np.median(times):.1f} | {max(times):.0f} |")
            print(lines[-1], flush=True)
        server.shutdown()
        server.server_close()
    head = (
        f"{NETWORKS} networks, {LAYERS} layers of {WIDTH:,} neurons, two runs of {TOKENS} tokens, "
        f"{torch.get_num_threads()} threads; {repeats} requests of each kind, the first slice "
        f"{PAUSE} s after the page.\n\n"
    )
    target = Path(__file__).parent / "results" / "reporting.md"
    target.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

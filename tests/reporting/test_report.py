"""The report: every number in it can be read back, every text is harmless, every part may be missing."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time
import warnings
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from study_data import KINDS, NASTY, SPACE, make_everything, make_study

import llmbrain as lb
from llmbrain._validation import InputError
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.decomposition import GroupICA
from llmbrain.intervention import LesionTable
from llmbrain.networks import FunctionalNetworks
from llmbrain.page import Report, Section
from llmbrain.page.text import number, short_name, shown_tokens, token_label, visible
from llmbrain.pruning import PruningPlan
from llmbrain.reporting import build_report, write_report
from llmbrain.reporting.effects import condition_effects, labels_of, standardized, token_types, top_tokens
from llmbrain.reporting.pack import STEPS, blob, codebook, decode, encode, pack_maps
from llmbrain.scanning import Scan


class Page(HTMLParser):
    """Elements, texts and addresses of a page; fails where elements are not closed in order."""

    VOID = frozenset({"meta", "img", "br", "input", "link", "hr", "use", "path", "rect", "circle", "line"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def data_of(text: str) -> dict[str, Any]:
    return json.loads(re.search(r'id="llmbrain-data">(.*?)</script>', text, re.DOTALL).group(1))  # type: ignore[union-attr]


def blob_of(text: str, name: str) -> np.ndarray:
    packed = re.search(rf'id="blob-{name}">(.*?)</script>', text, re.DOTALL).group(1)  # type: ignore[union-attr]
    return np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype=np.int8)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("report") / "new" / "report.html", title=NASTY, **make_everything())


# -- the page ------------------------------------------------------------------------------------------------------


def test_page_is_well_formed_and_alone(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    parsed = Page(text)
    tags = {tag for tag, _ in parsed.tags}
    assert "img" not in tags  # what the nasty text wanted
    assert "i" not in {tag for tag, attrs in parsed.tags if tag == "i" and not attrs.get("style")}
    assert not tags & {"link", "iframe", "object", "base"}
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action"):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:80])
            assert not name.startswith("on"), (tag, name)
    assert "https://" not in text
    assert re.sub(r"http://www\.w3\.org/[\w./#]*", "", text).count("http://") == 0
    assert "\x00" not in text
    assert "\x1b" not in text
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for used in re.findall(r"url\(#([\w-]+)\)", text):
        assert used in ids


def test_page_says_what_it_was_given(page: Path) -> None:
    text = Page(page.read_text(encoding="utf-8")).text
    for expected in ("4.646", "6.500", "+39.9%", "80", "45", "0.73", "0.91", "0.111", "llmbrain run", "versions.torch",
                     "word3", "sort", "43.75%", "An et al. 2024", "arXiv:2312.11983", "Hyvärinen", "arXiv:2502.20408",
                     "converged in 12 iterations", "seed 3", "3 < 4", "<i>IC01</i>", "careful"):  # fmt: skip
        assert expected in text, expected
    assert "arXiv:2306.11695" not in text  # Wanda was not used
    assert "did NOT converge" not in text


def test_maps_and_courses_read_back(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    data, study = data_of(text), make_study()
    networks = study["networks"]
    book = np.array(data["maps"]["book"], dtype=np.float32)
    for k in range(3):
        values = decode(blob_of(text, f"map-{k}"), book)
        near = np.abs(networks.maps[k]) < 2
        assert np.abs(values - networks.maps[k])[near].max() <= data["maps"]["step"] / 2 + 1e-4
        np.testing.assert_allclose(values[~near], networks.maps[k][~near], rtol=0.03)
    assert data["space"] == {"widths": [30, 20, 30], "grid": list(SPACE.grid)}
    assert data["profiles"] == networks.layer_profile().to_numpy().tolist()
    joined = np.concatenate(networks.time_courses)
    course = decode(blob_of(text, "course-1"), np.array(data["courses"]["book"], dtype=np.float32)).reshape(3, -1)
    expected = (networks.time_courses[1] - joined.mean(axis=0)) / joined.std(axis=0)
    np.testing.assert_allclose(course.T, expected, atol=0.1)
    assert data["runs"][0]["tokens"][4] == " word4"
    assert data["runs"][0]["conditions"][:2] == [[0, 20, "sort"], [20, 40, "reverse"]]
    assert data["runs"][0]["tokens"][5].startswith("</script><img")  # as text, not as markup


def test_title_alone_is_a_report(tmp_path: Path) -> None:
    path = write_report(tmp_path / "r.html", title="empty")
    text = Page(path.read_text(encoding="utf-8")).text
    for expected in ("No numbers were given", "No networks were given", "Nothing was pruned", "No provenance"):
        assert expected in text, expected
    assert list(tmp_path.iterdir()) == [path]  # no temporary file is left


@pytest.mark.parametrize("missing", sorted(make_everything()))
def test_each_part_may_be_missing(missing: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = build_report(title="t", **{k: v for k, v in make_everything().items() if k != missing}).html()
    expected = {
        "lesions": "No lesion was tried", "stability": "Stability was not measured", "plan": "Nothing was pruned",
        "networks": "No networks were given", "scans": "Which tokens drive it is not known",
        "warnings": "None was raised", "provenance": "No provenance was given",
    }  # fmt: skip
    assert expected.get(missing, "Methods") in Page(text).text


def test_networks_without_a_space_or_time_courses() -> None:
    maps = np.random.default_rng(0).standard_normal((2, 50))
    text = Page(build_report(title="t", networks=FunctionalNetworks(maps, threshold=1.5)).html()).text
    assert "do not know their layers" in text
    assert "No time courses were given" in text


def test_time_courses_that_do_not_fit_the_scans_are_said() -> None:
    study = make_study()
    study["scans"] = study["scans"][:1]
    text = Page(build_report(title="t", **study).html()).text
    assert "do not fit scans" in text
    assert "Which tokens drive it is not known" in text


def test_long_texts_are_cut_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmbrain.reporting.write.RUN_TOKENS", 50)
    monkeypatch.setattr("llmbrain.reporting.write.ALL_TOKENS", 50)
    text = build_report(title="t", **make_study()).html()
    runs = data_of(text)["runs"]
    assert [(run["n"], run["of"], len(run["tokens"])) for run in runs] == [(50, 120, 50)]
    assert "1 runs are cut, 1 not shown" in Page(text).text


def test_mixing_of_the_ica_serves_where_networks_have_no_courses() -> None:
    study = make_study()
    networks = study["networks"]
    bare = FunctionalNetworks(networks.maps, SPACE, standardize=False)
    ica = SimpleNamespace(mixing_=[run * 7 + 3 for run in networks.time_courses])
    data = data_of(build_report(title="t", scans=study["scans"], ica=ica, networks=bare).html())
    assert len(data["runs"]) == 2


def test_stability_is_matched_to_the_networks() -> None:
    study = make_study()
    maps = study["networks"].maps
    clusters = SimpleNamespace(iq=np.array([0.93, 0.55, 0.31]), maps=-maps[[2, 0, 1]])
    text = build_report(title="t", stability=clusters, **study).html()
    found = re.findall(r"stability Iq ([\d.]+)", Page(text).text)
    assert found == ["0.55", "0.31", "0.93"]


def test_report_of_its_own() -> None:
    report = Report("Mine").add("Table", pd.DataFrame({"a": ["<x>", 1.5]})).add(Section("Table", "again"))
    assert [section.id for section in report.sections] == ["table", "table-2"]
    text = Page(report.html()).text
    assert "<x>" in text
    assert "1.50" in text
    assert report._repr_html_().startswith("<iframe")
    assert "sandbox" in report._repr_html_()
    with pytest.raises(InputError, match="Section"):
        report.add(3)  # type: ignore[arg-type]


def test_unknown_parts_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="network"):
        write_report(tmp_path / "r.html", title="t", network=1)


@pytest.mark.slow
def test_a_7b_model_fits_ten_megabytes_and_a_minute(tmp_path: Path) -> None:
    """Normal noise is the worst case: no map of an ICA is harder to compress."""
    space = NeuronSpace([11008] * 32)
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((32, space.n_neurons), dtype=np.float32)
    maps[:, ::500] *= 8
    courses = [rng.standard_normal((2048, 32)) for _ in range(8)]
    scans = [Scan.from_array(np.zeros((2048, 1)), tokens=[f" t{i}" for i in range(2048)]) for _ in range(8)]
    networks = FunctionalNetworks(maps, space, time_courses=courses)
    start = time.process_time()
    path = write_report(tmp_path / "report.html", title="7B", networks=networks, scans=scans)
    assert time.process_time() - start < 60
    assert path.stat().st_size < 10e6
    data = data_of(path.read_text(encoding="utf-8"))
    assert data["maps"]["step"] <= 0.5


# -- packing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("largest", [1.0, 12.0, 400.0])
def test_codes_are_near_and_keep_sign_and_zero(step: float, largest: float) -> None:
    book = codebook(largest, step)
    assert (np.diff(book) > 0).all()
    assert len(book) == 128
    values = np.linspace(-largest, largest, 4001)
    back = decode(encode(values, book), book)
    small = np.abs(values) < 2
    assert np.abs(back - values)[small].max(initial=0) <= (step / 2 if step < 2 else 2) + 1e-6
    np.testing.assert_allclose(back[~small], values[~small], rtol=0.06)
    assert (back * values >= 0).all()
    assert decode(encode([0.0, np.nan, np.inf], book), book).tolist() == [0, 0, 0]


def test_blob_is_zlib_of_the_codes() -> None:
    codes = np.array([-127, 0, 5, 127], dtype=np.int8)
    assert zlib.decompress(base64.b64decode(blob(codes))) == codes.tobytes()


def test_pack_spends_its_budget_on_the_background() -> None:
    maps = np.random.default_rng(0).standard_normal((4, 20_000))
    rich, poor = pack_maps(maps), pack_maps(maps, budget=30_000)
    assert rich["step"] == STEPS[0]
    assert poor["step"] == STEPS[-1]
    book = np.array(poor["book"], dtype=np.float32)
    back = decode(np.frombuffer(zlib.decompress(base64.b64decode(poor["blobs"][0])), dtype=np.int8), book)
    strong = np.abs(maps[0]) >= 2
    assert (back[~strong] == 0).all()
    np.testing.assert_allclose(back[strong], maps[0][strong], rtol=0.02)


# -- text ----------------------------------------------------------------------------------------------------------


def test_visible_shows_what_a_page_cannot() -> None:
    assert visible("a\x00\x1b\x7f\n\t") == "a␀␛␡\n\t"
    assert visible("\u202e\ud800\x85") == "\ufffd" * 3
    assert visible("é▁😀") == "é▁😀"


def test_tokens_read_as_the_text() -> None:
    text = "Once  upon\na time"
    spans = [(0, 0), (0, 4), (6, 10), (11, 12), (12, 12), (13, 17)]
    scan = SimpleNamespace(n_tokens=6, text=text, offsets=np.array(spans), tokens=["x"] * 6)
    shown = shown_tokens(scan)
    assert "".join(shown) == text
    assert shown == ["", "Once", "  upon", "\na", "", " time"]
    plain = SimpleNamespace(n_tokens=4, text=None, offsets=None, tokens=["▁the", "Ġcat", "<0x0A>", "Ċ"])
    assert shown_tokens(plain) == [" the", " cat", "\n", "\n"]
    assert shown_tokens(SimpleNamespace(n_tokens=2, text=None, offsets=None, tokens=["", ""])) == [" #0", " #1"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"), (0.123456, "0.123"), (12.3456, "12.3"), (21234.5, "21,234"), (None, "–"),
        (float("nan"), "–"), (-0.5, "−0.500"), (1e-6, "1.00e−6"), (True, "yes"), (0.0, "0.00"), (np.int64(5), "5"),
    ],
)  # fmt: skip
def test_numbers(value: Any, text: str) -> None:
    assert number(value) == text


# -- effects -------------------------------------------------------------------------------------------------------


def test_condition_effects_equal_a_plain_loop() -> None:
    study = make_study(n_tokens=60)
    courses = study["networks"].time_courses
    table = condition_effects(courses, study["scans"]).set_index(["network", "condition"])
    series = np.concatenate(courses).astype(float)
    real = np.concatenate([scan.positions > 0 for scan in study["scans"]])  # the first of a block has no part in it
    series = np.where(real[:, None], (series - series[real].mean(axis=0)) / series[real].std(axis=0), 0)
    labels = np.concatenate([labels_of(scan) for scan in study["scans"]])
    labels[~real] = None
    n = len(series)

    def effects(shift: int) -> np.ndarray:
        turned = np.roll(labels, shift)
        known = np.array([label is not None for label in turned])
        inside = [turned == kind for kind in KINDS]
        return np.array([[series[on, k].mean() - series[known & ~on, k].mean() for on in inside] for k in range(3)])

    null = np.array([np.abs(effects(shift)).max() for shift in range(10, n - 9)])
    for k in range(3):
        for i, kind in enumerate(KINDS):
            row = table.loc[(k, kind)]
            assert row["effect"] == pytest.approx(effects(0)[k, i], abs=1e-5)
            expected = (1 + (null >= abs(effects(0)[k, i]) - 1e-9).sum()) / (1 + len(null))
            assert row["p"] == pytest.approx(expected, abs=1.5 / (1 + len(null)))
    assert table["control"].iloc[0] == pytest.approx(np.quantile(null, 0.95), abs=1e-5)


def test_condition_effects_find_what_is_there_and_hold_their_error() -> None:
    rng = np.random.default_rng(3)
    order = rng.permutation(list("abcabcabca"))
    events = pd.DataFrame({"onset": np.arange(0, 300, 30), "duration": 30, "trial_type": order})
    scan = SimpleNamespace(n_tokens=300, events=events)
    found = 0
    for _ in range(100):
        noise = rng.standard_normal((330, 4))
        smooth = sum(noise[i : i + 300] for i in range(15))  # slow series: a t test would fail here
        found += condition_effects([np.asarray(smooth, dtype=np.float32)], [scan])["p"].min() < 0.05
    assert found <= 12  # 5 expected; 12 is beyond the 99.8th percentile
    driven = rng.standard_normal((300, 2)).astype(np.float32)
    driven[:, 1] += 1.5 * (labels_of(scan) == "b")
    table = condition_effects([driven], [scan]).set_index(["network", "condition"])
    assert table.loc[(1, "b"), "p"] < 0.05
    assert table.loc[(1, "b"), "effect"] > 1
    assert table.loc[(0, "b"), "p"] > 0.05


def test_conditions_need_two_kinds() -> None:
    events = pd.DataFrame({"onset": [0], "duration": [50], "trial_type": ["only"]})
    scan = SimpleNamespace(n_tokens=100, events=events)
    assert condition_effects([np.zeros((100, 2), dtype=np.float32)], [scan]).empty


def test_a_model_is_called_by_the_last_part_of_its_path(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    assert short_name(str(tmp_path / "small")) == "small"
    assert short_name("/somewhere/Model.Q4_1.gguf") == "Model.Q4_1"
    assert short_name("org/model") == "org/model"


def test_top_tokens_come_with_the_text_around_them() -> None:
    study = make_study()
    texts = [shown_tokens(scan) for scan in study["scans"]]
    top = top_tokens(study["networks"], 1, study["scans"], texts, n=2)
    assert [(item["run"], item["token"]) for item in top] in ([(0, 60), (1, 60)], [(1, 60), (0, 60)])
    assert top[0]["text"] == " word4"
    assert top[0]["before"].endswith(" word3")
    assert len(top[0]["before"]) == len(top[0]["after"]) == 40
    low = top_tokens(study["networks"], 1, study["scans"], texts, n=3, sign=-1)
    assert all(item["value"] < -1 for item in low)


def test_the_attention_sink_is_no_response() -> None:
    rng = np.random.default_rng(0)
    events = pd.DataFrame({"onset": [0, 50], "duration": 50, "trial_type": ["a", "b"]})
    positions = np.tile(np.arange(50), 2)
    scan = SimpleNamespace(n_tokens=100, events=events, positions=positions)
    course = rng.standard_normal((100, 2)).astype(np.float32)
    course[50:, 1] += 1
    sunk = course.copy()
    sunk[positions == 0] = 1000
    assert condition_effects([sunk], [scan]).equals(condition_effects([course], [scan]))
    assert standardized([sunk], [scan])[0][7] == pytest.approx(standardized([course], [scan])[0][7], abs=1e-4)
    words = [["sink", *["word"] * 49] * 2]
    assert [kind for kind, *_ in token_types([sunk], words, min_count=1, scans=[scan])[0]] == ["word"]


def test_token_types_are_means_of_what_is_seen_often() -> None:
    courses = [np.array([[1.0, 3.0, 2.0, 9.0], [0, 0, 0, 0]]).T, np.array([[3.0, 4.0, 7.0], [6.0, 0, 0]]).T]
    kinds = token_types(courses, [["a", "b", "a", "c"], ["a", "b", ""]], min_count=2)
    assert kinds == [[("b", 3.5, 2), ("a", 2.0, 3)], [("a", 2.0, 3), ("b", 0.0, 2)]]
    assert [token_label(text) for text in (" the", "\n", "  ", "", "a\tb")] == ["the", "↵", "␣", "∅", "a⇥b"]


# -- lb.report ---------------------------------------------------------------------------------------------------------


def test_each_kind_of_object_has_its_report() -> None:
    study = make_everything()
    assert "IC02" in lb.report(study["networks"], scans=study["scans"], title="Mine").html()
    kept = (np.arange(10), np.arange(20), np.arange(15))
    plan = PruningPlan("flap", "uniform", 0.4, kept, (30, 20, 30), "")
    assert "An et al. 2024" in Page(lb.report(plan).html()).text
    draws = pd.DataFrame(columns=["network", "evaluation", "control", "draw", "effect"])
    table = LesionTable(study["lesions"].assign(harm=study["lesions"]["effect"]), draws, {})
    assert "0.732" in Page(lb.report(table).html()).text


def test_a_subclass_has_the_report_of_its_class() -> None:
    class MyICA(GroupICA):
        pass

    class MyNetworks(FunctionalNetworks):
        pass

    study = make_everything()
    page = lb.report(MyICA(2, run_components=3).fit(study["scans"]), scans=study["scans"])
    assert len(data_of(page.html())["runs"]) == 2
    assert page.title == "llmbrain: MyICA"
    assert "IC01" in lb.report(MyNetworks(study["networks"].maps, SPACE)).html()


def test_what_has_no_report_is_said_and_can_be_given_one() -> None:
    class Mine:
        pass

    with pytest.raises(InputError, match=r"obj=Mine has no report: allowed are .*FunctionalNetworks, GroupICA"):
        lb.report(Mine())
    with pytest.raises(InputError, match="fit it first"):
        lb.report(GroupICA(2))

    def report_mine(obj: Mine, **contents: Any) -> Report:
        return Report("mine")

    lb.report.register(Mine, report_mine)
    assert lb.report(Mine()).title == "mine"


def test_coupling_with_a_brain_is_shown_with_its_null() -> None:
    from llmbrain.comparison.coupling import couple

    rng = np.random.default_rng(0)
    brain = rng.standard_normal((120, 3))
    model = rng.standard_normal((120, 2))
    model[:, 1] += 2 * brain[:, 2]
    result = couple(model, brain, networks=["IC00", "IC01"], regions=["a", "b", "<c>"])
    text = Page(build_report(title="t", comparison={"coupling": result}).html()).text
    assert "IC01, <c>" in text  # the strongest pair leads the lag profile
    assert "circular null" in text


@pytest.mark.slow
def test_chromium_runs_the_page(page: Path, tmp_path: Path) -> None:
    """Without selenium: what the scripts made of the page, and what the console said."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Debian's chromium is not installed")
    command = [
        chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path}", "--enable-logging=stderr", "--virtual-time-budget=8000", "--dump-dom",
        page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    tags = Page(done.stdout).tags
    shown = [attributes["id"] for tag, attributes in tags if "chosen" in attributes.get("class", "")]
    assert shown == ["network-0"]
    assert sum("data-at" in attributes for _, attributes in tags) == 120  # the tokens of the first run
    assert [attributes.get("value") for tag, attributes in tags if tag == "option"][:3] == ["0", "1", "2"]

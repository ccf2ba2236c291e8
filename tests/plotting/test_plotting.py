"""Figures: what is drawn is what was given, zero is the middle of the colours, and nothing needs a display."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from llmbrain import plotting
from llmbrain._validation import InputError
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.networks import FunctionalNetworks
from llmbrain.plotting.style import diverging
from llmbrain.scanning import Scan

SPACE = NeuronSpace([12, 7, 12])


@pytest.fixture
def networks() -> FunctionalNetworks:
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((3, SPACE.n_neurons))
    maps[:, :3] += 8
    return FunctionalNetworks(maps, SPACE, threshold=2.0)


@pytest.fixture
def scan() -> Scan:
    rng = np.random.default_rng(1)
    data = rng.standard_normal((40, SPACE.n_neurons)).astype(np.float32)
    events = pd.DataFrame({"onset": [0, 20], "duration": [20, 20], "trial_type": ["a$b", "c"]})
    tokens = [f" w{i}" for i in range(38)] + ["$x_{$", "\x07\n"]
    return Scan.from_array(data, SPACE, tokens=tokens, events=events, name="run $1$")


def lesions() -> pd.DataFrame:
    rows = [("IC00", "a", 0.9, 0.001), ("IC00", "b", 0.0, 0.9), ("IC01", "a", 0.02, 0.03), ("IC01", "b", -0.5, 0.2)]
    frame = pd.DataFrame(rows, columns=["network", "evaluation", "effect", "p"])
    return frame.assign(q=[0.004, 0.9, 0.06, 0.3], random=0.01)


def every_figure(networks: FunctionalNetworks, scan: Scan) -> dict[str, Figure]:
    """Each public figure once."""
    table = pd.DataFrame({"method": ["random", "random", "ours $", "ours $"], "parameters": [1, 2, 1, 2],
                          "perplexity": [30.0, 9.0, 8.0, 6.0]})  # fmt: skip
    latency = pd.DataFrame({"case": ["prefill", "prefill"], "model": ["dense", "30%"], "seconds": [2.0, 1.5],
                            "sd": [0.1, 0.2]})  # fmt: skip
    plan = SimpleNamespace(kept=[np.arange(5), np.arange(7), np.arange(12)], widths_before=[12, 7, 12])
    return {
        "slices": plotting.plot_network(networks, index=1),
        "flat": plotting.plot_network(networks[0], kind="flat", order="similarity"),
        "glass": plotting.plot_glass_model(networks),
        "profile": plotting.plot_layer_profile(networks),
        "profile lines": plotting.plot_layer_profile(networks, kind="lines"),
        "carpet": plotting.plot_carpet(scan),
        "courses": plotting.plot_time_courses(np.random.default_rng(0).standard_normal((40, 3)), tokens=scan.tokens),
        "courses heat": plotting.plot_time_courses(np.eye(40)[:, :3], kind="heat"),
        "connectivity": plotting.plot_connectivity(np.corrcoef(np.random.default_rng(0).standard_normal((5, 30)))),
        "lesions": plotting.plot_lesion_table(lesions()),
        "stability": plotting.plot_stability([0.9, np.nan, 0.5]),
        "order": plotting.plot_model_order(pd.DataFrame({"n_components": [5, 10], "iq": [0.9, 0.7]}), chosen=5),
        "widths": plotting.plot_widths(plan),
        "tradeoff": plotting.plot_tradeoff(table, dense={"parameters": 3, "perplexity": 4.0}),
        "latency": plotting.plot_latency(latency, spread="sd"),
        "coupling": plotting.plot_coupling(np.array([[0.2, -0.1]]), significant=np.array([[True, False]])),
        "lags": plotting.plot_lag_profile([-1, 0, 1], [0.1, 0.3, 0.2], threshold=0.15, tr=2.0),
        "ceilings": plotting.plot_ceilings(
            pd.DataFrame({"region": ["a", "b$"], "isc": [0.2, np.nan], "ceiling": [0.5, np.nan]}), r=[-0.1, np.nan]
        ),
        "brain": plotting.plot_brain_map([0.3, np.nan], two_regions()),
    }


def two_regions() -> Any:
    """A fitted masker of an atlas with two labels."""
    from nilearn.maskers import NiftiLabelsMasker

    labels = np.zeros((5, 5, 5), dtype=np.int16)
    labels[1], labels[3] = 1, 2
    affine = np.diag([20.0, 20, 20, 1])
    affine[:3, 3] = -40
    return NiftiLabelsMasker(nib.Nifti1Image(labels, affine), standardize=None).fit()


def test_every_figure_draws_without_a_display_or_pyplot(networks: FunctionalNetworks, scan: Scan) -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    for name, figure in every_figure(networks, scan).items():
        assert isinstance(figure, Figure), name
        for kind in ("png", "svg"):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind)
            assert buffer.tell() > 1000, name
    assert plt.get_fignums() == before


def test_public_names_are_all_drawn_here(networks: FunctionalNetworks, scan: Scan) -> None:
    functions = {name for name in plotting.__all__ if name.startswith("plot_")}
    import inspect

    source = inspect.getsource(every_figure)
    assert {name for name in functions if name in source} == functions


def test_given_axes_and_figures_are_used(networks: FunctionalNetworks) -> None:
    figure = Figure()
    ax = figure.add_subplot()
    assert plotting.plot_network(networks, kind="flat", ax=ax) is figure
    assert len(ax.images) == 1
    other = Figure()
    assert plotting.plot_network(networks, figure=other) is other
    part = Figure().subfigures(1, 2)[0]
    assert plotting.plot_stability([0.1, 0.2], figure=part) is part


def test_slices_hold_the_volume_and_zero_is_the_middle(networks: FunctionalNetworks) -> None:
    figure = plotting.plot_network(networks, index=2, layers=[2, 1])
    images = [ax.images[0] for ax in figure.axes if ax.images and ax.get_title().startswith("layer")]
    volume = SPACE.to_volume(networks.maps[2].astype(float), fill=np.nan)
    for image, layer in zip(images, [2, 1]):
        np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), volume[:, :, layer].T)
        assert image.norm.vmin == -image.norm.vmax
    assert len(images) == 2
    assert np.ma.getmaskarray(np.ma.masked_invalid(images[1].get_array())).sum() == 5  # padding of the layer of 7


def test_flat_map_keeps_every_value_in_its_layer(networks: FunctionalNetworks) -> None:
    for order in ("index", "similarity"):
        image = plotting.plot_network(networks, index=0, kind="flat", order=order).axes[0].images[0]
        drawn = np.ma.filled(image.get_array(), np.nan)
        for layer in range(3):
            values = networks.maps[0][SPACE.layer_slice(layer)]
            cells = drawn[layer][~np.isnan(drawn[layer])]
            np.testing.assert_allclose(np.sort(cells), np.sort(values), rtol=1e-6)
            if order == "index":
                np.testing.assert_allclose(cells, values, rtol=1e-6)


def test_threshold_hides_and_array_needs_a_space(networks: FunctionalNetworks) -> None:
    image = plotting.plot_network(networks.maps[0], SPACE, kind="flat", threshold=2.0).axes[0].images[0]
    drawn = np.asarray(np.ma.filled(image.get_array(), 0))
    assert (np.abs(drawn[drawn != 0]) >= 2).all()
    with pytest.raises(InputError, match="space"):
        plotting.plot_network(networks.maps[0])
    with pytest.raises(InputError, match="layer=7"):
        plotting.plot_network(networks, layers=[7])
    with pytest.raises(InputError, match="kind"):
        plotting.plot_network(networks, kind="brain")


def test_glass_model_draws_the_key_neurons(networks: FunctionalNetworks) -> None:
    figure = plotting.plot_glass_model(networks)
    for ax, network in zip(figure.axes, networks):
        dots = ax.collections[-1]
        assert len(dots.get_offsets()) == network.size
        assert f"({network.size})" in ax.get_title()
        assert len(ax.collections[0].get_paths()) == SPACE.n_layers


def test_layer_profile_is_the_share_of_key_neurons(networks: FunctionalNetworks) -> None:
    share = plotting.plot_layer_profile(networks).axes[0].images[0].get_array()
    counts = networks.layer_profile().to_numpy()
    np.testing.assert_allclose(share, 100 * counts / counts.sum(axis=1, keepdims=True))


def test_carpet_is_the_standardised_scan(scan: Scan) -> None:
    figure = plotting.plot_carpet(scan, tokens=slice(10, 30), layers=[1])
    data = scan.data(layers=[1], tokens=slice(10, 30)).T.astype(float)
    expected = (data - data.mean(axis=1, keepdims=True)) / data.std(axis=1, keepdims=True)
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), expected, atol=1e-6)
    assert [text.get_text() for text in figure.axes[1].texts] == [f"w{i}" for i in range(10, 30)]
    with pytest.raises(InputError, match="tokens"):
        plotting.plot_carpet(scan, tokens=slice(5, 5))


def test_carpet_thins_neurons_but_never_a_layer_away(scan: Scan) -> None:
    image = plotting.plot_carpet(scan, max_neurons=6).axes[0].images[0].get_array()
    assert image.shape[0] <= 7
    assert image.shape[1] == 40


def test_time_courses_say_what_is_wrong() -> None:
    with pytest.raises(InputError, match="networks=5"):
        plotting.plot_time_courses(np.zeros((4, 2)), networks=[5])
    with pytest.raises(InputError, match="tokens has 3"):
        plotting.plot_time_courses(np.zeros((4, 2)), tokens=["a"] * 3)
    line = plotting.plot_time_courses(np.arange(8.0).reshape(4, 2), networks=[1]).axes[0].lines[0]
    np.testing.assert_array_equal(line.get_ydata(), [1, 3, 5, 7])


def test_lesion_marks_follow_p_and_q() -> None:
    ax = plotting.plot_lesion_table(lesions()).axes[0]
    assert sorted(text.get_text() for text in ax.texts) == ["0.02", "0.9*"]  # p < .05 without and with q < .05
    image = ax.images[0]
    np.testing.assert_allclose(image.get_array(), [[0.9, 0.0], [0.02, -0.5]])
    assert image.norm.vmin == -image.norm.vmax


def test_long_lesions_reads_the_table_of_the_intervention_room() -> None:
    frame = pd.DataFrame(
        {
            "network": ["IC00", "IC00"], "evaluation": ["loss", "accuracy"], "effect": [0.5, -0.2],
            "effect_low": [0.4, -0.3], "effect_high": [0.6, -0.1], "harm": [0.5, 0.2], "harm_low": [0.4, 0.1],
            "harm_high": [0.6, 0.3], "random_effect": [0.01, -0.02], "matched_effect": [0.03, -0.04],
            "p_random": [0.01, 0.2], "q_random": [0.02, 0.2],
        }
    )  # fmt: skip
    long = plotting.long_lesions(SimpleNamespace(frame=frame))
    assert long["effect"].tolist() == [0.5, 0.2]  # harm: positive is worse
    assert long["control"].tolist() == [0.01, 0.02]  # turned like the harm
    assert long["matched"].tolist() == [0.03, 0.04]
    assert long["low"].tolist() == [0.4, 0.1]
    assert long["significant"].tolist() == [True, False]


def test_long_lesions_reads_wide_tables_and_numbers() -> None:
    wide = pd.DataFrame({"a": [1.0, 0.0], "b": [0.0, 2.0]}, index=[0, 1])
    wide.attrs["significant"] = [[True, False], [False, True]]
    long = plotting.long_lesions(wide, names=["N0", "N1"])
    assert long["network"].tolist() == ["N0", "N0", "N1", "N1"]
    assert long["significant"].tolist() == [True, False, False, True]
    with pytest.raises(InputError, match="lesion table"):
        plotting.long_lesions(pd.DataFrame({"x": ["y"]}))


def test_connectivity_draws_the_strongest_edges() -> None:
    matrix = np.eye(4)
    matrix[0, 1] = matrix[1, 0] = -0.9
    matrix[2, 3] = matrix[3, 2] = 0.5
    figure = plotting.plot_connectivity(matrix, density=1 / 3)
    edges = figure.axes[1].lines
    assert len(edges) == 2
    assert sorted(line.get_linestyle() for line in edges) == ["-", "--"]
    drawn = figure.axes[0].images[0].get_array()
    assert np.isnan(np.ma.filled(drawn, np.nan)).sum() == 4  # the diagonal says nothing
    with pytest.raises(InputError, match="square"):
        plotting.plot_connectivity(np.zeros((2, 3)))
    with pytest.raises(InputError, match="density"):
        plotting.plot_connectivity(matrix, density=0)


def test_stability_sorts_and_marks_the_unstable() -> None:
    ax = plotting.plot_stability(SimpleNamespace(iq=np.array([0.5, 0.95, 0.85])), limit=0.8).axes[0]
    stable, unstable = ax.collections
    assert len(stable.get_offsets()) == 2
    assert len(unstable.get_offsets()) == 1
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["IC01", "IC02", "IC00"]


def test_widths_are_the_plan() -> None:
    kept, before = [3, 0, 12], [12, 7, 12]
    ax = plotting.plot_widths(kept, before).axes[0]
    heights = [[bar.get_height() for bar in bars] for bars in ax.containers]
    assert heights == [before, kept]
    assert [text.get_text() for text in ax.texts] == ["25%", "0%", "100%"]
    with pytest.raises(InputError, match="layers"):
        plotting.plot_widths(kept, [1])
    assert plotting.kept_widths(SimpleNamespace(kept=[[1, 2], []], widths_before=(4, 4))) == ([2, 0], [4, 4])


def test_tradeoff_draws_each_method_in_order_of_size() -> None:
    table = pd.DataFrame({"method": ["ours", "ours"], "parameters": [20, 10], "perplexity": [5.0, 50.0]})
    ax = plotting.plot_tradeoff(table).axes[0]
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [10, 20])
    assert ax.get_yscale() == "log"
    with pytest.raises(InputError, match="no column"):
        plotting.plot_tradeoff(table.drop(columns="method"))


def test_coupling_marks_and_shapes() -> None:
    ax = plotting.plot_coupling(np.array([[0.1, np.nan], [0.3, -0.4]]), significant=[[0, 0], [1, 0]]).axes[0]
    assert [text.get_position() for text in ax.texts] == [(0, 1)]
    with pytest.raises(InputError, match="significant"):
        plotting.plot_coupling(np.zeros((2, 2)), significant=np.zeros(2))
    with pytest.raises(InputError, match="lags"):
        plotting.plot_lag_profile([0, 1], np.zeros(3))


def _linear(rgb: Any) -> Any:
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def test_diverging_colours_differ_for_the_colour_blind() -> None:
    """Machado et al. 2009 (severity 1): the two sides stay far apart, and the middle is light."""
    sides = diverging()(np.array([0.15, 0.5, 0.85]))[:, :3]
    deuteranopia = np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    )
    protanopia = np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    )
    for matrix in (np.eye(3), deuteranopia, protanopia):
        seen = np.clip(_linear(sides) @ matrix.T, 0, 1)
        assert np.abs(seen[0] - seen[2]).max() > 0.25
        assert seen[1].mean() > 0.8

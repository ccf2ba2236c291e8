"""Nulls: what they keep, what they break, and that they hold their level."""

import numpy as np
import pytest

from llmbrain import InputError
from llmbrain.stats.nulls import (
    circular_shift,
    circular_shifts,
    phase_randomize,
    shifts_apart,
    surrogates,
)


def smooth(rng: np.random.Generator, shape: tuple[int, int], rho: float = 0.8) -> np.ndarray:
    out = rng.normal(size=shape)
    for t in range(1, len(out)):
        out[t] += rho * out[t - 1]
    return out


@pytest.mark.parametrize("n", [100, 101])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_shared_phases_keep_spectra_and_cross_spectra(n, dtype):
    rng = np.random.default_rng(0)
    series = (smooth(rng, (n, 3)) + 4).astype(dtype)
    moved = phase_randomize(series, rng)
    digits = 1e-9 if dtype == np.float64 else 1e-3
    assert moved.dtype == dtype
    a, b = np.fft.rfft(series, axis=0), np.fft.rfft(moved, axis=0)
    np.testing.assert_allclose(np.abs(a), np.abs(b), atol=digits)
    np.testing.assert_allclose(a[:, :1] * a.conj(), b[:, :1] * b.conj(), atol=1e3 * digits)
    np.testing.assert_allclose(np.corrcoef(series.T), np.corrcoef(moved.T), atol=digits)
    assert np.abs(np.corrcoef(series[:, 0], moved[:, 0])[0, 1]) < 0.9


@pytest.mark.parametrize("n", [60, 61])
def test_phases_of_their_own_break_coupling(n):
    rng = np.random.default_rng(0)
    series = rng.standard_normal((n, 1)) + 0.3 * rng.standard_normal((n, 40)) + 4
    moved = phase_randomize(series, rng, shared=False)
    np.testing.assert_allclose(np.abs(np.fft.rfft(series, axis=0)), np.abs(np.fft.rfft(moved, axis=0)), atol=1e-9)
    upper = np.triu_indices(40, 1)
    assert abs(np.corrcoef(moved.T)[upper].mean()) < 0.1 < 0.8 < np.corrcoef(series.T)[upper].mean()


@pytest.mark.parametrize("shared", [True, False])
def test_one_rule_for_the_real_frequencies(shared):
    series = np.random.default_rng(0).normal(size=(50, 4)) + 2
    moved = phase_randomize(series, np.random.default_rng(1), shared=shared)
    a, b = np.fft.rfft(series, axis=0), np.fft.rfft(moved, axis=0)
    np.testing.assert_allclose(a[[0, -1]], b[[0, -1]], atol=1e-12)
    assert (np.abs(a[1:-1] - b[1:-1]).max(axis=1) > 1e-3).all()


def test_phases_are_uniform_at_every_free_frequency():
    series = np.random.default_rng(0).normal(size=(16, 1))
    rng = np.random.default_rng(1)
    turned = [np.angle(np.fft.rfft(phase_randomize(series, rng), axis=0)[1:-1, 0]) for _ in range(400)]
    # the mean direction of 400 uniform angles is above .1 with p = exp(-4)
    assert (np.abs(np.exp(1j * np.array(turned)).mean(axis=0)) < 0.15).all()


def test_a_wide_run_is_turned_in_blocks():
    series = np.random.default_rng(0).normal(size=(8, 9000)).astype(np.float32)
    moved = phase_randomize(series, np.random.default_rng(1), shared=False)
    assert moved.shape == series.shape
    np.testing.assert_allclose(moved.std(axis=0), series.std(axis=0), rtol=1e-3)


def test_shift_is_a_roll():
    x = np.arange(20.0).reshape(10, 2)
    np.testing.assert_array_equal(circular_shift(x, 3), np.roll(x, 3, axis=0))
    both = circular_shift(x, [3, -4])
    np.testing.assert_array_equal(both[:, 0], np.roll(x[:, 0], 3))
    np.testing.assert_array_equal(both[:, 1], np.roll(x[:, 1], -4))


def test_shifts_keep_their_distance():
    x = np.arange(40.0)[:, None]
    moved = np.stack([s[:, 0] for s in surrogates(x, "circular", min_shift=10)])
    assert moved[:, 0].tolist() == [40.0 - s for s in range(10, 31)]
    assert len(list(surrogates(x, "circular", n_permutations=5))) == 5
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="leaves 11 shifts of 30"):
        circular_shifts(30, 10, None, rng)
    for _ in range(20):
        places = np.sort(shifts_apart(100, 6, 10, rng) % 100)
        gaps = np.diff(np.append(places, places[0] + 100))
        assert gaps.min() >= 10
    with pytest.raises(InputError, match="too short to shift 3 networks"):
        shifts_apart(15, 3, 10, rng)


def test_no_seed_is_a_seed_drawn_anew():
    x = np.random.default_rng(0).normal(size=(50, 2))
    a, b = (next(iter(surrogates(x, "phase", n_permutations=1, random_state=None))) for _ in range(2))
    assert not np.allclose(a, b)

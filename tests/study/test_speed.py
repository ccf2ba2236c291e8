"""Latency of models side by side: every row is there, and bad input is said. No time is asserted."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys

import numpy as np
import pytest
from tiny_models import tiny, tiny_tokenizer
from typer.testing import CliRunner

from llmbrain._validation import InputError
from llmbrain.cli import app
from llmbrain.study import latency_table


@pytest.fixture
def folder(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_a_row_a_model_phase_and_batch(folder, tmp_path):
    import pandas as pd

    out = tmp_path / "speed.tsv"
    command = ["latency", str(folder), str(folder), "--batch", "1", "--batch", "2", "--prompt", "8",
               "--new-tokens", "4", "--repeats", "2", "--out", str(out)]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    table = pd.read_csv(out, sep="\t")
    assert len(table) == 8
    assert set(table["phase"]) == {"prefill", "decode"}
    assert (table["peak_memory"] > 2**20).all()
    assert (table["relative"][:4] == 1).all()


def test_noise_is_no_speed():
    from llmbrain.evaluation.latency import phase_rows

    with pytest.warns(UserWarning, match="took no longer than reading alone"):
        prefill, decode = phase_rows(2, np.array([1.0, 2.0, 3.0]), 8, np.array([-0.2, -0.1, 0.1]), 4)
    assert prefill == ("prefill", 2, 8.0, 2.0, 1.5, 2.5)
    assert np.isnan(decode[2])


def test_the_peak_is_that_of_this_process_alone():
    from llmbrain.study.speed import peak_memory

    before = peak_memory()
    ballast = np.ones(before // 8 + 2**24)  # more than all that was there at once, and touched
    assert peak_memory() - before > ballast.nbytes / 2
    if sys.platform == "linux":  # another program, started by this one, begins anew
        code = f"import resource, sys\nfrom pathlib import Path\n{inspect.getsource(peak_memory)}\nprint(peak_memory())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert int(done.stdout) < ballast.nbytes / 4


@pytest.mark.slow
def test_gguf_files_run_in_llama_cpp(shared_data, tmp_path):
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("llama.cpp is not here: pip install 'llmbrain[serve]'")
    import llmbrain as lb

    model, tokenizer = lb.load_model(shared_data / "models/stories260K")
    path = lb.save_pruned(model, tokenizer, tmp_path / "dense.gguf", format="gguf")
    table = latency_table([path], batch_sizes=[1, 2], prompt=8, new_tokens=4, repeats=2)
    assert set(table["engine"]) == {"llama.cpp"}
    assert len(table) == 4


def test_bad_input_is_said(folder):
    with pytest.raises(InputError, match="models is empty"):
        latency_table([])
    with pytest.raises(InputError, match="is none: save it with format='gguf'"):
        latency_table([folder], engine="llama.cpp")
    with pytest.raises(InputError, match="batch_sizes=0"):
        latency_table([folder], batch_sizes=[0])
    with pytest.raises(InputError, match="engine='vllm'"):
        latency_table([folder], engine="vllm")

"""What a scan to disk takes does not grow with its tokens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import random, resource, sys
sys.path.insert(0, sys.argv[1])
from tiny_models import tiny, tiny_tokenizer
import llmbrain as lb
from llmbrain.scanning import schedule

schedule.SHARD_BYTES = 2**20  # two buffers of this size are full in either scan
letters = random.Random(0)
texts = ["".join(letters.choices("abcdefghij klm", k=250)) for _ in range(int(sys.argv[3]) // 250)]
lb.scan(tiny("llama", max_position_embeddings=512), tiny_tokenizer(), texts, out=sys.argv[2], batch_size=16)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss differs between systems")
def test_ten_times_the_tokens_take_five_per_cent_more_at_most(tmp_path):
    peaks = []
    for n in (20_000, 200_000):
        command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parents[1]), str(tmp_path / str(n)), str(n)]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] < 1.05 * peaks[0]

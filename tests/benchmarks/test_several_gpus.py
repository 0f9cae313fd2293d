"""``benchmarks.several_gpus`` by the real launcher, on two CPU processes."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("benchmarks.several_gpus", reason="the benchmarks are not here")


def test_every_way_gives_the_gradients_of_one_process(tmp_path):
    output = tmp_path / "results.json"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [*launch, "-m", "benchmarks.several_gpus", "--small", "--output", str(output)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    ways = json.loads(output.read_text())["results"]["float32"]
    assert set(ways) == {"one process", "data parallel", "sharded", "sequence parallel"}
    assert ways["sharded"]["against_data_parallel"]["bits"]
    for name in ("data parallel", "sharded", "sequence parallel"):
        # Sums of some thousand float32 terms in another order.
        assert ways[name]["against_one"]["routers"]["norm"] < 1e-5
        assert ways[name]["against_one"]["multipliers"]["norm"] < 1e-6
        assert ways[name]["losses"] == pytest.approx(ways["one process"]["losses"], rel=1e-6)

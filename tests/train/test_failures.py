"""What goes wrong ends with a message that helps, and the last checkpoint still resumes."""

from __future__ import annotations

import logging
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import TrainerCallback

from elasticore.train import PackedSamples, RouterTrainer, TrainingSample
from elasticore.train.checkpoints import PARTIAL, checkpoints, damage, newest
from elasticore.train.signals import Stopped, StopSignals

from .cut_runs import At, Tokens, dataset, train, trainer_in, what_is_in


def learnt(trainer: RouterTrainer) -> list[torch.Tensor]:
    model: Any = trainer.model
    named = [*model.named_parameters(), *trainer.objective.named_parameters()]
    return [p.detach().clone() for _, p in named if p.requires_grad]


def resumes(run: Path, **settings: Any) -> None:
    """Assert that every checkpoint is whole, nothing half is left, and the run can end."""
    assert not (run / PARTIAL).exists()
    assert checkpoints(run)
    assert all(damage(folder) is None for folder in checkpoints(run))
    trainer = trainer_in(run, max_steps=4, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert all(bool(tensor.isfinite().all()) for tensor in learnt(trainer))


# ---- Batches ----


class Poisoned(Tokens):
    """Sample 13 holds token 1, of which something is broken below."""

    def __getitem__(self, index: int) -> TrainingSample:
        one = super().__getitem__(index)
        if index == 13:
            one.input_ids[5] = 1
        return TrainingSample(one.input_ids, one.labels, one.task, f"number {index}")


# What is broken early reaches a router first; what is broken late, the loss.
@pytest.mark.parametrize(
    ("layer", "what"), [(0, "a router's logits:"), (1, "the loss (lm_loss nan, penalty ")]
)
def test_a_batch_that_gives_nan_is_named_and_not_learnt(
    tmp_path: Path, layer: int, what: str
) -> None:
    trainer = trainer_in(tmp_path, data=Poisoned(), max_steps=4, save_steps=1)
    model: Any = trainer.model

    def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.where((model.seen == 1).any(-1)[:, None, None], torch.nan, output)

    def see(module: Any, inputs: Any) -> None:
        model.seen = inputs[0]

    model.get_input_embeddings().register_forward_pre_hook(see)
    spoilt = model.get_input_embeddings() if layer == 0 else model.model.layers[1].mlp
    spoilt.register_forward_hook(spoil)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    step = trainer.state.global_step
    assert f"not finite in step {step + 1}. It was made of: number " in str(error.value)
    assert what in str(error.value)
    assert "number 13 (code, 48 tokens)" in str(error.value)
    assert f"--resume {tmp_path / f'checkpoint-{step}'}" in str(error.value)
    after = learnt(trainer)
    last = trainer_in(tmp_path, data=Poisoned(), max_steps=4, save_steps=1)
    last._load_from_checkpoint(str(tmp_path / f"checkpoint-{step}"))
    assert all(torch.equal(a, b) for a, b in zip(after, learnt(last), strict=True))
    resumes(tmp_path, save_steps=1)


def test_gradients_that_are_nan_are_not_learnt(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path, max_steps=4)
    model: Any = trainer.model
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.register_hook(lambda g: g * torch.nan if trainer.state.global_step == 3 else g)
    with pytest.raises(FloatingPointError, match=r"norm of the gradients: not finite in step 4"):
        trainer.train()
    assert all(bool(tensor.isfinite().all()) for tensor in learnt(trainer))
    resumes(tmp_path)


# ---- Data ----


def test_a_file_that_is_cut_off_in_a_run_is_named(tmp_path: Path) -> None:
    data, _ = dataset("packed", tmp_path)
    file = next((tmp_path / "packed").glob("*.parquet"))
    whole = file.read_bytes()

    def cut() -> None:
        data.data._kept = (-1, [])  # type: ignore[attr-defined]
        file.write_bytes(whole[:200])

    run = tmp_path / "run"
    trainer = trainer_in(run, "packed", (At(2, cut),), data, max_steps=4)
    with pytest.raises(ValueError, match=rf"{file}.* make it again with `elasticore data build`"):
        trainer.train()
    with pytest.raises(ValueError, match=rf"{file} is cut off, or no parquet"):
        PackedSamples(file, None)
    file.write_bytes(whole)
    resumes(run, kind="packed")


def test_an_unknown_task_id_is_refused_when_the_data_are_opened(tmp_path: Path) -> None:
    dataset("packed", tmp_path)
    file = next((tmp_path / "packed").glob("*.parquet"))
    table = pq.read_table(file)
    ids = table["task_ids"].to_pylist()
    ids[3][1] = 7
    place = table.schema.get_field_index("task_ids")
    pq.write_table(table.set_column(place, "task_ids", pa.array(ids, pa.list_(pa.int32()))), file)
    with pytest.raises(ValueError, match=rf"{file.name}, row group 0: task ids \[7\] are out of"):
        PackedSamples(file, None)


# ---- Disk ----


@pytest.fixture
def small_files() -> Any:
    """Call it to let no file grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_full_leaves_the_checkpoint_before(
    tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    run = tmp_path / "run"
    trainer = trainer_in(run, callbacks=(At(3, lambda: small_files(20_000)),), max_steps=4)
    with pytest.raises(OSError, match="checkpoint of step 4 could not be written") as error:
        trainer.train()
    small_files(resource.RLIM_INFINITY)
    message = str(error.value)
    assert str(run / PARTIAL / "checkpoint-4") in message
    assert "MB are free there" in message
    assert f"resume from it with --resume {run / 'checkpoint-2'}" in message
    assert [path.name for path in run.iterdir()] == ["checkpoint-2"]
    resumes(run)


# ---- Signals ----


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_the_step_and_ends_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    before = signal.getsignal(number)
    run = tmp_path / "run"
    trainer = trainer_in(run, callbacks=(At(2, lambda: os.kill(os.getpid(), number)),), max_steps=4)
    with pytest.raises(Stopped) as stopped:
        trainer.train()
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert trainer.state.global_step == 3
    assert newest(run) == run / "checkpoint-3"
    name = signal.Signals(number).name
    assert f"{name}: stopped after step 3 of 4, and saved it in {run}/checkpoint-3" in caplog.text
    resumed = trainer_in(run, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer_in(tmp_path / "whole", max_steps=4)
    whole.train()
    assert all(torch.equal(a, b) for a, b in zip(learnt(resumed), learnt(whole), strict=True))


def test_a_signal_to_one_process_ends_both_with_one_checkpoint(tmp_path: Path) -> None:
    code = 128 + signal.SIGUSR1
    settings = {"processes": 2, "gradient_accumulation_steps": 2, "dataloader_num_workers": 1}
    assert train(tmp_path / "run", cut=(3, 1, signal.SIGUSR1), **settings) == [code, code]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-4", "checkpoint-2"]
    assert {"sums_0.pt", "sums_1.pt"} <= set(what_is_in(tmp_path / "run" / "checkpoint-4"))
    assert "SIGUSR1: stopped after step 4 of 7" in (tmp_path / "log-0").read_text()
    assert "SIGUSR1" not in (tmp_path / "log-1").read_text()


def test_a_signal_in_the_last_step_changes_nothing(tmp_path: Path) -> None:
    at = At(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    trainer = trainer_in(tmp_path, callbacks=(at,), max_steps=2)
    assert trainer.train().global_step == 2


class Crash(TrainerCallback):
    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("crash")


def test_handlers_are_back_after_an_error(tmp_path: Path) -> None:
    def mine(*_: Any) -> None: ...

    before = signal.signal(signal.SIGUSR1, mine)
    try:
        with pytest.raises(RuntimeError, match="crash"):
            trainer_in(tmp_path, callbacks=(Crash(),)).train()
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_other_threads_leave_the_handlers_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[Any] = []

    def run() -> None:
        with StopSignals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_an_interrupted_run_says_where_its_checkpoint_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), caplog.at_level(logging.WARNING):
        trainer_in(tmp_path, callbacks=(At(3, interrupt),), max_steps=4).train()
    assert f"Interrupted after step 3. The newest checkpoint is {tmp_path}/checkpoint-2" in (
        caplog.text
    )
    resumes(tmp_path)


# ---- Processes ----

KILLED = """
import os, sys
from pathlib import Path
from tests.train.cut_runs import At, kill, trainer_in
at = (At(3, kill),) if os.environ["RANK"] == "1" else ()
trainer_in(Path(sys.argv[1]), callbacks=at, gradient_accumulation_steps=2).train()
"""


def test_a_process_that_dies_ends_the_run_and_torchrun_says_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    root = Path(__file__).parents[2]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(script), str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr or "Signal 9" in done.stderr
    assert newest(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"

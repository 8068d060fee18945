"""A GPU run goes on: behind what cannot be written, beside another machine's file, and in a new process when the GPU is lost."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import anew, run
from benchmarks.gpu.results import Clock, Job, Results, read_results
from benchmarks.gpu.setting import Setting
from live import graphed

ABOUT = {"rehearsal": False, "device": "cpu", "machine": {"processor": "none"}, "libraries": {"torch": "0"}, "tf32": False}
DONE = Job("next", lambda _: {"value": 1}, 0, 9)


@pytest.fixture
def stages(monkeypatch):
    """Lets a stage consist of some jobs."""

    def let(stage: str, *jobs: Job) -> None:
        monkeypatch.setitem(sys.modules, f"benchmarks.gpu.{stage}", SimpleNamespace(jobs=lambda setting: list(jobs)))

    return let


def failing(error: str) -> Job:
    def fails(_: float) -> dict:
        raise RuntimeError(error)

    return Job("lost", fails, 0, 9)


def run_once(tmp_path, **options) -> dict:
    setting = Setting("cpu", tmp_path)
    setting.work.mkdir(exist_ok=True)
    run.run_stage("check", setting, Results(tmp_path, "check", ABOUT), Clock(100), **options)
    return read_results(tmp_path / "check.json")["jobs"]


def test_what_json_cannot_hold_costs_nothing_else(tmp_path, stages):
    odd = Job("odd", lambda _: {"largest": float("nan"), "rows": [(1.0, float("-inf"))], "good": 2.0}, 0, 9)
    stages("check", odd, Job("worse", lambda _: {"value": object()}, 0, 9), DONE)
    found = run_once(tmp_path)
    assert found["odd"]["largest"] == "nan" and found["odd"]["rows"] == [[1.0, "-inf"]] and found["odd"]["good"] == 2.0
    assert "cannot be kept" in found["worse"]["error"] and found["next"]["value"] == 1


def test_a_result_is_written_before_memory_is_given_back(tmp_path, stages, monkeypatch):
    def lost() -> None:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr("benchmarks.gpu.setting.free_memory", lost)
    stages("check", DONE)
    with pytest.raises(anew.Anew, match="INTERNAL ASSERT"):
        run_once(tmp_path)
    assert read_results(tmp_path / "check.json")["jobs"]["next"]["value"] == 1


def test_a_file_of_another_machine_stops_its_stage_alone(tmp_path, stages, monkeypatch):
    monkeypatch.setattr(Setting, "about", lambda self: ABOUT)
    Results(tmp_path, "check", ABOUT | {"machine": {"processor": "other"}}).keep("a", {})
    stages("check", DONE)
    stages("passes", DONE)
    words = ["--out", str(tmp_path), "--device", "cpu", "--stage", "check", "--stage", "passes"]
    assert run.main(words) == 1
    assert read_results(tmp_path / "passes.json")["jobs"]["next"]["value"] == 1


@pytest.fixture
def begun_anew(monkeypatch):
    """Arguments that a new process was begun with; in its place the test goes on."""
    begun: list[list[str]] = []

    def become(file: str, words: list[str]) -> None:
        assert words[:3] == [sys.executable, "-m", "benchmarks.gpu.run"] and file == sys.executable
        begun.append(words[3:])
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.gpu.anew.os.execv", become)
    monkeypatch.setattr(Setting, "about", lambda self: ABOUT)
    return begun


def test_a_lost_gpu_is_told_and_the_rest_is_done_in_a_new_process(tmp_path, stages, begun_anew, monkeypatch):
    stages("check", failing("CUDA error: an illegal memory access"), DONE)
    words = ["--out", str(tmp_path), "--device", "cpu", "--stage", "check", "--budget", "50"]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("benchmarks.gpu.anew.unusable", lambda device: "RuntimeError: CUDA error")
        run.main(words)
    (again,) = begun_anew
    left = run.parser().parse_args(again)
    assert 40 < left.budget < 50 and left.stage == ["check"] and left.device == "cpu" and left.skip == ["check: lost"]
    assert list(read_results(tmp_path / "check.json")["jobs"]) == ["lost"]
    assert run.main(again) == 0  # what loses the GPU is not tried again in this run
    found = read_results(tmp_path / "check.json")["jobs"]
    assert "illegal" in found["lost"]["error"] and found["next"]["value"] == 1


def test_behind_a_failed_capture_all_is_done_without_graphs_in_a_new_process(tmp_path, stages, begun_anew, monkeypatch):
    monkeypatch.setattr(graphed, "failed_captures", failed := [])
    monkeypatch.setattr("benchmarks.gpu.setting.free_memory", lambda: pytest.fail("torch cannot give memory back behind it"))

    def survived(_: float) -> dict:  # as decoding does, which survives its draft
        failed.append("AcceleratorError: operation not permitted when stream is capturing")
        return {"ms": 1.0}

    stages("passes", Job("captures", survived, 0, 9), DONE)
    with pytest.raises(KeyboardInterrupt):
        run.main(["--out", str(tmp_path), "--device", "cpu", "--stage", "passes"])
    assert run.parser().parse_args(begun_anew[0]).skip == []  # without graphs it is tried again
    assert "not permitted" in read_results(tmp_path / "passes.json")["jobs"]["captures"]["error"]
    failed.clear()
    later = Setting("cuda", tmp_path)
    monkeypatch.setattr("benchmarks.gpu.check.why_no_graphs", lambda pair: pytest.fail("tried again"))
    assert not later.graphs


def test_a_probe_whose_capture_is_ended_leaves_its_job(tmp_path, monkeypatch):
    monkeypatch.setattr(graphed, "failed_captures", failed := [])
    monkeypatch.setattr(Setting, "small_pair", lambda *_: None)
    monkeypatch.setattr("benchmarks.gpu.check.why_no_graphs", lambda pair: failed.append("invalidated") or "invalidated")
    with pytest.raises(RuntimeError, match="invalidated"):
        _ = Setting("cuda", tmp_path).graphs


@pytest.mark.parametrize("ends", [True, False])
def test_a_capture_that_cuda_ends_is_told_from_one_that_fails_by_itself(monkeypatch, ends):
    """Torch leaves the capture's stream only when the capture has ended well, whatever was raised inside."""
    streams = ["the usual"]

    @contextmanager
    def on(stream: str):
        streams.append(stream)
        yield
        streams.pop()

    class Capture:
        def __init__(self, graph, pool, stream, capture_error_mode):
            self.stream = stream

        def __enter__(self) -> None:
            streams.append(self.stream)

        def __exit__(self, *raised: object) -> None:
            if not ends:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            streams.pop()

    monkeypatch.setattr(graphed, "failed_captures", [])
    usual = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {"stream": on, "graph": Capture, "CUDAGraph": object}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: usual if streams[-1] == "the usual" else "aside")
    monkeypatch.setattr(graphed, "_aside", lambda device: SimpleNamespace(wait_stream=lambda other: None))
    calls: list[int] = []

    def compute() -> None:
        calls.append(1)
        if len(calls) > graphed._WARM_UP:
            raise ValueError("out of memory")

    with pytest.raises(RuntimeError if not ends else ValueError):
        graphed.record(compute, torch.device("cpu"), (0, 0))
    assert bool(graphed.failed_captures) is not ends

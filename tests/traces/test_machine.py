"""What manifests and profiles say of the machine."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import torch

from traces import machine


def test_a_cpu_has_a_processor_and_threads():
    facts = machine.describe_machine("cpu")
    assert set(facts) == {"processor", "threads"} and facts["threads"] == torch.get_num_threads()


def test_a_gpu_adds_driver_and_cuda_version(monkeypatch):
    about = SimpleNamespace(name="some GPU", total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: SimpleNamespace(stdout="580.1.2\n"))
    facts = machine.describe_machine("cuda")
    assert (facts["gpu"], facts["gpu_memory_gib"], facts["driver"]) == ("some GPU", 80.0, "580.1.2") and "cuda" in facts


def test_a_driver_that_nobody_tells_is_unknown(monkeypatch):
    def missing(*args, **options):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    monkeypatch.setattr(machine, "Path", lambda path: SimpleNamespace(is_file=lambda: False))
    assert machine.driver() == "unknown"

"""Recordings of the shipped pair on this device: both drafters, greedy and at temperature 1, in float32 and bfloat16.

40 prompts of each domain, 256 tokens each, with the recorder's default cover, in two halves, each a whole recording of its own.
Small networks leave a GPU waiting for the processor, so several recorders (``traces.record --shard``) work on each side by side;
one that was interrupted is gone on with. Of every recording the result file keeps the manifest's facts, sizes, times, and a few
policies' replay; `compared` says how the two precisions differ. What is brought home is benchmarks/gpu/sample.py's.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import Clock, Job
from benchmarks.gpu.setting import Setting
from policies.errors import UserError, run_command

HALVES, HALF = 2, 20
"""Recordings of a precision, and prompts of each domain in one; 48 are shipped."""
RECORDERS = 6
"""Processes that record side by side."""
FINISHING = 12.0
"""Seconds that a recorder gets for the shard in hand when the time is over."""
TOY_COVER = ("eagle3(top_k=4, depth=3)",)
"""Of rehearsals."""
POLICIES = ("chain(k=3)", "eagle3", "eagle3(total_tokens=24, depth=5)")
DTYPES = ("float32", "bfloat16")


def jobs(setting: Setting) -> list[Job]:
    found = []
    for half in range(setting.pick(HALVES, 1)):
        for dtype in DTYPES:
            found.append(Job(f"{dtype} {half}", lambda left, d=dtype, h=half: record_half(setting, d, h, left), 45, 140))
        found.append(Job(f"compared {half}", lambda _, h=half: compared(setting, h), 3, 20))
    return found


def record_half(setting: Setting, dtype: str, half: int, seconds: float) -> dict[str, Any]:
    """Twenty prompts of each domain, greedy and sampled, 256 tokens each, by several recorders.

    :raises UserError: when they do not finish in time; what they have is gone on with by the same command.
    """
    count, recorders = setting.pick((HALF, RECORDERS), (1, 2))
    folder = setting.work / f"{dtype}-{half}"
    files = part_of_prompts(setting.work / f"prompts-{half}", half, count)
    size = ["--max-new-tokens", str(setting.pick(256, 12)), "--limit", str(count)]
    options = ["--prompts", *(f"{domain}={file}" for domain, file in files.items()), *size]
    words = command(setting, dtype, folder, [*options, *covering(setting.pick((), TOY_COVER))], setting.pick(5, 2))
    if (folder / "manifest.json").is_file():
        return summary(folder)
    folder.mkdir(parents=True, exist_ok=True)
    clock, started = Clock(setting.pick(min(0.8 * seconds, seconds - FINISHING - 5), 1e9)), time.perf_counter()
    running = []
    for number in range(recorders):
        log = (folder / f"recorder-{number}.log").open("w", encoding="utf-8")
        share = ["--shard", f"{number + 1}/{recorders}", "--resume"]
        python = [sys.executable, "-m", "benchmarks.gpu.recording", str(os.getpid())]
        threads = os.environ | {"OMP_NUM_THREADS": "2"}
        running.append(subprocess.Popen([*python, *words, *share], stdout=log, stderr=log, env=threads))
        log.close()
    try:
        while any(recorder.poll() is None for recorder in running) and clock.left:
            time.sleep(0.2)
    finally:
        unfinished = sum(recorder.poll() is None for recorder in running)
        end(running)
    if not (folder / "manifest.json").is_file():
        said = (folder / "recorder-0.log").read_text(encoding="utf-8").replace("\r", "\n").strip().splitlines()
        raise UserError(f"{unfinished} of {recorders} recorders of {folder.name} did not finish; the first one said: {said[-1:]}")
    return summary(folder) | {"recording_seconds": round(time.perf_counter() - started, 2), "recorders": recorders}


def recorder(parent: int, arguments: list[str]) -> None:
    """One of them: traces.record, which does not outlive the run ``parent`` that started it, however that ends (on Linux)."""
    from traces.record import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it has ended meanwhile
        raise KeyboardInterrupt
    main(arguments)


def end(running: list[subprocess.Popen]) -> None:
    """Let recorders that still run finish their shard and stop, and stop them if that takes too long."""
    for recorder in running:
        if recorder.poll() is None:
            recorder.send_signal(signal.SIGINT)
    clock = Clock(FINISHING)
    for recorder in running:
        try:
            recorder.wait(clock.left)
        except subprocess.TimeoutExpired:
            recorder.kill()
            recorder.wait()


def covering(policies: tuple[str, ...]) -> list[str]:
    return [word for policy in policies for word in ("--cover", policy)]


def part_of_prompts(folder: Path, part: int, count: int) -> dict[str, Path]:
    """Every ``count`` prompts of each domain, as files of their own: those of one part.

    :raises UserError: when fewer are shipped.
    """
    from traces.prompts import sample_specs

    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for spec in sample_specs():
        domain, _, shipped = spec.partition("=")
        lines = Path(shipped).read_text(encoding="utf-8").splitlines()[part * count : (part + 1) * count]
        if len(lines) < count:
            raise UserError(f"{shipped} holds no part {part} of {count} prompts")
        files[domain] = folder / f"{domain}.jsonl"
        files[domain].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def command(setting: Setting, dtype: str, folder: Path, options: list[str], batch: int) -> list[str]:
    """Arguments of traces.record for the shipped pair on this device, greedy and sampled."""
    heat = ["--temperature", "0", "--temperature", "1", "--seed", "0"]
    device = "cuda:0" if setting.device == "cuda" else setting.device  # one for all recorders
    where = ["--out", str(folder), "--dtype", dtype, "--device", device]
    return [*where, "--batch", str(batch), "--positions", str(setting.pick(256, 16)), *heat, *options]


def record_here(setting: Setting, dtype: str, folder: Path, options: list[str]) -> dict[str, Any]:
    """Record the shipped pair into ``folder`` (going on with what is there) and say what came out."""
    from traces.record import main

    begun = ["--resume"] if (folder / "manifest.json").is_file() else []
    started = time.perf_counter()
    main([*command(setting, dtype, folder, options, setting.pick(8, 2)), *begun])
    return summary(folder) | {"recording_seconds": round(time.perf_counter() - started, 2)}


def summary(folder: Path, policies: tuple[str, ...] = POLICIES) -> dict[str, Any]:
    """The manifest's facts, sizes, and tau by domain of a few policies for each drafter and temperature."""
    import torch

    from policies.registry import load_policy
    from sim.metrics import replay_rows
    from traces.recording import open_recording

    recording = open_recording(folder)
    about = recording.manifest
    rows = []
    heats = [recording.sampling(text)["temperature"] for text in range(len(recording.length))]
    for drafter in recording.drafters:
        for heat in sorted(set(heats)):
            members = torch.tensor([text for text, own in enumerate(heats) if own == heat])
            for spec in policies:
                rows += [
                    {"drafter": drafter, "temperature": heat, "policy": spec, "domain": row.domain}
                    | {name: round(getattr(row, name), 4) for name in ("tau", "kept", "coverage", "cycles")}
                    for row in replay_rows(recording, load_policy(spec), drafter, sequences=members)
                ]
    facts = ("target", "drafters", "device", "dtype", "machine", "libraries", "envelope", "sampling", "max_new_tokens", "overrun")
    return {
        "manifest": {key: about[key] for key in facts},
        "texts": len(recording.length),
        "positions": int(recording.length.sum()),
        "nodes": {drafter: len(recording.forest(drafter).entropy) for drafter in recording.drafters},
        "bytes": sum(file.stat().st_size for file in folder.glob("*.parquet")),
        "replayed": rows,
    }


def compared(setting: Setting, half: int) -> dict[str, Any]:
    """Where the texts of the two precisions part: share of equal texts, first differing position, by temperature."""
    from traces.recording import open_recording

    folders = [setting.work / f"{dtype}-{half}" for dtype in DTYPES]
    if missing := [folder.name for folder in folders if not (folder / "manifest.json").is_file()]:
        raise UserError(f"there is no recording {missing[0]} to compare: it was made on another machine, or not at all")
    one, other = (open_recording(folder) for folder in folders)
    found: dict[str, list[int | None]] = {}
    lengths: list[int] = []
    for text in range(len(one.length)):
        tokens = [
            recording.token[recording.offset[text] : recording.offset[text] + recording.length[text]].tolist()
            for recording in (one, other)
        ]
        parted = next((place for place, (a, b) in enumerate(zip(*tokens, strict=False)) if a != b), None)
        if parted is None and len(tokens[0]) != len(tokens[1]):
            parted = min(map(len, tokens))
        found.setdefault(f"{one.sampling(text)['temperature']:g}", []).append(parted)
        lengths.append(len(tokens[0]))
    return {"first_difference": found, "mean_length": sum(lengths) / len(lengths)}


if __name__ == "__main__":
    run_command(lambda: recorder(int(sys.argv[1]), sys.argv[2:]), "What is finished is safe.")

"""Recordings of the shipped pair on this device: both drafters, greedy and at temperature 1, in float32 and bfloat16.

The sample comes first: it is what is brought home (``OUT/sample-DTYPE.tar``) and may become the shipped recording. The rest is
cut into chunks of eight prompts of each domain, each a whole recording of its own, so that an end at any moment leaves
recordings and not pieces. Of every one the result file keeps the manifest without checksums, sizes, times, and a few policies'
replay; `compared` says how the two precisions differ.
"""

from __future__ import annotations

import tarfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.results import LARGEST, Job
from benchmarks.gpu.setting import Setting
from policies.errors import UserError

CHUNK = 8
"""Prompts of each domain in a chunk; 48 are shipped, five chunks make forty."""
SAMPLE_COVER = ("eagle3", "chain(k=8)")
"""Of the sample, with the EAGLE-3 head alone: the published tree in a third of the default cover's room, some 4 KB a position."""
TOY_COVER = ("eagle3(top_k=4, depth=3)",)
"""Of rehearsals."""
POLICIES = ("chain(k=3)", "eagle3", "eagle3(total_tokens=24, depth=5)")
DTYPES = ("float32", "bfloat16")


def jobs(setting: Setting) -> list[Job]:
    found = [Job(f"sample {dtype}", lambda left, d=dtype: sample(setting, d, left), 40, 120) for dtype in DTYPES]
    for chunk in range(setting.pick(5, 1)):
        found += [Job(f"{dtype} {chunk}", lambda left, d=dtype, c=chunk: record_chunk(setting, d, c), 90, 200) for dtype in DTYPES]
        found.append(Job(f"compared {chunk}", lambda left, c=chunk: compared(setting, c), 5, 60))
    return found


def sample(setting: Setting, dtype: str, seconds: float) -> dict[str, Any]:
    """A recording of about 6,000 positions, packed into one file that is small enough to carry."""
    folder = setting.work / f"sample-{dtype}"
    # 5 domains x 2 temperatures x 3 prompts x 256 tokens, less what ends early or falls into a loop
    size = ["--limit", str(setting.pick(3, 1)), "--max-new-tokens", str(setting.pick(256, 10))]
    told = record_here(
        setting, dtype, folder, [*size, *covering(setting.pick(SAMPLE_COVER, TOY_COVER)), "--draft", "reference/eagle3"]
    )
    packed = setting.out / f"sample-{dtype}.tar"
    with tarfile.open(packed, "w") as tar:
        for file in sorted(folder.glob("*.*")):
            if file.is_file():
                tar.add(file, f"{folder.name}/{file.name}")
    if packed.stat().st_size > LARGEST:
        told["parts"] = split(packed)
    return told | {"packed": packed.name, "packed_bytes": sum(told.get("parts", {}).values()) or packed.stat().st_size}


def split(packed: Path) -> dict[str, int]:
    """A file in pieces that may be carried, put together again by ``cat NAME.*``; their sizes by name."""
    content = packed.read_bytes()
    sizes = {}
    for number, start in enumerate(range(0, len(content), LARGEST)):
        piece = packed.with_name(f"{packed.name}.{number:02d}")
        piece.write_bytes(content[start : start + LARGEST])
        sizes[piece.name] = piece.stat().st_size
    packed.unlink()
    return sizes


def record_chunk(setting: Setting, dtype: str, chunk: int) -> dict[str, Any]:
    """Eight prompts of each domain, greedy and sampled, 256 tokens each, with the recorder's default cover."""
    count = setting.pick(CHUNK, 1)
    prompts = [f"{domain}={file}" for domain, file in chunk_of_prompts(setting.work / f"prompts-{chunk}", chunk, count).items()]
    size = ["--max-new-tokens", str(setting.pick(256, 12)), "--limit", str(count)]
    cover = covering(setting.pick((), TOY_COVER))
    return record_here(setting, dtype, setting.work / f"{dtype}-{chunk}", ["--prompts", *prompts, *size, *cover])


def covering(policies: tuple[str, ...]) -> list[str]:
    return [word for policy in policies for word in ("--cover", policy)]


def chunk_of_prompts(folder: Path, chunk: int, count: int) -> dict[str, Path]:
    """The chunk's prompts of each domain, as files of their own.

    :raises UserError: when fewer are shipped.
    """
    from traces.prompts import sample_specs

    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for spec in sample_specs():
        domain, _, shipped = spec.partition("=")
        lines = Path(shipped).read_text(encoding="utf-8").splitlines()[chunk * count : (chunk + 1) * count]
        if len(lines) < count:
            raise UserError(f"{shipped} holds no chunk {chunk} of {count} prompts")
        files[domain] = folder / f"{domain}.jsonl"
        files[domain].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return files


def record_here(setting: Setting, dtype: str, folder: Path, options: list[str]) -> dict[str, Any]:
    """Record the shipped pair into ``folder`` (going on with what is there) and say what came out."""
    from traces.record import main

    heat = ["--temperature", "0", "--temperature", "1", "--seed", "0"]
    where = ["--out", str(folder), "--dtype", dtype, "--device", setting.device]
    wide = ["--batch", str(setting.pick(CHUNK, 2)), "--positions", str(setting.pick(256, 16))]
    begun = ["--resume"] if (folder / "manifest.json").is_file() else []
    started = time.perf_counter()
    main([*where, *wide, *heat, *options, *begun])
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


def compared(setting: Setting, chunk: int) -> dict[str, Any]:
    """Where the texts of the two precisions part: share of equal texts, first differing position, by temperature."""
    from traces.recording import open_recording

    folders = [setting.work / f"{dtype}-{chunk}" for dtype in DTYPES]
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

"""Several recorders of one recording: together they write what one alone writes, to the byte, whatever happens to one of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from policies.errors import UserError
from tests.tiny_pair import TinyPair
from traces.inspect import summarise
from traces.record import main
from traces.recording import open_recording
from traces.share import ALONE, Share, share_of
from traces.store import RecordingWriter

ROOT = Path(__file__).parent.parent.parent
QUICK = ("--max-new-tokens", "6", "--cover", "chain(k=2)")


def files(folder: Path) -> dict[str, bytes]:
    """The recording's files by name, less the cache."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


# ---- which share -----------------------------------------------------------------------------------------------------


def test_which_share():
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert share_of(None, {}) == ALONE and share_of(None, {"RANK": "0", "WORLD_SIZE": "1"}) == ALONE
    assert share_of(None, torchrun) == Share(3, 4, 1) and share_of("1/2", torchrun) == Share(0, 2)
    shares = [share_of(f"{i}/3", {}) for i in (1, 2, 3)]
    assert all(sum(share.holds(index) for share in shares) == 1 for index in range(7))
    assert [str(share) for share in shares] == ["1/3", "2/3", "3/3"]
    assert Share(3, 4, 1).device("cuda") == "cuda:1" and ALONE.device("cuda") == "cuda" and Share(3, 4, 1).device("cpu") == "cpu"
    for wrong in ("0/2", "3/2", "1", "a/b", "-1/2"):
        with pytest.raises(UserError, match="names no share: write I/N"):
            share_of(wrong, {})
    for rank, count in (("a", "2"), ("2", "2"), ("0", "")):
        with pytest.raises(UserError, match="in the environment name no share: unset them"):
            share_of(None, {"RANK": rank, "WORLD_SIZE": count})


def test_a_fill_works_alone(tmp_path, monkeypatch, refused):
    fill = ["--fill", str(tmp_path), "--policy", "eagle3"]
    assert "works alone" in refused(lambda: main([*fill, "--shard", "1/2"]))
    assert "in place, as it was recorded: leave out --dry-run" in refused(lambda: main([*fill, "--dry-run"]))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "works alone: leave --shard and torchrun out" in refused(lambda: main(fill))


# ---- the writers, on made-up tables ----------------------------------------------------------------------------------


def write(fake, folder: Path, share: Share, resume: bool = False) -> int:
    writer = RecordingWriter.create(folder, fake.FIELDS, fake.PLAN, resume=resume, share=share)
    for plan in writer.pending():
        writer.write_shard(plan.index, *fake.make_shard(plan))
    return writer.finish()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_write_what_one_writes(fake, recording, tmp_path, order):
    out = tmp_path / "shared"
    first, second = (Share(rank, 2) for rank in order)
    assert write(fake, out, first) == (1 if order[0] == 0 else 2)
    partial = open_recording(out, verify=True)
    assert not partial.complete and summarise(out, verify=True)["status"] == "recording"
    assert {plan.index % 2 for plan in partial.plans} == {order[0]}
    assert write(fake, out, second) == 0
    assert files(out) == files(recording) and open_recording(out, verify=True).complete


def test_both_may_end_at_once(fake, recording, tmp_path):
    """One finds the recording whole and takes the other's manifest over before that one has looked."""
    out = tmp_path / "shared"
    writers = [RecordingWriter.create(out, fake.FIELDS, fake.PLAN, share=Share(rank, 2)) for rank in (0, 1)]
    for writer in writers:
        for plan in writer.pending():
            writer.write_shard(plan.index, *fake.make_shard(plan))
    assert [writer.finish() for writer in writers] == [0, 0]
    assert files(out) == files(recording)


def test_another_number_of_recorders_may_go_on(fake, recording, tmp_path):
    out = tmp_path / "shared"
    writer = RecordingWriter.create(out, fake.FIELDS, fake.PLAN, share=Share(1, 3))
    writer.write_shard(1, *fake.make_shard(fake.PLAN[1]))
    assert write(fake, out, Share(1, 2), resume=True) == 2
    assert write(fake, out, Share(0, 2), resume=True) == 0
    assert files(out) == files(recording)
    shutil.rmtree(out)
    write(fake, out, Share(1, 2))
    fake.write(out, resume=True)  # one alone
    assert files(out) == files(recording)


def test_a_shard_that_another_lost_keeps_the_recording_open(fake, recording, tmp_path):
    out = tmp_path / "shared"
    write(fake, out, Share(1, 2))
    (out / "nodes-00001.parquet").unlink()
    assert write(fake, out, Share(0, 2)) == 1 and "manifest.json" not in files(out)
    assert write(fake, out, Share(1, 2), resume=True) == 0
    assert files(out) == files(recording)


def test_a_whole_recording_made_elsewhere_needs_no_last_word(fake, recording, tmp_path):
    """Recorders without a common disk: their files put side by side are the recording, and a fill makes one manifest of it."""
    for rank in (0, 1):
        write(fake, tmp_path / f"machine{rank}", Share(rank, 2))
        shutil.copytree(tmp_path / f"machine{rank}", tmp_path / "all", dirs_exist_ok=True)
    assert open_recording(tmp_path / "all", verify=True).complete
    RecordingWriter.reopen(tmp_path / "all")
    assert files(tmp_path / "all") == files(recording)


def test_recorders_that_cannot_share(fake, recording, tmp_path):
    with pytest.raises(UserError, match="already holds a recording"):
        write(fake, recording, Share(0, 2))
    out = tmp_path / "shared"
    write(fake, out, Share(0, 2))
    for share in (Share(0, 2), Share(0, 3), ALONE):
        with pytest.raises(UserError, match="already holds a recording"):
            write(fake, out, share)
    with pytest.raises(UserError, match="delete the folder first"):
        RecordingWriter.create(out, fake.FIELDS, fake.PLAN, overwrite=True, share=Share(1, 2))
    with pytest.raises(UserError, match="envelope.top_k = 4, now it is 8"):
        fields = fake.FIELDS | {"envelope": {"cover": ["eagle3"], "top_k": 8}}
        RecordingWriter.create(out, fields, fake.PLAN, share=Share(1, 2))
    about = json.loads((out / "manifest-00000-of-00002.json").read_text())
    (out / "manifest-00001-of-00002.json").write_text(json.dumps(about | {"dtype": "float64"}))
    with pytest.raises(UserError, match=r"were given different options \(dtype\)"):
        open_recording(out)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording of four shards by one recorder."""
    out = tmp_path_factory.mktemp("quick") / "trace"
    main(tiny_pair.record(out, *QUICK))
    return out


def test_a_killed_recorder_goes_on_and_the_dataset_is_that_of_one(quick, tiny_pair, tmp_path, monkeypatch, capsys):
    """kill -9 while the second recorder writes its second shard; the first one knows nothing of it."""
    out = tmp_path / "trace"
    code = (
        "import os, signal, sys; from traces.record import main; real = os.replace; count = []\n"
        "def replace(a, b):\n"
        "    count.append(str(b)) if str(b).endswith('.parquet') else None\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if len(count) == 5 else real(a, b)\n"
        "os.replace = replace\n"
        "main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *tiny_pair.record(out, *QUICK, "--shard", "2/2")]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, timeout=900)
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()[-2000:]
    main(tiny_pair.record(out, *QUICK, "--shard", "1/2"))
    assert "share 1/2" in (told := capsys.readouterr().out) and "1 shards" in told
    assert open_recording(out, verify=True).sequence_ids.tolist() == [0, 1, 2, 3, 4]
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():  # now as torchrun would start it
        monkeypatch.setenv(name, value)
    main(tiny_pair.record(out, *QUICK, "--resume"))
    assert "recorded" in capsys.readouterr().out
    assert files(out) == files(quick)


@pytest.mark.long
def test_torchrun(quick, tiny_pair, tmp_path):
    out = tmp_path / "trace"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "traces.record"]
    command = [*torchrun, *tiny_pair.record(out, *QUICK)]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "recording 1/2" in run.stderr and "recording 2/2" in run.stderr
    assert files(out) == files(quick)

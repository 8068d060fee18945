"""The recorder survives interrupts and kills, and refuses what it cannot record."""

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

from policies.errors import run_command
from tests.tiny_pair import TinyPair, train_tokenizer
from traces.record import how_to_go_on, main
from traces.recording import open_recording
from traces.shard import ShardRecorder

ROOT = Path(__file__).parent.parent.parent
QUICK = ("--max-new-tokens", "6", "--cover", "chain(k=2)")


def files(folder: Path) -> dict[str, bytes]:
    """The recording's files by name, less the cache."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def environment() -> dict[str, str]:
    """For a recorder in a process of its own: a recording is resumed with as many threads as it was begun with."""
    return os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}


# ---- interrupts ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted recording of four shards."""
    out = tmp_path_factory.mktemp("quick") / "trace"
    main(tiny_pair.record(out, *QUICK))
    return out


def test_an_interrupt_loses_nothing_and_resume_ends_with_the_same_bytes(quick, tiny_pair, tmp_path, monkeypatch, capsys):
    out = tmp_path / "trace"
    written = []

    def stop(path: Path) -> None:  # Ctrl-C in the middle of the third shard, behind the first of its three files
        written.append(path.name)
        if len(written) == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("traces.writer._sync_file", stop)
        run_command(lambda: main(tiny_pair.record(out, *QUICK)), "What is finished is safe; add --resume.")
    assert end.value.code == 130
    assert "Traceback" not in (told := capsys.readouterr().err) and "interrupted. What is finished is safe" in told
    left = files(out)
    assert sorted(left) == sorted(["manifest.json", *(name for name in files(quick) if "-00000" in name or "-00001" in name)])
    partial = open_recording(out, verify=True)
    assert not partial.complete and partial.sequence_ids.tolist() == [0, 1, 2]
    main(tiny_pair.record(out, *QUICK, "--resume"))
    assert files(out) == files(quick)


def test_resume_after_a_kill(quick, tiny_pair, tmp_path):
    """kill -9 while the second shard's last file is renamed: what is left over is cleared away."""
    out = tmp_path / "trace"
    code = (
        "import os, signal, sys, traces.writer as w; from traces.record import main; real = os.replace; count = []\n"
        "def replace(a, b):\n"
        "    count.append(str(b)) if str(b).endswith('.parquet') else None\n"
        "    os.kill(os.getpid(), signal.SIGKILL) if len(count) == 6 else real(a, b)\n"
        "os.replace = replace\n"
        "main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *tiny_pair.record(out, *QUICK)]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, timeout=900)
    assert run.returncode == -signal.SIGKILL
    left = files(out)
    assert len(json.loads(left["manifest.json"])["shards"]) == 3
    assert {"sequences-00001.parquet", "positions-00001.parquet", ".nodes-00001.parquet.tmp"} <= left.keys()
    assert open_recording(out).sequence_ids.tolist() == [0, 1]
    main(tiny_pair.record(out, *QUICK, "--resume"))
    assert files(out) == files(quick)


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal: a job in the background of a shell is started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_lets_the_shard_in_hand_be_finished(quick, tiny_pair, tmp_path, monkeypatch, capsys, interruptible, times):
    """In the middle of the second shard. Who presses it twice does not wait for the shard."""
    real, handler = ShardRecorder._capture, signal.getsignal(signal.SIGINT)

    def capture(self, target, turn, text):
        for _ in range(times if turn.number == 2 else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, target, turn, text)

    monkeypatch.setattr(ShardRecorder, "_capture", capture)
    out = tmp_path / "trace"
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main(tiny_pair.record(out, *QUICK)), "Go on with --resume.")
    told = capsys.readouterr().err
    assert end.value.code == 130 and "finishing the shard in hand" in told and "interrupted. Go on with --resume." in told
    assert open_recording(out, verify=True).sequence_ids.tolist() == ([0, 1, 2] if times == 1 else [0, 1])
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    main(tiny_pair.record(out, *QUICK, "--resume"))
    assert files(out) == files(quick)


def test_prompts_that_changed_are_not_resumed(quick, tiny_pair, tmp_path, refused):
    """The same number of prompts under the same names, but other questions."""
    out = shutil.copytree(quick, tmp_path / "trace")
    changed = tmp_path / "math.jsonl"
    changed.write_text((tiny_pair.folder / "math.jsonl").read_text().replace("14", "15"))
    words = tiny_pair.record(out, *QUICK, "--resume")
    words = [f"math={changed}" if word.startswith("math=") else word for word in words]
    told = refused(lambda: main(words))
    assert "the prompts of math are not those it was begun with" in told and "--overwrite" in told
    assert files(out) == files(quick)
    about = json.loads((out / "manifest.json").read_text())
    del about["prompts_sha256"]  # as recordings were before
    (out / "manifest.json").write_text(json.dumps(about))
    main(words)
    assert json.loads((out / "manifest.json").read_text())["status"] == "complete"


@pytest.mark.long
def test_ctrl_c_in_a_terminal(quick, tiny_pair, tmp_path):
    out = tmp_path / "trace"
    code = (
        "import os, signal, sys, traces.record as r; from traces.writer import RecordingWriter as W\n"
        "from policies.errors import run_command\n"
        "real = W.write_shard\n"
        "def write(self, index, *tables):\n"
        "    real(self, index, *tables)\n"
        "    if index == 1: os.kill(os.getpid(), signal.SIGINT)\n"
        "W.write_shard = write\n"
        "run_command(r.main, 'Go on with --resume.')"
    )
    command = [sys.executable, "-c", code, *tiny_pair.record(out, *QUICK)]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900)
    assert run.returncode == 130 and "Traceback" not in run.stderr and "interrupted. Go on" in run.stderr
    main(tiny_pair.record(out, *QUICK, "--resume"))
    assert files(out) == files(quick)


def test_the_command_that_goes_on(tiny_pair, quick, tmp_path, refused):
    """It is not the same for a recording that was to replace another, which would be deleted again, nor for a fill."""
    assert how_to_go_on(["--out", "x"]).endswith("the same command and --resume.")
    assert how_to_go_on(["--out", "x", "--overwrite"]).endswith("the same command and --resume in place of --overwrite.")
    assert "--resume" not in how_to_go_on(["--fill", "x", "--policy", "chain"])
    out = shutil.copytree(quick, tmp_path / "trace")
    assert "take --resume to keep" in refused(lambda: main(tiny_pair.record(out, *QUICK, "--overwrite", "--resume")))
    assert files(out) == files(quick)


def test_resume_of_a_whole_recording_changes_nothing(quick, tiny_pair, tmp_path):
    out = shutil.copytree(quick, tmp_path / "trace")
    main(tiny_pair.record(out, *QUICK, "--resume"))
    assert files(out) == files(quick)


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_a_recording_is_left_alone(quick, tiny_pair, tmp_path, refused):
    out = shutil.copytree(quick, tmp_path / "trace")
    told = refused(lambda: main(tiny_pair.record(out, *QUICK)))
    assert "--resume" in told and "--overwrite" in told and str(out) in told
    told = refused(lambda: main(tiny_pair.record(out, "--max-new-tokens", "7", "--cover", "chain(k=2)", "--resume")))
    assert "max_new_tokens" in told and "--overwrite" in told
    assert files(out) == files(quick)


def test_no_disk_space(tiny_pair, tmp_path, refused, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1000))
    told = refused(lambda: main(tiny_pair.record(tmp_path / "trace", *QUICK)))
    assert "no disk space" in told and "--resume" in told
    assert list(files(tmp_path / "trace")) == ["manifest.json"]
    assert json.loads((tmp_path / "trace" / "manifest.json").read_text())["shards"] == {}


def test_a_full_disk_in_mid_write(tiny_pair, tmp_path, refused, monkeypatch):
    def full(table, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("traces.writer.write_parquet", full)
    assert "is full" in refused(lambda: main(tiny_pair.record(tmp_path / "trace", *QUICK)))
    assert list(files(tmp_path / "trace")) == ["manifest.json"]


@pytest.fixture
def other_parts(tiny_pair: TinyPair, tmp_path: Path) -> dict[str, str]:
    """Model folders that something is wrong with."""
    parts = {}
    for name, source in {
        "weightless": "target",
        "foreign": "draft",
        "elsewhere/eagle3": "eagle3",
        "odd": "draft",
    }.items():
        parts[name] = str(shutil.copytree(tiny_pair.folder / source, tmp_path / name))
    os.remove(tmp_path / "weightless" / "model.safetensors")
    train_tokenizer(150).save_pretrained(parts["foreign"])
    (tmp_path / "odd" / "config.json").write_text("{")
    return parts


def test_models_that_do_not_fit(tiny_pair, other_parts, tmp_path, refused):
    def told(target: str, *drafts: str) -> str:
        draft = [word for name in drafts for word in ("--draft", name)]
        return refused(lambda: main(["--target", target, *draft, "--prompts", *tiny_pair.prompts, "--out", str(tmp_path / "new")]))

    assert "two drafters are named 'eagle3'" in told(tiny_pair.target, tiny_pair.eagle3, other_parts["elsewhere/eagle3"])
    assert "different tokenizers" in told(tiny_pair.target, other_parts["foreign"])
    assert "has no weights" in told(other_parts["weightless"], tiny_pair.draft)
    assert "has no weights" in told(tiny_pair.target, other_parts["weightless"])
    assert "there is no model folder" in told(str(tmp_path / "nowhere"), tiny_pair.draft)
    assert "--draft" in told(tiny_pair.target)
    assert "config.json" in told(tiny_pair.target, other_parts["odd"])
    assert not (tmp_path / "new").exists()


def test_prompts_that_cannot_be_recorded(tiny_pair, tmp_path, refused):
    def told(content: str, *options: str) -> str:
        (tmp_path / "p.jsonl").write_text(content)
        models = ["--target", tiny_pair.target, "--draft", tiny_pair.draft, "--out", str(tmp_path / "new")]
        return refused(lambda: main([*models, "--prompts", f"d={tmp_path / 'p.jsonl'}", *options]))

    assert "is empty" in told("\n\n")
    assert "p.jsonl, line 2" in told('{"prompt": "the cat"}\n{"prompt": \n')
    long = told('{"prompt": "' + "the cat sat on the mat " * 20 + '"}', "--max-new-tokens", "64")
    assert "as the model's context holds 256: shorten it" in long and "--max-new-tokens" in long
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "cure"),
    [
        (["--cover", "eagl3"], "did you mean eagle3"),
        (["--cover", "chain(k=-1)"], "k must be 0 or more"),
        (["--cover", "heterospec"], "must be fitted"),
        (["--dtype", "float8"], "unknown dtype"),
        (["--device", "cuda:99"], "--device cpu"),
        (["--limit", "0"], "--limit must be 1 or more"),
        (["--positions", "0"], "--positions must be 1 or more"),
        (["--top-m", "1"], "--top-m must be 2 or more"),
        (["--fill", "nowhere"], "--policy"),
        (["--fill", "nowhere", "--policy", "chain"], "leave out --out"),
        (["--policy", "chain"], "named by --cover"),
    ],
)
def test_options_that_make_no_sense(tiny_pair, tmp_path, refused, options, cure):
    assert cure in refused(lambda: main(tiny_pair.record(tmp_path / "new", *options)))
    assert not (tmp_path / "new").exists()


def test_out_is_needed(refused):
    assert "--out FOLDER" in refused(lambda: main([]))


def test_a_dry_run_writes_nothing(tiny_pair, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(tiny_pair.record(tmp_path / "trace", *QUICK, "--dry-run"))
    told = capsys.readouterr().out
    assert "time" in told and "disk" in told and "memory" in told
    assert not list(tmp_path.iterdir())

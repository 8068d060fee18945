"""The tiny pair and its recordings, made once per run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny_pair import TinyPair, write_tiny_pair

NARROW_COVER = ("eagle3", "eagle3(top_k=8, depth=5)", "eagle3(top_k=4, depth=3)", "static(tree=eagle1)", "chain(k=5)")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny models are faster on one thread, the more so on a busy machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    """Folders of a target, a draft LM, an EAGLE-3 head and prompts."""
    return write_tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def tiny_heads(tiny_pair: TinyPair) -> dict[str, str]:
    """Folders of other heads for the pair's target: "eagle1", "medusa" and "dflash"."""
    from tests.tiny_heads import NAMES, write_tiny_heads

    return dict(zip(NAMES, map(str, write_tiny_heads(tiny_pair)), strict=True))


@pytest.fixture(scope="session")
def tiny_recording(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pair recorded in float64. Read it; copy it before you change it."""
    return _record(tiny_pair, tmp_path_factory.mktemp("trace64") / "trace", "float64")


@pytest.fixture(scope="session")
def tiny_recording32(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pair recorded in float32, for a few policies only."""
    cover = [word for spec in NARROW_COVER for word in ("--cover", spec)]
    return _record(tiny_pair, tmp_path_factory.mktemp("trace32") / "trace", "float32", *cover)


@pytest.fixture(scope="session")
def tiny_sampled(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts of each domain of the tiny pair in float64, each greedy and sampled at temperature 1, with all processors."""
    return _record_sampled(tiny_pair, tmp_path_factory.mktemp("sampled64") / "trace", "float64")


@pytest.fixture(scope="session")
def tiny_sampled32(tiny_pair: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in float32."""
    return _record_sampled(tiny_pair, tmp_path_factory.mktemp("sampled32") / "trace", "float32")


def _record_sampled(pair: TinyPair, out: Path, dtype: str) -> Path:
    cover = [word for spec in NARROW_COVER for word in ("--cover", spec)]
    groups = ["--temperature", "0", "--temperature", "1", "--top-p", "0.95", "--top-k", "60", "--seed", "4"]
    size = ["--repetition-penalty", "1.1", "--limit", "2", "--max-new-tokens", "20"]
    return _record(pair, out, dtype, *cover, *groups, *size)


def _record(pair: TinyPair, out: Path, dtype: str, *options: str) -> Path:
    from traces.record import main

    main(pair.record(out, "--dtype", dtype, *options))
    return out


@pytest.fixture(scope="session")
def pair64(tiny_pair: TinyPair):
    """The tiny pair, loaded in float64."""
    return _load(tiny_pair, "float64")


@pytest.fixture(scope="session")
def pair32(tiny_pair: TinyPair):
    """The tiny pair, loaded in float32."""
    return _load(tiny_pair, "float32")


def _load(pair: TinyPair, dtype: str):
    from live.pair import load_pair

    return load_pair(pair.target, [pair.eagle3, pair.draft], dtype)


@pytest.fixture
def refused(capsys: pytest.CaptureFixture) -> Callable[[Callable], str]:
    """Run a command that must refuse its input: exit code 2, one "error:" line as the last word, no traceback."""

    def run(main: Callable) -> str:
        from policies.errors import run_command

        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_command(main)
        told = capsys.readouterr()
        lines = told.err.strip().splitlines()
        assert stop.value.code == 2, told.err
        assert lines[-1].startswith("error: ") and told.err.count("error: ") == 1 and "Traceback" not in told.err
        return lines[-1].removeprefix("error: ")

    return run

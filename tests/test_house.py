"""The house rules of DESIGN section 3: who imports whom, how long a file may be, and what --help may cost."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("policies", "traces", "sim", "live", "dashboard", "app")
COMMANDS = (
    "policies", "traces.record", "traces.inspect", "traces.profile", "traces.analytic", "sim.fit", "sim.replay", "sim.sweep",
    "traces.merge", "traces.slice", "sim.bounds", "sim.curves", "sim.compare", "sim.validate", "sim.export", "sim.report",
    "live.generate", "live.bench", "live.fidelity", "live.corpus", "live.reference.train",
)  # fmt: skip
MEASURING = {
    "record", "shard", "capture", "forest", "fill", "estimate", "profile", "measure", "grid", "overhead", "campaign", "halving",
}
"""Files of traces/ that record or profile models, and so may import live."""
LONGEST = 350


@cache
def modules() -> dict[str, Path]:
    """Our modules by dotted name."""
    files = [ROOT / "app.py", *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


@cache
def imports(module: str, typing_too: bool = False) -> frozenset[str]:
    """Modules that a module imports at any place in it; what stands under TYPE_CHECKING only when asked for."""
    tree = ast.parse(modules()[module].read_text())
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not typing_too:
            skipped |= {id(inner) for part in node.body for inner in ast.walk(part)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write imports out in full"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules() else node.module for name in inside}
    return frozenset(found)


def room(module: str) -> str:
    return module.split(".")[0]


def offenders(members: list[str], forbidden: set[str]) -> list[str]:
    return [f"{m} imports {i}" for m in members for i in imports(m, typing_too=True) if room(i) in forbidden]


def test_policies_know_nobody_and_no_clock():
    members = [module for module in modules() if room(module) == "policies"]
    assert not offenders(members, {"traces", "sim", "live", "app", "transformers", "time", "datetime"})


def test_sim_never_sees_a_model():
    members = [module for module in modules() if room(module) == "sim"]
    assert not offenders(members, {"live", "app", "transformers"})


def test_the_store_knows_only_policies():
    members = [m for m in modules() if room(m) == "traces" and m.rpartition(".")[2] not in MEASURING]
    assert "traces.schema" in members and "traces.recording" in members
    allowed = {"traces.inspect": "sim"}  # a command: it prints tau at a glance
    found = [o for o in offenders(members, {"live", "app", "transformers"})]
    found += [o for o in offenders(members, {"sim"}) if o.split()[0] not in allowed]
    assert not found


def test_live_meets_sim_only_where_it_compares():
    members = [module for module in modules() if room(module) == "live"]
    comparing = ("live.bench", "live.fidelity", "live.tandem", "live.witness", "live.contenders", "live.reference.")
    assert not [o for o in offenders(members, {"sim"}) if not o.startswith(comparing)]


def test_live_reads_recordings_and_profiles_only():
    """Recording is built on live, not the other way round. (Bench may measure costs beside decoding, through one file.)"""
    measuring = "live.in_turns"
    assert [m for m in modules() if measuring in imports(m)] == ["live.bench"]
    members = [module for module in modules() if room(module) == "live" and module != measuring]
    taken = {i for m in members for i in imports(m, typing_too=True) if room(i) == "traces"}
    assert taken <= {f"traces.{name}" for name in ("recording", "store", "schema", "manifest", "costs", "prompts")}


def test_sim_and_the_store_reach_no_model_by_detours():
    """What runs in a replay never loads transformers, whatever it imports in turn."""
    roots = [m for m in modules() if room(m) == "sim"] + ["traces.store", "traces.costs", "traces.prompts"]
    seen, ahead = set(), list(roots)
    while ahead:
        module = ahead.pop()
        if module not in seen:
            seen.add(module)
            ahead += [other for other in imports(module) if other in modules()]
    assert not {module for module in seen if room(module) in ("live", "app")}


def test_nobody_imports_the_dashboard():
    others = [module for module in modules() if room(module) not in ("app", "dashboard")]
    assert not offenders(others, {"app", "dashboard", "streamlit"})


def test_recording_replay_and_live_decoding_need_no_table_or_chart_library():
    """A GPU box often has neither polars nor altair: what runs there never loads them, whatever it imports in turn."""
    names = ("sim.replay", "sim.metrics", "sim.fit", "sim.contest", "sim.sweep", "sim.samples")
    ahead = [m for m in modules() if room(m) in ("policies", "traces", "live")] + [m for m in names if m in modules()]
    seen: set[str] = set()
    while ahead:
        module = ahead.pop()
        if module not in seen:
            seen.add(module)
            ahead += [other for other in _top_level(module) if other in modules()]
    offending = {m: found for m in seen if (found := {i for i in _top_level(m) if room(i) in {"polars", "altair", "streamlit"}})}
    assert not offending


def _top_level(module: str) -> set[str]:
    found = set()
    for node in ast.parse(modules()[module].read_text()).body:
        found |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        found |= {node.module} if isinstance(node, ast.ImportFrom) else set()
    return found


def test_no_circle():
    """Between files, counting imports inside functions too; importing a folder's __init__ is no circle."""
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"circle: {' -> '.join((*way[way.index(module) :], module))}"
        if module in done:
            return
        for other in imports(module):
            if other in modules() and other != module:
                visit(other, (*way, module))
        done.add(module)

    for module in modules():
        visit(module, ())


@pytest.mark.parametrize("module", COMMANDS)
def test_help_is_quick(module):
    """--help of a command exits 0 and imports neither torch nor scipy nor transformers."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", module, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "usage:" in run.stdout and f"-m {module}" in run.stdout
    loaded = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    heavy = {"torch", "scipy", "transformers", "sklearn", "polars", "pyarrow"}
    assert not {name.split(".")[0] for name in loaded} & heavy


def tracked() -> list[Path]:
    """Files under version control; without git (a source archive), the sources."""
    run = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        return [path for room_ in (*ROOMS[:-1], "tests") for path in (ROOT / room_).rglob("*.py")]
    return [ROOT / name for name in run.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in tracked() if path.suffix == ".py"}
    assert not {name: lines for name, lines in lengths.items() if lines > LONGEST}


def test_no_paths_of_one_machine():
    text = {".py", ".md", ".toml", ".txt", ".json", ".yml", ".yaml", ".cfg", ""}
    home = re.compile(r"(?<![\w.])/(?:home|root|Users|work|tmp/\w+_venv|mnt)/\w+")
    found = []
    for path in tracked():
        if path.suffix in text and path.stat().st_size < 1 << 20 and path != Path(__file__):
            try:
                lines = path.read_text().splitlines()
            except UnicodeDecodeError:
                continue
            found += [f"{path.relative_to(ROOT)}:{n}" for n, line in enumerate(lines, 1) if home.search(line)]
    assert not found

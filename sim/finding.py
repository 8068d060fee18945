"""Which recordings and profiles are at hand, and what results about them may be remembered under."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path

from policies.errors import UserError
from traces.costs import Profile, check_profile, load_profile
from traces.recording import Recording


def recordings_in(folder: Path, given: bool) -> list[Path]:
    """The folder itself, or the recordings one level below; one that holds none is kept when it was asked for."""
    if (folder / "manifest.json").exists():
        return [folder]
    return sorted(path.parent for path in folder.glob("*/manifest.json")) or [folder] * given


def files_of(folder: Path) -> tuple:
    """What changes when a file of the recording does: name, size and modification time of each."""
    files = sorted(path for path in folder.glob("*") if path.suffix in (".json", ".parquet"))
    return tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)


def key_of(recording: Recording) -> str:
    """A digest of the checksums of all shards: what results are remembered under."""
    shards = recording.manifest["shards"]
    checksums = [shards[name]["sha256"] for name in sorted(shards)]
    facts = [checksums, recording.manifest["drafters"], recording.manifest.get("context_limit")]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def manifest_digest(recording: Recording) -> str:
    """SHA-256 of the manifest, which holds those of all shards: says which recording a result is about."""
    path = Path(recording.folder) / "manifest.json"
    if not path.exists():  # several recorders are at it, each with a manifest of its own
        return hashlib.sha256(json.dumps(recording.manifest).encode()).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def text_digest(recording: Recording) -> str:
    """SHA-256 of the recorded texts: drafting what a recording lacks (``--fill``) leaves it as it is."""
    digest = hashlib.sha256(recording.length.astype("<i8").tobytes())
    digest.update(recording.token.astype("<i4").tobytes())
    return digest.hexdigest()


def found_profiles(folder: Path, shipped: Path, recording: Recording, drafter: str) -> list[Path]:
    """Profiles beside the recording, then those of the folder `shipped`; only such as were measured on its models."""
    beside = [*sorted(folder.glob("*.json")), *sorted(folder.parent.glob("*profile*.json"))]
    fitting = []
    for path in [*beside, *sorted(shipped.glob("*.json"))]:
        with suppress(UserError):
            profile_for(path, recording, drafter)
            fitting.append(path)
    return fitting


def other_profiles(shipped: Path, fitting: list[Path], drafter: str) -> list[Path]:
    """The profiles of the folder `shipped` that are of other models, but know a drafter of this name: for a what-if."""
    found = []
    for path in sorted(set(shipped.glob("*.json")) - set(fitting)):
        with suppress(UserError):
            load_profile(path).cost(drafter)
            found.append(path)
    return found


def profile_for(path: str | Path, recording: Recording, drafter: str) -> Profile:
    """A profile of the recording's models. Raises UserError when it is another's, or cannot be read."""
    profile = load_profile(path)
    check_profile(profile, recording.manifest)
    profile.cost(drafter)
    return profile


def digest_of(profile: Profile) -> str:
    """What predicted times are remembered under."""
    return hashlib.sha256(json.dumps(profile.content, sort_keys=True).encode()).hexdigest()

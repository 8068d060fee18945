"""What all pages share: remembered results, tables, charts and messages."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import altair as alt
import polars as pl
import streamlit as st
import torch

from dashboard.view import View, current
from policies.contract import Policy
from policies.errors import UserError
from policies.registry import load_policy
from sim import curves, glance
from sim.bootstrap import Resamples
from sim.finding import digest_of, key_of
from sim.setting import Setting
from sim.tally import Tally
from sim.trial import run_trial
from sim.vocabulary import Vocabulary, find_vocabulary
from traces.costs import CostModel
from traces.recording import Recording

HERE = Path(__file__).parent.parent
FITTED = HERE / "policies" / "fitted"
POLICY_HELP = "name, name(parameter=value), FILE.json or FILE.py:Class; type your own"
SHIPPED_TARGET = HERE / "live" / "reference" / "target"


# --- messages


@contextmanager
def friendly() -> Iterator[None]:
    """A user's mistake becomes a sentence on the page; what stands outside the block goes on."""
    try:
        yield
    except UserError as error:
        st.error(escaped(str(error)))


def drawn_alone(page: Callable[[], None]) -> Callable[[], None]:
    """A page on which a move draws the page again, but not the sidebar, whose choices it cannot change."""

    @st.fragment
    @wraps(page)
    def friendly_page() -> None:
        with friendly():
            page()

    return friendly_page


def escaped(text: str) -> str:
    """Text with Markdown's signs made harmless, except what stands between backticks."""
    parts = text.split("`")
    return "`".join(re.sub(r"([*_$\[\]~<>])", r"\\\1", part) if i % 2 == 0 else part for i, part in enumerate(parts))


def from_here(path: Path) -> Path:
    """A path as it is typed where the dashboard was started, if it lies there."""
    whole, here = path.resolve(), Path.cwd().resolve()
    return whole.relative_to(here) if whole.is_relative_to(here) else path


def nothing_drafted(view: View) -> bool:
    """Whether no text is long enough to draft on; says so."""
    if len(view.every_text) and view.recording.length[view.every_text].max() >= 2:
        return False
    st.info("No text of this recording has a second token, so nothing was ever drafted.")
    return True


# --- tables and charts


def show_table(table: pl.DataFrame, name: str, columns: dict | None = None, data: pl.DataFrame | None = None) -> None:
    """A table and its download (of ``data``, when that holds more than is shown)."""
    st.dataframe(table, column_config=columns or {}, hide_index=True)
    download(table if data is None else data, name, "" if data is None else "everything")


def chosen_row(name: str, labels: list[str], rows: list[int]) -> int:
    """The row that was chosen in a table, else the one that the address names, else the first; the address remembers it.

    :param name: of the query parameter.   :param labels: what each row is called there.
    :param rows: as the table returned them; those that are no longer there do not count.
    """
    if rows := [row for row in rows if row < len(labels)]:
        st.query_params[name] = labels[rows[0]]
        return rows[0]
    asked = st.query_params.get(name)
    return labels.index(asked) if asked in labels else 0


class Drawn:
    """A chart as Streamlit draws it: with no room below, and not compared with Vega-Lite's whole schema at each rerun, which
    takes longer than all else about a chart; the tests do that."""

    def __init__(self, chart: alt.TopLevelMixin):
        self.chart = chart

    def to_dict(self) -> dict[str, Any]:
        """The specification in Vega-Lite."""
        return self.chart.to_dict(validate=False) | {"padding": {"left": 0, "top": 5, "right": 5, "bottom": 0}}


def show_chart(
    chart: alt.TopLevelMixin,
    data: pl.DataFrame,
    name: str,
    caption: str,
    on_select=None,
    width: str = "stretch",
    key: str | None = None,
) -> None:
    """A chart, its caption and the data behind it.

    :param on_select: what to call when something in the chart is selected; the chart's key is ``key``, or ``chart_{name}``.
    """
    more = {"on_select": on_select} if on_select else {}
    st.altair_chart(Drawn(chart), key=key or f"chart_{name}", width=width, alt=caption, **more)
    with st.container(horizontal=True):
        st.caption(caption, width="stretch")
        download(data, name)


def download(table: pl.DataFrame, name: str, note: str = "") -> None:
    """Two buttons that stay together: the table as CSV and as Parquet, made when pressed."""
    kinds = {
        "CSV": ("text/csv", table.write_csv),
        "Parquet": ("application/vnd.apache.parquet", lambda: parquet_of(table)),
    }
    with st.container(horizontal=True, width="content"):
        for kind, (mime, made) in kinds.items():
            st.download_button(
                f"{kind} ({note})" if note else kind,
                made,
                f"{name}.{kind.lower()}",
                mime,
                key=f"{kind.lower()}_{name}",
                icon=":material/download:",
                type="tertiary",
                on_click="ignore",
                help=f"Download the data of this as {name}.{kind.lower()}",
            )


def parquet_of(table: pl.DataFrame) -> bytes:
    content = io.BytesIO()
    table.write_parquet(content)
    return content.getvalue()


# --- what is computed once


@st.cache_resource(max_entries=4, show_spinner="Reading the draft forest")
def samples_of(key: str, _view: View) -> pl.DataFrame:
    """`sim.curves.samples` of the chosen texts, and the first choice's probability."""
    table = curves.samples(_view.recording, _view.drafter, _view.texts)
    return table.with_columns(top1_probability=pl.col("top1_logprob").exp())


@st.cache_resource(max_entries=4, show_spinner=False)
def vocabulary_of(key: str, _recording: Recording) -> Vocabulary:
    return find_vocabulary(_recording.manifest, SHIPPED_TARGET)


def words() -> Vocabulary:
    """The words behind the recording's token ids."""
    recording = current().recording
    return vocabulary_of(key_of(recording), recording)


@st.cache_data(max_entries=400, show_spinner=False)
def _sums(key: str, _view: View, _policy: Policy, _setting: Setting, _cost: CostModel | None) -> Tally:
    return run_trial(_view.recording, _policy, _setting, _cost, torch.from_numpy(_view.texts))


def replayed(view: View, policy: Policy, setting: Setting | None = None) -> Tally:
    """Sums of one policy's replay, without predicted times where the profile does not reach.

    :param setting: by default the view's, one request at a time.
    Raises UserError when the policy fails.
    """
    setting = setting or view.setting
    key = f"{view.key} {policy_key(policy)} {setting}"  # one text: each argument that Streamlit looks at takes its time
    if view.profile is not None:
        with friendly():
            return _sums(f"{key} {digest_of(view.profile)}", view, policy, setting, view.cost(policy.name))
    try:
        return _sums(key, view, policy, setting, None)
    except UserError:
        raise
    except Exception as error:
        if not policy.source:
            raise
        raise UserError(f"{policy.source} failed ({type(error).__name__}: {error}): mend it and replay it again") from error


@st.cache_resource(max_entries=8, show_spinner=False)
def _draws(texts: str, _like: Tally) -> Resamples:
    """One set of draws for all that was replayed on the same texts."""
    return Resamples(_like)


@st.cache_data(max_entries=400, show_spinner=False)
def _rows(key: str, _spec: str, _setting: Setting, _sums: Tally) -> list[dict[str, Any]]:
    return glance.rows_of_one(_spec, policy_of(_spec), _sums, _setting, _draws(_texts_key(_sums), _sums))


def rows_of(view: View, tallies: dict[str, Tally], setting: Setting | None = None) -> pl.DataFrame:
    """`sim.glance.rows_with_intervals` of what :func:`replayed` gave, by spec."""
    setting = setting or view.setting
    parts = [_rows(f"{view.key} {_digest(sums)} {spec} {setting}", spec, setting, sums) for spec, sums in tallies.items()]
    return glance.table_of([row for part in parts for row in part])


@st.cache_data(max_entries=400, show_spinner=False)
def _differences(key: str, only: tuple[str, ...] | None, _ours: Tally, _theirs: Tally) -> pl.DataFrame:
    return glance.difference_table(_ours, _theirs, _draws(_texts_key(_ours), _ours), only)


def differences_of(ours: Tally, theirs: Tally, only: tuple[str, ...] | None = None) -> pl.DataFrame:
    """`sim.glance.difference_table` of two replays of the same texts, of all figures or ``only`` some."""
    return _differences(f"{_digest(ours)} {_digest(theirs)}", only, ours, theirs)


def _digest(sums: Tally) -> str:
    columns = [sums.sequence, sums.domain, *sums.sums.values()]
    names = json.dumps([sums.domains, list(sums.sums)])
    return hashlib.sha256(b"".join([names.encode(), *(column.tobytes() for column in columns)])).hexdigest()


def _texts_key(sums: Tally) -> str:
    return hashlib.sha256(sums.sequence.tobytes() + sums.domain.tobytes()).hexdigest()


def policy_key(policy: Policy) -> str:
    """The policy and its parameters, and for one from outside the text of its file."""
    source = Path(policy.source.rpartition(":")[0]).read_text() if policy.source else ""
    return json.dumps([policy.to_json(), source], sort_keys=True)


# --- policies and paths


def policy_of(spec: str) -> Policy:
    """The fitted policy that a typed ``spec`` names. Raises UserError for one that cannot be read or is not fitted."""
    inside(spec)
    policy = load_policy(spec)
    policy.check_fitted()
    return policy


def inside(spec: str) -> None:
    """Raise UserError when ``spec`` names a file outside the folder that the app was started in."""
    spec = spec.strip()
    head = spec.partition("(")[0].strip() if spec.endswith(")") else spec  # as load_policy reads it
    path = head if head.endswith(".json") else head.rpartition(":")[0] if ".py:" in head else ""
    if path:
        allowed(Path(path))


def allowed(path: Path) -> Path:
    """The path itself. Raises UserError when it leaves the folder that the app was started in, or what is shipped."""
    view = st.session_state.get("view")
    resolved = path.resolve()
    if (view and view.anywhere) or any(resolved.is_relative_to(folder) for folder in (Path.cwd(), FITTED)):
        return path
    raise UserError(
        f"{path} lies outside the folder the dashboard was started in: copy it there, start the dashboard there, "
        "or start it with --anywhere"
    )


def choose_policy(label: str, key: str, start: str) -> str:
    """A field for one policy: those that can run as they are, and whatever is typed. ``start``: part of the first name."""
    specs = known_specs()
    typed = st.session_state.get(key) or st.query_params.get(key)
    if typed and typed not in specs:
        specs.append(typed)
    index = next((place for place, spec in enumerate(specs) if spec == start), None)
    if index is None:
        index = next((place for place, spec in enumerate(specs) if start in spec), 0)
    return st.selectbox(label, specs, index, key=key, bind="query-params", accept_new_options=True, help=POLICY_HELP)


def choose_policies(label: str, key: str, start: list[str]) -> list[str]:
    """The same for several."""
    specs = known_specs()
    typed = st.session_state.get(key) or st.query_params.get_all(key)
    specs += [spec for spec in typed if spec not in specs]
    return st.multiselect(label, specs, start, key=key, bind="query-params", accept_new_options=True, help=POLICY_HELP)


def known_specs() -> list[str]:
    """Every policy that can run as it is: those of the registry, and the shipped fitted ones."""
    from policies.registry import all_policies

    ready = [name for name, cls in all_policies().items() if not cls.required_fit()]
    return [*ready, *(str(path.relative_to(HERE)) for path in sorted(FITTED.glob("*.json")))]

"""One page of results: ``python -m sim.report replay.json sweep.json curves.json --out report``.

Takes the JSON files that sim.replay, sim.sweep, sim.curves, sim.compare and sim.validate wrote with ``--json`` and writes
report.html, one file that opens offline (charts are SVG, drawn by Altair), and report.md, the same without the charts: tables,
the exact commands, settings, and the hashes of recording and models.
"""

from __future__ import annotations

import argparse
import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from policies.errors import UserError, run_command

if TYPE_CHECKING:  # polars and altair are imported when there is work to do, not for --help
    from sim.sections import Section, Table

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto; }
th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
caption { text-align: left; font-weight: 600; }
pre { background: #f4f4f4; padding: .7em; overflow-x: auto; }
svg { max-width: 100%; height: auto; }
.missed td { color: #b00020; }
"""


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m sim.report", description=__doc__.split("\n")[0])
    parse.add_argument("results", nargs="+", type=Path, metavar="JSON", help="what sim.* commands wrote with --json")
    parse.add_argument("--out", type=Path, required=True, metavar="NAME", help="writes NAME.html and NAME.md")
    parse.add_argument("--title", default="Speculative decoding, replayed", help="of the page")
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    page, text = args.out.with_name(args.out.name + ".html"), args.out.with_name(args.out.name + ".md")
    from sim.outputs import check_writable, write_text

    check_writable(page, text)
    contents = [read_result(path) for path in args.results]
    try:
        import vl_convert  # noqa: F401  draws charts without a browser
    except ImportError:
        raise UserError("charts need vl-convert-python: pip install 'specreplay[app]'") from None
    from sim.sections import section_of

    sections = [section_of(content) for content in contents]
    write_text(page, as_html(args.title, sections))
    write_text(text, as_markdown(args.title, sections))
    print(f"written to {page} and {text}")


def read_result(path: Path) -> dict[str, Any]:
    """A result that a command of sim wrote.

    :raises UserError: when it is missing or something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a file that a sim command wrote with --json") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): write it again with --json") from None
    if not isinstance(content, dict) or "command" not in content or "about" not in content:
        raise UserError(f"{path} is no result of a sim command: give a file written with --json")
    return content


def as_html(title: str, sections: list[Section]) -> str:
    """The page, self-contained."""
    parts = ['<!doctype html>\n<html lang="en"><head><meta charset="utf-8">', f"<title>{html.escape(title)}</title>"]
    parts.append(f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>")
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        parts += [f"<p>{html.escape(line)}</p>" for line in section.lines]
        parts += [f"<figure>{svg(chart)}</figure>" for chart in section.charts]
        parts += [_html_table(table) for table in section.tables]
        parts.append(f"<h3>How to make this again</h3><pre>{html.escape(section.command)}</pre>")
        parts.append(_html_table(section.facts))
    return "\n".join([*parts, "</body></html>\n"])


def svg(chart: Any) -> str:
    """An Altair chart as SVG text."""
    import io

    stream = io.StringIO()
    chart.save(stream, format="svg")
    return stream.getvalue()


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    rows = []
    for index, row in enumerate(table.rows):
        marked = ' class="missed"' if index in table.missed else ""
        rows.append(f"<tr{marked}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>")
    return f"<table><caption>{html.escape(table.title)}</caption><tr>{head}</tr>\n" + "\n".join(rows) + "</table>"


def as_markdown(title: str, sections: list[Section]) -> str:
    """The same in Markdown, without the charts."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", "", *(line + "\n" for line in section.lines)]
        for table in section.tables:
            lines += _markdown_table(table)
        lines += ["Made by", "", "```", section.command, "```", "", *_markdown_table(section.facts)]
    return "\n".join(lines).rstrip() + "\n"


def _markdown_table(table: Table) -> list[str]:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = "|---|" + "---:|" * (len(table.header) - 1)
    return [f"**{table.title}**", "", line(table.header), rule, *(line(row) for row in table.rows), ""]


if __name__ == "__main__":
    run_command(main)

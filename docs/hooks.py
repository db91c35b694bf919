"""Hooks of mkdocs: a page for each decision; files outside docs/ are named, not linked."""

import re
import subprocess
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "docs" / "decisions.md"
ENTRY = re.compile(r"^\*\*(.+?)\*\*", re.MULTILINE)


def decisions() -> list[tuple[str, str, str, str]]:
    """Return (file name, title, date, text) of every decision of docs/decisions.md."""
    text, dates = SOURCE.read_text(), _dates()
    starts = [match.start() for match in ENTRY.finditer(text)]
    found, subject = [], ""
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        body = text[start:end].split("\n## ")[0].strip()
        heads = re.findall(r"^## (.+)$", text[:start], re.MULTILINE)
        subject = heads[-1] if heads else ""
        title = ENTRY.match(body).group(1).rstrip(".")  # type: ignore[union-attr]
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60]
        line = text[:start].count("\n")
        status = "superseded" if "is deleted" in title or "deleted" in subject else "accepted"
        head = f"# {title}\n\n*{subject}. Date: {dates.get(line, 'not recorded')}. Status: {status}.*\n\n"
        found.append(
            (f"decisions/{name}.md", title, dates.get(line, ""), head + body.replace("](results/", "](../results/"))
        )
    return found


def _dates() -> dict[int, str]:
    """Return the day of the last change of every line of docs/decisions.md; empty outside of a checkout."""
    call = ["git", "-C", str(ROOT), "blame", "--date=short", "-s", "--line-porcelain", str(SOURCE)]
    try:
        told = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    seconds = re.findall(r"^committer-time (\d+)$", told, re.MULTILINE)
    import datetime

    return {
        i: datetime.datetime.fromtimestamp(int(s), datetime.UTC).strftime("%Y-%m-%d") for i, s in enumerate(seconds)
    }


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each decision."""
    for name, _, _, text in decisions():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """List the decisions on their index, and name files outside docs/ instead of linking to them."""
    if page.file.src_uri == "decisions.md":
        rows = [f"| {date} | [{title}]({name}) |" for name, title, date, _ in decisions()]
        return "# Decisions\n\nOne page each, with date and status.\n\n| date | decision |\n|---|---|\n" + "\n".join(
            rows
        )
    depth = page.file.src_uri.count("/")
    outside = r"\[([^\]]+)\]\((?:\.\./){" + str(depth + 1) + r"}([^)#]+)[^)]*\)"
    return re.sub(outside, r"\1 (`\2` in the repository)", markdown)

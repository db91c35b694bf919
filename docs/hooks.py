"""Hook of mkdocs: name files outside docs/ instead of linking to them."""

import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replace links that leave docs/ by the name of the file."""
    depth = page.file.src_uri.count("/")
    outside = r"\[([^\]]+)\]\((?:\.\./){" + str(depth + 1) + r"}([^)#]+)[^)]*\)"
    return re.sub(outside, r"\1 (`\2` in the repository)", markdown)

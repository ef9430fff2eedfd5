"""Give the site a page of the results, which lie beside its folder (a hook of mkdocs)."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

RESULTS = Path(__file__).parent.parent / "RESULTS.md"


def on_files(files: Any, config: Any) -> None:
    """Add the page, with links as they are from within the folder and none to what is not there."""
    text = RESULTS.read_text().replace("](docs/", "](")
    text = re.sub(r"\[([^\]]+)\]\(examples/[^)]*\)", r"`\1`", text)
    files.append(File.generated(config, "results.md", content=text))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn links that are right in the repository into links to the page."""
    return markdown.replace("](../RESULTS.md", "](results.md")

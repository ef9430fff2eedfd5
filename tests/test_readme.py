"""The README's Python runs."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_code_in_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})


def test_every_link_to_a_file_leads_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)", README.read_text())
    links += re.findall(r'src="([^"]+)"', README.read_text())
    assert links
    for link in links:
        assert (README.parent / link).exists(), link

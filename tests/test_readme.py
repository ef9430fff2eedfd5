"""The README's Python runs."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_code_in_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        names = {}
        exec(compile(block, str(README), "exec"), names)
        # An example whose images all come back as they were shows nothing.
        made = [v for v in names.values() if hasattr(v, "fallbacks") and not isinstance(v, type)]
        assert all(value.fallbacks == 0 for value in made)


def test_every_link_to_a_file_leads_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)", README.read_text())
    links += re.findall(r'src="([^"]+)"', README.read_text())
    assert links
    for link in links:
        assert (README.parent / link).exists(), link

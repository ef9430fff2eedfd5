"""The documentation: its Python runs, its commands exist, its tables are good, and all links."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("checkpoints", "examples", ".github")
OTHERS = [*ROOT.glob("*.md"), *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.md"))]
MOST_WORDS = {"api.md": 30}  # of a sentence; else 25
BLOCKS = [
    pytest.param(page, block, id=f"{page.relative_to(ROOT)}:{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


def commands(page):
    """Lines of its shell blocks that call us, joined where they go on."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("latent-aug")]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile asks for it
@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_the_code_runs(page, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "block"}
    exec(compile(block, str(page), "exec"), names)
    # An example whose images all come back as they were shows nothing, unless it says so.
    made = [v for v in names.values() if hasattr(v, "fallbacks") and not isinstance(v, type)]
    assert "fallbacks ==" in block or all(value.fallbacks == 0 for value in made)


@pytest.mark.parametrize(
    "page", sorted({*PAGES, *OTHERS}), ids=lambda page: str(page.relative_to(ROOT))
)
def test_every_link_to_a_file_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\((?!http)([^)#]+)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize(
    "page",
    sorted({*(ROOT / "docs").glob("*.md")} - {ROOT / "docs" / "api.md"}),
    ids=lambda p: p.stem,
)
def test_every_page_has_a_picture(page):
    assert re.search(r"!\[[^\]]+\]\(pictures/", page.read_text())


def read_sentences(text):
    """The sentences of a page, without code, tables, headings and addresses of links."""
    text = re.sub(r"```.*?```|<!--.*?-->", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"`[^`]*`", "code", text)
    lines = [line for line in text.split("\n") if not line.startswith(("|", "    ", "<", "#"))]
    text = re.sub(r"^ *([-*]|\d+\.) ", r"\n\n", "\n".join(lines), flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    return [s for part in paragraphs for s in re.split(r"(?<=[.!?:])\*{0,2} (?=\S)", part)]


@pytest.mark.parametrize(
    "page", sorted({*PAGES, *OTHERS}), ids=lambda page: str(page.relative_to(ROOT))
)
def test_sentences_are_short(page):
    for sentence in read_sentences(page.read_text()):
        assert ";" not in sentence, sentence
        assert len(sentence.split()) <= MOST_WORDS.get(page.name, 25), sentence


@pytest.mark.parametrize(
    "page",
    sorted({*PAGES, *OTHERS} - {ROOT / "docs" / "api.md"}),
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_a_sentence_stands_before_every_table(page):
    text = re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(), flags=re.DOTALL)
    for line in re.findall(r"([^\n]*)\n\s*\n\|[^\n]*\n\| ?---", text):
        assert re.match(r"[^#|!]", line), line


def test_the_readme_is_read_in_minutes():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)|<[^>]*>", "", text, flags=re.DOTALL)
    assert len(re.findall(r"\d+(?:[.,]\d+)*", prose)) <= 44  # numbers tire


def test_the_commands_know_their_options():
    typer = pytest.importorskip("typer")
    from latent_aug.cli import app

    known = typer.main.get_command(app).commands
    found = [command for page in PAGES for command in commands(page)]
    assert len(found) > 5
    for name, *arguments in found:
        options = {o for p in known[name].params for o in (*p.opts, *p.secondary_opts)}
        assert {a for a in arguments if a.startswith("-")} <= options, (name, arguments)


def test_a_laplace_perturbation_has_its_standard_deviation():
    """That of docs/extend.md."""
    block = next(p.values[1] for p in BLOCKS if "class LaplacePerturb" in p.values[1])
    names = {"__name__": "block"}
    exec(block, names)
    noise = names["perturb"].noise(torch.randn(64, 3, 64, 64), 0.2, None)
    assert noise.std().item() == pytest.approx(0.2, rel=0.02)
    assert (noise.abs().mean() / noise.std()).item() == pytest.approx(0.5**0.5, rel=0.02)


def test_the_tables_of_scale_are_drawn_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    import scale
    from measurements import read_measurement

    text = scale.PAGE.read_text()
    drawn = scale.tables(read_measurement("scale"))
    assert len(drawn) > 5
    for name, table in drawn.items():
        assert f"<!-- {scale.MARK}: {name} -->\n\n{table}\n\n<!-- until here -->" in text


@pytest.mark.parametrize("device", ["cpu", "cpu, AVX2", "NVIDIA H200"])
def test_the_tables_of_speed_are_those_of_the_results(monkeypatch, capsys, device):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    import speed

    speed.table(speed.RESULTS, device)
    drawn = capsys.readouterr().out.split("\n")
    assert len(drawn) > 5
    assert set(filter(None, drawn)) <= set((ROOT / "docs" / "speed.md").read_text().split("\n"))


def test_the_table_of_the_flows_choice_is_that_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "flows"))
    import choose

    # flows that were judged without classifiers have empty cells, and a table of their own
    drawn = [line.replace(" |  |  |", " |") for line in choose.table().split("\n")]
    text = (ROOT / "checkpoints" / "README.md").read_text().split("\n")
    if choose.RESULTS.exists():  # nothing is judged until then
        assert len(drawn) > 10
        assert set(filter(None, drawn)) <= set(text)


def test_the_reference_is_that_of_the_docstrings():
    """Else run .ci/reference.py."""
    script = runpy.run_path(str(ROOT / ".ci" / "reference.py"))
    assert script["PAGE"].read_text(encoding="utf-8") == script["write_page"]()


def test_every_link_into_the_reference_has_its_anchor():
    text = (ROOT / "docs" / "api.md").read_text()
    links = {a for page in PAGES for a in re.findall(r"api\.md#([\w.]+)", page.read_text())}
    assert len(links) > 2
    assert links <= set(re.findall(r'<a id="([\w.]+)">', text))


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ROOT / ".ci/mkdocs.yml"]
    done = subprocess.run(
        [*map(str, command), "--site-dir", str(tmp_path / "site")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api.html").read_text()
    for name in ("LatentPerturb", "LatentAdversarial", "load_flow", "train_flow", "preview"):
        assert f'id="latent_aug.{name}"' in page
    # Nothing of it is fetched from elsewhere.
    outside = r'(?:<link[^>]+rel="stylesheet"[^>]+href|<(?:script|img)[^>]+src)="https?:'
    assert not re.search(outside, page)

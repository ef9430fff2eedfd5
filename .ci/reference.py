"""Write docs/api.md from the docstrings, as Markdown that reads in the repository and on the site.

python .ci/reference.py    # a test compares the page with what this makes
"""

import inspect
import re
from pathlib import Path
from pkgutil import resolve_name
from textwrap import dedent
from typing import Any

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Example):\n", re.MULTILINE)
LAYOUT = """\
# Reference

<!-- Written by `python .ci/reference.py` from the docstrings: edit those. -->

Every public name, with its signature, arguments, errors and an example that the tests run. The command line describes
itself: `latent-aug --help`.

## Transforms
- LatentPerturb: noise make_params transform to_latents from_latents eps p fallbacks flow with_eps
- LatentAdversarial: step __call__ consistency eps alpha p share fallbacks flow with_eps
- LatentSchedule: epoch current set_epoch step fallbacks
## Data
- LatentCollate: __call__
- LatentLoader: set_epoch
- LatentCache
## Flows
- load_flow
- Flow: encode decode log_prob bits_per_dim sample device split_levels join_levels config from_config save_pretrained push_to_hub
- Glow: initialize decode compile_single_images
- flows.ConditionalDenseFlow
## Training and looking
- train_flow TrainConfig augment_images AugmentConfig export.copies.AugmentReport check_flow
- diagnostics.check.FlowCheck: grade fits problems remarks
- diagnostics.measure.measure_flow preview
## Pure functions
- functional.perturb_latent functional.noise_of_norm functional.project functional.random_start functional.ascent_step functional.away_from_origin functional.clip_change functional.unit functional.l2_norm
"""  # noqa: E501


def write_signature(name: str, thing: Any) -> str:
    """Write how a thing is called, on one line where it fits, with annotations as in the source."""
    if isinstance(thing, property):
        return f"{name}: {thing.fget.__annotations__['return']}"
    function = thing.__init__ if inspect.isclass(thing) else thing
    unsaid = ("self", "args", "kwargs")  # the latter are nn.Module's
    parameters = [p for n, p in inspect.signature(function).parameters.items() if n not in unsaid]
    starred = next((i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), None)
    parts = [re.sub(": ['\"](.*?)['\"]( = |$)", r": \1\2", str(p)) for p in parameters]
    parts = [re.sub(r"<function (\w+) .*>", r"\1", part) for part in parts]
    if starred is not None:
        parts.insert(starred, "*")
    result = "" if inspect.isclass(thing) else f" -> {function.__annotations__['return']}"
    line = f"{name}({', '.join(parts)}){result}"
    lines = "".join(f"    {part},\n" for part in parts)
    return line if len(line) <= 88 else f"{name}(\n{lines}){result}"


def write_paragraphs(text: str) -> str:
    """Write each paragraph on one line, so that no line begins with a sign of Markdown."""
    return "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip()))


def write_docstring(thing: Any) -> str:
    """Write a docstring of Google's style as Markdown."""
    text, *sections = SECTION.split(inspect.getdoc(thing) or "")
    pages = [write_paragraphs(text)]
    for name, section in zip(sections[::2], sections[1::2], strict=True):
        indented = re.match(r"(?: .*\n?|\n)*", section)[0]  # type: ignore[index]
        body = dedent(indented).strip()
        if name == "Example":
            body = f"\n\n```pycon\n{body}\n```"
        elif name == "Returns":
            body = " " + write_paragraphs(body)
        else:
            items = [write_paragraphs(item) for item in re.split(r"\n(?=\S)", body)]
            body = "\n\n" + "\n".join(re.sub(r"^(.+?): ", r"- `\1`: ", item) for item in items)
        pages += [f"**{name}**{body}", write_paragraphs(section.removeprefix(indented))]
    return "\n\n".join(filter(None, pages))


def write_entries(line: re.Match[str]) -> str:
    """Write anchor, heading, signature and docstring of names, or of a name and its members."""
    names, members = line[1].split(), (line[2] or "").split()
    text = ""
    for name in names + [f"{names[0]}.{member}" for member in members]:
        thing, short = resolve_name(f"latent_aug.{name}"), name.split(".")[-1]
        heading = f"### `{name}`" if name in names else f"#### `{short}`"
        code = f"```py\n{write_signature(short, thing)}\n```\n\n{write_docstring(thing)}"
        text += f'\n<a id="latent_aug.{name}"></a>\n\n{heading}\n\n{code}\n'
    return text


def write_page() -> str:
    """Write the whole page."""
    page = re.sub(r"^- ([^:\n]+)(?::(.*))?\n", write_entries, LAYOUT, flags=re.MULTILINE)
    return re.sub(r"\n(##+ )", r"\n\n\1", page).replace("\n\n\n", "\n\n")


if __name__ == "__main__":
    PAGE.write_text(write_page(), encoding="utf-8")

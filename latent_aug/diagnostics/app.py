"""The page of `latent-aug explore`: Gradio shows on this machine what `explore` computes."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

# Before the import, which reads them: nothing is sent anywhere, nothing is kept in the browser.
os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["GRADIO_RUN_HISTORY"] = "False"

try:
    import gradio as gr
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("the explorer needs Gradio: pip install 'latent-aug[app]'") from error

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from latent_aug.diagnostics import explore as ex
from latent_aug.images.conversion import from_float

HOST = "127.0.0.1"
AMPLIFY = 4
STRIP = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the slider's range
START = {"linf": 0.25, "rms": 0.25, "l2": 10.0}
ATTACK = {"linf": (0.1, 0.05), "rms": (0.02, 0.01), "l2": (1.0, 0.5)}  # eps and alpha
COPY = "code => { navigator.clipboard.writeText(code) }"
BOX = {"left": 0.25, "top": 0.25, "right": 0.75, "bottom": 0.75}
DELETE = (60, 600)  # uploads: look every minute, delete after ten
LIVE: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last"}
CSS = """
.pictures {display: flex; flex-wrap: wrap; gap: 12px}
.pictures figure {margin: 0; flex: 1 1 0; min-width: 72px; max-width: 300px}
.pictures img {width: 100%; image-rendering: pixelated; border-radius: 4px}
.pictures figcaption {font-size: 0.85em; line-height: 1.3}
.about {font-size: 0.9em}
#examples .grid-container {
  grid-template-columns: repeat(4, minmax(0, 1fr)) !important; grid-auto-rows: auto !important}
#examples .grid-container button {aspect-ratio: 1; height: auto !important}
"""


def write_figure(x: Tensor, caption: str) -> str:
    """Write an image (1, C, H, W) as HTML, with its caption below."""
    data = io.BytesIO()
    to_pil_image(from_float(x[0], torch.uint8)).save(data, "PNG", compress_level=1)
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    words = html.escape(caption)
    return f'<figure><img alt="{words}" src="{source}"><figcaption>{words}</figcaption></figure>'


def write_figures(*shown: tuple[Tensor, str]) -> str:
    """Write images and captions as HTML, side by side."""
    figures = "".join(write_figure(x, caption) for x, caption in shown)
    return f'<div class="pictures">{figures}</div>'


def amplify_difference(a: Tensor, b: Tensor) -> Tensor:
    """Amplify the difference of two images, on grey."""
    return ((b - a) * AMPLIFY + 0.5).clamp(0, 1)


def read_settings(
    eps: float, norm: str, level: str, where: str, left: float, top: float, right: float,
    bottom: float, seed: float,
) -> ex.Settings:  # fmt: skip
    """Read the settings from the values of the controls."""
    chosen = None if level == "all" else int(level.split()[0])
    box = (left, top, right, bottom)
    return ex.Settings(eps, norm, chosen, where, box, int(seed))  # type: ignore[arg-type]


def show_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function show its errors as messages on the page."""

    @wraps(function)  # Gradio reads the annotations: of an event, say
    def wrapped(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except (ValueError, TypeError, OSError) as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    return wrapped


def require_subject(subject: ex.Subject | None) -> ex.Subject:
    """Refuse to go on without an image."""
    if subject is None:
        raise ValueError("choose an image first")
    return subject


def show(subject: ex.Subject | None, *controls: Any) -> str:
    """Show an image, the perturbed one and their difference."""
    subject, settings = require_subject(subject), read_settings(*controls)
    perturbed, fell_back = ex.perturb_subject(subject, settings)
    change = 255 * (perturbed - subject.x).abs().mean().item()
    note = f"{settings.norm} {settings.eps:.3g}: pixels change by {change:.1f} of 255 on average"
    if fell_back:
        note = "the flow cannot perturb this image: it comes back as it was"
    return write_figures(
        (subject.x, "original"),
        (perturbed, note),
        (amplify_difference(subject.x, perturbed), f"difference, {AMPLIFY} times"),
    )


def show_strip(subject: ex.Subject | None, eps: float, norm: str, *controls: Any) -> str:
    """Show the same draws at several eps."""
    if subject is None:
        return ""
    sizes = [share * ex.GREATEST_EPS[norm] for share in STRIP]
    each = [ex.perturb_subject(subject, read_settings(size, norm, *controls)).x for size in sizes]
    return write_figures(*((x, f"{norm} {size:.3g}") for x, size in zip(each, sizes, strict=True)))


def show_samples(flow: str, seed: float) -> str:
    """Show rows of samples, a column for each temperature."""
    drawn = ex.sample_at_temperatures(ex.get_flow(flow), count=4, seed=int(seed))
    columns = [torch.cat(list(column), dim=1)[None] for column in drawn]
    captions = [f"temperature {t:g}" for t in ex.TEMPERATURES]
    return write_figures(*zip(columns, captions, strict=True))


def show_attack(
    subject: ex.Subject | None, eps: float, alpha: float, steps: float, norm: str, level: str,
    *region: Any,
) -> Iterator[tuple[str, dict[str, float]]]:  # fmt: skip
    """Show images, losses and probabilities, one more step at a time."""
    shown: list[tuple[Tensor, str]] = []
    try:
        subject, settings = require_subject(subject), read_settings(eps, norm, level, *region)
        for step in ex.attack_subject(subject, settings, alpha=alpha, steps=int(steps)):
            best = int(step.probabilities.argmax())
            share = f"{ex.CLASSES[best]} {step.probabilities[best]:.0%}"
            name = f"step {step.number}" if step.number else name_original(subject)
            shown.append((step.x, f"{name}: loss {step.loss:.2f}, {share}"))
            change = amplify_difference(subject.x, step.x), f"difference, {AMPLIFY} times"
            label = dict(zip(ex.CLASSES, step.probabilities.tolist(), strict=True))
            yield write_figures(*shown, change), label
    except ValueError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from error


def name_original(subject: ex.Subject) -> str:
    """Name the original image, by its class where that is known."""
    return "original" if subject.label is None else f"original ({ex.CLASSES[subject.label]})"


def list_levels(flow: str) -> list[str]:
    """List the choices of a level."""
    count = ex.get_flow(flow).levels
    ends = {0: " (finest)", count - 1: " (coarsest)"} if count > 1 else {}
    return ["all", *(f"{level}{ends.get(level, '')}" for level in range(count))]


def read_resolution(choice: str) -> int | None:
    """Read the resolution from the value of its control."""
    return None if choice == "none" else int(choice)


def encode_again(subject: ex.Subject | None, resolution: str) -> Any:
    """Encode the same image by another copy."""
    if subject is None:
        return gr.skip()
    return ex.make_subject(subject.flow, subject.x, subject.label, read_resolution(resolution))


def open_flow(flow: str, resolution: str) -> tuple[Any, ...]:
    """Open a flow: its examples, the first of them, and its levels."""
    images, labels = ex.make_examples(ex.get_flow(flow))
    items = [to_pil_image(from_float(x, torch.uint8)) for x in images]
    subject = ex.make_subject(flow, images[:1], labels[0], read_resolution(resolution))
    gallery = gr.Gallery(items, selected_index=None)
    return gallery, subject, gr.Radio(choices=list_levels(flow), value="all")


def choose(flow: str, resolution: str, event: gr.SelectData) -> ex.Subject:
    """Choose the example that was clicked."""
    images, labels = ex.make_examples(ex.get_flow(flow))
    x, label = images[event.index][None], labels[event.index]
    return ex.make_subject(flow, x, label, read_resolution(resolution))


def upload(flow: str, path: str | None, side: float, resolution: str) -> Any:
    """Read the file of the user, if there is one."""
    if path is None:
        return gr.skip()
    x = ex.read_upload(path, ex.get_flow(flow).channels, int(side))
    return ex.make_subject(flow, x, resolution=read_resolution(resolution))


def write_random(subject: ex.Subject | None, *controls: Any) -> str:
    """Write the random perturbation as code."""
    return ex.write_code(require_subject(subject), read_settings(*controls))


def write_attack(
    subject: ex.Subject | None, eps: float, alpha: float, steps: float, *controls: Any
) -> str:
    """Write the attack as code."""
    settings = read_settings(eps, *controls)
    return ex.write_code(require_subject(subject), settings, alpha=alpha, steps=int(steps))


def make_page(flows: Sequence[str]) -> gr.Blocks:
    """Make the page: images on the left, perturbations on the right, pictures below them."""
    with gr.Blocks(analytics_enabled=False, title="latent-aug explore", delete_cache=DELETE) as app:
        gr.Markdown(
            "# latent-aug explore\nWhat a perturbation in a flow's latent does to an image."
        )
        subject = gr.State(None)
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                flow, gallery, file, side, resolution = make_choices(flows)
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    norm = gr.Radio(list(ex.GREATEST_EPS), value="linf", label="norm")
                    level = gr.Radio(["all"], value="all", label="level of the flow")
                    seed = gr.Slider(0, 20, 0, step=1, label="seed")
                with gr.Accordion("region", open=False), gr.Row():
                    places = ["everywhere", "inside", "outside"]
                    where = gr.Radio(places, value="everywhere", label="of the box")
                    box = [
                        gr.Slider(0, 1, value, step=0.05, label=name, min_width=150)
                        for name, value in BOX.items()
                    ]
                with gr.Tab("random"):
                    eps = gr.Slider(0, 1, 0.25, step=0.01, label="eps", elem_id="eps")
                    three, row = gr.HTML(elem_id="three"), gr.HTML(elem_id="strip")
                    copy = make_copy("copy-random")
                with gr.Tab("adversarial"):
                    size, alpha, steps, go, path, verdict = make_attack()
                    copy_attack = make_copy("copy-attack")
                with gr.Tab("samples"):
                    drawn = gr.HTML(elem_id="samples")

        region = [where, *box, seed]
        controls = [eps, norm, level, *region]
        each = [control.change for control in (subject, *controls)]
        gr.on(each, show_errors(show), [subject, *controls], three, api_name="show", **LIVE)
        others = [control.change for control in (subject, norm, level, *region)]
        gr.on(others, show_errors(show_strip), [subject, *controls], row, api_name="strip", **LIVE)
        opened = [gallery, subject, level]
        begin = [app.load, flow.change]
        gr.on(begin, show_errors(open_flow), [flow, resolution], opened, api_name="open", **LIVE)
        begin = [app.load, flow.change, seed.change]
        gr.on(begin, show_errors(show_samples), [flow, seed], drawn, api_name="samples", **LIVE)
        given = [file.upload, side.release]
        uploaded = [flow, file, side, resolution]
        gr.on(given, show_errors(upload), uploaded, subject, api_name="upload", **LIVE)
        gallery.select(show_errors(choose), [flow, resolution], subject, api_visibility="private")
        again = [subject, resolution]
        resolution.change(show_errors(encode_again), again, subject, api_name="encode")
        norm.change(rescale, norm, [eps, size, alpha], api_visibility="private")
        attacked = [subject, size, alpha, steps, norm, level, *region]
        go.click(show_attack, attacked, [path, verdict], api_name="attack")
        for (button, code), write, given, name in (
            (copy, write_random, [subject, *controls], "code"),
            (copy_attack, write_attack, attacked, "attack_code"),
        ):
            written = button.click(show_errors(write), given, code, api_name=name)
            written.then(None, code, None, js=COPY)
    return app


def make_choices(flows: Sequence[str]) -> tuple[Any, ...]:
    """Make the controls that choose a flow and an image."""
    flow = gr.Dropdown(list(flows), value=flows[0], label="flow")
    gallery = gr.Gallery(
        show_label=False, columns=4, height=220, allow_preview=False, buttons=[], elem_id="examples"
    )
    file = gr.File(
        label=f"or an image of yours, up to {ex.MOST_BYTES // 2**20} MiB",
        height=150,
        file_types=["image"],
        elem_id="upload",
    )
    side = gr.Slider(*ex.SIDES, ex.SIDES[1], step=4, label="cropped and resized to this side")
    resolution = gr.Radio(
        ["32", "64", "none"],
        value="32",
        label="resolution",
        info="The flow perturbs a copy of this many pixels. The difference is added.",
        elem_id="resolution",
    )
    return flow, gallery, file, side, resolution


def make_copy(name: str) -> tuple[gr.Button, gr.Code]:
    """Make the button that copies the settings as code, and the code."""
    return gr.Button("copy as code", elem_id=name), gr.Code(language="python", label="copied")


def make_attack() -> tuple[Any, ...]:
    """Make the controls and the pictures of the attack."""
    size, alpha = ATTACK["linf"]
    with gr.Row():
        controls = [
            gr.Slider(0, 8 * size, size, step=size / 10, label="eps"),
            gr.Slider(0, 8 * size, alpha, step=size / 10, label="alpha"),
            gr.Slider(1, 8, 3, step=1, label="steps"),
        ]
    gr.Markdown(ex.load_clothes().about, elem_classes="about")
    go = gr.Button("attack", variant="primary", elem_id="attack")
    path = gr.HTML(elem_id="path")
    verdict = gr.Label(label="the classifier says", num_top_classes=4)
    return *controls, go, path, verdict


def rescale(norm: str) -> tuple[Any, ...]:
    """Set the ranges of eps and alpha for a norm."""
    greatest = ex.GREATEST_EPS[norm]
    size, alpha = ATTACK[norm]
    return (
        gr.Slider(maximum=greatest, step=greatest / 100, value=START[norm]),
        gr.Slider(maximum=8 * size, step=size / 10, value=size),
        gr.Slider(maximum=8 * size, step=size / 10, value=alpha),
    )


def serve(flows: Sequence[str], *, port: int | None, browser: bool) -> tuple[gr.Blocks, str]:
    """Show the page on this machine, and only there.

    Args:
        flows: The names and paths to choose from.
        port: The port of the page. None takes the first free one from 7860 on.
        browser: Whether to open the page in a browser.

    Returns:
        The page, which `block_thread` keeps until it is interrupted, and its address.
    """
    for flow in flows:
        ex.get_flow(flow)  # an error now rather than on the page
    app = make_page(flows)
    _, address, _ = app.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        inbrowser=browser,
        prevent_thread_lock=True,
        quiet=True,
        max_file_size=ex.MOST_BYTES,
        ssr_mode=False,
        footer_links=[],
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=CSS,
    )
    return app, address

"""The page itself, and the same as an API."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from epsanet.data.images import ImageError
from epsanet.insight.figures import cam_overlay, share_norm
from epsanet.insight.scales import ModuleScales, same_scales
from epsanet.web.models import ServedDetector, ServedModel
from epsanet.web.uploads import MAX_BYTES, Room, check_upload

__all__ = ["QUEUED", "STYLE", "THEME", "build_page"]

QUEUED = 32
"""Requests that wait; further ones are refused at once."""
_TOPK = 5
_NETWORK = "network"
"""The queue that all events share, so that one picture is worked on at a time."""

THEME = gr.themes.Soft(
    primary_hue="teal",
    font=["system-ui", "sans-serif"],  # Gradio's own would be fetched from Google
    font_mono=["ui-monospace", "monospace"],
)
STYLE = """
.gradio-container { max-width: 1080px !important; margin: auto; }
#picture img, #cam img, #drawn img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated; }
.title h1 { margin: 0.2em 0 0; }
.title p, .describes { color: var(--body-text-color-subdued); margin: 0.1em 0 0.4em; }
.gradio-container:has(.refused) #picture img { visibility: hidden; } /* which browsers show as a broken one */
.refused { border-left: 4px solid #c2410c; padding: 0.6em 0.9em; background: var(--block-background-fill); }
.scales { display: flex; flex-wrap: wrap; gap: 1em; }
.scales table, .scales tr, .scales th { border: none !important; }
.scales table { border-collapse: collapse; flex: 1 1 280px; font-variant-numeric: tabular-nums; font-size: 0.9em; }
.scales caption { text-align: left; padding: 0.3em 0; color: var(--body-text-color); }
.scales th { font-weight: 500; padding: 0.25em 0.4em; color: var(--body-text-color); text-align: center; }
.scales tbody th { text-align: left; }
.scales td { text-align: center; padding: 0.3em 0.2em; border: 1px solid var(--border-color-primary); }
@media (max-width: 640px) { .gallery-item, .gallery-item img { width: 52px !important; height: 52px !important; } }
footer { display: none !important; }
"""


def build_page(models: dict[str, ServedModel], examples: Sequence[Path], room: Room) -> gr.Blocks:
    """The page of some models.

    Args:
        models: by name; the first is chosen.
        examples: pictures to try.
        room: holds what visitors send.
    """
    page = _Page(models, room)
    names = list(models)
    first = models[names[0]]
    with gr.Blocks(title="epsanet", analytics_enabled=False) as blocks:
        gr.HTML(
            "<h1>epsanet</h1><p>Give it a picture. It stays on the machine that shows this page.</p>",
            elem_classes="title",
        )
        with gr.Row(equal_height=False):
            with gr.Column(min_width=300):
                model = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1, elem_id="model")
                about = gr.HTML(page.about(names[0]))
                image = _upload(room)
                score = gr.Slider(
                    0.05, 1, value=0.5, step=0.05, label="Least score", elem_id="score", visible=_detects(first)
                )
                if examples:
                    gr.Examples(
                        [[str(path)] for path in examples], [image], api_visibility="private", label="Pictures to try"
                    )
            with gr.Column(min_width=300, scale=2):
                refusal = gr.HTML(visible=False, elem_id="refusal")
                drawn = _output("What it finds", "drawn", visible=_detects(first))
                found = gr.HTML(visible=False, elem_id="found")
                label = gr.Label(
                    label="What it is", num_top_classes=_TOPK, visible=not _detects(first), elem_id="classes"
                )
                cam = _output("Where it looks: Grad-CAM", "cam", visible=False)
                scales = gr.HTML(visible=False, elem_id="scales")
        shown = [refusal, drawn, found, label, cam, scales]
        given = [image, model, score]
        image.change(
            page.show, given, shown, api_visibility="private", trigger_mode="always_last", concurrency_id=_NETWORK
        )
        score.change(
            page.show, given, shown, api_visibility="private", trigger_mode="always_last", concurrency_id=_NETWORK
        )
        chosen = model.change(page.choose, model, [about, score], api_visibility="private", concurrency_limit=None)
        chosen.then(
            page.show, given, shown, api_visibility="private", trigger_mode="always_last", concurrency_id=_NETWORK
        )
        _add_api(page, image, model, score)
    blocks.queue(max_size=QUEUED, default_concurrency_limit=1, api_open=False)
    return blocks


def _detects(model: ServedModel) -> bool:
    return isinstance(model, ServedDetector)


def _upload(room: Room) -> gr.Image:
    image = gr.Image(
        label="Picture",
        type="filepath",
        sources=["upload", "clipboard"],
        height=300,
        elem_id="picture",
        buttons=["fullscreen"],
        placeholder=f"Drop a JPEG, PNG or WebP here, up to {MAX_BYTES // 2**20} MB",
    )

    def preprocess(payload: Any) -> str | None:
        """Gradio would open the file in any of Pillow's formats, before it can be looked at."""
        if payload is None or payload.path is None:
            return None
        if not room.holds(payload.path):
            raise gr.Error(
                "This file was not uploaded here, or has been deleted; upload it again.", print_exception=False
            )
        return str(payload.path)

    image.preprocess = preprocess  # type: ignore[method-assign]
    return image


def _output(label: str, name: str, *, visible: bool) -> gr.Image:
    buttons: list[Any] = ["download", "fullscreen"]  # Gradio's third one would send the picture elsewhere
    return gr.Image(
        label=label, format="png", interactive=False, height=420, visible=visible, elem_id=name, buttons=buttons
    )


def _add_api(page: _Page, image: gr.Image, model: gr.Dropdown, score: gr.Slider) -> None:
    """Three functions for programs; what they take is what the page has, what they give is not shown."""
    data, picture = gr.JSON(visible=False), gr.Image(visible=False, format="png")
    hidden = gr.Button(visible=False)
    hidden.click(page.predict, [image, model, score], data, api_name="predict", concurrency_id=_NETWORK)
    hidden.click(page.picture, [image, model, score], picture, api_name="picture", concurrency_id=_NETWORK)
    hidden.click(page.scales, [image, model], data, api_name="scales", concurrency_id=_NETWORK)


class _Page:
    """What happens when somebody does something."""

    def __init__(self, models: dict[str, ServedModel], room: Room) -> None:
        self.models, self.room = models, room

    def about(self, name: str) -> str:
        return f'<p class="describes">{html.escape(self.models[name].description)}</p>'

    def choose(self, name: str) -> tuple[Any, Any]:
        return self.about(name), gr.update(visible=_detects(self.models[name]))

    def show(self, path: str | None, name: str, score: float) -> Iterator[tuple[Any, ...]]:
        """Values of refusal, drawn, found, label, cam and scales; of a classifier first the classes, then the rest."""
        model = self.models[name]
        detector = isinstance(model, ServedDetector)
        nothing = (
            gr.update(visible=False),
            gr.update(value=None, visible=detector),
            gr.update(visible=False),
            gr.update(value=None, visible=not detector),
            gr.update(value=None, visible=False),
            gr.update(visible=False),
        )
        if path is None:
            yield nothing
            return
        try:
            check_upload(Path(path))
            if isinstance(model, ServedDetector):
                found = model.detect(Path(path), score)
                counted = gr.update(value=_counted(found.classes), visible=True)
                yield nothing[0], gr.update(value=model.draw(found), visible=True), counted, *nothing[3:]
                return
            classes = gr.update(value=dict(model.classify(Path(path))), visible=True)
            yield *nothing[:3], classes, gr.skip(), gr.skip()
            explained = model.explain(Path(path))
        except ImageError as error:
            text = f'<div class="refused" role="alert">This picture cannot be used: {html.escape(str(error))}.</div>'
            yield gr.update(value=text, visible=True), *nothing[1:]
            return
        if explained is None or explained.picture is None or explained.cam is None:
            yield *nothing[:3], classes, *nothing[4:]
            return
        overlay = gr.update(value=cam_overlay(explained.picture, explained.cam), visible=True)
        yield *nothing[:3], classes, overlay, gr.update(value=_scale_tables(explained.scales), visible=True)

    def predict(self, image: str | None, model: str, score: float = 0.5) -> dict[str, Any]:
        """Classes with probabilities, or objects with scores and boxes ``x0, y0, x1, y1`` in pixels."""
        served, path = self.models[model], self._checked(image)
        try:
            if isinstance(served, ServedDetector):
                found = served.detect(path, score)
                rows = zip(found.classes, found.scores, found.boxes, strict=True)
                objects = [{"class": name, "score": value, "box": list(box)} for name, value, box in rows]
                return {"model": model, "width": found.width, "height": found.height, "objects": objects}
            best = served.classify(path)[:_TOPK]
            return {"model": model, "classes": [{"class": name, "probability": value} for name, value in best]}
        except ImageError as error:
            raise _refused(error) from error

    def picture(self, image: str | None, model: str, score: float = 0.5) -> Any:
        """Grad-CAM over the picture, or the picture with what was found."""
        served, path = self.models[model], self._checked(image)
        try:
            if isinstance(served, ServedDetector):
                return served.draw(served.detect(path, score))
            explained = served.explain(path)
        except ImageError as error:
            raise _refused(error) from error
        if explained is None or explained.picture is None or explained.cam is None:
            raise gr.Error(
                f"Grad-CAM needs layers of convolutions, and {model} shows none; choose another model, or serve the "
                "folder that a bundle was made from",
                print_exception=False,
            )
        return cam_overlay(explained.picture, explained.cam)

    def scales(self, image: str | None, model: str) -> list[dict[str, Any]]:
        """For each block the share of attention and of energy by kernel size."""
        served, path = self.models[model], self._checked(image)
        try:
            explained = None if isinstance(served, ServedDetector) else served.explain(path)
        except ImageError as error:
            raise _refused(error) from error
        return [
            {
                "block": module.name.removesuffix(".conv2"),
                "kernel_sizes": list(module.kernel_sizes),
                "attention": module.attention_NS[0].tolist(),
                "energy": module.contribution_NS[0].tolist(),
            }
            for module in (explained.scales if explained else ())
        ]

    @staticmethod
    def _checked(image: str | None) -> Path:
        if image is None:
            raise gr.Error("there is no picture; give one", print_exception=False)
        try:
            check_upload(Path(image))
        except ImageError as error:
            raise _refused(error) from error
        return Path(image)


def _refused(error: ImageError) -> gr.Error:
    return gr.Error(f"this picture cannot be used: {error}", print_exception=False)


def _counted(classes: Sequence[str]) -> str:
    if not classes:
        return '<p class="describes">Nothing with this score.</p>'
    counts = {name: classes.count(name) for name in sorted(set(classes))}
    return f'<p class="describes">{html.escape(", ".join(f"{count} × {name}" for name, count in counts.items()))}</p>'


def _scale_tables(modules: Sequence[ModuleScales]) -> str:
    if not modules:
        return ""
    count, modules = len(modules), same_scales(modules)
    which = "each block listens" if len(modules) == count else f"{len(modules)} of {count} blocks listen"
    attention = np.concatenate([module.attention_NS for module in modules])
    energy = np.concatenate([module.contribution_NS for module in modules])
    return (
        '<div class="scales">'
        + _scale_table(f"Which scale {which} to", attention, modules)
        + _scale_table("Share of the output’s energy", energy, modules)
        + "</div>"
    )


def _scale_table(title: str, shares: np.ndarray, modules: Sequence[ModuleScales]) -> str:
    """Blocks down, kernels across; white is an equal share, red more, blue less."""
    places = np.asarray(share_norm(shares)(shares))
    head = "".join(f"<th>{size}×{size}</th>" for size in modules[0].kernel_sizes)
    rows = []
    for module, row, places_of_row in zip(modules, shares, places, strict=True):
        cells = "".join(_cell(share, place) for share, place in zip(row, places_of_row, strict=True))
        rows.append(f"<tr><th>{html.escape(module.name.removesuffix('.conv2'))}</th>{cells}</tr>")
    return (
        f"<table><caption>{title} (white: all alike)</caption><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _cell(share: float, place: float) -> str:
    colour = "#fff" if abs(place - 0.5) > 0.3 else "#111"
    return f'<td style="background:{to_hex(colormaps["RdBu_r"](place))};color:{colour}">{share:.1%}</td>'

"""What all pages share: style, frame, and images that are put into them."""

from __future__ import annotations

import base64
import html
import io
import platform

import torch
from PIL import Image

from sktransfer.io import check_images

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6474; --line: #dfe3ea; --paper: #fff;
        --card: #f6f8fb; --bar: #9cc3e6; --best: #0b62a4; --wrong: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #9aa5b5; --line: #333b48; --paper: #12161d; --card: #1b212b;
          --bar: #335a7d; --best: #6cb2f0; --wrong: #f2877f; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 0 auto;
       padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--paper); }
h1 { font-size: 1rem; font-weight: 500; color: var(--soft); margin: 0; }
h2 { font-size: 1.3rem; margin: 3rem 0 .5rem; } h3 { font-size: 1rem; margin: 1.8rem 0 .4rem; }
.headline { font-size: clamp(1.3rem, 4vw, 2rem); line-height: 1.25; font-weight: 650;
            margin: .4rem 0 .6rem; }
.headline em { font-style: normal; color: var(--best); }
p.note, figcaption, td small { color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; } a { color: var(--best); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { font-weight: 600; color: var(--soft); font-size: .88rem; }
tr.best td { font-weight: 650; } tr.published td { color: var(--soft); font-style: italic; }
tr.network td { padding-top: 1rem; font-weight: 600; border-bottom: 0; }
td.bars { width: 38%; min-width: 9rem; } th:nth-child(2) { text-align: left; }
.confusion thead th { text-align: center; }
.track { position: relative; height: 1.1rem; background: var(--card); }
.bar { position: absolute; inset: 0 auto 0 0; background: var(--bar); }
tr.best .bar { background: var(--best); }
.whisker { position: absolute; top: 50%; height: 2px; background: var(--ink); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
         gap: 1rem; margin-top: 1rem; }
figure { margin: 0; background: var(--card); padding: .8rem; border-radius: .4rem; }
figure svg { width: 100%; height: auto; color: var(--ink); }
.confusion td { text-align: center; } .confusion th[scope=row] { text-align: left; }
.thumbs { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr));
          gap: .8rem; }
.thumbs figure { padding: .4rem; font-size: .82rem; overflow-wrap: anywhere; }
.thumbs img { width: 100%; aspect-ratio: 1; object-fit: contain; display: block; }
.thumbs .wrong { color: var(--wrong); }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15.5rem), 1fr));
         gap: .8rem; }
.pairs > figure { font-size: .82rem; overflow-wrap: anywhere; }
.pairs .side { display: flex; gap: .5rem; } .pairs .side > div { flex: 1; min-width: 0; }
.pairs img, .pairs .none { width: 100%; aspect-ratio: 1; object-fit: contain; display: block; }
.pairs .none { background: var(--line); display: grid; place-items: center; }
.pairs .wrong { color: var(--wrong); } .pairs small { color: var(--soft); }
@media (max-width: 600px) {
  th, td { padding: .3rem .35rem; } td.bars { min-width: 4rem; }
  td:first-child, thead th:first-child { white-space: normal; } td:first-child { min-width: 7rem; }
}
"""


def whole_page(title: str, body: str, note: str = "") -> str:
    """Return a page of HTML, of which title, body and note are parts that are escaped already."""
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>"
        f"<header><h1>{title}</h1></header><main>{body}</main>"
        f'<footer><p class="note">{note} sktransfer on '
        f"{html.escape(machine)}.</p></footer></body></html>\n"
    )


def small_image(path: str) -> str:
    """Return an image as it is put into a page; nothing of one that can't be read."""
    try:
        pixels = check_images([path]).examine(0, lambda x: x.permute(1, 2, 0).numpy().copy())[0]
    except ValueError:
        return ""
    image = Image.fromarray(pixels)
    image.thumbnail((160, 160))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"

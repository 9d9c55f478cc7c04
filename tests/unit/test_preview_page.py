"""The preview's page shows tokens, weights, clips, boxes and packs as the model gets them, at any width."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image

from omniloom.tools.preview_page import write_page
from omniloom.tools.tiny import make_tiny
from tests.unit.media_files import tone, write_audio, write_video

VOID = {"meta", "img", "br", "link", "input"}


class Page(HTMLParser):
    """Elements of a page as (tag, attributes, text), and whether every tag is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append([tag, dict(attrs), ""])
        if tag not in VOID:
            self.open.append((tag, self.elements[-1]))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, f"</{tag}> at line {self.getpos()[0]}"

    def handle_data(self, data):
        if self.open:
            self.open[-1][1][2] += data

    def all(self, tag, kind=None):
        return [e for e in self.elements if e[0] == tag and (kind is None or kind in e[1].get("class", "").split())]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    make_tiny("qwen3_omni", folder / "model")
    Image.new("RGB", (200, 100), (200, 30, 30)).save(folder / "a.png")
    write_audio(folder / "s.wav", "pcm_s16le", 16000, tone(16000, 16000))
    write_video(folder / "v.mp4", num_frames=20, fps=10, sound=tone(88200, 44100))
    objects = {"ref": ["<b>disc</b>"], "bbox": [[50, 25, 150, 100]]}
    rows = [
        {"query": "<image>Where?", "response": "<bbox> <ref-object>", "images": ["a.png"], "objects": objects},
        {"query": "<audio>猫🐈?", "response": "a tone", "audios": ["s.wav"]},
        {"query": "<video>?", "response": "r", "videos": ["v.mp4"], "use_audio_in_video": True},
        {"query": "<image>no file", "response": "r", "images": ["missing.png"]},
        *({"query": "q " * n, "response": "r"} for n in range(12)),
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = [f"model.path={folder / 'model'}", f"data.train={folder / 'rows.jsonl'}", "data.pack_tokens=400"]
    limits = ["data.workers=0", "data.max_bad_fraction=1", "data.image.max_pixels=20000", "data.video.max_pixels=4096"]
    write_page([*own, *limits, "train.packs_per_step=1"], folder / "page.html", 5)
    return folder / "page.html"


def test_the_page_is_whole_and_needs_no_other_file(page) -> None:
    text = page.read_text()
    found = Page(text)
    sources = [e[1]["src"] for e in found.elements if "src" in e[1]]
    assert sources
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r'(href|url)\s*[=(]\s*"?(https?:|/)', text)
    assert "<b>disc</b>" not in text, "what rows say is text, not markup"


def test_rows_are_shown_where_training_would_stop_for_them(page, tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"query": "<image>", "response": "r", "images": ["missing.png"]}\n')
    write_page(
        [f"model.path={page.parent / 'model'}", f"data.train={tmp_path}/rows.jsonl", "data.workers=0"],
        tmp_path / "p.html",
        1,
    )
    found = Page((tmp_path / "p.html").read_text())
    faults = [text for _, _, text in (*found.all("div", "fault"), *found.all("p", "fault"))]
    assert len(faults) == 2
    assert all("missing.png" in fault for fault in faults)


def test_tokens_are_coloured_by_weight_and_tell_their_place(page) -> None:
    rows = page.read_text().split('<section class="card row">')[1:]
    assert len(rows) == 5
    for row in rows[:3]:
        tokens = Page(row.split("</section>")[0].strip() or "<p></p>").all("i")
        num_loss = int(re.search(r"([\d,]+) with a loss", row)[1])
        assert sum("loss" in token[1].get("class", "") for token in tokens) == num_loss
        told = [re.match(r"token (\d+) · id \d+ · position \d+ \d+ \d+ · weight", t[1]["title"]) for t in tokens]
        places = [int(match[1]) for match in told]
        assert places == sorted(places)
    said = "".join(html.unescape(token[2]) for token in Page(rows[1].split("</section>")[0]).all("i"))
    assert "猫🐈?" in said
    trained = (token[2] for token in Page(rows[1].split("</section>")[0]).all("i", "loss"))
    assert re.fullmatch(r"a tone<\|im_end\|>\s*", "".join(trained))
    assert "missing.png does not exist" in rows[3]


def test_clips_stand_where_their_tokens_are_with_players_and_boxes(page) -> None:
    image, sound, video = page.read_text().split('<section class="card row">')[1:4]
    found = Page(image.split("</section>")[0])
    (box,) = found.all("span", "box")
    assert box[1]["style"] == "left:25.00%;top:25.00%;width:50.00%;height:75.00%"
    (clip,) = found.all("span", "clip")
    num_tokens = int(re.search(r"(\d+) tokens of image", image)[1])
    first, last = map(int, re.match(r"tokens (\d+) to (\d+)", clip[1]["title"]).groups())
    assert last - first + 1 == num_tokens
    assert (
        image.index("&lt;|vision_start|&gt;") < image.index('class="clip image"') < image.index("&lt;|vision_end|&gt;")
    )
    assert len(Page(sound.split("</section>")[0]).all("audio")) == 1
    assert len(Page(video.split("</section>")[0]).all("video")) == 1
    assert "tokens of video" in video


def test_packs_are_bars_of_their_fill(page) -> None:
    packs = page.read_text().split("<h2>Packs</h2>")[1].partition('<section class="card">')[2]
    found = Page(packs.split("</section>")[0])
    bars, fills = found.all("i"), [float(e[2].rstrip("%")) for e in found.all("span", "right")]
    widths = [float(re.match(r"width:([\d.]+)%", bar[1]["style"])[1]) for bar in bars]
    assert sum(widths) == pytest.approx(sum(fills), abs=0.1 * len(fills))
    assert len(bars) == 15
    assert all(0 < fill <= 100 for fill in fills)
    costs = [float(re.match(r"width:([\d.]+)%", e[1]["style"])[1]) for e in found.all("div", "cost")]
    assert max(costs) == 100


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [1280, 500])
def test_nothing_sticks_out_of_the_window_of_a_browser(page, tmp_path, width) -> None:
    """500 is the narrowest window of headless Chromium; 390 is had by a frame of that width."""
    script = 'onload = () => { const frame = document.querySelector("iframe").contentDocument; document.title = [frame.documentElement.scrollWidth, frame.querySelectorAll(".tokens i").length].join(" "); }'  # noqa: E501
    narrow = 390 if width == 500 else width
    copy = html.escape(page.read_text())
    (tmp_path / "frame.html").write_text(
        f'<title></title><iframe width="{narrow}" height="900" style="border:0" srcdoc="{copy}"></iframe>'
        f"<script>{script}</script>"
    )
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "frame.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    scroll_width, num_tokens = map(int, re.search(r"<title>(\d+) (\d+)</title>", dom).groups())
    assert num_tokens > 50
    assert scroll_width <= narrow

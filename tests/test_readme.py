"""README's Python runs as it stands, and its links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lstm_ext

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
N, L, I, H = 3, 7, 64, 128


def names(block):
    """What a block takes for granted."""
    lengths = torch.tensor([L, 3, 0])
    given = {"torch": torch, "lstm_ext": lstm_ext, "lengths": lengths}
    if "in_channels" in block:
        sizes = {"in_channels": 2, "hidden_channels": 4, "kernel_size": 3, "num_layers": 2}
        film = torch.randn(N, L, 2, 8, 8)
        return (
            given
            | sizes
            | {"film": film, "hx": None, "cnn": nn.Flatten(), "features": H, "hidden": H}
        )
    if "onnx" in block:
        return given | {"model": lstm_ext.LSTM(I, H), "x": torch.randn(L, N, I)}
    given |= {"input_size": I, "hidden_size": H, "x": torch.randn(N, L, I)}
    given |= {"h_0": torch.zeros(2, N, H), "c_0": torch.zeros(2, N, H)}
    given["starts"] = torch.zeros(N, L, dtype=torch.bool)
    given["lstm"] = lstm_ext.LSTM(I, H, 2, batch_first=True)
    return given | {"model": nn.LSTM(I, H, 2, batch_first=True)}


@pytest.mark.cpu_only(reason="its tensors are of the CPU")
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("(")[0].split()[-1])
def test_blocks_run(block, tmp_path, monkeypatch):
    if "onnx" in block:
        pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    exec(block, names(block))


def anchor(heading):
    """As a forge makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_lead_somewhere():
    links = [(page, link) for page in PAGES for link in LINK.findall(page.read_text())]
    assert len(links) > 20
    for page, link in links:
        path, _, place = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), (page.name, link)
        if place:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert place in map(anchor, headings), (page.name, link)

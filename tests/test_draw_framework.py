"""tools/draw_framework.py: the same picture every time, with nothing outside the frame."""

import sys

from tools import draw_framework


def test_same_bytes_twice(tmp_path, monkeypatch):
    pictures = []
    for name in ("one", "two"):
        monkeypatch.setattr(sys, "argv", ["draw_framework.py", "--output_dir", str(tmp_path / name)])
        draw_framework.main()
        pictures.append((tmp_path / name / "apo_framework.png").read_bytes())
    assert pictures[0] == pictures[1] and pictures[0].startswith(b"\x89PNG")


def test_every_text_is_inside_the_frame():
    figure = draw_framework.draw_framework()
    frame = figure.bbox
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text().strip()]
    assert len(boxes) > 20
    assert all(box.x0 > 0 and box.y0 > 0 and box.x1 < frame.x1 and box.y1 < frame.y1 for box in boxes)

"""What `make bench-serving` prints at its end is what its file holds."""

from __future__ import annotations

import json

from benchmarks.serving import RESULTS, figures


def test_every_figure_that_was_measured_is_printed_and_no_other() -> None:
    known = json.loads(RESULTS.read_text())
    printed = figures(known)
    found = {line[9:].strip(): line[:9].strip() for line in printed}
    assert len(found) == len(printed)
    ratio = found["rows a second over those of one LoRA: mixed, 1000 tasks"]
    assert float(ratio) == round(known["mixed_1000_over_one"], 2)
    (served,) = [value for text, value in found.items() if text.startswith("s, median from where main moved")]
    assert float(served) == round(known["publish_to_served_seconds"], 2)
    for clients, took in known["http"].items():
        (text,) = [text for text in found if f"over HTTP, {clients}" in text]
        assert (found[text], text.split()[-1]) == (f"{took['p50_ms']:.0f}", f"{took['p99_ms']:.0f}")
    (union,) = [value for text, value in found.items() if "the union" in text]
    assert float(union) == round(known["revisions"]["loss_to_union_points"], 2)
    (earlier,) = [value for text, value in found.items() if "earlier portions" in text]
    assert float(earlier) == round(known["revisions"]["earlier_portions_loss_points"], 2)
    assert figures({"http": known["http"]}) == [line for line in printed if "over HTTP" in line]
    assert figures({}) == []

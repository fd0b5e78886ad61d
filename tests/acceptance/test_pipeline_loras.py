"""LoRAs of a pipeline that makes pictures: ten of them through the service, in and out as diffusers' files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.acceptance.conftest import Site
from tests.stable_diffusion import random_lora, save_pipeline
from workers.weights import weights_digest

COUNT = 10
FILE = "pytorch_lora_weights.safetensors"


def updates(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ΔW of each module, as diffusers adds it: no alpha, so the scale is 1."""
    names = {name.partition(".lora_")[0] for name in tensors}
    return {
        name: tensors[f"{name}.lora_B.weight"].double() @ tensors[f"{name}.lora_A.weight"].double() for name in names
    }


def errors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[float]:
    """‖ΔŴ − ΔW‖ / ‖ΔW‖ of each module."""
    assert found.keys() == wanted.keys()
    return [float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted]


def test_ten_loras_come_in_share_a_subspace_and_go_out_as_they_came(tmp_path: Path) -> None:
    site, brought = Site(tmp_path), {}
    source = save_pipeline(tmp_path / "sd15")
    base = {"name": "sd15", "source": source, "weights_sha256": weights_digest(Path(source))}
    settings = {"base_model": base, "teams": {"art": {}}, "workers": {"count": 1}}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    site.run("up", "--config", "settings.yaml")
    try:
        for number in range(COUNT):
            tensors = random_lora(number, rank=16, with_text=number % 3 == 0)
            save_file(tensors, tmp_path / f"style-{number}.safetensors")
            brought[f"art/style-{number}"] = updates(tensors)
            told = site.run("import", f"style-{number}.safetensors", "--team", "art", "--name", f"style-{number}")
            assert "nothing here scores a text_to_image task" in told
        for title in brought:
            assert site.wait_for_state(title, "published", "parked", "rejected", seconds=300)["state"] == "published"

        exported = {}
        for number, (title, wanted) in enumerate(brought.items()):
            site.run("export", title, "-o", f"out-{number}")
            assert [file.name for file in (tmp_path / f"out-{number}").iterdir()] == [FILE]
            exported[title] = updates(load_file(tmp_path / f"out-{number}" / FILE))
            # Each keeps 98 % of its energy in every module, whatever came after it.
            assert max(errors(exported[title], wanted)) <= 0.02**0.5 + 1e-6, title

        # One that goes leaves the others what they were promised, and rolled back it is there again.
        before = site.status()["main"]
        site.run("remove", "art/style-4", "--yes")
        site.run("export", "art/style-7", "-o", "without")
        without = updates(load_file(tmp_path / "without" / FILE))
        assert max(errors(without, brought["art/style-7"])) <= 0.02**0.5 + 1e-6
        site.run("rollback", str(before))
        site.run("export", "art/style-4", "-o", "again")
        again = updates(load_file(tmp_path / "again" / FILE))
        assert max(errors(again, exported["art/style-4"])) < 1e-6

        assert "text_to_image, by which nothing is answered here" in site.run(
            "predict", "art/style-0", "--text", "a cat", expect=2
        )
    finally:
        site.run("down")


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)

"""Two small models that see, pretrained here: `make picture-models BENCH="--data FOLDER"` makes them once, outside the
repository, in some twelve minutes on one core.

No pretrained CLIP or ViT was at hand. These are a hundredth of one: four layers of width 128 over sixteen patches of a
picture of 32×32, and two layers for texts of the CLIP. They have seen 11,000 pictures of 76 classes, the groups of
`picture_sets.py` with a share for pretraining: CIFAR-10's first five classes, the digits 0 to 4, the Korean and the
Latin alphabet. The ViT learnt to name the class, the CLIP to find its caption and the other way round (the symmetric
contrastive loss, the target shared among equal captions). Of other classes they have never seen a picture or a name, so
their figures say how onebasis treats such models, and nothing about what a real CLIP can do.

A run that was killed goes on from its last checkpoint, to the same weights on the same machine; another machine's
rounding gives others. Both are folders that transformers loads, like any base model.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402
from torch.nn.functional import cross_entropy, normalize, pad  # noqa: E402
from transformers import (  # noqa: E402
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil  # noqa: E402

from benchmarks import picture_sets  # noqa: E402
from benchmarks.picture_sets import GROUPS  # noqa: E402
from configs.settings import BaseModelSettings  # noqa: E402
from workers.base_model import BaseModel, load_base_model  # noqa: E402
from workers.features import images  # noqa: E402
from workers.two_towers import contrastive_loss  # noqa: E402
from workers.weights import weights_digest  # noqa: E402

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onebasis"
CLIP, VIT = "small-clip", "small-vit"
SIZES = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
TEXT_LAYERS, TOKENS_MAX, VOCABULARY = 2, 32, 400
SIDE, PATCH = 32, 8
STEPS, ROWS_PER_STEP, RATE, WARM_UP = 800, 128, 1e-3, 50
SHIFT = 4
"""Most pixels by which a picture is moved while training."""
WEIGHTS = {"cifar10_jpeg": 0.6, "mnist": 0.15, "omniglot_a": 0.25}
"""Share of each set's pictures among those of a step."""
SEED = 20261201
CHECKPOINT_STEPS = 100


@dataclass(frozen=True)
class Pretraining:
    """All pictures that are pretrained on."""

    rows: tuple[picture_sets.ImageRow, ...]
    classes: tuple[int, ...]
    """Of each row its class among all."""
    captions: tuple[str, ...]
    """Of each class."""
    weights: tuple[float, ...]
    """How often each row is drawn, beside the others."""
    may_be_mirrored: tuple[bool, ...]
    """Of each row: a photo is one from either side, a character is not."""


def main(argv: list[str] | None = None) -> None:
    """Pretrain what is not there, and say how to use it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    asked = parser.parse_args(argv)
    for name, make in MAKERS.items():
        if not (FOLDER / name / "model.safetensors").is_file():
            make(gathered(asked.data), FOLDER / name, asked.steps)
        print(f"base_model:\n  name: {name}\n  source: {FOLDER / name}")
        print(f'  weights_sha256: "{weights_digest(FOLDER / name)}"')


def base_model(name: str) -> BaseModel:
    """One of the two, on the CPU, as a worker loads it."""
    folder = FOLDER / name
    if not folder.is_dir():
        raise SystemExit(f'{name} is not there: run make picture-models BENCH="--data FOLDER"')
    settings = BaseModelSettings(name=name, source=str(folder), weights_sha256=weights_digest(folder), device="cpu")
    return load_base_model(settings)


def gathered(data: Path) -> Pretraining:
    """What the sets of a folder have for pretraining."""
    rows: list[picture_sets.ImageRow] = []
    classes: list[int] = []
    captions: list[str] = []
    files: list[str] = []
    for name, group in GROUPS.items():
        if not group.pretrained_share:
            continue
        found = picture_sets.rows(data, name, "pretraining")
        rows += found
        classes += [len(captions) + row.label for row in found if isinstance(row.label, int)]
        files += [group.file] * len(found)
        captions += [group.prompt.format(label) for label in picture_sets.label_names(data, name)]
    weights = [WEIGHTS[file] / files.count(file) for file in WEIGHTS]
    of_file = dict(zip(WEIGHTS, weights, strict=True))
    photos = tuple(file == "cifar10_jpeg" for file in files)
    return Pretraining(tuple(rows), tuple(classes), tuple(captions), tuple(of_file[file] for file in files), photos)


def make_clip(seen: Pretraining, folder: Path, steps: int) -> None:
    """A CLIP by its own loss: of each picture the right caption of its step, of each caption the right pictures."""
    tokenizer = caption_tokenizer(seen.captions)
    marks = {f"{mark}_token_id": getattr(tokenizer, f"{mark}_token_id") for mark in ("bos", "eos", "pad")}
    text = SIZES | {"num_hidden_layers": TEXT_LAYERS, "vocab_size": len(tokenizer), **marks}
    text |= {"max_position_embeddings": TOKENS_MAX}
    vision = SIZES | {"image_size": SIDE, "patch_size": PATCH}
    torch.manual_seed(SEED)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=SIZES["hidden_size"]))
    size = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
    captions = dict(tokenizer(list(seen.captions), padding=True, padding_side="right", return_tensors="pt"))

    def loss(pixels: Tensor, classes_S: Tensor) -> Tensor:
        present, places_S = classes_S.unique(return_inverse=True)
        asked = {name: tensor[present] for name, tensor in captions.items()}
        texts = normalize(model.get_text_features(**asked).pooler_output, dim=-1)
        pictures = normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
        return contrastive_loss(model.logit_scale.exp() * pictures @ texts.T, places_S)

    _pretrain(model, processor, loss, seen, folder, steps)
    _save(folder, model, tokenizer, processor)


def make_vit(seen: Pretraining, folder: Path, steps: int) -> None:
    """A ViT by the names of all classes; its classifier is left out, so that each task has its own."""
    torch.manual_seed(SEED)
    config = ViTConfig(image_size=SIDE, patch_size=PATCH, num_labels=len(seen.captions), **SIZES)
    model = ViTForImageClassification(config)
    processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})

    def loss(pixels: Tensor, classes_S: Tensor) -> Tensor:
        return cross_entropy(model(pixel_values=pixels).logits, classes_S)

    _pretrain(model, processor, loss, seen, folder, steps)
    _save(folder, model.vit, processor)


MAKERS: Mapping[str, Callable[[Pretraining, Path, int], None]] = {CLIP: make_clip, VIT: make_vit}


def caption_tokenizer(captions: tuple[str, ...]) -> Any:
    """Byte pairs of the captions; other texts are read byte by byte. Every text is framed by its marks."""
    # The end has not the number 2: of such a CLIP transformers takes the largest token for the end.
    marks = ["<pad>", "<end>", "<start>"]
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )
    pieces.train_from_iterator(captions, trainer)
    numbers = [(mark, pieces.token_to_id(mark)) for mark in marks]
    pieces.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=numbers[1:])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        bos_token="<start>",
        eos_token="<end>",
        pad_token="<pad>",
        model_max_length=TOKENS_MAX,
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def _pretrain(
    model: nn.Module,
    processor: Any,
    loss: Callable[[Tensor, Tensor], Tensor],
    seen: Pretraining,
    folder: Path,
    steps: int,
) -> None:
    """Train all of a model. Which pictures a step sees, and how they lie, is read off its number alone."""
    pixels = images(processor, seen.rows)["pixel_values"]
    classes, weights = torch.tensor(seen.classes), torch.tensor(seen.weights)
    photos = torch.tensor(seen.may_be_mirrored)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=min(0.5, WARM_UP / steps))
    file = folder.with_name(f"{folder.name}.checkpoint")
    first = 0
    if file.is_file():
        known = torch.load(file, weights_only=True)
        first = known["step"]
        for part, name in ((model, "model"), (optimizer, "optimizer"), (pace, "pace")):
            part.load_state_dict(known[name])
    model.train()
    started = time.perf_counter()
    for step in range(first, steps):
        draw = torch.Generator().manual_seed(SEED + step)
        chosen = torch.multinomial(weights, ROWS_PER_STEP, replacement=True, generator=draw)
        found = loss(moved(pixels[chosen], photos[chosen], draw), classes[chosen])
        optimizer.zero_grad()
        found.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        pace.step()
        if (step + 1) % CHECKPOINT_STEPS == 0:
            print(f"{folder.name}: step {step + 1} of {steps}, loss {found.item():.3f}", end=", ")
            print(f"{time.perf_counter() - started:.0f} s", flush=True)
            _keep(file, {"step": step + 1, "model": model, "optimizer": optimizer, "pace": pace})
    model.eval()
    file.unlink(missing_ok=True)


def moved(pixels_SCHW: Tensor, may_be_mirrored_S: Tensor, draw: torch.Generator) -> Tensor:
    """Each picture by a few pixels, its edge repeated, and of some the mirror image."""
    count, _, side, _ = pixels_SCHW.shape
    framed = pad(pixels_SCHW, (SHIFT,) * 4, mode="replicate")
    down, right = torch.randint(0, 2 * SHIFT + 1, (2, count), generator=draw)
    every_place = framed.unfold(2, side, 1).unfold(3, side, 1)
    found = every_place[torch.arange(count), :, down, right]
    mirrored = may_be_mirrored_S & (torch.rand(count, generator=draw) < 0.5)
    return torch.where(mirrored[:, None, None, None], found.flip(3), found)


def _keep(file: Path, state: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    torch.save({name: held if name == "step" else held.state_dict() for name, held in state.items()}, part)
    part.replace(file)


def _save(folder: Path, *parts: Any) -> None:
    """A folder that transformers loads, whole or not at all."""
    part = folder.with_name(f"{folder.name}.part")
    for piece in parts:
        piece.save_pretrained(part)
    part.rename(folder)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

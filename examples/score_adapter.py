"""Score a PEFT adapter on labelled rows with transformers and peft alone: `score_adapter.py FOLDER ROWS.jsonl.gz`.

No onebasis in here: whoever serves the result needs none. Prints JSON.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TQDM_DISABLE"] = "1"

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

BATCH = 32


def main(folder: Path, rows_file: Path, max_length: int = 64) -> None:
    """Load the base model and the adapter on it, predict, count."""
    config = PeftConfig.from_pretrained(folder)
    source = base_folder(config.base_model_name_or_path)
    with gzip.open(rows_file, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    label_count = output_count(folder)
    tokenizer = AutoTokenizer.from_pretrained(source)
    base = AutoModelForSequenceClassification.from_pretrained(source, num_labels=label_count)
    model = PeftModel.from_pretrained(base, folder).eval()
    right = 0
    with torch.inference_mode():
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            texts = [row["text"] for row in batch]
            pairs = [row["text_b"] for row in batch] if "text_b" in batch[0] else None
            inputs = tokenizer(texts, pairs, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
            predicted = model(**inputs).logits.argmax(dim=1).tolist()
            right += sum(label == row["label"] for label, row in zip(predicted, batch, strict=True))
    print(json.dumps({"accuracy": right / len(rows), "rows": len(rows)}))


def base_folder(source: str) -> str:
    """Where the base model is; one that lies inside a Python package is written `package:NAME/FOLDER`."""
    if not source.startswith("package:"):
        return source
    package, _, inner = source.removeprefix("package:").partition("/")
    return str(Path(find_spec(package).submodule_search_locations[0]) / inner)


def output_count(folder: Path) -> int:
    """Outputs of the adapter's own classifier."""
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        heads = [name for name in file.keys() if name.endswith(("classifier.weight", "score.weight"))]  # noqa: SIM118
        return file.get_slice(heads[0]).get_shape()[0]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *(int(number) for number in sys.argv[3:]))

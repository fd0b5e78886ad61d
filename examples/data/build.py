"""Remake the demo's data files from a folder with the originals: `python build.py ORIGINALS`.

ORIGINALS holds one folder per corpus (banking77, qnli, …), each with train.jsonl.gz, test.jsonl.gz and meta.json
(label names and counts). Nothing is downloaded here. The same originals give the same bytes: rows are drawn with a
fixed seed, written in a fixed order, and the gzip header carries no name and no time.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent

Row = dict[str, str | int]

# BANKING77's intents, grouped by what their names mean; labels are numbered in the order written here. The eleven
# intents about transfers are left out: they are the hardest to tell apart, and four groups are enough.
BANKING_GROUPS = {
    "card_orders": (
        "order_physical_card get_physical_card getting_spare_card getting_virtual_card get_disposable_virtual_card "
        "disposable_card_limits visa_or_mastercard card_arrival card_delivery_estimate activate_my_card card_linking "
        "card_about_to_expire card_not_working contactless_not_working virtual_card_not_working card_swallowed"
    ),
    "charges": (
        "card_payment_fee_charged card_payment_not_recognised card_payment_wrong_exchange_rate pending_card_payment "
        "declined_card_payment reverted_card_payment? transaction_charged_twice extra_charge_on_statement "
        "direct_debit_payment_not_recognised request_refund Refund_not_showing_up cash_withdrawal_charge "
        "cash_withdrawal_not_recognised wrong_exchange_rate_for_cash_withdrawal wrong_amount_of_cash_received "
        "pending_cash_withdrawal declined_cash_withdrawal"
    ),
    "top_ups": (
        "topping_up_by_card automatic_top_up top_up_by_cash_or_cheque top_up_by_card_charge "
        "top_up_by_bank_transfer_charge top_up_limits verify_top_up pending_top_up top_up_failed top_up_reverted "
        "balance_not_updated_after_cheque_or_cash_deposit exchange_rate exchange_via_app exchange_charge "
        "fiat_currency_support supported_cards_and_currencies"
    ),
    "account": (
        "age_limit country_support edit_personal_details terminate_account verify_my_identity why_verify_identity "
        "unable_to_verify_identity verify_source_of_funds passcode_forgotten lost_or_stolen_phone pin_blocked "
        "change_pin lost_or_stolen_card compromised_card card_acceptance atm_support apple_pay_or_google_pay"
    ),
}
# Longest pair in words: short rows are what a demo on two cores can afford.
RELEVANCE_WORDS_MAX = 32
CONTRADICTION_WORDS_MAX = 25
EVAL_ROWS_MAX = 250


def read_rows(path: Path) -> list[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))


def banking_rows(rows: list[Row], names: list[str], group: list[str]) -> Iterator[Row]:
    """The rows of one group of intents, renumbered in the group's order."""
    index = {names.index(name): position for position, name in enumerate(group)}
    for row in rows:
        if row["label"] in index:
            yield {"text": row["text"], "label": index[int(row["label"])]}


def short_pairs(rows: list[Row], words_max: int) -> list[Row]:
    return [row for row in rows if len(f"{row['text']} {row['text_b']}".split()) <= words_max]


def relevance_rows(rows: list[Row], seed: str) -> Iterator[Row]:
    """Half of QNLI's questions with the sentence that answers them (1), half with another question's sentence (0).

    Only pairs that QNLI labels `entailment` (index 0) are used, and every text once, so nothing but the match of
    question and sentence tells the two labels apart. QNLI's own labels are too hard for this base in seconds.
    """
    answered = in_order(row for row in short_pairs(rows, RELEVANCE_WORDS_MAX) if row["label"] == 0)
    random.Random(seed).shuffle(answered)
    half = len(answered) // 2
    for row in answered[half:]:
        yield {"text": row["text"], "text_b": row["text_b"], "label": 1}
    for row, other in zip(answered[:half], answered[1:half] + answered[:1], strict=True):
        yield {"text": row["text"], "text_b": other["text_b"], "label": 0}


def contradiction_rows(rows: list[Row]) -> Iterator[Row]:
    """MultiNLI without its `neutral` pairs (index 1): the second sentence follows (0) or contradicts (1)."""
    for row in short_pairs(rows, CONTRADICTION_WORDS_MAX):
        if row["label"] != 1:
            yield {"text": row["text"], "text_b": row["text_b"], "label": int(row["label"] == 2)}


def at_most(rows: Iterable[Row], count: int, seed: str) -> list[Row]:
    rows = in_order(rows)
    return random.Random(seed).sample(rows, count) if len(rows) > count else rows


def in_order(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: (row["label"], row["text"], row.get("text_b", "")))


def build(originals: Path) -> None:
    for split, part in (("train", "train"), ("test", "eval")):
        rows_max = EVAL_ROWS_MAX if part == "eval" else 10**9
        rows = read_rows(originals / "banking77" / f"{split}.jsonl.gz")
        names = json.loads((originals / "banking77" / "meta.json").read_text())["label_names"]
        chosen = {
            f"banking_{group}": list(banking_rows(rows, names, intents.split()))
            for group, intents in BANKING_GROUPS.items()
        }
        rows = read_rows(originals / "qnli" / f"{split}.jsonl.gz")
        chosen["relevance"] = at_most(relevance_rows(rows, f"relevance|{part}"), rows_max, f"relevance|{part}")
        rows = read_rows(originals / "mnli" / f"{split}.jsonl.gz")
        chosen["contradiction"] = at_most(contradiction_rows(rows), rows_max, f"contradiction|{part}")
        for name, some in chosen.items():
            write_rows(HERE / f"{name}.{part}.jsonl.gz", in_order(some))
    for path in sorted(HERE.glob("*.jsonl.gz")):
        print(hashlib.sha256(path.read_bytes()).hexdigest(), path.name, len(read_rows(path)), "rows")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("originals", type=Path, help="folder with one folder per corpus")
    build(parser.parse_args().originals)

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

# BANKING77's 77 intents, grouped by what their names mean. Labels are numbered in the order written here.
BANKING_GROUPS = {
    "cards": (
        "order_physical_card get_physical_card getting_spare_card getting_virtual_card get_disposable_virtual_card "
        "disposable_card_limits visa_or_mastercard card_arrival card_delivery_estimate activate_my_card card_linking "
        "card_about_to_expire card_not_working contactless_not_working virtual_card_not_working lost_or_stolen_card "
        "compromised_card card_swallowed pin_blocked change_pin"
    ),
    "charges": (
        "card_payment_fee_charged card_payment_not_recognised card_payment_wrong_exchange_rate pending_card_payment "
        "declined_card_payment reverted_card_payment? transaction_charged_twice extra_charge_on_statement "
        "direct_debit_payment_not_recognised request_refund Refund_not_showing_up cash_withdrawal_charge "
        "cash_withdrawal_not_recognised wrong_exchange_rate_for_cash_withdrawal wrong_amount_of_cash_received "
        "pending_cash_withdrawal declined_cash_withdrawal"
    ),
    "transfers": (
        "transfer_into_account receiving_money transfer_timing transfer_fee_charged pending_transfer "
        "declined_transfer failed_transfer cancel_transfer transfer_not_received_by_recipient "
        "beneficiary_not_allowed balance_not_updated_after_bank_transfer topping_up_by_card automatic_top_up "
        "top_up_by_cash_or_cheque top_up_by_card_charge top_up_by_bank_transfer_charge top_up_limits verify_top_up "
        "pending_top_up top_up_failed top_up_reverted balance_not_updated_after_cheque_or_cash_deposit"
    ),
    "account": (
        "age_limit country_support edit_personal_details terminate_account verify_my_identity why_verify_identity "
        "unable_to_verify_identity verify_source_of_funds passcode_forgotten lost_or_stolen_phone exchange_rate "
        "exchange_via_app exchange_charge fiat_currency_support supported_cards_and_currencies card_acceptance "
        "atm_support apple_pay_or_google_pay"
    ),
}
# Pairs: training rows, evaluation rows, longest pair in words (short rows are what a demo on two cores can afford).
PAIRS = {"qnli": (2000, 250, 40), "mnli": (2000, 250, 40)}


def read_rows(path: Path) -> list[dict[str, str | int]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write_rows(path: Path, rows: Iterable[dict[str, str | int]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode("utf-8"), compresslevel=9, mtime=0))


def banking_rows(rows: list[dict[str, str | int]], names: list[str], group: list[str]) -> Iterator[dict[str, str | int]]:
    """The rows of one group of intents, renumbered in the group's order."""
    index = {names.index(name): position for position, name in enumerate(group)}
    for row in rows:
        if row["label"] in index:
            yield {"text": row["text"], "label": index[int(row["label"])]}


def pair_rows(rows: list[dict[str, str | int]], count: int, words_max: int, seed: str) -> list[dict[str, str | int]]:
    """`count` pairs of at most `words_max` words, the same number (±1) of every label."""
    short = [row for row in rows if len(f"{row['text']} {row['text_b']}".split()) <= words_max]
    labels = sorted({row["label"] for row in short})
    chosen: list[dict[str, str | int]] = []
    for position, label in enumerate(labels):
        share = count // len(labels) + (position < count % len(labels))
        chosen += random.Random(f"{seed}|{label}").sample([row for row in short if row["label"] == label], share)
    return chosen


def in_order(rows: Iterable[dict[str, str | int]]) -> list[dict[str, str | int]]:
    return sorted(rows, key=lambda row: (row["label"], row["text"], row.get("text_b", "")))


def build(originals: Path) -> None:
    for split, part in (("train", "train"), ("test", "eval")):
        rows = read_rows(originals / "banking77" / f"{split}.jsonl.gz")
        names = json.loads((originals / "banking77" / "meta.json").read_text())["label_names"]
        for group, intents in BANKING_GROUPS.items():
            chosen = in_order(banking_rows(rows, names, intents.split()))
            write_rows(HERE / f"banking_{group}.{part}.jsonl.gz", chosen)
        for corpus, (train_count, eval_count, words_max) in PAIRS.items():
            rows = read_rows(originals / corpus / f"{split}.jsonl.gz")
            count = train_count if part == "train" else eval_count
            chosen = pair_rows(rows, count, words_max, f"onebasis|{corpus}|{part}")
            write_rows(HERE / f"{corpus}.{part}.jsonl.gz", in_order(chosen))
    for path in sorted(HERE.glob("*.jsonl.gz")):
        print(hashlib.sha256(path.read_bytes()).hexdigest(), path.name, len(read_rows(path)), "rows")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("originals", type=Path, help="folder with one folder per corpus")
    build(parser.parse_args().originals)

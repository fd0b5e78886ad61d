"""The settings in a PEFT adapter's `adapter_config.json` that change what the update is.

Nothing in it can be trusted. Numbers are checked before they are used, names are looked up in sets, and
patterns are matched by RE2, which does not backtrack: the time for a pattern grows with its length and not as 2^n.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import re2

from configs.errors import InvalidInput
from configs.places import OpenFile

CLASSIFIER_HEADS = ("classifier", "score")  # what PEFT saves for SEQ_CLS without being asked
CONFIG_BYTES_MAX = 4 * 2**20  # room for the names of every expert's layers in a large mixture, twice
SAVED_MODULES_MAX = 1000
MATCHES_MAX = 2_000_000  # patterns times modules; RE2 does about 300,000 a second from Python
LARGEST_NUMBER = 1e30  # largest rank or alpha: far above any use, and far below the end of float32

# Configuration keys whose value changes what ΔW is, with the values under which it is still scale·B·A.
_PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "lora_bias": (None, False),
    "bias": (None, "none"),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "megatron_config": (None,),
}
# Initialisations that leave the base weights alone. Others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change them as well,
# and B·A alone is then not the update.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_KNOWN = frozenset(_PLAIN_VALUES) | frozenset(
    [
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "id2label",
        "label2id",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
        "unsloth_fixed",
    ]
)
"""Every key whose meaning is known here: PEFT's own up to 0.21, and one of Unsloth's that changes nothing."""
TARGET_SETTINGS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""Settings by which PEFT chooses the modules that it adapts."""
_TRUTHS = ("use_rslora", "fan_in_fan_out")
_TEXTS = ("task_type", "base_model_name_or_path")
_ONE_MEANING_ONLY = ("[[", "[:")  # RE2 reads character classes, Python (and so PEFT) plain brackets


def read_config(path: Path, open_file: OpenFile) -> dict[str, Any]:
    """The JSON object in the file, unchecked.

    Raises:
        InvalidInput: It is missing, too large, no JSON object, or has one key twice.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > CONFIG_BYTES_MAX:
                raise InvalidInput(f"has {size:,} bytes, more than the {CONFIG_BYTES_MAX:,} that are read", str(path))
            config = json.loads(file.read(CONFIG_BYTES_MAX), object_pairs_hook=_each_once)
    except OSError as error:
        raise InvalidInput(f"cannot read the file: {error}", str(path), "name a folder saved by PEFT") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"is not valid JSON: {error}", str(path), "copy or save it again") from error
    if not isinstance(config, dict):
        raise InvalidInput(f"must be a JSON object, not {type(config).__name__}", str(path))
    return config


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse a LoRA configuration whose update is not scale·B·A. Raises InvalidInput, which names the setting."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InvalidInput(f"has peft_type {_shown(kind)}; only LORA can be merged", where, "train the task as a LoRA")
    for key, plain in _PLAIN_VALUES.items():
        if config.get(key) not in plain:
            raise InvalidInput(
                f"uses {key}={_shown(config[key])}, which is more than scale·B·A and would be lost",
                where,
                f"train it again without {key}",
            )
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise InvalidInput(
            f"was started with init_lora_weights={_shown(start)}, which changes the base weights as well",
            where,
            "convert it to a plain LoRA first (PEFT: path_initial_model_for_weight_conversion)",
        )
    for key in _TRUTHS:
        if not isinstance(config.get(key), bool | None):
            raise InvalidInput(f"has {key}={_shown(config[key])}, which must be true or false", where)
    for key in _TEXTS:
        if not isinstance(config.get(key), str | None):
            raise InvalidInput(f"has {key}={_shown(config[key])}, which must be a text", where)
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, Mapping):
            raise InvalidInput(f"has {key}={_shown(config[key])}, which must be a mapping of names to numbers", where)
    saved = config.get("modules_to_save") or []
    # A text would be read letter by letter, and every tensor's name ends with one of the letters.
    if not isinstance(saved, list | tuple | set) or not all(isinstance(name, str) and name for name in saved):
        raise InvalidInput(f"has modules_to_save={_shown(saved)}, which must be a list of names", where)
    if len(saved) > SAVED_MODULES_MAX:
        raise InvalidInput(f"lists {len(saved):,} modules_to_save; {SAVED_MODULES_MAX:,} is the most", where)
    targets = config.get("target_modules")
    if isinstance(targets, list | tuple | set) and not all(isinstance(name, str) for name in targets):
        raise InvalidInput(f"has target_modules={_shown(targets)}, which must be names", where)
    _positive(config.get("r"), "r", where, whole=True)
    _positive(config.get("lora_alpha"), "lora_alpha", where)
    _number(config.get("lora_dropout") or 0.0, "lora_dropout", where)


def unknown_settings(config: Mapping[str, Any]) -> list[str]:
    """Keys with a value that nobody here knows: a newer PEFT, or another program, may mean something by them."""
    return sorted(str(key) for key, value in config.items() if key not in _KNOWN and value)


def adapted(settings: Mapping[str, Any], names: Iterable[str], where: str) -> list[str]:
    """The modules of a model that PEFT adapts by these settings; none where only PEFT can tell (`all-linear`).

    Args:
        settings: Those of `TARGET_SETTINGS`.
        names: All modules of the model that could be adapted.
    """
    targets, left_out = settings.get("target_modules"), LeftOut(settings, where)
    if not isinstance(targets, list):
        return []
    listed = {*targets}
    return [name for name in names if listed & {*ends_of(name)} and not left_out.rule_for(name)]


class LeftOut:
    """PEFT's rules for target modules that are not adapted after all: `exclude_modules` and `layers_to_transform`.

    Raises:
        InvalidInput: A rule that cannot be read.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        excluded, layers = config.get("exclude_modules") or (), config.get("layers_to_transform")
        patterns = config.get("layers_pattern") or ()
        self._excluded = {excluded} if isinstance(excluded, str) else {*_names(excluded, "exclude_modules", where)}
        self._is_pattern = (
            _compile(excluded, "exclude_modules", where, before="") if isinstance(excluded, str) else None
        )
        numbers = [layers] if isinstance(layers, int) else layers
        if numbers is not None and not (isinstance(numbers, list) and all(isinstance(n, int) for n in numbers)):
            raise InvalidInput(f"has layers_to_transform={_shown(layers)}, which must be whole numbers", where)
        self._layers = {*numbers} if numbers else None
        named = [patterns] if isinstance(patterns, str) else _names(patterns, "layers_pattern", where)
        # PEFT's own rule: the number after one of the names, or after any name where none is given.
        self._index = [rf".*\.{re.escape(name)}\.(\d+)\." for name in named] or [r".*\.[^.]*\.(\d+)\."]

    def rule_for(self, name: str) -> str:
        """The setting by which PEFT does not adapt a module; empty: it does."""
        if self._is_pattern is not None:
            return "exclude_modules" if self._is_pattern.match(name) else ""
        if self._excluded & {*ends_of(name)}:
            return "exclude_modules"
        if self._layers is None:
            return ""
        found = next((match for rule in self._index if (match := re.match(rule, name))), None)
        return "" if found and int(found[1]) in self._layers else "layers_to_transform"


def _names(value: Any, key: str, where: str) -> list[str]:
    if not isinstance(value, list | tuple | set) or not all(isinstance(name, str) for name in value):
        raise InvalidInput(f"has {key}={_shown(value)}, which must be names", where)
    return list(value)


class Scaling:
    """The factor that a configuration puts in front of each module's B·A: alpha/r, or alpha/√r with rsLoRA.

    Args:
        config: Checked by `check_config`.
        modules: Number of modules whose scale will be asked for.
        where: Name of the adapter in error messages.

    Raises:
        InvalidInput: A pattern cannot be read, there are too many, or a value is no positive number.
    """

    def __init__(self, config: Mapping[str, Any], modules: int, where: str) -> None:
        self._config, self._where = config, where
        self._ranks = _Patterns(config, "rank_pattern", modules, where)
        self._alphas = _Patterns(config, "alpha_pattern", modules, where)

    def of(self, name: str, rank: int) -> float:
        """The scale of one module.

        Args:
            rank: Rank of the module's tensors.

        Raises:
            InvalidInput: Another rank than the configuration says, or a scale that is no number.
        """
        if rank != (said := self._ranks.value_of(name) or self._config["r"]):
            raise InvalidInput(f"has rank {rank} in {name!r}, but its configuration says {said}", self._where)
        alpha = float(self._alphas.value_of(name) or self._config["lora_alpha"])
        return alpha / math.sqrt(rank) if self._config.get("use_rslora") else alpha / rank


class _Patterns:
    """PEFT's rule: the value of the first pattern that matches a module's name, or its end after a dot."""

    def __init__(self, config: Mapping[str, Any], key: str, modules: int, where: str) -> None:
        values = config.get(key) or {}
        if len(values) * modules > MATCHES_MAX:
            raise InvalidInput(
                f"has {len(values):,} patterns in {key} for {modules:,} modules, which takes too long",
                where,
                "give fewer patterns, each for more modules",
            )
        self._values = {
            pattern: _positive(value, f"{key}[{pattern[:80]!r}]", where, whole=key == "rank_pattern")
            for pattern, value in values.items()
        }
        self._compiled = [(pattern, _compile(pattern, key, where)) for pattern in self._values]

    def value_of(self, name: str) -> float | None:
        return next((self._values[text] for text, pattern in self._compiled if pattern.match(name)), None)


def _compile(pattern: str, key: str, where: str, before: str = r"(.*\.)?") -> Any:
    rule = rf"{before}({pattern})$"
    options = re2.Options()
    options.log_errors = False
    try:
        if len(pattern) > 1000 or any(sign in pattern for sign in _ONE_MEANING_ONLY):
            raise ValueError("it means one thing to PEFT and may mean another here")
        re.compile(rule)  # refuses a pattern that PEFT cannot read; only compiled, not matched
        return re2.compile(rule, options)
    except (re.error, re2.error, ValueError, RecursionError, OverflowError) as error:
        said = error.args[0].decode(errors="replace") if error.args and isinstance(error.args[0], bytes) else str(error)
        raise InvalidInput(
            f"has a pattern in {key} that cannot be read: {pattern[:80]!r}: {said}",
            where,
            "use the modules' full names",
        ) from error


class Names:
    """The names of modules that a configuration lists. They are looked up in sets, not compared one by one."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        saved = {*(config.get("modules_to_save") or ())}
        self._saved = saved | {*CLASSIFIER_HEADS} if config.get("task_type") == "SEQ_CLS" else saved
        self._lengths = sorted({len(name) for name in self._saved})
        targets = config.get("target_modules")
        self.targets = {*targets} if isinstance(targets, list | tuple | set) else None
        """Names of the target modules; None: a pattern or `all-linear`, which only the model can resolve."""
        self._known: dict[str, bool] = {}

    def saves(self, parameter: str) -> bool:
        """Whether a parameter lies in a module that PEFT saves whole. PEFT, too, compares the ends of names."""
        parts = parameter.split(".")
        return any(self._ends_as_saved(".".join(parts[:stop])) for stop in range(1, len(parts)))

    def _ends_as_saved(self, module: str) -> bool:
        if module not in self._known:
            self._known[module] = any(module[-length:] in self._saved for length in self._lengths)
        return self._known[module]


def ends_of(name: str) -> Iterator[str]:
    """The name, and what is left of it after each dot."""
    yield name
    while "." in name:
        name = name.partition(".")[2]
        yield name


def _positive(value: Any, key: str, where: str, whole: bool = False) -> Any:
    if not (_is_number(value, whole) and 0 < value <= LARGEST_NUMBER):
        raise InvalidInput(f"has {key}={_shown(value)}, which must be a positive {'whole ' * whole}number", where)
    return value


def _number(value: Any, key: str, where: str) -> None:
    if not (_is_number(value) and abs(value) <= LARGEST_NUMBER):
        raise InvalidInput(f"has {key}={_shown(value)}, which must be a number", where)


def _is_number(value: Any, whole: bool = False) -> bool:
    """NaN counts as a number; it fails every later comparison. Whole numbers of any length are compared exactly."""
    return isinstance(value, int if whole else int | float) and not isinstance(value, bool)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return found


def _shown(value: Any) -> str:
    """The beginning of a value, for a message. Python refuses to write out very long whole numbers."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST_NUMBER:
        return f"a whole number of {value.bit_length()} bits"
    try:
        return f"{value!r:.80}"
    except (ValueError, RecursionError):  # a very long number inside, or lists in lists
        return f"a {type(value).__name__} that is too large to show"

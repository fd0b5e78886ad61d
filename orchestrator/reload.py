"""Which settings a running service takes as they are now, and which need a restart. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from configs.errors import Conflict
from configs.settings import Settings

TAKEN = ("teams", "data_roots", "data_buckets", "gate", "main", "webhooks", "oidc", "serving", "tracing")
"""Sections that are taken whole; of `base_models` and `pools` further ones are, and new sizes of pools."""
HANDLED = ("base_model", "base_models", "workers", "pools")
"""What is compared in another way: base models and pools one by one; what `workers` says is in the pools."""
SIZES = ("min", "max", "idle_seconds")
"""Of a pool that is there."""


def taken_without_restart(before: Settings, after: Settings, cpus: int) -> list[str]:
    """Names of the settings that are different and can be taken.

    Args:
        cpus: Of this machine, for a local Ray: it was started with so many, or as many as its pools could take.

    Raises:
        Conflict: Others are different, too; names them, and how to take those. None is taken then.
    """
    if gone := [name for name in before.base_names if name not in after.base_names]:
        raise Conflict(
            f"these settings no longer have the base model {', '.join(gone)}, and none leaves a running service",
            "base_models",
            "write it back; or, on purpose: `onebasis down`, then `onebasis up --config FILE "
            f"{' '.join(f'--remove-base-model {name}' for name in gone)}`",
        )
    if after.base_names[: len(before.bases)] != before.base_names:
        what = f"the base models that are there have to come first, in their order: {', '.join(before.base_names)}"
        raise Conflict(what, "base_models", "write further ones behind them")
    if before.ray.address == "local" and after.cpus_at_most > (had := max(cpus, before.cpus_at_most)):
        what = f"its workers could take {after.cpus_at_most} CPUs, and the local Ray was started with {had}"
        todo = "lower max or cpus of a pool; or `onebasis down`, then `onebasis up --config FILE`"
        raise Conflict(what, "pools", todo)
    old = {base.name: base for base in before.bases}
    further = [f"base_models.{base.name}" for base in after.bases if base.name not in old]
    changed = [
        f"base_models.{base.name}.{key}"
        for base in after.bases
        if base.name in old
        for key in _differing(old[base.name].model_dump(), base.model_dump())
    ]
    sections = {name: (getattr(before, name), getattr(after, name)) for name in Settings.model_fields}
    differ = [name for name, (was, now) in sections.items() if name not in HANDLED and was != now]
    changed += [
        key
        for name in differ
        if name not in TAKEN
        for key in _differing({name: _plain(sections[name][0])}, {name: _plain(sections[name][1])})
    ]
    changed += [f"pools.{name}" for name in before.pools if name not in after.pools]
    changed += [
        f"pools.{name}.{key}"
        for name, pool in before.pools.items()
        if name in after.pools
        for key in _differing(pool.model_dump(), after.pools[name].model_dump())
        if key not in SIZES
    ]
    resized = [f"pools.{name}" for name, pool in after.pools.items() if before.pools.get(name) != pool]
    if changed:
        raise Conflict(
            f"a running service cannot change {', '.join(changed)}; nothing was taken",
            "onebasis reload",
            "`onebasis down`, then `onebasis up --config FILE`, takes them all",
        )
    return [*further, *resized, *(name for name in differ if name in TAKEN)]


def refuse_lost_teams(before: Settings, after: Settings, alive: Mapping[str, int]) -> None:
    """Refuse settings without a team that has tasks which have not ended: nobody could name it, pause it or give it a
    share.

    Args:
        alive: Team to number of its tasks that have not ended.

    Raises:
        Conflict: Names the teams, with what to do.
    """
    gone = {team: alive[team] for team in before.teams if team not in after.teams and alive.get(team)}
    if gone:
        told = ", ".join(f"{team} ({count:,} task{'' if count == 1 else 's'})" for team, count in gone.items())
        first = next(iter(gone))
        raise Conflict(
            f"these settings no longer have teams of which tasks have not ended: {told}",
            "teams",
            "write them back, and take them out once their tasks have ended: `onebasis cancel --team "
            f"{first}` ends them",
        )


def _plain(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


def _differing(before: Any, after: Any, path: str = "") -> list[str]:
    """Dotted keys whose values differ."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [path] if before != after else []
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    dot = f"{path}." if path else ""
    return [found for key in keys for found in _differing(before.get(key), after.get(key), f"{dot}{key}")]

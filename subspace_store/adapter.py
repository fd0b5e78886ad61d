"""An adapter in canonical form: the result of training a task, whatever the method.

A LoRA s·B·A is not unique (BG, G⁻¹A is the same update). Here the scale is folded in and the gauge removed:
ΔW = U·diag(σ)·Vᵀ per module. The gauge can be kept beside it (2·R² numbers): nothing here needs it, but a comparison
with methods that stack the raw B and A does. Axes: N outputs of a module, D inputs, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from safetensors.torch import save_file as save_safetensors_file
from torch import Tensor

from configs.errors import Corrupt, InvalidInput
from subspace_store.foundation import SOURCE, foundation, foundation_ranks
from subspace_store.module_names import MARK

FORMAT = "onebasis-adapter-1"
FORMAT_WITH_FOUNDATION = "onebasis-adapter-2"
"""Format of a file with modules that are kept as coefficients in their foundation."""

LARGEST = 1e8
"""Largest absolute value in an update: later merges multiply four such numbers in float32, which ends at 3e38."""

UNIT_TOLERANCE = 1e-2
"""Largest deviation of a singular vector's length from 1. Float32 rounding leaves 1e-6; vectors that are far off would
merge as another update."""
OUTSIDE_MAX = 1e-6
"""Largest share of an update's energy outside the foundation that it is said to lie in: float32 leaves 1e-13."""
NAME_MAX = 500
"""Most characters of a module's or parameter's name."""


@dataclass(frozen=True)
class ModuleUpdate:
    """ΔW of one module, as a thin SVD. float32, finite, σ descending and ≥ 0."""

    u_NR: Tensor
    sigma_R: Tensor
    v_DR: Tensor
    gauge_out_RR: Tensor | None = None
    """The matrix Uᵀ·(scale·B), from the factors B and A that the update was made of; None if they are not known."""
    gauge_in_RR: Tensor | None = None
    """The matrix A·V of the same factors."""
    foundation: int = field(default=0, kw_only=True)
    """Number of directions of the module's foundation that U and V lie in; 0: they do not, or it is not known."""

    @property
    def rank(self) -> int:
        return int(self.sigma_R.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D) of the adapted weight."""
        return int(self.u_NR.shape[0]), int(self.v_DR.shape[0])

    @property
    def numbers(self) -> int:
        """Numbers in which it is kept by itself: coefficients in the foundation, or two thin factors."""
        return self.rank * sum(foundation_ranks(self.shape, self.foundation) if self.foundation else self.shape)

    @property
    def energy(self) -> float:
        """‖ΔW‖²_F, computed in float64."""
        return float(self.sigma_R.double().square().sum())

    def delta(self) -> Tensor:
        """The dense N×D update in float64. For tests and small modules."""
        return (self.u_NR.double() * self.sigma_R.double()) @ self.v_DR.double().T

    def leading(self, rank: int) -> ModuleUpdate:
        """The first `rank` directions, without a gauge; the update itself if it has no more."""
        if self.rank <= rank:
            return self
        parts = self.u_NR[:, :rank], self.sigma_R[:rank], self.v_DR[:, :rank]
        return ModuleUpdate(*(part.contiguous() for part in parts), foundation=self.foundation)

    def raw(self) -> tuple[Tensor, Tensor]:
        """The factors as they were trained: scale·B (N×R) and A (R×D), float64, exact to float32 rounding.

        Raises:
            InvalidInput: The update came without its gauge: it was reconstructed, or written before gauges were kept.
        """
        if self.gauge_out_RR is None or self.gauge_in_RR is None:
            raise InvalidInput("the factors B and A it was trained as are not known", todo="import the adapter again")
        return self.u_NR.double() @ self.gauge_out_RR.double(), self.gauge_in_RR.double() @ self.v_DR.double().T


SIZED = "sized"
"""Key of `Adapter.info`: how an adapter's size was found, if it has no more numbers than its task needs."""


@dataclass(frozen=True)
class Adapter:
    """One task's update of a base model, and its head.

    Args:
        base_model: Name of the base model it was trained on.
        base_sha256: sha256 of that model's weights file; empty when unknown.
        modules: Full module name in the base model (`bert.encoder.layer.0.attention.self.query`) to its update.
        head: Full parameter name (`classifier.weight`) to the task's own weights, kept outside the subspace.
        info: Facts for people and for export: how A was initialised, task type, label names. Values are strings.
    """

    base_model: str
    base_sha256: str
    modules: Mapping[str, ModuleUpdate]
    head: Mapping[str, Tensor] = field(default_factory=dict)
    info: Mapping[str, str] = field(default_factory=dict)

    @property
    def label_names(self) -> tuple[str, ...]:
        """The label of each output, in order; empty if the adapter has no outputs or their labels are not known."""
        return tuple(json.loads(self.info.get("label_names") or "[]"))

    @property
    def is_sized(self) -> bool:
        """Whether it has no more numbers than its task's score needs, so that none may be taken from it."""
        return SIZED in self.info

    @property
    def directions(self) -> int:
        """Singular values of its updates, all together."""
        return sum(update.rank for update in self.modules.values())

    @property
    def numbers(self) -> int:
        """Numbers in which its updates are kept by themselves; the head is not counted."""
        return sum(update.numbers for update in self.modules.values())

    @property
    def parameter_count(self) -> int:
        """Numbers in an equivalent separate LoRA, head not counted: Σ r·(n+d).

        Coefficients in a basis may have a higher rank than the LoRA that was asked for: no larger one is counted.
        """
        asked = json.loads(self.info.get("lora") or "{}").get("r")
        ranks = ((min(update.rank, asked or update.rank), update.shape) for update in self.modules.values())
        return sum(rank * sum(shape) for rank, shape in ranks)


def canonical_update(b_NR: Tensor, a_RD: Tensor, scale: float) -> ModuleUpdate:
    """Fold the scale in and remove the gauge: thin QR of B and Aᵀ, SVD of the R×R core.

    Args:
        b_NR, a_RD: PEFT's lora_B and lora_A, any float type.
        scale: alpha/r, or alpha/√r with rsLoRA.

    Returns:
        U·diag(σ)·Vᵀ = scale·B·A to float32 rounding; computed in float64. It has its gauge, unless R is larger than
        N or D: then B or A has directions that do not reach ΔW.

    Cost:
        O((N+D)·R²).
    """
    b_NR, a_RD = scale * b_NR.double(), a_RD.double()
    q_out_NR, r_out_RR = torch.linalg.qr(b_NR)
    q_in_DR, r_in_RR = torch.linalg.qr(a_RD.T)
    u_RR, sigma_R, vt_RR = torch.linalg.svd(r_out_RR @ r_in_RR.T, full_matrices=False)
    parts = [q_out_NR @ u_RR, sigma_R, q_in_DR @ vt_RR.T]
    if len(sigma_R) == len(a_RD):
        parts += [u_RR.T @ r_out_RR, r_in_RR.T @ vt_RR.T]
    return ModuleUpdate(*(part.float().contiguous() for part in parts))


def coefficients_in_foundation(module: str, update: ModuleUpdate) -> tuple[Tensor, Tensor]:
    """E (K×R) and F (K×R), float32, with ΔW = P·E·Fᵀ·Qᵀ in the update's foundation.

    Raises:
        InvalidInput: The update does not lie there.
    """
    p_NK, q_DK = foundation(module, update.shape, update.foundation)
    if update.gauge_out_RR is None:
        left_NR, right_DR = update.u_NR.double() * update.sigma_R.double(), update.v_DR.double()
    else:
        left_NR, right_RD = update.raw()
        right_DR = right_RD.T
    e_KR, f_KR = p_NK.double().T @ left_NR, q_DK.double().T @ right_DR
    whole, inside = update.energy, float(((e_KR.T @ e_KR) * (f_KR.T @ f_KR)).sum())
    if not inside >= (1 - OUTSIDE_MAX) * whole:
        missing = f"{1 - inside / whole:.2g} of its energy is outside"
        raise InvalidInput(f"is said to lie in a foundation of {update.foundation} directions, but {missing}", module)
    return e_KR.float(), f_KR.float()


def update_in_foundation(
    module: str, shape: tuple[int, int], directions: int, e_KR: Tensor, f_KR: Tensor
) -> ModuleUpdate:
    """P·E·Fᵀ·Qᵀ in canonical form, with its gauge: the inverse of `coefficients_in_foundation`."""
    p_NK, q_DK = foundation(module, shape, directions)
    update = canonical_update(p_NK.double() @ e_KR.double(), (q_DK.double() @ f_KR.double()).T, 1.0)
    return replace(update, foundation=directions)


# An update in a file: of an adapter, or of a task's private parts


def update_tensors(module: str, update: ModuleUpdate) -> dict[str, Tensor]:
    """Its tensors by their names in a file: coefficients, if it lies in the foundation."""
    if not update.foundation:
        return _parts(update)
    e_KR, f_KR = coefficients_in_foundation(module, update)
    return {"e": e_KR, "f": f_KR}


def foundation_facts(updates: Mapping[str, ModuleUpdate]) -> dict[str, Any]:
    """What the head of a file must say of the modules that are kept as coefficients; nothing if there are none."""
    modules = {name: (*u.shape, u.foundation) for name, u in sorted(updates.items()) if u.foundation}
    return {"foundation": {"source": SOURCE, "modules": modules}} if modules else {}


def update_from_tensors(
    module: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], where: str
) -> ModuleUpdate:
    """What `update_tensors` wrote.

    Args:
        facts: Head of the file, with what `foundation_facts` gave.

    Raises:
        Corrupt: The foundation was made in another way, or the coefficients do not fit it.
    """
    written = facts.get("foundation")
    if written is None or module not in written["modules"]:
        gauges = (tensors.get(part) for part in ("gauge_out", "gauge_in"))
        return ModuleUpdate(tensors["u"], tensors["sigma"], tensors["v"], *gauges)
    if written["source"] != SOURCE:
        raise Corrupt(f"has a foundation made by {written['source']!r}, this code makes {SOURCE!r}", where)
    n, d, directions = written["modules"][module]
    shapes = [tuple(tensors[part].shape) for part in ("e", "f")]
    ranks = foundation_ranks((n, d), directions)
    if [shape[:1] for shape in shapes] != [(k,) for k in ranks] or len({shape[1:] for shape in shapes}) != 1:
        raise Corrupt(f"has coefficients of {shapes} in a foundation of {ranks} directions", f"{where} {module}")
    return update_in_foundation(module, (n, d), directions, tensors["e"], tensors["f"])


def check_adapter(adapter: Adapter) -> None:
    """Refuse an adapter that cannot be merged.

    Raises:
        InvalidInput: No modules, names that no file could hold, shapes that do not fit, a type other than float32, NaN,
            infinity or numbers above `LARGEST`, factors that are no thin SVD; the error names the module or parameter.
    """
    _check_writable(adapter)
    if not adapter.modules:
        raise InvalidInput("the adapter has no modules", todo="train it with at least one target module")
    if marked := [name for name in adapter.modules if MARK in name]:
        raise InvalidInput(f"has {MARK!r} in its name, which marks bases", marked[0], "rename the module")
    for name, update in adapter.modules.items():
        ranks = (update.u_NR.shape[1:], update.sigma_R.shape, update.v_DR.shape[1:])
        if update.u_NR.ndim != 2 or update.v_DR.ndim != 2 or len(set(ranks)) != 1:
            raise InvalidInput(f"U, σ and V do not fit together: ranks {[tuple(r) for r in ranks]}", name)
        if 0 in update.shape:
            raise InvalidInput(f"has shape {update.shape}: a weight without numbers", name, "leave the module out")
        gauges = [None if gauge is None else tuple(gauge.shape) for gauge in (update.gauge_out_RR, update.gauge_in_RR)]
        if gauges not in ([None, None], [(update.rank, update.rank)] * 2):
            raise InvalidInput(
                f"the gauge has shapes {gauges}; both must be {update.rank}×{update.rank}, or none", name
            )
    tensors = {f"{n}.{part}": t for n, u in adapter.modules.items() for part, t in _parts(u).items()}
    for name, tensor in {**tensors, **adapter.head}.items():
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidInput("has NaN or infinite values", name, "train again, with a lower learning rate")
        if name in tensors and tensor.dtype != torch.float32:
            raise InvalidInput(f"is {tensor.dtype}, an update is torch.float32", name, "convert it")
        if name in tensors and bool((tensor.abs() > LARGEST).any()):
            raise InvalidInput(f"has values above {LARGEST:.0e}", name, "train again, with a lower learning rate")
    for name, update in adapter.modules.items():
        if bool((update.sigma_R < 0).any()):
            raise InvalidInput("has negative singular values", name, "make it with `canonical_update`")
        for factor in (update.u_NR, update.v_DR):
            # A vector with σ = 0 may have any length: it adds nothing to ΔW.
            lengths_R = torch.linalg.vector_norm(factor.double(), dim=0)[update.sigma_R > 0]
            if bool(((lengths_R - 1).abs() > UNIT_TOLERANCE).any()):
                raise InvalidInput("has singular vectors not of length 1", name, "make it with `canonical_update`")


def adapter_to_bytes(adapter: Adapter) -> bytes:
    """Serialise as safetensors; the same adapter gives the same bytes.

    Raises:
        InvalidInput: A name that no file could hold, or a tensor that is not dense.
    """
    return bytes(save_safetensors(*_written(adapter)))


def adapter_to_file(adapter: Adapter, path: Path) -> None:
    """The bytes of `adapter_to_bytes` as a new file; they are not in memory."""
    tensors, facts = _written(adapter)
    save_safetensors_file(tensors, path, facts)


def adapter_from_bytes(content: bytes, where: str = "adapter", head_only: bool = False) -> Adapter:
    """Read what `adapter_to_bytes` wrote, and check it.

    Args:
        head_only: Whether the bytes are what is kept of an adapter that was given up: head and facts, no modules.

    Raises:
        Corrupt: The bytes are no safetensors file or no adapter.
        InvalidInput: See `check_adapter`.
    """
    try:
        tensors = load_safetensors(content)
        size = int.from_bytes(content[:8], "little")
        header = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["onebasis"])
        found, base_model, base_sha256 = header["format"], str(header["base_model"]), str(header["base_sha256"])
        info = {str(name): str(value) for name, value in header["info"].items()}
        parts: dict[str, dict[str, Tensor]] = {}
        for key in (key for key in tensors if key.startswith("module/")):
            _, name, part = key.split("/", 2)
            parts.setdefault(name, {})[part] = tensors[key]
        modules = {name: update_from_tensors(name, parts[name], header, where) for name in sorted(parts)}
    except (SafetensorError, LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise Corrupt(f"is not an adapter file: {error}", where) from error
    if found not in (FORMAT, FORMAT_WITH_FOUNDATION):
        raise Corrupt(f"has format {found!r}, this code reads {FORMAT!r} and {FORMAT_WITH_FOUNDATION!r}", where)
    head = {key.removeprefix("head/"): tensor for key, tensor in tensors.items() if key.startswith("head/")}
    adapter = Adapter(base_model, base_sha256, modules, head, info)
    if not head_only:
        check_adapter(adapter)
    return adapter


def _written(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header's facts of an adapter's file."""
    _check_writable(adapter)
    tensors = {
        f"module/{name}/{part}": tensor
        for name, update in sorted(adapter.modules.items())
        for part, tensor in update_tensors(name, update).items()
    }
    tensors |= {f"head/{name}": tensor.contiguous() for name, tensor in sorted(adapter.head.items())}
    inside = foundation_facts(adapter.modules)
    header = {
        "format": FORMAT_WITH_FOUNDATION if inside else FORMAT,
        "base_model": adapter.base_model,
        "base_sha256": adapter.base_sha256,
    } | inside
    owned: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():  # safetensors refuses tensors that share memory
        place = tensor.untyped_storage().data_ptr()
        owned[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    # One header value: safetensors writes several in hash order, which differs from process to process.
    return owned, {"onebasis": json.dumps(header | {"info": dict(adapter.info)}, sort_keys=True)}


def _check_writable(adapter: Adapter) -> None:
    """Check that the adapter can be written, and be read again as the same."""
    for name in (*adapter.modules, *adapter.head):
        if not name or not name.isprintable() or len(name) > NAME_MAX or (name in adapter.modules and "/" in name):
            raise InvalidInput(
                f"{name[:80]!r} cannot be the name of a module or parameter",
                todo=f"use up to {NAME_MAX} printable characters, for a module without '/'",
            )
    tensors = {f"{n}.{part}": t for n, u in adapter.modules.items() for part, t in _parts(u).items()}
    for name, tensor in {**tensors, **adapter.head}.items():
        if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized or tensor.is_meta:
            raise InvalidInput("is not a dense tensor of real numbers that are there", name, "convert it")


def _parts(update: ModuleUpdate) -> dict[str, Tensor]:
    parts = {"u": update.u_NR, "sigma": update.sigma_R, "v": update.v_DR}
    gauges = {"gauge_out": update.gauge_out_RR, "gauge_in": update.gauge_in_RR}
    return parts | {name: gauge for name, gauge in gauges.items() if gauge is not None}

"""The tasks of one version, answering together: rows of a thousand tasks in one batch, through one base model.

The layers that all tasks share see one batch (mixed_layers.py). What a task has after the backbone, its head, sees its
own rows: the same forward pass as transformers', around a backbone that has answered already. A few tasks cannot be
mixed: those whose own parameters lie inside the backbone, or that adapt a layer after it. They are answered one by one,
and nobody notices but the clock. Where pictures are compared with texts (two_towers.py) a task's head is what its text
tower says of its labels: that is asked once.

Axes: S rows of a batch.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import InvalidInput
from configs.task_spec import CLASSIFICATION_KINDS, HEADLESS_KINDS, IMAGE_KINDS, Kind, TaskSpec
from subspace_store.merging.basis import ModuleBasis
from subspace_store.module_names import plain
from subspace_store.subspace_reader import SubspaceReader, TaskParts
from workers.base_model import BaseModel
from workers.evaluation import ROWS_PER_BATCH, adapted_model, batches_by_length, on_device
from workers.features import images
from workers.model_folder import AUTO_CLASSES
from workers.rows.reading import read_as
from workers.rows.task_data import CompletionRow, ImageRow, Row, TextRow
from workers.serving.mixed_layers import Batch, Directions, MixedLayers, TaskFactors
from workers.serving.question import GREEDY, Answer, Piece, Wanted, Writing, always
from workers.serving.running_batch import RunningBatch
from workers.serving.task_file import TaskFile
from workers.serving.writing import Pen
from workers.tokens import measured_prompt, text_lengths, tokenize
from workers.truncation import losses, unknown_characters
from workers.two_towers import prompt_tokens

log = logging.getLogger("onebasis.serving")

Said = Answer | Exception
"""What becomes of a row."""
TASKS_BYTES = 2**28
"""Bytes of tasks that are held in memory for each version; those that were asked for last stay. All that were ever
asked for are in a file that is mapped: on a CPU their coefficients, private parts and heads count nothing."""
PARTS = tuple(field.name for field in fields(TaskFactors))
TENSOR_BYTES, TASK_BYTES = 2**10, 2**13
"""Bytes of a tensor in Python, wherever its numbers lie, and of a task's description: measured."""
LABELS = "labels"
"""In the place of a head: the vectors of a task's labels, where pictures are compared with texts."""
MODELS_APART = 4
"""Models kept for tasks that cannot be mixed."""


@dataclass(frozen=True)
class Asked:
    """One row for one task."""

    task_id: str
    row: Row
    """Its label, or its last turn, is not looked at."""
    writing: Writing = GREEDY
    """How a language model is to write the answer."""
    wrote: Callable[[Piece], None] | None = None
    """Takes the answer of a language model piece by piece."""
    wanted: Wanted = always
    """Whether anybody still waits for the answer of a language model: asked after every token; where nobody does, it is
    written no further."""


def _as_it_says(parts: TaskParts) -> TaskSpec:
    return read_as(parts.kept.info, parts.kept.base_model, parts.name)


@dataclass(frozen=True)
class _Loaded:
    """A task in memory."""

    spec: TaskSpec
    factors: Mapping[str, TaskFactors]
    """By module."""
    head: Mapping[str, Tensor]
    """Parameters after the backbone, by their names; none of a language model. Where pictures are compared with texts,
    the vectors of its labels."""
    is_apart: bool
    """Whether it cannot be mixed with others."""
    is_mapped: bool = False
    """Whether its tensors lie in a file."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by names of their own."""
        parts = {f"{name}/{part}": getattr(one, part) for name, one in self.factors.items() for part in PARTS}
        return parts | {f"/{name}": tensor for name, tensor in self.head.items()}

    @cached_property
    def bytes(self) -> int:
        """In memory."""
        sizes = (0 if self.is_mapped else tensor.nbytes for tensor in self.tensors.values())
        count = sum(tensor.numel() > 0 for tensor in self.tensors.values())  # empty ones are the same for all tasks
        return TASK_BYTES + TENSOR_BYTES * count + sum(sizes)

    @staticmethod
    def of(spec: TaskSpec, is_apart: bool, tensors: Mapping[str, Tensor], device: torch.device) -> _Loaded:
        """A task whose tensors, as `tensors` names them, are in a mapped file."""
        head, modules = dict[str, Tensor](), dict[str, dict[str, Tensor]]()
        for name, tensor in tensors.items():
            module, _, part = name.rpartition("/")
            tensor = tensor.to(device) if tensor.numel() else _empty(tensor.shape, tensor.dtype, device)
            (modules.setdefault(module, {}) if module else head)[part] = tensor
        factors = {module: TaskFactors(**parts) for module, parts in modules.items()}
        return _Loaded(spec, factors, head, is_apart, device.type == "cpu")


@lru_cache(maxsize=2**10)
def _empty(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


class MixedBatch:
    """Answers for all tasks of one version. One caller at a time: rows share the model.

    Args:
        base: Loaded once; its weights are shared, never changed.
        store: Reader of the base model's subspace.
        version: The version that answers.
        spec_of: What a task's rows are read by, from its head and facts and its title; default: what its adapter says.
        between_batches: Called before every batch, and before every token that is written; may raise to stop all.
        rows_max: Rows whose texts are written at once.
    """

    def __init__(
        self,
        base: BaseModel,
        store: SubspaceReader,
        version: int,
        spec_of: Callable[[TaskParts], TaskSpec] = _as_it_says,
        between_batches: Callable[[], None] = lambda: None,
        tasks_bytes: int = TASKS_BYTES,
        rows_max: int = ROWS_PER_BATCH,
    ) -> None:
        self.version = version
        self._base, self._store, self._spec_of, self._between = base, store, spec_of, between_batches
        self._tasks_bytes, self._rows_max = tasks_bytes, rows_max
        self._bases: dict[str, ModuleBasis] = store.basis(version)
        self._models: dict[Any, _SharedModel] = {}
        self._tasks: OrderedDict[str, _Loaded] = OrderedDict()
        self._bytes = 0
        self._file = TaskFile()
        self._fetched: dict[str, TaskParts] = {}
        self._apart: OrderedDict[str, Any] = OrderedDict()
        self._running: dict[str, RunningBatch] = {}
        """What is being written: by the model that all share, "", and by those of tasks that cannot be mixed."""

    @property
    def bytes_of_tasks(self) -> int:
        """Bytes of the tasks that are in memory, the bases and what is mapped not counted."""
        return self._bytes

    @property
    def bytes_in_file(self) -> int:
        """Bytes of all tasks that were ever asked for, in the file that is mapped."""
        return self._file.bytes

    @property
    def tasks(self) -> tuple[str, ...]:
        """Ids of the tasks that are in memory, those asked for last at the end."""
        return tuple(self._tasks)

    def fetch(self, task_id: str) -> None:
        """Read a task's files before it is asked for. May be called from another thread, before the first answer."""
        self._fetched[task_id] = self._store.parts(task_id, self.version)

    def spec(self, task_id: str) -> TaskSpec:
        """What a task's rows are read by.

        Raises:
            NotFound: The version does not hold the task.
        """
        return self._task(task_id).spec

    def is_mixed(self, task_id: str) -> bool:
        """Whether a task shares batches with others; else it has a model of its own. Raises as `answer`."""
        return not self._task(task_id).is_apart

    def backbone(self, task_id: str) -> Any:
        """The base model without a head and without any update, as it is loaded for a task's kind."""
        return getattr(self._model(self._task(task_id).spec).model, self._base.prefix)

    def energies(self, texts: Sequence[str], task_ids: Sequence[str], length_max: int) -> Tensor:
        """S×I: how much each task's update changes the layers of a text, Σ‖ΔW_i·x‖² over its tokens and all layers that
        it adapts, relative to ‖ΔW_i‖². In the common basis: ‖E_i·F_iᵀ·Qᵀx‖, and the private part's beside it.

        Cost:
            A pass of the base model, and thin products for each task.
        """
        tokenizer, found = self._base.tokenizer, torch.zeros(len(texts), len(task_ids), dtype=torch.float64)
        batch = dict(tokenizer(list(texts), truncation=True, max_length=length_max, padding=True, return_tensors="pt"))
        kinds: dict[Any, list[int]] = {}
        for place, task_id in enumerate(task_ids):
            kinds.setdefault(AUTO_CLASSES[self._task(task_id).spec.kind], []).append(place)
        for places in kinds.values():
            tasks = [self._task(task_ids[place]) for place in places]
            found[:, places] = self._model(tasks[0].spec).energies(batch, [task.factors for task in tasks])
        return found

    def outputs(self, asked: Sequence[Asked]) -> list[Tensor]:
        """Each row's outputs, of tasks that share batches and write no texts. Raises what is wrong with a row."""
        loaded = {one.task_id: self._task(one.task_id) for one in asked}
        tasks = [loaded[one.task_id] for one in asked]
        found = self._outputs(self._model(tasks[0].spec), asked, tasks)
        self._forget()
        for output in found:
            if isinstance(output, Exception):
                raise output
        return [output[0] for output in found if not isinstance(output, Exception)]

    def answer(self, asked: Sequence[Asked]) -> list[Answer]:
        """Answers in the order of the rows, once all are there. Costs as `begin`, and raises what became of a row."""
        found: dict[int, Said] = {}
        self.begin(asked, found.__setitem__)
        while self.is_writing:
            self.step()
        answers = []
        for place in range(len(asked)):
            if isinstance(said := found[place], Exception):
                raise said
            answers.append(said)
        return answers

    def begin(self, asked: Sequence[Asked], done: Callable[[int, Said], None]) -> None:
        """Answer rows, each as soon as it can be. Rows of one kind go through the model together, short ones first;
        texts are written by `step`, each row beside those that are written already.

        Args:
            done: Called once with the place of each row, and its answer or why there is none, which costs no other row:
                NotFound, the version does not hold its task; InvalidInput, the task's head is not whole, the row is not
                of its kind, a prompt has no room, or the model's output for it is no number; or what a pass of the
                model raised for this row alone.

        Raises:
            Exception: What `between_batches` raises.

        Cost:
            A pass of the base model, thin products beside each adapted layer, and for each task its head. A task that
            is not in memory is read: a file or two, and 30 ms. Rows whose pass fails go through it again in halves.
        """
        found: dict[int, Said] = {}
        groups: dict[tuple[Any, str], list[tuple[int, _Loaded]]] = {}
        loaded: dict[str, _Loaded | Exception] = {}
        for place, one in enumerate(asked):
            try:
                if one.task_id not in loaded:
                    loaded[one.task_id] = self._task(one.task_id)
            except Exception as error:
                loaded[one.task_id] = error
            if isinstance(task := loaded[one.task_id], Exception):
                found[place] = task
            elif wrong := _wrong(one, task.spec):
                found[place] = wrong
            else:
                key = (AUTO_CLASSES[task.spec.kind], one.task_id if task.is_apart else "")
                groups.setdefault(key, []).append((place, task))
        for (_, alone), rows in groups.items():
            places, tasks = [place for place, _ in rows], [task for _, task in rows]
            some = [asked[place] for place in places]
            if tasks[0].spec.kind == "causal_lm":
                found |= self._begun(alone, places, some, tasks, done)
                continue
            try:
                model = self._model_apart(alone, tasks[0]) if alone else self._model(tasks[0].spec)
            except Exception as error:
                found |= dict.fromkeys(places, error)
                continue
            found |= dict(zip(places, self._predicted(model, some, tasks), strict=True))
        self._forget()
        for place, said in found.items():
            done(place, said)

    @property
    def is_writing(self) -> bool:
        """Whether there is anything for `step` to do."""
        return bool(self._running)

    def step(self) -> None:
        """Write a token of every row that has been begun."""
        over: dict[Pen, Exception | None] = {}
        for alone, running in list(self._running.items()):
            over |= running.step()
            if not running.pens:
                del self._running[alone]
        for pen, went_wrong in over.items():
            pen.done(went_wrong)

    # What passes through the model

    def _predicted(self, model: _Model, asked: Sequence[Asked], tasks: Sequence[_Loaded]) -> list[Said]:
        found: list[Said] = []
        for one, task, output in zip(asked, tasks, self._outputs(model, asked, tasks), strict=True):
            try:
                if isinstance(output, Exception):
                    raise output
                logits_L, warning = output
                found.append(replace(self._said(one, task.spec, logits_L.float()), warning=warning))
            except Exception as error:
                found.append(error)
        return found

    def _outputs(
        self, model: _Model, asked: Sequence[Asked], tasks: Sequence[_Loaded]
    ) -> list[tuple[Tensor, str] | Exception]:
        """Each row's outputs, and what of it is not read; or why there are none."""
        try:
            encoded, warnings = _encoded(self._base, asked, [task.spec for task in tasks])
        except Exception as error:
            if len(asked) == 1:
                return [error]
            return [self._outputs(model, [one], [task])[0] for one, task in zip(asked, tasks, strict=True)]
        found: dict[int, tuple[Tensor, str] | Exception] = {}
        batches = deque(batches_by_length([size for _, size in encoded]))
        while batches:
            chosen = batches.popleft()
            self._between()
            try:
                batch = _padded(self._base, [encoded[i][0] for i in chosen], tasks[chosen[0]].spec.kind)
                with torch.inference_mode():
                    logits = model.logits(batch, [tasks[i] for i in chosen])
            except Exception as error:
                if len(chosen) == 1:
                    found[chosen[0]] = error.with_traceback(None)  # whose frames hold all that the pass had made
                    continue
                log.warning("a pass of %d rows failed: %s: %.300s", len(chosen), type(error).__name__, error)
                batches.extendleft((chosen[len(chosen) // 2 :], chosen[: len(chosen) // 2]))
            else:
                found |= {i: (one, warnings[i]) for i, one in zip(chosen, logits, strict=True)}
        return [found[place] for place in range(len(asked))]

    def _begun(
        self,
        alone: str,
        places: Sequence[int],
        asked: Sequence[Asked],
        tasks: Sequence[_Loaded],
        done: Callable[[int, Said], None],
    ) -> dict[int, Exception]:
        """Have rows written; returns why some cannot be, by their places."""
        pens, failed = list[Pen](), dict[int, Exception]()
        for place, one, task in zip(places, asked, tasks, strict=True):
            try:
                pens.append(self._pen(place, one, task, done))
            except Exception as error:
                failed[place] = error
        if pens:
            try:
                self._running_batch(alone, tasks[0]).add(pens)
            except Exception as error:
                failed |= {place: error for place in places if place not in failed}
        return failed

    def _said(self, asked: Asked, spec: TaskSpec, logits_L: Tensor) -> Answer:
        if not bool(logits_L.isfinite().all()):
            raise InvalidInput("the model's output is no number", asked.task_id, "see how the task was trained")
        answer = Answer(asked.task_id, self.version)
        if spec.kind == "image_regression":
            return replace(answer, values=dict(zip(spec.data.label_names, logits_L.tolist(), strict=True)))
        if spec.kind not in CLASSIFICATION_KINDS:
            return replace(answer, value=float(logits_L.squeeze()))
        of_labels = dict(zip(spec.data.label_names, logits_L.softmax(dim=-1).tolist(), strict=True))
        return replace(answer, label=max(of_labels, key=lambda label: of_labels[label]), probabilities=of_labels)

    def _running_batch(self, alone: str, task: _Loaded) -> RunningBatch:
        """Where a task's rows are written. alone: Its id where it cannot be mixed, else empty."""
        if alone not in self._running:
            model = self._model_apart(alone, task) if alone else self._model(task.spec)
            pad_id = self._base.tokenizer.pad_token_id
            self._running[alone] = RunningBatch(model, pad_id, self._between, self._rows_max)
        return self._running[alone]

    def _pen(self, place: int, asked: Asked, task: _Loaded, done: Callable[[int, Said], None]) -> Pen:
        """What writes a row's answer."""
        assert isinstance(asked.row, CompletionRow)
        data = task.spec.data
        wanted, positions = asked.writing.new_tokens, self._base.length_max
        limit = data.max_new_tokens
        if limit >= positions:  # that of a task without generated scores was never held against the model's positions
            limit = positions // 2
        # An answer of the task's own length has its room, as in scores; a longer one takes nothing of the prompt.
        longest = min(data.max_length, positions - min(limit, wanted or limit))
        prompt, length = measured_prompt(self._base.tokenizer, asked.row, longest)
        limit = min(wanted or limit, positions - len(prompt))
        warnings = [*unknown_characters([length], "of 1 prompts")]
        if length.given > longest:
            warnings.append(f"the prompt has {length.given} tokens, and its last {longest} are read")

        def over(error: Exception | None) -> None:
            answer = Answer(
                asked.task_id,
                self.version,
                text=pen.text,
                tokens=len(pen.ids),
                prompt_tokens=len(prompt),
                ended=pen.ended,
                warning="; ".join(warnings),
            )
            done(place, answer if error is None else error)

        tell = asked.wrote
        wrote = None if tell is None else lambda text: tell(Piece(text, self.version))
        pen = Pen(self._base.tokenizer, prompt, asked.writing, limit, over, task, wrote, asked.wanted, asked.task_id)
        return pen

    # What is in memory

    def _model(self, spec: TaskSpec) -> _SharedModel:
        """The model that rows of this kind share."""
        made = AUTO_CLASSES[spec.kind]
        if made not in self._models:
            self._models[made] = _SharedModel(self._base, spec, self._bases)
        return self._models[made]

    def _model_apart(self, task_id: str, task: _Loaded) -> _Model:
        if task_id not in self._apart:
            adapter = self._store.adapter(task_id, self.version)
            self._apart[task_id] = _Model(adapted_model(self._base, adapter, task.spec).eval())
        self._apart.move_to_end(task_id)
        while len(self._apart) > MODELS_APART:
            self._apart.popitem(last=False)
        return self._apart[task_id]  # type: ignore[no-any-return]

    def _task(self, task_id: str) -> _Loaded:
        if task_id in self._tasks:
            self._tasks.move_to_end(task_id)
            return self._tasks[task_id]
        task = self._read(task_id) or self._first_read(task_id)
        self._tasks[task_id] = task
        self._bytes += task.bytes
        return task

    def _first_read(self, task_id: str) -> _Loaded:
        parts = self._fetched.pop(task_id, None) or self._store.parts(task_id, self.version)
        spec = self._spec_of(parts)
        model = self._model(spec)
        modules = {*parts.private, *map(plain, parts.coefficients)}
        is_headless = spec.kind in HEADLESS_KINDS  # answers by the base model's layers; what it brings is its own
        is_own = bool(parts.kept.head) if is_headless else self._base.is_inside_backbone(spec, parts.kept)
        is_apart = is_own or not modules <= model.layers.keys()
        head = {} if is_apart or is_headless else self._base.head(spec, parts.kept)
        factors = {} if is_apart else {name: _factors(name, parts, model) for name in sorted(modules)}
        task = _Loaded(spec, factors, head, is_apart)
        if spec.kind == "image_text" and not is_apart:
            task = replace(task, head={LABELS: model.label_vectors(task)})
        try:
            self._file.write(task_id, (spec, is_apart), task.tensors)
        except OSError as error:
            log.warning("%s stays in memory: its file has no room: %s", task_id, error)
            return task
        return self._read(task_id) or task

    def _read(self, task_id: str) -> _Loaded | None:
        """A task that has been asked for before."""
        if (kept := self._file.read(task_id)) is None:
            return None
        (spec, is_apart), tensors = kept
        return _Loaded.of(spec, is_apart, tensors, self._model(spec).model.device)

    def _forget(self) -> None:
        """Give up the tasks that nobody has asked for the longest time."""
        while self._bytes > self._tasks_bytes and len(self._tasks) > 1:
            _, task = self._tasks.popitem(last=False)
            self._bytes -= task.bytes


class _Model:
    """A model that answers for one task, which cannot be mixed. What writes with it: see `running_batch.Writer`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def together(self, tasks: Sequence[_Loaded], before: Any = None) -> Any:
        return None

    def serving(self, batch: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def logits(self, batch: Mapping[str, Tensor], tasks: Sequence[_Loaded]) -> Sequence[Tensor]:
        found: Tensor = self.model(**on_device(self.model.device, batch)).logits
        return list(found)


class _SharedModel(_Model):
    """A model whose layers serve each row with its own task."""

    def __init__(self, base: BaseModel, spec: TaskSpec, bases: Mapping[str, ModuleBasis]) -> None:
        super().__init__(base.task_model(spec).eval())
        self.model.requires_grad_(False)
        self._prefix = base.prefix
        shapes, backbone = base.module_shapes(spec.kind), f"{base.prefix}."
        self.layers = {n: s for n, s in shapes.items() if spec.kind in HEADLESS_KINDS or n.startswith(backbone)}
        self._mixed = MixedLayers(self.model, tuple(self.layers), bases)
        self._base = base
        self._heads: dict[tuple[Kind, int], Any] = {}

    @property
    def directions(self) -> Mapping[str, Directions]:
        return self._mixed.directions

    def together(self, tasks: Sequence[_Loaded], before: Batch | None = None) -> Batch:
        """Rows of these tasks; what was made for those of a batch before them is kept where it had all of them."""
        factors = {id(task.factors): task.factors for task in tasks}
        if before is None or not {id(known) for known in before.tasks} >= factors.keys():
            before = Batch(list(factors.values()), torch.zeros(0))
        places = {id(known): place for place, known in enumerate(before.tasks)}
        task_S = torch.tensor([places[id(task.factors)] for task in tasks], device=self.model.device)
        return replace(before, task_S=task_S)

    def serving(self, batch: Batch) -> AbstractContextManager[None]:
        return self._mixed.serving(batch)

    def energies(self, batch: Mapping[str, Tensor], tasks: Sequence[Mapping[str, TaskFactors]]) -> Tensor:
        """As `MixedBatch.energies`, of an encoded batch."""
        batch = on_device(self.model.device, batch)
        mask_ST1 = batch["attention_mask"].unsqueeze(-1)
        changed_SI, size_I = torch.zeros(len(mask_ST1), len(tasks)), torch.zeros(len(tasks))

        def look(name: str, x: Tensor) -> None:
            x_STD = x.reshape(len(mask_ST1), -1, x.shape[-1]).float()
            is_token_ST1 = mask_ST1 if x_STD.shape[1] == mask_ST1.shape[1] else 1.0  # a pooler sees one of each text
            directions = self.directions.get(name)
            z_STK = None if directions is None else x_STD @ directions.q_DK.float()
            for place, factors in enumerate(tasks):
                if (one := factors.get(name)) is None:
                    continue
                for inward, out, given in ((one.f_RK, one.e_RK, z_STK), (one.a_RD, one.b_RN, x_STD)):
                    if given is not None and len(out):
                        gram_RR, t_STR = (out @ out.T).float(), (given @ inward.T.float()) * is_token_ST1
                        changed_SI[:, place] += ((t_STR @ gram_RR) * t_STR).sum(dim=(1, 2)).cpu()
                        size_I[place] += (gram_RR * (inward @ inward.T).float()).sum().cpu()

        hooks = [
            self.model.get_submodule(name).register_forward_pre_hook(lambda _, given, name=name: look(name, given[0]))
            for name in self.layers
        ]
        try:
            with torch.inference_mode():
                getattr(self.model, self._prefix)(**batch)
        finally:
            for hook in hooks:
                hook.remove()
        return (changed_SI / size_I.clamp(min=torch.finfo(torch.float32).tiny)).double()

    def logits(self, batch: Mapping[str, Tensor], tasks: Sequence[_Loaded]) -> Sequence[Tensor]:
        """Each row's outputs, by its own task's head."""
        batch = on_device(self.model.device, batch)
        if tasks[0].spec.kind == "image_text":
            with self.serving(self.together(tasks)):
                vectors_SE = self.model.picture_vectors(**batch)
            return [task.head[LABELS] @ vector_E for task, vector_E in zip(tasks, vectors_SE, strict=True)]
        with self.serving(self.together(tasks)):
            hidden = getattr(self.model, self._prefix)(**batch)
        found: dict[int, Tensor] = {}
        rows: dict[int, list[int]] = {}
        for row, task in enumerate(tasks):
            rows.setdefault(id(task), []).append(row)
        for places in rows.values():
            task = tasks[places[0]]
            chosen_S = torch.tensor(places, device=self.model.device)
            shell = self._head_of(task.spec)
            shell.backbone.answer = _of_rows(hidden, chosen_S, len(tasks))
            some = {name: tensor[chosen_S] for name, tensor in batch.items()}
            out = torch.func.functional_call(shell.model, dict(task.head), kwargs=some).logits
            found |= dict(zip(places, out, strict=True))
        return [found[row] for row in range(len(tasks))]

    def label_vectors(self, task: _Loaded) -> Tensor:
        """What a task's text tower says of its labels, L×E; see `two_towers`."""
        prompts = prompt_tokens(self._base.tokenizer, task.spec, self._base.length_max)
        found = []
        with torch.inference_mode():
            for start in range(0, len(task.spec.data.label_names), ROWS_PER_BATCH):
                some = {name: tensor[start : start + ROWS_PER_BATCH] for name, tensor in prompts.items()}
                with self.serving(self.together([task] * len(some["input_ids"]))):
                    found.append(self.model.label_vectors(**some))
        return torch.cat(found)

    def _head_of(self, spec: TaskSpec) -> _Head:
        """The kind's model around a backbone that has answered already; one for each number of outputs."""
        key = (spec.kind, len(spec.data.label_names))
        if key not in self._heads:
            model = self._base.task_model(spec).eval()
            backbone = _Answered()
            setattr(model, self._prefix, backbone)
            self._heads[key] = _Head(model, backbone)
        return self._heads[key]  # type: ignore[no-any-return]


class _Answered(nn.Module):
    """In the place of a backbone: what it has said already."""

    answer: Any = None

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.answer


@dataclass(frozen=True)
class _Head:
    model: Any
    backbone: _Answered


def _of_rows(hidden: Any, chosen_S: Tensor, rows: int) -> Any:
    """A backbone's output for some of the rows."""
    kept = {name: value[chosen_S] for name, value in hidden.items() if torch.is_tensor(value) and len(value) == rows}
    return type(hidden)(**kept)


def _factors(name: str, parts: TaskParts, model: _SharedModel) -> TaskFactors:
    """What a task adds to one module, on the model's device."""
    weight = model.model.get_submodule(f"{name}.inner").weight
    device, dtype = weight.device, weight.dtype if weight.dtype.is_floating_point else torch.float32
    n, d = model.layers[name]
    directions = model.directions.get(name)
    k_out, k_in = (0, 0) if directions is None else (directions.p_NK.shape[1], directions.q_DK.shape[1])
    e_RK, f_RK = torch.zeros(0, k_out), torch.zeros(0, k_in)
    for basis in (basis for basis in parts.coefficients if plain(basis) == name):
        assert directions is not None
        e_KR, f_KR = parts.coefficients[basis]
        out, inward = directions.starts[basis]
        e_RK, f_RK = torch.zeros(e_KR.shape[1], k_out), torch.zeros(f_KR.shape[1], k_in)
        e_RK[:, out : out + len(e_KR)], f_RK[:, inward : inward + len(f_KR)] = e_KR.T, f_KR.T
    b_RN, a_RD = torch.zeros(0, n), torch.zeros(0, d)
    if (private := parts.private.get(name)) is not None:
        root_R = private.sigma_R.sqrt()  # as much in B as in A, for narrow number types
        b_RN, a_RD = (private.u_NR * root_R).T, (private.v_DR * root_R).T
    return TaskFactors(*(part.to(device, dtype).contiguous() for part in (e_RK, f_RK, b_RN, a_RD)))


ROWS_OF: Mapping[Kind, type[Row]] = {"causal_lm": CompletionRow, **dict.fromkeys(IMAGE_KINDS, ImageRow)}
"""Row that a kind is asked about; the others about a text, or two."""


def _wrong(asked: Asked, spec: TaskSpec) -> InvalidInput | None:
    """Why a row that is not of the task's kind is refused: it would be answered, and nobody could tell."""
    kind, row, expects_pair = spec.kind, asked.row, bool(spec.data.text_pair_column)
    if not isinstance(row, ROWS_OF.get(kind, TextRow)):
        return InvalidInput(f"a {kind} is not asked about a {type(row).__name__}", asked.task_id)
    if isinstance(row, TextRow) and (row.text_pair is not None) is not expects_pair:
        given = "one text" if expects_pair else "two texts"
        what = f"it was trained on {'two texts' if expects_pair else 'one text'} at a time, and is asked about {given}"
        return InvalidInput(what, asked.task_id, "ask about as many")
    return None


def _encoded(
    base: BaseModel, asked: Sequence[Asked], specs: Sequence[TaskSpec]
) -> tuple[list[tuple[Any, int]], list[str]]:
    """Each row as the tokenizer returns it, with its number of tokens, or a picture; and what of it is not read."""
    encoded: list[tuple[Any, int]] = [(one.row, 0) for one in asked]
    warnings = [""] * len(asked)
    if specs[0].kind in IMAGE_KINDS:
        return encoded, warnings
    groups: dict[tuple[int, bool], list[int]] = {}
    for place, spec in enumerate(specs):
        groups.setdefault((spec.data.max_length, bool(spec.data.text_pair_column)), []).append(place)
    for (longest, _), places in groups.items():
        spec, rows = specs[places[0]], [asked[place].row for place in places]
        found = tokenize(base.tokenizer, rows, longest + 1)
        for index, (place, length) in enumerate(
            zip(places, text_lengths(base.tokenizer, spec, found["input_ids"]), strict=True)
        ):
            features = {name: values[index] for name, values in found.items()}
            if length.given > longest:
                features = {
                    name: values[0] for name, values in tokenize(base.tokenizer, [rows[index]], longest).items()
                }
            encoded[place] = features, len(features["input_ids"])
            warnings[place] = "; ".join(losses([length], spec, "rows"))
    return encoded, warnings


def _padded(base: BaseModel, encoded: Sequence[Any], kind: Kind) -> dict[str, Tensor]:
    if kind in IMAGE_KINDS:
        return {"pixel_values": images(base.image_processor, encoded)["pixel_values"]}
    return dict(base.tokenizer.pad(list(encoded), padding_side="right", return_tensors="pt"))

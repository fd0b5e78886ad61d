// What every merge did to every task; a cell opens why.
import { useCallback, useEffect, useMemo, useState } from "preact/hooks"
import { get, inPath, Problem, save, type Json } from "./api"
import { Canvas, type Size } from "./canvas"
import { csvOf, gridOf, latexOf, ordered, type Grid, type Order } from "./grid"
import type { Around } from "./main"
import { colour, css, ink } from "./palette"
import { Dialog, Empty, Loading, say, State, Table, taskLink, Trouble, usePolled } from "./parts"
import { change, count, score } from "./words"

const LISTED = 50
const FLIPPED = 50
const SETTLED_MS = 120
const NUMBERS_TASKS = 24
const NUMBERS_VERSIONS = 40

const ORDERS: Record<Order, string> = { worst: "worst first", birth: "by birth", name: "by name" }
const SIZES: Record<Size, string> = { all: "as many as fit", small: "small", medium: "medium", numbers: "with numbers" }

export function Matrix({ status, base }: Around) {
  const main = status.base_models.find((one: Json) => one.base_model === base)?.main
  const { value, problem } = usePolled(() => get("matrix", { base_model: base }), [base, main], 0)
  const grid = useMemo(() => value && gridOf(value), [value])
  return (
    <>
      <h1>Matrix</h1>
      <p>The score of each task under each version of <code>main</code>; colours show the change since the task's birth.</p>
      <Trouble problem={problem} />
      {!grid ? !problem && <Loading /> : !grid.tasks.length ? <Empty>No version holds a task of yours yet.</Empty> : <Shown grid={grid} base={base} hidden={value.hidden?.tasks ?? 0} />}
    </>
  )
}

function Shown({ grid, base, hidden }: { grid: Grid; base: string; hidden: number }) {
  const newest = grid.versions.length - 1
  const isSmall = grid.tasks.length <= NUMBERS_TASKS && grid.versions.length <= NUMBERS_VERSIONS
  const [at, setAt] = useState<number>() // none: the newest, whichever that is by then
  const [order, setOrder] = useState<Order>("worst")
  const [size, setSize] = useState<Size>(isSmall ? "numbers" : "all")
  const [words, setWords] = useState("")
  const [cell, setCell] = useState<{ t: number; v: number }>()
  const v = Math.min(at ?? newest, newest)
  const shown = useMemo(() => ordered(grid, v, order, words), [grid, v, order, words])
  const settled = useSettled(v)
  const open = useCallback((t: number, inV: number) => setCell({ t, v: inV }), [])
  // The same element as before is not drawn anew.
  const listed = useMemo(() => <Listed grid={grid} v={settled} order={order} words={words} open={open} />, [grid, settled, order, words, open])
  const copy = async (text: string, form: string, name: string) => {
    try {
      await navigator.clipboard.writeText(text)
      say(`${count(shown.length, "task")} copied as ${form}`)
    } catch {
      save(new Blob([text], { type: "text/plain" }), name)
      say(`The browser lets no page copy here: saved as ${name} instead`)
    }
  }
  return (
    <>
      <div class="row">
        <label class="grow">
          Version {grid.versions[v]}
          <input type="range" min={0} max={newest} value={v} aria-valuetext={`version ${grid.versions[v]}`}
            onInput={(event) => setAt(Number(event.currentTarget.value) < newest ? Number(event.currentTarget.value) : undefined)} />
        </label>
        <label>Tasks <select value={order} onChange={(event) => setOrder(event.currentTarget.value as Order)}>{Object.entries(ORDERS).map(([name, text]) => <option key={name} value={name}>{text}</option>)}</select></label>
        <label>Cells <select value={size} onChange={(event) => setSize(event.currentTarget.value as Size)}>{Object.entries(SIZES).map(([name, text]) => <option key={name} value={name}>{text}</option>)}</select></label>
        <label>Find <input type="search" value={words} placeholder="team/name" onInput={(event) => setWords(event.currentTarget.value)} /></label>
        <button type="button" onClick={() => copy(csvOf(grid, shown), "CSV", "matrix.csv")}>Copy as CSV</button>
        <button type="button" onClick={() => copy(latexOf(grid, shown, base), "LaTeX", "matrix.tex")}>Copy as LaTeX</button>
      </div>
      <p class="facts">
        <span>{count(shown.length, "task")} × {count(grid.versions.length, "version")}</span>
        {hidden > 0 && <span>{count(hidden, "task")} of other teams not shown</span>}
      </p>
      <Canvas grid={grid} shown={shown} at={v} size={size} open={open} />
      {listed}
      {cell && <Why grid={grid} base={base} {...cell} close={() => setCell(undefined)} />}
    </>
  )
}

/** The value once it has stayed the same for a moment: while the slider moves, the picture follows it and the table waits. */
function useSettled(value: number): number {
  const [settled, setSettled] = useState(value)
  useEffect(() => {
    const timer = setTimeout(() => setSettled(value), SETTLED_MS)
    return () => clearTimeout(timer)
  }, [value])
  return settled
}

/** The tasks under one version as a table. */
function Listed({ grid, v, order, words, open }: { grid: Grid; v: number; order: Order; words: string; open: (t: number, v: number) => void }) {
  const shown = useMemo(() => ordered(grid, v, order, words), [grid, v, order, words])
  const row = v * grid.tasks.length
  return (
    <>
      <h2>Under version {grid.versions[v]}, {ORDERS[order]}</h2>
      <Table quiet caption={`Scores under version ${grid.versions[v]}`} heads={["Task", "Base model", "Own adapter", "At birth", "Here", "Change", "Measured", "Why"]}>
        {shown.slice(0, LISTED).map((t) => {
          const task = grid.tasks[t]
          const moved = grid.changes[row + t]!
          const shade = Number.isNaN(moved) ? undefined : colour(moved / grid.range)
          const isThere = grid.births[t]! <= v
          return (
            <tr key={task.task_id}>
              <th scope="row"><a href={taskLink(task.title)}>{task.title}</a></th>
              <td class="number">{score(task.base)}</td>
              <td class="number">{score(task.local)}</td>
              <td class="number">{score(grid.scores[grid.births[t]! * grid.tasks.length + t])}</td>
              <td class="number">{isThere ? score(grid.scores[row + t]) : "–"}</td>
              <td class="number">{!shade ? "–" : <span class="swatch" style={{ background: css(shade), color: ink(shade) }}>{change(moved)}</span>}</td>
              <td>{!isThere ? "not there yet" : grid.measured[row + t] ? "here" : "carried over"}</td>
              <td><button type="button" aria-label={`Why ${task.title}`} onClick={() => open(t, v)}>Why</button></td>
            </tr>
          )
        })}
      </Table>
      {shown.length > LISTED && <p>The first {LISTED} of {shown.length}: find others by name, or copy all as CSV.</p>}
    </>
  )
}

/** Why a cell is what it is: how far this version moved the task, what was measured, what the gate said. */
function Why({ grid, base, t, v, close }: { grid: Grid; base: string; t: number; v: number; close: () => void }) {
  const task = grid.tasks[t]
  const version = grid.versions[v]!
  const before = v > 0 ? grid.versions[v - 1]! : undefined
  const born = grid.births[t]!
  const of = (row: number) => grid.scores[row * grid.tasks.length + t]
  const cell = v * grid.tasks.length + t
  const { value, problem } = usePolled(async () => {
    const [found, diff] = await Promise.all([
      get(`versions/${version}`, { base_model: base }),
      before === undefined ? undefined : get(`diff/${before}/${version}`, { base_model: base }),
    ])
    return { found, diff }
  }, [version, before, base], 0)
  const here = value?.found.tasks.find((one: Json) => one.task_id === task.task_id)
  const drift = value?.diff?.drift_bound?.[task.task_id]
  const added: string[] = value?.found.added ?? []
  return (
    <Dialog title={`${task.title} under version ${version}`} close={close}>
      {born > v ? <p>The task was merged later, in version {task.birth}.</p> : (
        <dl>
          <dt>Score here</dt>
          <dd>{score(of(v))}, {grid.measured[cell] ? `measured on ${here?.rows ?? task.rows ?? "its"} rows` : `carried over${here?.measured_at != null ? ` from version ${here.measured_at}` : ""}: the versions since moved the task too little to change it`}</dd>
          <dt>Since birth</dt>
          <dd>{change(grid.changes[cell]!)}, from {score(of(born))} in version {task.birth}</dd>
          {v > born && <><dt>Since the version before</dt><dd>{change((of(v) ?? NaN) - (of(v - 1) ?? NaN))}, from {score(of(v - 1))} in version {before}</dd></>}
          <dt>Own adapter, base model</dt>
          <dd>{score(task.local)}, {score(task.base)}{task.metric && ` (${task.metric})`}</dd>
          <dt>Drift</dt>
          <dd>{drift !== undefined ? `at most ${Number(drift).toExponential(2)} of its update's norm, from version ${before} to ${version}` : v === born ? "none: it was merged here" : value ? "not known" : "…"}</dd>
          {here && <><dt>Error</dt><dd>{here.error.toExponential(2)} here, {here.error_at_birth.toExponential(2)} at birth</dd></>}
        </dl>
      )}
      <Trouble problem={problem} />
      {!value ? !problem && <Loading /> : (
        <dl>
          <dt>Verdict on version {version}</dt>
          <dd><State of={value.found.status} /> {value.found.reason || (value.found.status === "published" && "the gate let it pass")}</dd>
          <dt>It brought</dt>
          <dd>{added.length ? added.map((title) => <a key={title} href={taskLink(title)}>{title} </a>) : "no task that you see"}</dd>
        </dl>
      )}
      {born <= v && <Flipped task={task} version={version} />}
      <p><a href={taskLink(task.title)}>The life of {task.title}</a></p>
    </Dialog>
  )
}

/** The rows that this version answers otherwise than the one that the gate compares with. */
function Flipped({ task, version }: { task: Json; version: number }) {
  const { value, problem } = usePolled(() => get(`flipped/${inPath(task.task_id)}`, { version, limit: FLIPPED }), [task.task_id, version], 0)
  const isRight = ["accuracy", "exact_match"].includes(value?.metric)
  const got = (share: number) => (isRight ? (share > 0.5 ? "right" : "wrong") : score(share))
  return (
    <>
      <h3>Rows that flipped</h3>
      {problem && <p class="empty">{problem instanceof Problem && problem.status === 404 ? `${problem.what}: ${problem.todo}` : problem.message}</p>}
      {!value ? !problem && <Loading /> : (
        <>
          <p>
            Against {value.against ? `version ${value.against}` : "its own adapter"}{value.measured_at !== version && `, as measured under version ${value.measured_at}`}:
            {" "}{value.worse} of {count(value.rows, "row")} worse, {value.better} better; {change(value.mean)} in the mean{value.low !== null && `, 95 % interval ${change(value.low)} to ${change(value.high)}`}.
          </p>
          {value.flipped.length > 0 && (
            <Table quiet caption="Rows that flipped" heads={["Row", "It says", "Expected", "Before", "Here"]}>
              {value.flipped.map((one: Json) => (
                <tr key={one.row}>
                  <th scope="row" class="number">{one.row + 1}</th>
                  <td class="about">{one.inputs ? saidIn(one.inputs) : "not kept as text"}</td>
                  <td class="about">{one.expected ?? "–"}</td>
                  <td class="number">{got(one.before)}</td>
                  <td class="number">{got(one.after)}</td>
                </tr>
              ))}
            </Table>
          )}
          {value.worse + value.better > value.flipped.length && <p>The {value.flipped.length} that changed most are shown.</p>}
        </>
      )}
    </>
  )
}

/** A row's inputs as one text. */
function saidIn(inputs: Json): string {
  if (inputs.messages) return inputs.messages.map((turn: Json) => `${turn.role}: ${turn.content}`).join("\n")
  return inputs.prompt ?? [inputs.text, inputs.text_pair].filter((text) => text !== undefined).join(" / ")
}

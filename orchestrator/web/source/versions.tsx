// The versions with their branches, tags and verdicts; what lies between two; moving main, refusing what waits and removing
// a task, after a look at what it would do; who moved main, and why; what is stored.
import { useMemo, useState } from "preact/hooks"
import { get, may, post, type Json } from "./api"
import type { Around } from "./main"
import { Act, Dialog, Empty, Loading, State, Table, taskLink, Trouble, usePolled } from "./parts"
import { bytes, change, clock, count, seconds } from "./words"

const REREAD_MS = 10_000
const MOVES = 20

/** Where lines run beside the list, newest version first: main's history in lane 0. */
export interface Lanes {
  own: number
  above: number[]
  below: number[]
  joins: number[]
}

export function lanesOf(versions: Json[], main: number): Map<number, Lanes> {
  const lanes: (number | null)[] = [main]
  let isStarted = false
  const found = new Map<number, Lanes>()
  for (const { version, parent } of [...versions].reverse()) {
    const above = lanes.flatMap((next, lane) => (next !== null && (lane > 0 || isStarted) ? [lane] : []))
    const mine = lanes.flatMap((next, lane) => (next === version ? [lane] : []))
    let own = mine[0]
    if (own === undefined) {
      own = lanes.indexOf(null, 1)
      if (own < 0) own = lanes.length
    }
    if (own === 0) isStarted = true
    for (const lane of mine) lanes[lane] = null
    lanes[own] = parent
    const below = lanes.flatMap((next, lane) => (next !== null && (lane > 0 || isStarted) ? [lane] : []))
    found.set(version, { own, above, below, joins: mine.slice(1) })
  }
  return found
}

const STEP = 16

function Rail({ lanes, isMain }: { lanes: Lanes; isMain: boolean }) {
  const x = (lane: number) => `${8 + lane * STEP}px`
  return (
    <td class="rail" aria-hidden="true">
      {lanes.above.map((lane) => <i key={`a${lane}`} class="line above" style={{ left: x(lane) }} />)}
      {lanes.below.map((lane) => <i key={`b${lane}`} class="line below" style={{ left: x(lane) }} />)}
      {lanes.joins.map((lane) => <i key={`j${lane}`} class="join" style={{ left: x(lanes.own), width: `${(lane - lanes.own) * STEP}px` }} />)}
      <i class={isMain ? "dot main" : "dot"} style={{ left: x(lanes.own) }} />
    </td>
  )
}

const names = (titles: string[]) => titles.map((title) => <a key={title} href={taskLink(title)}>{title} </a>)

export function Versions({ me, status, base, again }: Around) {
  const of = status.base_models.find((one: Json) => one.base_model === base)
  const { value, problem, again: reread } = usePolled(() => get("versions", { base_model: base }), [base, of?.main, of?.candidate], REREAD_MS)
  const [target, setTarget] = useState<number>()
  const [chosen, setChosen] = useState<number[]>([])
  const [isCompared, setCompared] = useState(false)
  const [refused, setRefused] = useState<number>()
  const versions: Json[] = value ?? []
  const lanes = useMemo(() => lanesOf(versions, of?.main ?? 0), [value, of?.main])
  const width = 16 + STEP * Math.max(1, ...[...lanes.values()].map((row) => Math.max(row.own, ...row.above, ...row.below) + 1))
  const toggle = (number: number) => setChosen((before) => (before.includes(number) ? before.filter((one) => one !== number) : [...before, number].slice(-2)))
  const moved = () => {
    setTarget(undefined)
    setRefused(undefined)
    again()
    reread()
  }
  const mayMove = may(me, "maintainer")
  return (
    <>
      <h1>Versions</h1>
      <p class="facts">
        <span>main is version {of?.main ?? "?"}</span>
        <span>candidate is version {of?.candidate ?? "?"}</span>
        {of?.held && <span>main is held by {of.held.actor}: {of.held.reason || "no reason given"}</span>}
        {of?.footprint && <span>{count(of.footprint.tasks, "task")} in {bytes(of.footprint.stored_bytes)}</span>}
      </p>
      <Trouble problem={problem} />
      <div class="row">
        {of?.held && mayMove && <Act does={() => post("store/release", { base_model: base })} done="main is released" then={again}>Release main</Act>}
        <button type="button" aria-disabled={chosen.length !== 2} onClick={() => chosen.length === 2 && setCompared(true)}>Compare the two that are marked</button>
      </div>
      {!value ? !problem && <Loading /> : (
        <Table quiet caption="Versions, newest first" heads={[<span class="hidden">Graph</span>, "Version", "State", "Brought", "Tasks", "Written", "Made", "Mark", "Actions"]}>
          {[...versions].reverse().map((row) => (
            <tr key={row.version}>
              <Rail lanes={lanes.get(row.version)!} isMain={row.refs.includes("main")} />
              <th scope="row" style={{ minWidth: "7rem" }}>
                {row.version}
                {row.refs.map((name: string) => <span key={name}> <span class="ref">{name}</span></span>)}
                {row.tags.map((name: string) => <span key={name}> <span class="ref tag">{name}</span></span>)}
              </th>
              <td><State of={row.status} />{row.reason && <div class="reason">{row.reason}</div>}</td>
              <td>
                {names(row.added)}{row.refined.length > 0 && <>refined {names(row.refined)}</>}{row.removed.length > 0 && <>without {names(row.removed)}</>}
                {row.hidden && <span>{count(Object.values(row.hidden as Record<string, number>).reduce((a, b) => a + b, 0), "task")} of other teams</span>}
              </td>
              <td class="number">{row.task_count}</td>
              <td class="number">{bytes(row.bytes_written)}</td>
              <td class="number" title={`merged in ${seconds(row.merge_seconds)}`}>{clock(row.created_at)}</td>
              <td><input type="checkbox" aria-label={`Mark version ${row.version}`} checked={chosen.includes(row.version)} onChange={() => toggle(row.version)} /></td>
              <td>
                {mayMove && row.version === of?.candidate && row.version !== of?.main && <button type="button" class="danger" aria-label={`Refuse version ${row.version}`} onClick={() => setRefused(row.version)}>Refuse it</button>}
                {mayMove && row.version !== of?.main && row.version !== of?.candidate && row.status !== "expired" && <button type="button" aria-label={`Move main here, to version ${row.version}`} onClick={() => setTarget(row.version)}>Move main here</button>}
              </td>
            </tr>
          ))}
          <tr>
            <td class="rail" aria-hidden="true" style={{ minWidth: `${width}px` }} />
            <th scope="row">0{of?.main === 0 && <span class="ref">main</span>}</th>
            <td colspan={6}>the empty subspace</td>
            <td>{mayMove && of?.main !== 0 && <button type="button" aria-label="Move main here, to version 0" onClick={() => setTarget(0)}>Move main here</button>}</td>
          </tr>
        </Table>
      )}
      <Held me={me} base={base} main={of?.main} candidate={of?.candidate} done={moved} />
      <Moves base={base} main={of?.main} held={of?.held} />
      <Storage base={base} on={[value?.length, of?.main]} />
      {refused !== undefined && <Refuse version={refused} base={base} close={() => setRefused(undefined)} done={moved} />}
      {target !== undefined && <Rollback to={target} base={base} close={() => setTarget(undefined)} moved={moved} />}
      {isCompared && <Compare old={Math.min(...chosen)} now={Math.max(...chosen)} base={base} close={() => setCompared(false)} />}
    </>
  )
}

function Rollback({ to, base, close, moved }: { to: number; base: string; close: () => void; moved: () => void }) {
  const { value, problem } = usePolled(() => get(`rollback/${to}`, { base_model: base }), [to, base], 0)
  const [reason, setReason] = useState("")
  const [hold, setHold] = useState(false)
  const list = (titles: string[], hidden: number | undefined) => (
    <>{titles.length ? <ul>{titles.map((title) => <li key={title}>{title}</li>)}</ul> : !hidden && "none"}{hidden ? count(hidden, "task") + " of other teams" : ""}</>
  )
  return (
    <Dialog title={`Move main to version ${to}`} close={close}>
      <Trouble problem={problem} />
      {!value ? !problem && <Loading /> : (
        <>
          <p>main is version {value.from_version} now. It can be moved forward again at any time; tasks that vanish are parked until then.</p>
          <dl>
            <dt>Tasks that vanish from main</dt><dd>{list(value.vanishing, value.hidden?.vanishing)}</dd>
            <dt>Tasks that come back</dt><dd>{list(value.returning, value.hidden?.returning)}</dd>
          </dl>
          {value.refused ? <div class="trouble" role="alert">It would be refused: {value.refused}</div> : (
            <form onSubmit={(event) => event.preventDefault()}>
              <label for="reason">Reason, kept in the log</label>
              <input id="reason" value={reason} maxLength={2000} onInput={(event) => setReason(event.currentTarget.value)} />
              <label class="check"><input type="checkbox" checked={hold} onChange={(event) => setHold(event.currentTarget.checked)} /> Hold main there: nothing is published until it is released</label>
              <div class="row">
                <Act kind="main" does={() => post(`rollback/${to}`, { reason, hold, base_model: base })} done={`main is version ${to} now`} then={moved}>Move main to version {to}</Act>
                <button type="button" onClick={close}>Leave it</button>
              </div>
            </form>
          )}
        </>
      )}
    </Dialog>
  )
}

function Compare({ old, now, base, close }: { old: number; now: number; base: string; close: () => void }) {
  const { value, problem } = usePolled(() => get(`diff/${old}/${now}`, { base_model: base }), [old, now, base], 0)
  const scores: [string, (number | null)[]][] = Object.entries(value?.scores ?? {})
  // A version holds one revision of a task: of those that both hold, a title says which is meant.
  const drift: Record<string, number> = Object.fromEntries(Object.entries(value?.drift_bound ?? {}).map(([id, most]) => [value.titles[id], most]))
  return (
    <Dialog title={`From version ${old} to version ${now}`} close={close}>
      <Trouble problem={problem} />
      {!value ? !problem && <Loading /> : (
        <>
          <dl>
            <dt>Added</dt><dd>{value.added.map((task: Json) => task.name).join(", ") || "none"}</dd>
            <dt>Removed</dt><dd>{value.removed.map((task: Json) => task.name).join(", ") || "none"}</dd>
          </dl>
          <Table quiet caption="Scores and drift of each task" heads={["Task", `Version ${old}`, `Version ${now}`, "Change", "Drift, at most"]}>
            {scores.map(([title, [before, after]]) => (
              <tr key={title}>
                <th scope="row">{title}</th>
                <td class="number">{before?.toFixed(4) ?? "–"}</td>
                <td class="number">{after?.toFixed(4) ?? "–"}</td>
                <td class="number">{before != null && after != null ? change(after - before) : "–"}</td>
                <td class="number">{drift[title]?.toExponential(2) ?? "–"}</td>
              </tr>
            ))}
          </Table>
        </>
      )}
    </Dialog>
  )
}

/** A reason, kept in the log, and a button. */
function Reasoned({ id, needed, text, does, done, then, close }: {
  id: string
  needed?: boolean
  text: string
  does: (reason: string) => Promise<unknown>
  done: string
  then: () => void
  close: () => void
}) {
  const [reason, setReason] = useState("")
  return (
    <form onSubmit={(event) => event.preventDefault()}>
      <label for={id}>Reason, kept in the log{needed && " (needed)"}</label>
      <input id={id} value={reason} maxLength={2000} onInput={(event) => setReason(event.currentTarget.value)} />
      <div class="row">
        <Act kind="danger" does={() => does(reason)} done={done} then={then}>{text}</Act>
        <button type="button" onClick={close}>Leave it</button>
      </div>
    </form>
  )
}

function Refuse({ version, base, close, done }: { version: number; base: string; close: () => void; done: () => void }) {
  return (
    <Dialog title={`Refuse version ${version}`} close={close}>
      <p>It waits to be published. Refused, it is rejected as by the gate, and main stays where it is. Of several tasks that it brings, each is merged again by itself.</p>
      <Reasoned id="refusal" needed text={`Refuse version ${version}`} close={close} then={done} done={`Version ${version} is rejected`}
        does={(reason) => post(`reject/${version}`, { reason, base_model: base })} />
    </Dialog>
  )
}

/** The tasks that can be removed: of those that the newest version holds, the reader's own. */
function Held({ me, base, main, candidate, done }: Pick<Around, "me" | "base"> & { main?: number; candidate?: number; done: () => void }) {
  const isShown = may(me, "maintainer")
  const { value } = usePolled(async () => (isShown && candidate ? get(`versions/${candidate}`, { base_model: base }) : undefined), [base, main, candidate, isShown], 0)
  const [chosen, setChosen] = useState("")
  const [removed, setRemoved] = useState<Json>()
  const mine: Json[] = (value?.tasks ?? []).filter((task: Json) => may(me, "maintainer", task.title.split("/")[0]))
  if (!isShown || !mine.length) return null
  const task = mine.find((one) => one.task_id === chosen) ?? mine[0]
  return (
    <>
      <h2>Remove a task</h2>
      <form class="row" aria-label="Remove a task" onSubmit={(event) => event.preventDefault()}>
        <label>Task <select value={task.task_id} onChange={(event) => setChosen(event.currentTarget.value)}>{mine.map((one) => <option key={one.task_id} value={one.task_id}>{one.title}</option>)}</select></label>
        <button type="button" onClick={() => setRemoved(task)}>See what that would do</button>
      </form>
      {removed && <Remove task={removed} base={base} close={() => setRemoved(undefined)} done={() => { setRemoved(undefined); done() }} />}
    </>
  )
}

function Remove({ task, base, close, done }: { task: Json; base: string; close: () => void; done: () => void }) {
  const { value, problem } = usePolled(() => get(`remove/${task.task_id}`, { base_model: base }), [task.task_id, base], 0)
  return (
    <Dialog title={`Remove ${task.title}`} close={close}>
      <Trouble problem={problem} />
      {!value ? !problem && <Loading /> : (
        <>
          <p>The versions since its birth are made again as if it had never been there, and main moves to the last of them. The gate does not judge that.</p>
          <dl>
            {value.revisions.length > 1 && <><dt>Revisions that go</dt><dd>all {value.revisions.length}</dd></>}
            <dt>Versions that are made again</dt><dd>{value.versions.length ? `${value.versions.join(", ")}, after version ${value.start}` : `none: main goes back to version ${value.start}`}</dd>
            <dt>Numbers that all tasks take</dt><dd>{value.numbers_after.toLocaleString("en")} instead of {value.numbers_before.toLocaleString("en")}</dd>
          </dl>
          {value.refused ? <div class="trouble" role="alert">It would be refused: {value.refused}</div> : (
            <Reasoned id="removal" text={`Remove ${task.title}`} close={close} then={done} done={`${task.title} is removed`}
              does={(reason) => post("store/remove", { task_id: task.task_id, reason, publish: true, base_model: base })} />
          )}
        </>
      )}
    </Dialog>
  )
}

/** Who moved main, when and why, and what that did to tasks. */
function Moves({ base, main, held }: { base: string; main?: number; held?: Json }) {
  const [limit, setLimit] = useState(MOVES)
  const { value, problem } = usePolled(() => get("history/main", { base_model: base, limit }), [base, main, held?.since, Boolean(held), limit], 0)
  return (
    <>
      <h2>How main moved</h2>
      <Trouble problem={problem} />
      {!value ? !problem && <Loading /> : !value.moves.length ? <Empty>It has never moved.</Empty> : (
        <Table quiet caption="Moves of main, newest first" heads={["When", "Who", "What", "From", "To", "Came", "Left", "Why"]}>
          {value.moves.map((move: Json) => (
            <tr key={move.seq}>
              <th scope="row">{clock(move.time)}</th><td>{move.actor}</td><td>{move.how}{move.holds && move.how !== "held" && ", and held"}</td>
              <td class="number">{move.from}</td><td class="number">{move.to}</td>
              <td>{names(move.came)}{move.replaced.length > 0 && <>other revisions of {names(move.replaced)}</>}</td><td>{names(move.left)}</td>
              <td>{move.reason || "–"}</td>
            </tr>
          ))}
        </Table>
      )}
      {value?.before && <button type="button" onClick={() => setLimit(limit + MOVES)}>Show older moves</button>}
    </>
  )
}

/** What the store takes, and what of it could be deleted. */
function Storage({ base, on }: { base: string; on: unknown[] }) {
  const { value, problem } = usePolled(() => get("storage", { base_model: base }), [base, ...on], 0)
  return (
    <>
      <h2>Storage</h2>
      <Trouble problem={problem} />
      {value && (
        <dl class="columns">
          <dt>Place</dt><dd><code>{value.storage}</code></dd>
          <dt>Versions</dt><dd>{count(value.versions, "version")}, {value.expired.length} of them expired, {value.rejected.length} rejected</dd>
          <dt>Needed by versions</dt><dd>{bytes(value.stored_bytes)}</dd>
          <dt>Can be collected</dt>
          <dd>{value.garbage_objects ? <>{count(value.garbage_objects, "object")}, {bytes(value.garbage_bytes)}: <code>onebasis store collect --really</code> deletes them</> : <>nothing; <code>onebasis store expire</code> gives old and rejected versions up</>}</dd>
        </dl>
      )}
    </>
  )
}

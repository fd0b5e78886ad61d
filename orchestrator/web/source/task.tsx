// One task: where it is and why, its life, its loss and log as they come, its scores under every version, its adapter.
import { useMemo } from "preact/hooks"
import { get, inPath, may, post, saved, type Json } from "./api"
import { Chart, type Line } from "./chart"
import { gridOf } from "./grid"
import type { Around } from "./main"
import { Buttons, Progress } from "./now"
import { Act, Empty, Loading, State, Table, Trouble, usePolled } from "./parts"
import { change, clock, count, score, seconds } from "./words"

const LOG_LINES = 400
const PAGE = 1000

const NO_EVENTS: Json[] = []

/** A task's history so far; only what is new is asked for. That the service does not answer, the page says already. */
function useHistory(taskId: string | undefined): Json[] {
  const { value } = usePolled<Json[]>(async (before = NO_EVENTS) => {
    if (!taskId) return before
    let events = before
    let news: Json[]
    do { // of a long history, page after page
      news = await get("events", { reference: taskId, after: events.at(-1)?.event_id, limit: PAGE })
      if (news.length) events = [...events, ...news]
    } while (news.length === PAGE)
    return events
  }, [taskId])
  return value ?? NO_EVENTS
}

function curves(events: Json[]): Line[] {
  const found = new Map<string, Map<number, number>>()
  for (const event of events) {
    if (event.kind !== "progress") continue
    try {
      const point = JSON.parse(event.text)
      if (typeof point.loss !== "number") continue
      const name = point.candidate || point.method || "loss"
      if (!found.has(name)) found.set(name, new Map())
      found.get(name)!.set(point.step, point.loss) // a later attempt went over the same steps
    } catch { /* a row of another release */ }
  }
  return [...found].map(([name, points]) => ({ name, points: [...points].sort(([a], [b]) => a - b) }))
}

export function Task({ me, status, reference, again }: Around & { reference: string }) {
  const { value: task, problem, again: reread } = usePolled(() => get(`tasks/${inPath(reference)}`), [reference])
  const events = useHistory(task?.task_id)
  const lines = useMemo(() => curves(events), [events])
  const log = useMemo(() => events.filter((event) => event.kind === "log").slice(-LOG_LINES), [events])
  const main = status.base_models.find((one: Json) => one.base_model === task?.base_model)?.main
  const both = () => {
    reread()
    again()
  }
  if (!task) return <><h1>{reference}</h1>{problem ? <Trouble problem={problem} /> : <Loading />}</>
  const path = inPath(task.task_id)
  const isHeld = task.result && !task.gone_from_main && task.result.score_under_main !== undefined
  const training = task.training
  return (
    <>
      <h1>{task.title}</h1>
      <p class="why"><State of={task.state} /> {task.why}</p>
      <Trouble problem={problem} />
      <div class="row">
        <Buttons task={task} me={me} again={both} />
        {may(me, "maintainer", task.team) && ["queued", "training"].includes(task.state) && (task.wait?.code === "paused"
          ? <Act does={() => post("resume", { reference: task.task_id })} done={`${task.title} goes on`} then={both}>Resume</Act>
          : <Act does={() => post("pause", { reference: task.task_id })} done={`${task.title} is paused`} then={both}>Pause</Act>)}
        {isHeld && <Act does={() => saved(`export/${path}`, { base_model: task.base_model }, `${task.team}-${task.name}.zip`)} done="The adapter is saved">Export as a PEFT adapter</Act>}
      </div>
      {task.warnings.map((text: string) => <div key={text} class="trouble mild">{text}</div>)}
      {task.trouble.length > 0 && <p>In the book of trouble: {task.trouble.map((row: string) => <code key={row}>{row} </code>)}</p>}
      <dl class="columns">
        <dt>Id</dt><dd><code>{task.task_id}</code></dd>
        <dt>Base model, pool</dt><dd>{task.base_model}, {task.pool || "none"}</dd>
        <dt>Submitted</dt><dd>{clock(task.submitted_at)}</dd>
        <dt>Attempt, worker</dt><dd>{task.attempt}{task.worker && `, ${task.worker}`}</dd>
        {task.progress.steps > 0 && <><dt>Progress</dt><dd><Progress task={task} /></dd></>}
        {task.start && <><dt>Starts in</dt><dd>{seconds(task.start.seconds)}, in four of five cases {seconds(task.start.earliest)} to {seconds(task.start.latest)}; place {task.place}</dd></>}
        {task.deadline && <><dt>Deadline</dt><dd>{clock(task.deadline.at)}: {task.deadline.outlook}</dd></>}
        <dt>Rows</dt><dd>{task.train_rows} to train, {task.eval_rows} to score</dd>
        <dt>Method</dt><dd>{training.method || training.asked_method}{training.asked_method !== training.method && training.method && ` (asked for ${training.asked_method})`}</dd>
        <dt>Trained</dt><dd>{training.steps ? `${training.steps} steps in ${seconds(training.seconds)}` : "not yet"}</dd>
        {task.served?.canary && <><dt>Canary</dt><dd>version {task.served.canary.version} answered {count(task.served.canary.requests, "request")} of it, and agreed with version {task.served.canary.main_version} on {task.served.canary.agreed} of {count(task.served.canary.rows, "row")}</dd></>}
        <dt>Scores ({task.metric})</dt>
        <dd>base model {score(task.base_score)}, own adapter {score(task.local_score)}{task.result && `, at birth ${score(task.result.score_at_birth)}, in main ${score(task.result.score_under_main)}`}</dd>
      </dl>
      <h2>Loss</h2>
      {lines.length ? <Chart lines={lines} x="step" y="loss" /> : <Empty>No step has been told yet.</Empty>}
      <h2>Its life</h2>
      <ol class="life">
        {task.events.map((event: Json) => (
          <li key={event.event_id}><time>{clock(event.at)}</time> <strong>{event.kind}</strong> {event.text}</li>
        ))}
      </ol>
      {task.revisions?.length > 1 && (
        <>
          <h2>Revisions</h2>
          <Table quiet caption="Revisions" heads={["Revision", "State", "Version", "Submitted", "Rows to train", "New rows to score", "Own adapter", "In main"]}>
            {task.revisions.map((one: Json) => (
              <tr key={one.task_id}>
                <th scope="row">{one.task_id === task.task_id ? one.revision : <a href={`#/task/${one.task_id}`}>{one.revision}</a>}</th>
                <td><State of={one.state} /></td><td class="number">{one.version ?? "–"}</td><td class="number">{clock(one.submitted_at)}</td>
                <td class="number">{one.train_rows}</td><td class="number">{one.new_eval_rows}</td>
                <td class="number">{score(one.local_score)}</td><td class="number">{score(one.main_score)}</td>
              </tr>
            ))}
          </Table>
        </>
      )}
      {task.result && <Scores task={task} main={main} />}
      <Files task={task} />
      <h2>Log</h2>
      {log.length ? <pre class="log" tabIndex={0} aria-label="Training log">{log.map((event) => `${clock(event.at)} ${event.text}\n`)}</pre> : <Empty>Nothing is written yet.</Empty>}
      <details>
        <summary>Task file</summary>
        <pre tabIndex={0} aria-label="Task file">{JSON.stringify(task.spec, null, 2)}</pre>
      </details>
    </>
  )
}

/** Where its rows and its adapter came from, and what the service keeps of them. */
function Files({ task }: { task: Json }) {
  const { data, method } = task.spec
  const named: [string, string | null][] = [["Training rows", data.train_file], ["Evaluation rows", data.eval_file], ["Adapter, as it came", method.adapter]]
  const kept: [string, string][] = [["Evaluation rows", task.eval_sha256], ["Adapter, as delivered", task.adapter.sha256]]
  return (
    <>
      <h2>Files</h2>
      <dl class="columns">
        {named.map(([what, file]) => file && <><dt>{what}</dt><dd><code>{file}</code></dd></>)}
        {!data.eval_file && data.eval_fraction && <><dt>Evaluation rows</dt><dd>{data.eval_fraction} of the training rows</dd></>}
        {kept.map(([what, digest]) => digest && <><dt>{what}, kept</dt><dd>SHA-256 <code>{digest}</code></dd></>)}
      </dl>
    </>
  )
}

function Scores({ task, main }: { task: Json; main: number | undefined }) {
  const { value, problem } = usePolled(() => get("matrix", { base_model: task.base_model }), [task.base_model, main], 0)
  const grid = useMemo(() => value && gridOf(value), [value])
  const t: number = grid ? grid.tasks.findIndex((one: Json) => one.task_id === task.task_id) : -1
  if (!grid) return <Trouble problem={problem} />
  if (t < 0) return <><h2>Scores</h2><Empty>main does not hold it.</Empty></>
  const rows = grid.versions.flatMap((version: number, v: number) => {
    const cell = v * grid.tasks.length + t
    return grid.births[t] > v || Number.isNaN(grid.scores[cell]) ? [] : [{ version, cell }]
  })
  return (
    <>
      <h2>Scores under every version</h2>
      {rows.length > 0 && <Chart whole lines={[{ name: task.metric, points: rows.map(({ version, cell }: Json) => [version, grid.scores[cell]] as const) }]} x="version" y={task.metric} />}
      <details open={rows.length <= 12}>
        <summary>As numbers</summary>
        <Table quiet caption="Scores under every version" heads={["Version", "Score", "Since birth", "Measured"]}>
          {[...rows].reverse().map(({ version, cell }: Json) => (
            <tr key={version}>
              <th scope="row">{version}</th><td class="number">{score(grid.scores[cell])}</td>
              <td class="number">{change(grid.changes[cell])}</td><td>{grid.measured[cell] ? "here" : "carried over"}</td>
            </tr>
          ))}
        </Table>
      </details>
    </>
  )
}

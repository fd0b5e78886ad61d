// What runs, what waits and why; the teams' shares and quotas; workers and pools.
import { useState } from "preact/hooks"
import { get, inPath, may, post, type Json, type Me } from "./api"
import type { Around } from "./main"
import { Act, AskFirst, Empty, Loading, State, Table, taskLink, Trouble, usePolled } from "./parts"
import { ago, clock, count, hundredths, seconds } from "./words"

const AT_ONCE = 500
const ENDED = 15

const interval = (told: Json) => (told ? `in ${seconds(told.seconds)} (${seconds(told.earliest)} – ${seconds(told.latest)})` : "–")

/** Reasons to wait, in words; the code stays beside them, as `onebasis task --json` has it. */
const WAITS: Record<string, string> = {
  paused: "paused",
  dependency: "comes after another task",
  "not-before": "is not due yet",
  "never-fits": "fits in no pool",
  "over-quota": "its team has its quota",
  "no-free-place": "all places are in use",
  "reserved-for": "free places are kept for others",
  "gang-incomplete": "no room for all its ranks",
  "base-model-loading": "no worker is ready",
  "about-to-start": "is about to start",
  held: "main is held",
  canary: "its canary answers requests first",
  "storage-away": "the storage is away",
  "store-alarm": "the store takes nothing",
}

const waitWords = (code: string) => WAITS[code] ?? code

export function Progress({ task }: { task: Json }) {
  const { step, steps, phase } = task.progress
  if (!steps) return <>{phase ?? ""}</>
  return (
    <>
      <progress max={steps} value={step} aria-label={`progress of ${task.title}`} /> {step}/{steps}
      {task.progress.loss !== undefined && ` · loss ${Number(task.progress.loss).toFixed(3)}`}
    </>
  )
}

/** The buttons of a task: those that belong to its state and that its reader may use. */
export function Buttons({ task, me, again }: { task: Json; me: Me; again: () => void }) {
  const path = inPath(task.task_id)
  const is = (...states: string[]) => states.includes(task.state)
  const act = (verb: string, text: string, done: string) => (
    <Act does={() => post(`${verb}/${path}`)} done={`${task.title} ${done}`} then={again} label={`${text} ${task.title}`}>
      {text}
    </Act>
  )
  const submits = may(me, "submitter", task.team)
  return (
    <span class="buttons">
      {submits && is("queued", "training", "merging") && (
        <AskFirst text="Cancel" title={`Cancel ${task.title}`} label={`Cancel ${task.title}`} does={() => post(`cancel/${path}`)} done={`${task.title} is cancelled`} then={again}>
          {is("queued") ? "It is taken out of the line." : "What it has trained so far is thrown away."} It can be submitted again, and then begins anew.
        </AskFirst>
      )}
      {may(me, "maintainer", task.team) && is("training") && act("preempt", "Preempt", "gives its place back")}
      {submits && is("parked", "rejected", "cancelled") && act("retry", "Retry", "is submitted again")}
    </span>
  )
}

function Bulk({ me, known, again }: { me: Me; known: string[]; again: () => void }) {
  const teams = Object.keys(me.roles).filter((team) => may(me, "maintainer", team))
  const all = teams.includes("all teams") ? known : teams
  const [team, setTeam] = useState("")
  const [change, setChange] = useState("pause")
  const chosen = team || all[0] || ""
  if (!all.length) return null
  const many = { does: () => post("change-many", { change, team: chosen }), done: `${change}: done for team ${chosen}`, then: again }
  return (
    <form class="row" aria-label="Change all tasks of a team" onSubmit={(event) => event.preventDefault()}>
      <label>All tasks of <select value={chosen} onChange={(event) => setTeam(event.currentTarget.value)}>{all.map((one) => <option key={one}>{one}</option>)}</select></label>
      <label class="hidden" for="change">Change</label>
      <select id="change" value={change} onChange={(event) => setChange(event.currentTarget.value)}>
        {["pause", "resume", "cancel", "retry"].map((one) => <option key={one}>{one}</option>)}
      </select>
      {change === "cancel"
        ? <AskFirst text="Do it" title={`Cancel all tasks of ${chosen}`} {...many}>All that wait or train are cancelled, and what they have trained so far is thrown away.</AskFirst>
        : <Act {...many}>Do it</Act>}
    </form>
  )
}

export function Now({ me, status, again: reread }: Around) {
  const live = usePolled(() => get("tasks", { live: true, limit: AT_ONCE }), [])
  const ended = usePolled(() => get("tasks", { limit: ENDED }), [])
  const teams = usePolled(() => get("teams"), [])
  const again = () => {
    live.again()
    ended.again()
    reread()
  }
  const tasks: Json[] = live.value ?? []
  const waiting = tasks.filter((task) => task.state === "queued").sort((a, b) => (a.place ?? 1e9) - (b.place ?? 1e9))
  const running = tasks.filter((task) => task.state !== "queued")
  const counts: Record<string, number> = status.tasks ?? {}
  const titles = new Map(tasks.map((task) => [task.task_id, task.title]))
  const named = (text: string) => text.replace(/\bt[0-9a-f]{21}\b/g, (id) => titles.get(id) ?? id)
  return (
    <>
      <h1>Now</h1>
      <p class="facts">
        {status.running ? "The service runs" : "The service does not run"}
        {status.base_models.map((one: Json) => (
          <span key={one.base_model}>{one.base_model}: main is version {one.main ?? "?"}{one.held && ", held"}</span>
        ))}
        {Object.entries(counts).map(([state, n]) => <span key={state}><State of={state} /> {n.toLocaleString("en")}</span>)}
      </p>
      <Trouble problem={live.problem ?? teams.problem} />
      {status.paused?.service && <div class="trouble">The service is paused by {status.paused.service.by}: {status.paused.service.reason || "no reason given"}</div>}
      {Object.entries(status.paused?.teams ?? {}).map(([team, pause]: [string, Json]) => (
        <div class="trouble" key={team}>Team {team} is paused by {pause.by}: {pause.reason || "no reason given"}</div>
      ))}
      {!live.value ? <Loading /> : (
        <>
          <h2 id="runs">Runs</h2>
          {!running.length ? <Empty>Nothing runs.</Empty> : (
            <Table quiet caption="Tasks that run" heads={["Task", "State", "Worker", "Progress", "Ends in", "Actions"]}>
              {running.map((task) => (
                <tr key={task.task_id}>
                  <th scope="row"><a href={taskLink(task.title)}>{task.title}</a></th>
                  <td><State of={task.state} />{task.held && ` ${task.held}`}</td>
                  <td>{task.worker}</td>
                  <td><Progress task={task} /></td>
                  <td>{seconds(task.progress.seconds_left)}</td>
                  <td><Buttons task={task} me={me} again={again} /></td>
                </tr>
              ))}
            </Table>
          )}
          <h2>Waits</h2>
          {!waiting.length ? <Empty>Nothing waits.</Empty> : (
            <Table quiet caption="Tasks that wait" heads={["Place", "Task", "Why", "Since", "Starts", "Actions"]}>
              {waiting.map((task) => (
                <tr key={task.task_id}>
                  <td class="number">{task.place ?? "–"}</td>
                  <th scope="row"><a href={taskLink(task.title)}>{task.title}</a></th>
                  <td>{task.wait ? <>{waitWords(task.wait.code)} <code>{task.wait.code}</code>{task.wait.pool && task.wait.pool !== "default" && ` of pool ${task.wait.pool}`}</> : "stands in line"}</td>
                  <td title={clock(task.submitted_at)}>{ago(task.wait?.since || task.submitted_at)}</td>
                  <td>{interval(task.start)}</td>
                  <td><Buttons task={task} me={me} again={again} /></td>
                </tr>
              ))}
            </Table>
          )}
          {tasks.length >= AT_ONCE && <p>The newest {AT_ONCE} live tasks are shown. <code>onebasis tasks --limit</code> lists more.</p>}
          <Bulk me={me} known={Object.keys(teams.value?.teams ?? {})} again={again} />
        </>
      )}
      <h2>Teams</h2>
      {teams.value && (
        <Table quiet caption="Shares and quotas of teams" heads={["Team", "Share", "Places now", "of quota", "Place-hours a week", "of quota", "GPU-hours a week", "of quota", "Waits", "Actions"]}>
          {Object.entries(teams.value.teams).map(([team, facts]: [string, Json]) => (
            <tr key={team}>
              <th scope="row">{team}</th>
              <td class="number">{hundredths(facts.share)}</td>
              <td class="number">{facts.places}</td>
              <td class="number">{facts.places_quota ?? "none"}</td>
              <td class="number">{facts.place_hours_a_week.toFixed(2)}</td>
              <td class="number">{facts.place_hours_a_week_quota ?? "none"}</td>
              <td class="number">{facts.gpu_hours_a_week.toFixed(2)}</td>
              <td class="number">{facts.gpu_hours_a_week_quota ?? "none"}</td>
              <td>{Object.entries(status.waiting?.[team] ?? {}).map(([code, n]) => `${n} ${waitWords(code)}`).join(", ") || "–"}</td>
              <td>
                {may(me, "maintainer", team) && (status.paused?.teams?.[team]
                  ? <Act does={() => post("resume", { team })} done={`Team ${team} goes on`} then={again} label={`Resume team ${team}`}>Resume</Act>
                  : <Act does={() => post("pause", { team })} done={`Nothing of team ${team} is started from now on`} then={again} label={`Pause team ${team}`}>Pause</Act>)}
              </td>
            </tr>
          ))}
        </Table>
      )}
      <h2>Workers</h2>
      {Object.entries(status.pools ?? {}).map(([name, pool]: [string, Json]) => (
        <section key={name}>
          <h3>Pool {name}</h3>
          <p class="facts">
            <span>{pool.base_model ?? ""}</span><span>{count(pool.ranks, "rank")} each</span><span>{pool.min} to {pool.max} workers</span>
            <span>{pool.busy} busy, {pool.warm} warm, {pool.starting} starting, {pool.drained} drained</span>
          </p>
          <Table quiet caption={`Workers of pool ${name}`} heads={["Worker", "State", "Does", "Machine"]}>
            {Object.entries(pool.workers).map(([worker, facts]: [string, Json]) => (
              <tr key={worker}>
                <th scope="row">{worker}</th><td>{facts.state}</td><td>{named(facts.does)}</td><td>{facts.machines.join(", ")}</td>
              </tr>
            ))}
          </Table>
        </section>
      ))}
      <h2>Newest tasks</h2>
      <Table quiet caption="Newest tasks" heads={["Task", "State", "Version", "Own adapter", "In main", "Submitted", "Actions"]}>
        {[...(ended.value ?? [])].reverse().map((task: Json) => (
          <tr key={task.task_id}>
            <th scope="row"><a href={taskLink(task.title)}>{task.title}</a></th>
            <td title={task.reason}><State of={task.state} /></td>
            <td class="number">{task.version ?? "–"}</td>
            <td class="number">{task.local_score?.toFixed(4) ?? "–"}</td>
            <td class="number">{task.main_score?.toFixed(4) ?? "–"}</td>
            <td title={clock(task.submitted_at)}>{ago(task.submitted_at)}</td>
            <td><Buttons task={task} me={me} again={again} /></td>
          </tr>
        ))}
      </Table>
    </>
  )
}

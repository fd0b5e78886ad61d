// Tokens, the audit log, settings, health: each as far as its reader may see it.
import { useState } from "preact/hooks"
import { get, may, mayAll, post, ROLES, type Json, type Me } from "./api"
import type { Around } from "./main"
import { Act, Dialog, Loading, say, Table, Trouble, usePolled } from "./parts"
import { ago, clock, hundredths, seconds } from "./words"

const RARELY_MS = 10_000
const ROWS = 100

export function Admin({ me, status }: Around) {
  return (
    <>
      <h1>Admin</h1>
      <Health status={status} />
      <Teams />
      <Tokens me={me} />
      {mayAll(me, "admin") ? <><Audit /><Settings /></> : <p>The audit log and the settings are for admins of all teams.</p>}
    </>
  )
}

function Health({ status }: { status: Json }) {
  const alarms: Json[] = status.alarms ?? []
  return (
    <>
      <h2>Health</h2>
      <dl class="columns">
        <dt>Service</dt><dd>{status.running ? `runs${status.up_seconds ? ` for ${seconds(status.up_seconds)}` : ""}` : "does not run"}</dd>
        <dt>Alarms</dt><dd>{alarms.length ? alarms.map((alarm) => alarm.text).join("; ") : "none rings"}</dd>
        <dt>Database</dt><dd>{status.tasks ? "answers" : "does not answer"}</dd>
        <dt>Ray</dt><dd>{alarms.some((alarm) => alarm.code === "ray-down") ? "does not answer" : status.running && status.heard_seconds_ago !== undefined ? `its workers and writers were heard ${seconds(status.heard_seconds_ago)} ago` : "not asked"}</dd>
        <dt>Workers</dt><dd>{Object.keys(status.workers ?? {}).length}, {status.workers_ready ?? 0} ready</dd>
        {status.loop_seconds_ago !== undefined && <><dt>Loop</dt><dd>went round {seconds(status.loop_seconds_ago)} ago</dd></>}
        <dt>MLflow</dt><dd><code>{status.mlflow}</code>: {status.mlflow_error || (status.mlflow_behind ? "is behind" : status.running ? "is up to date" : "not asked")}</dd>
        {status.base_models.map((one: Json) => (
          <><dt>Store of {one.base_model}</dt><dd><code>{one.storage}</code>{one.main === null ? ": not read yet" : alarms.some((alarm) => /store/.test(alarm.code) && (!alarm.base_model || alarm.base_model === one.base_model)) ? ": see the alarms" : ": answers"}</dd></>
        ))}
        {status.leadership && <><dt>Leader</dt><dd>{JSON.stringify(status.leadership.leader)}</dd></>}
      </dl>
    </>
  )
}

function Teams() {
  const { value, problem } = usePolled(() => get("teams"), [], RARELY_MS)
  const or = (quota: number | null) => quota ?? "none"
  return (
    <>
      <h2>Teams</h2>
      <Trouble problem={problem} />
      {value && (
        <Table quiet caption="Teams, as the settings have them" heads={["Team", "Weight", "Share", "Quota of places", "Place-hours a week", "GPU-hours a week"]}>
          {Object.entries(value.teams).map(([team, facts]: [string, Json]) => (
            <tr key={team}>
              <th scope="row">{team}</th><td class="number">{facts.weight}</td><td class="number">{hundredths(facts.share)}</td>
              <td class="number">{or(facts.places_quota)}</td><td class="number">{or(facts.place_hours_a_week_quota)}</td><td class="number">{or(facts.gpu_hours_a_week_quota)}</td>
            </tr>
          ))}
        </Table>
      )}
    </>
  )
}

function Tokens({ me }: { me: Me }) {
  const { value, problem, again } = usePolled(() => get("tokens"), [], RARELY_MS)
  const [made, setMade] = useState<Json>()
  const [leaving, setLeaving] = useState<Json>()
  return (
    <>
      <h2>Tokens</h2>
      <Trouble problem={problem} />
      {may(me, "admin") && <NewToken me={me} made={(token) => { setMade(token); again() }} />}
      {!value ? !problem && <Loading /> : (
        <Table quiet caption="Tokens" heads={["Token", "Whose", "Kind", "Team", "Role", "Ends", "Last used", "Actions"]}>
          {value.map((row: Json) => (
            <tr key={row.token_id}>
              <th scope="row"><code>{row.token_id}</code></th><td>{row.name}</td><td>{row.kind}</td><td>{row.team || "all teams"}</td><td>{row.role}</td>
              <td>{row.revoked_at ? `revoked ${clock(row.revoked_at)}` : row.expires_at ? clock(row.expires_at) : "never"}</td>
              <td>{ago(row.used_at)}</td>
              <td>{!row.revoked_at && <button type="button" class="danger" aria-label={`Revoke ${row.token_id} of ${row.name}`} onClick={() => setLeaving(row)}>Revoke</button>}</td>
            </tr>
          ))}
        </Table>
      )}
      {made && (
        <Dialog title={`Token of ${made.name}`} close={() => setMade(undefined)}>
          <p>It is shown once: the service keeps its digest alone.</p>
          <p><code class="secret">{made.token}</code></p>
          <button type="button" onClick={() => navigator.clipboard.writeText(made.token).then(() => say("Copied"), () => say("The browser lets no page copy here"))}>Copy</button>
        </Dialog>
      )}
      {leaving && (
        <Dialog title={`Revoke the token of ${leaving.name}?`} close={() => setLeaving(undefined)}>
          <p>It counts no more from then on{leaving.token_id === me.token_id && "; it is the one you are logged in with"}. This cannot be undone.</p>
          <Act kind="danger" does={() => post(`tokens/${leaving.token_id}/revoke`)} done={`Token ${leaving.token_id} is revoked`} then={() => { setLeaving(undefined); again() }}>Revoke it</Act>
        </Dialog>
      )}
    </>
  )
}

function NewToken({ me, made }: { me: Me; made: (token: Json) => void }) {
  const teams = usePolled(() => get("teams"), [], 0)
  const [name, setName] = useState("")
  const [role, setRole] = useState("viewer")
  const [team, setTeam] = useState("")
  const [days, setDays] = useState(90)
  const all = mayAll(me, "admin")
  const known = Object.keys(teams.value?.teams ?? {}).filter((one) => may(me, "admin", one))
  const chosen = team || (all ? "" : known[0] ?? "")
  return (
    <form class="row" aria-label="New token" onSubmit={(event) => event.preventDefault()}>
      <label>Name <input value={name} maxLength={120} onInput={(event) => setName(event.currentTarget.value)} /></label>
      <label>Role <select value={role} onChange={(event) => setRole(event.currentTarget.value)}>{ROLES.map((one) => <option key={one}>{one}</option>)}</select></label>
      <label>Team <select value={chosen} onChange={(event) => setTeam(event.currentTarget.value)}>{all && <option value="">all teams</option>}{known.map((one) => <option key={one}>{one}</option>)}</select></label>
      <label>Days <input type="number" min={1} max={3650} value={days} onInput={(event) => setDays(Number(event.currentTarget.value))} /></label>
      <Act does={async () => { made(await post("tokens", { name, role, days, ...(chosen ? { team: chosen } : {}) })) }} done={`A token for ${name} is made`}>Make a token</Act>
    </form>
  )
}

function Audit() {
  const { value, problem } = usePolled(() => get("audit", { limit: ROWS }), [], RARELY_MS)
  const [verdict, setVerdict] = useState<Json>()
  return (
    <>
      <h2>Audit log</h2>
      <Trouble problem={problem} />
      <div class="row">
        <Act does={async () => setVerdict(await get("audit/verify"))} done="The chain was read">Verify the chain</Act>
        {verdict && <span>{verdict.problem || `${verdict.rows} rows are as they were written; the last digest is ${verdict.head.slice(0, 12)}…`}</span>}
      </div>
      {value && (
        <Table quiet caption={`The newest ${ROWS} rows of the audit log`} heads={["Row", "When", "Who", "Asked", "About", "Outcome"]}>
          {[...value].reverse().map((row: Json) => (
            <tr key={row.seq}>
              <th scope="row">{row.seq}</th><td>{clock(row.at)}</td><td>{row.name}</td><td>{row.request}</td>
              <td class="about">{row.about}</td><td>{row.outcome}{row.of !== row.seq && ` (row ${row.of})`}</td>
            </tr>
          ))}
        </Table>
      )}
    </>
  )
}

function Settings() {
  const { value, problem } = usePolled(() => get("settings"), [], 0)
  return (
    <>
      <h2>Settings</h2>
      <Trouble problem={problem} />
      <details>
        <summary>Those that count now</summary>
        <pre tabIndex={0} aria-label="Settings">{value && JSON.stringify(value, null, 2)}</pre>
      </details>
    </>
  )
}

// A task file of this machine and the files that it names: read, sent and submitted, or checked alone.
import { useEffect, useRef, useState } from "preact/hooks"
import { post, Problem, type Json } from "./api"
import type { Around } from "./main"
import { Act, taskLink, Trouble } from "./parts"
import { send, type Progress } from "./upload"
import { bytes, count, seconds } from "./words"

/** What the keys of a task file name, for people. */
const MEANS: Record<string, string> = {
  "data.train_file": "Rows to train with",
  "data.eval_file": "Rows to score with",
  "method.adapter": "Adapter, as PEFT saves it",
}

const lastOf = (place: string) => place.split("/").filter(Boolean).at(-1) ?? place
/** Whether a task file means a folder: an adapter, or a name without an ending. */
const isFolder = (named: Json) => named.only.length > 0 || !/\.\w/.test(lastOf(named.place))

/** The name in the upload of each file that was chosen for a key. */
function namesIn(named: Json, chosen: File[]): [string, File][] {
  if (!isFolder(named)) return chosen.map((file) => [`${named.folder}/${file.name}`, file])
  const inside = chosen.map((file): [string, File] => [file.webkitRelativePath.split("/").slice(1).join("/"), file])
  const read = inside.filter(([name]) => !named.only.length || named.only.includes(name))
  return read.map(([name, file]) => [`${named.folder}/${name}`, file])
}

async function textOf(file: File): Promise<string> {
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer())
  } catch {
    throw new Problem(0, "is no UTF-8 text", file.name, "choose a task file, and save it as UTF-8")
  }
}

export function Submit({ again }: Around) {
  const [read, setRead] = useState<Json>()
  const [chosen, setChosen] = useState<Record<string, File[]>>({})
  const [problem, setProblem] = useState<Error>()
  const [progress, setProgress] = useState<Progress>()
  const [outlook, setOutlook] = useState<Json>()
  const newest = useRef<File | undefined>(undefined)
  const leaving = useRef(new AbortController())
  useEffect(() => () => leaving.current.abort(), []) // what is under way ends with the page, and nothing is submitted

  const open = async (file: File | undefined) => {
    newest.current = file
    setRead(undefined)
    setChosen({})
    setOutlook(undefined)
    setProblem(undefined)
    if (!file) return
    try {
      const found = await post("read-task", { lines: (await textOf(file)).split(/\r\n|\n|\r/) })
      if (newest.current === file) setRead(found)
    } catch (error) {
      if (newest.current === file) setProblem(error as Error)
    }
  }
  const choose = (key: string, files: FileList | null) => {
    setOutlook(undefined)
    setChosen((before) => ({ ...before, [key]: [...(files ?? [])] }))
  }

  const submit = async (isCheck: boolean) => {
    setOutlook(undefined)
    const { signal } = leaving.current
    const files = new Map<string, File>()
    for (const named of read.files) {
      const some = namesIn(named, chosen[named.key] ?? [])
      if (!some.length) throw new Problem(0, `nothing to send is chosen; the task file names ${named.place}`, named.key, `choose that ${isFolder(named) ? "folder" : "file"}`)
      for (const [name, file] of some) files.set(name, file)
    }
    try {
      const upload = files.size ? await send(read.task.team, files, setProgress, signal) : ""
      const task = structuredClone(read.task)
      const own = new Map<string, string>()
      for (const named of read.files) {
        const [section, key] = named.key.split(".")
        const name = isFolder(named) ? named.folder : namesIn(named, chosen[named.key]!)[0]![0]
        task[section][key] = `upload:${upload}/${name}`
        own.set(task[section][key], named.place)
      }
      signal.throwIfAborted()
      const answer = await post("tasks", { task, dry_run: isCheck }).catch((error) => { throw renamed(error, own) })
      if (isCheck) {
        setOutlook({ ...answer, warnings: answer.warnings.map((text: string) => inOwnWords(text, own)) })
        return answer
      }
      again()
      location.hash = taskLink(answer.exact_title)
      return answer
    } finally {
      setProgress(undefined)
    }
  }

  return (
    <>
      <h1>Submit</h1>
      <p id="about-submit">A task file of this machine, and the files that it names. They are sent in pieces: what was cut off goes on where it was, and what the service has is not sent again.</p>
      <div class="row">
        <label for="task-file">Task file</label>
        <input id="task-file" type="file" accept=".yaml,.yml" aria-describedby="about-submit" onChange={(event) => open(event.currentTarget.files?.[0])} />
      </div>
      <Trouble problem={problem} />
      {read && (
        <form aria-label={`Submit ${read.title}`} onSubmit={(event) => event.preventDefault()}>
          <h2>{read.title}</h2>
          <p class="facts">
            <span>{read.task.kind}</span><span>method {read.task.method.name}</span>
            {read.task.base_model && <span>base model {read.task.base_model}</span>}
            {read.task.data.label_names.length > 0 && <span>{count(read.task.data.label_names.length, "label")}</span>}
            {read.task.revises && <span>a revision</span>}
          </p>
          {!read.files.length && <p>It names no file that has to be sent.</p>}
          {read.files.map((named: Json) => <Choice key={named.key} named={named} chosen={chosen[named.key] ?? []} choose={(files) => choose(named.key, files)} />)}
          <div class="row" key={Object.values(chosen).flat().map((file) => file.name).join("/")}>
            <Act kind="main" does={() => submit(false)} done={(answer: Json) => (answer.is_new ? `${read.title} is submitted` : `${read.title} was submitted before: it is the same task`)}>Submit</Act>
            <Act does={() => submit(true)} done={`${read.title} was checked, and is not taken in`}>Only check it</Act>
            {progress && (
              <span>
                <progress max={Math.max(1, progress.of)} value={progress.bytes} aria-label={progress.does} /> {progress.does}: {bytes(progress.bytes)} of {bytes(progress.of)}
              </span>
            )}
          </div>
          {outlook && <Outlook found={outlook} />}
        </form>
      )}
    </>
  )
}

function Choice({ named, chosen, choose }: { named: Json; chosen: File[]; choose: (files: FileList | null) => void }) {
  const id = `file-${named.key}`
  const first = chosen[0]
  const name = first && (isFolder(named) ? first.webkitRelativePath.split("/")[0] : first.name)
  const isOther = name !== undefined && name !== lastOf(named.place)
  return (
    <>
      <div class="row">
        <label for={id}>{MEANS[named.key] ?? named.key}: {named.place} <code>{named.key}</code></label>
        <input id={id} type="file" {...(isFolder(named) ? { webkitdirectory: true } : {})} aria-describedby={isOther ? `${id}-other` : undefined} onChange={(event) => choose(event.currentTarget.files)} />
      </div>
      {isOther && <div id={`${id}-other`} class="trouble mild" role="status">The task file names {lastOf(named.place)} here, and {name} is chosen: it is sent as it is.</div>}
    </>
  )
}

/** What a check has found. */
function Outlook({ found }: { found: Json }) {
  return (
    <section aria-label="What the check found" role="status">
      <p>
        {found.is_new ? "It would be taken in" : "It is there already"}: {count(found.train_rows, "row")} to train, {count(found.eval_rows, "row")} to score
        {found.pool && `, pool ${found.pool}`}{found.place != null && `, place ${found.place}`}{found.start && `, starts in ${seconds(found.start.seconds)}`}{found.why && `. ${found.why}`}
      </p>
      {found.warnings.map((text: string) => <div key={text} class="trouble mild">{text}</div>)}
    </section>
  )
}

/** What the service says of a file that was sent, with the name that its owner knows. */
function inOwnWords(text: string, own: Map<string, string>): string {
  for (const [sent, place] of own) text = text.replaceAll(sent, place)
  return text
}

function renamed(error: Error, own: Map<string, string>): Error {
  if (!(error instanceof Problem)) return error
  return new Problem(error.status, inOwnWords(error.what, own), inOwnWords(error.where, own), inOwnWords(error.todo, own))
}

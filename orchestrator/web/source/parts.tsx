// Parts that all pages use.
import type { ComponentChildren } from "preact"
import { useCallback, useEffect, useRef, useState } from "preact/hooks"
import { Problem, type Json } from "./api"

const POLL_MS = 2000

/** The newest answer, asked for again and again while the page is seen. `ask` is handed the answer before, `on` is what the
 * question depends on. */
export function usePolled<T>(ask: (before?: T) => Promise<T>, on: unknown[], every = POLL_MS) {
  const [found, setFound] = useState<{ value?: T; problem?: Error; key: string }>({ key: "" })
  const [turn, setTurn] = useState(0)
  const key = JSON.stringify(on)
  const asked = useRef(ask)
  asked.current = ask
  useEffect(() => {
    let isOver = false
    let isAsking = false
    let timer: number | undefined
    let value: T | undefined
    const step = async () => {
      if (!document.hidden) {
        isAsking = true
        try {
          value = await asked.current(value)
          if (!isOver) setFound({ value, key })
        } catch (problem) {
          if (!isOver) setFound((before) => ({ ...(before.key === key ? before : {}), problem: problem as Error, key }))
        }
        isAsking = false
      }
      if (!isOver && every) timer = window.setTimeout(step, every)
    }
    const seen = () => {
      if (!document.hidden && !isAsking) { // else there would be two who ask from then on
        clearTimeout(timer)
        void step()
      }
    }
    void step()
    document.addEventListener("visibilitychange", seen)
    return () => {
      isOver = true
      clearTimeout(timer)
      document.removeEventListener("visibilitychange", seen)
    }
  }, [key, turn, every])
  const again = useCallback(() => setTurn((n) => n + 1), [])
  const isFresh = found.key === key
  return { value: isFresh ? found.value : undefined, problem: isFresh ? found.problem : undefined, again }
}

/** Text that a screen reader reads out, and that is shown for some seconds. */
let speaker: (text: string) => void = () => {}
export const say = (text: string) => speaker(text)

export function Speaker() {
  const [text, setText] = useState("")
  useEffect(() => {
    let timer: number | undefined
    speaker = (told) => {
      setText(told)
      clearTimeout(timer)
      timer = window.setTimeout(() => setText(""), 8000)
    }
    return () => clearTimeout(timer)
  }, [])
  return (
    <div class={text ? "said" : "said silent"} role="status" aria-live="polite">
      {text}
    </div>
  )
}

export function Trouble({ problem }: { problem?: Error | undefined }) {
  if (!problem) return null
  const told = problem instanceof Problem ? problem : undefined
  return (
    <div class="trouble" role="alert">
      <strong>{told?.where ? `${told.where}: ` : ""}{told?.what ?? problem.message}</strong>
      {told?.todo && <div>{told.todo}</div>}
    </div>
  )
}

/** A button that does something over HTTP: asked once, it waits for the answer and tells it. */
export function Act({ children, does, done, then, kind = "", label }: {
  children: ComponentChildren
  does: () => Promise<unknown>
  done: string | ((answer: Json) => string)
  then?: (() => void) | undefined
  kind?: string
  label?: string
}) {
  const [isBusy, setBusy] = useState(false)
  const [problem, setProblem] = useState<Error>()
  const act = async () => {
    if (isBusy) return
    setBusy(true)
    setProblem(undefined)
    try {
      const answer = await does()
      say(typeof done === "string" ? done : done(answer))
      then?.()
    } catch (error) {
      setProblem(error as Error)
    } finally {
      setBusy(false)
    }
  }
  return (
    <>
      <button type="button" class={kind} onClick={act} aria-disabled={isBusy} aria-label={label}>
        {children}
      </button>
      <Trouble problem={problem} />
    </>
  )
}

/** A button for what is lost once it is done: it asks first. */
export function AskFirst({ text, title, children, ...act }: {
  text: string
  title: string
  children: ComponentChildren
  does: () => Promise<unknown>
  done: string
  then?: (() => void) | undefined
  label?: string
}) {
  const [isAsking, setAsking] = useState(false)
  const then = () => {
    setAsking(false)
    act.then?.()
  }
  return (
    <>
      <button type="button" class="danger" aria-label={act.label} onClick={() => setAsking(true)}>{text}</button>
      {isAsking && (
        <Dialog title={`${title}?`} close={() => setAsking(false)}>
          <p>{children}</p>
          <div class="row">
            <Act kind="danger" does={act.does} done={act.done} then={then}>{title}</Act>
            <button type="button" onClick={() => setAsking(false)}>Leave it</button>
          </div>
        </Dialog>
      )}
    </>
  )
}

/** A window over the page, which Escape closes; the browser keeps the focus in it. */
export function Dialog({ title, close, children }: { title: string; close: () => void; children: ComponentChildren }) {
  const box = useRef<HTMLDialogElement>(null)
  useEffect(() => {
    const dialog = box.current!
    const before = document.activeElement as HTMLElement | null
    dialog.showModal()
    return () => {
      if (dialog.open) dialog.close()
      before?.focus?.()
    }
  }, [])
  return (
    <dialog ref={box} aria-labelledby="dialog-title" onClose={close}>
      <header>
        <h2 id="dialog-title">{title}</h2>
        <button type="button" onClick={() => box.current?.close()}>Close</button>
      </header>
      {children}
    </dialog>
  )
}

export function Table({ caption, heads, children, quiet = false }: {
  caption: string
  heads: ComponentChildren[]
  children: ComponentChildren
  quiet?: boolean
}) {
  return (
    <div class="wide" tabIndex={0} role="region" aria-label={caption}>
      <table>
        <caption class={quiet ? "hidden" : ""}>{caption}</caption>
        <thead>
          <tr>{heads.map((head, i) => <th key={i} scope="col">{head}</th>)}</tr>
        </thead>
        <tbody>{children}</tbody>
      </table>
    </div>
  )
}

export function State({ of }: { of: string }) {
  return <span class={`state ${of.replace(/ /g, "-")}`}>{of}</span>
}

export const taskLink = (title: string) => `#/task/${title}`
export const Empty = ({ children }: { children: ComponentChildren }) => <p class="empty">{children}</p>
export const Loading = () => <p class="empty" role="status">Asking the service …</p>

// The frame around the pages: logging in, the menu, which page is shown.
import { render } from "preact"
import { useEffect, useRef, useState } from "preact/hooks"
import { Admin } from "./admin"
import { get, hasToken, keepToken, may, onForgotten, type Json, type Me } from "./api"
import { Login } from "./login"
import { Matrix } from "./matrix"
import { Now } from "./now"
import { Loading, Speaker, Trouble, usePolled } from "./parts"
import { Submit } from "./submit"
import { Task } from "./task"
import { Versions } from "./versions"

/** What every page is handed. */
export interface Around {
  me: Me
  status: Json
  base: string
  again: () => void
}

const PAGES = { now: "Now", matrix: "Matrix", versions: "Versions", admin: "Admin", submit: "Submit" } as const
const THEMES = { auto: "as the system", light: "light", dark: "dark" } as const

const place = () => decodeURI(location.hash.replace(/^#\/?/, "")) || "now"

function usePlace() {
  const [now, setNow] = useState(place())
  useEffect(() => {
    const moved = () => setNow(place())
    addEventListener("hashchange", moved)
    return () => removeEventListener("hashchange", moved)
  }, [])
  return now
}

function Theme() {
  const [theme, setTheme] = useState(localStorage.getItem("onebasis-theme") ?? "auto")
  useEffect(() => {
    document.documentElement.dataset.theme = theme
    localStorage.setItem("onebasis-theme", theme)
  }, [theme])
  return (
    <label class="theme">
      Colours{" "}
      <select value={theme} onChange={(event) => setTheme(event.currentTarget.value)}>
        {Object.entries(THEMES).map(([name, text]) => <option key={name} value={name}>{text}</option>)}
      </select>
    </label>
  )
}

function Inside({ leave }: { leave: () => void }) {
  const at = usePlace()
  const who = usePolled(() => get("whoami"), [], 60_000)
  const { value: status, problem, again } = usePolled(() => get("status"), [])
  const [chosen, setChosen] = useState("")
  const main = useRef<HTMLElement>(null)
  const isFirst = useRef(true)
  const [name, ...rest] = at.split("/")
  const title = name === "task" ? rest.join("/") : PAGES[name as keyof typeof PAGES] ?? "Now"
  useEffect(() => {
    document.title = `${title} · onebasis`
    if (!isFirst.current) main.current?.focus() // a screen reader goes on at the new page, not at the old link
    isFirst.current = false
  }, [title])
  const me: Me | undefined = who.value
  const bases: string[] = status?.base_models.map((one: Json) => one.base_model) ?? []
  const around = me && status && { me, status, base: bases.includes(chosen) ? chosen : bases[0] ?? "", again }
  return (
    <>
      <a class="skip" href="#content" onClick={(event) => { event.preventDefault(); main.current?.focus() }}>To the content</a>
      <header class="bar">
        <span class="name">onebasis</span>
        <nav aria-label="Pages">
          {Object.entries(PAGES).filter(([page]) => page !== "submit" || (me && may(me, "submitter"))).map(([page, text]) => (
            <a key={page} href={`#/${page}`} aria-current={page === name ? "page" : undefined}>{text}</a>
          ))}
        </nav>
        {bases.length > 1 && (
          <label>
            Base model{" "}
            <select value={around?.base} onChange={(event) => setChosen(event.currentTarget.value)}>
              {bases.map((base) => <option key={base}>{base}</option>)}
            </select>
          </label>
        )}
        <span class="space" />
        <Theme />
        {me && <span class="me">{me.name}, {Object.entries(me.roles).map(([team, role]) => `${role} of ${team}`).join(", ")}</span>}
        <button type="button" onClick={leave}>Log out</button>
      </header>
      <main id="content" ref={main} tabIndex={-1}>
        <Trouble problem={problem ?? who.problem} />
        {!around ? !problem && <Loading /> : (
          <>
            {status.alarms?.map((alarm: Json) => <div key={alarm.text} class="trouble" role="alert">ALARM {alarm.text}</div>)}
            {name === "task" ? <Task key={title} {...around} reference={title} />
              : name === "matrix" ? <Matrix {...around} />
              : name === "versions" ? <Versions {...around} />
              : name === "submit" ? <Submit {...around} />
              : name === "admin" ? <Admin {...around} />
              : <Now {...around} />}
          </>
        )}
      </main>
    </>
  )
}

function App() {
  const [isIn, setIn] = useState(hasToken())
  useEffect(() => onForgotten(() => setIn(false)), [])
  const leave = () => {
    keepToken("")
    setIn(false)
  }
  return (
    <>
      {isIn ? <Inside leave={leave} /> : <Login enter={() => setIn(true)} theme={<Theme />} />}
      <Speaker />
    </>
  )
}

render(<App />, document.getElementById("page")!)

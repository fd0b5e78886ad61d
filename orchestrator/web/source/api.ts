// The HTTP API of the control plane, as the page asks it. The token is kept for this tab alone.

export type Json = any

const KEPT = "onebasis-token"
let token = sessionStorage.getItem(KEPT) ?? ""
let forgotten: () => void = () => {}

export const hasToken = () => token !== ""

export function keepToken(given: string) {
  token = given.trim()
  if (token) sessionStorage.setItem(KEPT, token)
  else sessionStorage.removeItem(KEPT)
}

/** Called when the service no longer takes the token. */
export function onForgotten(call: () => void) {
  forgotten = call
}

/** An error of the service: what is wrong, where, and what to do about it. */
export class Problem extends Error {
  constructor(
    readonly status: number,
    readonly what: string,
    readonly where = "",
    readonly todo = "",
    readonly waitSeconds = 0,
  ) {
    super([where ? `${where}: ` : "", what, todo ? ` → ${todo}` : ""].join(""))
  }
}

export async function fetched(path: string, query: Record<string, unknown> = {}, init: RequestInit = {}): Promise<Response> {
  const url = new URL(`v1/${path}`, document.baseURI)
  for (const [name, value] of Object.entries(query)) {
    if (value !== undefined && value !== null && value !== "") url.searchParams.set(name, String(value))
  }
  let reply: Response
  try {
    const headers = { ...init.headers, authorization: `Bearer ${token}` }
    reply = await fetch(url, { ...init, headers, cache: "no-store", credentials: "omit", redirect: "error" })
  } catch {
    throw new Problem(0, "the service does not answer", "", "`onebasis status` says whether it runs")
  }
  if (reply.ok) return reply
  const told: Json = await reply.json().catch(() => ({}))
  if (reply.status === 401) {
    keepToken("")
    forgotten()
  }
  throw new Problem(reply.status, told.what ?? `answered with ${reply.status}`, told.where, told.todo, told.retry_seconds)
}

export const get = async (path: string, query: Record<string, unknown> = {}): Promise<Json> =>
  (await fetched(path, query)).json()

export const post = async (path: string, body: Json = {}): Promise<Json> =>
  (await fetched(path, {}, { method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" } })).json()

/** A part of a path: a task's name keeps its slash. */
export const inPath = (reference: string) => reference.split("/").map(encodeURIComponent).join("/")

export async function saved(path: string, query: Record<string, unknown>, name: string) {
  save(await (await fetched(path, query)).blob(), name)
}

export function save(content: Blob, name: string) {
  const link = document.createElement("a")
  link.href = URL.createObjectURL(content)
  link.download = name
  link.click()
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000)
}

export const ROLES = ["viewer", "submitter", "maintainer", "admin"]

/** Who looks at the page, as the service knows them. */
export interface Me {
  name: string
  token_id: string
  roles: Record<string, string>
  expires_at: number | null
}

/** Whether a button is shown. The server decides anyway. Without a team: whether in any. */
export function may(me: Me, role: string, team?: string): boolean {
  const least = ROLES.indexOf(role)
  const has = (held?: string) => held !== undefined && ROLES.indexOf(held) >= least
  if (team === undefined) return Object.values(me.roles).some(has)
  return has(me.roles["all teams"]) || has(me.roles[team])
}

export const mayAll = (me: Me, role: string) => may(me, role, "all teams")

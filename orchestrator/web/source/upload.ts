// Files of this machine, sent in pieces. What the service has already is not sent, so that whatever was cut off goes on
// where it was. Digests are by a library: the browser's own are there for https alone, and take a file as a whole.
import { sha256 } from "@noble/hashes/sha2.js"
import { bytesToHex } from "@noble/hashes/utils.js"
import { fetched, inPath, post, Problem, type Json } from "./api"

const READ_BYTES = 4 * 2 ** 20
const PIECE_BYTES = 2 ** 20
const PIECE_BYTES_MIN = 2 ** 16
const PIECE_BYTES_MAX = 8 * 2 ** 20
/** A piece that takes less, or more, is followed by one twice or half as long: the service waits a minute for each. */
const FAST_MS = 1000
const SLOW_MS = 10_000
/** Failures in a row after which nothing more is tried. */
const FAILURES_MAX = 8
const WAIT_MS = 500
const WAIT_MS_MAX = 10_000

/** How far it is: of a file's name, or of all. */
export interface Progress {
  does: string
  bytes: number
  of: number
}
type Tell = (progress: Progress) => void

const wait = (ms: number, signal: AbortSignal) =>
  new Promise<void>((done, refuse) => {
    const timer = setTimeout(done, ms)
    signal.addEventListener("abort", () => { clearTimeout(timer); refuse(signal.reason) }, { once: true })
  })

async function bytesOf(file: File, from: number, to: number): Promise<ArrayBuffer> {
  try {
    return await file.slice(from, to).arrayBuffer()
  } catch {
    throw new Problem(0, "cannot be read any more: it was written, or moved, meanwhile", file.name, "choose it again")
  }
}

async function digestOf(file: File, tell: Tell, signal: AbortSignal): Promise<string> {
  const hash = sha256.create()
  for (let at = 0; at < file.size; at += READ_BYTES) {
    signal.throwIfAborted()
    hash.update(new Uint8Array(await bytesOf(file, at, at + READ_BYTES)))
    tell({ does: `Reading ${file.name}`, bytes: Math.min(at + READ_BYTES, file.size), of: file.size })
  }
  return bytesToHex(hash.digest())
}

/** Asks as soon as it is allowed: many small files are more requests than a token may make at once. */
async function patiently<T>(ask: () => Promise<T>, signal: AbortSignal): Promise<T> {
  for (;;) {
    signal.throwIfAborted()
    try {
      return await ask()
    } catch (problem) {
      if (!(problem instanceof Problem && problem.status === 429)) throw problem
      await wait(1000 * problem.waitSeconds, signal)
    }
  }
}

async function sendOne(team: string, file: File, facts: Json, tell: Tell, signal: AbortSignal) {
  const path = `uploads/${inPath(team)}/${facts.sha256}`
  let at: number = facts.from
  let size = PIECE_BYTES
  let failures = 0
  for (;;) {
    tell({ does: `Sending ${file.name}`, bytes: at, of: file.size })
    const body = await bytesOf(file, at, at + size)
    const began = performance.now()
    let answer: Json
    try {
      const query = { bytes: file.size, offset: at }
      const init = { method: "PUT", body, signal, headers: { "content-type": "application/octet-stream" } }
      answer = await patiently(async () => (await fetched(path, query, init)).json(), signal)
    } catch (problem) {
      signal.throwIfAborted()
      const isAway = problem instanceof Problem && [0, 503].includes(problem.status)
      if (!isAway || ++failures >= FAILURES_MAX) throw problem
      size = Math.max(PIECE_BYTES_MIN, size / 4)
      await wait(Math.min(WAIT_MS * 2 ** (failures - 1), WAIT_MS_MAX), signal)
      continue // what came of it is told by the answer to the next
    }
    failures = answer.from > at ? 0 : failures + 1
    at = answer.from
    if (answer.is_whole) return
    if (failures >= FAILURES_MAX) throw new Problem(0, "the service takes nothing more of it", file.name, "submit it again: sending goes on from what has come")
    const took = performance.now() - began
    size = took < FAST_MS ? Math.min(2 * size, PIECE_BYTES_MAX) : took > SLOW_MS ? Math.max(size / 2, PIECE_BYTES_MIN) : size
  }
}

/** Sends files, each under its name in the upload. Returns the upload's id. */
export async function send(team: string, files: Map<string, File>, tell: Tell, signal: AbortSignal): Promise<string> {
  const facts: Record<string, Json> = {}
  const found = new Map<string, File>()
  for (const [name, file] of files) {
    const digest = await digestOf(file, tell, signal)
    facts[name] = { sha256: digest, bytes: file.size }
    found.set(digest, file)
  }
  const answer = await patiently(() => post("uploads/missing", { team, files: facts }), signal)
  if (!answer.is_kept) {
    for (const one of answer.missing) await sendOne(team, found.get(one.sha256)!, one, tell, signal)
    await patiently(() => post("uploads", { team, files: facts }), signal)
  }
  return answer.upload_id
}

// The matrix A[version][task] in memory: what the service told of it, with the cells that are carried over filled in.
import type { Json } from "./api"
import { LEAST_RANGE } from "./palette"

export interface Grid {
  versions: number[]
  tasks: Json[]
  /** Score of task t under the v-th version at v · tasks + t; NaN: none. */
  scores: Float64Array
  /** Change since the task's birth, the same way. */
  changes: Float64Array
  /** 1 where the score was measured under this very version, else it is carried over. */
  measured: Uint8Array
  /** Place of each task's version of birth. */
  births: Int32Array
  /** Largest change, either way. */
  range: number
}

export function gridOf(answer: Json): Grid {
  const versions: number[] = answer.versions
  const tasks: Json[] = answer.tasks
  const count = tasks.length
  const scores = new Float64Array(versions.length * count).fill(NaN)
  const changes = new Float64Array(versions.length * count).fill(NaN)
  const measured = new Uint8Array(versions.length * count)
  const places = new Map(versions.map((version, v) => [version, v]))
  const births = Int32Array.from(tasks, (task) => places.get(task.birth) ?? -1)
  let range = LEAST_RANGE
  for (let v = 0; v < versions.length; v++) {
    const row = v * count
    if (v) scores.copyWithin(row, row - count, row)
    for (const [t, score] of answer.news[v]) {
      scores[row + t] = score ?? NaN
      measured[row + t] = score === null ? 0 : 1
    }
    for (let t = 0; t < count; t++) {
      const birth = births[t]!
      if (birth < 0 || birth > v) continue
      const change = scores[row + t]! - scores[birth * count + t]!
      changes[row + t] = change
      if (Math.abs(change) > range) range = Math.abs(change)
    }
  }
  return { versions, tasks, scores, changes, measured, births, range }
}

export type Order = "worst" | "birth" | "name"

/** Places of the tasks to show, in their order: those whose change under the v-th version is worst first; then those
 * without one. */
export function ordered(grid: Grid, v: number, order: Order, words: string): number[] {
  const wanted = words.toLowerCase()
  const all = grid.tasks.map((_, t) => t).filter((t) => !wanted || grid.tasks[t].title.includes(wanted))
  if (order === "birth") return all
  if (order === "name") return all.sort((a, b) => (grid.tasks[a].title < grid.tasks[b].title ? -1 : 1))
  const row = v * grid.tasks.length
  const worth = (t: number) => {
    const change = grid.changes[row + t]!
    return Number.isNaN(change) ? Infinity : change
  }
  return all.sort((a, b) => {
    const [x, y] = [worth(a), worth(b)]
    return x === y ? a - b : x - y
  })
}

/** The shown tasks as rows and all versions as columns. */
export function csvOf(grid: Grid, shown: number[]): string {
  const count = grid.tasks.length
  const quoted = (text: string) => (/[",\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text)
  const lines = [["task", "born in", ...grid.versions.map((version) => `version ${version}`)].join(",")]
  for (const t of shown) {
    const cells = grid.versions.map((_, v) => {
      const score = grid.scores[v * count + t]!
      return Number.isNaN(score) ? "" : String(score)
    })
    lines.push([quoted(grid.tasks[t].title), grid.tasks[t].birth, ...cells].join(","))
  }
  return `${lines.join("\n")}\n`
}

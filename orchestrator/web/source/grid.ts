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

/** The shown tasks as rows and all versions as columns, as `onebasis scores --format csv` has them. */
export function csvOf(grid: Grid, shown: number[]): string {
  const quoted = (text: string) => (/[",\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text)
  const lines = [["task", "born in", "base", "own adapter", ...grid.versions.map((version) => `version ${version}`)].join(",")]
  for (const t of shown) {
    const { title, birth, base, local } = grid.tasks[t]
    const cells = scoresOf(grid, t).map((score) => (Number.isNaN(score) ? "" : String(score)))
    lines.push([quoted(title), birth, base ?? "", local ?? "", ...cells].join(","))
  }
  return `${lines.join("\n")}\n`
}

const SPECIAL: Record<string, string> = { "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}" }

/** The same as a table for booktabs, as `onebasis scores --format latex` has it: of each task the best score in bold, where its
 * scores differ; a prime where a score was carried over. */
export function latexOf(grid: Grid, shown: number[], baseModel: string): string {
  const escaped = (text: string) => text.replace(/[\\~^&%$#_{}]/g, (sign) => SPECIAL[sign] ?? `\\${sign}`)
  const digits = (score: number | null | undefined) => (score == null || Number.isNaN(score) ? "--" : score.toFixed(4))
  const lines = [
    `% scores of ${escaped(baseModel)} up to version ${grid.versions.at(-1)}; \\usepackage{booktabs}`,
    "% base: the head on the bare base model; own: the task's own adapter before merging; --: not measured",
    "% bold: the task's best; a prime: carried over, since the task hardly moved",
    `\\begin{tabular}{l${"r".repeat(grid.versions.length + 2)}}`,
    "\\toprule",
    `${["task", "base", "own", ...grid.versions.map((version) => `v${version}`)].join(" & ")} \\\\`,
    "\\midrule",
  ]
  for (const t of shown) {
    const { title, base, local } = grid.tasks[t]
    const scores = scoresOf(grid, t)
    const known = new Set(scores.filter((score) => !Number.isNaN(score)))
    const best = known.size > 1 ? Math.max(...known) : NaN
    const cells = scores.map((score, v) => {
      const carried = Number.isNaN(score) || grid.measured[v * grid.tasks.length + t] ? "" : "$'$"
      return (score === best ? `\\textbf{${digits(score)}}` : digits(score)) + carried
    })
    lines.push(`${[escaped(title), digits(base), digits(local), ...cells].join(" & ")} \\\\`)
  }
  return [...lines, "\\bottomrule", "\\end{tabular}", ""].join("\n")
}

/** The scores of a task, one for each version; NaN where there is none. */
function scoresOf(grid: Grid, t: number): number[] {
  return grid.versions.map((_, v) => (grid.births[t]! > v ? NaN : grid.scores[v * grid.tasks.length + t]!))
}

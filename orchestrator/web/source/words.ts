// Numbers and times as people read them.

export const count = (n: number, one: string, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`

export function seconds(value: number | null | undefined): string {
  if (value === null || value === undefined || Number.isNaN(value)) return "–"
  if (value < 1) return "under 1 s"
  if (value < 90) return `${Math.round(value)} s`
  if (value < 5400) return `${Math.round(value / 60)} min`
  if (value < 172_800) return `${(value / 3600).toFixed(1)} h`
  return `${Math.round(value / 86_400)} days`
}

export const ago = (at: number | null | undefined) => (at ? `${seconds(Math.max(0, Date.now() / 1000 - at))} ago` : "never")

const pad = (n: number) => String(n).padStart(2, "0")

export function clock(at: number | null | undefined): string {
  if (!at) return "–"
  const t = new Date(at * 1000)
  return `${t.getFullYear()}-${pad(t.getMonth() + 1)}-${pad(t.getDate())} ${pad(t.getHours())}:${pad(t.getMinutes())}:${pad(t.getSeconds())}`
}

export function bytes(n: number): string {
  for (const [size, unit] of [[1e9, "GB"], [1e6, "MB"], [1e3, "KB"]] as const) {
    if (n >= size) return `${(n / size).toFixed(2)} ${unit}`
  }
  return `${n} B`
}

export const score = (value: number | null | undefined) =>
  value === null || value === undefined || Number.isNaN(value) ? "–" : value.toFixed(4)

export const change = (value: number) =>
  Number.isNaN(value) ? "–" : value === 0 ? "0" : `${value > 0 ? "+" : "−"}${Math.abs(value).toFixed(4)}`

export const hundredths = (value: number) => `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`

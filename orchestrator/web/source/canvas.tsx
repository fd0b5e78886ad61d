// The matrix as a picture that can be moved through: a row for each task, a column for each version. Half a million cells
// are one small image, of which the part that is seen is drawn enlarged; labels and numbers are written where there is room.
import { useEffect, useMemo, useRef, useState } from "preact/hooks"
import type { Grid } from "./grid"
import { colour, css, ink } from "./palette"
import { change, score } from "./words"

export type Size = "all" | "small" | "medium" | "numbers"
const SIZES: Record<Exclude<Size, "all">, readonly [number, number]> = { small: [6, 6], medium: [16, 16], numbers: [56, 20] }
const LABELS = 190
const HEAD = 28
const LABEL_LEAST = 11
const SCROLLBAR = 18
const STEPS = 100
const NUMBER_LEAST = 44

interface Given {
  grid: Grid
  shown: number[]
  at: number
  size: Size
  open: (t: number, v: number) => void
}

export function told(grid: Grid, t: number, v: number): string {
  const cell = v * grid.tasks.length + t
  const where = `${grid.tasks[t].title} under version ${grid.versions[v]}: `
  if (grid.births[t]! > v) return `${where}not there yet`
  if (Number.isNaN(grid.scores[cell]!)) return `${where}no score`
  const how = grid.measured[cell] ? "measured" : "carried over"
  return `${where}${score(grid.scores[cell])}, ${change(grid.changes[cell]!)} since birth, ${how}`
}

/** The colour of every cell as a pixel, task by task: made once, so that another order only moves rows. */
function shadesOf(grid: Grid): Uint32Array {
  const [count, versions] = [grid.tasks.length, grid.versions.length]
  const steps = Array.from({ length: 2 * STEPS + 1 }, (_, step) => colour((step - STEPS) / STEPS))
  const bytes = new Uint8ClampedArray(4 * count * versions)
  for (let v = 0; v < versions; v++) {
    for (let t = 0; t < count; t++) {
      const change = grid.changes[v * count + t]!
      if (!Number.isNaN(change)) bytes.set([...steps[Math.round((change / grid.range) * STEPS) + STEPS]!, 255], 4 * (t * versions + v))
    }
  }
  return new Uint32Array(bytes.buffer)
}

export function Canvas({ grid, shown, at, size, open }: Given) {
  const box = useRef<HTMLDivElement>(null)
  const canvas = useRef<HTMLCanvasElement>(null)
  const [room, setRoom] = useState(900)
  const most = Math.min(640, Math.round(innerHeight * 0.62))
  const [cursor, setCursor] = useState({ row: 0, v: at })
  const [hovered, setHovered] = useState<string>()
  const [isFocused, setFocused] = useState(false)
  const versions = grid.versions.length
  const fitting = [
    Math.max(1, Math.min(56, (room - LABELS) / versions)),
    Math.max(1, Math.min(20, (most - HEAD) / Math.max(1, shown.length))),
  ] as const
  const [width, height] = size === "all" ? fitting : SIZES[size]
  const spot = { row: Math.min(cursor.row, Math.max(0, shown.length - 1)), v: Math.min(cursor.v, versions - 1) }

  const shades = useMemo(() => shadesOf(grid), [grid])
  const rows = Math.max(1, shown.length)
  const sheet = useMemo(() => ({ made: new OffscreenCanvas(versions, rows), pixels: new ImageData(versions, rows) }), [versions, rows])
  const image = useMemo(() => {
    const { made, pixels } = sheet
    const cells = new Uint32Array(pixels.data.buffer)
    shown.forEach((t, row) => cells.set(shades.subarray(t * versions, (t + 1) * versions), row * versions))
    made.getContext("2d")!.putImageData(pixels, 0, 0)
    return made
  }, [sheet, shades, shown])

  const draw = () => {
    const view = box.current
    const surface = canvas.current
    if (!view || !surface) return
    const ratio = devicePixelRatio || 1
    const [w, h] = [view.clientWidth, view.clientHeight]
    if (surface.width !== Math.round(w * ratio) || surface.height !== Math.round(h * ratio)) {
      surface.width = Math.round(w * ratio)
      surface.height = Math.round(h * ratio)
      surface.style.width = `${w}px`
      surface.style.height = `${h}px`
    }
    const pen = surface.getContext("2d")!
    const style = getComputedStyle(view)
    const text = style.getPropertyValue("--text")
    const quiet = style.getPropertyValue("--quiet")
    const accent = style.getPropertyValue("--accent")
    pen.setTransform(ratio, 0, 0, ratio, 0, 0)
    pen.clearRect(0, 0, w, h)
    pen.font = "12px system-ui, sans-serif"
    pen.textBaseline = "middle"
    const [left, top] = [view.scrollLeft, view.scrollTop]
    const firstV = Math.floor(left / width)
    const lastV = Math.min(versions, Math.ceil((left + w - LABELS) / width))
    const first = Math.floor(top / height)
    const last = Math.min(shown.length, Math.ceil((top + h - HEAD) / height))
    pen.save()
    pen.beginPath()
    pen.rect(LABELS, HEAD, w - LABELS, h - HEAD)
    pen.clip()
    pen.imageSmoothingEnabled = false
    pen.drawImage(image, firstV, first, lastV - firstV, last - first,
      LABELS + firstV * width - left, HEAD + first * height - top, (lastV - firstV) * width, (last - first) * height)
    if (width >= NUMBER_LEAST && height >= LABEL_LEAST) {
      pen.textAlign = "center"
      const count = grid.tasks.length
      for (let row = first; row < last; row++) {
        for (let v = firstV; v < lastV; v++) {
          const cell = v * count + shown[row]!
          const value = grid.scores[cell]!
          if (Number.isNaN(value) || grid.births[shown[row]!]! > v) continue
          pen.fillStyle = Number.isNaN(grid.changes[cell]!) ? text : ink(colour(grid.changes[cell]! / grid.range))
          pen.fillText(value.toFixed(3) + (grid.measured[cell] ? "" : "'"), LABELS + (v + 0.5) * width - left, HEAD + (row + 0.5) * height - top)
        }
      }
    }
    pen.strokeStyle = accent
    pen.lineWidth = 1
    pen.strokeRect(LABELS + at * width - left - 0.5, HEAD - 0.5, Math.max(2, width) + 1, h)
    if (isFocused) {
      pen.lineWidth = 2
      pen.strokeStyle = text
      pen.strokeRect(LABELS + spot.v * width - left - 1, HEAD + spot.row * height - top - 1, Math.max(4, width) + 2, Math.max(4, height) + 2)
    }
    pen.restore()
    pen.fillStyle = text
    pen.textAlign = "left"
    const every = Math.max(1, Math.ceil((height < LABEL_LEAST ? 40 : LABEL_LEAST) / height))
    for (let row = Math.ceil(first / every) * every; row < last; row += every) {
      const y = HEAD + (row + 0.5) * height - top
      if (y < HEAD) continue
      const title: string = grid.tasks[shown[row]!].title
      pen.fillText(title.length > 28 ? `${title.slice(0, 27)}…` : title, 6, y)
    }
    pen.textAlign = "center"
    const apart = Math.max(1, Math.ceil(44 / width))
    for (let v = Math.ceil(firstV / apart) * apart; v < lastV; v += apart) {
      const x = LABELS + (v + 0.5) * width - left
      if (x < LABELS) continue
      pen.fillStyle = v === at ? accent : quiet
      pen.fillText(`v${grid.versions[v]}`, x, HEAD / 2)
    }
  }

  const latest = useRef(draw)
  latest.current = draw
  useEffect(() => {
    const frame = requestAnimationFrame(() => latest.current())
    return () => cancelAnimationFrame(frame)
  })
  useEffect(() => {
    const view = box.current!
    const watch = new ResizeObserver(() => setRoom(view.clientWidth))
    watch.observe(view)
    const scheme = matchMedia("(prefers-color-scheme: dark)")
    const again = () => requestAnimationFrame(() => latest.current())
    scheme.addEventListener("change", again)
    const themes = new MutationObserver(again)
    themes.observe(document.documentElement, { attributes: true })
    return () => {
      watch.disconnect()
      themes.disconnect()
      scheme.removeEventListener("change", again)
    }
  }, [])

  const under = (event: MouseEvent) => {
    const view = box.current!
    const frame = view.getBoundingClientRect()
    const v = Math.floor((event.clientX - frame.left - LABELS + view.scrollLeft) / width)
    const row = Math.floor((event.clientY - frame.top - HEAD + view.scrollTop) / height)
    const isInside = event.clientX - frame.left >= LABELS && event.clientY - frame.top >= HEAD
    return isInside && v >= 0 && v < versions && row >= 0 && row < shown.length ? { row, v } : undefined
  }
  const move = (row: number, v: number) => {
    const next = { row: Math.max(0, Math.min(shown.length - 1, row)), v: Math.max(0, Math.min(versions - 1, v)) }
    setCursor(next)
    setHovered(undefined)
    const view = box.current!
    const [x, y] = [next.v * width, next.row * height]
    if (x < view.scrollLeft) view.scrollLeft = x
    if (x + width > view.scrollLeft + view.clientWidth - LABELS) view.scrollLeft = x + width - view.clientWidth + LABELS
    if (y < view.scrollTop) view.scrollTop = y
    if (y + height > view.scrollTop + view.clientHeight - HEAD) view.scrollTop = y + height - view.clientHeight + HEAD
  }
  const press = (event: KeyboardEvent) => {
    const { row, v } = spot
    const moves: Record<string, () => void> = {
      ArrowUp: () => move(row - 1, v),
      ArrowDown: () => move(row + 1, v),
      ArrowLeft: () => move(row, v - 1),
      ArrowRight: () => move(row, v + 1),
      PageUp: () => move(row - 20, v),
      PageDown: () => move(row + 20, v),
      Home: () => move(row, 0),
      End: () => move(row, versions - 1),
      Enter: () => shown.length && open(shown[spot.row]!, spot.v),
    }
    if (!moves[event.key]) return
    event.preventDefault()
    moves[event.key]!()
  }
  const words = shown.length ? told(grid, shown[spot.row]!, spot.v) : "no task"
  return (
    <>
      <div ref={box} class="matrix" tabIndex={0} role="application" aria-label="Matrix of scores: arrow keys move, Enter opens a cell"
        style={{ height: `${Math.min(most, HEAD + shown.length * height + SCROLLBAR)}px` }}
        aria-describedby="cell" onKeyDown={press} onScroll={() => latest.current()}
        onFocus={() => setFocused(true)} onBlur={() => setFocused(false)}
        onMouseMove={(event) => { const cell = under(event); setHovered(cell && told(grid, shown[cell.row]!, cell.v)) }}
        onMouseLeave={() => setHovered(undefined)}
        onClick={(event) => { const cell = under(event); if (cell) { move(cell.row, cell.v); open(shown[cell.row]!, cell.v) } }}>
        <canvas ref={canvas} aria-hidden="true" />
        <div class="spacer" style={{ width: `${LABELS + versions * width}px`, height: `${HEAD + shown.length * height}px` }} />
      </div>
      <p id="cell" class="cell" aria-live={isFocused ? "polite" : "off"}>{hovered ?? words}</p>
      <Legend range={grid.range} />
    </>
  )
}

function Legend({ range }: { range: number }) {
  const steps = [-1, -0.75, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1]
  return (
    <div class="legend" role="img" aria-label={`Colours: red for a loss down to ${change(-range)}, pale for no change, blue for a gain up to ${change(range)}`}>
      <span>{change(-range)}</span>
      {steps.map((step) => <i key={step} style={{ background: css(colour(step)) }} />)}
      <span>{change(range)} since birth · ' carried over, not measured again</span>
    </div>
  )
}

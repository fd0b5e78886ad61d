// A line chart that needs no colours: each line has a dash of its own and its name at its end.
import { score } from "./words"

export interface Line {
  name: string
  points: (readonly [number, number])[]
}

const [WIDTH, HEIGHT, LEFT, BOTTOM, RIGHT, TOP] = [760, 240, 62, 34, 120, 12]
const DASHES = ["", "8 4", "2 4", "10 3 2 3", "4 4"]
const MOST_POINTS = 800

function ticks(low: number, high: number, most: number): number[] {
  const raw = (high - low || 1) / most
  const power = 10 ** Math.floor(Math.log10(raw))
  const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= raw)!
  const first = Math.ceil(low / step) * step
  return Array.from({ length: Math.floor((high - first) / step + 1e-9) + 1 }, (_, i) => Number((first + i * step).toPrecision(10)))
}

function thinned(points: Line["points"]): Line["points"] {
  if (points.length <= MOST_POINTS) return points
  const every = points.length / MOST_POINTS
  return [...Array.from({ length: MOST_POINTS - 1 }, (_, i) => points[Math.floor(i * every)]!), points.at(-1)!]
}

export function Chart({ lines, x, y, whole = false }: { lines: Line[]; x: string; y: string; whole?: boolean }) {
  const all = lines.flatMap((line) => line.points)
  const [xs, ys] = [all.map(([at]) => at), all.map(([, value]) => value)]
  const span = (values: number[]) => values.reduce<[number, number]>(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity])
  const [x0, x1] = span(xs)
  let [y0, y1] = span(ys)
  if (y1 - y0 < 0.02) [y0, y1] = [y0 - 0.01, y1 + 0.01]
  const px = (at: number) => LEFT + ((at - x0) / (x1 - x0 || 1)) * (WIDTH - LEFT - RIGHT)
  const py = (value: number) => HEIGHT - BOTTOM - ((value - y0) / (y1 - y0)) * (HEIGHT - BOTTOM - TOP)
  const told = lines.map((line) => `${line.name}: from ${score(line.points[0]?.[1])} to ${score(line.points.at(-1)?.[1])}`).join("; ")
  return (
    <svg class="chart" viewBox={`0 0 ${WIDTH} ${HEIGHT}`} role="img" aria-label={`${y} by ${x}. ${told}`}>
      {ticks(y0, y1, 6).map((value) => (
        <g key={value}>
          <line x1={LEFT} x2={WIDTH - RIGHT} y1={py(value)} y2={py(value)} class="rule" />
          <text x={LEFT - 6} y={py(value)} text-anchor="end" dominant-baseline="middle">{value}</text>
        </g>
      ))}
      {ticks(x0, x1, 8).filter((at) => !whole || Number.isInteger(at)).map((at) => <text key={at} x={px(at)} y={HEIGHT - BOTTOM + 16} text-anchor="middle">{at}</text>)}
      <text x={(LEFT + WIDTH - RIGHT) / 2} y={HEIGHT - 2} text-anchor="middle">{x}</text>
      <text x={12} y={HEIGHT / 2} text-anchor="middle" transform={`rotate(-90 12 ${HEIGHT / 2})`}>{y}</text>
      {lines.map((line, i) => {
        const points = thinned(line.points)
        const last = points.at(-1)
        return (
          <g key={line.name}>
            <polyline class="curve" stroke-dasharray={DASHES[i % DASHES.length]} points={points.map(([at, value]) => `${px(at)},${py(value)}`).join(" ")} />
            {points.length < 60 && points.map(([at, value]) => <circle key={at} class="point" cx={px(at)} cy={py(value)} r={2.5} />)}
            {last && <text x={px(last[0]) + 6} y={py(last[1])} dominant-baseline="middle">{line.name}</text>}
          </g>
        )
      })}
    </svg>
  )
}

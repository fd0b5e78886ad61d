// Colours for the change of a score: red for a loss, blue for a gain, pale for none. Red and blue, not red and green, which
// one man in twelve cannot tell apart; the anchors are ColorBrewer's RdBu, as in the picture scores.png.

const ANCHORS = [
  [103, 0, 31], [178, 24, 43], [214, 96, 77], [244, 165, 130], [253, 219, 199], [247, 247, 247],
  [209, 229, 240], [146, 197, 222], [67, 147, 195], [33, 102, 172], [5, 48, 97],
] as const

/** Colours span at least ± this change: noise of one row in hundreds is no disaster. As in the picture. */
export const LEAST_RANGE = 0.02

export type Colour = readonly [number, number, number]

/** at: −1 for the largest loss, 1 for the largest gain. */
export function colour(at: number): Colour {
  const place = ((Math.max(-1, Math.min(1, at)) + 1) / 2) * (ANCHORS.length - 1)
  const low = Math.min(ANCHORS.length - 2, Math.floor(place))
  const part = place - low
  const [a, b] = [ANCHORS[low]!, ANCHORS[low + 1]!]
  return [0, 1, 2].map((i) => Math.round(a[i]! + (b[i]! - a[i]!) * part)) as unknown as Colour
}

export const css = ([r, g, b]: Colour) => `rgb(${r} ${g} ${b})`

/** Black or white, whichever is read better on a colour. */
export function ink([r, g, b]: Colour): string {
  const linear = (c: number) => (c <= 10 ? c / 3294 : ((c / 255 + 0.055) / 1.055) ** 2.4)
  return 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b) > 0.179 ? "#000" : "#fff"
}

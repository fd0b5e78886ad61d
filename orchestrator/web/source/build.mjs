// Builds the web page into ../built: `make web`. Names hold the digest of their content, so that browsers may keep them.
// manifest.json says from which sources it was built; a test compares, so that nobody forgets to build.
import { createHash } from "node:crypto"
import { mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs"
import { dirname, join, relative, sep } from "node:path"
import { fileURLToPath } from "node:url"
import { gzipSync } from "node:zlib"
import { build } from "esbuild"

const here = dirname(fileURLToPath(import.meta.url))
const out = join(here, "..", "built")
const digest = (content) => createHash("sha256").update(content).digest("hex")

const made = await build({
  absWorkingDir: here,
  entryPoints: { page: "main.tsx", style: "page.css" },
  bundle: true,
  minify: true,
  format: "esm",
  target: ["es2022"],
  jsx: "automatic",
  jsxImportSource: "preact",
  charset: "utf8",
  legalComments: "none",
  write: false,
  outdir: "/",
})

const files = new Map()
const named = {}
for (const { path, contents } of made.outputFiles) {
  const [, stem, ending] = /([^/\\]+)\.(\w+)$/.exec(path)
  const name = `${stem}.${digest(contents).slice(0, 12)}.${ending}`
  files.set(name, contents)
  named[`${stem}.${ending}`] = name
}
const icon = readFileSync(join(here, "icon.svg"))
named["icon.svg"] = `icon.${digest(icon).slice(0, 12)}.svg`
files.set(named["icon.svg"], icon)
const page = readFileSync(join(here, "index.html"), "utf8").replace(/@([\w.]+)@/g, (_, name) => {
  if (!named[name]) throw new Error(`index.html names ${name}, which is not built`)
  return named[name]
})
files.set("index.html", Buffer.from(page))
const licences = ["preact", "@noble/hashes"].map((name) => `${name}\n\n${readFileSync(join(here, "node_modules", name, "LICENSE"), "utf8")}`)
files.set("licences.txt", Buffer.from(licences.join("\n")))

function* sources(folder) {
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    if (entry.name === "node_modules") continue
    const path = join(folder, entry.name)
    if (entry.isDirectory()) yield* sources(path)
    else yield path
  }
}
const of = (pairs) => Object.fromEntries([...pairs].sort(([a], [b]) => (a < b ? -1 : 1)))
const manifest = {
  sources: of([...sources(here)].map((path) => [relative(here, path).split(sep).join("/"), digest(readFileSync(path))])),
  files: of([...files].map(([name, content]) => [name, digest(content)])),
}
rmSync(out, { recursive: true, force: true })
mkdirSync(out)
for (const [name, content] of files) writeFileSync(join(out, name), content)
writeFileSync(join(out, "manifest.json"), JSON.stringify(manifest, null, 2) + "\n")
const size = [...files.values()].reduce((sum, content) => sum + gzipSync(content, { level: 9 }).length, 0)
console.log(`built ${files.size} files, ${(size / 1000).toFixed(1)} kB in gzip`)

// Logging in: the token is tried before it is kept.
import type { ComponentChildren } from "preact"
import { useState } from "preact/hooks"
import { get, keepToken } from "./api"
import { Trouble } from "./parts"

export function Login({ enter, theme }: { enter: () => void; theme: ComponentChildren }) {
  const [given, setGiven] = useState("")
  const [problem, setProblem] = useState<Error>()
  const submit = async (event: Event) => {
    event.preventDefault()
    keepToken(given)
    try {
      await get("whoami")
      enter()
    } catch (error) {
      keepToken("")
      setProblem(error as Error)
    }
  }
  return (
    <main class="login">
      <h1>onebasis</h1>
      <form onSubmit={submit}>
        <label for="token">Token</label>
        <input id="token" type="password" autocomplete="off" spellcheck={false} required value={given}
          aria-describedby="about-token" onInput={(event) => setGiven(event.currentTarget.value)} />
        <button type="submit" class="main">Log in</button>
        <p id="about-token">
          <code>onebasis token create NAME --role viewer --all-teams</code> makes one where the service runs. It is kept for this tab
          alone, and forgotten when you close it.
        </p>
        <Trouble problem={problem} />
      </form>
      {theme}
    </main>
  )
}

"""vLLM's API for adapters on loopback, without its engine: its own classes where its source is there, else a server
that keeps to the same rules.

`make check-vllm` fetches the source and runs the tests against it. vLLM is 340 MB, and its engine takes a GPU; what
decides about adapters is plain Python in it.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

VLLM = "vllm==0.33.0"
NEEDED = (  # what its modules for adapters import, beside what we have
    *("msgspec", "model-hosting-container-standards", "openai", "openai-harmony", "cbor2", "pyzmq", "pybase64"),
    *("xgrammar", "apache-tvm-ffi", "partial-json-parser", "llguidance", "orjson"),
)
FOLDER = Path(sys.prefix) / "vllm-source"
IS_REAL = importlib.util.find_spec("vllm") is not None


@dataclass
class LoRARequest:
    """The fields of vLLM's own that a resolver fills in."""

    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class StandIn:
    """What vLLM knows of adapters, by the rules of its `OpenAIServingModels`."""

    resolvers: list[Any]
    loads: list[str] = field(default_factory=list)
    """Folders in the order in which the engine was given them."""
    lora_requests: dict[str, Any] = field(default_factory=dict)

    async def resolve_lora(self, name: str) -> Any:
        for resolver in [] if name in self.lora_requests else self.resolvers:
            if (found := await resolver.resolve_lora("the-base", name)) is not None:
                self.lora_requests[name] = found
                self.loads.append(found.lora_path)
                break
        return self.lora_requests.get(name)

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/v1/load_lora_adapter")
        async def load(request: Request) -> JSONResponse:
            asked = await request.json()
            if asked["lora_name"] in self.lora_requests and not asked.get("load_inplace"):
                return JSONResponse({"error": "has already been loaded"}, 400)
            self.loads.append(asked["lora_path"])
            self.lora_requests[asked["lora_name"]] = LoRARequest(asked["lora_name"], 1, asked["lora_path"])
            return JSONResponse("Success")

        @app.post("/v1/unload_lora_adapter")
        async def unload(request: Request) -> JSONResponse:
            known = self.lora_requests.pop((await request.json())["lora_name"], None)
            return JSONResponse(
                {"error": "cannot be found"} if known is None else "Success", 404 if known is None else 200
            )

        return app


class Vllm:
    """A vLLM that listens: `url`, and what it has loaded."""

    def __init__(self, models: Any, loads: list[str]) -> None:
        self.url, self.models, self.loads = "", models, loads

    def ask(self, name: str) -> str | None:
        """The folder by which a request for a model is answered; None where there is no such model.

        Raises:
            ValueError: What vLLM answers with 400.
        """
        call: Awaitable[Any] = self.models.resolve_lora(name)
        asyncio.run_coroutine_threadsafe(call, self.loop).result(60)  # type: ignore[arg-type]
        return self.folder(name)

    def folder(self, name: str) -> str | None:
        """The folder that a model has now."""
        known = self.models.lora_requests.get(name)
        return None if known is None else str(known.lora_path)

    loop: asyncio.AbstractEventLoop


def request_class() -> Callable[..., Any]:
    """What makes vLLM's request for an adapter."""
    if not IS_REAL:
        return LoRARequest
    from vllm.lora.request import LoRARequest as Real

    return Real


@contextmanager
def listening(resolver: Any, api_key: str = "") -> Iterator[Vllm]:
    """A vLLM with one resolver, on a free port of loopback."""
    vllm, app = _real(resolver) if IS_REAL else _stand_in(resolver)

    @app.middleware("http")
    async def needs_key(request: Request, call_next: Any) -> Any:
        if api_key and request.headers.get("authorization") != f"Bearer {api_key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return await call_next(request)

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    ready = threading.Event()

    async def serve() -> None:
        vllm.loop = asyncio.get_running_loop()
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        vllm.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        ready.set()
        await serving

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield vllm
    finally:
        server.should_exit = True
        thread.join(30)


def _stand_in(resolver: Any) -> tuple[Vllm, FastAPI]:
    models = StandIn([resolver])
    return Vllm(models, models.loads), models.app()


def _real(resolver: Any) -> tuple[Vllm, FastAPI]:
    """vLLM's own class and routes; of its engine, what takes an adapter: it reads the configuration as vLLM does."""
    os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "true"
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.lora.api_router import attach_router
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    LoRAResolver.register(type(resolver))
    assert isinstance(resolver, LoRAResolver)
    LoRAResolverRegistry.resolvers.clear()
    LoRAResolverRegistry.register_resolver("onebasis", resolver)
    loads: list[str] = []

    async def add_lora(request: Any) -> bool:
        helper = PEFTHelper.from_local_dir(request.lora_path, None)
        helper.validate_legal(SimpleNamespace(max_lora_rank=64))
        loads.append(request.lora_path)
        return True

    config = SimpleNamespace(model="the-base", max_model_len=64)
    engine = SimpleNamespace(model_config=config, renderer=None, input_processor=None, add_lora=add_lora)
    models = OpenAIServingModels(engine, [BaseModelPath(name="the-base", model_path="the-base")])
    app = FastAPI()
    app.state.openai_serving_models = models
    attach_router(app)
    return Vllm(models, loads), app


def main() -> None:
    """Fetch the source of vLLM, once, and run the tests against it."""
    noted, wanted = FOLDER / "installed", "\n".join((VLLM, *NEEDED))
    if not noted.exists() or noted.read_text() != wanted:
        FOLDER.mkdir(exist_ok=True)
        uv = str(Path(sys.executable).with_name("uv"))
        pip = [uv, "pip", "install", "--quiet", "--no-deps", "--target", str(FOLDER)]
        subprocess.run([*pip, *NEEDED, VLLM], check=True)
        noted.write_text(wanted)
    # A thread of one of vLLM's libraries would abort an interpreter that ends in the ordinary way.
    run = "import os, sys, pytest; code = pytest.main(sys.argv[1:]); sys.stdout.flush(); os._exit(code)"
    tests = ["-c", run, "-q", "tests/workers/serving/test_vllm_resolver.py"]
    environment = os.environ | {"PYTHONPATH": str(FOLDER)}
    sys.exit(subprocess.run([sys.executable, *tests], env=environment).returncode)


if __name__ == "__main__":
    main()

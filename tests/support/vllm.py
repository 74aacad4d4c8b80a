"""A program that speaks vLLM's HTTP: weights and adapters of transformers and peft, one token at a time.

    python -m tests.support.vllm serve MODEL --host ADDRESS --port N ... [--journal FILE]

It rejects what vLLM rejects. Each process, adapter and request leaves a line in the journal. Libraries are imported
where they are used: the version is asked of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch


class Standin(BaseHTTPRequestHandler):
    """The addresses of vLLM that a gateway uses."""

    model: ClassVar[Any]
    adapters: ClassVar[dict[str, str]] = {}
    options: ClassVar[argparse.Namespace]
    lock: ClassVar[Any] = threading.Lock()
    served: ClassVar[int] = 0

    def log_message(self, *args: Any) -> None:
        """Write no log."""

    def do_GET(self) -> None:
        models = [{"id": self.options.served_model_name, "max_model_len": self.options.max_model_len}]
        known = {"/health": {}, "/v1/models": {"data": models}}
        self._answer(200 if self.path in known else 404, known.get(self.path, {}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers.get("Authorization") != f"Bearer {os.environ['VLLM_API_KEY']}":
            self._answer(401, failure("Unauthorized"))
            return
        journal(self.options, path=self.path, model=body.get("model") or body.get("lora_name"))
        work = {
            "/v1/completions": self._complete, "/v1/load_lora_adapter": self._load,
            "/v1/unload_lora_adapter": self._unload,
        }[self.path]  # fmt: skip
        work(body)

    def _load(self, body: dict[str, Any]) -> None:
        from peft import PeftModel

        assert os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
        assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
        name, path = body["lora_name"], Path(body["lora_path"])
        config = json.loads((path / "adapter_config.json").read_text())
        if name in self.adapters:
            self._answer(400, failure(f"The lora adapter '{name}' has already been loaded."))
        elif config.get("use_dora") or config.get("modules_to_save") or config["r"] > self.options.max_lora_rank:
            self._answer(500, failure("vLLM does not yet support it"))
        else:
            with self.lock:
                if isinstance(type(self).model, PeftModel):
                    type(self).model.load_adapter(path, adapter_name=name[:16])
                else:
                    type(self).model = PeftModel.from_pretrained(type(self).model, path, adapter_name=name[:16]).eval()
            self.adapters[name] = str(path)
            self._answer(200, {})

    def _unload(self, body: dict[str, Any]) -> None:
        self.adapters.pop(body["lora_name"])
        self._answer(200, {})

    def _complete(self, body: dict[str, Any]) -> None:
        import torch

        name = body["model"]
        if name not in (self.options.served_model_name, *self.adapters):
            self._answer(404, failure(f"The model `{name}` does not exist."))
            return
        assert body["stream"]
        assert body["return_token_ids"]
        if len(body["prompt"]) + body["max_tokens"] > self.options.max_model_len:
            self._answer(400, failure(f"This model's maximum context length is {self.options.max_model_len} tokens."))
            return
        with self.lock:
            type(self).served += 1
            if self.served == int(os.environ.get("STANDIN_ENDS_AFTER", "0")):
                print("ValueError: out of memory", flush=True)
                os._exit(3)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        ids, generator = list(body["prompt"]), torch.Generator().manual_seed(body["seed"])
        for number in range(body["max_tokens"]):
            logits_V = self._logits(name, ids)
            drawn = body["temperature"] > 0
            warm_V = logits_V / (body["temperature"] or 1)
            chances_V = warm_V.softmax(-1)
            told_V = (warm_V if self.options.logprobs_mode == "processed_logprobs" else logits_V).log_softmax(-1)
            token = int(torch.multinomial(chances_V, 1, generator=generator)) if drawn else int(logits_V.argmax())
            ended = token in body["stop_token_ids"]
            reason = "stop" if ended else "length" if number + 1 == body["max_tokens"] else None
            self._piece(token, told_V, body["logprobs"], reason)
            if reason:
                break
            ids.append(token)
        self.wfile.write(b"data: [DONE]\n\n")

    def _logits(self, name: str, ids: list[int]) -> torch.Tensor:
        import torch
        from peft import PeftModel

        model = type(self).model
        with self.lock, torch.inference_mode():
            if name in self.adapters:
                model.set_adapter(name[:16])
                return model(input_ids=torch.tensor([ids])).logits[0, -1]
            if isinstance(model, PeftModel):
                with model.disable_adapter():
                    return model(input_ids=torch.tensor([ids])).logits[0, -1]
            return model(input_ids=torch.tensor([ids])).logits[0, -1]

    def _piece(self, token: int, logprobs_V: torch.Tensor, count: int | None, reason: str | None) -> None:
        logprobs = None
        if count is not None:
            named = [token, *logprobs_V.topk(count).indices.tolist()]  # the chosen one is named whether likely or not
            top = {f"token_id:{each}": float(logprobs_V[each]) for each in named}
            logprobs = {"token_logprobs": [float(logprobs_V[token])], "top_logprobs": [top]}
        choice = {"index": 0, "text": "", "token_ids": [token], "logprobs": logprobs, "finish_reason": reason}
        self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        self.wfile.flush()

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def failure(message: str) -> dict[str, Any]:
    """Return the body of an error."""
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}


def journal(options: argparse.Namespace, **fields: Any) -> None:
    """Write a line about this process."""
    with options.journal.open("a") as stream:
        stream.write(json.dumps({"pid": os.getpid(), "weights": options.weights, **fields}) + "\n")


def main() -> None:
    """Answer until the end of the process."""
    if "--version" in sys.argv:
        print(os.environ.get("STANDIN_VERSION", "0.1"))
        return
    if sys.argv[1] != "serve" or sys.argv[2].startswith("-"):
        print("ValueError: `model` should be provided as the first positional argument when using `vllm serve`.")
        sys.exit(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("weights")
    parser.add_argument("--logprobs-mode", default="raw_logprobs")
    for name in ("--host", "--served-model-name", "--generation-config", "--uvicorn-log-level", "--dtype"):
        parser.add_argument(name)
    for name in ("--port", "--max-loras", "--max-cpu-loras", "--max-lora-rank", "--max-model-len"):
        parser.add_argument(name, type=int)
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--journal", type=Path, default=Path(os.environ["STANDIN_JOURNAL"]))
    options = parser.parse_args(sys.argv[2:])
    if os.environ.get("STANDIN_FAULT"):
        print("(EngineCore pid=8) ERROR 11-30 10:37:54 [core.py:9] ValueError: no room for the cache")
        print("(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above.")
        sys.exit(3)
    from posttrain import environment

    with environment.importing():
        from transformers import AutoModelForCausalLM

    Standin.options = options
    Standin.model = AutoModelForCausalLM.from_pretrained(options.weights, dtype=options.dtype).eval()
    options.max_model_len = options.max_model_len or Standin.model.config.max_position_embeddings
    journal(options, path="begun", model=None, adapting=options.enable_lora)
    # vLLM computes in a process of its own, which nothing ends when the one with the interface is killed
    engine = subprocess.Popen(["sleep", "600"])
    journal(options, path="engine", model=None, engine=engine.pid)
    ThreadingHTTPServer.request_queue_size = 256
    ThreadingHTTPServer((options.host, options.port), Standin).serve_forever()


if __name__ == "__main__":
    main()

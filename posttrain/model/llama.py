"""llama.cpp in this process (xllamacpp): a GGUF file served, and asked over llama.cpp's own HTTP interface."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.digests import digest_of, file_digest
from posttrain.errors import ArtifactDamaged, shown

PACKAGE = "xllamacpp"
WAIT_SECONDS = 600
"""Longest wait for an answer of llama.cpp."""
Ask = Callable[[str, Mapping[str, Any]], Any]
"""Posts a JSON body to a path, and returns the answer."""


def is_installed() -> bool:
    """Tell whether llama.cpp can be asked."""
    return importlib.util.find_spec(PACKAGE) is not None


def version() -> str:
    """Return the version of llama.cpp's package."""
    return importlib.metadata.version(PACKAGE)


def digest_of_files(files: Sequence[Path]) -> str:
    """Return the digest of a model's file, or of it together with that of an adapter on it."""
    digests = [file_digest(path) for path in files]
    return digests[0] if len(digests) == 1 else digest_of(digests)


def digest_of_record(record: Mapping[str, Any]) -> str:
    """Return the same digest from the record of an export."""
    digests = [record[name] for name in ("base_sha256", "sha256") if name in record]
    return str(digests[0]) if len(digests) == 1 else digest_of(digests)


@contextlib.contextmanager
def llama(files: Sequence[Path], context: int = 1024) -> Iterator[Ask]:
    """Serve a model's file, with that of an adapter on it if there is one, for texts of ``context`` tokens at most.

    Raises ArtifactDamaged when llama.cpp cannot read it.
    """
    import torch
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    path, *adapters = files
    parameters.model.path = str(path)
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(each), 1.0) for each in adapters]
    # ggml's threads spin while they wait: more of them than free cores are slower than one.
    for threads in (parameters.cpuparams, parameters.cpuparams_batch):
        threads.n_threads = torch.get_num_threads()
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = context, 1, 0
    parameters.hostnames, parameters.port = ["127.0.0.1"], 0
    parameters.verbosity, parameters.warmup, parameters.use_jinja = -1, False, True
    try:
        server = xllamacpp.Server(parameters)
    except RuntimeError as error:
        named = " with ".join([str(path), *(each.name for each in adapters)])
        raise ArtifactDamaged(f"{named} cannot be read by llama.cpp: {error}") from None
    address = server.listening_address
    try:
        yield lambda place, body: _post(f"{address}{place}", body)
    finally:
        del server


def _post(address: str, body: Mapping[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=WAIT_SECONDS) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        what = error.read().decode("utf-8", "replace")
        raise ArtifactDamaged(f"llama.cpp cannot answer: {shown(what)}") from None

"""A repository of the hub with an artifact: one commit of all its files and its card, tagged with its digest."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.artifact import ABOUT, CARD, MANIFEST, Artifact, read_manifest
from posttrain.errors import BadInput, Problem, brief, reject

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

TOKEN = "HF_TOKEN"
ENDPOINT = "HF_ENDPOINT"
OWN = (".safetensors", ".json", ".jinja", ".model", ".txt")
"""Suffixes of an artifact's files: those of a former artifact are removed in the same commit."""


@dataclass(frozen=True, kw_only=True)
class Push:
    """One artifact in a repository."""

    url: str
    """Address of the revision."""
    revision: str
    """Tag of the commit: the beginning of the digest."""
    commit: str | None
    """SHA of the new commit; None when the artifact was there already."""
    removed: tuple[str, ...] = ()
    """Files of a former artifact that the commit removed."""


def push(artifact: Artifact, card: str, repo: str, *, public: bool = False) -> Push:
    """Upload an artifact with its card to ``repo``, in one commit, and name the commit by the digest.

    A new repository is private unless ``public``. Raises BadInput when the hub cannot be reached or rejects the
    request, without a token in HF_TOKEN, and for an existing public repository without ``public``.
    """
    token = os.environ.get(TOKEN)
    if not token:
        reject(TOKEN, "holds no token", f"Set {TOKEN} to a token with the right to write: hf.co/settings/tokens")
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get(ENDPOINT), token=token)
    revision = artifact.digest[:12]
    with _explained(repo):
        api.create_repo(repo, private=not public, exist_ok=True)
        info = api.model_info(repo)
        _require_private(repo, info, public=public)
        url = f"{api.endpoint}/{repo}/tree/{revision}"
        if revision in {tag.name for tag in api.list_repo_refs(repo).tags}:
            return Push(url=url, revision=revision, commit=None)
        commit, removed = _commit(api, artifact, card, repo, info)
        api.create_tag(repo, tag=revision, revision=commit, exist_ok=True)
    return Push(url=url, revision=revision, commit=commit, removed=removed)


def _require_private(repo: str, info: ModelInfo, *, public: bool) -> None:
    if not info.private and not public:
        reject(repo, "is a public repository", "Give another name, or public=true when everybody may read the artifact")


def _commit(api: HfApi, artifact: Artifact, card: str, repo: str, info: ModelInfo) -> tuple[str, tuple[str, ...]]:
    """Commit the files of the artifact and its card; return the commit and the removed files of a former artifact."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    names = [*read_manifest(artifact.path)["files"], MANIFEST]
    add = [CommitOperationAdd(name, artifact.path / name) for name in names if name != CARD]
    there = {file.rfilename for file in info.siblings or ()}
    stale = tuple(sorted(name for name in there - {*names, *ABOUT} if Path(name).suffix in OWN))
    commit = api.create_commit(
        repo,
        [*add, CommitOperationAdd(CARD, card.encode()), *map(CommitOperationDelete, stale)],
        commit_message=f"{artifact.manifest.recipe} {artifact.named}",
    )
    return str(commit.oid), stale


@contextlib.contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn the errors of the hub's client and of the network into BadInput."""
    from httpx2 import HTTPError  # of the client of huggingface_hub

    try:
        yield
    except (OSError, ValueError, HTTPError, RuntimeError) as error:
        # an upload that failed is a RuntimeError, and says why in its cause alone
        cause = error.__cause__ if isinstance(error.__cause__, Exception) and isinstance(error, RuntimeError) else error
        fix = f"Check the name, the right of {TOKEN} to write, and the network; then give the same command again"
        what = f"the hub could not be written: {brief(cause)}"
        raise BadInput(Problem(where=repo, what=what, fix=fix)) from None

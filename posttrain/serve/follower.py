"""The follower: watches the aliases of an output root, and has a running server take each new artifact in."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

from posttrain.artifact import verify
from posttrain.errors import ArtifactDamaged, PosttrainError, first_line
from posttrain.ledger import Standing
from posttrain.ledger.releases import ALIASES, histories, read
from posttrain.run.start import find_standing
from posttrain.serve.catalogue import BasePlace, Catalogue, Served, base_of, read_served
from posttrain.serve.names import names_of
from posttrain.serve.service import Service, drop, take_in

SECONDS = 0.25
"""Time between two looks at the file."""


class Follower:
    """The aliases that a server follows.

    A new artifact is verified, loaded between two tokens, and proven; then the names are replaced as a whole. Requests
    that were admitted keep their model, which is freed after them when it has no name any more. An alias that cannot
    be followed stays where it was, and the log says why.
    """

    def __init__(self, service: Service, catalogue: Catalogue, place: BasePlace, *, unpromoted: bool) -> None:
        self._service, self._catalogue, self._place, self._unpromoted = service, catalogue, place, unpromoted
        self._seen: tuple[int, ...] | None = None
        self._failed: set[str] = set()
        self._leaving: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="aliases", daemon=True)

    def start(self) -> None:
        """Take in the present aliases, then watch for others."""
        self.look()
        self._thread.start()

    def stop(self) -> None:
        """End the watch."""
        self._ended.set()
        self._thread.join()

    def look(self) -> bool:
        """Follow the aliases if their file has changed; return True when it had."""
        version = _version(self._catalogue.root / ALIASES)
        if version == self._seen:
            return False
        self._seen = version
        try:
            moved = histories(read(self._catalogue.root))
        except (PosttrainError, OSError) as error:
            self._service.log("aliases", {"fault": first_line(error)})
            return False
        # the present artifact of each name, and the one that a rollback brings back
        wanted = {standing.artifact: standing for line in moved.values() for standing in line[-2:]}
        for standing in wanted.values():
            self._take_in(standing)
        digests = {alias: tuple(each.artifact for each in line) for alias, line in moved.items()}
        models, before = self._service.models, self._service.names
        kept = self._kept(wanted)
        self._service.names = names_of(self._catalogue, digests, kept)
        self._leaving = set(models.loaded) - kept
        for alias, digest in self._service.names.aliases.items():
            if before.aliases.get(alias) != digest:
                self._service.log("alias", {"alias": alias, "model": digest, "before": before.aliases.get(alias)})
        return True

    def tidy(self) -> None:
        """Free the models that no name has, as soon as no answer of them is left."""
        models, engine = self._service.models, self._service.engine
        for digest in sorted(self._leaving):
            if drop(models, engine, digest):
                self._leaving.discard(digest)
                self._service.log("unloaded", {"model": digest})

    def _kept(self, wanted: Iterable[str]) -> frozenset[str]:
        """Return the digests of the loaded models with a name: of the start, wanted by an alias, and their bases."""
        loaded, catalogue = self._service.models.loaded, self._catalogue
        named = {served.digest for served in (*catalogue.artifacts, *catalogue.bases)} | {*wanted}
        named |= {loaded[digest].served.base.digest for digest in wanted if digest in loaded}
        return frozenset(named & loaded.keys())

    def _watch(self) -> None:
        while not self._ended.wait(SECONDS):
            if not self.look():
                self.tidy()  # a look later, so that no request is between a name and its place in the queue

    def _take_in(self, standing: Standing) -> None:
        service, digest = self._service, standing.artifact
        if digest in service.names.digests or digest in self._failed:
            return
        try:
            served = self._read(standing)
            service.engine.call(lambda: service.models.add(base_of(served)))
            take_in(service.models, service.engine, served)
        except (PosttrainError, OSError) as error:
            self._failed.add(digest)
            service.log("alias", {"model": digest, "fault": first_line(error)})

    def _read(self, standing: Standing) -> Served:
        root = self._catalogue.root
        artifact = verify(root / standing.path)
        if artifact.digest != standing.artifact:
            raise ArtifactDamaged(f"{artifact.path} holds {artifact.digest[:12]}, not {standing.artifact[:12]}")
        doubt = find_standing(artifact, root).doubt
        if doubt is not None and not self._unpromoted:
            raise ArtifactDamaged(f"the artifact {artifact.named} {doubt}")
        return read_served(artifact, self._place, doubt)


def _version(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size

"""The follower: watches the aliases of an output root, and has a running server take each new artifact in."""

from __future__ import annotations

import threading
from pathlib import Path

from posttrain.artifact import verify
from posttrain.errors import ArtifactDamaged, PosttrainError, first_line
from posttrain.ledger import Standing
from posttrain.ledger.releases import ALIASES, histories, read
from posttrain.run.start import find_standing
from posttrain.serve.catalogue import BasePlace, Catalogue, Served, base_of, read_served
from posttrain.serve.names import names_of
from posttrain.serve.proof import prove
from posttrain.serve.service import Service

SECONDS = 0.25
"""Time between two looks at the file."""


class Follower:
    """The aliases that a server follows.

    A new artifact is verified, loaded between two tokens, and proven; then the names are replaced as a whole. Requests
    that were admitted keep their model. An alias that cannot be followed stays where it was, and the log says why.
    """

    def __init__(self, service: Service, catalogue: Catalogue, place: BasePlace, *, unpromoted: bool) -> None:
        self._service, self._catalogue, self._place, self._unpromoted = service, catalogue, place, unpromoted
        self._seen: tuple[int, ...] | None = None
        self._failed: set[str] = set()
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
        for line in moved.values():
            for standing in line[-2:]:  # the present one, and the one that a rollback brings back
                self._take_in(standing)
        digests = {alias: tuple(each.artifact for each in line) for alias, line in moved.items()}
        models, before = self._service.models, self._service.names
        self._service.names = names_of(self._catalogue, digests, frozenset(models.loaded))
        for alias, digest in self._service.names.aliases.items():
            if before.aliases.get(alias) != digest:
                self._service.log("alias", {"alias": alias, "model": digest, "before": before.aliases.get(alias)})
        return True

    def _watch(self) -> None:
        while not self._ended.wait(SECONDS):
            self.look()

    def _take_in(self, standing: Standing) -> None:
        service, digest = self._service, standing.artifact
        if digest in service.names.digests or digest in self._failed:
            return
        try:
            served = self._read(standing)
            for each in (base_of(served), served):
                service.engine.call(lambda each=each: service.models.add(each))  # type: ignore[misc]
            prove(service.models, service.engine, digest)
        except (PosttrainError, OSError) as error:
            self._failed.add(digest)
            service.models.drop(digest)
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

"""Chat templates: pinned in every artifact, read as they are, compared line by line."""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path

from posttrain.errors import ArtifactDamaged

TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"


def template_digest(template: str) -> str:
    """Return the SHA-256 of a chat template."""
    return hashlib.sha256(template.encode()).hexdigest()


def check_template(folder: Path, pinned: str) -> None:
    """Raise ArtifactDamaged with the difference when a chat template in ``folder`` is not the ``pinned`` one."""
    found = {folder / TEMPLATE: _read_text(folder / TEMPLATE)}
    if (inside := template_in_config(folder / TOKENIZER_CONFIG)) is not None:
        found[folder / TOKENIZER_CONFIG] = inside
    for path, template in found.items():
        if template != pinned:
            raise ArtifactDamaged(f"{path} is not the pinned chat template:\n{template_diff(pinned, template)}")


def template_diff(pinned: str, found: str) -> str:
    """Return the unified diff from the pinned chat template to the found one."""
    lines = difflib.unified_diff(pinned.splitlines(), found.splitlines(), "pinned", "found", lineterm="")
    return "\n".join(lines) or "they differ only in their line ends"


def template_in_config(path: Path) -> str | None:
    """Return the chat template in a tokenizer_config.json: its text, or the ``default`` of several named ones.

    None when it has none. Raises ArtifactDamaged when the file cannot be parsed.
    """
    if not path.exists():
        return None
    try:
        template = json.loads(_read_text(path)).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise ArtifactDamaged(f"{path} is damaged: {error}") from None
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # not read_text(): it would change the line ends, and so the digest
    except FileNotFoundError:
        raise ArtifactDamaged(f"{path} is missing") from None
    except UnicodeDecodeError as error:
        raise ArtifactDamaged(f"{path} is damaged: {error}") from None

"""From what a user calls a model to a directory: a path as it is, a hub id through the hub's own library.

`org/name` is fetched from Hugging Face, `modelscope:org/name` from ModelScope; both keep their own caches, and a copy
that is complete there serves without a network.
"""

from __future__ import annotations

import re
from pathlib import Path

_HUB_ID = re.compile(r"(?P<hub>modelscope:|hf:)?(?P<name>[\w.-]+/[\w.-]+)")
MODELSCOPE = "modelscope:"


def resolve_model_path(path: str) -> Path:
    """The directory of a published checkpoint. Raises: ValueError where an id cannot be resolved, with the reason."""
    found = _HUB_ID.fullmatch(path)
    if Path(path).exists() or found is None or path.startswith((".", "/")):
        return Path(path)
    parent = Path(path).parent
    if not found["hub"] and parent.is_dir() and str(parent) != ".":
        return Path(path)  # a misspelt path beside others, whose neighbours `open_checkpoint` will name
    return _from_modelscope(found["name"]) if found["hub"] == MODELSCOPE else _from_hugging_face(found["name"])


def _from_hugging_face(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model.path: no directory {name} here, and Hugging Face could not be asked for it ({reason}). Offline? "
            f"Download it elsewhere with `hf download {name}` and name the directory; ModelScope: {MODELSCOPE}{name}"
        ) from None


def _from_modelscope(name: str) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise ValueError(
            f"model.path: {MODELSCOPE}{name} needs the modelscope package; pip install modelscope, or give a directory"
        ) from None
    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.path: ModelScope could not be asked for {name} ({str(error).splitlines()[0]}); give a directory"
        ) from None

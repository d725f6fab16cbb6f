"""fetch(): a checkpoint of the Hub as a folder on this machine, so that whatever reads it reads files."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

CONFIG = "config.json"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)
# As transformers looks for them, best first: a whole file, or the index of a sharded one.
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Arguments of `from_pretrained` that say what to download and how.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
# The client warns of patterns that nothing matches; here it is no fault that a repository lacks one of several files.
logging.getLogger("huggingface_hub._snapshot_download").addFilter(
    lambda record: not record.getMessage().startswith("No files matched")
)


def fetch(name: str, weights: bool = True, **hub: Any) -> Path:
    """The folder of a checkpoint: the one named, or the cache's snapshot of one on the Hub.

    Pickled weights are downloaded only where there are no others. What an interrupted download left is completed by
    the next.

    Args:
        name: folder or Hub id.
        weights: whether the weights are needed too.
        hub: some of `HUB_ARGUMENTS`.

    Raises:
        OSError: there is no such repository, or it can't be reached or read; the message says which and what to do.
    """
    if Path(name).is_dir():
        return Path(name)
    small = (CONFIG, *PROCESSOR_FILES, *TOKENIZER_FILES)
    folder = _download(name, small, hub)
    for kinds in (SAFETENSORS, PICKLES) if weights else ():
        folder = _download(name, kinds, hub)
        if shards := _shards(folder / kinds[1]) if not (folder / kinds[0]).is_file() else []:
            folder = _download(name, shards, hub)
        if any((folder / kind).is_file() for kind in kinds):
            break
    return folder


def fetch_files(name: str, files: Sequence[str], one_of: Sequence[str] = (), **hub: Any) -> Path:
    """The folder named, or the cache's snapshot of a repository with some of its files, for what reads another layout.

    Args:
        name: folder, or Hub id.
        files: names or patterns, all of them where there are such.
        one_of: likewise, of which the first that is there is enough.
        hub: some of `HUB_ARGUMENTS`.

    Raises:
        OSError: as `fetch`, or none of `one_of` is there.
    """
    if Path(name).is_dir():
        return Path(name)
    folder = _download(name, files, hub)
    for pattern in one_of:
        folder = _download(name, [pattern], hub)
        if any(folder.glob(pattern)):
            return folder
    if one_of:
        raise OSError(f"cannot download {name}: it holds none of {', '.join(one_of)}; check the name.")
    return folder


def revision_of(folder: Path) -> str | None:
    """The commit that a folder of the cache is a snapshot of; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def _shards(index: Path) -> list[str]:
    """The files that an index lists; none where it can't be read, which is for its reader to say."""
    try:
        files = json.loads(index.read_bytes())["weight_map"].values()
        return sorted({name for name in files if Path(name).name == name})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []


def _download(name: str, files: Any, hub: dict[str, Any]) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=list(files), **hub))
    except Exception as error:  # the client's, httpx's, the disk's
        raise OSError(f"cannot download {name}: {_in_words(error, name, hub)}.") from error


def _in_words(error: Exception, name: str, hub: dict[str, Any]) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, GatedRepoError):
        return (
            f"it is gated; accept its licence at https://huggingface.co/{name} with your account there, and run "
            "'hf auth login'"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {hub.get('revision')!r}; leave it out for the newest"
    if isinstance(error, RepositoryNotFoundError):
        return "the Hub has no such model, or it is private; check the name, or run 'hf auth login'"
    if isinstance(error, HFValidationError):
        return f"that is no id of the Hub ({reason}); give OWNER/NAME"
    if isinstance(error, LocalEntryNotFoundError):
        return "it is not whole in the cache and the Hub cannot be reached; check the network and HF_HUB_OFFLINE"
    return f"{reason[:300]}; run the same command again, which goes on where this one stopped"
